/* attention_int8.h: a query's attention to a KV cache in int8, shared by attention_fp32.c and
 * attention_decode_bf16.c.
 *
 * A key of a head is scale_k k, a value scale_v v, with int8 k and v in [-127, 127] and a float32 scale for each.
 * Scales are factors of scores and of probabilities, so int8 is what is read and multiplied. With VNNI the
 * query is rounded to 16 bits, as an upper and a lower int8, and scores are sums of integers. */
#ifndef CPU_ATTENTION_INT8_H
#define CPU_ATTENTION_INT8_H

#include "cache.h"
#include "softmax.h"

#include <math.h>

#if defined(__AVX512VNNI__)
enum { INT8_STEP = 64 }; /* channels at once */
#else
enum { INT8_STEP = LANES };
#endif

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

/* n int8 as floats, n <= LANES. */
static inline vf vf_get_int8(const int8_t *p, int n) {
    int8_t some[LANES] = {0};
    if (n == LANES) return __builtin_convertvector(vi_from_bytes(p), vf);
    for (int i = 0; i < n; i++) some[i] = p[i];
    return __builtin_convertvector(vi_from_bytes(some), vf);
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

#else

typedef struct int8_query {
    float *q; /* (HS) */
    float scale;
} int8_query;

static inline int8_query int8_query_of(const elem *q, int HS, void *memory) {
    int8_query out = {memory, 1};
    FOR_LANES (c, k, HS) vf_put(out.q + c, vf_get(q + c, k), k);
    return out;
}

static inline vf int8_dot(const int8_query *q, const int8_t *k, int HS) {
    vf sum = {0};
    FOR_LANES (c, m, HS) sum += vf_get(q->q + c, m) * vf_get_int8(k + c, m);
    return sum;
}

#endif

/* Asks for the lines of n int8. */
static inline void ask_for_int8(const int8_t *x, int n) {
    for (int i = 0; i < n; i += 64) ask_for(x + i);
}

/* s (n) = scale q k^T. Asks for as many rows of `next`. */
static inline void int8_dot_keys(float *s, const int8_query *q, const int8_t *k, const float *scale,
                                 int n, int HS, const int8_t *next) {
    vf sums[LANES];
    for (int j0 = 0; j0 < n; j0 += LANES) {
        int keys = cpu_min(LANES, n - j0);
        for (int j = 0; j < keys; j++, k += HS, next += HS) {
            sums[j] = int8_dot(q, k, HS);
            ask_for_int8(next, HS);
        }
        for (int j = keys; j < LANES; j++) sums[j] = (vf){0};
        vf_put(s + j0, vf_sums(sums) * q->scale * vf_get(scale + j0, keys), keys);
    }
}

/* ---- values ---- */

/* sum (HS) = shrink sum + p v: v has n rows. Asks for as many rows of `next`. */
static inline void int8_add_values(float *sum, float shrink, const float *p, const int8_t *v, int n,
                                   int HS, const int8_t *next) {
    enum { AT_ONCE = 4 };
    int c = 0;
    for (; c + AT_ONCE * LANES <= HS; c += AT_ONCE * LANES) {
        vf out[AT_ONCE];
        UNROLL
        for (int i = 0; i < AT_ONCE; i++) out[i] = vf_load(sum + c + i * LANES) * shrink;
        for (int j = 0; j < n; j++) {
            const int8_t *row = v + (int64_t)j * HS + c;
            ask_for_int8(next + (int64_t)j * HS + c, AT_ONCE * LANES);
            UNROLL
            for (int i = 0; i < AT_ONCE; i++) out[i] += p[j] * vf_get_int8(row + i * LANES, LANES);
        }
        UNROLL
        for (int i = 0; i < AT_ONCE; i++) vf_store(sum + c + i * LANES, out[i]);
    }
    FOR_LANES (i, k, HS - c) {
        vf out = vf_get(sum + c + i, k) * shrink;
        for (int j = 0; j < n; j++) out += p[j] * vf_get_int8(v + (int64_t)j * HS + c + i, k);
        vf_put(sum + c + i, out, k);
    }
}

/* ---- a query ---- */

/* Returns 1 / the sum of exponentials, which multiplies sum (HS), of a query at a position. s has room for
 * `tile` scores, and memory is that of int8_query_bytes. `next` are the keys that are read next. */
static inline float int8_attend(float *sum, const elem *q, int8_head head, sight sight,
                                int position, scoring how, int HS, float *s, int tile, void *memory,
                                const int8_t *next) {
    int n_keys = position + 1;
    int8_query query = int8_query_of(q, HS, memory);
    float max = -INFINITY, total = 0;
    memset(sum, 0, sizeof(float) * (size_t)HS);
    for (int k0 = first_seen(sight, position), nk; k0 < n_keys; k0 += nk) {
        nk = cpu_min(tile, n_keys - k0);
        const int8_t *keys = head.k + (int64_t)k0 * HS, *values = head.v + (int64_t)k0 * HS;
        int8_dot_keys(s, &query, keys, head.scale_k + k0, nk, HS, values);
        float shrink = softmax_row(s, nk, nk, how, &max, &total);
        scale_by(s, head.scale_v + k0, nk);
        int8_add_values(sum, shrink, s, values, nk, HS,
                        k0 + nk < n_keys ? keys + (int64_t)nk * HS : next);
    }
    return 1 / total;
}

#endif
