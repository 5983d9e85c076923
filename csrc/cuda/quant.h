/* quant.h: weights of 8 bits on the GPU: groups of 32 numbers of a row with a bf16 scale, as in cpu/quant.h,
 * here row by row. Activations are not rounded.
 *
 *     w[n][k] = scale[n][k / 32] * q[n][k],  -LARGEST <= q <= LARGEST
 *
 * The numbers of all groups, (rows, K/32, 32), come first, then the scales, (rows, K/32). */
#ifndef CUDA_QUANT_H
#define CUDA_QUANT_H

#include "product.h"

enum { QUANT_GROUP = 32, LARGEST = 127 };

static __host__ __device__ inline int64_t quant_groups(int64_t K) {
    return div_up(K, QUANT_GROUP);
}
static __host__ __device__ inline int64_t quant_scales_at(int64_t rows, int64_t K) {
    return div_up(rows * quant_groups(K) * QUANT_GROUP, 256) * 256;
}

/* A group's numbers, without the scale. */
static __device__ inline void unpack_group(float (&q)[QUANT_GROUP], const uint8_t *bytes) {
    packed<uint8_t, QUANT_GROUP> b = *(const packed<uint8_t, QUANT_GROUP> *)bytes;
#pragma unroll
    for (int i = 0; i < QUANT_GROUP; i++) q[i] = (float)(int8_t)b.x[i];
}

/* Rows first to first + n - 1 of w (rows, K) as the bf16 table has them: to (n, K). */
#define cuda_unpack CUDA_NAME(unpack)
void cuda_unpack(gpt_ctx *ctx, elem *to, const void *w, int first, int n, int rows, int K);

#endif
