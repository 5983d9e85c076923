/* weights_quant.cu: weight matrices rounded to 8 bits, as quant.h describes. */
#include "quant.h"

extern "C" CUDA_ACTS_OP(weights_pack);

/* A bias stays bf16. */
size_t cuda_weights_bytes(int rows, int cols, int parts, int training) {
    (void)training;
    if (parts == 0) return sizeof(__nv_bfloat16) * (size_t)rows;
    return (size_t)quant_scales_at(rows, cols) +
           sizeof(__nv_bfloat16) * (size_t)rows * (size_t)quant_groups(cols);
}

/* A scale no smaller than x, so that nothing grows past the largest integer. */
static __device__ inline __nv_bfloat16 scale_above(float x) {
    __nv_bfloat16 scale = __float2bfloat16(x);
    return fabsf(to_float(scale)) < fabsf(x) ? __float2bfloat16(x * (1 + 0x1p-7f)) : scale;
}

/* A thread a group: the largest number becomes the largest integer. */
static __global__ void weights_pack_kernel(uint8_t *to, const float *w, int rows, int K) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x, G = quant_groups(K);
    if (i >= rows * G) return;
    int row = (int)(i / G), first = (int)(i % G) * QUANT_GROUP,
        n = least<int>(QUANT_GROUP, K - first);
    const float *x = w + (int64_t)row * K + first;
    float extreme = 0;
    for (int k = 0; k < n; k++)
        if (fabsf(x[k]) > fabsf(extreme)) extreme = x[k];
    __nv_bfloat16 scale = scale_above(extreme / (float)LARGEST);
    float inverse = to_float(scale) != 0 ? 1 / to_float(scale) : 0;
    uint8_t *bytes = to + i * QUANT_GROUP;
    for (int k = 0; k < QUANT_GROUP; k++) {
        int q = k < n ? least<int>((int)rintf(x[k] * inverse), LARGEST) : 0;
        bytes[k] = (uint8_t)q;
    }
    ((__nv_bfloat16 *)(to + quant_scales_at(rows, K)))[i] = scale;
}

CUDA_OP(weights_pack) {
    const gpt_segment *s = op->segment;
    if (s->parts == 0) {
        CUDA_ACTS_NAME(weights_pack)(ctx, op);
        return;
    }
    int64_t groups = s->rows * quant_groups(s->cols);
    launch(ctx, weights_pack_kernel, dim3((unsigned)div_up(groups, BLOCK_THREADS)), BLOCK_THREADS,
           0, (uint8_t *)s->packed, op->w, s->rows, s->cols);
}
