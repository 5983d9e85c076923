/* product_plain.cu: products of matrices whose rows are not aligned, where cuBLASLt has nothing for them.
 * A thread a number. */
#define CUDA_DTYPE any
#include "product.h"

template <typename T, typename O> static __global__ void product_kernel(product p) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x, m = i / p.N, n = i % p.N;
    if (m >= p.M) return;
    bool turned_a = p.kind == PRODUCT_TN, turned_b = p.kind == PRODUCT_NT;
    const T *a = (const T *)p.a + (turned_a ? m : m * p.lda);
    const T *b = (const T *)p.b + (turned_b ? n * p.ldb : n);
    int64_t step_a = turned_a ? p.lda : 1, step_b = turned_b ? 1 : p.ldb;
    float sum = 0;
    for (int k = 0; k < p.K; k++) sum += to_float(a[k * step_a]) * to_float(b[k * step_b]);
    O *out = (O *)p.out + m * p.ldo + n;
    *out = from_float<O>(p.add ? to_float(*out) + sum : sum);
}

void cuda_product_plain(gpt_ctx *ctx, const product *p) {
    launch(ctx,
           !p->bf16       ? product_kernel<float, float>
           : p->float_out ? product_kernel<__nv_bfloat16, float>
                          : product_kernel<__nv_bfloat16, __nv_bfloat16>,
           dim3((unsigned)div_up((int64_t)p->M * p->N, BLOCK_THREADS)), BLOCK_THREADS, 0, *p);
}
