/* The bf16 products of one thread, against float64: the kernel on vectors, and the one on AMX
 * tiles with plain C in the place of the tile instructions (tiles.h), so that it is tested on any
 * CPU. The packing that feeds them is tested element by element. */
#define GPTC_EMULATE_AMX
#include "cpu/kernel_amx.h"
#include "testing.h"

static bf16 *random_bf16(int64_t n) {
    bf16 *x = test_alloc(&test.host, (size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = bf16_round((float)random_normal());
    return x;
}

static bf16 *garbage_bf16(int64_t n) {
    bf16 *x = test_alloc(&test.host, (size_t)n * sizeof *x);
    memset(x, TEST_GARBAGE, (size_t)n * sizeof *x);
    return x;
}

/* b (K, N) by the definition in pack.h. */
static void check_panels(const bf16 *panels, int64_t panel, const bf16 *b, int64_t k_stride,
                         int64_t n_stride, int N, int K) {
    int columns = (int)cpu_round_up(N, PANEL), terms = (int)cpu_round_up(K, PAIR);
    for (int n = 0; n < columns; n++) {
        for (int k = 0; k < terms; k++) {
            bf16 want = n < N && k < K ? b[k * k_stride + n * n_stride] : 0;
            int64_t at = n / PANEL * panel + (k / PAIR * PANEL + n % PANEL) * PAIR + k % PAIR;
            if (panels[at] == want) continue;
            EXPECT(panels[at] == want);
            return;
        }
    }
    EXPECT(1);
}

static wide_operands wide;

static const int widths[] = {1, 2, 15, 16, 17, 32, 33, 64, 65};

static void test_packing(void) {
    for (int i = 0; i < TEST_COUNT(widths) * TEST_COUNT(widths); i++) {
        int N = widths[i % TEST_COUNT(widths)], K = widths[i / TEST_COUNT(widths)], ld = 3;
        test_case("N=%d K=%d", N, K);
        int64_t panel = pack_panel_size(K) + 32;
        bf16 *x = random_bf16((int64_t)K * (N + ld));
        bf16 *panels = garbage_bf16(pack_panels(N) * panel);
        pack_columns(panels, panel, x, N + ld, N, K);
        check_panels(panels, panel, x, N + ld, 1, N, K);

        x = random_bf16((int64_t)N * (K + ld));
        panel = pack_panel_size(K);
        panels = garbage_bf16(pack_panels(N) * panel);
        for (int n = 0; n < N; n += PANEL)
            pack_transposed((pair *)(panels + n / PANEL * panel), x + n * (K + ld), K + ld,
                            cpu_min(PANEL, N - n), K);
        check_panels(panels, panel, x, 1, K + ld, N, K);

        x = random_bf16((int64_t)K * (N + ld));
        int64_t stride = cpu_round_up(K, PAIR);
        bf16 *turned = garbage_bf16(N * stride);
        transpose_columns(turned, stride, x, N + ld, N, K);
        int equal = 1;
        for (int n = 0; n < N; n++)
            for (int k = 0; k < stride; k++)
                equal &= turned[n * stride + k] == (k < K ? x[(int64_t)k * (N + ld) + n] : 0);
        EXPECT(equal);
    }
}

typedef void kernel_fn(kernel_operands o, int rows, int panels, int add);

static void check_kernel(const char *name, kernel_fn *kernel, int rows, int panels, int K, int add,
                         double tol) {
    int N = panels * PANEL, lda = K + 5, ldc = N + 16;
    test_case("%s rows=%d panels=%d K=%d add=%d", name, rows, panels, K, add);
    bf16 *a = random_bf16((int64_t)rows * lda), *b = random_bf16((int64_t)K * N);
    int64_t panel = pack_panel_size(K) + 32;
    bf16 *b_panels = garbage_bf16(panels * panel);
    pack_columns(b_panels, panel, b, N, N, K);
    float *c = host_floats((int64_t)rows * ldc);
    double *want = host_zeros((int64_t)rows * ldc);
    for (int i = 0; i < rows * ldc; i++) want[i] = c[i] = (float)random_normal();
    for (int r = 0; r < rows; r++) {
        for (int n = 0; n < N; n++) {
            double sum = add ? want[r * ldc + n] : 0;
            for (int k = 0; k < K; k++)
                sum += (double)bf16_float(a[r * lda + k]) * bf16_float(b[k * N + n]);
            want[r * ldc + n] = sum;
        }
    }
    kernel_operands o = {.a = a,
                         .b = b_panels,
                         .c = c,
                         .lda = lda,
                         .panel = panel,
                         .ldc = ldc,
                         .K = K,
                         .wide = &wide};
    if (add) o.next = b_panels; /* asking for it changes nothing */
    memset(&wide, TEST_GARBAGE, sizeof wide);
    kernel(o, rows, panels, add);
    double *got = host_zeros((int64_t)rows * ldc);
    for (int i = 0; i < rows * ldc; i++) got[i] = c[i];
    EXPECT_CLOSE("c", got, want, rows, ldc, tol);
}

static void on_tiles(kernel_operands o, int rows, int panels, int add) {
    tiles_begin();
    kernel_tiles(o, rows, panels, add);
    tiles_end();
}

static void on_vectors(kernel_operands o, int rows, int panels, int add) {
    kernel_vectors(o, rows, panels, add);
}

static void test_products(void) {
    static const int rows[] = {1, 3, 12, 16, 17, 31, 32, 47, 48, 96};
    static const int terms[] = {1, 2, 5, 31, 32, 33, 64, 96, 127};
    /* The step is a prime that gives each of both lists. */
    for (int i = 0; i < TEST_COUNT(rows) * TEST_COUNT(terms); i += test_step(7)) {
        int M = rows[i % TEST_COUNT(rows)], K = terms[i / TEST_COUNT(rows)];
        for (int panels = 1; panels <= GROUP; panels++) {
            for (int add = 0; add < 2; add++) {
                if (panels <= 2) check_kernel("tiles", on_tiles, M, panels, K, add, 1e-6);
                check_kernel("vectors", on_vectors, M, panels, K, add, 1e-6);
            }
        }
    }
}

/* More rows and terms than are widened at once. */
static void test_large_products(void) {
    for (int add = 0; add < 2; add++)
        check_kernel("vectors", on_vectors, 99, GROUP, 1541, add, 3e-6);
}

/* Decoding alone and in a batch must give the same text. */
static void test_rows_alone(void) {
    enum { M = 13, K = 301, N = PANEL * GROUP };
    for (int add = 0; add < 2; add++) {
        test_case("add=%d", add);
        int64_t panel = pack_panel_size(K);
        bf16 *a = random_bf16(M * K), *b = random_bf16(K * N),
             *panels = garbage_bf16(GROUP * panel);
        pack_columns(panels, panel, b, N, N, K);
        float *all = host_floats(M * N), *alone = host_floats(M * N);
        for (int i = 0; i < M * N; i++) all[i] = alone[i] = (float)random_normal();
        kernel_operands o = {.a = a,
                             .b = panels,
                             .c = all,
                             .lda = K,
                             .panel = panel,
                             .ldc = N,
                             .K = K,
                             .wide = &wide};
        kernel_vectors(o, M, GROUP, add);
        for (int r = 0; r < M; r++) {
            o.a = a + r * K;
            o.c = alone + r * N;
            kernel_vectors(o, 1, GROUP, add);
        }
        EXPECT(memcmp(all, alone, sizeof(float) * M * N) == 0);
    }
}

TEST_API_MAIN({"packing", test_packing}, {"products", test_products},
              {"large products", test_large_products}, {"rows alone", test_rows_alone})
