/* product_fp32.c: products in fp32, see product.h. */
#include "product.h"

#include "blas.h"
#include "dot_fp32.h"
#include "panels_fp32.h"

/* Large enough that packing, which BLAS repeats for each tile, is a small share of the work;
 * small enough that a tile of out stays in the second-level cache for its epilogue. */
enum { TILE = 256, MIN_TILE = 64 };

/* Up to this many rows b comes from memory, and is read in place, in narrow tiles. That also
 * makes a step of decoding independent of what else is decoded. */
enum { FEW_ROWS = 64, FEW_COLS = DOT_WIDE ? 192 : 32, MIN_FEW_COLS = 32 };

/* With more registers, b is read in place for any number of rows, unless terms are so few that adding the lanes of sums
 * takes a tenth of the time. A tile's rows stay in the second-level cache while all columns pass them. */
enum { DOT_LEAST_K = 384, DOT_NUMBERS = 96 << 10, DOT_MOST_ROWS = 128 };

/* The most rows and columns of a tile from panels. All its rows share one copy of the columns. Where rows are copied
 * too, columns are to share them; else narrow tiles cost little, and are enough of them for the threads. */
enum { PANEL_TILE_ROWS = 86 * BAND, PANEL_TILE_COLS = BLOCK_COLS / 2, MIN_PANEL_COLS = 3 * PANEL };

typedef struct product_tiles {
    const gpt_ctx *ctx;
    const product *p;
    int rows, cols; /* of one tile */
    int n_cols;     /* tiles side by side */
} product_tiles;

/* The kernel of kernel_fp32.h is fastest here. With narrower vectors it is for few rows only: measured. */
static int is_small(const product *p) {
    if (LANES == 8) return p->kind == PRODUCT_NN && p->M <= 24 && p->K <= 1024;
    return LANES == 16 && p->kind != PRODUCT_NT && (int64_t)p->N * p->K <= KERNEL_MOST_B;
}
static int is_dot(const product *p) {
    return p->kind == PRODUCT_NT && (p->M <= FEW_ROWS || (DOT_WIDE && p->K >= DOT_LEAST_K));
}

/* Products of more than those kernels are made for: from panels, or by BLAS. */
static int has_panels(const product *p) {
#ifdef CPU_OWN_PRODUCTS
    _Static_assert((BLOCK_A + BLOCK_B) * sizeof(float) <= CPU_SCRATCH, "scratch");
    return !is_small(p) && !is_dot(p);
#else
    (void)p;
    return 0;
#endif
}

static const float *operand_b(const product *p) {
    return p->kind == PRODUCT_TN ? p->b : p->w;
}

/* A tile by a kernel that copies nothing of b. */
static void own_tile(const product *p, float *scratch, int row, int rows, int col, int cols) {
    kernel_operands o = {
        .c = p->out + (int64_t)row * p->ldo + col, .ldb = p->ldb, .ldc = p->ldo, .K = p->K};
    int by_column = p->kind == PRODUCT_TN;
    o.a = by_column ? p->a + row : p->a + (int64_t)row * p->lda;
    o.a_row = by_column ? 1 : p->lda;
    o.a_k = by_column ? p->lda : 1;
    if (p->kind != PRODUCT_NT) {
        o.b = operand_b(p) + col;
        kernel_product(o, rows, cols, p->add);
        return;
    }
    o.b = operand_b(p) + (int64_t)col * p->ldb;
    if (rows > DOT_ROWS && is_crowded(p->lda) &&
        sizeof(float) * (size_t)rows * (size_t)(p->K + APART) <= CPU_SCRATCH) {
        o.a = rows_closer(scratch, o.a, p->lda, rows, p->K);
        o.a_row = p->K + APART;
    }
    for (int twin = 0; twin <= (p->twin > 0); twin++) {
        kernel_dot(o, rows, cols);
        o.b += (int64_t)p->twin * p->ldb;
        o.c += p->twin;
    }
}

