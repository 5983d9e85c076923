/* columns.h: sums over the rows of a matrix, in an order that is always the same: each block sums a
 * chunk of rows, and the chunks' sums are then added in the same way. */
#ifndef CUDA_COLUMNS_H
#define CUDA_COLUMNS_H

#include "cuda.h"

enum { COLUMN_THREADS = 256, COLUMN_ROWS = COLUMN_THREADS / WARP };
#ifndef MAX_COLUMN_CHUNKS
#define MAX_COLUMN_CHUNKS 128
#endif

static inline int column_chunks(int N) {
    return (int)least<int64_t>(div_up(N, 4 * COLUMN_ROWS), MAX_COLUMN_CHUNKS);
}

static inline size_t column_bytes(int n_sums, int C) {
    return align_up(sizeof(float) * MAX_COLUMN_CHUNKS * (size_t)n_sums * (size_t)C);
}

/* The blocks that sum_chunk wants, and their shared memory. */
template <int W> static inline dim3 column_grid(int N, int C) {
    return dim3((unsigned)div_up(C, WARP * W), (unsigned)column_chunks(N));
}
template <int S, int W> static inline size_t column_shared_bytes() {
    return sizeof(float) * S * W * COLUMN_THREADS;
}

/* partial (n_chunks, S, C): sums of what terms(row, c, add[S][W]) adds for each row of the chunk to
 * columns c and on. Block (x, y) has columns x WARP W and on, and chunk y. */
template <int S, int W, typename F>
static __device__ inline void sum_chunk(float *partial, int N, int C, F terms) {
    enum { COLUMNS = WARP * W };
    float *sums = shared_memory<float>(); /* (COLUMN_ROWS, S, COLUMNS) */
    int lane = (int)threadIdx.x % WARP, part = (int)threadIdx.x / WARP;
    int first_c = (int)blockIdx.x * COLUMNS, c = first_c + lane * W;
    int rows = (int)div_up(N, gridDim.y), first = (int)blockIdx.y * rows,
        end = least(first + rows, N);
    float sum[S][W] = {};
    if (c < C)
#pragma unroll 4
        for (int row = first + part; row < end; row += COLUMN_ROWS) terms(row, c, sum);
#pragma unroll
    for (int s = 0; s < S; s++) store(sums + (part * S + s) * COLUMNS + lane * W, sum[s]);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < S * COLUMNS; i += COLUMN_THREADS) {
        float total = 0;
        for (int p = 0; p < COLUMN_ROWS; p++) total += sums[p * S * COLUMNS + i];
        if (first_c + i % COLUMNS < C)
            partial[((int64_t)blockIdx.y * S + i / COLUMNS) * C + first_c + i % COLUMNS] = total;
    }
}

/* out[s] += the chunks' sums, for each out that is not NULL. */
template <int S> struct column_outputs {
    float *out[S];
};

enum { ADD_THREADS = 1024, ADD_PARTS = ADD_THREADS / WARP };

template <int S>
static __global__ void __launch_bounds__(ADD_THREADS)
    add_chunks_kernel(column_outputs<S> to, const float *partial, int n_chunks, int C) {
    float *sums = shared_memory<float>(); /* (ADD_PARTS, WARP) */
    int lane = (int)threadIdx.x % WARP, part = (int)threadIdx.x / WARP;
    int i = (int)blockIdx.x * WARP + lane; /* of (S, C) */
    float sum = 0;
    if (i < S * C)
#pragma unroll 16
        for (int k = part; k < n_chunks; k += ADD_PARTS) sum += partial[(int64_t)k * S * C + i];
    sums[part * WARP + lane] = sum;
    __syncthreads();
    if (part > 0) return;
    for (int p = 1; p < ADD_PARTS; p++) sum += sums[p * WARP + lane];
#pragma unroll
    for (int s = 0; s < S; s++)
        if (i >= s * C && i < (s + 1) * C && to.out[s]) to.out[s][i - s * C] += sum;
}

template <int S>
static inline void add_chunks(gpt_ctx *ctx, column_outputs<S> to, const float *partial,
                              int n_chunks, int C) {
    launch(ctx, add_chunks_kernel<S>, dim3((unsigned)div_up(S * C, WARP)), ADD_THREADS,
           sizeof(float) * ADD_THREADS, to, partial, n_chunks, C);
}

/* sums += those of x's columns (N, C); partial: column_bytes(1, C). columns.cu. */
#define cuda_sum_columns CUDA_ACTS_NAME(sum_columns)
void cuda_sum_columns(gpt_ctx *ctx, float *sums, float *partial, const elem *x, int N, int C);

#endif
