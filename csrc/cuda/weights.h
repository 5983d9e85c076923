/* weights.h: products with weights in the form of this table: float32 parameters, bf16, or quantized. */
#ifndef CUDA_WEIGHTS_H
#define CUDA_WEIGHTS_H

#include "product.h"
#ifdef CUDA_QUANT
#include "quant.h"
#endif

/* A product of kind NT of a few rows with p->b in this table's form, whose time is that of reading b; 0
 * where library_product is to do it: product_few.cu, product_quant.cu. */
#define cuda_few_product CUDA_NAME(few_product)
int cuda_few_product(gpt_ctx *ctx, const product *p);

/* Numbers of room that products with a weight need, to make it bf16 again. */
static inline size_t weight_numbers(int rows, int cols) {
#ifdef CUDA_QUANT
    return (size_t)rows * (size_t)cols;
#else
    (void)rows, (void)cols;
    return 0;
#endif
}

/* cuda_product of kind NT with p->b in this table's form. */
static inline int library_product(gpt_ctx *ctx, const product *p, elem *room) {
    product whole = *p;
#ifdef CUDA_QUANT
    cuda_unpack(ctx, room, p->b, p->N, p->K);
    whole.b = room;
#else
    (void)room;
#endif
    return cuda_product(ctx, &whole);
}

/* One without a bias, of any number of rows. */
static inline int weight_product(gpt_ctx *ctx, const product *p, elem *room) {
    return cuda_few_product(ctx, p) || library_product(ctx, p, room);
}

#endif
