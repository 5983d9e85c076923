/* product_quant.cu: products with weights of 8 bits, see quant.h. */
#include "epilogue.h"
#include "weights.h"

enum { WARPS = BLOCK_THREADS / WARP, FEW_ROWS = 8 };

/* Rows of w, from `first` on, as the bf16 table has them. A thread a group. */
static __global__ void unpack_kernel(elem *to, const uint8_t *w, int first, int n, int rows,
                                     int K) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x, G = quant_groups(K);
    if (i >= n * G) return;
    int64_t at = first * G + i;
    int row = (int)(i / G), k0 = (int)(i % G) * QUANT_GROUP;
    float q[QUANT_GROUP], scale = to_float(((const elem *)(w + quant_scales_at(rows, K)))[at]);
    unpack_group(q, w + at * QUANT_GROUP);
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++)
        if (k0 + k < K) to[(int64_t)row * K + k0 + k] = from_float<elem>(scale * q[k]);
}

void cuda_unpack(gpt_ctx *ctx, elem *to, const void *w, int first, int n, int rows, int K) {
    launch(ctx, unpack_kernel, dim3((unsigned)div_up(n * quant_groups(K), BLOCK_THREADS)),
           BLOCK_THREADS, 0, to, w, first, n, rows, K);
}

/* A warp an output, a lane a group at a time, for all M rows of a. T is what the output holds. */
template <typename T> static __global__ void few_product_kernel(product p) {
    int n = (int)(blockIdx.x * WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    int M = p.M, K = p.K, lda = p.lda;
    if (n >= p.N) return;
    int64_t G = quant_groups(K);
    const elem *a = (const elem *)p.a;
    const uint8_t *w = (const uint8_t *)p.b;
    const elem *scales = (const elem *)(w + quant_scales_at(p.N, K));
    float sum[FEW_ROWS] = {}, bias = bias_of(p, n);
    for (int64_t g = lane; g < G; g += WARP) {
        float q[QUANT_GROUP], scale = to_float(scales[n * G + g]);
        unpack_group(q, w + (n * G + g) * QUANT_GROUP);
        for (int m = 0; m < M; m++) {
            const elem *x = a + (int64_t)m * lda + g * QUANT_GROUP;
            float dot = 0;
            if (K % QUANT_GROUP == 0 && lda % PACK == 0) {
#pragma unroll
                for (int k = 0; k < QUANT_GROUP; k += PACK) {
                    float v[PACK];
                    load(v, x + k);
#pragma unroll
                    for (int i = 0; i < PACK; i++) dot += q[k + i] * v[i];
                }
            } else {
#pragma unroll
                for (int k = 0; k < QUANT_GROUP; k++)
                    if (g * QUANT_GROUP + k < K) dot += q[k] * to_float(x[k]);
            }
#pragma unroll
            for (int i = 0; i < FEW_ROWS; i++)
                if (i == m) sum[i] += scale * dot; /* so that sums stay in registers */
        }
    }
    float mine = 0; /* lane m's is that of row m */
#pragma unroll
    for (int m = 0; m < FEW_ROWS; m++) {
        float total = warp_sum(sum[m]);
        if (lane == m) mine = total;
    }
    if (lane < M) finish<T>(p, lane, n, mine + bias);
}

int cuda_quant_product(gpt_ctx *ctx, const product *p) {
    if (p->M > FEW_ROWS) return 0;
    launch(ctx, p->float_out ? few_product_kernel<float> : few_product_kernel<elem>,
           dim3((unsigned)div_up(p->N, WARPS)), BLOCK_THREADS, 0, *p);
    return 1;
}
