/* dropout.cu: the embedding's dropout, in place; elsewhere dropout is part of another kernel. */
#include "cuda.h"

enum { THREADS = 256 };

template <int W>
static __global__ void dropout_forward_kernel(elem *x, int64_t n, gpt_dropout dropout) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W;
    if (i >= n) return;
    float v[W];
    load(v, x + i);
#pragma unroll
    for (int k = 0; k < W; k++) v[k] *= dropout_factor(dropout, (uint64_t)(i + k));
    store(x + i, v);
}

template <int W> static void run(gpt_ctx *ctx, elem *x, int64_t n, gpt_dropout dropout) {
    launch(ctx, dropout_forward_kernel<W>, dim3((unsigned)div_up(n, THREADS * W)), THREADS, 0, x, n,
           dropout);
}

void cuda_dropout_forward(gpt_ctx *ctx, act *x, int64_t n, gpt_dropout dropout) {
    if (dropout.p == 0 || n == 0) return;
    if (n % PACK == 0)
        run<PACK>(ctx, (elem *)x, n, dropout);
    else
        run<1>(ctx, (elem *)x, n, dropout);
}
