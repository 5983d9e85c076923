/* attention_decode_bf16.c: attention to a KV cache in bf16 or int8. */
#include "attention_tiles_bf16.h"
#include "cache.h"

#include <stdbool.h>

/* One query of each of `heads` heads, which follow each other in t->q and t->out. */
static void decode_queries(const query_tile *t, const bf16 *k, const bf16 *v, const bf16 *next,
                           buffers *w, int heads) {
    int HS = t->head.HS, HS16 = t->head.HS16, n_keys = t->q0 + 1;
    float shrink[HEADS];
    few_scores score = {.s = w->s, .lds = SPAN, .k = {.HS = HS}};
    few_sums sum = {w->sum_out, shrink, w->s, HS16, SPAN, {.HS = HS}};
#if defined(__AVX512BF16__)
    score.q = t->q, score.ldq = HS;
#else
    float *q = w->sum_out + (int64_t)HEADS * HS16; /* widened once for all keys */
    score.q = q, score.ldq = HS16;
    for (int h = 0; h < heads; h++)
        FOR_LANES (c, n, HS) vf_put(q + h * HS16 + c, vf_get(t->q + h * HS + c, n), n);
#endif
    memset(w->sum_out, 0, sizeof(float) * (size_t)heads * (size_t)HS16);
    for (int h = 0; h < heads; h++) w->max[h] = -INFINITY, w->sum[h] = 0;
    for (int k0 = first_seen(t->sight, t->q0), nk; k0 < n_keys; k0 += nk) {
        nk = score.k.n = sum.v.n = cpu_min(SPAN, n_keys - k0);
        const bf16 *keys = k + (int64_t)k0 * HS, *after = keys + (int64_t)nk * HS;
        score.k.at = (const char *)keys;
        score.k.next = sum.v.at = (const char *)(v + (int64_t)k0 * HS);
        sum.v.next = (const char *)(k0 + nk < n_keys ? after : next);
        few_score[heads](&score);
        for (int h = 0; h < heads; h++)
            shrink[h] = softmax_row(w->s + h * SPAN, nk, nk, t->scoring, &w->max[h], &w->sum[h]);
        few_sum[heads](&sum);
    }
    for (int h = 0; h < heads; h++)
        round_row(t->out + h * HS, w->sum_out + (int64_t)h * HS16, 1 / w->sum[h], HS);
}

/* ---- int8 ---- */

/* (rows, n) of an int8 cache as bf16, which has all of these numbers. */
static void widen_int8(bf16 *out, int64_t ldo, const int8_t *x, int64_t ldx, int rows, int n) {
    for (int r = 0; r < rows; r++, out += ldo, x += ldx)
        FOR_LANES (c, k, n) vf_put(out + c, vf_get_int8(x + c, k), k);
}

/* Packs rows `first` to n - 1 of keys and values as pack_keys and pack_columns do, some at a time; the scales are
 * left to forward_tile. */
static void pack_int8(buffers *w, const int8_head *x, int first, int n, head_shape head) {
    enum { WIDTH = TILE * SPAN / PANEL };
    int64_t HS = head.HS, panel = pack_panel_size(head.T);
    for (int t = first; t < n; t += PANEL) {
        int rows = cpu_min(PANEL, n - t);
        for (int c = 0; c < HS; c += WIDTH) {
            int width = cpu_min(WIDTH, (int)HS - c);
            widen_int8(w->p, WIDTH, x->k + t * HS + c, HS, rows, width);
            bf16 *keys = w->keys + t / PANEL * pack_panel_size(HS) + c * PANEL;
            pack_transposed((pair *)keys, w->p, WIDTH, rows, width);
            widen_int8(w->p, WIDTH, x->v + t * HS + c, HS, rows, width);
            bf16 *values = w->values + c / PANEL * panel + t * PANEL;
            pack_columns(values, panel, w->p, WIDTH, width, rows);
        }
    }
}

/* One query of each of `heads` heads. */
static void int8_decode_queries(const query_tile *t, int8_head head, const int8_t *next, buffers *w,
                                int heads) {
    int HS = t->head.HS, HS16 = t->head.HS16;
    int8_queries o = {.sum = w->sum_out,
                      .ld = HS16,
                      .q = t->q,
                      .head = head,
                      .sight = t->sight,
                      .scoring = t->scoring,
                      .position = t->q0,
                      .heads = heads,
                      .HS = HS,
                      .s = w->s,
                      .tile = SPAN,
                      .memory = w->sum_out + (int64_t)HEADS * HS16,
                      .next = next};
    int8_attend(&o);
    for (int h = 0; h < heads; h++)
        round_row(t->out + h * HS, w->sum_out + (int64_t)h * HS16, o.factor[h], HS);
}

/* ---- a step ---- */

