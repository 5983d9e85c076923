/* cache.h: the KV cache of a decoding step, shared by attention.c and attention_bf16.c. */
#ifndef CPU_CACHE_H
#define CPU_CACHE_H

#include "cpu.h"

#include <string.h>

/* Row n of a step stands at (seqs[n], positions[n]) of k and v, each (n_seq, NKV, n_ctx, HS). */
typedef struct cache_args {
    elem *k, *v;
    const elem *qkv; /* (N, QKV) */
    const int32_t *seqs, *positions;
    int NH, NKV, HS, n_ctx;
} cache_args;

/* Stores the keys and values of rows begin to end - 1. */
static void cache_store_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const cache_args *a = p;
    size_t bytes = sizeof(elem) * (size_t)a->HS;
    for (int64_t n = begin; n < end; n++) {
        const elem *k = a->qkv + (n * (a->NH + 2 * a->NKV) + a->NH) * a->HS;
        for (int kv = 0; kv < a->NKV; kv++, k += a->HS) {
            int64_t row = ((int64_t)a->seqs[n] * a->NKV + kv) * a->n_ctx + a->positions[n];
            memcpy(a->k + row * a->HS, k, bytes);
            memcpy(a->v + row * a->HS, k + a->NKV * a->HS, bytes);
        }
    }
}

/* Where the keys, and likewise the values, of one head of row n's sequence begin. */
static inline int64_t cache_begin(const cache_args *a, int n, int64_t kv) {
    return ((int64_t)a->seqs[n] * a->NKV + kv) * a->n_ctx * a->HS;
}

/* How many rows from n on, of N, follow each other in one sequence; at most `most`. */
static inline int cache_run(const cache_args *a, int n, int N, int most) {
    int run = 1;
    while (run < most && n + run < N && a->seqs[n + run] == a->seqs[n] &&
           a->positions[n + run] == a->positions[n] + run)
        run++;
    return run;
}

#endif
