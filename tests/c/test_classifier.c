/* classifier_forward, classifier_backward. */
#include "testing.h"

#include "reference.h"

typedef struct sizes {
    int N, C, V, Vp;
} sizes;

static const sizes cases[] =
    {
        {1, 1, 2, 2},       {1, 3, 2, 64},      {3, 5, 7, 64},      {7, 33, 65, 128},
        {65, 65, 65, 66},   {65, 96, 256, 256}, {7, 128, 300, 320}, {1, 33, 300, 384},
        {130, 5, 7, 8},     {257, 3, 65, 80},   {3, 129, 257, 272}, {513, 2, 2, 3},
        {5, 7, 2101, 2112}, /* more columns than become a gradient at once */
};

static gpt_shape shape_of(sizes s, int training) {
    return (gpt_shape){.N = s.N,
                       .T = s.N,
                       .C = s.C,
                       .V = s.V,
                       .Vp = s.Vp,
                       .NH = 1,
                       .NKV = 1,
                       .HS = s.C,
                       .F = s.C,
                       .activation = GPT_ACT_GELU,
                       .logit_cap = ref_logit_cap > 0,
                       .head_bias = ref_head_bias != NULL,
                       .training = training,
                       .n_params = (int64_t)s.Vp * s.C};
}

/* Rows of wte past V hold numbers that would win every softmax they took part in. */
static double *random_wte(sizes s, double scale) {
    double *wte = random_act((int64_t)s.Vp * s.C, scale);
    for (int64_t i = (int64_t)s.V * s.C; i < (int64_t)s.Vp * s.C; i++) wte[i] = 1024.0;
    return wte;
}

/* That of the reference, or NULL. */
static void *head_bias_there(sizes s) {
    return ref_head_bias ? device_f32(ref_head_bias, s.Vp) : NULL;
}

/* Every third target is ignored, or all of them, or none. */
static int32_t *random_targets(sizes s, int ignored) {
    int32_t *targets = random_ints(s.N, s.V);
    for (int n = 0; n < s.N; n++) {
        if (ignored == 2 || (ignored == 1 && n % 3 == 1)) targets[n] = -1;
    }
    return targets;
}

static void check_zero_where_ignored(sizes s, const int32_t *targets, const double *losses,
                                     const double *dx) {
    for (int n = 0; n < s.N; n++) {
        if (targets[n] != -1) continue;
        EXPECT(losses[n] == 0.0);
        for (int c = 0; dx && c < s.C; c++) EXPECT(dx[n * s.C + c] == 0.0);
    }
}

static void check_forward(sizes s, const double *x, const double *wte, const int32_t *targets,
                          const double *want) {
    gpt_shape shape = shape_of(s, 0);
    EACH_BACKEND {
        void *losses = device_f32(NULL, s.N);
        test_workspace(&shape);
        test.ops->classifier_forward(test.ctx,
                                     &(classifier_forward){.losses = losses,
                                                           .x = device_act(x, (int64_t)s.N * s.C),
                                                           .wte = device_weight(wte, s.Vp, s.C, 1),
                                                           .targets = device_i32(targets, s.N),
                                                           .N = s.N,
                                                           .C = s.C,
                                                           .cap = (float)ref_logit_cap,
                                                           .b = head_bias_there(s),
                                                           .V = s.V,
                                                           .Vp = s.Vp});
        double *got = read_f32(losses, s.N);
        EXPECT_CLOSE("losses", got, want, 1, s.N, test_tol(1e-5));
        check_zero_where_ignored(s, targets, got, NULL);
    }
}

