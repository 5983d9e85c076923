/* dropout.c: dropout of a whole tensor in place. Its own mirror, since the key makes the mask. */
#include "cpu.h"

#include "simd.h"

enum { GRAIN = 1 << 14 };

typedef struct dropout_args {
    elem *x;
    gpt_dropout dropout;
} dropout_args;

static void dropout_elements(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const dropout_args *a = p;
    elem *x = a->x + begin;
    FOR_LANES (i, k, (int)(end - begin))
        vf_put(x + i, vf_get(x + i, k) * dropout_lanes(a->dropout, (uint64_t)begin + (uint64_t)i),
               k);
}

void cpu_dropout_forward(gpt_ctx *ctx, act *x, int64_t n, gpt_dropout_site dropout) {
    if (dropout.p <= 0) return;
    dropout_args args = {x, dropout_at(dropout)};
    cpu_parallel(ctx, dropout_elements, &args, n, GRAIN);
}
