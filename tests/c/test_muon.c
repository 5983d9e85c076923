/* muon_update. */
#include "testing.h"

#include "reference.h"

/* Queries, keys and values of grouped heads, their projection, and a feed-forward layer. */
typedef struct shape_case {
    int C, NH, NKV, HS, F;
} shape_case;

static gpt_shape shape_of(shape_case s, int64_t n) {
    return (gpt_shape){.N = 1,
                       .T = 1,
                       .C = s.C,
                       .V = 2,
                       .Vp = 2,
                       .NH = s.NH,
                       .NKV = s.NKV,
                       .HS = s.HS,
                       .F = s.F,
                       .activation = GPT_ACT_SWIGLU,
                       .training = 1,
                       .muon = 1,
                       .n_params = n};
}

enum { MATRICES = 7, SEGMENTS = 6, STEPS = 3 };

/* The segments of a layer, with one of AdamW and a frozen one between them; offsets of parameters, gradients
 * and states differ. Returns the numbers of all. */
static int64_t make_segments(shape_case s, int scales_rows, gpt_segment *segments) {
    int A = s.NH * s.HS, KV = s.NKV * s.HS;
    const gpt_segment shapes[SEGMENTS] = {
        {.rows = A + 2 * KV, .cols = s.C, .n_matrices = 3, .matrix_rows = {A, KV, KV}},
        {.rows = 5, .cols = 3, .optimizer = GPT_OPTIMIZER_ADAMW},
        {.rows = s.C, .cols = A, .n_matrices = 1, .matrix_rows = {s.C}},
        {.rows = 2 * s.F, .cols = s.C, .n_matrices = 2, .matrix_rows = {s.F, s.F}},
        {.rows = 2, .cols = 3, .grad = -1},
        {.rows = s.C, .cols = s.F, .n_matrices = 1, .matrix_rows = {s.C}},
    };
    int64_t offset = 0, grad = 0, state = 0;
    for (int i = 0; i < SEGMENTS; i++) {
        gpt_segment *to = &segments[i];
        *to = shapes[i];
        to->parts = 1;
        to->size = (int64_t)to->rows * to->cols;
        to->offset = offset, offset += to->size;
        to->lr_scale = i % 2 ? 0.5f : 1.0f;
        to->decay = i != 2;
        if (to->grad >= 0) to->grad = grad, grad += to->size;
        if (!to->n_matrices) continue;
        to->optimizer = GPT_OPTIMIZER_MUON;
        to->state = state, state += to->size;
        if (scales_rows) to->row_state = state, state += to->rows;
    }
    return offset;
}

/* x (M, N) = alpha x + a b, or a b^T: float64. */
TEST_REFERENCE static void ref_product(double *x, const double *a, const double *b, int M, int N,
                                       int K, int turned, double alpha) {
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            double sum = 0;
            for (int k = 0; k < K; k++)
                sum += a[m * K + k] * (turned ? b[n * K + k] : b[k * N + n]);
            x[m * N + n] = alpha * x[m * N + n] + sum;
        }
}

/* Five times x = a x + (b A + c A^2) x, A = x x^T, always from the left: the result is the same from either
 * side. */
static void ref_orthogonal(double *x, int R, int C) {
    static const float polynomials[MUON_ITERATIONS][3] = MUON_POLYNOMIALS;
    double sum = 0;
    for (int i = 0; i < R * C; i++) sum += x[i] * x[i];
    for (int i = 0; i < R * C && sum > 0; i++) x[i] /= (double)MUON_MARGIN * sqrt(sum);
    for (int k = 0; k < MUON_ITERATIONS; k++) {
        const float *abc = polynomials[k];
        double *gram = host_zeros(R * R), *poly = host_zeros(R * R), *old = host_copy(x, R * C);
        ref_product(gram, x, x, R, R, C, 1, 0);
        ref_product(poly, gram, gram, R, R, R, 0, 0);
        for (int i = 0; i < R * R; i++)
            poly[i] = (double)abc[1] * gram[i] + (double)abc[2] * poly[i];
        ref_product(x, poly, old, R, C, R, 0, abc[0]);
    }
}