static void check_backward(sizes s, const double *x, const double *wte, const int32_t *targets,
                           double scale) {
    int64_t x_size = (int64_t)s.N * s.C, wte_size = (int64_t)s.Vp * s.C, used = (int64_t)s.V * s.C;
    double *dwte = random_f32(wte_size, fabs(scale)), *want_dwte = host_copy(dwte, wte_size);
    double *want_dx = host_zeros(x_size), *want = host_zeros(s.N);
    double *db = random_f32(s.Vp, fabs(scale)), *want_db = host_copy(db, s.Vp);
    ref_head_db = ref_head_bias ? want_db : NULL;
    ref_classifier(want, want_dx, want_dwte, x, wte, targets, scale, s.N, s.C, s.V);
    ref_head_db = NULL;
    double before = random_f32(1, 1.0)[0], sum = 0, size = 0; /* of what is added to the total */
    for (int n = 0; n < s.N; n++) sum += scale * want[n], size += fabs(scale * want[n]);
    gpt_shape shape = shape_of(s, 1);
    EACH_BACKEND {
        void *losses = device_f32(NULL, s.N), *dx = device_act(NULL, x_size);
        void *total = device_f32(&before, 1);
        void *device_dwte = device_f32(dwte, wte_size), *device_db = device_f32(db, s.Vp);
        test_workspace(&shape);
        test.ops->classifier_backward(
            test.ctx, &(classifier_backward){.losses = losses,
                                             .total = total,
                                             .dx = dx,
                                             .dwte = device_dwte,
                                             .x = device_act(x, x_size),
                                             .wte = device_weight(wte, s.Vp, s.C, 1),
                                             .targets = device_i32(targets, s.N),
                                             .scale = (float)scale,
                                             .add = 1,
                                             .N = s.N,
                                             .C = s.C,
                                             .cap = (float)ref_logit_cap,
                                             .b = head_bias_there(s),
                                             .db = ref_head_bias ? device_db : NULL,
                                             .V = s.V,
                                             .Vp = s.Vp});
        double *got = read_f32(losses, s.N), *got_dx = read_act(dx, x_size);
        EXPECT_CLOSE("losses", got, want, 1, s.N, test_tol(1e-5));
        EXPECT_CLOSE("dx", got_dx, want_dx, s.N, s.C, test_tol(2e-5));
        check_zero_where_ignored(s, targets, got, got_dx);
        got = read_f32(device_dwte, wte_size);
        EXPECT_CLOSE("dwte", got, want_dwte, s.V, s.C, test_tol(2e-5));
        double *got_db = read_f32(device_db, s.Vp);
        EXPECT_CLOSE("db", got_db, want_db, 1, s.V, test_tol(2e-5));
        EXPECT_SAME("db, padding", got_db + s.V, db + s.V, s.Vp - s.V);
        EXPECT_SAME("dwte, padding rows", got + used, dwte + used, wte_size - used);
        EXPECT_NEAR("total", read_f32(total, 1)[0], before + sum, test_tol(1e-5) * (size + 1));

        device_dwte = device_f32(NULL, wte_size); /* not to be read, nor is this: */
        total = device_f32(NULL, 1);
        test.ops->classifier_backward(
            test.ctx, &(classifier_backward){.losses = losses,
                                             .total = total,
                                             .dx = dx,
                                             .dwte = device_dwte,
                                             .x = device_act(x, x_size),
                                             .wte = device_weight(wte, s.Vp, s.C, 1),
                                             .targets = device_i32(targets, s.N),
                                             .scale = (float)scale,
                                             .add = 0,
                                             .N = s.N,
                                             .C = s.C,
                                             .cap = (float)ref_logit_cap,
                                             .b = head_bias_there(s),
                                             .V = s.V,
                                             .Vp = s.Vp});
        got = read_f32(device_dwte, used);
        for (int64_t i = 0; i < used; i++) got[i] += dwte[i];
        EXPECT_CLOSE("dwte =", got, want_dwte, s.V, s.C, test_tol(2e-5));
        EXPECT_NEAR("total =", read_f32(total, 1)[0], sum, test_tol(1e-5) * size);

        void *alone = device_act(NULL, x_size); /* dwte not wanted */
        device_db = device_f32(db, s.Vp);
        test.ops->classifier_backward(
            test.ctx, &(classifier_backward){.losses = losses,
                                             .total = total,
                                             .dx = alone,
                                             .x = device_act(x, x_size),
                                             .wte = device_weight(wte, s.Vp, s.C, 1),
                                             .targets = device_i32(targets, s.N),
                                             .scale = (float)scale,
                                             .N = s.N,
                                             .C = s.C,
                                             .cap = (float)ref_logit_cap,
                                             .b = head_bias_there(s),
                                             .db = ref_head_bias ? device_db : NULL,
                                             .V = s.V,
                                             .Vp = s.Vp});
        EXPECT_SAME("dx alone", read_act(alone, x_size), got_dx, x_size);
        EXPECT_SAME("db alone", read_f32(device_db, s.Vp), got_db, s.Vp);
    }
}

