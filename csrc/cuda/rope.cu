/* rope.cu: rotary positions, in place. A thread turns W neighbouring pairs of channels of a head. */
#include "cuda.h"

/* Pairs of a head. */
static __host__ __device__ inline int turned_pairs(const rope_forward &a) {
    return (a.turned && a.pos == GPT_POS_ROPE ? a.turned : a.HS) / 2;
}

template <int W> static __global__ void rope_forward_kernel(rope_forward a, float sign) {
    int wide = a.pos == GPT_POS_ROPE_WIDE;
    int half = turned_pairs(a), turned = (a.NH + a.NKV) * half; /* of a row: queries, then keys */
    int64_t i = ((int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x) * W;
    if (i >= (int64_t)a.N * turned) return;
    int n = (int)(i / turned), pair = (int)(i % turned), head = pair / half, within = pair % half;
    int t = a.positions ? a.positions[n] : n % a.T;
    /* Over the whole width, each head of queries, and of keys, has its own angles. */
    int at = wide ? (head < a.NH ? pair : pair - a.NH * half) : within;
    elem *x = (elem *)a.qkv + (int64_t)n * (a.NH + 2 * a.NKV) * a.HS + head * a.HS;
    float turn[2 * W], u[W], v[W], both[2 * W];
    load(turn, a.table + 2 * ((int64_t)t * (wide ? a.NH * half : half) + at));
    if (wide) {
        load(both, x + 2 * within);
    } else {
        load(u, x + within);
        load(v, x + within + half);
    }
#pragma unroll
    for (int k = 0; k < W; k++) {
        float p = wide ? both[2 * k] : u[k], q = wide ? both[2 * k + 1] : v[k];
        float cosine = turn[2 * k], sine = sign * turn[2 * k + 1];
        both[2 * k] = u[k] = p * cosine - q * sine;
        both[2 * k + 1] = v[k] = q * cosine + p * sine;
    }
    if (wide) {
        store(x + 2 * within, both);
    } else {
        store(x + within, u);
        store(x + within + half, v);
    }
}

static void rotate(gpt_ctx *ctx, const rope_forward &a, float sign) {
    int half = turned_pairs(a), W = half % PACK == 0 && a.HS % PACK == 0 ? PACK : 1;
    int64_t pairs = (int64_t)a.N * (a.NH + a.NKV) * half;
    launch(ctx, W == 1 ? rope_forward_kernel<1> : rope_forward_kernel<PACK>,
           dim3((unsigned)div_up(pairs, BLOCK_THREADS * W)), BLOCK_THREADS, 0, a, sign);
}

CUDA_OP(rope_forward) {
    rotate(ctx, *op, 1);
}

CUDA_OP(rope_backward) {
    rope_forward same = {.qkv = op->dqkv,
                         .table = op->table,
                         .positions = op->positions,
                         .pos = op->pos,
                         .turned = op->turned,
                         .N = op->N,
                         .T = op->T,
                         .NH = op->NH,
                         .NKV = op->NKV,
                         .HS = op->HS};
    rotate(ctx, same, -1);
}
