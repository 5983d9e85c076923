/* head.cu: the output head, which gives logits in float32. */
#include "weights.h"

/* A slab of quantized weights as bf16 again. */
CUDA_WORKSPACE(head_workspace) {
    return align_up(sizeof(elem) * slab_numbers(shape->Vp, shape->C));
}

/* Whole rows of Vp: the library's fast products want rows that are aligned. */
CUDA_OP(head_forward) {
    product p = {.kind = PRODUCT_NT,
                 .bf16 = IS_BF16,
                 .float_out = 1,
                 .M = op->N,
                 .N = op->Vp,
                 .K = op->C,
                 .lda = op->C,
                 .ldb = op->C,
                 .ldo = op->Vp,
                 .out = op->logits,
                 .a = op->x,
                 .b = op->wte};
    slab_product(ctx, &p, (elem *)ctx->workspace, 0);
}
