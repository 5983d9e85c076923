/* product_few.cu: products of a few rows with a weight, as decoding has them: a row of b is read once,
 * for all rows of a, and nobody waits for one part of it before asking for the next. A row's bits do not
 * depend on how many there are. */
#include "epilogue.h"
#include "few.h"
#include "weights.h"

enum { FEW_ROWS = 8 };

/* T is what the product holds, M its rows. Left to itself, the compiler asks for one vector after the
 * other, to save registers for more blocks than FEW_BLOCKS. */
template <typename T, int M>
static __global__ void __launch_bounds__(FEW_THREADS, FEW_BLOCKS)
    few_product_kernel(product p, int log2_warps) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, n_warps = 1 << log2_warps;
    int n = (int)(blockIdx.x * FEW_WARPS + threadIdx.x / WARP) >> log2_warps;
    int part = warp & (n_warps - 1), step = n_warps * FEW_STEP, end = n < p.N ? p.K : 0;
    const elem *a = (const elem *)p.a, *b = (const elem *)p.b + (int64_t)n * p.ldb;
    float sum[M] = {}, bias = bias_of(p, n);
    for (int first = part * FEW_STEP + lane * PACK; first < end; first += FEW_AHEAD * step) {
        chunk w[FEW_AHEAD];
#pragma unroll
        for (int i = 0, k = first; i < FEW_AHEAD; i++, k += step) w[i] = load_chunk(b + k, k < end);
        take_turn();
#pragma unroll
        for (int i = 0, k = first; i < FEW_AHEAD; i++, k += step) {
            if (M > 1 && k >= end) continue; /* a branch, before which all of b is asked for */
#pragma unroll
            for (int m = 0; m < M; m++)
                add_dot(sum[m], load_chunk(a + (int64_t)m * p.lda + k, k < end), w[i]);
        }
    }
    take_turn();
    float mine = 0; /* lane m's is that of row m */
#pragma unroll
    for (int m = 0; m < M; m++) {
        float total = warp_sum(sum[m]);
        if (lane == m) mine = total;
    }
    if (n_warps > 1) mine = add_warps<M>(mine, n_warps);
    if (part == 0 && n < p.N && lane < M) finish<T>(p, lane, n, mine + bias);
}

template <typename T> static inline void start_few(gpt_ctx *ctx, const product *p, bool early) {
    static void (*const kernels[FEW_ROWS])(product, int) = {
        few_product_kernel<T, 1>, few_product_kernel<T, 2>, few_product_kernel<T, 3>,
        few_product_kernel<T, 4>, few_product_kernel<T, 5>, few_product_kernel<T, 6>,
        few_product_kernel<T, 7>, few_product_kernel<T, 8>};
    int log2_warps = log2_column_warps(p->K);
    dim3 grid((unsigned)div_up(p->N, FEW_WARPS >> log2_warps));
    size_t shared_bytes = sizeof(float) * (size_t)(FEW_WARPS * p->M);
    if (early)
        launch_early(ctx, kernels[p->M - 1], grid, FEW_THREADS, shared_bytes, *p, log2_warps);
    else
        launch(ctx, kernels[p->M - 1], grid, FEW_THREADS, shared_bytes, *p, log2_warps);
}

int cuda_few_product(gpt_ctx *ctx, const product *p, bool early) {
    if (p->M > FEW_ROWS || p->kind != PRODUCT_NT || p->add) return 0;
    bool aligned = ((uintptr_t)p->a | (uintptr_t)p->b) % sizeof(chunk) == 0;
    if (!aligned || p->K % PACK || p->lda % PACK || p->ldb % PACK) return 0;
    if (p->float_out)
        start_few<float>(ctx, p, early);
    else
        start_few<elem>(ctx, p, early);
    return 1;
}
