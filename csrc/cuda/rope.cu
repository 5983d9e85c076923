/* rope.cu: rotary positions, in place. A thread turns W neighbouring pairs of channels of a head. */
#include "cuda.h"

enum { THREADS = 256 };

typedef struct rope_args {
    elem *qkv;          /* (N, QKV) */
    const float *table; /* of (cos, sin) */
    const int32_t *positions;
    float sign;
    int wide, N, T, NH, NKV, HS;
} rope_args;

template <int W> static __global__ void rope_forward_kernel(rope_args a) {
    int half = a.HS / 2, turned = (a.NH + a.NKV) * half; /* pairs of a row: queries, then keys */
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W;
    if (i >= (int64_t)a.N * turned) return;
    int n = (int)(i / turned), pair = (int)(i % turned), head = pair / half, within = pair % half;
    int t = a.positions ? a.positions[n] : n % a.T;
    /* Over the whole width, each head of queries, and of keys, has its own angles. */
    int at = a.wide ? (head < a.NH ? pair : pair - a.NH * half) : within;
    elem *x = a.qkv + (int64_t)n * (a.NH + 2 * a.NKV) * a.HS + head * a.HS;
    float turn[2 * W], u[W], v[W], both[2 * W];
    load(turn, a.table + 2 * ((int64_t)t * (a.wide ? a.NH * half : half) + at));
    if (a.wide) {
        load(both, x + 2 * within);
    } else {
        load(u, x + within);
        load(v, x + within + half);
    }
#pragma unroll
    for (int k = 0; k < W; k++) {
        float p = a.wide ? both[2 * k] : u[k], q = a.wide ? both[2 * k + 1] : v[k];
        float cosine = turn[2 * k], sine = a.sign * turn[2 * k + 1];
        both[2 * k] = u[k] = p * cosine - q * sine;
        both[2 * k + 1] = v[k] = q * cosine + p * sine;
    }
    if (a.wide) {
        store(x + 2 * within, both);
    } else {
        store(x + within, u);
        store(x + within + half, v);
    }
}

static void rotate(gpt_ctx *ctx, act *qkv, const float *table, const int32_t *positions, float sign,
                   int pos, int N, int T, int NH, int NKV, int HS) {
    rope_args a = {(elem *)qkv, table, positions, sign, pos == GPT_POS_ROPE_WIDE,
                   N,           T,     NH,        NKV,  HS};
    int W = HS / 2 % PACK == 0 ? PACK : 1;
    int64_t pairs = (int64_t)N * (NH + NKV) * (HS / 2);
    launch(ctx, W == 1 ? rope_forward_kernel<1> : rope_forward_kernel<PACK>,
           dim3((unsigned)div_up(pairs, THREADS * W)), THREADS, 0, a);
}

void cuda_rope_forward(gpt_ctx *ctx, act *qkv, const float *table, const int32_t *positions,
                       int pos, int N, int T, int NH, int NKV, int HS) {
    rotate(ctx, qkv, table, positions, 1, pos, N, T, NH, NKV, HS);
}

void cuda_rope_backward(gpt_ctx *ctx, act *dqkv, const float *table, int pos, int N, int T, int NH,
                        int NKV, int HS) {
    rotate(ctx, dqkv, table, NULL, -1, pos, N, T, NH, NKV, HS);
}