/* Rows of x divided by the roots of the averages v (R) of their mean squares, then as large as before. */
static void ref_scale_rows(double *x, double *v, int R, int C, double beta2) {
    double sum = 0;
    for (int r = 0; r < R; r++) {
        v[r] = beta2 * v[r] + (1 - beta2) * test_dot(x + r * C, x + r * C, C) / C;
        for (int c = 0; c < C; c++) x[r * C + c] /= sqrt(v[r]) + 1e-8;
    }
    sum = test_dot(x, x, R * C);
    for (int i = 0; i < R * C; i++) x[i] *= sum > 0 ? sqrt((double)(R < C ? R : C) / sum) : 0;
}

/* v: (R) or NULL. */
static void ref_matrix(double *w, double *m, double *v, const double *grad, double clip,
                       gpt_muon muon, const gpt_segment *s, int R) {
    int C = s->cols;
    double *x = host_zeros((int64_t)R * C), mu = muon.momentum, lr = (double)muon.lr * s->lr_scale;
    for (int i = 0; i < R * C; i++) {
        m[i] = mu * m[i] + (1 - mu) * clip * grad[i];
        x[i] = mu * m[i] + (1 - mu) * clip * grad[i];
    }
    ref_orthogonal(x, R, C);
    if (v) ref_scale_rows(x, v, R, C, muon.beta2);
    for (int i = 0; i < R * C; i++) {
        int decays = s->decay && !(muon.cautious && x[i] * w[i] < 0);
        w[i] -= lr * (decays ? muon.weight_decay : 0) * w[i];
        w[i] -= lr * 0.2 * sqrt(R > C ? R : C) * x[i];
    }
}

static void ref_muon(double *w, double *momentum, const double *grads, double norm, gpt_muon muon,
                     const gpt_segment *segments) {
    double clip = muon.grad_clip > 0 ? fmin(1.0, muon.grad_clip / (norm + 1e-6)) : 1.0;
    for (const gpt_segment *s = segments; s < segments + SEGMENTS; s++)
        for (int k = 0, row = 0; k < s->n_matrices; row += s->matrix_rows[k++]) {
            int64_t at = (int64_t)row * s->cols;
            ref_matrix(w + s->offset + at, momentum + s->state + at,
                       s->row_state ? momentum + s->row_state + row : NULL, grads + s->grad + at,
                       clip, muon, s, s->matrix_rows[k]);
        }
}

static void *device_muon(gpt_muon muon) {
    void *device = test_device_alloc(sizeof muon, TEST_GARBAGE);
    test.ops->upload(test.ctx, device, &muon, sizeof muon);
    return device;
}

/* The form that products read of what the update has written. */
static void check_packed(const gpt_segment *s, const void *device_w) {
    size_t bytes = test.ops->weights_bytes(s->rows, s->cols, s->parts, 1);
    if (!bytes) return;
    gpt_segment again = *s;
    again.packed = test_device_alloc(bytes, 0);
    const float *w = (const float *)device_w + s->offset;
    test.ops->weights_pack(test.ctx, &(weights_pack){.w = w, .segment = &again, .training = 1});
    EXPECT(test.ops->sync(test.ctx) == GPT_OK);
    unsigned char *got = test_alloc(&test.host, bytes), *want = test_alloc(&test.host, bytes);
    test.ops->download(test.ctx, got, s->packed, bytes);
    test.ops->download(test.ctx, want, again.packed, bytes);
    EXPECT(!memcmp(got, want, bytes));
}

static void update(void *w, void *momentum, void *grads, void *norm, gpt_muon muon,
                   const gpt_segment *segments) {
    test.ops->muon_update(test.ctx, &(muon_update){.w = w,
                                                   .momentum = momentum,
                                                   .grads = grads,
                                                   .norm = norm,
                                                   .step = device_muon(muon),
                                                   .segments = segments,
                                                   .n_segments = SEGMENTS});
}

