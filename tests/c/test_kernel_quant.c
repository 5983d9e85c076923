/* The products of one thread with weights of each form of quant.h, in float64 by their definition there:
 * with the kernels of each level of this machine, and with those of 16 lanes and of AMX's tiles (tiles.h) in
 * plain C, which are compiled here. Included by test_kernel_words.c: with those that it compiles alone. */
#define CPU_BF16
#ifndef ONLY_IN_PLAIN_C
#define CPU_AMX
#define GPTC_EMULATE_AMX
#define PLAIN_LANES 16
#define PLAIN_PAIRS
#endif
#include "cpu/kernel_quant.h"
#include "testing.h"

#define DECLARE(level) extern const quant_level cpu_quant_##level##_quant_level
DECLARE(portable);
DECLARE(avx2);
DECLARE(avx512);
DECLARE(avx512vnni);
DECLARE(avx512bf16);
DECLARE(amx);

static const quant_level in_plain_c = QUANT_LEVEL;
/* `step`: of the sizes; a prime that gives each of both lists. */
static const struct {
    const char *name;
    const quant_level *level;
    int step;
} levels[] = {
#ifdef ONLY_IN_PLAIN_C
    {ONLY_IN_PLAIN_C, &in_plain_c, 5},
#else
    {"16 lanes and tiles in plain C", &in_plain_c, 1},
    {"portable", &cpu_quant_portable_quant_level, 5},
#ifdef GPTC_HAS_AVX2
    {"avx2", &cpu_quant_avx2_quant_level, 5},
#endif
#ifdef GPTC_HAS_AVX512
    {"avx512", &cpu_quant_avx512_quant_level, 5},
#endif
#ifdef GPTC_HAS_AVX512VNNI
    {"avx512vnni", &cpu_quant_avx512vnni_quant_level, 5},
#endif
#ifdef GPTC_HAS_AVX512BF16
    {"avx512bf16", &cpu_quant_avx512bf16_quant_level, 5},
#endif
#ifdef GPTC_HAS_AMX
    {"amx", &cpu_quant_amx_quant_level, 1},
#endif
#endif
};

static const quant_level *level;
static int step;

/* True where this machine has the level, which is the one that is tested from now on. */
static int level_begin(int i) {
    setenv("GPTC_CPU_LEVEL", levels[i].name, 1);
    int there = levels[i].level == &in_plain_c || !strcmp(gpt_cpu_level(), levels[i].name);
    unsetenv("GPTC_CPU_LEVEL");
    test.target = levels[i].name;
    level = levels[i].level, step = test_is_short() ? 5 : levels[i].step;
    return there;
}
#define EACH_LEVEL                                                                                 \
    for (int at = 0; at < TEST_COUNT(levels); at++)                                                \
        if (level_begin(at))

static const char *const names[] = {
#define NAME(name, ...) #name,
    QUANT_FORMS(NAME)
#undef NAME
};

/* Term k of 32, of column n: panels are made of random bytes, for every pattern of bits is a weight. */
static int integer_at(quant_form f, const uint8_t *chunks, int k, int n) {
    int quad = k / QUAD, at = n * QUAD + k % QUAD;
    if (f.bits == 8) return chunks[quad * CHUNK_BYTES + at];
    int byte = chunks[quad % 4 * CHUNK_BYTES + at], u = quad < 4 ? byte & 15 : byte >> 4;
    if (f.bits == 5) u += 16 * (chunks[4 * CHUNK_BYTES + at] >> quad & 1);
    if (f.bits == 6) u += 16 * (chunks[(4 + quad / 4) * CHUNK_BYTES + at] >> 2 * (quad % 4) & 3);
    return u;
}

/* A float16 of random sign, from 2^-8 to 2^0. */
static uint16_t random_half(void) {
    int bits = random_below(1 << 11), exponent = 7 + random_below(8);
    return (uint16_t)((bits & 1) << 15 | exponent << 10 | bits >> 1);
}

