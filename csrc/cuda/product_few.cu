/* product_few.cu: products of a few rows with a weight, as decoding has them: a warp reads a row of b
 * once, for all rows of a. A row's bits do not depend on how many there are. */
#include "epilogue.h"
#include "weights.h"

enum {
    WARPS = 4,
    THREADS = WARPS * WARP,
    STEP = (int)WARP * (int)PACK, /* terms that a warp reads at once */
    FEW_ROWS = 8,
    AHEAD = 3, /* vectors of b that a lane has on their way at a time */
};

static __device__ inline void add_dot(float &sum, const chunk &a, const chunk &b) {
#pragma unroll
    for (int i = 0; i < PACK; i++) sum = fmaf(number(a, i), number(b, i), sum);
}

/* A warp a column of the product. T is what it holds, p.M at most ROWS. */
template <typename T, int ROWS> static __global__ void few_product_kernel(product p) {
    int n = (int)(blockIdx.x * WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    if (n >= p.N) return;
    const elem *a = (const elem *)p.a, *b = (const elem *)p.b + (int64_t)n * p.ldb;
    float sum[ROWS] = {}, bias = bias_of(p, n);
    for (int first = lane * PACK; first < p.K; first += AHEAD * STEP) {
        chunk w[AHEAD] = {};
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int k = first + i * STEP;
            if (k < p.K) w[i] = *(const chunk *)(b + k);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int k = first + i * STEP;
            if (k >= p.K) continue;
#pragma unroll
            for (int m = 0; m < ROWS; m++)
                if (m < p.M) add_dot(sum[m], *(const chunk *)(a + (int64_t)m * p.lda + k), w[i]);
        }
    }
    float mine = 0; /* lane m's is that of row m */
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
        float total = warp_sum(sum[m]);
        if (lane == m) mine = total;
    }
    if (lane < p.M) finish<T>(p, lane, n, mine + bias);
}

template <typename T> static inline void start(gpt_ctx *ctx, const product *p) {
    auto kernel = p->M == 1   ? few_product_kernel<T, 1>
                  : p->M == 2 ? few_product_kernel<T, 2>
                  : p->M <= 4 ? few_product_kernel<T, 4>
                              : few_product_kernel<T, FEW_ROWS>;
    launch(ctx, kernel, dim3((unsigned)div_up(p->N, WARPS)), THREADS, 0, *p);
}

int cuda_few_product(gpt_ctx *ctx, const product *p) {
    if (p->M > FEW_ROWS || p->kind != PRODUCT_NT || p->add) return 0;
    bool aligned = ((uintptr_t)p->a | (uintptr_t)p->b) % sizeof(chunk) == 0;
    if (!aligned || p->K % PACK || p->lda % PACK || p->ldb % PACK) return 0;
    if (p->float_out)
        start<float>(ctx, p);
    else
        start<elem>(ctx, p);
    return 1;
}