static void check(sizes s, int ignored, double scale, double wte_scale) {
    test_case("N=%d C=%d V=%d Vp=%d ignored=%d scale=%g wte=%g", s.N, s.C, s.V, s.Vp, ignored,
              scale, wte_scale);
    double *x = random_act((int64_t)s.N * s.C, 1.0), *wte = random_wte(s, wte_scale);
    int32_t *targets = random_targets(s, ignored);
    double *want = host_zeros(s.N);
    ref_classifier(want, NULL, NULL, x, wte, targets, 1.0, s.N, s.C, s.V);
    check_forward(s, x, wte, targets, want);
    check_backward(s, x, wte, targets, scale);
}

static void test_classifier(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        check(cases[i], i % 2, 1.0 / 16, 1.0 / sqrt(cases[i].C));
        check(cases[i], 1 - i % 2, 1.0, 1.0 / sqrt(cases[i].C));
    }
    check((sizes){7, 33, 65, 128}, 2, 1.0, 1.0);
    check((sizes){7, 33, 65, 128}, 0, 0.0, 1.0);
    check((sizes){7, 33, 65, 128}, 1, -2.0, 1.0);
}

/* Weights of the losses, among them 0 and negative ones: the reference takes row by row with its scale. */
static void check_weights(sizes s) {
    test_case("weights, N=%d C=%d V=%d", s.N, s.C, s.V);
    int64_t x_size = (int64_t)s.N * s.C, wte_size = (int64_t)s.Vp * s.C;
    double *x = random_act(x_size, 1.0), *wte = random_wte(s, 1.0 / sqrt(s.C)), scale = 0.5;
    double *weights = random_f32(s.N, 2.0), total_want = 0, size = 0;
    int32_t *targets = random_targets(s, 1);
    double *dwte = random_f32(wte_size, 1.0), *want_dwte = host_copy(dwte, wte_size);
    double *want_dx = host_zeros(x_size), *want = host_zeros(s.N);
    for (int n = 0; n < s.N; n++) {
        if (n % 4 == 3) weights[n] = 0;
        ref_classifier(want + n, want_dx + n * s.C, want_dwte, x + n * s.C, wte, targets + n,
                       scale * weights[n], 1, s.C, s.V);
        total_want += scale * weights[n] * want[n], size += fabs(scale * weights[n] * want[n]);
    }
    gpt_shape shape = shape_of(s, 1);
    EACH_BACKEND {
        void *losses = device_f32(NULL, s.N), *dx = device_act(NULL, x_size);
        double zero = 0;
        void *total = device_f32(&zero, 1), *device_dwte = device_f32(dwte, wte_size);
        test_workspace(&shape);
        test.ops->classifier_backward(
            test.ctx, &(classifier_backward){.losses = losses,
                                             .total = total,
                                             .dx = dx,
                                             .dwte = device_dwte,
                                             .x = device_act(x, x_size),
                                             .wte = device_weight(wte, s.Vp, s.C, 1),
                                             .targets = device_i32(targets, s.N),
                                             .weights = device_f32(weights, s.N),
                                             .scale = (float)scale,
                                             .add = 1,
                                             .N = s.N,
                                             .C = s.C,
                                             .cap = (float)ref_logit_cap,
                                             .V = s.V,
                                             .Vp = s.Vp});
        EXPECT_CLOSE("losses", read_f32(losses, s.N), want, 1, s.N, test_tol(1e-5));
        EXPECT_CLOSE("dx", read_act(dx, x_size), want_dx, s.N, s.C, test_tol(2e-5));
        EXPECT_CLOSE("dwte", read_f32(device_dwte, wte_size), want_dwte, s.V, s.C, test_tol(2e-5));
        EXPECT_NEAR("total", read_f32(total, 1)[0], total_want, test_tol(1e-5) * (size + 1));
    }
}

/* The regularised loss of a row with logits z (V), and its derivatives (V) or NULL: not the op's formula,
 * but the cross-entropy with a smoothed target, each of its terms differentiated. */
