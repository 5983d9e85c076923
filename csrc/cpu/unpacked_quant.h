/* unpacked_quant.h: products in which weights are unpacked to bf16, see unpacked_quant.c. */
#ifndef CPU_UNPACKED_QUANT_H
#define CPU_UNPACKED_QUANT_H

#include "product.h"

/* The bf16 table's product, at this level. */
void CPU_ACTS_NAME(product)(gpt_ctx *ctx, product *p);

/* Of kind NT or NN, with quantized weights. */
#define quant_unpacked_product CPU_NAME(quant_unpacked_product)
void quant_unpacked_product(gpt_ctx *ctx, product *p);

#endif
