/* head.cu: the output head, which gives logits in float32. */
#include "weights.h"

/* A slab of quantized weights as bf16 again. */
CUDA_WORKSPACE(head_workspace) {
    return align_up(sizeof(elem) * slab_numbers(shape->Vp, shape->C));
}

enum { FINISH_THREADS = 256 };

static __global__ void finish_logits_kernel(float *logits, const float *b, float cap, int Vp,
                                            int64_t n) {
    int64_t i = (int64_t)blockIdx.x * FINISH_THREADS + threadIdx.x;
    if (i >= n) return;
    float z = logits[i];
    if (b) z += b[i % Vp];
    logits[i] = cap > 0 ? cap * tanhf(z / cap) : z;
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
    if (op->b || op->cap > 0)
        launch(ctx, finish_logits_kernel, dim3((unsigned)div_up(n, FINISH_THREADS)), FINISH_THREADS,
               0, op->logits, op->b, op->cap, op->Vp, n);
}
