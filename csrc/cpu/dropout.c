/* dropout.c: dropout of a whole tensor in place. Its own mirror, since the key makes the mask. */
#include "cpu.h"

#include "simd.h"

enum { GRAIN = 1 << 14 };

typedef struct dropout_task {
    elem *x;
    gpt_dropout dropout;
} dropout_task;

static void dropout_elements(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const dropout_task *a = p;
    elem *x = a->x + begin;
    FOR_LANES (i, k, (int)(end - begin))
        vf_put(x + i, vf_get(x + i, k) * dropout_lanes(a->dropout, (uint64_t)begin + (uint64_t)i),
               k);
}

CPU_OP(dropout_apply) {
    if (op->dropout.p <= 0) return;
    dropout_task task = {op->x, dropout_at(op->dropout)};
    cpu_parallel(ctx, dropout_elements, &task, op->n, GRAIN);
}
