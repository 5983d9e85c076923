/* head.c: the output head, which gives logits in float32. */
#include "product.h"

CPU_OP(head_forward) {
    product p = {.kind = PRODUCT_NT,
                 .out = op->logits,
                 .a = op->x,
                 .w = op->wte,
                 .lda = op->C,
                 .ldb = op->C,
                 .ldo = op->V,
                 .M = op->N,
                 .N = op->V,
                 .K = op->C};
    cpu_product(ctx, &p);
}
