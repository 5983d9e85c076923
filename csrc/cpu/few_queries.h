/* few_queries.h: scores and sums of few queries over a KV cache, whose keys are read too few times for packing to
 * pay. Query heads of one key head read each of its keys and values once. */
#ifndef CPU_FEW_QUERIES_H
#define CPU_FEW_QUERIES_H

#include "cpu.h"
#include "simd.h"

/* HEADS: query heads that are computed together, as many as have room for their sums in registers. In float32 only int8
 * caches are read here, a head at a time. KEYS, AT_ONCE: keys, and vectors of channels, whose sums are made together,
 * so that one need not wait for another. */
#ifdef CPU_BF16
enum { HEADS = LANES == 16 ? 4 : 3, KEYS = 4, AT_ONCE = 4 };
#else
enum { HEADS = 1, KEYS = 4, AT_ONCE = 4 };
#endif

/* n int8 as floats, n <= LANES. */
static inline vf vf_get_int8(const int8_t *p, int n) {
    int8_t some[LANES] = {0};
    if (n == LANES) return __builtin_convertvector(vi_from_bytes(p), vf);
    for (int i = 0; i < n; i++) some[i] = p[i];
    return __builtin_convertvector(vi_from_bytes(some), vf);
}

/* n numbers of a row, from the i-th on. */
SPECIALIZED vf row_get(const void *row, int64_t i, int n, int is_int8) {
    return is_int8 ? vf_get_int8((const int8_t *)row + i, n) : vf_get((const elem *)row + i, n);
}

/* Rows of keys or values, (n, HS) of this dtype or int8, and as many that are read next. Those are asked for
 * meanwhile: what is read here is in no cache, and too short for the hardware to see what comes. */
typedef struct few_rows {
    const char *at, *next;
    int n, HS, is_int8;
} few_rows;

/* Where number i of row j is, if row 0 begins at `from`. */
static inline const char *row_at(const few_rows *r, int j, int i, const char *from) {
    return from + ((int64_t)j * r->HS + i) * (int64_t)(r->is_int8 ? 1 : sizeof(elem));
}
static inline void ask_for_row(const few_rows *r, int j, int i, int n) {
    const char *begin = row_at(r, j, i, r->next), *end = row_at(r, j, i + n, r->next);
    for (; begin < end; begin += 64) ask_for(begin);
}

/* ---- scores ---- */

#if defined(__AVX512BF16__)
typedef bf16 query_number; /* pairs are multiplied as they are; int8 is multiplied elsewhere */
#else
typedef float query_number;
#endif

/* sum += the products of 2 LANES numbers. */
SPECIALIZED vf add_pairs(vf sum, const query_number *q, const void *k, int is_int8) {
#if defined(__AVX512BF16__)
    (void)is_int8;
    __m512i x = _mm512_loadu_si512(q), y = _mm512_loadu_si512(k);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
    sum += vf_load(q) * row_get(k, 0, LANES, is_int8);
    return sum + vf_load(q + LANES) * row_get(k, LANES, LANES, is_int8);
#endif
}

/* s (heads, n) = q k^T, with q (heads, HS). */
typedef struct few_scores {
    float *s;
    const query_number *q;
    int64_t lds, ldq;
    few_rows k;
} few_scores;

SPECIALIZED void score_heads(const few_scores *o, int heads, int is_int8) {
    few_rows k = o->k;
    int HS = k.HS;
    k.is_int8 = is_int8;
    for (int j0 = 0; j0 < k.n; j0 += LANES) {
        vf sums[HEADS][LANES];
        for (int j1 = 0; j1 < LANES; j1 += KEYS) {
            vf sum[KEYS][HEADS];
            const char *key[KEYS]; /* the last again, where there are no more */
            UNROLL
            for (int j = 0; j < KEYS; j++) {
                int row = cpu_min(j0 + j1 + j, k.n - 1);
                key[j] = row_at(&k, row, 0, k.at);
                ask_for_row(&k, row, 0, HS);
                UNROLL
                for (int h = 0; h < heads; h++) sum[j][h] = vf_set(0);
            }
            int c = 0;
            for (; c + 2 * LANES <= HS; c += 2 * LANES) {
                UNROLL
                for (int j = 0; j < KEYS; j++) {
                    UNROLL
                    for (int h = 0; h < heads; h++)
                        sum[j][h] = add_pairs(sum[j][h], o->q + h * o->ldq + c,
                                              row_at(&k, 0, c, key[j]), is_int8);
                }
            }
            FOR_LANES (i, m, HS - c) {
                UNROLL
                for (int j = 0; j < KEYS; j++) {
                    UNROLL
                    for (int h = 0; h < heads; h++)
                        sum[j][h] += vf_get(o->q + h * o->ldq + c + i, m) *
                                     row_get(key[j], c + i, m, is_int8);
                }
            }
            UNROLL
            for (int j = 0; j < KEYS; j++) {
                UNROLL
                for (int h = 0; h < heads; h++) sums[h][j1 + j] = sum[j][h];
            }
        }
        for (int h = 0; h < heads; h++) vf_store(o->s + h * o->lds + j0, vf_sums(sums[h]));
    }
}

