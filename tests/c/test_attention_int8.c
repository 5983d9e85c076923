/* attention_decode with a cache in int8: the numbers that it keeps, and attention to these in float64. */
#include "testing.h"

#include "reference.h"

typedef struct sizes {
    int B, T, NH, NKV, HS, window, most; /* rows of a sequence in a call */
} sizes;

/* Heads of every number of vectors and beyond steps of 64 channels; tiles, windows, groups; rows one by one (up to
 * 16 of a sequence), in tiles, and both. */
static const sizes cases[] = {
    {1, 1, 1, 1, 2, 0, 1},      {2, 5, 2, 1, 6, 0, 3},      {3, 19, 3, 3, 7, 0, 16},
    {2, 70, 4, 2, 16, 0, 17},   {1, 65, 6, 1, 20, 0, 65},   {1, 31, 3, 1, 33, 0, 9},
    {2, 257, 1, 1, 64, 0, 150}, {1, 330, 2, 1, 64, 0, 40},  {1, 330, 2, 1, 6, 20, 100},
    {1, 290, 2, 2, 64, 70, 16}, {2, 140, 2, 1, 72, 33, 90}, {1, 66, 2, 1, 100, 0, 20},
    {1, 90, 1, 1, 128, 5, 50},  {1, 40, 2, 1, 260, 0, 30},  {1, 20, 1, 1, 523, 0, 20},
};

static int64_t row_size(sizes s) {
    return (int64_t)(s.NH + 2 * s.NKV) * s.HS;
}

/* A cache of n_seq slots, two more than there are sequences, n_ctx tokens each. */
typedef struct caches {
    void *k, *v, *scale_k, *scale_v;
    int n_seq, n_ctx;
    int64_t rows; /* of a cache, HS numbers each */
} caches;

enum { UNUSED = 0x55 }; /* in a row that was not written, whose scale is NaN */

static caches new_caches(sizes s) {
    caches c = {.n_seq = s.B + 2, .n_ctx = s.T + 3};
    c.rows = (int64_t)c.n_seq * s.NKV * c.n_ctx;
    c.k = test_device_alloc((size_t)(c.rows * s.HS), UNUSED);
    c.v = test_device_alloc((size_t)(c.rows * s.HS), UNUSED);
    c.scale_k = device_f32(NULL, c.rows), c.scale_v = device_f32(NULL, c.rows);
    return c;
}

/* Sequence b has slot n_seq - 1 - b. */
static int64_t cache_row(sizes s, const caches *c, int b, int kv, int t) {
    return ((int64_t)(c->n_seq - 1 - b) * s.NKV + kv) * c->n_ctx + t;
}

static double *read_int8(const void *device, int64_t n) {
    EXPECT(test.ops->sync(test.ctx) == GPT_OK);
    int8_t *host = test_alloc(&test.host, (size_t)n);
    test.ops->download(test.ctx, host, device, (size_t)n);
    double *x = host_zeros(n);
    for (int64_t i = 0; i < n; i++) x[i] = host[i];
    return x;
}

/* Decodes N rows, of sequences seqs at positions; their queries, keys and values are those of qkv (B, T). */
static double *decode(sizes s, const double *qkv, const caches *c, const int32_t *seqs,
                      const int32_t *positions, int N) {
    int width = s.NH * s.HS;
    double *rows = host_zeros(N * row_size(s));
    int32_t *slots = host_ints(N);
    for (int n = 0; n < N; n++) {
        const double *row = qkv + ((int64_t)seqs[n] * s.T + positions[n]) * row_size(s);
        memcpy(rows + n * row_size(s), row, (size_t)row_size(s) * sizeof *row);
        slots[n] = c->n_seq - 1 - seqs[n];
    }
    void *out = device_act(NULL, (int64_t)N * width);
    test.ops->attention_decode(test.ctx,
                               &(attention_decode){.out = out,
                                                   .cache_k = c->k,
                                                   .cache_v = c->v,
                                                   .scale_k = c->scale_k,
                                                   .scale_v = c->scale_v,
                                                   .qkv = device_act(rows, N * row_size(s)),
                                                   .seqs = device_i32(slots, N),
                                                   .positions = device_i32(positions, N),
                                                   .window = s.window,
                                                   .cap = (float)ref_score_cap,
                                                   .N = N,
                                                   .n_ctx = c->n_ctx,
                                                   .NH = s.NH,
                                                   .NKV = s.NKV,
                                                   .HS = s.HS});
    return read_act(out, (int64_t)N * width);
}

