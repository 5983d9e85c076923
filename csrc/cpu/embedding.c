/* embedding.c: token and learned-position embedding. */
#include "cpu.h"

#include "simd.h"

typedef struct embedding_args {
    elem *out;
    float *dwte, *dwpe;
    const float *wte, *wpe;
    const elem *dout;
    const int32_t *tokens, *positions;
    int N, T, C;
} embedding_args;

static void embedding_forward_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const embedding_args *a = p;
    for (int64_t n = begin; n < end; n++) {
        elem *out = a->out + n * a->C;
        const float *wte = a->wte + (int64_t)a->tokens[n] * a->C;
        if (!a->wpe) {
            FOR_LANES (c, k, a->C) vf_put(out + c, vf_get(wte + c, k), k);
            continue;
        }
        int64_t t = a->positions ? a->positions[n] : n % a->T;
        const float *wpe = a->wpe + t * a->C;
        FOR_LANES (c, k, a->C) vf_put(out + c, vf_get(wte + c, k) + vf_get(wpe + c, k), k);
    }
}

void cpu_embedding_forward(gpt_ctx *ctx, act *out, const int32_t *tokens, const int32_t *positions,
                           const float *wte, const float *wpe, int N, int T, int C) {
    embedding_args args = {.out = out,
                           .tokens = tokens,
                           .positions = positions,
                           .wte = wte,
                           .wpe = wpe,
                           .N = N,
                           .T = T,
                           .C = C};
    cpu_parallel(ctx, embedding_forward_rows, &args, N, cpu_grain(ctx, N, 16));
}

/* Every thread walks all rows but owns a slice of channels: two rows with the same token never
 * meet, and the order of additions is the order of rows. */
static void embedding_backward_channels(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const embedding_args *a = p;
    int width = (int)(end - begin);
    for (int n = 0; n < a->N; n++) {
        const elem *dout = a->dout + (int64_t)n * a->C + begin;
        float *dwte = a->dwte + (int64_t)a->tokens[n] * a->C + begin;
        FOR_LANES (c, k, width) vf_put(dwte + c, vf_get(dwte + c, k) + vf_get(dout + c, k), k);
        if (!a->dwpe) continue;
        float *dwpe = a->dwpe + (int64_t)(n % a->T) * a->C + begin;
        FOR_LANES (c, k, width) vf_put(dwpe + c, vf_get(dwpe + c, k) + vf_get(dout + c, k), k);
    }
}

void cpu_embedding_backward(gpt_ctx *ctx, float *dwte, float *dwpe, const act *dout,
                            const int32_t *tokens, int N, int T, int C, int V) {
    (void)V;
    embedding_args args = {
        .dwte = dwte, .dwpe = dwpe, .dout = dout, .tokens = tokens, .N = N, .T = T, .C = C};
    cpu_parallel(ctx, embedding_backward_channels, &args, C, 64);
}
