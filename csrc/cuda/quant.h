/* quant.h: weights of 8 or 4 bits on the GPU: groups of 32 numbers of a row with a bf16 scale, as in
 * cpu/quant.h, here row by row. Activations are not rounded.
 *
 *     w[n][k] = scale[n][k / 32] * q[n][k],  -LARGEST - 1 <= q <= LARGEST
 *
 * The bytes of all groups, (rows, K/32, QUANT_BYTES), come first, then the scales, (rows, K/32). With
 * 4 bits, byte i of a group has q[i] + 8 in its lower half and q[i + 16] + 8 in its upper. */
#ifndef CUDA_QUANT_H
#define CUDA_QUANT_H

#include "product.h"

enum {
    QUANT_GROUP = 32,
    QUANT_BYTES = QUANT_GROUP * CUDA_QUANT / 8,
    LARGEST = CUDA_QUANT == 8 ? 127 : 7,
};

static __host__ __device__ inline int64_t quant_groups(int64_t K) {
    return div_up(K, QUANT_GROUP);
}
static __host__ __device__ inline int64_t quant_scales_at(int64_t rows, int64_t K) {
    return div_up(rows * quant_groups(K) * QUANT_BYTES, 256) * 256;
}

/* A group's numbers, without the scale. */
static __device__ inline void unpack_group(float (&q)[QUANT_GROUP], const uint8_t *bytes) {
    packed<uint8_t, QUANT_BYTES> b = *(const packed<uint8_t, QUANT_BYTES> *)bytes;
#pragma unroll
    for (int i = 0; i < QUANT_BYTES; i++) {
        if (CUDA_QUANT == 8) {
            q[i] = (float)(int8_t)b.x[i];
        } else {
            q[i] = (float)((b.x[i] & 15) - 8);
            q[(i + 16) % QUANT_GROUP] = (float)((b.x[i] >> 4) - 8);
        }
    }
}

/* Rows first to first + n - 1 of w (rows, K) as the bf16 table has them: to (n, K). */
#define cuda_unpack CUDA_NAME(unpack)
void cuda_unpack(gpt_ctx *ctx, elem *to, const void *w, int first, int n, int rows, int K);

#endif