static void blas_tile(const product *p, int row, int rows, int col, int cols) {
    float *out = p->out + (int64_t)row * p->ldo + col;
    switch (p->kind) {
    case PRODUCT_NT: {
        const float *a = p->a + (int64_t)row * p->lda;
        const float *b = operand_b(p) + (int64_t)col * p->ldb;
        gemm_nt(rows, cols, p->K, 1, a, p->lda, b, p->ldb, 0, out, p->ldo);
        if (p->twin)
            gemm_nt(rows, cols, p->K, 1, a, p->lda, b + (int64_t)p->twin * p->ldb, p->ldb, 0,
                    out + p->twin, p->ldo);
        break;
    }
    case PRODUCT_NN:
        gemm_nn(rows, cols, p->K, 1, p->a + (int64_t)row * p->lda, p->lda, operand_b(p) + col,
                p->ldb, 0, out, p->ldo);
        break;
    case PRODUCT_TN:
        gemm_tn(rows, cols, p->K, 1, p->a + row, p->lda, operand_b(p) + col, p->ldb, p->add ? 1 : 0,
                out, p->ldo);
        break;
    }
}

static void run_epilogue(const product *p, int row, int rows, int col, int cols) {
    const float *y = p->out + (int64_t)row * p->ldo + col;
    p->epilogue(p->epilogue_args, y, y + p->twin, p->ldo, row, rows, col, cols);
}

/* A block of terms of some columns. */
static void pack_panels(const product *p, float *out, int col, int cols, int k, int n_terms) {
    int64_t ldb = p->ldb;
    if (p->kind != PRODUCT_NT)
        panels_of_columns(out, operand_b(p) + k * ldb + col, ldb, cols, n_terms);
    else
        panels_of_rows(out, operand_b(p) + col * ldb + k, ldb, cols, n_terms);
}

/* Rows of a block: where they are, or as bands. */
static panel_operands pack_rows(const product *p, float *bands, int row, int rows, int k,
                                int n_terms, int sums) {
    panel_operands o = {.K = n_terms, .ldc = p->ldo};
    if (p->kind != PRODUCT_TN) {
        o.a = p->a + (int64_t)row * p->lda + k;
        o.a_row = p->lda;
        if (is_crowded(p->lda)) {
            o.a = rows_closer(bands, o.a, p->lda, rows, n_terms);
            o.a_row = n_terms + APART;
        }
        o.a_band = BAND * o.a_row;
        return o;
    }
    bands_of_columns(bands, p->a + (int64_t)k * p->lda + row, p->lda, rows, n_terms,
                     sums ? p->sums + row : NULL);
    o.a = bands;
    o.is_banded = 1;
    o.a_row = 1;
    o.a_band = (int64_t)n_terms * BAND;
    return o;
}

/* The terms in blocks of about the same number, each added to the sums of those before. */
static void panel_tile(const product *p, float *scratch, int row, int rows, int col, int cols) {
    float *panels = scratch, *bands = scratch + BLOCK_B;
    int block = (int)cpu_round_up(cpu_div_up(p->K, cpu_div_up(p->K, BLOCK_K)), LANES);
    int64_t twin = cpu_round_up(cols, PANEL) * block;
    for (int k = 0; k < p->K; k += block) {
        int n = cpu_min(block, p->K - k), is_last = k + n == p->K;
        pack_panels(p, panels, col, cols, k, n);
        if (p->twin) pack_panels(p, panels + twin, p->twin + col, cols, k, n);
        for (int r = 0; r < rows; r += BLOCK_ROWS) {
            int m = cpu_min(BLOCK_ROWS, rows - r);
            panel_operands o = pack_rows(p, bands, row + r, m, k, n, p->sums && col == 0);
            o.b = panels;
            o.add = k > 0 || p->add;
            o.c = p->out + (int64_t)(row + r) * p->ldo + col;
            panel_product(o, m, cols);
            if (p->twin) {
                o.b += twin;
                o.c += p->twin;
                panel_product(o, m, cols);
            }
            if (is_last && p->epilogue) run_epilogue(p, row + r, m, col, cols);
        }
    }
}

