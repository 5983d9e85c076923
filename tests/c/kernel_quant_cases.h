/* Shared by test_kernel_int8.c and test_kernel_int4.c, and the same for 16 lanes: the product by its
 * definition in quant.h, in float64. The instructions of AMX and AVX-512 VNNI are plain C here, so
 * that the code around them runs on any CPU. */
#define CPU_BF16
#ifdef CPU_LANES
#define GPTC_EMULATE_VNNI
#else
#define CPU_AMX
#define GPTC_EMULATE_AMX
#endif
#include "cpu/kernel_quant.h"
#include "testing.h"

/* Weights in panels, made of random bytes: every pattern of bits is a weight. */
static double weight_at(const uint8_t *panel, int g, int k, int n) {
    int quad = k / QUAD, chunk = quad % CHUNKS;
    uint8_t byte = panel[((g * CHUNKS + chunk) * PANEL + n) * QUAD + k % QUAD];
    if (CPU_QUANT == 4) byte = quad < CHUNKS ? byte & 15 : byte >> 4;
    return (double)byte - ZERO;
}

static void check(int rows, int panels, int K) {
    test_case("%d bits, rows=%d panels=%d K=%d", CPU_QUANT, rows, panels, K);
    int groups = (int)quant_groups(K);
    size_t size = (size_t)quant_panel_bytes(K);
    uint8_t *b = test_alloc(&test.host, size * (size_t)panels);
    for (size_t i = 0; i < size * (size_t)panels; i++) b[i] = (uint8_t)random_below(256);
    bf16 *x = test_alloc(&test.host, sizeof *x * (size_t)(rows * K));
    for (int i = 0; i < rows * K; i++) x[i] = bf16_round((float)random_normal());
    rounded_rows *a = test_alloc(&test.host, sizeof *a);
    memset(a, TEST_GARBAGE, sizeof *a);
    for (int r = 0; r < rows; r++) round_row(a, r, x + r * K, K);

    panel_part parts[2];
    for (int p = 0; p < panels; p++) {
        bf16 *scales = (bf16 *)(b + (size_t)p * size + quant_scales_at(K));
        for (int i = 0; i < groups * PANEL; i++) scales[i] = bf16_round((float)random_normal());
        const uint8_t *chunks = b + (size_t)p * size;
        parts[p] =
            (panel_part){.chunks = chunks, .next = rows % 2 ? chunks : NULL, .scales = scales};
    }
    float *c = host_floats((int64_t)rows * COLS);
    double *want = host_zeros((int64_t)rows * COLS), *got = host_zeros((int64_t)rows * COLS);
    for (int i = 0; i < rows * COLS; i++) want[i] = c[i] = (float)random_normal();
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < panels * PANEL; n++)
            for (int g = 0; g < groups; g++) {
                const panel_part *p = &parts[n / PANEL];
                double sum = 0;
                for (int k = 0; k < QUANT_GROUP; k++)
                    sum += a->q[r][g * QUANT_GROUP + k] * weight_at(p->chunks, g, k, n % PANEL);
                want[r * COLS + n] +=
                    sum * a->scale[r][g] * bf16_float(p->scales[g * PANEL + n % PANEL]);
            }
    kernel_begin();
    if (panels == BAND_PANELS)
        quant_bands(c, a, rows, parts, groups, BAND_PANELS);
    else
        for (int p = 0; p < panels; p++) quant_bands(c + p * PANEL, a, rows, parts + p, groups, 1);
    kernel_end();
    for (int i = 0; i < rows * COLS; i++) got[i] = c[i];
    EXPECT_CLOSE("c", got, want, rows, COLS, 1e-6);
}

