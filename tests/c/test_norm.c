/* residual_norm_forward, residual_norm_backward. */
#include "testing.h"

#include "reference.h"

typedef struct params {
    int norm, N, C;
    int use_w, use_b;
    int use_branch;
    int use_bias; /* of the branch: backward of tables that sum it */
    float p;      /* of dropout */
} params;

static const float eps = 1e-5f;

static void name_case(params s) {
    test_case("%s N=%d C=%d w=%d b=%d branch=%d p=%g", s.norm ? "rmsnorm" : "layernorm", s.N, s.C,
              s.use_w, s.use_b, s.use_branch, s.p);
}

static gpt_dropout_site dropout_of(params s) {
    return host_dropout(s.p, (uint64_t)s.C);
}

static gpt_shape shape_of(params s, int training) {
    return (gpt_shape){.N = s.N,
                       .T = 1,
                       .C = s.C,
                       .V = 2,
                       .Vp = 2,
                       .NH = 1,
                       .NKV = 1,
                       .HS = s.C,
                       .F = s.C,
                       .activation = GPT_ACT_GELU,
                       .training = training,
                       .n_params = 1};
}

/* resid + dropout(branch), as it is stored: that is what the norm reads, and rows whose channels are
 * nearly alike make much of its rounding. The index of dropout is that into (N, C). */
static double *residual_sum(params s, const double *resid, const double *branch) {
    int64_t n = (int64_t)s.N * s.C;
    double *sum = host_copy(resid, n);
    gpt_dropout dropout = dropout_at(dropout_of(s));
    for (int64_t i = 0; branch && i < n; i++) {
        sum[i] = round_act(sum[i] + dropout_factor(dropout, (uint64_t)i) * branch[i]);
    }
    return sum;
}

static void check_forward(params s, const double *resid, double tol) {
    int64_t n = (int64_t)s.N * s.C;
    double *branch = s.use_branch ? random_act(n, 1.0) : NULL, *untouched = random_act(n, 1.0);
    double *w = s.use_w ? random_f32(s.C, 1.0) : NULL, *b = s.use_b ? random_f32(s.C, 1.0) : NULL;
    double *sum = residual_sum(s, resid, branch);
    double *want = host_zeros(n), *stats = host_zeros(2 * (int64_t)s.N);
    ref_norm_forward(want, stats, sum, w, b, s.norm, eps, s.N, s.C);
    EACH_BACKEND {
        /* Without backward the model keeps one residual stream, and resid_out is resid. */
        for (int keep_stats = 0; keep_stats < 2; keep_stats++) {
            gpt_shape shape = shape_of(s, keep_stats);
            void *device_resid = device_act(resid, n), *out = device_act(NULL, n);
            void *resid_out = keep_stats ? device_act(untouched, n) : device_resid;
            void *kept = keep_stats ? device_f32(NULL, 2 * (int64_t)s.N) : NULL;
            test_workspace(&shape);
            test.ops->residual_norm_forward(
                test.ctx, &(residual_norm_forward){.resid_out = resid_out,
                                                   .out = out,
                                                   .stats = kept,
                                                   .resid = device_resid,
                                                   .branch = branch ? device_act(branch, n) : NULL,
                                                   .w = w ? device_f32(w, s.C) : NULL,
                                                   .b = b ? device_f32(b, s.C) : NULL,
                                                   .dropout = device_dropout(dropout_of(s)),
                                                   .norm = s.norm,
                                                   .eps = eps,
                                                   .N = s.N,
                                                   .C = s.C});
            double *got = read_act(resid_out, n);
            if (branch)
                EXPECT_CLOSE("resid_out", got, sum, s.N, s.C, test_tol(1e-6));
            else
                EXPECT_SAME("resid_out without branch", got, keep_stats ? untouched : resid, n);
            EXPECT_CLOSE("out", read_act(out, n), want, s.N, s.C, test_tol(tol));
            if (kept) {
                EXPECT_CLOSE("stats", read_f32(kept, 2 * (int64_t)s.N), stats, s.N, 2,
                             test_tol(tol));
            }
        }
    }
}