static double regularised(const double *z, double *dz, int V, int target, double e, double c) {
    double sum = 0, loss = 0, *p = host_zeros(V), max = -INFINITY;
    for (int v = 0; v < V; v++) max = fmax(max, z[v]);
    for (int v = 0; v < V; v++) sum += p[v] = exp(z[v] - max);
    double l = max + log(sum);
    for (int v = 0; v < V; v++) p[v] /= sum;
    for (int v = 0; v < V; v++) {
        double q = (v == target ? 1 - e : 0) + e / V;
        loss -= q * (z[v] - l);
        /* d (z[v] - l) / d z[u] = [u = v] - p[u] */
        for (int u = 0; dz && u < V; u++) dz[u] -= q * ((u == v) - p[u]);
    }
    for (int u = 0; dz && u < V; u++) dz[u] += c * 2 * l * p[u];
    return loss + c * l * l;
}

static void check_regularised(sizes s, double e, double c) {
    test_case("label smoothing %g, z-loss %g, N=%d C=%d V=%d", e, c, s.N, s.C, s.V);
    int64_t x_size = (int64_t)s.N * s.C, wte_size = (int64_t)s.Vp * s.C;
    double *x = random_act(x_size, 1.0), *wte = random_wte(s, 1.0 / sqrt(s.C)), scale = 0.5;
    double *weights = random_f32(s.N, 2.0), *want_dwte = host_zeros(wte_size);
    double *want_dx = host_zeros(x_size), *want = host_zeros(s.N), *z = host_zeros(s.V);
    int32_t *targets = random_targets(s, 1);
    ref_classifier(want, NULL, NULL, x, wte, targets, 1.0, s.N, s.C, s.V);
    for (int n = 0; n < s.N; n++) {
        if (targets[n] < 0) continue;
        double *dz = host_zeros(s.V);
        ref_linear_forward(z, x + n * s.C, wte, NULL, 1, s.C, s.V);
        for (int v = 0; v < s.V; v++) z[v] = ref_capped(z[v], ref_logit_cap);
        regularised(z, dz, s.V, targets[n], e, c);
        for (int v = 0; v < s.V; v++)
            dz[v] *= scale * weights[n] * ref_cap_slope(z[v], ref_logit_cap);
        ref_linear_backward(want_dx + n * s.C, want_dwte, NULL, dz, x + n * s.C, wte, 1, s.C, s.V);
    }
    gpt_shape shape = shape_of(s, 1);
    EACH_BACKEND {
        void *losses = device_f32(NULL, s.N), *dx = device_act(NULL, x_size);
        void *total = device_f32(NULL, 1), *dwte = device_f32(NULL, wte_size);
        test_workspace(&shape);
        test.ops->classifier_backward(
            test.ctx, &(classifier_backward){.losses = losses,
                                             .total = total,
                                             .dx = dx,
                                             .dwte = dwte,
                                             .x = device_act(x, x_size),
                                             .wte = device_weight(wte, s.Vp, s.C, 1),
                                             .targets = device_i32(targets, s.N),
                                             .weights = device_f32(weights, s.N),
                                             .scale = (float)scale,
                                             .label_smoothing = (float)e,
                                             .z_loss = (float)c,
                                             .N = s.N,
                                             .C = s.C,
                                             .cap = (float)ref_logit_cap,
                                             .V = s.V,
                                             .Vp = s.Vp});
        EXPECT_CLOSE("losses", read_f32(losses, s.N), want, 1, s.N, test_tol(1e-5));
        EXPECT_CLOSE("dx", read_act(dx, x_size), want_dx, s.N, s.C, test_tol(2e-5));
        EXPECT_CLOSE("dwte", read_f32(dwte, wte_size), want_dwte, s.V, s.C, test_tol(2e-5));
    }
}

typedef struct row {
    double *z;
    int V, target;
    double e, c;
} row;

static double row_loss(void *pointer) {
    row *r = pointer;
    return regularised(r->z, NULL, r->V, r->target, r->e, r->c);
}

