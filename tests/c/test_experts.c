/* Mixtures of experts: routing, the ways of rows, and products, against float64. */
#include "testing.h"

#include "reference.h"

typedef struct sizes {
    int N, C, F, E, K, norm;
} sizes;

static const sizes cases[] = {{1, 65, 19, 8, 2, 1},   {3, 16, 33, 4, 4, 0},  {23, 40, 17, 5, 2, 0},
                              {70, 33, 24, 8, 1, 1},  {9, 7, 5, 1, 1, 1},    {37, 300, 48, 6, 3, 0},
                              {150, 24, 64, 3, 2, 1}, {40, 72, 40, 4, 1, 1}, {5, 136, 48, 8, 2, 0},
                              {2, 1608, 16, 4, 2, 1}};

static const double balance = 0.3;
enum { LAYERS = 2 };

static gpt_shape shape_of(sizes s) {
    return (gpt_shape){.N = s.N,
                       .T = s.N,
                       .C = s.C,
                       .V = 1,
                       .Vp = 64,
                       .NH = 1,
                       .NKV = 1,
                       .HS = s.C,
                       .F = s.F,
                       .E = s.E,
                       .activation = GPT_ACT_SWIGLU,
                       .training = 1,
                       .n_params = 1};
}

/* What a token has, in float64. */
typedef struct routed {
    double *probs, *gates;
    int32_t *choices, *places, *begins;
} routed;

static routed route(sizes s, const double *x, const double *w) {
    routed r = {host_zeros(s.N * s.E), host_zeros(s.N * s.K), host_ints(s.N * s.K),
                host_ints(s.N * s.K), host_ints(s.E + 1)};
    int row = 0;
    for (int n = 0; n < s.N; n++)
        ref_route(r.probs + n * s.E, r.gates + n * s.K, r.choices + n * s.K, x + n * s.C, w, s.norm,
                  s.C, s.E, s.K);
    for (int e = 0; e < s.E; e++) {
        r.begins[e] = row;
        for (int i = 0; i < s.N * s.K; i++)
            if (r.choices[i] == e) r.places[i] = row++;
    }
    r.begins[s.E] = row;
    return r;
}

static int32_t *read_ints(const void *device, int n) {
    int32_t *x = host_ints(n);
    test.ops->download(test.ctx, x, device, sizeof *x * (size_t)n);
    return x;
}

static void expect_ints(const char *what, const void *device, const int32_t *want, int n) {
    int32_t *got = read_ints(device, n);
    for (int i = 0; i < n; i++) EXPECT_NEAR(what, got[i], want[i], 0);
}