typedef struct extent {
    int N, C;
} extent;

static const extent extents[] = {
    {1, 1},    {65, 1},  {1, 3},    {7, 3},    {3, 5},    {65, 5},    {1, 33},
    {3, 33},   {7, 65},  {65, 65},  {1, 96},   {3, 96},   {7, 128},   {65, 128},
    {3, 257},  {600, 3}, {35, 136}, {6, 264},  {17, 768}, {19, 1000}, {5, 1024},
    {3, 1032}, {600, 8}, {3, 2056}, {2, 4104}, {65, 512}, {9, 500},   {19, 1288},
};

/* The combinations of weight and bias that the ops allow. */
static params variant_of(int variant, int norm, int N, int C) {
    return (params){.norm = norm, .N = N, .C = C, .use_w = variant & 1, .use_b = variant >> 1 & 1};
}

static void test_forward(void) {
    for (int i = 0; i < TEST_COUNT(extents) * 2; i++) {
        extent e = extents[i / 2];
        for (int variant = 0; variant < 4; variant++) {
            params s = variant_of(variant, i % 2, e.N, e.C);
            s.use_branch = (variant + i / 2) % 3 != 0;
            s.p = s.use_branch && (variant + i / 2) % 3 == 2 ? 0.3f : 0.0f;
            name_case(s);
            check_forward(s, random_act((int64_t)e.N * e.C, 1.0), 1e-5);
        }
    }
}

/* With `rest` a stream that takes in many branches is nearly as exact as in float32. */
static void check_rest(int norm, int C) {
    enum { N = 5, TIMES = 20 };
    int64_t n = (int64_t)N * C;
    params s = {.norm = norm, .N = N, .C = C, .use_w = 1, .use_branch = 1};
    name_case(s);
    double *begin = random_f32(n, 1.0), *sum = host_copy(begin, n), *branches[TIMES];
    for (int i = 0; i < TIMES; i++) {
        branches[i] = random_act(n, 0.1);
        for (int64_t j = 0; j < n; j++) sum[j] += branches[i][j];
    }
    double *w = random_f32(C, 1.0), *want = host_zeros(n), *stats = host_zeros(2 * N);
    ref_norm_forward(want, stats, sum, w, NULL, norm, eps, N, C);
    EACH_BACKEND {
        if (strncmp(test.ops->name, "cpu bf16", 8)) continue; /* quantized tables have its ops */
        gpt_shape shape = shape_of(s, 0);
        test_workspace(&shape);
        double *lacks = host_zeros(n);
        for (int64_t i = 0; i < n; i++) lacks[i] = begin[i] - round_act(begin[i]);
        void *resid = device_act(begin, n), *rest = device_act(lacks, n);
        void *out = device_act(NULL, n);
        residual_norm_forward op = {.resid_out = resid,
                                    .out = out,
                                    .resid = resid,
                                    .w = device_f32(w, C),
                                    .dropout = device_dropout(dropout_of(s)),
                                    .norm = norm,
                                    .eps = eps,
                                    .N = N,
                                    .C = C,
                                    .rest = rest};
        for (int i = 0; i < TIMES; i++) {
            op.branch = device_act(branches[i], n);
            test.ops->residual_norm_forward(test.ctx, &op);
        }
        double *stream = read_act(resid, n);
        lacks = read_act(rest, n);
        for (int64_t i = 0; i < n; i++) stream[i] += lacks[i];
        EXPECT_CLOSE("resid and rest", stream, sum, N, C, 1e-4);
        EXPECT_CLOSE("out", read_act(out, n), want, N, C, test_tol(1e-5));
        op.branch = NULL, op.norm = NORM_NONE, op.w = NULL, op.out = resid;
        test.ops->residual_norm_forward(test.ctx, &op);
        op.resid_out = NULL, op.norm = norm, op.w = device_f32(w, C), op.out = out;
        test.ops->residual_norm_forward(test.ctx, &op);
        EXPECT_CLOSE("out without branch", read_act(out, n), want, N, C, test_tol(1e-5));
        EXPECT_SAME("rest without branch", read_act(rest, n), lacks, n);
    }
}

