/* embedding.c: token and learned-position embedding. */
#include "cpu.h"

#include "simd.h"

/* Channels of a row from c on: x, and in `rest` what the rounded ones lack. */
static inline void put_sum(elem *out, elem *rest, vf x, int c, int k) {
    vf_put(out + c, x, k);
    if (rest) vf_put(rest + c, x - vf_get(out + c, k), k);
}

static void embedding_forward_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const embedding_forward *a = p;
    elem *all_out = a->out, *all_rest = a->rest;
    float scale = a->scale > 0 ? a->scale : 1;
    for (int64_t n = begin; n < end; n++) {
        elem *out = all_out + n * a->C, *rest = all_rest ? all_rest + n * a->C : NULL;
        const float *wte = a->wte + (int64_t)a->tokens[n] * a->C;
        if (!a->wpe) {
            FOR_LANES (c, k, a->C) put_sum(out, rest, vf_get(wte + c, k) * scale, c, k);
            continue;
        }
        int64_t t = a->positions ? a->positions[n] : n % a->T;
        const float *wpe = a->wpe + t * a->C;
        FOR_LANES (c, k, a->C)
            put_sum(out, rest, vf_get(wte + c, k) * scale + vf_get(wpe + c, k), c, k);
    }
}

CPU_OP(embedding_forward) {
    cpu_parallel(ctx, embedding_forward_rows, (void *)op, op->N, cpu_grain(ctx, op->N, 16));
}

/* Every thread walks all rows but owns a slice of channels: two rows with the same token never
 * meet, and the order of additions is the order of rows. */
static void embedding_backward_channels(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const embedding_backward *a = p;
    const elem *all_dout = a->dout;
    int width = (int)(end - begin);
    float scale = a->scale > 0 ? a->scale : 1;
    for (int n = 0; n < a->N; n++) {
        const elem *dout = all_dout + (int64_t)n * a->C + begin;
        float *dwte = a->dwte ? a->dwte + (int64_t)a->tokens[n] * a->C + begin : NULL;
        if (dwte)
            FOR_LANES (c, k, width)
                vf_put(dwte + c, vf_get(dwte + c, k) + vf_get(dout + c, k) * scale, k);
        if (!a->dwpe) continue;
        int64_t t = a->positions ? a->positions[n] : n % a->T;
        float *dwpe = a->dwpe + t * a->C + begin;
        FOR_LANES (c, k, width) vf_put(dwpe + c, vf_get(dwpe + c, k) + vf_get(dout + c, k), k);
    }
}

CPU_OP(embedding_backward) {
    if (op->dwte || op->dwpe) cpu_parallel(ctx, embedding_backward_channels, (void *)op, op->C, 64);
}
