/* cache.h: the KV cache of a decoding step, shared by attention_fp32.c and attention_bf16.c. */
#ifndef CPU_CACHE_H
#define CPU_CACHE_H

#include "cpu.h"

#include <string.h>

/* Stores the keys and values of rows begin to end - 1 at (seqs[n], positions[n]). */
static void cache_store_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const attention_decode *a = p;
    const elem *qkv = a->qkv;
    elem *cache_k = a->cache_k, *cache_v = a->cache_v;
    size_t bytes = sizeof(elem) * (size_t)a->HS;
    for (int64_t n = begin; n < end; n++) {
        const elem *k = qkv + (n * (a->NH + 2 * a->NKV) + a->NH) * a->HS;
        for (int kv = 0; kv < a->NKV; kv++, k += a->HS) {
            int64_t row = ((int64_t)a->seqs[n] * a->NKV + kv) * a->n_ctx + a->positions[n];
            memcpy(cache_k + row * a->HS, k, bytes);
            memcpy(cache_v + row * a->HS, k + a->NKV * a->HS, bytes);
        }
    }
}

/* The start of the keys, and likewise the values, of one head of row n's sequence. */
static inline int64_t cache_begin(const attention_decode *a, int n, int64_t kv) {
    return ((int64_t)a->seqs[n] * a->NKV + kv) * a->n_ctx * a->HS;
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
