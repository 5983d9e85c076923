/* attention.h: the shape of attention, and where its rows stand. */
#ifndef CUDA_ATTENTION_H
#define CUDA_ATTENTION_H

#include "cuda.h"

#include <math.h>

typedef struct attention_shape {
    int B, T, NH, NKV, HS;
} attention_shape;

/* Query head h reads key head h / (NH / NKV). Offsets of row t of sequence b in qkv (B, T, QKV). */
static __host__ __device__ inline int64_t row_stride(attention_shape a) {
    return (int64_t)(a.NH + 2 * a.NKV) * a.HS;
}
static __host__ __device__ inline int64_t query_at(attention_shape a, int b, int t, int h) {
    return ((int64_t)b * a.T + t) * row_stride(a) + (int64_t)h * a.HS;
}
static __host__ __device__ inline int64_t key_at(attention_shape a, int b, int t, int h) {
    return query_at(a, b, t, a.NH + h / (a.NH / a.NKV));
}
static __host__ __device__ inline int64_t value_at(attention_shape a, int b, int t, int h) {
    return query_at(a, b, t, a.NH + a.NKV + h / (a.NH / a.NKV));
}
/* In out and dout (B, T, NH HS). */
static __host__ __device__ inline int64_t out_at(attention_shape a, int b, int t, int h) {
    return (((int64_t)b * a.T + t) * a.NH + h) * a.HS;
}
static inline float attention_scale(attention_shape a) {
    return 1.0f / sqrtf((float)a.HS);
}

/* Rows of a decoding step; those of a sequence stand together, their positions one after the other. */
typedef struct decode_args {
    elem *out;                       /* (N, NH HS) */
    const elem *cache_k, *cache_v;   /* (n_seq, NKV, n_ctx, HS) */
    const elem *qkv;                 /* (N, QKV) */
    const int32_t *seqs, *positions; /* (N) */
    int N, n_ctx, NH, NKV, HS;
    float scale;
} decode_args;

/* Where the head of keys that query head h reads starts in a cache. */
static __device__ inline int64_t cache_at(const decode_args &a, int seq, int h) {
    return ((int64_t)seq * a.NKV + h / (a.NH / a.NKV)) * a.n_ctx * a.HS;
}

/* Queries, or in backward keys, that a block of attention_bf16.cu has. */
enum { ATTENTION_TILE = 64 };

/* Whether the tile of rows that starts at `first` is of one sequence. */
static __device__ inline int is_whole_tile(const decode_args &a, int first) {
    return a.seqs[first] == a.seqs[least(first + ATTENTION_TILE, a.N) - 1];
}

#ifdef CUDA_BF16
/* attention_bf16.cu: on tensor cores; 0 where it has no tiles for this size of head. delta (B, NH, T)
 * is <dout, out> of each row. */
int attention_tiles_forward(gpt_ctx *ctx, elem *out, float *lse, const elem *qkv,
                            gpt_dropout_site dropout, attention_shape a);
/* The whole tiles of a decoding step, whose rows are in the cache by now. */
int attention_tiles_prefill(gpt_ctx *ctx, decode_args args);
int attention_tiles_backward(gpt_ctx *ctx, elem *dqkv, const elem *dout, const elem *qkv,
                             const float *lse, const float *delta, gpt_dropout_site dropout,
                             attention_shape a);
#endif

#endif
