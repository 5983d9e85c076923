/* known_rows.h: the rows that have a target. The others, such as those of what a user says in a conversation, have
 * neither a loss nor a gradient, so the output head leaves them out of its products. */
#ifndef CPU_KNOWN_ROWS_H
#define CPU_KNOWN_ROWS_H

#include "cpu.h"

#include <string.h>

/* Lists the rows that have a target, and sets what the others give to 0. Returns how many it lists: one at least,
 * since products of no rows would not set their output. */
static inline int list_known_rows(int32_t *known /* (N) */, float *losses /* (N) */,
                                  elem *dx /* (N, C) or NULL */, const int32_t *targets, int N,
                                  int C) {
    int n_known = 0;
    for (int n = 0; n < N; n++) {
        if (targets[n] >= 0) {
            known[n_known++] = n;
            continue;
        }
        losses[n] = 0;
        if (dx) memset(dx + (int64_t)n * C, 0, sizeof(elem) * (size_t)C);
    }
    if (!n_known) known[n_known++] = 0;
    return n_known;
}

typedef struct known_task {
    elem *out;
    const elem *x;
    const int32_t *known; /* (n) */
    int C;
} known_task;

/* out (n, C) = the known rows of x (N, C). */
static inline void gather_known_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const known_task *a = p;
    for (int64_t i = begin; i < end; i++)
        memcpy(a->out + i * a->C, a->x + (int64_t)a->known[i] * a->C, sizeof(elem) * (size_t)a->C);
}

/* The known rows of out (N, C) = x (n, C). */
static inline void scatter_known_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const known_task *a = p;
    for (int64_t i = begin; i < end; i++)
        memcpy(a->out + (int64_t)a->known[i] * a->C, a->x + i * a->C, sizeof(elem) * (size_t)a->C);
}

#endif