static void test_rest(void) {
    for (int norm = 0; norm < 2; norm++) check_rest(norm, 3), check_rest(norm, 65);
}

/* A row's bits do not depend on how many others there are, which a GPU's kernels do. */
static void check_rows_alone(int norm, int C) {
    enum { MOST = 520 };
    static const int counts[] = {1, 3, 9, MOST};
    params s = {.norm = norm, .N = MOST, .C = C, .use_w = 1, .use_b = 1, .use_branch = 1};
    int64_t most = (int64_t)MOST * C;
    name_case(s);
    double *resid = random_act(most, 1.0), *branch = random_act(most, 1.0);
    double *w = random_f32(C, 1.0), *b = random_f32(C, 1.0);
    EACH_BACKEND {
        gpt_shape shape = shape_of(s, 1);
        test_workspace(&shape);
        double *all = NULL, *all_stats = NULL;
        for (int i = TEST_COUNT(counts) - 1; i >= 0; i--) {
            int64_t n = (int64_t)counts[i] * C;
            void *out = device_act(NULL, n), *stats = device_f32(NULL, 2 * counts[i]);
            test.ops->residual_norm_forward(
                test.ctx, &(residual_norm_forward){.resid_out = device_act(NULL, n),
                                                   .out = out,
                                                   .stats = stats,
                                                   .resid = device_act(resid, n),
                                                   .branch = device_act(branch, n),
                                                   .w = device_f32(w, C),
                                                   .b = device_f32(b, C),
                                                   .dropout = device_dropout(dropout_of(s)),
                                                   .norm = norm,
                                                   .eps = eps,
                                                   .N = counts[i],
                                                   .C = C});
            double *got = read_act(out, n), *got_stats = read_f32(stats, 2 * counts[i]);
            if (!all) all = got, all_stats = got_stats;
            EXPECT_SAME("out", got, all, n);
            EXPECT_SAME("stats", got_stats, all_stats, 2 * counts[i]);
        }
    }
}

static void test_rows_alone(void) {
    static const int widths[] = {8, 65, 264, 768, 1000, 1600, 2056};
    for (int i = 0; i < TEST_COUNT(widths); i++) check_rows_alone(i % 2, widths[i]);
    check_rows_alone(GPT_NORM_LAYERNORM, 768);
}

/* A mean of 1000 costs the mean itself 10 of float32's 24 bits, so 1e-3 is what two passes reach;
 * E[x^2] - E[x]^2 would be off by more than the variance. */
static void test_large_mean(void) {
    params s = {.norm = GPT_NORM_LAYERNORM, .N = 7, .C = 129, .use_w = 1, .use_b = 1};
    for (s.use_branch = 0; s.use_branch < 2; s.use_branch++) {
        name_case(s);
        /* In bfloat16 neighbours of 1000 are 4 apart, so the numbers spread over more of them. */
        double spread = test.act_bytes == 4 ? 1.0 : 64.0;
        double *resid = random_act((int64_t)s.N * s.C, spread);
        for (int64_t i = 0; i < (int64_t)s.N * s.C; i++) resid[i] = round_act(resid[i] + 1000.0);
        /* Adding a branch rounds the sum to the element type before the norm reads it or after. */
        if (s.use_branch && test.act_bytes == 2) continue;
        check_forward(s, resid, 1e-3);
    }
}

/* Rows of equal numbers have no variance: eps alone is left, and nothing may be infinite. */
static void test_constant_rows(void) {
    for (int norm = 0; norm < 2; norm++) {
        params s = {.norm = norm, .N = 3, .C = 65, .use_w = 1, .use_b = 1};
        name_case(s);
        double *resid = host_zeros((int64_t)s.N * s.C);
        for (int c = 0; c < s.C; c++) resid[s.C + c] = 0.5;
        check_forward(s, resid, 1e-5);
    }
}

