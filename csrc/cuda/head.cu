/* head.cu: the output head, which gives logits in float32. */
#include "weights.h"

/* A slab of quantized weights as bf16 again. */
CUDA_WORKSPACE(head_workspace) {
    return align_up(sizeof(elem) * slab_numbers(shape->Vp, shape->C));
}

enum { CAP_THREADS = 256 };

static __global__ void cap_logits_kernel(float *logits, float cap, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * CAP_THREADS + threadIdx.x;
    if (i < n) logits[i] = cap * tanhf(logits[i] / cap);
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
    int64_t n = (int64_t)op->N * op->Vp;
    if (op->cap > 0)
        launch(ctx, cap_logits_kernel, dim3((unsigned)div_up(n, CAP_THREADS)), CAP_THREADS, 0,
               op->logits, op->cap, n);
}
