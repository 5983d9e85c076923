/* dropout.cu: the embedding's dropout, in place; elsewhere dropout is part of another kernel. */
#include "cuda.h"

template <int W> static __global__ void dropout_apply_kernel(dropout_apply a) {
    int64_t i = ((int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x) * W;
    if (i >= a.n) return;
    float v[W];
    gpt_dropout dropout = dropout_at(a.dropout);
    elem *x = (elem *)a.x;
    load(v, x + i);
#pragma unroll
    for (int k = 0; k < W; k++) v[k] *= dropout_factor(dropout, (uint64_t)(i + k));
    store(x + i, v);
}

CUDA_OP(dropout_apply) {
    if (op->dropout.p == 0 || op->n == 0) return;
    int W = op->n % PACK == 0 ? PACK : 1;
    launch(ctx, W == 1 ? dropout_apply_kernel<1> : dropout_apply_kernel<PACK>,
           dim3((unsigned)div_up(op->n, BLOCK_THREADS * W)), BLOCK_THREADS, 0, *op);
}
