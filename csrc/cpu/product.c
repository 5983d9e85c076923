/* product.c: products in fp32, see product.h. */
#include "product.h"

#include "blas.h"
#include "kernel_fp32.h"
#include "simd.h"

/* Large enough that packing, which BLAS does anew for each tile, is a small share of the work;
 * small enough that a tile of out stays in the second-level cache for its epilogue. */
enum { TILE = 256, MIN_TILE = 64 };

/* Up to this many rows, packing b costs more than it saves: read b once, row by row. */
enum { FEW_ROWS = 6 };

typedef struct product_tiles {
    const product *p;
    int rows, cols; /* of one tile */
    int n_cols;     /* tiles side by side */
} product_tiles;

/* Where our own kernel beats BLAS. With narrower vectors it does not: measured. */
static int is_small(const product *p) {
    if (LANES < 16) return 0;
    if (p->kind == PRODUCT_NT && p->K > KERNEL_MOST_K) return 0;
    return (int64_t)p->N * p->K <= KERNEL_MOST_B;
}

static const float *operand_b(const product *p) {
    return p->kind == PRODUCT_TN ? p->b : p->w;
}

/* A tile by our own kernel: see kernel_fp32.h. */
static void small_tile(const product *p, int row, int rows, int col, int cols) {
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
    kernel_product_nt(o, rows, cols);
    if (!p->twin) return;
    o.b += (int64_t)p->twin * p->ldb;
    o.c += p->twin;
    kernel_product_nt(o, rows, cols);
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
    if (is_small(p))
        small_tile(p, row, rows, col, cols);
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

/* out (M, columns) = a b^T for a fixed number of rows, so that the sums stay in registers. */
__attribute__((always_inline)) static inline void few_rows(const product *p, int M, int begin,
                                                           int end) {
    for (int col = begin; col < end; col++) {
        const float *b = operand_b(p) + (int64_t)col * p->ldb;
        vf sum[FEW_ROWS] = {{0}};
        FOR_LANES (k, n, p->K) {
            vf x = vf_get(b + k, n);
            for (int m = 0; m < M; m++) sum[m] += x * vf_get(p->a + (int64_t)m * p->lda + k, n);
        }
        for (int m = 0; m < M; m++) p->out[(int64_t)m * p->ldo + col] = vf_sum(sum[m]);
    }
}

static void product_few_rows(const product *p, int begin, int end) {
    switch (p->M) {
    case 1:
        few_rows(p, 1, begin, end);
        break;
    case 2:
        few_rows(p, 2, begin, end);
        break;
    case 3:
        few_rows(p, 3, begin, end);
        break;
    case 4:
        few_rows(p, 4, begin, end);
        break;
    case 5:
        few_rows(p, 5, begin, end);
        break;
    default:
        few_rows(p, FEW_ROWS, begin, end);
        break;
    }
}

static void product_run_few_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const product *p = args;
    product_few_rows(p, (int)begin, (int)end);
    if (p->twin) product_few_rows(p, (int)begin + p->twin, (int)end + p->twin);
    if (p->epilogue) run_epilogue(p, 0, p->M, (int)begin, (int)(end - begin));
}

/* Tiles of about the same size, and enough of them for the threads to end together. */
static product_tiles split(const product *p, int n_threads) {
    int n_rows = (int)cpu_div_up(p->M, TILE), n_cols = (int)cpu_div_up(p->N, TILE);
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
    if (p->kind == PRODUCT_NT && p->M <= FEW_ROWS) {
        cpu_parallel(ctx, product_run_few_rows, p, p->N, cpu_grain(ctx, p->N, 32));
        return;
    }
    product_tiles tiles = split(p, ctx->n_threads);
    int64_t n = cpu_div_up(p->M, tiles.rows) * tiles.n_cols;
    cpu_parallel(ctx, product_run_tiles, &tiles, n, 1);
}
