/* linear_forward, linear_backward with every activation, and head_forward. */
#include "testing.h"

#include "reference.h"

typedef struct sizes {
    int N, IC, OC;
} sizes;

/* Small and odd, then the borders of tiles in each of the three directions. */
static const sizes cases[] = {
    {1, 1, 1},
    {1, 3, 5},
    {3, 5, 33},
    {7, 33, 65},
    {65, 65, 96},
    {65, 96, 128},
    {7, 128, 3},
    {3, 1, 65},
    {65, 5, 1},
    {63, 64, 63},
    {64, 63, 65},
    {129, 65, 64},
    {127, 33, 129},
    {2, 256, 257},
    {1, 257, 255},
    {257, 7, 15},
    {16, 16, 512},
    {33, 129, 31},
    {2, 65, 40},
    {4, 17, 70},
    {5, 40, 9},
    {6, 33, 130},
    /* few rows of a weight gradient, whose columns threads share in whole groups */
    {3, 100, 40},
    {35, 127, 64},
    /* sums of more terms, and more rows, than are taken at once */
    {3, 1601, 17},
    {5, 18, 1601},
    {66, 2048, 19}, /* rows that share few sets of the cache */
    {67, 21, 1024},
    {2101, 5, 18},
    /* more rows, columns and terms than a block of packed fp32 panels has, each in turn and not whole */
    {107, 70, 403},
    {521, 17, 90},
    {259, 403, 9},
    {70, 601, 25},
    {5, 528, 501},   /* a gradient and weights that are written past the caches */
    {1301, 405, 14}, /* a gradient that vectors of 16 take from panels */
    {14, 515, 1024}, /* an input's that they do, from rows that share a set of the cache */
};

static const int activations[] = {GPT_ACT_NONE,     GPT_ACT_GELU, GPT_ACT_SWISH, GPT_ACT_SWIGLU,
                                  GPT_ACT_GELU_ERF, GPT_ACT_RELU, GPT_ACT_GEGLU};
static const char *const activation_names[] = {"none",     "gelu", "swish", "swiglu",
                                               "gelu_erf", "relu", "geglu"};

static int max_int(int a, int b) {
    return a > b ? a : b;
}

/* The layer with an activation after it goes from C to F, the one with it before from
 * F to C; a layer without any may have the shape of either or of the attention's. */
static gpt_shape shape_of(sizes s, int activation, int from_ff, int training) {
    int C = from_ff ? s.OC : s.IC, F = from_ff ? s.IC : s.OC;
    if (activation == GPT_ACT_NONE) C = F = max_int(s.IC, s.OC);
    return (gpt_shape){.N = s.N,
                       .T = s.N,
                       .C = C,
                       .V = 2,
                       .Vp = 2,
                       .NH = 1,
                       .NKV = 1,
                       .HS = C,
                       .F = F,
                       .activation = activation,
                       .training = training,
                       .n_params = 1};
}

static void check_forward(sizes s, int activation, int use_b) {
    int width = ref_activation_width(activation, s.OC), keeps_pre = activation != GPT_ACT_NONE;
    int64_t out_size = (int64_t)s.N * s.OC, pre_size = (int64_t)s.N * width;
    test_case("N=%d IC=%d OC=%d %s b=%d", s.N, s.IC, s.OC, activation_names[activation], use_b);
    double *in = random_act((int64_t)s.N * s.IC, 1.0);
    double *w = random_act((int64_t)width * s.IC, 1.5 / sqrt(s.IC));
    double *b = use_b ? random_act(width, 1.0) : NULL;
    double *y = host_zeros(pre_size), *want = host_zeros(out_size);
    ref_linear_forward(y, in, w, b, s.N, s.IC, width);
    ref_activation_forward(want, y, activation, s.N, s.OC);
    EACH_BACKEND {
        for (int training = 0; training < 2; training++) {
            gpt_shape shape = shape_of(s, activation, 0, training);
            void *out = device_act(NULL, out_size);
            void *pre = training && keeps_pre ? device_act(NULL, pre_size) : NULL;
            test_workspace(&shape);
            test.ops->linear_forward(
                test.ctx, &(linear_forward){.out = out,
                                            .pre = pre,
                                            .in = device_act(in, (int64_t)s.N * s.IC),
                                            .w = device_weight(w, width, s.IC, width / s.OC),
                                            .b = device_bias(b, width),
                                            .activation = activation,
                                            .N = s.N,
                                            .IC = s.IC,
                                            .OC = s.OC});
            EXPECT_CLOSE("out", read_act(out, out_size), want, s.N, s.OC, test_tol(5e-6));
            if (pre) {
                EXPECT_CLOSE("pre", read_act(pre, pre_size), y, s.N, width, test_tol(5e-6));
            }
        }
    }
}

