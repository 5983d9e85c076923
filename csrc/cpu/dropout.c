/* dropout.c: dropout of a whole tensor in place. Its own mirror, since the key makes the mask. */
#include "cpu.h"

typedef struct dropout_args {
    float *x;
    gpt_dropout dropout;
} dropout_args;

static void dropout_elements(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const dropout_args *a = p;
    for (int64_t i = begin; i < end; i++) a->x[i] *= dropout_factor(a->dropout, (uint64_t)i);
}

void cpu_dropout_forward(gpt_ctx *ctx, act *x, int64_t n, gpt_dropout dropout) {
    if (dropout.p <= 0) return;
    dropout_args args = {x, dropout};
    cpu_parallel(ctx, dropout_elements, &args, n, cpu_grain(ctx, n, 4096));
}
