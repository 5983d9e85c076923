/* product_fp32.c: products in fp32, see product.h. */
#include "product.h"

#include "blas.h"
#include "kernel_fp32.h"
#include "simd.h"

/* Large enough that packing, which BLAS repeats for each tile, is a small share of the work;
 * small enough that a tile of out stays in the second-level cache for its epilogue. */
enum { TILE = 256, MIN_TILE = 64 };

/* Up to this many rows b comes from memory, and is read in place, in narrow tiles. That also
 * makes a step of decoding independent of what else is decoded. */
enum { FEW_ROWS = 64, FEW_COLS = 32 };

typedef struct product_tiles {
    const product *p;
    int rows, cols; /* of one tile */
    int n_cols;     /* tiles side by side */
} product_tiles;

/* Our own kernels are faster than BLAS here. With narrower vectors they are for few rows only: measured. */
static int is_small(const product *p) {
    if (LANES < 16) return 0;
    if (p->kind == PRODUCT_NT && (p->K > KERNEL_MOST_K || p->M <= FEW_ROWS)) return 0;
    return (int64_t)p->N * p->K <= KERNEL_MOST_B;
}
static int is_dot(const product *p) {
    return p->kind == PRODUCT_NT && (LANES == 16 || p->M <= FEW_ROWS);
}

static const float *operand_b(const product *p) {
    return p->kind == PRODUCT_TN ? p->b : p->w;
}

/* A tile by our own kernels: see kernel_fp32.h. */
static void own_tile(const product *p, int row, int rows, int col, int cols) {
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
    for (int twin = 0; twin <= (p->twin > 0); twin++) {
        if (is_small(p))
            kernel_product_nt(o, rows, cols);
        else
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

static void product_tile(const product *p, int row, int rows, int col, int cols) {
    if (is_small(p) || is_dot(p))
        own_tile(p, row, rows, col, cols);
    else
        blas_tile(p, row, rows, col, cols);
    if (p->epilogue) run_epilogue(p, row, rows, col, cols);
}

static void product_run_tiles(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const product_tiles *t = args;
    for (int64_t i = begin; i < end; i++) {
        int row = (int)(i / t->n_cols) * t->rows, col = (int)(i % t->n_cols) * t->cols;
        product_tile(t->p, row, cpu_min(t->rows, t->p->M - row), col,
                     cpu_min(t->cols, t->p->N - col));
    }
}

/* Tiles of about the same size, and enough of them for the threads to end together. */
static product_tiles split(const product *p, int n_threads) {
    int most_cols = is_dot(p) && p->M <= FEW_ROWS ? FEW_COLS : TILE;
    int n_rows = (int)cpu_div_up(p->M, TILE), n_cols = (int)cpu_div_up(p->N, most_cols);
    while (n_rows * n_cols < 4 * n_threads) {
        int tall = p->M / n_rows, wide = p->N / n_cols;
        if (tall >= wide && tall >= 2 * MIN_TILE)
            n_rows *= 2;
        else if (wide >= 2 * MIN_TILE)
            n_cols *= 2;
        else
            break;
    }
    product_tiles tiles = {.p = p};
    tiles.rows = (int)cpu_round_up(cpu_div_up(p->M, n_rows), 8);
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
    if (p->sums) cpu_parallel(ctx, product_sum_columns, p, p->M, 64);
    if (!p->out) return;
    product_tiles tiles = split(p, ctx->n_threads);
    int64_t n = cpu_div_up(p->M, tiles.rows) * tiles.n_cols;
    cpu_parallel(ctx, product_run_tiles, &tiles, n, 1);
}