/* y added to what is there, and rounded once: to out without an activation, else to pre. */
static void check_added(sizes s, int activation) {
    int width = ref_activation_width(activation, s.OC), activates = activation != GPT_ACT_NONE;
    int64_t out_size = (int64_t)s.N * s.OC, y_size = (int64_t)s.N * width;
    test_case("added N=%d IC=%d OC=%d %s", s.N, s.IC, s.OC, activation_names[activation]);
    double *in = random_act((int64_t)s.N * s.IC, 1.0), *b = random_act(width, 1.0);
    double *w = random_act((int64_t)width * s.IC, 1.5 / sqrt(s.IC));
    double *there = random_act(y_size, 1.0), *y = host_zeros(y_size), *want = host_zeros(out_size);
    ref_linear_forward(y, in, w, b, s.N, s.IC, width);
    for (int64_t i = 0; i < y_size; i++) y[i] += there[i];
    ref_activation_forward(want, y, activation, s.N, s.OC);
    EACH_BACKEND {
        if (!test.ops->joins_adapters) continue;
        gpt_shape shape = shape_of(s, activation, 0, 0);
        void *sums = device_act(there, y_size),
             *out = activates ? device_act(NULL, out_size) : sums;
        test_workspace(&shape);
        test.ops->linear_forward(test.ctx,
                                 &(linear_forward){.out = out,
                                                   .pre = activates ? sums : NULL,
                                                   .in = device_act(in, (int64_t)s.N * s.IC),
                                                   .w = device_weight(w, width, s.IC, width / s.OC),
                                                   .b = device_bias(b, width),
                                                   .activation = activation,
                                                   .add = 1,
                                                   .N = s.N,
                                                   .IC = s.IC,
                                                   .OC = s.OC});
        EXPECT_CLOSE("out", read_act(out, out_size), want, s.N, s.OC, test_tol(5e-6));
        if (activates) EXPECT_CLOSE("pre", read_act(sums, y_size), y, s.N, width, test_tol(5e-6));
    }
}

static void test_forward(void) {
    /* Few rows, in vectors, of more terms than a warp reads at once. */
    for (int N = 1; N < 10; N++)
        for (int a = 0; a < TEST_COUNT(activations); a++)
            check_forward((sizes){N, 808 * (N % 3) + 8, 8 * (N % 2) + 5}, activations[a], N % 2);
    /* More rows, in vectors: small tiles and large ones, whose warps have terms in turns, some of them none. */
    static const sizes some[] = {{9, 8, 5},     {16, 264, 25},  {17, 520, 48}, {31, 40, 97},
                                 {33, 808, 41}, {47, 1544, 24}, {64, 32, 121}, {64, 2312, 50}};
    for (int i = 0; i < TEST_COUNT(some); i++)
        for (int a = i % test_step(2); a < TEST_COUNT(activations); a += test_step(2))
            check_forward(some[i], activations[a], (i + a) % 2);
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        for (int a = i % test_step(3); a < TEST_COUNT(activations); a += test_step(3)) {
            check_forward(cases[i], activations[a], (i + a) % 2);
            check_added(cases[i], activations[a]);
        }
    }
    for (int a = 0; a < TEST_COUNT(activations); a++) {
        check_forward((sizes){5, 33, 17}, activations[a], 0);
        check_forward((sizes){5, 33, 17}, activations[a], 1);
    }
}