static double half_value(uint16_t x) {
    double value = ldexp(1024 + (x & 1023), (x >> 10 & 31) - 25);
    return x >> 15 ? -value : value;
}

/* Where a panel has the float16 of a block, the scales and the chunks of 32 terms: of group g of K terms. */
typedef struct parts_of {
    uint8_t *blocks, *scales, *chunks;
} parts_of;

static parts_of parts_at(quant_form f, uint8_t *panel, int K, int g) {
    int of_block = f.scale == SCALE_INT8, all = (K + 31) / 32, left = all - g / 8 * 8;
    int block_bytes = of_block ? f.rows * PANEL * 2 : 0, chunk_bytes = f.bits * 64;
    int scale_bytes = 32 / f.group * f.rows * PANEL * (of_block ? 1 : 2);
    uint8_t *at = panel + g / 8 * (block_bytes + 8 * (scale_bytes + chunk_bytes));
    uint8_t *scales = at + block_bytes, *chunks = scales + (left < 8 ? left : 8) * scale_bytes;
    return (parts_of){at, scales + g % 8 * scale_bytes, chunks + g % 8 * chunk_bytes};
}

/* The scale, or in row 1 the minimum, of the terms from k on. */
static double scale_at(quant_form f, uint8_t *panel, int K, int k, int row, int n) {
    parts_of p = parts_at(f, panel, K, k / 32);
    int at = (k % 32 / f.group * f.rows + row) * PANEL + n;
    if (f.scale == SCALE_BF16) return float_of_bf16(((uint16_t *)p.scales)[at]);
    if (f.scale == SCALE_FP16) return half_value(((uint16_t *)p.scales)[at]);
    return half_value(((uint16_t *)p.blocks)[row * PANEL + n]) * (int8_t)p.scales[at];
}

static uint8_t *random_panels(quant_form f, int panels, int K) {
    size_t size = (size_t)quant_panel_bytes(f, K);
    uint8_t *b = test_alloc(&test.host, size * (size_t)panels);
    for (size_t i = 0; i < size * (size_t)panels; i++) b[i] = (uint8_t)random_below(256);
    for (int i = 0; i < panels * (int)quant_groups(K); i++) {
        int g = i % (int)quant_groups(K), n = f.rows * PANEL * 32 / f.group;
        parts_of p = parts_at(f, b + size * (size_t)(i / (int)quant_groups(K)), K, g);
        uint16_t *numbers = (uint16_t *)(f.scale == SCALE_INT8 ? p.blocks : p.scales);
        if (f.scale == SCALE_INT8) n = f.rows * PANEL;
        for (int j = 0; j < n; j++)
            numbers[j] = f.scale == SCALE_BF16 ? bf16_round((float)random_normal()) : random_half();
    }
    return b;
}

/* Term k of a rounded row: two bytes, or 16 bits with terms 1 and 2 of each quad in each other's place. */
static int rounded_at(const rounded_rows *a, int row, int k) {
    const void *group = a->q[row][k / 32];
    const int8_t *bytes = group;
    int in_group = k % 32, in_quad = k % QUAD;
    if (level->bytes) return 256 * bytes[in_group] + bytes[32 + in_group];
    return ((const int16_t *)group)[in_group - in_quad + in_quad / 2 + in_quad % 2 * 2];
}

static int bits_for(quant_form f) {
    return level->pairs && f.bits == 8 ? 12 : 14;
}

/* c (rows, COLS) += x (rows, K) b by the kernels of few rows. */
static void multiply(int form, float *c, const rounded_rows *a, const uint8_t *b, int rows,
                     int panels, int K) {
    quant_form f = quant_forms[form];
    panel_part parts[2];
    for (int p = 0; p < panels; p++) {
        parts[p] = panel_from(f, b + p * quant_panel_bytes(f, K), 0);
        parts[p].next = rows % 2 ? parts[p].at : NULL;
    }
    int together = panels == level->band_panels ? panels : 1;
    for (int p = 0; p < panels; p += together)
        level->kernels[form](c + p * PANEL, a, rows, parts + p, (int)quant_groups(K), together);
}

