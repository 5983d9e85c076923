/* activation.cu: activations of the products of linear layers, with the products' biases, and their gradients. */
#include "activation.h"

/* For n numbers, W of them a thread. */
static inline dim3 grid_of(int64_t n, int W) {
    return dim3((unsigned)div_up(n, BLOCK_THREADS * W));
}

template <int W> static __device__ inline void add_bias(float (&x)[W], const elem *b) {
    float bias[W];
    load(bias, b);
#pragma unroll
    for (int k = 0; k < W; k++) x[k] += bias[k];
}

template <int W> static __global__ void activation_forward_kernel(activation_args a) {
    int64_t i = ((int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x) * W;
    if (i >= (int64_t)a.N * a.F) return;
    int twin = is_gated(a.activation) ? a.F : 0, f = (int)(i % a.F);
    int64_t at = i / a.F * (a.F + twin) + f;
    float x[W], up[W] = {};
    load(x, a.y + at);
    if (a.b) add_bias(x, a.b + f);
    if (a.pre) store(a.pre + at, x);
    if (twin) {
        load(up, a.y + at + twin);
        if (a.b) add_bias(up, a.b + f + twin);
        if (a.pre) store(a.pre + at + twin, up);
    }
#pragma unroll
    for (int k = 0; k < W; k++) x[k] = activation_forward(a.activation, x[k], up[k]);
    store(a.out + i, x);
}

void cuda_activation_forward(gpt_ctx *ctx, const activation_args &a) {
    int W = a.F % PACK == 0 ? PACK : 1;
    launch(ctx, W == 1 ? activation_forward_kernel<1> : activation_forward_kernel<PACK>,
           grid_of((int64_t)a.N * a.F, W), BLOCK_THREADS, 0, a);
}

template <int W> static __global__ void activation_backward_kernel(activation_backward_args a) {
    int64_t i = ((int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x) * W;
    if (i >= (int64_t)a.N * a.F) return;
    int twin = is_gated(a.activation) ? a.F : 0;
    int64_t at = i / a.F * (a.F + twin) + i % a.F;
    float d[W], x[W], up[W] = {}, dup[W] = {};
    load(d, a.dout + i);
    load(x, a.pre + at);
    if (twin) load(up, a.pre + at + twin);
#pragma unroll
    for (int k = 0; k < W; k++)
        d[k] = activation_backward(a.activation, d[k], x[k], up[k], &dup[k]);
    store(a.din + at, d);
    if (twin) store(a.din + at + twin, dup);
}

void cuda_activation_backward(gpt_ctx *ctx, const activation_backward_args &a) {
    int W = a.F % PACK == 0 ? PACK : 1;
    launch(ctx, W == 1 ? activation_backward_kernel<1> : activation_backward_kernel<PACK>,
           grid_of((int64_t)a.N * a.F, W), BLOCK_THREADS, 0, a);
}