/* ---- values ---- */

/* sum (heads, HS) = shrink sum + p v, with shrink (heads) and p (heads, n). */
typedef struct few_sums {
    float *sum;
    const float *shrink, *p;
    int64_t ld, ldp;
    few_rows v;
} few_sums;

SPECIALIZED void sum_heads(const few_sums *o, int heads, int is_int8) {
    few_rows v = o->v;
    int c = 0, HS = v.HS;
    v.is_int8 = is_int8;
    for (; c + AT_ONCE * LANES <= HS; c += AT_ONCE * LANES) {
        vf out[HEADS][AT_ONCE];
        UNROLL
        for (int h = 0; h < heads; h++) {
            UNROLL
            for (int i = 0; i < AT_ONCE; i++)
                out[h][i] = vf_load(o->sum + h * o->ld + c + i * LANES) * o->shrink[h];
        }
        for (int j = 0; j < v.n; j++) {
            const char *row = row_at(&v, j, c, v.at);
            ask_for_row(&v, j, c, AT_ONCE * LANES);
            UNROLL
            for (int i = 0; i < AT_ONCE; i++) {
                vf value = row_get(row, i * LANES, LANES, is_int8);
                UNROLL
                for (int h = 0; h < heads; h++) out[h][i] += o->p[h * o->ldp + j] * value;
            }
        }
        UNROLL
        for (int h = 0; h < heads; h++) {
            UNROLL
            for (int i = 0; i < AT_ONCE; i++)
                vf_store(o->sum + h * o->ld + c + i * LANES, out[h][i]);
        }
    }
    for (int h = 0; h < heads; h++) {
        float *sum = o->sum + h * o->ld;
        FOR_LANES (i, k, HS - c) {
            vf out = vf_get(sum + c + i, k) * o->shrink[h];
            for (int j = 0; j < v.n; j++)
                out += o->p[h * o->ldp + j] * row_get(row_at(&v, j, 0, v.at), c + i, k, is_int8);
            vf_put(sum + c + i, out, k);
        }
    }
}

/* ---- a function for each number of heads, so that their sums can be in registers ---- */

#define FEW_HEADS_OF(n)                                                                            \
    __attribute__((noinline)) static void few_score_##n(const few_scores *o) {                     \
        if (n <= HEADS && !o->k.is_int8)                                                           \
            score_heads(o, n, 0);                                                                  \
        else if (n <= HEADS)                                                                       \
            score_heads(o, n, 1);                                                                  \
    }                                                                                              \
    __attribute__((noinline)) static void few_sum_##n(const few_sums *o) {                         \
        if (n <= HEADS && !o->v.is_int8)                                                           \
            sum_heads(o, n, 0);                                                                    \
        else if (n <= HEADS)                                                                       \
            sum_heads(o, n, 1);                                                                    \
    }
FEW_HEADS_OF(1)
FEW_HEADS_OF(2)
FEW_HEADS_OF(3)
FEW_HEADS_OF(4)

static void (*const few_score[])(const few_scores *o) = {NULL, few_score_1, few_score_2,
                                                         few_score_3, few_score_4};
static void (*const few_sum[])(const few_sums *o) = {NULL, few_sum_1, few_sum_2, few_sum_3,
                                                     few_sum_4};

#endif
