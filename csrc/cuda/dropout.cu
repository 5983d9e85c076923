/* dropout.cu: the embedding's dropout, in place; elsewhere dropout is part of another kernel. */
#include "cuda.h"

enum { THREADS = 256 };

template <int W>
static __global__ void dropout_forward_kernel(elem *x, int64_t n, gpt_dropout_site site) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W;
    if (i >= n) return;
    float v[W];
    gpt_dropout dropout = dropout_at(site);
    load(v, x + i);
#pragma unroll
    for (int k = 0; k < W; k++) v[k] *= dropout_factor(dropout, (uint64_t)(i + k));
    store(x + i, v);
}

template <int W> static void run(gpt_ctx *ctx, elem *x, int64_t n, gpt_dropout_site site) {
    launch(ctx, dropout_forward_kernel<W>, dim3((unsigned)div_up(n, THREADS * W)), THREADS, 0, x, n,
           site);
}

void cuda_dropout_forward(gpt_ctx *ctx, act *x, int64_t n, gpt_dropout_site site) {
    if (site.p == 0 || n == 0) return;
    if (n % PACK == 0)
        run<PACK>(ctx, (elem *)x, n, site);
    else
        run<1>(ctx, (elem *)x, n, site);
}
