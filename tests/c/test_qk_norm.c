/* qk_norm_forward, qk_norm_backward. */
#include "testing.h"

#include "reference.h"

typedef struct sizes {
    int N, NH, NKV, HS;
} sizes;

/* Around vectors and warps, and rows around the blocks that sum weight gradients. */
static const sizes cases[] = {
    {1, 1, 1, 1},  {3, 2, 1, 65},  {2, 4, 2, 16},  {7, 3, 3, 30},  {1, 16, 8, 128},
    {33, 2, 2, 8}, {129, 1, 1, 5}, {65, 4, 1, 64}, {5, 2, 1, 264}, {130, 6, 2, 20},
};
static const float eps = 1e-5f;

static int64_t row_size(sizes s) {
    return (int64_t)(s.NH + 2 * s.NKV) * s.HS;
}

static gpt_shape shape_of(sizes s, int training) {
    return (gpt_shape){.N = s.N,
                       .T = s.N,
                       .C = 1,
                       .V = 2,
                       .Vp = 2,
                       .NH = s.NH,
                       .NKV = s.NKV,
                       .HS = s.HS,
                       .F = 1,
                       .activation = GPT_ACT_GELU,
                       .training = training,
                       .n_params = 1};
}

/* Random numbers of which one head is zero: its norm is that of eps. */
static double *random_heads(sizes s) {
    double *x = random_act(s.N * row_size(s), 1.0);
    for (int c = 0; c < s.HS; c++) x[(s.N - 1) * row_size(s) + c] = 0.0;
    return x;
}

/* The queries and keys of rows of queries, keys and values. */
static double *without_values(sizes s, const double *x) {
    int64_t width = (int64_t)(s.NH + s.NKV) * s.HS;
    double *out = host_zeros(s.N * width);
    for (int n = 0; n < s.N; n++)
        memcpy(out + n * width, x + n * row_size(s), (size_t)width * sizeof *x);
    return out;
}

static void check(sizes s) {
    int64_t size = s.N * row_size(s), heads = s.NH + s.NKV, width = heads * s.HS;
    test_case("N=%d NH=%d NKV=%d HS=%d", s.N, s.NH, s.NKV, s.HS);
    double *x = random_heads(s), *dout = random_act(size, 1.0);
    double *q_w = random_f32(s.HS, 1.0), *k_w = random_f32(s.HS, 1.0);
    double *want = host_copy(x, size), *in = host_zeros(size), *stats = host_zeros(2 * s.N * heads);
    double *dx = host_copy(dout, size), *dq_w = random_f32(s.HS, 1.0),
           *dk_w = random_f32(s.HS, 1.0);
    double *dq_before = host_copy(dq_w, s.HS), *dk_before = host_copy(dk_w, s.HS);
    ref_qk_norm_forward(want, in, stats, q_w, k_w, eps, s.N, s.NH, s.NKV, s.HS);
    ref_qk_norm_backward(dx, dq_w, dk_w, in, stats, q_w, k_w, s.N, s.NH, s.NKV, s.HS);
    for (int64_t i = 0; i < s.N * heads; i++) stats[i] = stats[2 * i + 1];
    EACH_BACKEND {
        for (int training = 0; training <= 1; training++) {
            gpt_shape shape = shape_of(s, training);
            void *qkv = device_act(x, size), *kept = device_act(NULL, s.N * width);
            void *device_stats = device_f32(NULL, s.N * heads);
            void *device_q = device_f32(q_w, s.HS), *device_k = device_f32(k_w, s.HS);
            test_workspace(&shape);
            test.ops->qk_norm_forward(test.ctx,
                                      &(qk_norm_forward){.qkv = qkv,
                                                         .in = training ? kept : NULL,
                                                         .stats = training ? device_stats : NULL,
                                                         .q_w = device_q,
                                                         .k_w = device_k,
                                                         .eps = eps,
                                                         .N = s.N,
                                                         .NH = s.NH,
                                                         .NKV = s.NKV,
                                                         .HS = s.HS});
            double *got = read_act(qkv, size);
            EXPECT_CLOSE("qkv", got, want, s.N * heads, s.HS, test_tol(2e-6));
            for (int n = 0; n < s.N; n++)
                EXPECT_SAME("values", got + n * row_size(s) + width, x + n * row_size(s) + width,
                            (int64_t)s.NKV * s.HS);
            if (!training) continue;
            EXPECT_SAME("in", read_act(kept, s.N * width), without_values(s, x), s.N * width);
            EXPECT_CLOSE("stats", read_f32(device_stats, s.N * heads), stats, 1, s.N * heads, 2e-6);
            void *dqkv = device_act(dout, size), *dq = device_f32(dq_before, s.HS),
                 *dk = device_f32(dk_before, s.HS);
            test.ops->qk_norm_backward(test.ctx, &(qk_norm_backward){.dqkv = dqkv,
                                                                     .dq_w = dq,
                                                                     .dk_w = dk,
                                                                     .in = kept,
                                                                     .stats = device_stats,
                                                                     .q_w = device_q,
                                                                     .k_w = device_k,
                                                                     .N = s.N,
                                                                     .NH = s.NH,
                                                                     .NKV = s.NKV,
                                                                     .HS = s.HS});
            EXPECT_CLOSE("dqkv", read_act(dqkv, size), dx, s.N, row_size(s), test_tol(2e-5));
            EXPECT_CLOSE("dq_w", read_f32(dq, s.HS), dq_w, 1, s.HS, 2e-5);
            EXPECT_CLOSE("dk_w", read_f32(dk, s.HS), dk_w, 1, s.HS, 2e-5);
        }
    }
}