/* Compares the cache with x (B, T, QKV): a scale is the largest number / 127, and int8 times it are the nearest
 * numbers that there are. Returns x with keys and values replaced by those that are kept. */
static void check_vector(const double *x, const double *kept, double scale, int HS, double *out) {
    double largest = test_row_max(x, HS), worst = 0;
    EXPECT_NEAR("scale", scale, largest / 127, 1e-6 * largest);
    for (int i = 0; i < HS; i++) {
        out[i] = kept[i] * scale;
        worst = fmax(worst, fabs(out[i] - x[i]));
    }
    EXPECT_NEAR("rounding", worst, 0, 0.5001 * scale);
}

static double *kept_numbers(sizes s, const double *qkv, const caches *c) {
    const double *cache[] = {read_int8(c->k, c->rows * s.HS), read_int8(c->v, c->rows * s.HS)};
    const double *scale[] = {read_f32(c->scale_k, c->rows), read_f32(c->scale_v, c->rows)};
    double *out = host_copy(qkv, s.B * s.T * row_size(s));
    for (int part = 0; part < 2; part++) {
        int64_t written = 0, unused = 0;
        for (int b = 0; b < s.B; b++)
            for (int kv = 0; kv < s.NKV; kv++)
                for (int t = 0; t < s.T; t++, written++) {
                    int64_t row = cache_row(s, c, b, kv, t);
                    int64_t at = ((int64_t)b * s.T + t) * row_size(s) +
                                 (int64_t)(s.NH + part * s.NKV + kv) * s.HS;
                    check_vector(qkv + at, cache[part] + row * s.HS, scale[part][row], s.HS,
                                 out + at);
                }
        for (int64_t row = 0; row < c->rows; row++) {
            if (!isnan(scale[part][row])) continue;
            int same = 1;
            for (int i = 0; i < s.HS; i++) same &= cache[part][row * s.HS + i] == UNUSED;
            unused += same;
        }
        EXPECT(unused == c->rows - written);
    }
    return out;
}

/* What rounding the cache may change, at most: scores by e, which is |q|_1 max|k| / (254 sqrt(HS)), so that the
 * absolute changes of probabilities add up to exp(2 e) - 1; and values by max|v| / 254. */
static double bound_of(sizes s, const double *qkv, int b, int t, int h) {
    double q = 0, k = 0, v = 0;
    int kv = h / (s.NH / s.NKV);
    const double *sequence = qkv + (int64_t)b * s.T * row_size(s);
    for (int i = 0; i < s.HS; i++) q += fabs(sequence[t * row_size(s) + h * s.HS + i]);
    for (int j = s.window && t >= s.window ? t - s.window + 1 : 0; j <= t; j++) {
        const double *row = sequence + j * row_size(s);
        k = fmax(k, test_row_max(row + (s.NH + kv) * s.HS, s.HS));
        v = fmax(v, test_row_max(row + (s.NH + s.NKV + kv) * s.HS, s.HS));
    }
    return v * (exp(2 * q * k / 254 / sqrt(s.HS)) - 1 + 1.0 / 254);
}

/* To out (B, T, NH HS). */
static double *answer(sizes s, const double *qkv, double *out) {
    int64_t rows = (int64_t)s.B * s.NH * s.T;
    ref_attention_forward(out, host_zeros(rows), host_zeros(rows * s.T), qkv, (gpt_dropout){0},
                          s.window, NULL, s.B, s.T, s.NH, s.NKV, s.HS);
    return out;
}