/* skip_dw, skip_db: a norm whose weight or bias is used but not trained. */
static void check_backward(params s, int skip_dw, int skip_db) {
    int64_t n = (int64_t)s.N * s.C;
    name_case(s);
    double *resid = random_act(n, 1.0), *dout = random_act(n, 1.0), *dresid = random_act(n, 1.0);
    double *w = s.use_w ? random_f32(s.C, 1.0) : NULL;
    double *dw = s.use_w && !skip_dw ? random_f32(s.C, 1.0) : NULL;
    double *db = s.use_b && !skip_db ? random_f32(s.C, 1.0) : NULL;
    double *out = host_zeros(n), *stats = host_zeros(2 * (int64_t)s.N);
    ref_norm_forward(out, stats, resid, w, NULL, s.norm, eps, s.N, s.C);
    double *want = host_copy(dresid, n), *want_branch = host_zeros(n);
    double *dbias = random_f32(s.C, 1.0), *want_dbias = host_copy(dbias, s.C);
    double *want_dw = dw ? host_copy(dw, s.C) : NULL, *want_db = db ? host_copy(db, s.C) : NULL;
    ref_norm_backward(want, want_dw, want_db, dout, resid, stats, w, s.norm, s.N, s.C);
    gpt_dropout dropout = dropout_at(dropout_of(s));
    for (int64_t i = 0; i < n; i++) {
        want_branch[i] = dropout_factor(dropout, (uint64_t)i) * want[i];
        want_dbias[i % s.C] += s.use_branch ? want_branch[i] : want[i];
    }
    gpt_shape shape = shape_of(s, 1);
    EACH_BACKEND {
        void *device_dresid = device_act(dresid, n);
        void *dbranch = s.use_branch ? device_act(NULL, n) : NULL;
        void *device_dw = dw ? device_f32(dw, s.C) : NULL;
        void *device_db = db ? device_f32(db, s.C) : NULL;
        int sums = test.ops->sums_branches && s.use_bias;
        void *device_dbias = sums ? device_f32(dbias, s.C) : NULL;
        test_workspace(&shape);
        test.ops->residual_norm_backward(
            test.ctx, &(residual_norm_backward){.dresid = device_dresid,
                                                .dbranch = dbranch,
                                                .dw = device_dw,
                                                .db = device_db,
                                                .dbias = device_dbias,
                                                .dout = device_act(dout, n),
                                                .resid = device_act(resid, n),
                                                .stats = device_f32(stats, 2 * (int64_t)s.N),
                                                .w = w ? device_f32(w, s.C) : NULL,
                                                .dropout = device_dropout(dropout_of(s)),
                                                .norm = s.norm,
                                                .N = s.N,
                                                .C = s.C});
        EXPECT_CLOSE("dresid", read_act(device_dresid, n), want, s.N, s.C, test_tol(2e-5));
        if (dbranch) {
            EXPECT_CLOSE("dbranch", read_act(dbranch, n), want_branch, s.N, s.C, test_tol(2e-5));
        }
        if (dw) EXPECT_CLOSE("dw", read_f32(device_dw, s.C), want_dw, 1, s.C, test_tol(2e-5));
        if (db) EXPECT_CLOSE("db", read_f32(device_db, s.C), want_db, 1, s.C, test_tol(2e-5));
        if (sums) {
            EXPECT_CLOSE("dbias", read_f32(device_dbias, s.C), want_dbias, 1, s.C, test_tol(2e-5));
        }
    }
}

static void test_backward(void) {
    for (int i = 0; i < TEST_COUNT(extents) * 2; i++) {
        extent e = extents[i / 2];
        for (int variant = 0; variant < 4; variant++) {
            params s = variant_of(variant, i % 2, e.N, e.C);
            s.use_branch = (variant + i / 2) % 3 != 0;
            s.p = (variant + i / 2) % 3 == 2 ? 0.3f : 0.0f;
            s.use_bias = variant % 2 == i % 2;
            check_backward(s, variant == 3 && i % 3 == 0, variant == 3 && i % 3 == 1);
        }
    }
}

