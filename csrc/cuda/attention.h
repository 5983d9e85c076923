/* attention.h: the places of rows in the operands of attention. */
#ifndef CUDA_ATTENTION_H
#define CUDA_ATTENTION_H

#include "cuda.h"

#include <math.h>

/* Of a block, in all files of attention. */
static constexpr int WARPS = 4, THREADS = WARPS * WARP;

/* Query head h reads key head h / (NH / NKV). Offsets of row t of sequence b in qkv (B, T, QKV), for
 * the sizes of any op. */
template <typename Op> static __host__ __device__ inline int64_t row_stride(const Op &a) {
    return (int64_t)(a.NH + 2 * a.NKV) * a.HS;
}
template <typename Op>
static __host__ __device__ inline int64_t query_at(const Op &a, int b, int t, int h) {
    return ((int64_t)b * a.T + t) * row_stride(a) + (int64_t)h * a.HS;
}
template <typename Op>
static __host__ __device__ inline int64_t key_at(const Op &a, int b, int t, int h) {
    return query_at(a, b, t, a.NH + h / (a.NH / a.NKV));
}
template <typename Op>
static __host__ __device__ inline int64_t value_at(const Op &a, int b, int t, int h) {
    return query_at(a, b, t, a.NH + a.NKV + h / (a.NH / a.NKV));
}
/* In out and dout (B, T, NH HS). */
template <typename Op>
static __host__ __device__ inline int64_t out_at(const Op &a, int b, int t, int h) {
    return (((int64_t)b * a.T + t) * a.NH + h) * a.HS;
}

/* How far back the queries of a sequence see. */
typedef struct sight {
    int window;               /* so many keys; 0: no limit */
    const int32_t *positions; /* (T) of its rows in their documents, which end it; or NULL */
    int T;
} sight;

/* In sequence b of an op that has positions (B, T), or NULL. */
template <typename Op> static __device__ inline sight sight_of(const Op &a, int b) {
    return {a.window, a.positions ? a.positions + (int64_t)b * a.T : NULL, a.T};
}
/* The first key that a query sees. Queries past the sequence see what its last one sees. */
static __device__ inline int first_key(sight s, int query) {
    int last = least<int>(query, s.T - 1), first = s.positions ? last - s.positions[last] : 0;
    return s.window > 0 && query + 1 - s.window > first ? query + 1 - s.window : first;
}
/* Whether a query sees a key. */
static __device__ inline bool sees(sight s, int query, int key) {
    return key <= query && ((s.window == 0 && !s.positions) || key >= first_key(s, query));
}
/* Whether all of some queries are known to see all of some keys. */
static __device__ inline bool all_see(sight s, int query, int n_queries, int key, int n_keys) {
    return key + n_keys - 1 <= query && !s.positions &&
           (s.window == 0 || query + n_queries - 1 - key < s.window);
}
/* One past the last query that sees a key: documents follow each other, so what queries see begins ever
 * later. */
static __device__ inline int end_query(sight s, int key) {
    int end = s.window > 0 && s.window < s.T - key ? key + s.window : s.T;
    if (!s.positions) return end;
    int seen = key;
    while (end - seen > 1) {
        int middle = (seen + end) / 2;
        if (middle - s.positions[middle] <= key)
            seen = middle;
        else
            end = middle;
    }
    return end;
}

/* What is made of a product of a query and a key before its exponential. */
typedef struct scoring {
    float scale, cap; /* as in attention_forward */
} scoring;

template <typename Op> static inline scoring scoring_of(const Op &a) {
    return {score_scale(a.scale, a.HS), a.cap};
}
/* As the soft cap has it, where there is one. */
static __device__ inline float score_of(scoring s, float product) {
    float x = s.scale * product;
    return s.cap > 0 ? s.cap * tanhf(x / s.cap) : x;
}
/* The derivative of a score by the product. */
static __device__ inline float slope_of(scoring s, float score) {
    float t = s.cap > 0 ? score / s.cap : 0;
    return s.scale * (1 - t * t);
}

/* Arguments of the kernels of backward. */
typedef struct backward_args {
    attention_backward op;
    float *delta; /* (B, NH, T) <dout, out> of each row */
    float scale;
    /* Of attention_bf16.cu alone: */
    float *lse;     /* (B, NH, T) that of op in powers of 2 */
    float *partial; /* (tiles of rows, QKV) sums of dqkv's rows, or NULL */
} backward_args;

/* The start, in a cache, of the head of keys that query head h reads. */
static __device__ inline int64_t cache_at(const attention_decode &a, int seq, int h) {
    return ((int64_t)seq * a.NKV + h / (a.NH / a.NKV)) * a.n_ctx * a.HS;
}

/* Queries, or in backward keys, that a block of attention_bf16.cu has. */
enum { ATTENTION_TILE = 64 };
/* Tiles of the rows of B sequences. */
static inline int64_t attention_tiles(int B, int T) {
    return B * div_up(T, ATTENTION_TILE);
}

/* Whether the tile of rows that starts at `first` is of one sequence. */
static __device__ inline int is_whole_tile(const attention_decode &a, int first) {
    return a.seqs[first] == a.seqs[least(first + ATTENTION_TILE, a.N) - 1];
}

/* attention_decode.cu: a decoding step, for heads of whole vectors, in float32 without a soft cap; else 0. It
 * stores the rows in the cache itself. With tiles, whole ones were computed, and stored, before. */
#define attention_decode_pieces CUDA_NAME(attention_decode_pieces)
#define attention_decode_bytes  CUDA_NAME(attention_decode_bytes)
int attention_decode_pieces(gpt_ctx *ctx, const attention_decode &op, int has_tiles);
/* Its workspace. */
size_t attention_decode_bytes(const gpt_shape *shape);

/* attention_int8.cu: a decoding step with a cache in int8. */
#define attention_decode_int8 CUDA_NAME(attention_decode_int8)
void attention_decode_int8(gpt_ctx *ctx, const attention_decode &op);

#ifdef CUDA_BF16
/* attention_bf16.cu: on tensor cores; 0 where it has no tiles for this size of head: they are
 * for multiples of 8, up to 128. */
int attention_tiles_forward(gpt_ctx *ctx, const attention_forward &op);
/* The whole tiles of a decoding step, whose rows are in the cache by now. */
int attention_tiles_prefill(gpt_ctx *ctx, const attention_decode &op);
/* Makes args.delta itself, and where op.db is given, args.partial. */
int attention_tiles_backward(gpt_ctx *ctx, const backward_args &args);
#endif

#endif