/* The same by those of many, which take them in two parts here. */
static void multiply_pairs(int form, float *c, const pair_rows *a, const uint8_t *b, int rows,
                           int panels, int K) {
    int64_t size = quant_panel_bytes(quant_forms[form], K);
    float *sums = host_floats((int64_t)rows * LD_PAIRS);
    int first = rows / 3, n;
    for (int p = 0; p < panels; p += n, c += n * PANEL) {
        panel_part parts[BAND_PANELS];
        n = cpu_min(panels - p, BAND_PANELS);
        for (int i = 0; i < n; i++) {
            parts[i] = panel_from(quant_forms[form], b + (p + i) * size, 0);
            parts[i].next = rows % 2 ? parts[i].at : NULL;
        }
        for (int r = 0; r < rows; r++)
            memcpy(sums + r * LD_PAIRS, c + r * COLS, sizeof *c * (size_t)(n * PANEL));
        if (first > 0) level->pairs_kernels[form](sums, a, 0, first, parts, n);
        level->pairs_kernels[form](sums + first * LD_PAIRS, a, first, rows - first, parts, n);
        for (int r = 0; r < rows; r++)
            memcpy(c + r * COLS, sums + r * LD_PAIRS, sizeof *c * (size_t)(n * PANEL));
    }
}

static rounded_rows *rounded(quant_form f, const bf16 *x, int rows, int K) {
    rounded_rows *a = test_alloc(&test.host, sizeof *a);
    memset(a, TEST_GARBAGE, sizeof *a);
    for (int r = 0; r < rows; r++) level->round_row(a, r, x + r * K, K, bits_for(f));
    return a;
}

static pair_rows pairs_of_rows(quant_form f, const bf16 *x, int rows, int K) {
    pair_rows a = {.lda = pairs_lda(K), .groups = (int)quant_groups(K), .bits = bits_for(f)};
    size_t bytes = sizeof(bf16) * (size_t)(rows * a.lda);
    a.a = test_alloc(&test.host, bytes);
    memset(a.a, TEST_GARBAGE, bytes);
    if (f.rows == 2) a.totals = host_floats((int64_t)rows * 3 * a.groups);
    for (int r = 0; r < rows; r++) level->round_pairs(&a, r, x + r * K, K);
    return a;
}

