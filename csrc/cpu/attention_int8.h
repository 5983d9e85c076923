/* attention_int8.h: attention of few queries to a KV cache in int8, shared by attention_fp32.c and
 * attention_decode_bf16.c.
 *
 * A key of a head is scale_k k, a value scale_v v, with int8 k and v in [-127, 127] and a float32 scale for each.
 * Scales are factors of scores and of probabilities, so int8 is what is read and multiplied. With VNNI the
 * query is rounded to 16 bits, as an upper and a lower int8, and scores are sums of integers. */
#ifndef CPU_ATTENTION_INT8_H
#define CPU_ATTENTION_INT8_H

#include "cache.h"
#include "few_queries.h"
#include "softmax.h"

#include <math.h>

/* The keys and values of a head of a sequence, from position 0 on. */
typedef struct int8_head {
    const int8_t *k, *v;            /* (n_ctx, HS) */
    const float *scale_k, *scale_v; /* (n_ctx) */
} int8_head;

/* That of key head kv of row n's sequence. */
static inline int8_head int8_head_of(const attention_decode *a, int n, int64_t kv) {
    int64_t row = cache_row(a, n, kv);
    if (!a->scale_k) return (int8_head){NULL};
    return (int8_head){(const int8_t *)a->cache_k + row * a->HS,
                       (const int8_t *)a->cache_v + row * a->HS, a->scale_k + row,
                       a->scale_v + row};
}

/* s *= factor, n numbers each. */
static inline void scale_by(float *s, const float *factor, int n) {
    FOR_LANES (j, k, n) vf_put(s + j, vf_get(s + j, k) * vf_get(factor + j, k), k);
}

/* Bytes of the memory that a query takes. */
static inline size_t int8_query_bytes(int HS) {
    return (size_t)cpu_round_up(HS, 64) * sizeof(float);
}

/* ---- scores ---- */

#if defined(__AVX512VNNI__)

enum { INT8_STEP = 64 }; /* channels at once */

/* q is about scale (256 upper + lower). Bytes of keys become unsigned by 128 more, for which the sums start
 * with less. */
typedef struct int8_query {
    int8_t *upper, *lower; /* (HS, zeros up to a whole step) */
    float scale;
    __m512i upper_start, lower_start;
} int8_query;

static inline int8_query int8_query_of(const elem *q, int HS, void *memory) {
    int size = (int)cpu_round_up(HS, INT8_STEP);
    int8_query out = {.upper = memory, .lower = (int8_t *)memory + size};
    vf most = {0},
       none = {0}; /* none: 0, or NaN where a number is not finite, which a maximum loses */
    FOR_LANES (c, k, HS) {
        vf x = vf_get(q + c, k);
        most = vf_max(most, vf_max(x, -x));
        none += x * 0.0f;
    }
    float largest = vf_max_lane(most), inverse = largest > 0 ? 32512 / largest : 0;
    out.scale = largest / 32512 + vf_sum(none);
    memset(memory, 0, 2 * (size_t)size);
    FOR_LANES (c, k, HS) {
        __m512i x = _mm512_cvtps_epi32((__m512)(vf_get(q + c, k) * inverse));
        __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
        __m512i lower = _mm512_sub_epi32(x, _mm512_slli_epi32(upper, 8));
        _mm_storeu_si128((void *)(out.upper + c), _mm512_cvtepi32_epi8(upper));
        _mm_storeu_si128((void *)(out.lower + c), _mm512_cvtepi32_epi8(lower));
    }
    __m512i zero = _mm512_set1_epi8((char)0x80);
    out.upper_start = out.lower_start = _mm512_setzero_si512();
    for (int c = 0; c < HS; c += INT8_STEP) {
        __m512i upper = _mm512_loadu_si512(out.upper + c);
        __m512i lower = _mm512_loadu_si512(out.lower + c);
        out.upper_start = _mm512_dpbusd_epi32(out.upper_start, zero, upper);
        out.lower_start = _mm512_dpbusd_epi32(out.lower_start, zero, lower);
    }
    out.upper_start = _mm512_sub_epi32(_mm512_setzero_si512(), out.upper_start);
    out.lower_start = _mm512_sub_epi32(_mm512_setzero_si512(), out.lower_start);
    return out;
}

