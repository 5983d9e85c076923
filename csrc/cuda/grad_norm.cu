/* grad_norm.cu: the global gradient norm. */
#include "cuda.h"

#include <math.h>

enum { BLOCK_NUMBERS = 4096 };
#ifndef MAX_NORM_BLOCKS
#define MAX_NORM_BLOCKS 1024
#endif

CUDA_WORKSPACE(grad_norm_workspace) {
    (void)shape;
    return align_up(sizeof(double) * MAX_NORM_BLOCKS);
}

static __global__ void grad_norm_kernel(double *sums /* (blocks) */, grad_norm a) {
    const float *grads = a.grads;
    int64_t n = a.n;
    enum { W = 16 / sizeof(float) };
    int64_t thread = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x, whole = n / W * W;
    int64_t step = (int64_t)gridDim.x * BLOCK_THREADS;
    double sum = 0;
    for (int64_t i = thread * W; i < whole; i += step * W) {
        float g[W];
        load(g, grads + i);
#pragma unroll
        for (int k = 0; k < W; k++) sum += (double)g[k] * g[k];
    }
    for (int64_t i = whole + thread; i < n; i += step) sum += (double)grads[i] * grads[i];
    sum = block_sum<BLOCK_THREADS>(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

static __global__ void grad_norm_end_kernel(float *norm, const double *sums, int n) {
    double sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += BLOCK_THREADS) sum += sums[i];
    sum = block_sum<BLOCK_THREADS>(sum);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

CUDA_OP(grad_norm) {
    double *sums = (double *)ctx->workspace;
    size_t shared_bytes = sizeof(double) * BLOCK_THREADS;
    int blocks = (int)least<int64_t>(div_up(op->n, BLOCK_NUMBERS), MAX_NORM_BLOCKS);
    launch(ctx, grad_norm_kernel, dim3((unsigned)blocks), BLOCK_THREADS, shared_bytes, sums, *op);
    launch(ctx, grad_norm_end_kernel, dim3(1), BLOCK_THREADS, shared_bytes, op->norm,
           (const double *)sums, blocks);
}