static void check(int form, int rows, int panels, int K) {
    quant_form f = quant_forms[form];
    test_case("%s, rows=%d panels=%d K=%d", names[form], rows, panels, K);
    int groups = (int)quant_groups(K);
    int64_t size = quant_panel_bytes(f, K);
    uint8_t *b = random_panels(f, panels, K);
    bf16 *x = test_alloc(&test.host, sizeof *x * (size_t)(rows * K));
    for (int i = 0; i < rows * K; i++) x[i] = bf16_round((float)random_normal());
    rounded_rows *a = rounded(f, x, rows, K);
    float *c = host_floats((int64_t)rows * COLS), *many = host_floats((int64_t)rows * COLS);
    double *want = host_zeros((int64_t)rows * COLS), *got = host_zeros((int64_t)rows * COLS);
    double *exact = host_zeros((int64_t)rows * COLS);  /* of activations that are not rounded */
    double *margin = host_zeros((int64_t)rows * COLS); /* that rounding may take or add */
    for (int i = 0; i < rows * COLS; i++)
        exact[i] = want[i] = many[i] = c[i] = (float)random_normal();
    for (int n = 0; n < panels * PANEL; n++)
        for (int k = 0; k < groups * QUANT_GROUP; k += f.group) {
            uint8_t *panel = b + n / PANEL * size;
            double scale = scale_at(f, panel, K, k, 0, n % PANEL), least = 0;
            if (f.rows == 2) least = scale_at(f, panel, K, k, 1, n % PANEL);
            int u[QUANT_GROUP];
            for (int h = 0; h < f.group; h++)
                u[h] = integer_at(f, parts_at(f, panel, K, k / 32).chunks, (k + h) % 32, n % PANEL);
            for (int r = 0; r < rows; r++) {
                int sum = 0, all = 0;
                for (int h = 0; h < f.group; h++) {
                    int q = rounded_at(a, r, k + h);
                    sum += (u[h] - f.zero) * q;
                    all += q;
                    if (k + h >= K) continue;
                    double w = (u[h] - f.zero) * scale + least,
                           value = bf16_float(x[r * K + k + h]);
                    double unit = a->scale[r][k / QUANT_GROUP];
                    exact[r * COLS + n] += w * value;
                    if (fabs(value) < ldexp(unit, 7)) margin[r * COLS + n] += fabs(w) * unit / 2;
                }
                want[r * COLS + n] += (sum * scale + all * least) * a->scale[r][k / QUANT_GROUP];
            }
        }
    multiply(form, c, a, b, rows, panels, K);
    for (int i = 0; i < rows * COLS; i++) got[i] = c[i];
    EXPECT_CLOSE("c", got, want, rows, COLS, 2e-6);
    if (bits_for(f) == 14) EXPECT_CLOSE("c without rounding", got, exact, rows, COLS, 3e-4);
    int outside = 0;
    for (int i = 0; i < rows * COLS; i++)
        outside += !(fabs(want[i] - exact[i]) <= margin[i] + 1e-9 * fabs(exact[i]));
    EXPECT(outside == 0);
    if (!level->pairs) return;
    pair_rows in_pairs = pairs_of_rows(f, x, rows, K);
    multiply_pairs(form, many, &in_pairs, b, rows, panels, K);
    /* Tiles of AMX, of 16 rows, meet their scales in another order. */
    if (level == &in_plain_c && rows >= 16) {
        for (int i = 0; i < rows * COLS; i++) got[i] = many[i];
        EXPECT_CLOSE("c of many rows", got, want, rows, COLS, 2e-6);
    } else {
        EXPECT(!memcmp(many, c, sizeof *c * (size_t)(rows * COLS)));
    }
}

/* Groups whose products are as large as can be and have one sign, with small activations among large ones: sums have
 * all the bits that they may have, and are the same in pairs. */
static void check_largest(int form) {
    enum { ROWS_HERE = 8, K = 96 };
    quant_form f = quant_forms[form];
    test_case("%s, largest sums", names[form]);
    uint8_t *b = random_panels(f, 1, K);
    for (int g = 0; g < K / QUANT_GROUP; g++)
        memset(parts_at(f, b, K, g).chunks, f.bits == 8 ? 1 : 0xff, (size_t)f.bits * 64);
    bf16 *x = test_alloc(&test.host, sizeof *x * ROWS_HERE * K);
    for (int i = 0; i < ROWS_HERE * K; i++)
        x[i] = bf16_round(i % 5 ? 128.0f + (float)random_below(128)
                                : (float)(2 * random_below(64) + 1) / 64);
    float *c = host_floats(ROWS_HERE * COLS), *many = host_floats(ROWS_HERE * COLS);
    memset(c, 0, sizeof *c * ROWS_HERE * COLS);
    memset(many, 0, sizeof *c * ROWS_HERE * COLS);
    multiply(form, c, rounded(f, x, ROWS_HERE, K), b, ROWS_HERE, 1, K);
    pair_rows in_pairs = pairs_of_rows(f, x, ROWS_HERE, K);
    multiply_pairs(form, many, &in_pairs, b, ROWS_HERE, 1, K);
    EXPECT(!memcmp(many, c, sizeof *c * ROWS_HERE * COLS));
}

/* Rounding: to the nearest multiple of 2^(1 - bits) of the power of two below the largest of each group. So bf16
 * numbers are as they were, but for smaller ones than 2^7 multiples. In pairs, rows hold these multiples. */
