/* attention_decode_bf16.c: attention to a KV cache in bf16 or int8. */
#include "attention_tiles_bf16.h"
#include "cache.h"

#include <stdbool.h>

/* Asks for the lines of n numbers: what is read here is in no cache, and too short for the hardware
 * to see what comes. */
static inline void ask_for_row(const bf16 *x, int n) {
    enum { LINE = 64 / sizeof(bf16) };
    for (int i = 0; i < n; i += LINE) ask_for(x + i);
}

/* sum (HS) = shrink sum + p v: v has n rows. Four vectors of channels at a time, so that one sum need
 * not wait for another. Asks for as many rows of `next`, which is read next. */
static void add_values(float *sum, float shrink, const float *p, const bf16 *v, int n, int HS,
                       const bf16 *next) {
    enum { AT_ONCE = 4 };
    int c = 0;
    for (; c + AT_ONCE * LANES <= HS; c += AT_ONCE * LANES) {
        vf out[AT_ONCE];
        UNROLL
        for (int i = 0; i < AT_ONCE; i++) out[i] = vf_load(sum + c + i * LANES) * shrink;
        for (int j = 0; j < n; j++) {
            const bf16 *row = v + (int64_t)j * HS + c;
            ask_for_row(next + (int64_t)j * HS + c, AT_ONCE * LANES);
            UNROLL
            for (int i = 0; i < AT_ONCE; i++) out[i] += p[j] * vf_get(row + i * LANES, LANES);
        }
        UNROLL
        for (int i = 0; i < AT_ONCE; i++) vf_store(sum + c + i * LANES, out[i]);
    }
    FOR_LANES (i, k, HS - c) {
        vf out = vf_get(sum + c + i, k) * shrink;
        for (int j = 0; j < n; j++) out += p[j] * vf_get(v + (int64_t)j * HS + c + i, k);
        vf_put(sum + c + i, out, k);
    }
}

/* sum += the products of LANES pairs. */
static inline vf add_pairs(vf sum, const bf16 *a, const bf16 *b) {
#if defined(__AVX512BF16__)
    __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
    sum += vf_get(a, LANES) * vf_get(b, LANES);
    return sum + vf_get(a + LANES, LANES) * vf_get(b + LANES, LANES);
#endif
}

static inline vf dot_lanes(const bf16 *a, const bf16 *b, int n) {
    vf sum = {0};
    int c = 0;
    for (; c + 2 * LANES <= n; c += 2 * LANES) sum = add_pairs(sum, a + c, b + c);
    FOR_LANES (i, m, n - c) sum += vf_get(a + c + i, m) * vf_get(b + c + i, m);
    return sum;
}

/* s (n) = q k^T. Asks for as many rows of `next`. */
static void dot_keys(float *s, const bf16 *q, const bf16 *k, int n, int HS, const bf16 *next) {
    vf sums[LANES];
    for (int j0 = 0; j0 < n; j0 += LANES) {
        int keys = cpu_min(LANES, n - j0);
        for (int j = 0; j < keys; j++, k += HS, next += HS) {
            sums[j] = dot_lanes(q, k, HS);
            ask_for_row(next, HS);
        }
        for (int j = keys; j < LANES; j++) sums[j] = (vf){0};
        vf_store(s + j0, vf_sums(sums));
    }
}

/* One query: its keys are read too few times for packing to pay. */
static void decode_query(const query_tile *t, const bf16 *k, const bf16 *v, const bf16 *next,
                         buffers *w) {
    int HS = t->head.HS, n_keys = t->q0 + 1;
    int first = first_seen(t->sight, t->q0);
    float max = -INFINITY, sum = 0;
    memset(w->sum_q, 0, sizeof(float) * (size_t)HS);
    for (int k0 = first; k0 < n_keys; k0 += TILE_K) {
        int nk = cpu_min(TILE_K, n_keys - k0);
        const bf16 *keys = k + (int64_t)k0 * HS, *values = v + (int64_t)k0 * HS;
        dot_keys(w->s, t->q, keys, nk, HS, values);
        float shrink = softmax_row(w->s, nk, nk, t->scoring, &max, &sum);
        add_values(w->sum_q, shrink, w->s, values, nk, HS,
                   k0 + nk < n_keys ? keys + (int64_t)nk * HS : next);
    }
    round_row(t->out, w->sum_q, 1 / sum, HS);
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
    enum { WIDTH = TILE_Q * TILE_K / PANEL };
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

/* One query; the first row of sum_q is its result, the others are free. */
static void int8_decode_query(const query_tile *t, int8_head head, const int8_t *next, buffers *w) {
    int HS = t->head.HS;
    float factor = int8_attend(w->sum_q, t->q, head, t->sight, t->q0, t->scoring, HS, w->s, TILE_K,
                               w->sum_q + 4 * t->head.HS16, next);
    round_row(t->out, w->sum_q, factor, HS);
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

/* Rows n to n + run - 1 of one sequence, for query head h; t has what all rows share. `next`: where the keys
 * begin that are read next. */
static void decode_run(const attention_decode *a, query_tile t, int n, int run, int h, int64_t next,
                       buffers *w) {
    int HS = a->HS;
    int64_t begin = keys_begin(a, n, h);
    const bf16 *k = a->cache_k, *v = a->cache_v;
    int8_head head = int8_head_of(a, n, h / (a->NH / a->NKV));
    t.scale_k = head.scale_k, t.scale_v = head.scale_v;
    for (int r = 0; r < run; r += t.nq) {
        t.out = (bf16 *)a->out + ((int64_t)(n + r) * a->NH + h) * HS;
        t.q = (const bf16 *)a->qkv + (n + r) * t.ldq + h * HS;
        t.q0 = a->positions[n] + r;
        t.nq = run > FEW_ROWS ? cpu_min(TILE_Q, run - r) : 1;
        if (run > FEW_ROWS)
            forward_tile(&t, w);
        else if (a->scale_k)
            int8_decode_query(&t, head, (const int8_t *)a->cache_k + next, w);
        else
            decode_query(&t, k + begin, v + begin, k + next, w);
    }
}

/* Item h is a query head. Heads that follow each other share the keys that are packed for them, and find
 * those of single rows in a cache. */
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
        for (int h = (int)begin; h < end; h++) {
            int kv = h / (a->NH / a->NKV);
            if (run > FEW_ROWS && kv != packed) pack_head(a, &t, n, run, packed = kv, &w);
            int64_t next = h + 1 < end ? keys_begin(a, n, h + 1) : keys_begin(a, after, (int)begin);
            decode_run(a, t, n, run, h, next, &w);
        }
    }
    kernel_end();
}

CPU_OP(attention_decode) {
    decode_task task = {ctx, op};
    cpu_parallel(ctx, cache_store_rows, (void *)op, op->N, 16);
    cpu_parallel(ctx, decode_heads, &task, op->NH, 1);
}