/* Inputs far out on both sides, where exp overflows if it is let. */
static void test_activation_range(void) {
    enum { N = 161 };
    for (int a = 1; a < TEST_COUNT(activations); a++) {
        int activation = activations[a], width = ref_activation_width(activation, 1);
        test_case("%s over -200..200", activation_names[activation]);
        double *in = host_zeros(N), *w = host_zeros(2);
        for (int n = 0; n < N; n++) in[n] = (n - N / 2) * 2.5;
        w[0] = w[1] = 1.0;
        double *y = host_zeros(N * width), *want = host_zeros(N), *dout = host_zeros(N);
        double *dy = host_zeros(N * width), *one = host_zeros(1);
        for (int n = 0; n < N; n++) dout[n] = one[0] = 1.0;
        ref_linear_forward(y, in, w, NULL, N, 1, width);
        ref_activation_forward(want, y, activation, N, 1);
        ref_activation_backward(dy, dout, y, activation, N, 1);
        gpt_shape shape = shape_of((sizes){N, 1, 1}, activation, 0, 1);
        EACH_BACKEND {
            void *out = device_act(NULL, N), *pre = device_act(NULL, N * width);
            void *din = device_act(NULL, N * width);
            test_workspace(&shape);
            test.ops->linear_forward(test.ctx,
                                     &(linear_forward){.out = out,
                                                       .pre = pre,
                                                       .in = device_act(in, N),
                                                       .w = device_weight(w, width, 1, width),
                                                       .activation = activation,
                                                       .N = N,
                                                       .IC = 1,
                                                       .OC = 1});
            test.ops->linear_backward(test.ctx, &(linear_backward){.din = din,
                                                                   .dw = device_f32(one, 1),
                                                                   .dout = device_act(dout, N),
                                                                   .in = out,
                                                                   .w = device_weight(one, 1, 1, 1),
                                                                   .pre = pre,
                                                                   .activation = activation,
                                                                   .add = 1,
                                                                   .N = N,
                                                                   .IC = 1,
                                                                   .OC = 1});
            EXPECT_CLOSE("out", read_act(out, N), want, N, 1, test_tol(2e-5));
            EXPECT_CLOSE("dpre", read_act(din, N * width), dy, N, width, test_tol(2e-5));
        }
    }
}

/* Rows that are multiplied alone are the same to the bit as among others, so that a text does not
 * depend on the others in the batch. The tiles of AMX do not promise that, nor does a GPU's library. A GPU has
 * one kernel for a few rows, and for bf16 one for more. */
static void check_rows_alone(int IC, int OC) {
    enum { MOST = 64, FEW = 8 };
    static const int counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 25, 31, MOST};
    test_case("IC=%d OC=%d", IC, OC);
    double *in = random_act((int64_t)MOST * IC, 1.0), *w = random_act((int64_t)OC * IC, 1.0);
    EACH_BACKEND {
        if (strstr(test.ops->name, "amx")) continue;
        gpt_shape shape = shape_of((sizes){MOST, IC, OC}, GPT_ACT_NONE, 0, 0);
        test_workspace(&shape);
        const void *weight = device_weight(w, OC, IC, 1);
        double *all = NULL;
        for (int i = TEST_COUNT(counts) - 1; i >= 0; i--) {
            int on_library = IC % 8 || (counts[i] > FEW && test.ops->act_bytes > 2);
            if (!test_on_cpu() && on_library) continue;
            if (!test_on_cpu() && counts[i] == FEW) all = NULL;
            int64_t n = (int64_t)counts[i] * OC;
            void *out = device_act(NULL, n);
            test.ops->linear_forward(
                test.ctx, &(linear_forward){.out = out,
                                            .in = device_act(in, (int64_t)counts[i] * IC),
                                            .w = weight,
                                            .N = counts[i],
                                            .IC = IC,
                                            .OC = OC});
            double *got = read_act(out, n);
            if (!all) all = got;
            EXPECT_SAME("rows", got, all, n);
        }
    }
}

static void test_rows_alone(void) {
    check_rows_alone(1, 3);
    check_rows_alone(37, 50);
    check_rows_alone(64, 192);
    check_rows_alone(96, 33);
    check_rows_alone(256, 65);
    check_rows_alone(1024, 203);
    check_rows_alone(2051, 40);
}

