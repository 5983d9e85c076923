/* few.h: what products of a few rows share, whose time is that of reading the weight: a warp, or the warps of a
 * block, have a row of the weight, and ask for all of it at once. */
#ifndef CUDA_FEW_H
#define CUDA_FEW_H

#include "cuda.h"

enum {
    FEW_WARPS = 4,
    FEW_THREADS = FEW_WARPS * WARP,
    FEW_STEP = (int)WARP * (int)PACK, /* terms that a warp reads at once */
    FEW_AHEAD = 3,                    /* vectors of b that a lane has on their way at a time */
    FEW_BLOCKS = 6, /* of a multiprocessor: see few_product_kernel of product_few.cu */
};

static __device__ inline void add_dot(float &sum, const chunk &a, const chunk &b) {
#pragma unroll
    for (int i = 0; i < PACK; i++) sum = fmaf(number(a, i), number(b, i), sum);
}

static __device__ inline chunk load_chunk(const elem *from, bool there) {
    chunk c = {};
    if (there) c = *(const chunk *)from;
    return c;
}

/* Logarithm of the number of warps that share a column of the product: so many that each reads its terms
 * at once, as far as those of a block go. */
static inline int log2_column_warps(int K) {
    int log2 = 0;
    while (1 << log2 < FEW_WARPS && (FEW_AHEAD * FEW_STEP) << log2 < K) log2++;
    return log2;
}

/* The sum over the n warps of a column, in its first. Of M numbers, lane m has number m. */
template <int M> static __device__ inline float add_warps(float x, int n) {
    float *room = shared_memory<float>(); /* (FEW_WARPS, M) */
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    bool is_first = (warp & (n - 1)) == 0;
    if (lane < M) room[warp * M + lane] = x;
    __syncthreads();
#pragma unroll
    for (int i = 1; i < FEW_WARPS; i++)
        if (i < n && is_first && lane < M) x += room[(warp + i) * M + lane];
    return x;
}

#endif