static void product_tile(const product *p, float *scratch, int row, int rows, int col, int cols) {
    if (has_panels(p)) {
        panel_tile(p, scratch, row, rows, col, cols);
        return;
    }
    if (is_small(p) || is_dot(p))
        own_tile(p, scratch, row, rows, col, cols);
    else
        blas_tile(p, row, rows, col, cols);
    if (p->epilogue) run_epilogue(p, row, rows, col, cols);
}

static void product_run_tiles(void *args, int thread, int64_t begin, int64_t end) {
    const product_tiles *t = args;
    for (int64_t i = begin; i < end; i++) {
        int row = (int)(i / t->n_cols) * t->rows, col = (int)(i % t->n_cols) * t->cols;
        product_tile(t->p, cpu_scratch(t->ctx, thread), row, cpu_min(t->rows, t->p->M - row), col,
                     cpu_min(t->cols, t->p->N - col));
    }
}

/* Tiles of about the same size, and enough of them for the threads to end together. */
static product_tiles split(const product *p, int n_threads) {
    int most_rows = has_panels(p) ? PANEL_TILE_ROWS : TILE, most_cols = TILE, least = MIN_TILE;
    if (is_dot(p)) most_cols = FEW_COLS, least = MIN_FEW_COLS;
    if (DOT_WIDE && is_dot(p))
        most_rows = cpu_max(cpu_min(DOT_NUMBERS / p->K, DOT_MOST_ROWS), 2 * WIDE_ROWS);
    if (has_panels(p)) most_cols = p->kind == PRODUCT_TN ? BLOCK_COLS : PANEL_TILE_COLS;
    int n_rows = (int)cpu_div_up(p->M, most_rows), n_cols = (int)cpu_div_up(p->N, most_cols);
    while (n_rows * n_cols < 4 * n_threads) {
        int tall = p->M / n_rows, wide = p->N / n_cols;
        int by_cols = has_panels(p) && p->kind != PRODUCT_TN && wide >= 2 * MIN_PANEL_COLS;
        if (!by_cols && tall >= wide && tall >= 2 * MIN_TILE)
            n_rows *= 2;
        else if (by_cols || wide >= 2 * least)
            n_cols *= 2;
        else
            break;
    }
    product_tiles tiles = {.p = p};
    tiles.rows = (int)cpu_round_up(cpu_div_up(p->M, n_rows), has_panels(p) ? BAND : 8);
    tiles.cols = (int)cpu_round_up(cpu_div_up(p->N, n_cols), 16);
    tiles.n_cols = (int)cpu_div_up(p->N, tiles.cols);
    return tiles;
}

/* sums += column sums of a, for the columns of one piece. */
static void product_sum_columns(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const product *p = args;
    int cols = (int)(end - begin);
    float *sums = p->sums + begin;
    for (int k = 0; k < p->K; k++) {
        const float *a = p->a + (int64_t)k * p->lda + begin;
        FOR_LANES (c, n, cols) vf_put(sums + c, vf_get(sums + c, n) + vf_get(a + c, n), n);
    }
}

size_t cpu_product_workspace(int N, int K) {
    (void)N, (void)K;
    return 0;
}

void cpu_product(gpt_ctx *ctx, product *p) {
    if (p->sums && !(p->out && has_panels(p))) cpu_parallel(ctx, product_sum_columns, p, p->M, 64);
    if (!p->out) return;
    product_tiles tiles = split(p, ctx->n_threads);
    tiles.ctx = ctx;
    int64_t n = cpu_div_up(p->M, tiles.rows) * tiles.n_cols;
    cpu_parallel(ctx, product_run_tiles, &tiles, n, 1);
}