static void check_bound(sizes s, const double *qkv, const double *got, const double *exact) {
    double error = 0, size = 0, rounding = test_tols(1e-5, 2e-2);
    int64_t beyond = 0, n = (int64_t)s.B * s.T * s.NH * s.HS;
    for (int64_t i = 0; i < n; i++) {
        int h = (int)(i / s.HS % s.NH), t = (int)(i / s.HS / s.NH % s.T);
        int b = (int)(i / s.HS / s.NH / s.T);
        double off = fabs(got[i] - exact[i]);
        if (i % s.HS == 0 || off > 0.01)
            beyond += off > bound_of(s, qkv, b, t, h) + rounding * fabs(exact[i]) + rounding;
        error += off * off;
        size += exact[i] * exact[i];
    }
    EXPECT(beyond == 0);
    EXPECT(sqrt(error / size) < 0.015); /* usually: of normally distributed numbers */
}

/* A GPU has one kernel, whatever the number of rows, so shorter sequences are enough. */
static int is_tested(sizes s) {
    return test_on_cpu() || s.B * s.T < 280;
}

/* All rows of a sequence at once, then pieces of 1 to `most` rows of sequences that take turns. */
static void check(sizes s) {
    test_case("B=%d T=%d NH=%d NKV=%d HS=%d window=%d rows=%d", s.B, s.T, s.NH, s.NKV, s.HS,
              s.window, s.most);
    int width = s.NH * s.HS, N = s.B * s.T;
    double *qkv = random_act(N * row_size(s), 1.0), *exact = answer(s, qkv, host_zeros(N * width));
    double *known = host_zeros(N * row_size(s)), *want = host_zeros(N * width);
    gpt_shape shape = {.N = N, .T = s.T + 3, .n_ctx = s.T + 3, .kv_int8 = 1};
    shape.NH = s.NH, shape.NKV = s.NKV, shape.HS = s.HS, shape.C = width;
    shape.V = shape.Vp = 2, shape.F = s.HS, shape.activation = GPT_ACT_GELU, shape.n_params = 1;
    uint64_t counter = test.counter;
    EACH_BACKEND {
        if (!is_tested(s)) continue;
        test.counter = counter;
        caches whole = new_caches(s), c = new_caches(s);
        int32_t *seqs = host_ints(N), *positions = host_ints(N), *lengths = host_ints(s.B);
        for (int n = 0; n < N; n++) seqs[n] = n / s.T, positions[n] = n % s.T;
        test_workspace(&shape);
        double *got = decode(s, qkv, &whole, seqs, positions, N);
        double *kept = kept_numbers(s, qkv, &whole);
        if (memcmp(known, kept, (size_t)(N * row_size(s)) * sizeof *kept) != 0) {
            memcpy(known, kept, (size_t)(N * row_size(s)) * sizeof *kept);
            answer(s, kept, want);
        }
        EXPECT_CLOSE("out", got, want, N, width, test_tol(1e-5));
        check_bound(s, qkv, got, exact);
        for (int left = N, b = 0; left > 0;) {
            int n = 0;
            for (int k = 0; k < s.B; k++, b = (b + 1) % s.B) {
                int rows = 1 + random_below(s.most);
                for (; rows > 0 && lengths[b] < s.T; rows--, left--)
                    seqs[n] = b, positions[n++] = lengths[b]++;
            }
            double *some = decode(s, qkv, &c, seqs, positions, n), *right = host_zeros(n * width);
            for (int i = 0; i < n; i++)
                memcpy(right + i * width, want + (seqs[i] * s.T + positions[i]) * width,
                       (size_t)width * sizeof *right);
            EXPECT_CLOSE("out of some", some, right, n, width, test_tol(1e-5));
        }
        int64_t size = c.rows * s.HS;
        EXPECT_SAME("cache_k", read_int8(c.k, size), read_int8(whole.k, size), size);
        EXPECT_SAME("cache_v", read_int8(c.v, size), read_int8(whole.v, size), size);
        EXPECT_SAME("scale_k", read_f32(c.scale_k, c.rows), read_f32(whole.scale_k, c.rows),
                    c.rows);
        EXPECT_SAME("scale_v", read_f32(c.scale_v, c.rows), read_f32(whole.scale_v, c.rows),
                    c.rows);
    }
}