static void check_updates(shape_case s, gpt_muon muon, int scales_rows) {
    test_case(
        "C=%d NH=%d NKV=%d HS=%d F=%d momentum=%g decay=%g clip=%g beta2=%g cautious=%d rows=%d",
        s.C, s.NH, s.NKV, s.HS, s.F, muon.momentum, muon.weight_decay, muon.grad_clip, muon.beta2,
        muon.cautious, scales_rows);
    gpt_segment segments[SEGMENTS];
    int64_t n = make_segments(s, scales_rows, segments), n_state = n;
    for (int i = 0; i < SEGMENTS; i++) n_state += segments[i].rows;
    double *w = random_f32(n, 0.1), *momentum = host_zeros(n_state), *grads[STEPS], norms[STEPS];
    double *want = host_copy(w, n), *want_momentum = host_zeros(n_state);
    for (int k = 0; k < STEPS; k++) {
        grads[k] = random_f32(n, 0.3);
        norms[k] = (float)ref_grad_norm(grads[k], n);
        ref_muon(want, want_momentum, grads[k], norms[k], muon, segments);
    }
    gpt_shape shape = shape_of(s, n);
    EACH_BACKEND {
        void *device_w = device_f32(w, n), *device_momentum = device_f32(momentum, n_state);
        test_workspace(&shape);
        for (int i = 0; i < SEGMENTS; i++) {
            gpt_segment *at = &segments[i];
            size_t bytes = test.ops->weights_bytes(at->rows, at->cols, at->parts, 1);
            at->packed = at->n_matrices && bytes ? test_device_alloc(bytes, 0) : NULL;
        }
        for (int k = 0; k < STEPS; k++)
            update(device_w, device_momentum, device_f32(grads[k], n), device_f32(&norms[k], 1),
                   muon, segments);
        double *got = read_f32(device_w, n), *got_momentum = read_f32(device_momentum, n_state);
        for (int i = 0; i < SEGMENTS; i++) {
            const gpt_segment *at = &segments[i];
            const double *now = got + at->offset, *then = w + at->offset;
            if (at->n_matrices)
                EXPECT_CLOSE("momentum", got_momentum + at->state, want_momentum + at->state, 1,
                             at->size, 2e-6);
            if (at->row_state) /* of squares: bf16 leaves singular values of few numbers a tenth off */
                EXPECT_CLOSE("row state", got_momentum + at->row_state,
                             want_momentum + at->row_state, 1, at->rows, test_tols(5e-5, 2.5e-1));
            if (at->n_matrices) {
                EXPECT_CLOSE("w", now, want + at->offset, at->rows, at->cols,
                             test_tols(2e-5, 3e-2));
                check_packed(at, device_w);
            } else {
                EXPECT_SAME("others", now, then, at->size);
            }
        }
    }
}

static const shape_case shapes[] = {
    {1, 1, 1, 1, 1}, {3, 1, 1, 2, 5}, {17, 3, 1, 5, 33}, {65, 2, 2, 24, 31}, {48, 3, 3, 16, 128}};

static void test_updates(void) {
    static const gpt_muon settings[] = {
        {.lr = 1e-2f, .momentum = 0.95f, .weight_decay = 0.1f, .grad_clip = 1.0f},
        {.lr = 2e-2f, .momentum = 0.0f, .weight_decay = 0.0f, .grad_clip = 0.0f},
        {.lr = 5e-3f, .momentum = 0.9f, .weight_decay = 2.0f, .grad_clip = 1e-3f}};
    for (int i = 0; i < TEST_COUNT(shapes); i++)
        for (int k = 0; k < (i == 2 ? TEST_COUNT(settings) : 1); k++)
            check_updates(shapes[i], settings[k], 0);
}

/* NorMuon's rows and cautious decay, together and alone. */
static void test_rows(void) {
    for (int i = 0; i < TEST_COUNT(shapes); i++)
        check_updates(shapes[i], (gpt_muon){1e-2f, 0.9f, 0.5f, 1.0f, 0.9f, i != 2}, 1);
    check_updates(shapes[3], (gpt_muon){1e-2f, 0.9f, 0.0f, 0.0f, 0.0f, 0}, 1);
    check_updates(shapes[2], (gpt_muon){5e-3f, 0.9f, 2.0f, 0.0f, 0.0f, 1}, 0);
}

/* Rows of a step of a wide matrix are nearly orthogonal: with X = U S V^T, each number of S is within a fifth
 * of 1 where those of the gradient are within a factor of 100. */