static void test_regularised(void) {
    test_case("the derivatives of the reference");
    row r = {random_f32(7, 2.0), 7, 4, 0.25, 0.5};
    double *dz = host_zeros(r.V);
    regularised(r.z, dz, r.V, r.target, r.e, r.c);
    EXPECT_GRADIENT("dz", row_loss, &r, r.z, dz, r.V);
    check_regularised((sizes){3, 5, 7, 64}, 0.25, 0.0);
    check_regularised((sizes){3, 5, 7, 64}, 0.0, 0.125);
    check_regularised((sizes){65, 33, 65, 66}, 0.125, 0.0625);
    check_regularised((sizes){5, 7, 2101, 2112}, 0.5, 0.0);
    check_regularised((sizes){5, 7, 2101, 2112}, 0.125, 0.25);
}

static void test_soft_cap(void) {
    static const double caps[] = {0.5, 4.0, 30.0};
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        sizes s = cases[i];
        int64_t x_size = (int64_t)s.N * s.C;
        ref_logit_cap = caps[i % TEST_COUNT(caps)];
        test_case("soft cap %g, N=%d C=%d V=%d", ref_logit_cap, s.N, s.C, s.V);
        double *x = random_act(x_size, 1.0), *wte = random_wte(s, i % 2 ? 3.0 / sqrt(s.C) : 1.0);
        int32_t *targets = random_targets(s, i % 3);
        double *want = host_zeros(s.N);
        ref_classifier(want, NULL, NULL, x, wte, targets, 1.0, s.N, s.C, s.V);
        check_forward(s, x, wte, targets, want);
        check_backward(s, x, wte, targets, 0.5);
    }
    ref_logit_cap = 2.0;
    check_weights((sizes){5, 7, 2101, 2112});
    check_regularised((sizes){65, 33, 65, 66}, 0.125, 0.0625);
    check_regularised((sizes){5, 7, 2101, 2112}, 0.5, 0.25);
    ref_logit_cap = 0.0;
}

/* Biases about as large as logits, and of one token larger; those of the padding would win every softmax. */
static void test_bias(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        sizes s = cases[i];
        test_case("bias, N=%d C=%d V=%d", s.N, s.C, s.V);
        ref_logit_cap = i % 3 == 2 ? 4.0 : 0.0;
        ref_head_bias = random_f32(s.Vp, 1.0);
        ref_head_bias[s.V / 2] = 6.0;
        for (int v = s.V; v < s.Vp; v++) ref_head_bias[v] = 1024.0;
        double *x = random_act((int64_t)s.N * s.C, 1.0), *wte = random_wte(s, 1.0 / sqrt(s.C));
        int32_t *targets = random_targets(s, i % 3);
        double *want = host_zeros(s.N);
        ref_classifier(want, NULL, NULL, x, wte, targets, 1.0, s.N, s.C, s.V);
        check_forward(s, x, wte, targets, want);
        check_backward(s, x, wte, targets, 0.5);
    }
    ref_logit_cap = 0.0, ref_head_bias = NULL;
}

static void test_weights(void) {
    check_weights((sizes){3, 5, 7, 64});
    check_weights((sizes){130, 33, 65, 66});
    check_weights((sizes){5, 7, 2101, 2112});
}

/* Logits near +-64, whose exponentials float32 can hold one by one but whose ratio it cannot, and
 * past +-1024, which it can hold in no way. All are bfloat16 numbers: a table may store them so. */
static void test_large_logits(void) {
    static const double sizes_of_logits[] = {64.0, 1024.0};
    for (int k = 0; k < 2; k++) {
        sizes s = {7, 2, 65, 128};
        test_case("logits of +-%g", sizes_of_logits[k]);
        double *x = host_zeros(s.N * s.C), *wte = random_wte(s, 1.0);
        for (int i = 0; i < s.N * s.C; i++) x[i] = sizes_of_logits[k] * (i % 3 == 0 ? -1 : 1);
        for (int v = 0; v < s.V; v++) {
            wte[2 * v] = v % 2 ? 1.0 : -1.0;
            wte[2 * v + 1] = v % 8 / 128.0;
        }
        int32_t *targets = random_targets(s, 1);
        double *want = host_zeros(s.N);
        ref_classifier(want, NULL, NULL, x, wte, targets, 1.0, s.N, s.C, s.V);
        check_forward(s, x, wte, targets, want);
        check_backward(s, x, wte, targets, 0.5);
    }
}

