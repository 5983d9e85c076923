/* rope.cu: rotary positions, in place. A thread turns one pair of channels. */
#include "cuda.h"

enum { THREADS = 256 };

static __global__ void rope_forward_kernel(elem *qkv /* (N, QKV) */, const float2 *table,
                                           const int32_t *positions, float sign, int wide, int N,
                                           int T, int NH, int NKV, int HS) {
    int half = HS / 2, turned = (NH + NKV) * half; /* pairs of a row: queries, then keys */
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (int64_t)N * turned) return;
    int n = (int)(i / turned), pair = (int)(i % turned), head = pair / half, within = pair % half;
    int t = positions ? positions[n] : n % T;
    /* Over the whole width, each head of queries, and of keys, has its own angles. */
    int at = wide ? (head < NH ? pair : pair - NH * half) : within;
    float2 turn = table[(int64_t)t * (wide ? NH * half : half) + at]; /* (cos, sin) */
    elem *x = qkv + (int64_t)n * (NH + 2 * NKV) * HS + head * HS;
    elem *a = wide ? x + 2 * within : x + within, *b = wide ? a + 1 : a + half;
    float u = to_float(*a), v = to_float(*b), s = sign * turn.y;
    *a = from_float<elem>(u * turn.x - v * s);
    *b = from_float<elem>(v * turn.x + u * s);
}

static void rotate(gpt_ctx *ctx, act *qkv, const float *table, const int32_t *positions, float sign,
                   int pos, int N, int T, int NH, int NKV, int HS) {
    int64_t pairs = (int64_t)N * (NH + NKV) * (HS / 2);
    launch(ctx, rope_forward_kernel, dim3((unsigned)div_up(pairs, THREADS)), THREADS, 0,
           (elem *)qkv, (const float2 *)table, positions, sign, pos == GPT_POS_ROPE_WIDE, N, T, NH,
           NKV, HS);
}

void cuda_rope_forward(gpt_ctx *ctx, act *qkv, const float *table, const int32_t *positions,
                       int pos, int N, int T, int NH, int NKV, int HS) {
    rotate(ctx, qkv, table, positions, 1, pos, N, T, NH, NKV, HS);
}

void cuda_rope_backward(gpt_ctx *ctx, act *dqkv, const float *table, int pos, int N, int T, int NH,
                        int NKV, int HS) {
    rotate(ctx, dqkv, table, NULL, -1, pos, N, T, NH, NKV, HS);
}
