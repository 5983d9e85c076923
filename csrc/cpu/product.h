/* product.h: the matrix product that linear.c and loss.c are made of: tiles shared out over the
 * threads, each by single-threaded BLAS, each followed by an epilogue while it is in cache. */
#ifndef CPU_PRODUCT_H
#define CPU_PRODUCT_H

#include "cpu.h"

typedef enum product_kind {
    PRODUCT_NT, /* out (M, N) = a (M, K) b (N, K)^T:   forward */
    PRODUCT_NN, /* out (M, N) = a (M, K) b (K, N):     gradient of the input */
    PRODUCT_TN, /* out (M, N) += a (K, M)^T b (K, N):  gradient of the weight, a sum over rows */
} product_kind;

/* What happens to a tile of out: rows row to row + rows - 1, likewise columns. */
typedef void product_epilogue_fn(void *args, int row, int rows, int col, int cols);

typedef struct product {
    product_kind kind;
    float *out;
    const float *a, *b;
    int lda, ldb, ldo;
    int M, N, K;
    int twin; /* NT only, 0: none. Columns twin + j come with columns j: the halves of SwiGLU */
    product_epilogue_fn *epilogue; /* or NULL */
    void *epilogue_args;
} product;

void cpu_product(gpt_ctx *ctx, product *p);

#endif