/* With an activation, the layer's input is activation(pre) and din the gradient of pre. */
static void check_backward(sizes s, int activation, int use_db) {
    int width = ref_activation_width(activation, s.IC), has_pre = activation != GPT_ACT_NONE;
    int64_t in_size = (int64_t)s.N * s.IC, out_size = (int64_t)s.N * s.OC;
    int64_t w_size = (int64_t)s.OC * s.IC, din_size = (int64_t)s.N * width;
    test_case("N=%d IC=%d OC=%d %s db=%d", s.N, s.IC, s.OC, activation_names[activation], use_db);
    double *pre = random_act(din_size, 1.5), *in = host_zeros(in_size);
    ref_activation_forward(in, pre, activation, s.N, s.IC);
    for (int64_t i = 0; i < in_size; i++) in[i] = round_act(in[i]);
    double *dout = random_act(out_size, 1.0), *w = random_act(w_size, 1.0);
    double *dw = random_f32(w_size, 1.0), *db = use_db ? random_f32(s.OC, 1.0) : NULL;
    double *want_dw = host_copy(dw, w_size), *want_db = db ? host_copy(db, s.OC) : NULL;
    double *dactivated = host_zeros(in_size), *want = host_zeros(din_size);
    ref_linear_backward(dactivated, want_dw, want_db, dout, in, w, s.N, s.IC, s.OC);
    ref_activation_backward(want, dactivated, pre, activation, s.N, s.IC);
    gpt_shape shape = shape_of(s, activation, 1, 1);
    EACH_BACKEND {
        void *din = device_act(NULL, din_size), *device_dw = device_f32(dw, w_size);
        void *device_db = db ? device_f32(db, s.OC) : NULL;
        test_workspace(&shape);
        test.ops->linear_backward(
            test.ctx, &(linear_backward){.din = din,
                                         .dw = device_dw,
                                         .db = device_db,
                                         .dout = device_act(dout, out_size),
                                         .in = device_act(in, in_size),
                                         .w = device_weight(w, s.OC, s.IC, 1),
                                         .pre = has_pre ? device_act(pre, din_size) : NULL,
                                         .activation = activation,
                                         .add = 1,
                                         .N = s.N,
                                         .IC = s.IC,
                                         .OC = s.OC});
        EXPECT_CLOSE("din", read_act(din, din_size), want, s.N, width, test_tol(1e-5));
        EXPECT_CLOSE("dw", read_f32(device_dw, w_size), want_dw, s.OC, s.IC, test_tol(1e-5));
        if (db) EXPECT_CLOSE("db", read_f32(device_db, s.OC), want_db, 1, s.OC, test_tol(1e-5));
        /* dw =, and the layer's input recomputed from pre by tables that can */
        void *again = device_f32(NULL, w_size);
        int recomputes = has_pre && test.ops->makes_activations;
        test.ops->linear_backward(
            test.ctx, &(linear_backward){.din = din,
                                         .dw = again,
                                         .dout = device_act(dout, out_size),
                                         .in = recomputes ? NULL : device_act(in, in_size),
                                         .w = device_weight(w, s.OC, s.IC, 1),
                                         .pre = has_pre ? device_act(pre, din_size) : NULL,
                                         .activation = activation,
                                         .add = 0,
                                         .N = s.N,
                                         .IC = s.IC,
                                         .OC = s.OC});
        double *got = read_f32(again, w_size);
        for (int64_t i = 0; i < w_size; i++) got[i] += dw[i];
        EXPECT_CLOSE("dw =", got, want_dw, s.OC, s.IC, test_tol(1e-5));
        if (recomputes) { /* or made with din, in the place of pre */
            void *place = device_act(pre, din_size), *made = device_act(NULL, in_size);
            void *dw_made = device_f32(NULL, w_size);
            test.ops->linear_backward(test.ctx,
                                      &(linear_backward){.din = place,
                                                         .dw = dw_made,
                                                         .dout = device_act(dout, out_size),
                                                         .w = device_weight(w, s.OC, s.IC, 1),
                                                         .pre = place,
                                                         .activation = activation,
                                                         .N = s.N,
                                                         .IC = s.IC,
                                                         .OC = s.OC,
                                                         .made = made});
            EXPECT_CLOSE("made", read_act(made, in_size), in, s.N, s.IC, test_tol(1e-5));
            EXPECT_SAME("din in place", read_act(place, din_size), read_act(din, din_size),
                        din_size);
            EXPECT_SAME("dw of made", read_f32(dw_made, w_size), read_f32(again, w_size), w_size);
        }
        /* dw or both not wanted: din and db as they were */
        for (int use = 0; use < 2; use++) {
            void *alone = device_act(NULL, din_size), *sums = db ? device_f32(db, s.OC) : NULL;
            test.ops->linear_backward(
                test.ctx, &(linear_backward){.din = alone,
                                             .db = use ? sums : NULL,
                                             .dout = device_act(dout, out_size),
                                             .in = device_act(in, in_size),
                                             .w = device_weight(w, s.OC, s.IC, 1),
                                             .pre = has_pre ? device_act(pre, din_size) : NULL,
                                             .activation = activation,
                                             .add = 1,
                                             .N = s.N,
                                             .IC = s.IC,
                                             .OC = s.OC});
            EXPECT_SAME("din alone", read_act(alone, din_size), read_act(din, din_size), din_size);
            if (use && db)
                EXPECT_SAME("db alone", read_f32(sums, s.OC), read_f32(device_db, s.OC), s.OC);
        }
    }
}

static void test_backward(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        for (int a = i % test_step(3); a < TEST_COUNT(activations); a += test_step(3)) {
            check_backward(cases[i], activations[a], (i + a) % 2);
        }
    }
    /* more rows of both gradients than a block of panels of 16 lanes has */
    if (!test_is_short()) check_backward((sizes){205, 1030, 515}, GPT_ACT_NONE, 1);
}

