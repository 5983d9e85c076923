/* qk_norm.cu: RMSNorm of the heads of queries and keys, in place. A warp has a head; weight gradients are
 * summed by columns.h. */
#include "columns.h"

enum { QK_NORM_WARPS = BLOCK_THREADS / WARP };

CUDA_WORKSPACE(qk_norm_workspace) {
    return shape->training ? column_bytes(2, most(shape->QK, shape->HS)) : 0;
}

template <int W> static __global__ void qk_norm_forward_kernel(qk_norm_forward a) {
    int heads = a.NH + a.NKV, first = (int)threadIdx.x % WARP * W;
    int64_t i = (int64_t)blockIdx.x * QK_NORM_WARPS + threadIdx.x / WARP; /* of (N, heads) */
    if (i >= (int64_t)a.N * heads) return;
    int n = (int)(i / heads), h = (int)(i % heads);
    elem *x = (elem *)a.qkv + ((int64_t)n * (heads + a.NKV) + h) * a.HS;
    const float *weights = h < a.NH ? a.q_w : a.k_w;
    float v[W], w[W], square = 0;
    for (int c = first; c < a.HS; c += WARP * W) {
        load(v, x + c);
        if (a.in) store((elem *)a.in + i * a.HS + c, v);
#pragma unroll
        for (int k = 0; k < W; k++) square = fmaf(v[k], v[k], square);
    }
    float rstd = 1.0f / sqrtf(warp_sum(square) / (float)a.HS + a.eps);
    for (int c = first; c < a.HS; c += WARP * W) {
        load(v, x + c);
        load(w, weights + c);
#pragma unroll
        for (int k = 0; k < W; k++) v[k] = v[k] * rstd * w[k];
        store(x + c, v);
    }
    if (a.stats && first == 0) a.stats[i] = rstd;
}

static inline dim3 qk_norm_grid(int N, int heads) {
    return dim3((unsigned)div_up((int64_t)N * heads, QK_NORM_WARPS));
}

CUDA_OP(qk_norm_forward) {
    launch(ctx, op->HS % PACK ? qk_norm_forward_kernel<1> : qk_norm_forward_kernel<PACK>,
           qk_norm_grid(op->N, op->NH + op->NKV), BLOCK_THREADS, 0, *op);
}

/* ---- backward ---- */

/* partial (n_chunks, 2, HS): the sums of d h over rows and heads, of queries and of keys. */
template <int W>
static __global__ void qk_norm_weights_backward_kernel(float *partial, qk_norm_backward a) {
    int heads = a.NH + a.NKV;
    sum_chunk<2, W>(partial, a.N, a.HS, [=](int row, int c, float(&sum)[2][W]) {
        const elem *dqkv = (const elem *)a.dqkv + (int64_t)row * (heads + a.NKV) * a.HS + c;
        const elem *in = (const elem *)a.in + (int64_t)row * heads * a.HS + c;
        for (int h = 0; h < heads; h++) {
            float d[W], x[W], rstd = a.stats[(int64_t)row * heads + h];
            load(d, dqkv + h * a.HS);
            load(x, in + h * a.HS);
#pragma unroll
            for (int k = 0; k < W; k++) {
                float term = d[k] * (x[k] * rstd);
                sum[0][k] += h < a.NH ? term : 0;
                sum[1][k] += h < a.NH ? 0 : term;
            }
        }
    });
}

/* With g = d w, h = x rstd:  dx = rstd (g - h mean(g h)), in place of d. */
template <int W> static __global__ void qk_norm_backward_kernel(qk_norm_backward a) {
    int heads = a.NH + a.NKV, first = (int)threadIdx.x % WARP * W;
    int64_t i = (int64_t)blockIdx.x * QK_NORM_WARPS + threadIdx.x / WARP; /* of (N, heads) */
    if (i >= (int64_t)a.N * heads) return;
    int n = (int)(i / heads), head = (int)(i % heads);
    elem *d = (elem *)a.dqkv + ((int64_t)n * (heads + a.NKV) + head) * a.HS;
    const elem *in = (const elem *)a.in + i * a.HS;
    const float *weights = head < a.NH ? a.q_w : a.k_w;
    float g[W], x[W], w[W], rstd = a.stats[i], sum = 0;
    for (int c = first; c < a.HS; c += WARP * W) {
        load(g, d + c);
        load(x, in + c);
        load(w, weights + c);
#pragma unroll
        for (int k = 0; k < W; k++) sum += g[k] * w[k] * (x[k] * rstd);
    }
    float mean_gh = warp_sum(sum) / (float)a.HS;
    for (int c = first; c < a.HS; c += WARP * W) {
        load(g, d + c);
        load(x, in + c);
        load(w, weights + c);
#pragma unroll
        for (int k = 0; k < W; k++) g[k] = rstd * (g[k] * w[k] - x[k] * rstd * mean_gh);
        store(d + c, g);
    }
}

template <int W> static void qk_norm_back(gpt_ctx *ctx, const qk_norm_backward &a) {
    float *partial = (float *)ctx->workspace;
    if (a.dq_w || a.dk_w) {
        launch(ctx, qk_norm_weights_backward_kernel<W>, column_grid<W>(a.N, a.HS), COLUMN_THREADS,
               column_shared_bytes<2, W>(), partial, a);
        add_chunks<2>(ctx, {{a.dq_w, a.dk_w}}, partial, column_chunks(a.N), a.HS);
    }
    launch(ctx, qk_norm_backward_kernel<W>, qk_norm_grid(a.N, a.NH + a.NKV), BLOCK_THREADS, 0, a);
}

CUDA_OP(qk_norm_backward) {
    if (op->HS % PACK)
        qk_norm_back<1>(ctx, *op);
    else
        qk_norm_back<PACK>(ctx, *op);
}