static void check_rounding(int form, int bits) {
    enum { K = 3 * QUANT_GROUP + 5, GROUPS = 4 };
    quant_form f = quant_forms[form];
    test_case("rounding to %d bits", bits);
    EXPECT(bits_for(f) == bits);
    bf16 x[2 * K];
    for (int k = 0; k < 2 * K; k++)
        x[k] = bf16_round((float)ldexp(random_normal(), -random_below(12)));
    for (int k = K + QUANT_GROUP; k < K + 2 * QUANT_GROUP; k++) x[k] = 0;
    x[K + 2] = bf16_round(-31.875f), x[K + K - 1] = bf16_round(255.0f); /* the largest integer */
    rounded_rows *a = rounded(f, x, 2, K);
    pair_rows p = {0};
    if (level->pairs) p = pairs_of_rows(f, x, 2, K);
    for (int g = 0; g < GROUPS; g++) {
        int n = cpu_min(QUANT_GROUP, K - g * QUANT_GROUP), sum[2] = {0, 0}, exponent;
        double largest = 0, scale = a->scale[1][g];
        for (int k = g * QUANT_GROUP; k < g * QUANT_GROUP + n; k++)
            largest = fmax(largest, fabs(bf16_float(x[K + k])));
        frexp(largest, &exponent);
        EXPECT(scale == (largest == 0 ? 0 : ldexp(1, exponent - bits)));
        for (int k = 0; k < QUANT_GROUP; k++) {
            int q = rounded_at(a, 1, g * QUANT_GROUP + k);
            double value = k < n ? bf16_float(x[K + g * QUANT_GROUP + k]) : 0;
            EXPECT(fabs(value) < ldexp(scale, 7) ? fabs(q * scale - value) <= scale / 2
                                                 : q * scale == value);
            if (p.a) EXPECT(bf16_float(p.a[p.lda + g * QUANT_GROUP + k]) == q * scale);
            sum[k / HALF_GROUP] += q;
        }
        EXPECT(a->sum[1][2 * g] == sum[0] && a->sum[1][2 * g + 1] == sum[1]);
        EXPECT(a->total[1][g] == scale * (sum[0] + sum[1]));
        if (!p.totals) continue;
        const float *totals = p.totals + 3 * GROUPS;
        EXPECT(totals[g] == a->total[1][g]);
        for (int half = 0; half < 2; half++)
            EXPECT(totals[GROUPS + 2 * g + half] == scale * sum[half]);
    }
}

static void check_products(void) {
    static const int rows[] = {1, 3, 4, 15, 16, 17, 31, 32, 48};
    static const int terms[] = {1, 4, 31, 32, 33, 64, 100, 256, 1056};
    for (int form = 0; form < TEST_COUNT(names); form++)
        for (int i = 0; i < TEST_COUNT(rows) * TEST_COUNT(terms); i += step)
            for (int panels = 1; panels <= 2; panels++)
                check(form, rows[i % TEST_COUNT(rows)], panels, terms[i / TEST_COUNT(rows)]);
    for (int form = 0; form < TEST_COUNT(names) && level->pairs; form++) check_largest(form);
}

enum { M = 5, K = 3 * QUANT_BLOCK - 7, ROW = 3, COLUMN = 6, AT = 9 }; /* AT: a group of 32 */

/* The sums (M, COLS) of the same random numbers, but for `value` in group AT: of the weights' scale in
 * COLUMN, where its float16 is given, else of the activations of ROW. */
