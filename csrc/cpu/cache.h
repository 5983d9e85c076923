/* cache.h: the KV cache of a decoding step, shared by the files of attention that read it. */
#ifndef CPU_CACHE_H
#define CPU_CACHE_H

#include "cpu.h"
#include "simd.h"

#include <string.h>

/* So many rows of a sequence at most are taken one by one where that differs, which gives each what it would get
 * alone: the rows of a draft in speculative decoding are judged as they will be again. */
enum { FEW_ROWS = 16 };

/* out (n) = x / scale, rounded to int8. Returns the scale, which is not finite where a number of x is not. */
static inline float cache_round(int8_t *out, const elem *x, int n) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf most = {0}, none = {0};
    FOR_LANES (c, k, n) {
        vf some = vf_get(x + c, k);
        most = vf_max(most, vf_max(some, -some));
        none += some * 0.0f;
    }
    float largest = vf_max_lane(most), inverse = largest > 0 ? 127 / largest : 0;
    FOR_LANES (c, k, n) {
        vi bits = (vi)(vf_get(x + c, k) * inverse + shift);
        for (int i = 0; i < k; i++) out[c + i] = (int8_t)bits[i];
    }
    return largest / 127 + vf_sum(none);
}

/* The row of a cache, of HS numbers, that has position 0 of key head kv of row n's sequence. */
static inline int64_t cache_row(const attention_decode *a, int n, int64_t kv) {
    return ((int64_t)a->seqs[n] * a->NKV + kv) * a->n_ctx;
}

/* Stores the keys and values of rows begin to end - 1 at (seqs[n], positions[n]). */
static inline void cache_store_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const attention_decode *a = p;
    const elem *qkv = a->qkv;
    elem *cache_k = a->cache_k, *cache_v = a->cache_v;
    int8_t *int8_k = a->cache_k, *int8_v = a->cache_v;
    size_t bytes = sizeof(elem) * (size_t)a->HS;
    for (int64_t n = begin; n < end; n++) {
        const elem *k = qkv + (n * (a->NH + 2 * a->NKV) + a->NH) * a->HS;
        for (int kv = 0; kv < a->NKV; kv++, k += a->HS) {
            const elem *v = k + a->NKV * a->HS;
            int64_t row = cache_row(a, (int)n, kv) + a->positions[n];
            if (a->scale_k) {
                a->scale_k[row] = cache_round(int8_k + row * a->HS, k, a->HS);
                a->scale_v[row] = cache_round(int8_v + row * a->HS, v, a->HS);
            } else {
                memcpy(cache_k + row * a->HS, k, bytes);
                memcpy(cache_v + row * a->HS, v, bytes);
            }
        }
    }
}

/* The start of the keys, and likewise the values, of one head of row n's sequence. */
static inline int64_t cache_begin(const attention_decode *a, int n, int64_t kv) {
    return cache_row(a, n, kv) * a->HS;
}

/* How many rows from n on follow each other in one sequence; at most `most`. */
static inline int cache_run(const attention_decode *a, int n, int most) {
    int run = 1;
    while (run < most && n + run < a->N && a->seqs[n + run] == a->seqs[n] &&
           a->positions[n + run] == a->positions[n] + run)
        run++;
    return run;
}

#endif