typedef struct decode_task {
    gpt_ctx *ctx;
    const attention_decode *op;
} decode_task;

/* Where the keys of query head h begin, of row n's sequence. */
static inline int64_t keys_begin(const attention_decode *a, int n, int h) {
    return cache_begin(a, n, h / (a->NH / a->NKV));
}

/* Packs key head kv of row n's sequence for `run` rows, from the first key that one of them sees. */
static void pack_head(const attention_decode *a, const query_tile *t, int n, int run, int kv,
                      buffers *w) {
    int HS = a->HS, n_keys = a->positions[n] + run, first = first_key(t->sight, a->positions[n]);
    int64_t begin = cache_begin(a, n, kv) + (int64_t)first * HS;
    if (a->scale_k) {
        int8_head head = int8_head_of(a, n, kv);
        pack_int8(w, &head, first, n_keys, t->head);
        return;
    }
    pack_keys(w->keys + first / PANEL * pack_panel_size(HS), (const bf16 *)a->cache_k + begin, HS,
              n_keys - first, HS);
    pack_columns(w->values + (int64_t)first * PANEL, pack_panel_size(t->head.T),
                 (const bf16 *)a->cache_v + begin, HS, HS, n_keys - first);
}

/* Rows n to n + run - 1 of one sequence, for `heads` query heads from h on, which have one key head; t has what all
 * rows share. `next`: where the keys begin that are read next. */
static void decode_run(const attention_decode *a, query_tile t, int n, int run, int h, int heads,
                       int64_t next, buffers *w) {
    int HS = a->HS;
    int64_t begin = keys_begin(a, n, h);
    const bf16 *k = a->cache_k, *v = a->cache_v;
    int8_head head = int8_head_of(a, n, h / (a->NH / a->NKV));
    t.scale_k = head.scale_k, t.scale_v = head.scale_v;
    for (int r = 0; r < run; r += t.nq) {
        t.out = (bf16 *)a->out + ((int64_t)(n + r) * a->NH + h) * HS;
        t.q = (const bf16 *)a->qkv + (n + r) * t.ldq + h * HS;
        t.q0 = a->positions[n] + r;
        t.nq = run > FEW_ROWS ? cpu_min(TILE, run - r) : 1;
        if (run > FEW_ROWS)
            forward_tile(&t, w);
        else if (a->scale_k)
            int8_decode_queries(&t, head, (const int8_t *)a->cache_k + next, w, heads);
        else
            decode_queries(&t, k + begin, v + begin, k + next, w, heads);
    }
}

/* How many query heads from h on, of `end`, read their keys together. */
static int heads_from(const attention_decode *a, int run, int h, int end) {
    int group = a->NH / a->NKV, left = cpu_min((h / group + 1) * group, end) - h;
    if (run > FEW_ROWS) return 1;
    return (int)cpu_div_up(left, cpu_div_up(left, HEADS));
}

/* Item h is a query head. Heads that follow each other share the keys that are packed for them, or read
 * together. */
static void decode_heads(void *p, int thread, int64_t begin, int64_t end) {
    const decode_task *task = p;
    const attention_decode *a = task->op;
    head_shape head = shape_of(a->n_ctx, a->HS);
    buffers w = thread_buffers(task->ctx, thread, head, 0);
    query_tile t = {.ldo = (int64_t)a->NH * a->HS,
                    .ldq = (int64_t)(a->NH + 2 * a->NKV) * a->HS,
                    .head = head,
                    .sight = {a->window, NULL},
                    .scoring = scoring_of(a->scale, a->cap, a->HS)};
    kernel_begin();
    for (int n = 0, run; n < a->N; n += run) {
        run = cache_run(a, n, a->N);
        int after = n + run < a->N ? n + run : n, packed = -1;
        for (int h = (int)begin, heads; h < end; h += heads) {
            int kv = h / (a->NH / a->NKV);
            heads = heads_from(a, run, h, (int)end);
            if (run > FEW_ROWS && kv != packed) pack_head(a, &t, n, run, packed = kv, &w);
            int64_t next =
                h + heads < end ? keys_begin(a, n, h + heads) : keys_begin(a, after, (int)begin);
            decode_run(a, t, n, run, h, heads, next, &w);
        }
    }
    kernel_end();
}

/* Whole groups of query heads where there are enough of them for all threads to end together. */
static int heads_of_piece(const gpt_ctx *ctx, const attention_decode *a) {
    if (a->NKV >= 4 * ctx->n_threads) return a->NH / a->NKV;
    return (int)cpu_div_up(a->NH, ctx->n_threads);
}

CPU_OP(attention_decode) {
    decode_task task = {ctx, op};
    cpu_parallel(ctx, cache_store_rows, (void *)op, op->N, 16);
    cpu_parallel(ctx, decode_heads, &task, op->NH, heads_of_piece(ctx, op));
}
