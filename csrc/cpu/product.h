/* product.h: the matrix product that linear.c and the head are made of: tiles shared out over the
 * threads, each piece followed by an epilogue while it is in cache.
 *
 * product_fp32.c: operands as they are in memory; dot_fp32.h, kernel_fp32.h, panels_fp32.h or BLAS for a tile.
 * product_bf16.c reads b packed (pack.h), by the kernels of kernel_bf16.h and kernel_amx.h. */
#ifndef CPU_PRODUCT_H
#define CPU_PRODUCT_H

#include "cpu.h"
#include "simd.h"

typedef enum product_kind {
    PRODUCT_NT, /* y (M, N) = a (M, K) w (N, K)^T:    forward */
    PRODUCT_NN, /* y (M, N) = a (M, K) w (K, N):      gradient of the input */
    PRODUCT_TN, /* out (M, N) = a (K, M)^T b (K, N):  gradient of the weight, a sum over rows */
} product_kind;

/* Columns of most calls of an epilogue in bf16, and no call has more. */
enum { EPILOGUE = 32 };

/* Called for rows row to row + rows - 1, and likewise columns, of the product: y holds them,
 * ldy numbers from row to row. y_twin holds the columns `twin` further on. */
typedef void product_epilogue_fn(void *args, const float *y, const float *y_twin, int ldy, int row,
                                 int rows, int col, int cols);

#ifdef CPU_BF16
/* y += a b, of few terms: a part of them for each run of columns. */
typedef struct product_more {
    const bf16 *a; /* (M, n_parts K), rows lda apart */
    const bf16
        *b;     /* (n_parts K, columns) in panels, a twin's begin in their own; zeros in columns of
                    * other parts */
    int lda, K; /* K: of a part, whole pairs */
    int n_parts;
    lora_part parts[GPT_MAX_STACKED]; /* columns, those of a twin behind the others */
    int first;                        /* of b, where the product begins */
    int twin;                         /* columns before those of a twin; 0: none */
} product_more;
#else
typedef struct product_more product_more;
#endif

typedef struct product {
    product_kind kind;
    float *out;  /* where y goes. bf16: NULL where only the epilogue reads y. fp32: the epilogue may
                 * overwrite it in place. TN: NULL where only the sums are wanted */
    float *sums; /* TN only, or NULL: (M) += the sums of a over its K rows */
    const elem *a, *b;
    const weight *w;    /* NT and NN, in the products' form */
    const bf16 *panels; /* TN in bf16: b, where cpu_pack_operand packed it; NULL: to be packed.
                         * NN: w in the form of backward alone; NULL: behind that of forward */
    /* TN in bf16: with an activation, b (K, N) is activation(pre) and made as it is packed; pre is
     * (K, N), or (K, 2 N) for SwiGLU. */
    int activation;
    const elem *pre;
    int lda, ldb, ldo;
    int M, N, K;
    int first, rows; /* NN in bf16: w has `rows` rows, of which K from `first` on count. 0: all K */
    int add;         /* out += y: TN, and NN in bf16 */
    int turned;      /* TN in bf16, without sums: out is (N, M), y^T */
    int exact;       /* NT: a is not rounded to fewer bits */
    int twin; /* NT only, 0: none. Columns twin + j come with columns j: the halves of SwiGLU */
    product_epilogue_fn *epilogue; /* or NULL; NT and NN */
    void *epilogue_args;
    const product_more *more; /* or NULL; NT with exact, and NN, in bf16 */
} product;

#define cpu_product              CPU_NAME(product)
#define cpu_product_room         CPU_NAME(product_room)
#define cpu_product_workspace    CPU_NAME(product_workspace)
#define cpu_pack_operand         CPU_NAME(pack_operand)
#define cpu_packed_operand_bytes CPU_NAME(packed_operand_bytes)

void cpu_product(gpt_ctx *ctx, product *p);

/* Bytes at the beginning of the workspace that products of up to K terms use when a model is trained, and
 * that an op with its own numbers there leaves to them. */
size_t cpu_product_room(int K);
/* Bytes of workspace for a product of kind TN of this size. */
size_t cpu_product_workspace(int N, int K);

#ifdef CPU_BF16
/* b (K, N) in panels for products of kind TN, and the bytes that takes. */
void cpu_pack_operand(gpt_ctx *ctx, bf16 *out, const bf16 *b, int ldb, int N, int K);
size_t cpu_packed_operand_bytes(int N, int K);
#endif

#endif