static void check_route(sizes s) {
    int R = s.N * s.K;
    test_case("N=%d C=%d E=%d K=%d norm=%d", s.N, s.C, s.E, s.K, s.norm);
    double *x = random_act(s.N * s.C, 1.0), *w = random_f32(s.E * s.C, 2 / sqrt(s.C));
    /* The last expert is as likely as the first. */
    memcpy(w + (s.E - 1) * s.C, w, sizeof *w * (size_t)s.C);
    double *dgates = random_f32(R, 1.0), *before = random_act(s.N * s.C, 1.0);
    routed r = route(s, x, w);
    double *din = host_copy(before, s.N * s.C), *dw_before = random_f32(s.E * s.C, 1.0);
    double *dw = host_copy(dw_before, s.E * s.C), *dprobs = host_zeros(s.E);
    int32_t *begins = host_ints(LAYERS * (s.E + 1)); /* another layer has all rows in expert 0 */
    for (int e = 0; e <= s.E; e++) begins[e] = e ? R : 0, begins[s.E + 1 + e] = r.begins[e];
    double rows = (double)LAYERS * s.N;
    for (int n = 0; n < s.N; n++) {
        for (int e = 0; e < s.E; e++) {
            double tokens = r.begins[e + 1] - r.begins[e] + (e ? 0 : R);
            dprobs[e] = balance * s.E * tokens / rows / rows;
        }
        ref_route_backward(din + n * s.C, dw, dprobs, dgates + n * s.K, r.probs + n * s.E,
                           r.choices + n * s.K, x + n * s.C, w, s.norm, s.C, s.E, s.K);
    }
    EACH_BACKEND {
        if (!test.ops->route_forward) continue;
        gpt_shape shape = shape_of(s);
        test_workspace(&shape);
        void *device_begins = device_i32(begins, LAYERS * (s.E + 1));
        route_forward op = {.probs = device_f32(NULL, s.N * s.E),
                            .gates = device_f32(NULL, R),
                            .choices = device_i32(NULL, R),
                            .places = device_i32(NULL, R),
                            .begins = (int32_t *)device_begins + s.E + 1,
                            .in = device_act(x, s.N * s.C),
                            .w = device_f32(w, s.E * s.C),
                            .norm = s.norm,
                            .N = s.N,
                            .C = s.C,
                            .E = s.E,
                            .K = s.K};
        test.ops->route_forward(test.ctx, &op);
        EXPECT_CLOSE("probs", read_f32(op.probs, s.N * s.E), r.probs, s.N, s.E, 1e-5);
        EXPECT_CLOSE("gates", read_f32(op.gates, R), r.gates, s.N, s.K, 1e-5);
        expect_ints("choices", op.choices, r.choices, R);
        expect_ints("places", op.places, r.places, R);
        expect_ints("begins", op.begins, r.begins, s.E + 1);
        for (int frozen = 0; frozen <= 1; frozen++) {
            route_backward back = {.din = device_act(before, s.N * s.C),
                                   .dw = frozen ? NULL : device_f32(dw_before, s.E * s.C),
                                   .dgates = device_f32(dgates, R),
                                   .in = op.in,
                                   .w = op.w,
                                   .probs = op.probs,
                                   .gates = op.gates,
                                   .choices = op.choices,
                                   .begins = device_begins,
                                   .balance = (float)balance,
                                   .norm = s.norm,
                                   .N = s.N,
                                   .C = s.C,
                                   .E = s.E,
                                   .K = s.K,
                                   .L = LAYERS};
            test.ops->route_backward(test.ctx, &back);
            EXPECT_CLOSE("din", read_act(back.din, s.N * s.C), din, s.N, s.C, test_tol(1e-5));
            if (!frozen) EXPECT_CLOSE("dw", read_f32(back.dw, s.E * s.C), dw, s.E, s.C, 2e-5);
        }
    }
}

static void check_rows(sizes s) {
    int R = s.N * s.K;
    test_case("N=%d C=%d E=%d K=%d", s.N, s.C, s.E, s.K);
    double *x = random_act(s.N * s.C, 1.0), *w = random_f32(s.E * s.C, 1.0);
    double *values = random_act(R * s.C, 1.0), *gates = random_f32(R, 1.0);
    routed r = route(s, x, w);
    double *plain = host_zeros(R * s.C), *scaled = host_zeros(R * s.C), *dgates = host_zeros(R);
    double *sums = host_zeros(s.N * s.C), *weighted = host_zeros(s.N * s.C);
    for (int i = 0; i < R; i++) {
        const double *in = x + i / s.K * s.C, *value = values + r.places[i] * s.C;
        for (int c = 0; c < s.C; c++) {
            plain[r.places[i] * s.C + c] = in[c];
            scaled[r.places[i] * s.C + c] = gates[i] * in[c];
            sums[i / s.K * s.C + c] += value[c];
            weighted[i / s.K * s.C + c] += gates[i] * value[c];
        }
        dgates[i] = test_dot(in, value, s.C);
    }
    EACH_BACKEND {
        if (!test.ops->expert_spread) continue;
        expert_spread spread = {.out = device_act(NULL, R * s.C),
                                .in = device_act(x, s.N * s.C),
                                .places = device_i32(r.places, R),
                                .N = s.N,
                                .C = s.C,
                                .K = s.K};
        test.ops->expert_spread(test.ctx, &spread);
        EXPECT_SAME("spread", read_act(spread.out, R * s.C), plain, R * s.C);
        spread.values = device_act(values, R * s.C), spread.gates = device_f32(gates, R);
        spread.dgates = device_f32(NULL, R);
        test.ops->expert_spread(test.ctx, &spread);
        EXPECT_CLOSE("scaled", read_act(spread.out, R * s.C), scaled, R, s.C, test_tol(1e-6));
        EXPECT_CLOSE("dgates", read_f32(spread.dgates, R), dgates, 1, R, 1e-5);
        expert_combine combine = {.out = device_act(NULL, s.N * s.C),
                                  .in = spread.values,
                                  .places = spread.places,
                                  .N = s.N,
                                  .C = s.C,
                                  .K = s.K};
        test.ops->expert_combine(test.ctx, &combine);
        EXPECT_CLOSE("sums", read_act(combine.out, s.N * s.C), sums, s.N, s.C, test_tol(1e-6));
        combine.gates = spread.gates;
        test.ops->expert_combine(test.ctx, &combine);
        EXPECT_CLOSE("weighted", read_act(combine.out, s.N * s.C), weighted, s.N, s.C,
                     test_tol(1e-6));
    }
}

