/* columns.cu: sums of the columns of activations, for gradients of biases. */
#include "columns.h"

template <int W>
static __global__ void sum_columns_kernel(float *partial, const elem *x, int N, int C) {
    sum_chunk<1, W>(partial, N, C, [=](int row, int c, float(&sum)[1][W]) {
        float d[W];
        load(d, x + (int64_t)row * C + c);
#pragma unroll
        for (int k = 0; k < W; k++) sum[0][k] += d[k];
    });
}

template <int W>
static void sum_columns_of(gpt_ctx *ctx, float *sums, float *partial, const elem *x, int N, int C) {
    launch(ctx, sum_columns_kernel<W>, column_grid<W>(N, C), COLUMN_THREADS,
           column_shared_bytes<1, W>(), partial, x, N, C);
    add_chunks<1>(ctx, {{sums}}, partial, column_chunks(N), C);
}
void cuda_sum_columns(gpt_ctx *ctx, float *sums, float *partial, const elem *x, int N, int C) {
    if (C % PACK == 0)
        sum_columns_of<PACK>(ctx, sums, partial, x, N, C);
    else
        sum_columns_of<1>(ctx, sums, partial, x, N, C);
}