static void test_both_ways(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) check(cases[i]);
}

/* A frozen weight has no gradient, and that of the heads is the same. */
static void test_frozen_weights(void) {
    sizes s = {9, 2, 1, 12};
    int64_t size = s.N * row_size(s), heads = s.NH + s.NKV;
    gpt_shape shape = shape_of(s, 1);
    double *x = random_act(size, 1.0), *in = without_values(s, x), *w = random_f32(s.HS, 1.0);
    double *stats = random_f32(s.N * heads, 1.0), *before = random_f32(s.HS, 1.0);
    EACH_BACKEND {
        double *results[4], *sums[4];
        for (int k = 0; k < 4; k++) {
            void *dqkv = device_act(x, size), *dw = device_f32(before, s.HS);
            qk_norm_backward op = {.dqkv = dqkv,
                                   .dq_w = k == 1 ? dw : NULL,
                                   .dk_w = k == 2 ? dw : NULL,
                                   .in = device_act(in, s.N * heads * s.HS),
                                   .stats = device_f32(stats, s.N * heads),
                                   .q_w = device_f32(w, s.HS),
                                   .k_w = device_f32(w, s.HS),
                                   .N = s.N,
                                   .NH = s.NH,
                                   .NKV = s.NKV,
                                   .HS = s.HS};
            if (k == 3) op.dq_w = dw, op.dk_w = device_f32(before, s.HS);
            test_workspace(&shape);
            test.ops->qk_norm_backward(test.ctx, &op);
            results[k] = read_act(dqkv, size);
            sums[k] = read_f32(dw, s.HS);
            EXPECT_SAME("dqkv", results[k], results[0], size);
        }
        EXPECT_SAME("dq_w alone", sums[1], sums[3], s.HS);
        EXPECT_SAME("no weight", sums[0], before, s.HS);
    }
}

typedef struct state {
    double *x, *dout, *out, *in, *stats, *q_w, *k_w;
    sizes s;
} state;

static double loss_of(void *pointer) {
    state *p = pointer;
    sizes s = p->s;
    int64_t size = s.N * row_size(s);
    memcpy(p->out, p->x, (size_t)size * sizeof *p->out);
    ref_qk_norm_forward(p->out, p->in, p->stats, p->q_w, p->k_w, eps, s.N, s.NH, s.NKV, s.HS);
    return test_dot(p->out, p->dout, size);
}

static void test_reference(void) {
    sizes s = {3, 2, 1, 6};
    int64_t size = s.N * row_size(s);
    test_case("finite differences");
    state p = {
        random_f32(size, 1.0), random_f32(size, 1.0), host_zeros(size),      host_zeros(size),
        host_zeros(2 * size),  random_f32(s.HS, 1.0), random_f32(s.HS, 1.0), s};
    double *dx = host_copy(p.dout, size), *dq_w = host_zeros(s.HS), *dk_w = host_zeros(s.HS);
    loss_of(&p);
    ref_qk_norm_backward(dx, dq_w, dk_w, p.in, p.stats, p.q_w, p.k_w, s.N, s.NH, s.NKV, s.HS);
    EXPECT_GRADIENT("dx", loss_of, &p, p.x, dx, size);
    EXPECT_GRADIENT("dq_w", loss_of, &p, p.q_w, dq_w, s.HS);
    EXPECT_GRADIENT("dk_w", loss_of, &p, p.k_w, dk_w, s.HS);
}

TEST_OPS_MAIN({"reference", test_reference}, {"both ways", test_both_ways},
              {"frozen weights", test_frozen_weights})
