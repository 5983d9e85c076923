/* norm.cu: residual add, dropout of the branch, and LayerNorm or RMSNorm. A warp has a row; what it
 * reads a second time is still in the cache. */
#include "columns.h"

enum { THREADS = 256, WARPS = THREADS / WARP };

static inline dim3 row_grid(int N) {
    return dim3((unsigned)div_up(N, WARPS));
}

/* resid_out = resid + dropout(branch), W channels of it, as they are stored. */
template <int W>
static __device__ inline void add_branch(float (&x)[W], const residual_norm_forward &a,
                                         gpt_dropout dropout, int64_t at) {
    float branch[W];
    load(branch, (const elem *)a.branch + at);
    if (dropout.p > 0)
#pragma unroll
        for (int k = 0; k < W; k++) branch[k] *= dropout_factor(dropout, (uint64_t)(at + k));
#pragma unroll
    for (int k = 0; k < W; k++) x[k] = to_float(from_float<elem>(x[k] + branch[k]));
    store((elem *)a.resid_out + at, x);
}

template <int W> static __global__ void residual_norm_forward_kernel(residual_norm_forward a) {
    int row = (int)(blockIdx.x * WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    if (row >= a.N) return;
    int64_t start = (int64_t)row * a.C;
    const elem *resid = (const elem *)a.resid;
    const elem *sum = a.branch ? (const elem *)a.resid_out : resid;
    float x[W], mean = 0, square = 0;
    gpt_dropout dropout = dropout_at(a.dropout);
    for (int c = lane * W; c < a.C; c += WARP * W) {
        load(x, resid + start + c);
        if (a.branch) add_branch(x, a, dropout, start + c);
#pragma unroll
        for (int k = 0; k < W; k++) mean += x[k];
    }
    mean = a.norm == GPT_NORM_LAYERNORM ? warp_sum(mean) / (float)a.C : 0;
    for (int c = lane * W; c < a.C; c += WARP * W) {
        load(x, sum + start + c);
#pragma unroll
        for (int k = 0; k < W; k++) square += (x[k] - mean) * (x[k] - mean);
    }
    float rstd = 1.0f / sqrtf(warp_sum(square) / (float)a.C + a.eps);
    for (int c = lane * W; c < a.C; c += WARP * W) {
        float w[W], b[W];
        load(x, sum + start + c);
        if (a.w) load(w, a.w + c);
        if (a.b) load(b, a.b + c);
#pragma unroll
        for (int k = 0; k < W; k++) {
            x[k] = (x[k] - mean) * rstd;
            if (a.w) x[k] *= w[k];
            if (a.b) x[k] += b[k];
        }
        store((elem *)a.out + start + c, x);
    }
    if (a.stats && lane == 0) {
        a.stats[2 * row] = mean;
        a.stats[2 * row + 1] = rstd;
    }
}

CUDA_OP(residual_norm_forward) {
    launch(ctx,
           op->C % PACK == 0 ? residual_norm_forward_kernel<PACK> : residual_norm_forward_kernel<1>,
           row_grid(op->N), THREADS, 0, *op);
}

/* ---- backward ---- */

CUDA_WORKSPACE(norm_workspace) {
    return shape->training ? column_bytes(2, shape->C) : 0;
}

/* g = dout w and h = (x - mean) rstd, W channels of them. */
template <int W>
static __device__ inline void gradient_terms(float (&g)[W], float (&h)[W],
                                             const residual_norm_backward &a, int row, int c,
                                             float mean, float rstd) {
    float w[W];
    load(g, (const elem *)a.dout + (int64_t)row * a.C + c);
    load(h, (const elem *)a.resid + (int64_t)row * a.C + c);
    if (a.w) load(w, a.w + c);
#pragma unroll
    for (int k = 0; k < W; k++) {
        if (a.w) g[k] *= w[k];
        h[k] = (h[k] - mean) * rstd;
    }
}

/* dresid += rstd (g - mean(g) - h mean(g h)); RMSNorm has no mean(g) term. */
template <int W> static __global__ void residual_norm_backward_kernel(residual_norm_backward a) {
    int row = (int)(blockIdx.x * WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    if (row >= a.N) return;
    float mean = a.stats[2 * row], rstd = a.stats[2 * row + 1];
    float g[W], h[W], sum_g = 0, sum_gh = 0;
    gpt_dropout dropout = dropout_at(a.dropout);
    for (int c = lane * W; c < a.C; c += WARP * W) {
        gradient_terms(g, h, a, row, c, mean, rstd);
#pragma unroll
        for (int k = 0; k < W; k++) {
            sum_g += g[k];
            sum_gh += g[k] * h[k];
        }
    }
    float mean_g = a.norm == GPT_NORM_LAYERNORM ? warp_sum(sum_g) / (float)a.C : 0;
    float mean_gh = warp_sum(sum_gh) / (float)a.C;
    for (int c = lane * W; c < a.C; c += WARP * W) {
        int64_t at = (int64_t)row * a.C + c;
        float dx[W];
        gradient_terms(g, h, a, row, c, mean, rstd);
        load(dx, (const elem *)a.dresid + at);
#pragma unroll
        for (int k = 0; k < W; k++)
            dx[k] = to_float(from_float<elem>(dx[k] + rstd * (g[k] - mean_g - h[k] * mean_gh)));
        store((elem *)a.dresid + at, dx);
        if (!a.dbranch) continue;
#pragma unroll
        for (int k = 0; k < W; k++) dx[k] *= dropout_factor(dropout, (uint64_t)(at + k));
        store((elem *)a.dbranch + at, dx);
    }
}

template <int W>
static __global__ void norm_weights_backward_kernel(float *partial, residual_norm_backward a) {
    sum_chunk<2, W>(partial, a.N, a.C, [=](int row, int c, float(&sum)[2][W]) {
        float d[W], x[W], mean = a.stats[2 * row], rstd = a.stats[2 * row + 1];
        load(d, (const elem *)a.dout + (int64_t)row * a.C + c);
        load(x, (const elem *)a.resid + (int64_t)row * a.C + c);
#pragma unroll
        for (int k = 0; k < W; k++) {
            sum[0][k] += d[k] * (x[k] - mean) * rstd;
            sum[1][k] += d[k];
        }
    });
}

template <int W> static void backward(gpt_ctx *ctx, const residual_norm_backward &a) {
    launch(ctx, residual_norm_backward_kernel<W>, row_grid(a.N), THREADS, 0, a);
    if (!a.dw && !a.db) return;
    float *partial = (float *)ctx->workspace;
    launch(ctx, norm_weights_backward_kernel<W>, column_grid<W>(a.N, a.C), COLUMN_THREADS,
           column_shared_bytes<2, W>(), partial, a);
    add_chunks<2>(ctx, {{a.dw, a.db}}, partial, column_chunks(a.N), a.C);
}

CUDA_OP(residual_norm_backward) {
    if (op->C % PACK == 0)
        backward<PACK>(ctx, *op);
    else
        backward<1>(ctx, *op);
}
