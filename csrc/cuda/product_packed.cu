/* product_packed.cu: products with matrices of packed.h. */
#include "epilogue.h"
#include "weights.h"

enum { WARPS = BLOCK_THREADS / WARP, FEW_ROWS = 8 };

/* Rows of w, from `first` on, as the bf16 table has them. A thread a group. */
static __global__ void unpack_kernel(elem *to, const packed_head *w, int first, int n, int K) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x, G = div_up(K, QUANT_GROUP);
    if (i >= n * G) return;
    int g = (int)(i % G);
    packed_row row = packed_row_of(w, first + (int)(i / G));
    elem *out = to + i / G * K + (int64_t)g * QUANT_GROUP;
    float q[QUANT_GROUP] = {};
#define UNPACK(BITS) read_group<BITS>(q, row, g, K)
    BY_BITS(row.part.bits, UNPACK)
#undef UNPACK
    if (K % QUANT_GROUP == 0) {
        store(out, q);
        return;
    }
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++)
        if (g * QUANT_GROUP + k < K) out[k] = from_float<elem>(q[k]);
}

void cuda_unpack(gpt_ctx *ctx, elem *to, const void *w, int first, int n, int rows, int K) {
    (void)rows;
    int64_t groups = n * div_up(K, QUANT_GROUP);
    launch(ctx, unpack_kernel, dim3((unsigned)div_up(groups, BLOCK_THREADS)), BLOCK_THREADS, 0, to,
           (const packed_head *)w, first, n, K);
}

/* The M rows' products with a row of w: a lane a group at a time. */
template <int BITS>
static __device__ inline void add_dots(float (&sum)[FEW_ROWS], const product &p,
                                       const packed_row &row) {
    int G = (int)div_up(p.K, QUANT_GROUP);
    const elem *a = (const elem *)p.a;
    bool whole = p.K % QUANT_GROUP == 0 && p.lda % PACK == 0;
    for (int g = (int)threadIdx.x % WARP; g < G; g += WARP) {
        float q[QUANT_GROUP];
        read_group<BITS>(q, row, g, p.K);
        for (int m = 0; m < p.M; m++) {
            const elem *x = a + (int64_t)m * p.lda + (int64_t)g * QUANT_GROUP;
            float dot = 0;
            if (whole) {
#pragma unroll
                for (int k = 0; k < QUANT_GROUP; k += PACK) {
                    float v[PACK];
                    load(v, x + k);
#pragma unroll
                    for (int i = 0; i < PACK; i++) dot = fmaf(q[k + i], v[i], dot);
                }
            } else {
#pragma unroll
                for (int k = 0; k < QUANT_GROUP; k++)
                    if (g * QUANT_GROUP + k < p.K) dot = fmaf(q[k], to_float(x[k]), dot);
            }
#pragma unroll
            for (int i = 0; i < FEW_ROWS; i++)
                if (i == m) sum[i] += dot; /* so that sums stay in registers */
        }
    }
}

/* A warp an output, for all M rows of a. */
static __global__ void few_product_kernel(product p) {
    int n = (int)(blockIdx.x * WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    if (n >= p.N) return;
    packed_row row = packed_row_of((const packed_head *)p.b, n);
    float sum[FEW_ROWS] = {}, bias = bias_of(p, n);
#define ADD_DOTS(BITS) add_dots<BITS>(sum, p, row)
    BY_BITS(row.part.bits, ADD_DOTS)
#undef ADD_DOTS
    float mine = 0; /* lane m's is that of row m */
#pragma unroll
    for (int m = 0; m < FEW_ROWS; m++) {
        float total = warp_sum(sum[m]);
        if (lane == m) mine = total;
    }
    if (lane >= p.M) return;
    if (p.float_out)
        finish<float>(p, lane, n, mine + bias);
    else
        finish<elem>(p, lane, n, mine + bias);
}

int cuda_quant_product(gpt_ctx *ctx, const product *p) {
    if (p->M > FEW_ROWS) return 0;
    launch(ctx, few_product_kernel, dim3((unsigned)div_up(p->N, WARPS)), BLOCK_THREADS, 0, *p);
    return 1;
}