static float *sums_with(int form, float value, const uint16_t *as_half, int in_pairs) {
    quant_form f = quant_forms[form];
    test.counter = 1;
    uint8_t *b = random_panels(f, 1, K);
    bf16 *x = test_alloc(&test.host, sizeof *x * M * K);
    for (int i = 0; i < M * K; i++) x[i] = bf16_round((float)random_normal());
    parts_of p = parts_at(f, b, K, AT);
    uint16_t *scale = (uint16_t *)(f.scale == SCALE_INT8 ? p.blocks : p.scales) + COLUMN;
    if (as_half) *scale = f.scale == SCALE_BF16 ? bf16_round(value) : *as_half;
    for (int k = 0; !as_half && k < QUANT_GROUP; k++)
        x[ROW * K + AT * QUANT_GROUP + k] = isfinite(value) || k % 5 == 0 ? bf16_round(value) : 0;
    float *c = host_floats(M * COLS);
    memset(c, 0, sizeof *c * M * COLS);
    if (in_pairs) {
        pair_rows a = pairs_of_rows(f, x, M, K);
        multiply_pairs(form, c, &a, b, M, 1, K);
    } else {
        multiply(form, c, rounded(f, x, M, K), b, M, 1, K);
    }
    return c;
}

/* A number that is not finite makes its sums NaN or infinite, NaN at least from activations; one near
 * the smallest is as good as 0. No other sum changes by a bit. */
static void check_extremes(void) {
    static const struct {
        float value;
        uint16_t half;
    } numbers[] = {{NAN, 0x7e00},     {INFINITY, 0x7c00},     {-INFINITY, 0xfc00},
                   {-NAN, 0xfe01},    {FLT_MIN, 0x0001},      {1e-39f, 0x8001},
                   {-1e-39f, 0x0003}, {FLT_TRUE_MIN, 0x0001}, {-0.0f, 0x8000}};
    for (int form = 0; form < TEST_COUNT(names); form++)
        for (int way = 0; way < 2 * (1 + level->pairs); way++) {
            int in_scale = way % 2, in_pairs = way / 2;
            uint16_t zero = 0;
            for (int i = 0; i < TEST_COUNT(numbers); i++) {
                float value = numbers[i].value;
                test_case("%s, %g in %s%s", names[form], value,
                          in_scale ? "a scale" : "activations", in_pairs ? ", many rows" : "");
                const uint16_t *half = in_scale ? &numbers[i].half : NULL;
                float *plain = sums_with(form, 0, in_scale ? &zero : NULL, in_pairs);
                float *c = sums_with(form, value, half, in_pairs);
                for (int r = 0; r < M; r++)
                    for (int n = 0; n < PANEL; n++) {
                        float got = c[r * COLS + n], want = plain[r * COLS + n];
                        if (in_scale ? n != COLUMN : r != ROW)
                            EXPECT(got == want);
                        else if (isfinite(value))
                            EXPECT(fabsf(got - want) < 0.1f);
                        else
                            EXPECT(isnan(got) || (in_scale && isinf(value) && isinf(got)));
                    }
            }
        }
}

/* Integers that are put into their chunks come back, next to those of other columns. */
static void test_chunks(void) {
    for (int form = 0; form < TEST_COUNT(names); form++) {
        quant_form f = quant_forms[form];
        uint8_t chunks[8 * CHUNK_BYTES] = {0}, u[PANEL][QUANT_GROUP], got[QUANT_GROUP];
        test_case("%s", names[form]);
        for (int j = 0; j < PANEL; j++) {
            for (int k = 0; k < QUANT_GROUP; k++) u[j][k] = (uint8_t)random_below(1 << f.bits);
            quant_put(f, chunks, u[j], j);
        }
        for (int j = 0; j < PANEL; j++) {
            quant_get(f, chunks, got, j);
            EXPECT(!memcmp(got, u[j], sizeof got));
            for (int k = 0; k < QUANT_GROUP; k++) EXPECT(integer_at(f, chunks, k, j) == u[j][k]);
        }
    }
}

static void test_rounding(void) {
    EACH_LEVEL {
        check_rounding(FORM_Q4_1, 14);
        check_rounding(FORM_INT8, level->pairs ? 12 : 14);
    }
}

static void test_products(void) {
    EACH_LEVEL check_products();
}

static void test_extremes(void) {
    EACH_LEVEL check_extremes();
}

TEST_API_MAIN({"rounding", test_rounding}, {"products", test_products}, {"chunks", test_chunks},
              {"extremes", test_extremes})
