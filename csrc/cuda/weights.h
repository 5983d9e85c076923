/* weights.h: products with weights in the form of this table: float32 parameters, bf16, or quantized. */
#ifndef CUDA_WEIGHTS_H
#define CUDA_WEIGHTS_H

#include "product.h"
#ifdef CUDA_QUANT
#include "quant.h"
#endif

/* A product of kind NT of a few rows with p->b in this table's form, whose time is that of reading b; 0
 * where there are more: product_few.cu, product_quant.cu. */
#define cuda_few_product CUDA_NAME(few_product)
int cuda_few_product(gpt_ctx *ctx, const product *p);

#ifdef CUDA_BF16
/* One of up to 64 rows with p->b in bf16, if rows are aligned; else 0: product_rows_bf16.cu. `early`: b is older
 * than the kernel in front. */
int cuda_rows_product(gpt_ctx *ctx, const product *p, bool early);
#endif

/* Numbers of room that products with a weight need, to make it bf16 again. */
static inline size_t weight_numbers(int rows, int cols) {
#ifdef CUDA_QUANT
    return (size_t)rows * (size_t)cols;
#else
    (void)rows, (void)cols;
    return 0;
#endif
}

/* One without a bias, of any number of rows. */
static inline int weight_product(gpt_ctx *ctx, const product *p, elem *room) {
    if (cuda_few_product(ctx, p)) return 1;
    product whole = *p;
#ifdef CUDA_QUANT
    cuda_unpack(ctx, room, p->b, p->N, p->K);
    whole.b = room;
#else
    (void)room;
#endif
#ifdef CUDA_BF16
    if (cuda_rows_product(ctx, &whole, whole.b == p->b)) return 1;
#endif
    return cuda_product(ctx, &whole);
}

#endif
