/* columns.h: sums over the rows of a matrix, in an order that is always the same: each block sums a
 * chunk of rows, and the chunks' sums are then added one after the other. */
#ifndef CUDA_COLUMNS_H
#define CUDA_COLUMNS_H

#include "cuda.h"

enum { COLUMN_THREADS = 256, COLUMN_ROWS = COLUMN_THREADS / WARP, MAX_COLUMN_CHUNKS = 64 };

static inline int column_chunks(int N) {
    return (int)least<int64_t>(div_up(N, 4 * COLUMN_ROWS), MAX_COLUMN_CHUNKS);
}

static inline size_t column_bytes(int n_sums, int C) {
    return align_up(sizeof(float) * MAX_COLUMN_CHUNKS * (size_t)n_sums * (size_t)C);
}

/* partial (n_chunks, S, C): sums of what terms(row, c, add[S]) adds for each row of the chunk. Block
 * (x, y) has columns x WARP and on, and chunk y. */
template <int S, typename F>
static __device__ inline void sum_chunk(float *partial, int N, int C, F terms) {
    float *sums = shared_memory<float>(); /* (COLUMN_ROWS, S, WARP) */
    int lane = (int)threadIdx.x % WARP, part = (int)threadIdx.x / WARP;
    int c = (int)(blockIdx.x * WARP + lane);
    int rows = (int)div_up(N, gridDim.y), first = (int)blockIdx.y * rows,
        end = least(first + rows, N);
    float sum[S] = {};
    if (c < C)
        for (int row = first + part; row < end; row += COLUMN_ROWS) terms(row, c, sum);
#pragma unroll
    for (int s = 0; s < S; s++) sums[(part * S + s) * WARP + lane] = sum[s];
    __syncthreads();
    if (part > 0 || c >= C) return;
#pragma unroll
    for (int s = 0; s < S; s++) {
        float total = 0;
        for (int p = 0; p < COLUMN_ROWS; p++) total += sums[(p * S + s) * WARP + lane];
        partial[((int64_t)blockIdx.y * S + s) * C + c] = total;
    }
}

template <int S> static inline size_t column_shared_bytes() {
    return sizeof(float) * S * COLUMN_THREADS;
}

/* out[s] += the chunks' sums, for each out that is not NULL. */
template <int S> struct column_outputs {
    float *out[S];
};

template <int S>
static __global__ void add_chunks_kernel(column_outputs<S> to, const float *partial, int n_chunks,
                                         int C) {
    int c = (int)(blockIdx.x * COLUMN_THREADS + threadIdx.x);
    if (c >= C) return;
#pragma unroll
    for (int s = 0; s < S; s++) {
        if (!to.out[s]) continue;
        float sum = 0;
        for (int k = 0; k < n_chunks; k++) sum += partial[((int64_t)k * S + s) * C + c];
        to.out[s][c] += sum;
    }
}

template <int S>
static inline void add_chunks(gpt_ctx *ctx, column_outputs<S> to, const float *partial,
                              int n_chunks, int C) {
    launch(ctx, add_chunks_kernel<S>, dim3((unsigned)div_up(C, COLUMN_THREADS)), COLUMN_THREADS, 0,
           to, partial, n_chunks, C);
}

#endif