/* Forward, then backward, with one number of x or wte spoiled: which losses must not be finite? */
static void check_not_finite(sizes s, const double *x, const double *wte, int all_rows, int row) {
    int32_t *targets = random_targets(s, 0);
    gpt_shape shape = shape_of(s, 1);
    EACH_BACKEND {
        for (int backward = 0; backward < 2; backward++) {
            void *losses = device_f32(NULL, s.N), *dx = device_act(NULL, (int64_t)s.N * s.C);
            void *total = device_f32(NULL, 1);
            void *dwte = device_f32(wte, (int64_t)s.Vp * s.C);
            void *device_x = device_act(x, (int64_t)s.N * s.C);
            void *device_wte = device_weight(wte, s.Vp, s.C, 1);
            void *device_targets = device_i32(targets, s.N);
            test_workspace(&shape);
            if (backward) {
                test.ops->classifier_backward(test.ctx,
                                              &(classifier_backward){.losses = losses,
                                                                     .total = total,
                                                                     .dx = dx,
                                                                     .dwte = dwte,
                                                                     .x = device_x,
                                                                     .wte = device_wte,
                                                                     .targets = device_targets,
                                                                     .scale = 1.0f,
                                                                     .add = 1,
                                                                     .N = s.N,
                                                                     .C = s.C,
                                                                     .cap = (float)ref_logit_cap,
                                                                     .V = s.V,
                                                                     .Vp = s.Vp});
            } else {
                test.ops->classifier_forward(test.ctx,
                                             &(classifier_forward){.losses = losses,
                                                                   .x = device_x,
                                                                   .wte = device_wte,
                                                                   .targets = device_targets,
                                                                   .N = s.N,
                                                                   .C = s.C,
                                                                   .cap = (float)ref_logit_cap,
                                                                   .V = s.V,
                                                                   .Vp = s.Vp});
            }
            double *got = read_f32(losses, s.N);
            for (int n = 0; n < s.N; n++) EXPECT(isfinite(got[n]) == !(all_rows || n == row));
        }
    }
}

/* A row that is not a number has a loss that is not one, and spoils no other row; a token whose
 * logits are NaN spoils all, whatever its position. */
static void test_not_finite(void) {
    static const double spoilers[] = {NAN, INFINITY};
    static const int tokens[] = {0, 3, 37, 64};
    sizes s = {5, 33, 65, 80};
    for (int k = 0; k < 2; k++) {
        test_case("a row with %g", spoilers[k]);
        double *x = random_act((int64_t)s.N * s.C, 1.0), *wte = random_wte(s, 1.0);
        x[2 * s.C + 7] = spoilers[k];
        check_not_finite(s, x, wte, 0, 2);
    }
    for (int k = 0; k < TEST_COUNT(tokens); k++) {
        test_case("token %d with NaN", tokens[k]);
        double *x = random_act((int64_t)s.N * s.C, 1.0), *wte = random_wte(s, 1.0);
        wte[tokens[k] * s.C + 7] = NAN;
        check_not_finite(s, x, wte, 1, 0);
    }
}

/* As many logits as no backend holds at once, with and without targets to ignore. It costs a hundred
 * megabytes, so it runs once for a device: the chunks are cut alike at every level of a CPU. All logits
 * are 0 but one in each row, so the answer needs no sum over them; the op's own, of equal numbers, rounds
 * in one direction. */