/* dbranch of backward has the zeros that resid_out - resid of forward has. */
static void test_same_mask(void) {
    params s = {.norm = GPT_NORM_RMSNORM, .N = 7, .C = 65, .use_branch = 1, .p = 0.5f};
    int64_t n = (int64_t)s.N * s.C;
    name_case(s);
    double *zero = host_zeros(n), *ones = host_zeros(n), *stats = host_zeros(2 * (int64_t)s.N);
    for (int64_t i = 0; i < n; i++) ones[i] = 1.0;
    for (int i = 0; i < s.N; i++) stats[2 * i + 1] = 1.0;
    gpt_shape shape = shape_of(s, 1);
    EACH_BACKEND {
        void *sum = device_act(NULL, n), *dbranch = device_act(NULL, n);
        test_workspace(&shape);
        test.ops->residual_norm_forward(
            test.ctx, &(residual_norm_forward){.resid_out = sum,
                                               .out = device_act(NULL, n),
                                               .resid = device_act(zero, n),
                                               .branch = device_act(ones, n),
                                               .dropout = device_dropout(dropout_of(s)),
                                               .norm = s.norm,
                                               .eps = eps,
                                               .N = s.N,
                                               .C = s.C});
        test.ops->residual_norm_backward(
            test.ctx, &(residual_norm_backward){.dresid = device_act(ones, n),
                                                .dbranch = dbranch,
                                                .dout = device_act(zero, n),
                                                .resid = device_act(zero, n),
                                                .stats = device_f32(stats, 2 * (int64_t)s.N),
                                                .dropout = device_dropout(dropout_of(s)),
                                                .norm = s.norm,
                                                .N = s.N,
                                                .C = s.C});
        EXPECT_SAME("mask", read_act(dbranch, n), read_act(sum, n), n);
    }
}

typedef struct state {
    double *x, *w, *b, *dout, *out, *stats;
    int norm, N, C;
} state;

static double loss_of(void *pointer) {
    state *s = pointer;
    ref_norm_forward(s->out, s->stats, s->x, s->w, s->b, s->norm, eps, s->N, s->C);
    return test_dot(s->out, s->dout, (int64_t)s->N * s->C);
}

static void test_reference(void) {
    enum { N = 3, C = 5 };
    for (int norm = 0; norm < 2; norm++) {
        test_case("norm=%d", norm);
        state s = {random_f32(N * C, 1.0),
                   random_f32(C, 1.0),
                   random_f32(C, 1.0),
                   random_f32(N * C, 1.0),
                   host_zeros(N * C),
                   host_zeros(2 * N),
                   norm,
                   N,
                   C};
        double *dx = host_zeros(N * C), *dw = host_zeros(C), *db = host_zeros(C);
        loss_of(&s);
        ref_norm_backward(dx, dw, db, s.dout, s.x, s.stats, s.w, norm, N, C);
        EXPECT_GRADIENT("dx", loss_of, &s, s.x, dx, N * C);
        EXPECT_GRADIENT("dw", loss_of, &s, s.w, dw, C);
        EXPECT_GRADIENT("db", loss_of, &s, s.b, db, C);
        s.w = NULL;
        dx = host_zeros(N * C);
        ref_norm_backward(dx, NULL, NULL, s.dout, s.x, s.stats, NULL, norm, N, C);
        EXPECT_GRADIENT("dx without w", loss_of, &s, s.x, dx, N * C);
    }
}

TEST_OPS_MAIN({"reference", test_reference}, {"forward", test_forward},
              {"rows alone", test_rows_alone}, {"large mean", test_large_mean},
              {"constant rows", test_constant_rows}, {"backward", test_backward},
              {"same mask", test_same_mask}, {"rest", test_rest})