/* The padding rows of wte hold large numbers, which must not reach the logits. */
static void check_head(int N, int C, int V, int Vp, double cap, int has_bias) {
    int64_t size = (int64_t)N * V;
    test_case("N=%d C=%d V=%d Vp=%d cap=%g bias=%d", N, C, V, Vp, cap, has_bias);
    double *x = random_act((int64_t)N * C, 1.0), *wte = random_act((int64_t)Vp * C, 1.0);
    for (int64_t i = (int64_t)V * C; i < (int64_t)Vp * C; i++) wte[i] = 1e4;
    double *want = host_zeros(size), *b = random_f32(Vp, has_bias);
    for (int v = V; v < Vp; v++) b[v] = 1e4;
    ref_linear_forward(want, x, wte, has_bias ? b : NULL, N, C, V);
    for (int64_t i = 0; i < size; i++) want[i] = ref_capped(want[i], cap);
    EACH_BACKEND {
        gpt_shape shape = {.N = N,
                           .T = N,
                           .C = C,
                           .V = V,
                           .Vp = Vp,
                           .NH = 1,
                           .NKV = 1,
                           .HS = C,
                           .F = C,
                           .activation = GPT_ACT_GELU,
                           .n_params = 1};
        void *logits = device_f32(NULL, (int64_t)N * Vp);
        test_workspace(&shape);
        test.ops->head_forward(test.ctx, &(head_forward){.logits = logits,
                                                         .x = device_act(x, (int64_t)N * C),
                                                         .wte = device_weight(wte, Vp, C, 1),
                                                         .cap = (float)cap,
                                                         .b = has_bias ? device_f32(b, Vp) : NULL,
                                                         .N = N,
                                                         .C = C,
                                                         .V = V,
                                                         .Vp = Vp});
        EXPECT_CLOSE("logits", read_head(logits, N, V, Vp), want, N, V, test_tol(5e-6));
    }
}

static void test_head(void) {
    static const int vocabularies[][2] = {{2, 2},    {2, 64},    {7, 64},
                                          {65, 128}, {256, 256}, {300, 320}};
    static const int rows[] = {1, 3, 7, 65}, widths[] = {1, 5, 33, 96, 128};
    for (int v = 0; v < TEST_COUNT(vocabularies); v++) {
        for (int i = 0; i < TEST_COUNT(rows) * TEST_COUNT(widths); i++) {
            check_head(rows[i % TEST_COUNT(rows)], widths[i / TEST_COUNT(rows)], vocabularies[v][0],
                       vocabularies[v][1], i % 3 ? 0 : 2.5, i % 2);
        }
    }
}

typedef struct state {
    double *pre, *in, *w, *b, *dout, *out;
    int activation, N, IC, OC;
} state;

static double loss_of(void *pointer) {
    state *s = pointer;
    ref_activation_forward(s->in, s->pre, s->activation, s->N, s->IC);
    ref_linear_forward(s->out, s->in, s->w, s->b, s->N, s->IC, s->OC);
    return test_dot(s->out, s->dout, (int64_t)s->N * s->OC);
}

static void test_reference(void) {
    enum { N = 3, IC = 4, OC = 5 };
    for (int a = 0; a < TEST_COUNT(activations); a++) {
        int width = ref_activation_width(activations[a], IC);
        test_case("%s", activation_names[activations[a]]);
        state s = {random_f32(N * width, 1.0),
                   host_zeros(N * IC),
                   random_f32(OC * IC, 1.0),
                   random_f32(OC, 1.0),
                   random_f32(N * OC, 1.0),
                   host_zeros(N * OC),
                   activations[a],
                   N,
                   IC,
                   OC};
        double *din = host_zeros(N * IC), *dw = host_zeros(OC * IC), *db = host_zeros(OC);
        double *dpre = host_zeros(N * width);
        loss_of(&s);
        ref_linear_backward(din, dw, db, s.dout, s.in, s.w, N, IC, OC);
        ref_activation_backward(dpre, din, s.pre, activations[a], N, IC);
        EXPECT_GRADIENT("dpre", loss_of, &s, s.pre, dpre, N * width);
        EXPECT_GRADIENT("dw", loss_of, &s, s.w, dw, OC * IC);
        EXPECT_GRADIENT("db", loss_of, &s, s.b, db, OC);
    }
}

TEST_OPS_MAIN({"reference", test_reference}, {"linear forward", test_forward},
              {"rows alone", test_rows_alone}, {"activation range", test_activation_range},
              {"linear backward", test_backward}, {"head", test_head})