static inline vf int8_dot(const int8_query *q, const int8_t *k, int HS) {
    __m512i upper = q->upper_start, lower = q->lower_start;
    for (int c = 0; c < HS; c += INT8_STEP) {
        int n = cpu_min(INT8_STEP, HS - c);
        __m512i key = n == INT8_STEP
                          ? _mm512_loadu_si512(k + c)
                          : _mm512_maskz_loadu_epi8((__mmask64)((UINT64_C(1) << n) - 1), k + c);
        key = _mm512_xor_si512(key, _mm512_set1_epi8((char)0x80));
        upper = _mm512_dpbusd_epi32(upper, key, _mm512_loadu_si512(q->upper + c));
        lower = _mm512_dpbusd_epi32(lower, key, _mm512_loadu_si512(q->lower + c));
    }
    /* Together they would not fit into int32 for heads of more than 8,320 channels. */
    return (vf)_mm512_cvtepi32_ps(upper) * 256.0f + (vf)_mm512_cvtepi32_ps(lower);
}

/* s (n) = scale q k^T without the keys' scales. */
static inline void int8_dot_keys(float *s, const int8_query *q, few_rows k) {
    vf sums[LANES];
    for (int j0 = 0; j0 < k.n; j0 += LANES) {
        int keys = cpu_min(LANES, k.n - j0);
        for (int j = 0; j < keys; j++) {
            sums[j] = int8_dot(q, (const int8_t *)row_at(&k, j0 + j, 0, k.at), k.HS);
            ask_for_row(&k, j0 + j, 0, k.HS);
        }
        for (int j = keys; j < LANES; j++) sums[j] = (vf){0};
        vf_put(s + j0, vf_sums(sums) * q->scale, keys);
    }
}

#endif

/* ---- queries ---- */

/* One query, at a position, of each of `heads` heads that have one key head. */
typedef struct int8_queries {
    float *sum;    /* (heads, HS), ld apart: times factor what the heads give */
    const elem *q; /* (heads, HS) */
    int8_head head;
    sight sight;
    scoring scoring;
    int position, heads, HS, tile;
    int64_t ld;
    float *s;           /* (heads, tile) */
    void *memory;       /* heads of int8_query_bytes */
    const int8_t *next; /* the keys that are read next */
    float factor[HEADS];
} int8_queries;

static inline void int8_attend(int8_queries *o) {
    int n_keys = o->position + 1, heads = o->heads, HS = o->HS;
    float max[HEADS], total[HEADS] = {0}, shrink[HEADS];
    few_rows keys = {.HS = HS, .is_int8 = 1};
    few_sums sum = {o->sum, shrink, o->s, o->ld, o->tile, keys};
#if defined(__AVX512VNNI__)
    int8_query query[HEADS];
#else
    float *q = o->memory;
    few_scores score = {o->s, q, o->tile, cpu_round_up(HS, 64), keys};
#endif
    for (int h = 0; h < heads; h++) {
        max[h] = -INFINITY;
        memset(o->sum + h * o->ld, 0, sizeof(float) * (size_t)HS);
#if defined(__AVX512VNNI__)
        query[h] = int8_query_of(o->q + h * HS, HS, (char *)o->memory + h * int8_query_bytes(HS));
#else
        FOR_LANES (c, k, HS) vf_put(q + h * score.ldq + c, vf_get(o->q + h * HS + c, k), k);
#endif
    }
    for (int k0 = first_seen(o->sight, o->position), nk; k0 < n_keys; k0 += nk) {
        nk = keys.n = sum.v.n = cpu_min(o->tile, n_keys - k0);
        const int8_t *key = o->head.k + (int64_t)k0 * HS, *value = o->head.v + (int64_t)k0 * HS;
        keys.at = (const char *)key;
        keys.next = sum.v.at = (const char *)value;
        sum.v.next = (const char *)(k0 + nk < n_keys ? key + (int64_t)nk * HS : o->next);
#if defined(__AVX512VNNI__)
        for (int h = 0; h < heads; h++) int8_dot_keys(o->s + h * o->tile, &query[h], keys);
#else
        score.k = keys;
        few_score[heads](&score);
#endif
        for (int h = 0; h < heads; h++) {
            float *s = o->s + h * o->tile;
            scale_by(s, o->head.scale_k + k0, nk);
            shrink[h] = softmax_row(s, nk, nk, o->scoring, &max[h], &total[h]);
            scale_by(s, o->head.scale_v + k0, nk);
        }
        few_sum[heads](&sum);
    }
    for (int h = 0; h < heads; h++) o->factor[h] = 1 / total[h];
}

#endif