static void test_orthogonal(void) {
    enum { R = 23, C = 40 };
    shape_case s = {C, 1, 1, R, R};
    gpt_segment segments[SEGMENTS];
    test_case("R=%d C=%d", R, C);
    int64_t n = make_segments(s, 0, segments);
    double *zero = host_zeros(n), *grads = random_f32(n, 1.0),
           norm = (float)ref_grad_norm(grads, n);
    for (int i = 0; i < R * C; i++) /* of the queries: some rows are far smaller */
        if (i / C % 5 == 0) grads[i] = (float)(grads[i] * 0.03);
    gpt_shape shape = shape_of(s, n);
    gpt_muon muon = {.lr = 1.0f, .momentum = 0.0f, .weight_decay = 0.0f, .grad_clip = 0.0f};
    EACH_BACKEND {
        void *w = device_f32(zero, n);
        test_workspace(&shape);
        update(w, device_f32(zero, n), device_f32(grads, n), device_f32(&norm, 1), muon, segments);
        double *x = read_f32(w, R * C), *gram = host_zeros(R * R), *square = host_zeros(R * R);
        for (int i = 0; i < R * C; i++) x[i] /= (double)muon_scale(R, C);
        /* |X X^T - I| in the spectral norm is at most its Frobenius norm: powers bring it near. */
        ref_product(gram, x, x, R, R, C, 1, 0);
        for (int i = 0; i < R; i++) gram[i * R + i] -= 1;
        double spectral = 0;
        for (int k = 0; k < 5; k++) { /* the 32nd power: |M|_F^(1/32) is within 6 % of |M|_2 */
            double scale = sqrt(test_dot(gram, gram, R * R));
            spectral += log(scale) / (1 << k);
            for (int i = 0; i < R * R; i++) gram[i] /= scale;
            for (int i = 0; i < R * R; i++) square[i] = 0;
            ref_product(square, gram, gram, R, R, R, 0, 0);
            memcpy(gram, square, sizeof *gram * R * R);
        }
        EXPECT(exp(spectral) < 0.45); /* 1.2^2 - 1 */
        EXPECT(exp(spectral) > 1e-4); /* five products reach no more */
    }
}

/* Gradients of zero leave only the decay; a norm that is not finite changes nothing. */
static void test_nothing(void) {
    shape_case s = shapes[2];
    gpt_segment segments[SEGMENTS];
    gpt_muon muon = {.lr = 0.1f, .momentum = 0.9f, .weight_decay = 0.5f, .grad_clip = 1.0f};
    static const double norms[] = {0, NAN, INFINITY};
    for (int k = 0; k < TEST_COUNT(norms); k++) {
        test_case("norm=%g", norms[k]);
        int64_t n = make_segments(s, 0, segments);
        double *w = random_f32(n, 1.0), *zero = host_zeros(n), *want = host_copy(w, n);
        if (k == 0) ref_muon(want, host_zeros(n), zero, 0, muon, segments);
        gpt_shape shape = shape_of(s, n);
        EACH_BACKEND {
            void *device_w = device_f32(w, n), *device_momentum = device_f32(zero, n);
            test_workspace(&shape);
            update(device_w, device_momentum, device_f32(zero, n), device_f32(&norms[k], 1), muon,
                   segments);
            EXPECT_CLOSE("w", read_f32(device_w, n), want, 1, n, k ? 0 : 1e-6);
            EXPECT_SAME("momentum", read_f32(device_momentum, n), zero, n);
        }
    }
}

/* Gradients whose squares float32 cannot hold, or which it holds as subnormal numbers, are as zeros. */
static void test_tiny(void) {
    static const double scales[] = {1e-21, 8e-24, 1e-40};
    gpt_segment segments[SEGMENTS];
    gpt_muon muon = {.lr = 0.1f, .momentum = 0.0f, .weight_decay = 0.5f, .grad_clip = 0.0f};
    for (int k = 0; k < TEST_COUNT(scales); k++) {
        shape_case s = shapes[4];
        test_case("gradients of %g", scales[k]);
        int64_t n = make_segments(s, 0, segments);
        double *w = random_f32(n, 1.0), *zero = host_zeros(n), *want = host_copy(w, n);
        double *grads = random_f32(n, scales[k]), norm = (float)ref_grad_norm(grads, n);
        ref_muon(want, host_zeros(n), zero, 0, muon, segments);
        gpt_shape shape = shape_of(s, n);
        EACH_BACKEND {
            void *device_w = device_f32(w, n);
            test_workspace(&shape);
            update(device_w, device_f32(zero, n), device_f32(grads, n), device_f32(&norm, 1), muon,
                   segments);
            EXPECT_CLOSE("w", read_f32(device_w, n), want, 1, n, 1e-6);
        }
    }
}

TEST_OPS_MAIN({"updates", test_updates}, {"rows", test_rows}, {"orthogonal", test_orthogonal},
              {"nothing", test_nothing}, {"tiny", test_tiny})