static void check_chunks(sizes s, int ignored) {
    test_case("N=%d V=%d ignored=%d", s.N, s.V, ignored);
    double *x = host_zeros(s.N * s.C), *wte = host_zeros((int64_t)s.Vp * s.C);
    double *dwte = host_zeros((int64_t)s.Vp * s.C), *want = host_zeros(s.N);
    int32_t *targets = host_ints(s.N);
    const int hot = 123456;
    wte[2 * hot] = 1.0;
    for (int n = 0; n < s.N; n++) {
        x[2 * n] = round_act(n / 16.0); /* the hot token's logit */
        targets[n] = n % 3 == 0 ? hot : n * 1900;
        want[n] = log(s.V - 1 + exp(x[2 * n])) - (n % 3 == 0 ? x[2 * n] : 0.0);
        if (ignored && n % 4 == 1) targets[n] = -1, want[n] = 0;
    }
    gpt_shape shape = shape_of(s, 1);
    int done = 0;
    EACH_BACKEND {
        if (test.threads < 2 || (done && test_on_cpu())) continue;
        done = 1;
        void *losses = device_f32(NULL, s.N), *dx = device_act(NULL, s.N * s.C);
        void *total = device_f32(NULL, 1);
        void *device_dwte = device_f32(dwte, (int64_t)s.Vp * s.C);
        test_workspace(&shape);
        test.ops->classifier_backward(
            test.ctx, &(classifier_backward){.losses = losses,
                                             .total = total,
                                             .dx = dx,
                                             .dwte = device_dwte,
                                             .x = device_act(x, s.N * s.C),
                                             .wte = device_weight(wte, s.Vp, s.C, 1),
                                             .targets = device_i32(targets, s.N),
                                             .scale = 1.0f,
                                             .add = 1,
                                             .N = s.N,
                                             .C = s.C,
                                             .cap = (float)ref_logit_cap,
                                             .V = s.V,
                                             .Vp = s.Vp});
        EXPECT_CLOSE("losses", read_f32(losses, s.N), want, 1, s.N, test_tol(2e-4));
        double *got = read_act(dx, s.N * s.C), *got_dwte = read_f32(device_dwte, 2 * s.V),
               sum = 0.0;
        for (int n = 0; n < s.N; n++) {
            double p = exp(x[2 * n]) / (s.V - 1 + exp(x[2 * n])), dlogit = p - (n % 3 == 0);
            if (targets[n] < 0) dlogit = 0;
            EXPECT_NEAR("dx", got[2 * n], dlogit, test_tol(1e-3));
            sum += dlogit * x[2 * n];
        }
        EXPECT_NEAR("dwte of the hot token", got_dwte[2 * hot], sum, test_tol(1e-3) * fabs(sum));
    }
}

static void test_chunks(void) {
    check_chunks((sizes){70, 2, 400000, 400064}, 0);
    check_chunks((sizes){200, 2, 400000, 400064}, 1);
}

typedef struct state {
    double *x, *wte, *losses;
    int32_t *targets;
    double scale;
    sizes s;
} state;

static double loss_of(void *pointer) {
    state *p = pointer;
    ref_classifier(p->losses, NULL, NULL, p->x, p->wte, p->targets, p->scale, p->s.N, p->s.C,
                   p->s.V);
    double sum = 0.0;
    for (int n = 0; n < p->s.N; n++) sum += p->scale * p->losses[n];
    return sum;
}

static void test_reference(void) {
    sizes s = {4, 3, 7, 7};
    test_case("N=%d C=%d V=%d", s.N, s.C, s.V);
    state p = {random_f32(s.N * s.C, 1.0),
               random_f32(s.V * s.C, 1.0),
               host_zeros(s.N),
               random_targets(s, 1),
               0.25,
               s};
    double *dx = host_zeros(s.N * s.C), *dwte = host_zeros(s.V * s.C);
    ref_classifier(p.losses, dx, dwte, p.x, p.wte, p.targets, p.scale, s.N, s.C, s.V);
    EXPECT_GRADIENT("dx", loss_of, &p, p.x, dx, s.N * s.C);
    EXPECT_GRADIENT("dwte", loss_of, &p, p.wte, dwte, s.V * s.C);
    ref_logit_cap = 1.5;
    dx = host_zeros(s.N * s.C);
    ref_classifier(p.losses, dx, dwte, p.x, p.wte, p.targets, p.scale, s.N, s.C, s.V);
    EXPECT_GRADIENT("dx, capped", loss_of, &p, p.x, dx, s.N * s.C);
    double *db = ref_head_db = host_zeros(s.V);
    ref_head_bias = random_f32(s.V, 1.0);
    ref_classifier(p.losses, dx, dwte, p.x, p.wte, p.targets, p.scale, s.N, s.C, s.V);
    EXPECT_GRADIENT("db, capped", loss_of, &p, ref_head_bias, db, s.V);
    ref_logit_cap = 0, ref_head_bias = ref_head_db = NULL;
}

TEST_OPS_MAIN({"reference", test_reference}, {"classifier", test_classifier},
              {"weights", test_weights}, {"regularised", test_regularised},
              {"soft cap", test_soft_cap}, {"bias", test_bias}, {"large logits", test_large_logits},
              {"not finite", test_not_finite}, {"chunks", test_chunks})