/* Rounding: to the nearest of 127 steps of the largest of each group. */
static void test_rounding(void) {
    enum { K = 3 * QUANT_GROUP + 5 };
    test_case("rounding");
    bf16 x[K];
    for (int k = 0; k < K; k++) x[k] = bf16_round((float)(100 * random_normal()));
    for (int k = QUANT_GROUP; k < 2 * QUANT_GROUP; k++) x[k] = 0;
    rounded_rows *a = test_alloc(&test.host, sizeof *a);
    memset(a, TEST_GARBAGE, sizeof *a);
    round_row(a, 1, x, K);
    for (int g = 0; g < quant_groups(K); g++) {
        int n = cpu_min(QUANT_GROUP, K - g * QUANT_GROUP), sum = 0;
        double largest = 0, scale = a->scale[1][g];
        for (int k = 0; k < n; k++)
            largest = fmax(largest, fabs(bf16_float(x[g * QUANT_GROUP + k])));
        EXPECT_NEAR("scale", scale, largest / 127, 1e-6 * largest);
        for (int k = 0; k < QUANT_GROUP; k++) {
            int q = a->q[1][g * QUANT_GROUP + k];
            double value = k < n ? bf16_float(x[g * QUANT_GROUP + k]) : 0;
            EXPECT(fabs(q * scale - value) <= 0.501 * scale);
            sum += q;
        }
        EXPECT(a->offset[1][g] == -ZERO * sum);
    }
}

/* A group with a number that is not finite makes all that its row gives NaN; one whose scale would
 * be subnormal is zero. Neither is converted to integers, which is undefined. */
static void test_scales_without_an_inverse(void) {
    enum { K = 2 * QUANT_GROUP };
    static const float special[] = {NAN, -NAN, INFINITY, -INFINITY, 1e-40f, -1e-38f, 0.0f};
    for (int i = 0; i < TEST_COUNT(special); i++)
        for (int at = 0; at < QUANT_GROUP; at += 5) {
            test_case("%d bits, %g at %d", CPU_QUANT, (double)special[i], at);
            bf16 x[K];
            int is_finite = special[i] - special[i] == 0;
            for (int k = 0; k < K; k++)
                x[k] = bf16_round(is_finite && k < QUANT_GROUP ? 0 : (float)random_normal());
            x[at] = bf16_round(special[i]);
            rounded_rows *a = test_alloc(&test.host, sizeof *a);
            memset(a, TEST_GARBAGE, sizeof *a);
            round_row(a, 0, x, K);
            for (int k = 0; k < QUANT_GROUP; k++) EXPECT(a->q[0][k] == 0);
            EXPECT(a->offset[0][0] == 0);
            EXPECT(is_finite ? fabsf(a->scale[0][0]) < FLT_MIN : isnan(a->scale[0][0]));
            EXPECT(a->scale[0][1] > 0 && a->q[0][QUANT_GROUP] != TEST_GARBAGE);

            uint8_t *b = test_alloc(&test.host, (size_t)quant_panel_bytes(K));
            memset(b, 0x99, (size_t)quant_panel_bytes(K));
            bf16 *scales = (bf16 *)(b + quant_scales_at(K));
            for (int j = 0; j < 2 * PANEL; j++) scales[j] = bf16_round(0.5f);
            panel_part part = {.chunks = b, .scales = scales};
            float c[COLS] = {0};
            kernel_begin();
            quant_bands(c, a, 1, &part, 2, 1);
            kernel_end();
            for (int j = 0; j < PANEL; j++) EXPECT(!is_finite == isnan(c[j]));
        }
}

static void test_products(void) {
    static const int rows[] = {1, 3, 4, 15, 16, 17, 31, 32, 48};
    static const int terms[] = {1, 4, 31, 32, 33, 64, 100, 4096};
    for (int i = 0; i < TEST_COUNT(rows) * TEST_COUNT(terms); i++)
        for (int panels = 1; panels <= 2; panels++)
            check(rows[i % TEST_COUNT(rows)], panels, terms[i / TEST_COUNT(rows)]);
}

TEST_API_MAIN({"rounding", test_rounding},
              {"scales without an inverse", test_scales_without_an_inverse},
              {"products", test_products})