/* SwiGLU up and its gradient, expert by expert. Weights of idle experts are not there. */
static void check_products(sizes s) {
    int R = s.N * s.K, C = s.C, F = s.F;
    test_case("R=%d C=%d F=%d E=%d", R, C, F, s.E);
    double *in = random_act(R * C, 1.0), *w = random_act(s.E * 2 * F * C, 1 / sqrt(C));
    double *dout = random_act(R * C, 1.0), *down = random_act(s.E * C * F, 1 / sqrt(F));
    int32_t *begins = host_ints(s.E + 1);
    for (int e = 0; e <= s.E; e++) begins[e] = e < s.E ? R * (e / 2) / s.E : R;
    double *pre = host_zeros(R * 2 * F), *out = host_zeros(R * F), *dpre = host_zeros(R * 2 * F);
    double *dout_fc = host_zeros(R * F), *fc = host_zeros(R * F);
    double *dw = host_zeros(s.E * C * F), *dw_before = random_f32(s.E * C * F, 1.0);
    for (int e = 0; e < s.E; e++) {
        int n = begins[e + 1] - begins[e], at = begins[e];
        ref_linear_forward(pre + at * 2 * F, in + at * C, w + e * 2 * F * C, NULL, n, C, 2 * F);
    }
    for (int i = 0; i < R * 2 * F; i++) pre[i] = round_act(pre[i]);
    ref_activation_forward(out, pre, GPT_ACT_SWIGLU, R, F);
    for (int i = 0; i < R * F; i++) fc[i] = round_act(out[i]);
    for (int e = 0; e < s.E; e++) {
        int n = begins[e + 1] - begins[e], at = begins[e];
        ref_linear_backward(dout_fc + at * F, dw + e * C * F, NULL, dout + at * C, fc + at * F,
                            down + e * C * F, n, F, C);
    }
    ref_activation_backward(dpre, dout_fc, pre, GPT_ACT_SWIGLU, R, F);
    EACH_BACKEND {
        if (!test.ops->expert_forward) continue;
        gpt_shape shape = shape_of(s);
        test_workspace(&shape);
        weight *up[GPT_MAX_EXPERTS] = {0}, *back[GPT_MAX_EXPERTS] = {0};
        weight *grads[GPT_MAX_EXPERTS] = {0};
        for (int e = 0; e < s.E; e++) {
            if (begins[e + 1] == begins[e]) continue;
            up[e] = device_weight(w + e * 2 * F * C, 2 * F, C, 2);
            back[e] = device_weight(down + e * C * F, C, F, 1);
        }
        void *device_begins = device_i32(begins, s.E + 1);
        expert_forward op = {.out = device_act(NULL, R * F),
                             .pre = device_act(NULL, R * 2 * F),
                             .in = device_act(in, R * C),
                             .w = up,
                             .begins = device_begins,
                             .activation = GPT_ACT_SWIGLU,
                             .exact = 1,
                             .R = R,
                             .E = s.E,
                             .IC = C,
                             .OC = F};
        test.ops->expert_forward(test.ctx, &op);
        EXPECT_CLOSE("pre", read_act(op.pre, R * 2 * F), pre, R, 2 * F, test_tols(1e-5, 1e-2));
        EXPECT_CLOSE("out", read_act(op.out, R * F), out, R, F, test_tols(1e-5, 1e-2));
        for (int add = 0; add <= 1; add++) {
            for (int e = 0; e < s.E; e++) grads[e] = device_f32(dw_before + e * C * F, C * F);
            expert_backward b = {.din = device_act(NULL, R * 2 * F),
                                 .dw = grads,
                                 .dout = device_act(dout, R * C),
                                 .in = device_act(fc, R * F),
                                 .w = back,
                                 .pre = device_act(pre, R * 2 * F),
                                 .begins = device_begins,
                                 .activation = GPT_ACT_SWIGLU,
                                 .add = add,
                                 .R = R,
                                 .E = s.E,
                                 .IC = F,
                                 .OC = C};
            test.ops->expert_backward(test.ctx, &b);
            EXPECT_CLOSE("din", read_act(b.din, R * 2 * F), dpre, R, 2 * F, test_tols(2e-5, 2e-2));
            double *got = host_zeros(s.E * C * F), *want = host_copy(dw, s.E * C * F);
            for (int i = 0; add && i < s.E * C * F; i++) want[i] += dw_before[i];
            for (int e = 0; e < s.E; e++)
                memcpy(got + e * C * F, read_f32(grads[e], C * F), sizeof *got * (size_t)(C * F));
            EXPECT_CLOSE("dw", got, want, s.E * C, F, test_tols(2e-5, 1e-2));
        }
    }
}