static void test_decode(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) check(cases[i]);
}

/* A vector of zeros, one with a number alone, and one that is not finite, which every later row sees. */
static void test_special_vectors(void) {
    sizes s = {1, 6, 1, 1, 20, 0, 1};
    test_case("special vectors");
    double *qkv = random_act(s.T * row_size(s), 1.0);
    for (int i = 0; i < 2 * s.HS; i++) qkv[s.HS + i] = 0;
    for (int i = 0; i < 2 * s.HS; i++) qkv[row_size(s) + s.HS + i] = i == 3 ? -1e4 : 0;
    gpt_shape shape = {.N = s.T, .T = 9, .n_ctx = 9, .kv_int8 = 1, .NH = 1, .NKV = 1, .HS = s.HS};
    shape.C = shape.F = s.HS, shape.V = shape.Vp = 2, shape.activation = GPT_ACT_GELU;
    shape.n_params = 1;
    EACH_BACKEND {
        caches c = new_caches(s);
        int32_t *seqs = host_ints(s.T), *positions = host_ints(s.T);
        for (int n = 0; n < s.T; n++) positions[n] = n;
        test_workspace(&shape);
        double *first = decode(s, qkv, &c, seqs, positions, 1);
        EXPECT_SAME("zeros", first, host_zeros(s.HS), s.HS);
        double *second = decode(s, qkv, &c, seqs, positions + 1, 1);
        for (int i = 0; i < s.HS; i++) EXPECT(isfinite(second[i]));
        double *bad = host_copy(qkv, s.T * row_size(s));
        bad[2 * row_size(s) + 3] = NAN;
        EXPECT(isnan(decode(s, bad, &c, seqs, positions + 2, 1)[0])); /* of a query */
        bad[2 * row_size(s) + 3] = 0;
        bad[2 * row_size(s) + 2 * s.HS + 5] = NAN;
        bad[3 * row_size(s) + s.HS + 7] = INFINITY;
        double *third = decode(s, bad, &c, seqs, positions + 2, 1);
        double *fourth = decode(s, bad, &c, seqs, positions + 3, 1);
        EXPECT(isnan(third[0]) && isnan(fourth[0]));
    }
}

/* Equal numbers of so many channels that their product, as 16 bits by 8, does not fit into int32. */
static void test_long_heads(void) {
    sizes s = {1, 2, 1, 1, 8400, 0, 1};
    test_case("HS=%d", s.HS);
    double *qkv = host_zeros(s.T * row_size(s)), *want = host_zeros(s.HS);
    for (int i = 0; i < s.HS; i++) {
        qkv[i] = qkv[s.HS + i] = qkv[2 * s.HS + i] = want[i] = 1; /* the first row */
        qkv[row_size(s) + i] = 1, qkv[row_size(s) + s.HS + i] = -1;
    }
    gpt_shape shape = {.N = 2, .T = 5, .n_ctx = 5, .kv_int8 = 1, .NH = 1, .NKV = 1, .HS = s.HS};
    shape.C = shape.F = s.HS, shape.V = shape.Vp = 2, shape.activation = GPT_ACT_GELU;
    shape.n_params = 1;
    EACH_BACKEND {
        if (!test_on_cpu()) continue; /* shared memory does not hold such a head */
        caches c = new_caches(s);
        int32_t *seqs = host_ints(2), *positions = host_ints(2);
        positions[1] = 1;
        test_workspace(&shape);
        decode(s, qkv, &c, seqs, positions, 1);
        EXPECT_CLOSE("out", decode(s, qkv, &c, seqs, positions + 1, 1), want, 1, s.HS,
                     test_tol(1e-5));
    }
}

TEST_OPS_MAIN({"decode", test_decode}, {"special vectors", test_special_vectors},
              {"long heads", test_long_heads})