static void test_route(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) check_route(cases[i]);
}

static void test_rows(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) check_rows(cases[i]);
}

static void test_products(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) check_products(cases[i]);
}

/* The reference's gradients, by finite differences. */
typedef struct state {
    sizes s;
    double *x, *w, *dgates;
} state;

static double loss_of(void *pointer) {
    const state *p = pointer;
    routed r = route(p->s, p->x, p->w);
    double *tokens = host_zeros(p->s.E), sum = test_dot(r.gates, p->dgates, p->s.N * p->s.K);
    for (int i = 0; i < p->s.N * p->s.K; i++) tokens[r.choices[i]]++;
    for (int n = 0; n < p->s.N; n++)
        for (int e = 0; e < p->s.E; e++)
            sum += balance * p->s.E * tokens[e] / p->s.N * r.probs[n * p->s.E + e] / p->s.N;
    return sum;
}

static void test_reference(void) {
    for (int norm = 0; norm <= 1; norm++) {
        state p = {.s = {4, 6, 1, 5, 2, norm}};
        sizes s = p.s;
        test_case("finite differences, norm=%d", norm);
        p.x = random_f32(s.N * s.C, 1.0), p.w = random_f32(s.E * s.C, 1.0);
        p.dgates = random_f32(s.N * s.K, 1.0);
        routed r = route(s, p.x, p.w);
        double *dx = host_zeros(s.N * s.C), *dw = host_zeros(s.E * s.C);
        double *dprobs = host_zeros(s.E);
        for (int n = 0; n < s.N; n++) {
            for (int e = 0; e < s.E; e++)
                dprobs[e] = balance * s.E * (r.begins[e + 1] - r.begins[e]) / s.N / s.N;
            ref_route_backward(dx + n * s.C, dw, dprobs, p.dgates + n * s.K, r.probs + n * s.E,
                               r.choices + n * s.K, p.x + n * s.C, p.w, norm, s.C, s.E, s.K);
        }
        EXPECT_GRADIENT("dx", loss_of, &p, p.x, dx, s.N * s.C);
        EXPECT_GRADIENT("dw", loss_of, &p, p.w, dw, s.E * s.C);
    }
}

TEST_OPS_MAIN({"reference", test_reference}, {"route", test_route}, {"rows", test_rows},
              {"products", test_products})
