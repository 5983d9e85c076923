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

/* ---- few queries, whose keys are read too few times for packing to pay ---- */

/* Query heads of one key head that read each of its keys once: so many sums fit the registers. KEYS: read together,
 * so that one sum need not wait for another. AT_ONCE: vectors of channels, for the same reason. */
enum { HEADS = LANES == 16 ? 4 : 3, KEYS = 4, AT_ONCE = 4 };

#if defined(__AVX512BF16__)
typedef bf16 query_number; /* pairs are multiplied as they are */

/* sum += the products of LANES pairs. */
static inline vf add_pairs(vf sum, const query_number *q, const bf16 *k) {
    __m512i x = _mm512_loadu_si512(q), y = _mm512_loadu_si512(k);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}
#else
typedef float query_number;

static inline vf add_pairs(vf sum, const query_number *q, const bf16 *k) {
    sum += vf_load(q) * vf_get(k, LANES);
    return sum + vf_load(q + LANES) * vf_get(k + LANES, LANES);
}
#endif

/* s (n) of each of `heads` heads, TILE_K apart, = q k^T with q (heads, HS), ldq apart. Asks for as many rows of
 * `next`. */
SPECIALIZED void dot_heads(float *s, const query_number *q, int64_t ldq, const bf16 *k, int n,
                           int HS, const bf16 *next, int heads) {
    for (int j0 = 0; j0 < n; j0 += LANES) {
        vf sums[HEADS][LANES];
        for (int j1 = 0; j1 < LANES; j1 += KEYS) {
            vf sum[KEYS][HEADS];
            const bf16 *key[KEYS]; /* the last again, where there are no more */
            UNROLL
            for (int j = 0; j < KEYS; j++) {
                int row = cpu_min(j0 + j1 + j, n - 1);
                key[j] = k + (int64_t)row * HS;
                ask_for_row(next + (int64_t)row * HS, HS);
                UNROLL
                for (int h = 0; h < heads; h++) sum[j][h] = vf_set(0);
            }
            int c = 0;
            for (; c + 2 * LANES <= HS; c += 2 * LANES) {
                UNROLL
                for (int j = 0; j < KEYS; j++) {
                    UNROLL
                    for (int h = 0; h < heads; h++)
                        sum[j][h] = add_pairs(sum[j][h], q + h * ldq + c, key[j] + c);
                }
            }
            FOR_LANES (i, m, HS - c) {
                UNROLL
                for (int j = 0; j < KEYS; j++) {
                    UNROLL
                    for (int h = 0; h < heads; h++)
                        sum[j][h] += vf_get(q + h * ldq + c + i, m) * vf_get(key[j] + c + i, m);
                }
            }
            UNROLL
            for (int j = 0; j < KEYS; j++) {
                UNROLL
                for (int h = 0; h < heads; h++) sums[h][j1 + j] = sum[j][h];
            }
        }
        for (int h = 0; h < heads; h++) vf_store(s + h * TILE_K + j0, vf_sums(sums[h]));
    }
}

/* sum (HS) = shrink sum + p v for each of `heads` heads, whose sums are ld apart and whose p TILE_K: v has n rows.
 * Asks for as many rows of `next`, which is read next. */
SPECIALIZED void add_heads(float *sum, int64_t ld, const float *shrink, const float *p,
                           const bf16 *v, int n, int HS, const bf16 *next, int heads) {
    int c = 0;
    for (; c + AT_ONCE * LANES <= HS; c += AT_ONCE * LANES) {
        vf out[HEADS][AT_ONCE];
        UNROLL
        for (int h = 0; h < heads; h++) {
            UNROLL
            for (int i = 0; i < AT_ONCE; i++)
                out[h][i] = vf_load(sum + h * ld + c + i * LANES) * shrink[h];
        }
        for (int j = 0; j < n; j++) {
            const bf16 *row = v + (int64_t)j * HS + c;
            ask_for_row(next + (int64_t)j * HS + c, AT_ONCE * LANES);
            UNROLL
            for (int i = 0; i < AT_ONCE; i++) {
                vf value = vf_get(row + i * LANES, LANES);
                UNROLL
                for (int h = 0; h < heads; h++) out[h][i] += p[h * TILE_K + j] * value;
            }
        }
        UNROLL
        for (int h = 0; h < heads; h++) {
            UNROLL
            for (int i = 0; i < AT_ONCE; i++) vf_store(sum + h * ld + c + i * LANES, out[h][i]);
        }
    }
    for (int h = 0; h < heads; h++, sum += ld, p += TILE_K) {
        FOR_LANES (i, k, HS - c) {
            vf out = vf_get(sum + c + i, k) * shrink[h];
            for (int j = 0; j < n; j++) out += p[j] * vf_get(v + (int64_t)j * HS + c + i, k);
            vf_put(sum + c + i, out, k);
        }
    }
}

/* Each number of heads is a function, so that their sums can be in registers. */
#define FEW_HEADS_OF(n)                                                                            \
    __attribute__((noinline)) static void dot_keys_##n(float *s, const query_number *q,            \
                                                       int64_t ldq, const bf16 *k, int nk, int HS, \
                                                       const bf16 *next) {                         \
        if (n <= HEADS) dot_heads(s, q, ldq, k, nk, HS, next, n);                                  \
    }                                                                                              \
    __attribute__((noinline)) static void add_values_##n(                                          \
        float *sum, int64_t ld, const float *shrink, const float *p, const bf16 *v, int nk,        \
        int HS, const bf16 *next) {                                                                \
        if (n <= HEADS) add_heads(sum, ld, shrink, p, v, nk, HS, next, n);                         \
    }
FEW_HEADS_OF(1)
FEW_HEADS_OF(2)
FEW_HEADS_OF(3)
FEW_HEADS_OF(4)

typedef void dot_keys_fn(float *s, const query_number *q, int64_t ldq, const bf16 *k, int nk,
                         int HS, const bf16 *next);
typedef void add_values_fn(float *sum, int64_t ld, const float *shrink, const float *p,
                           const bf16 *v, int nk, int HS, const bf16 *next);
static dot_keys_fn *const dot_keys[] = {NULL, dot_keys_1, dot_keys_2, dot_keys_3, dot_keys_4};
static add_values_fn *const add_values[] = {NULL, add_values_1, add_values_2, add_values_3,
                                            add_values_4};

/* One query of each of `heads` heads, which follow each other in t->q and t->out. */
static void decode_queries(const query_tile *t, const bf16 *k, const bf16 *v, const bf16 *next,
                           buffers *w, int heads) {
    int HS = t->head.HS, HS16 = t->head.HS16, n_keys = t->q0 + 1;
    int first = first_seen(t->sight, t->q0);
    float shrink[HEADS];
    memset(w->sum_q, 0, sizeof(float) * (size_t)heads * (size_t)HS16);
#if defined(__AVX512BF16__)
    const query_number *q = t->q;
    int64_t ldq = HS;
#else
    query_number *q = w->sum_q + (int64_t)HEADS * HS16; /* widened once for all keys */
    int64_t ldq = HS16;
    for (int h = 0; h < heads; h++)
        FOR_LANES (c, n, HS) vf_put(q + h * ldq + c, vf_get(t->q + h * HS + c, n), n);
#endif
    for (int h = 0; h < heads; h++) w->max[h] = -INFINITY, w->sum[h] = 0;
    for (int k0 = first; k0 < n_keys; k0 += TILE_K) {
        int nk = cpu_min(TILE_K, n_keys - k0);
        const bf16 *keys = k + (int64_t)k0 * HS, *values = v + (int64_t)k0 * HS;
        dot_keys[heads](w->s, q, ldq, keys, nk, HS, values);
        for (int h = 0; h < heads; h++)
            shrink[h] = softmax_row(w->s + h * TILE_K, nk, nk, t->scoring, &w->max[h], &w->sum[h]);
        add_values[heads](w->sum_q, HS16, shrink, w->s, values, nk, HS,
                          k0 + nk < n_keys ? keys + (int64_t)nk * HS : next);
    }
    for (int h = 0; h < heads; h++)
        round_row(t->out + h * HS, w->sum_q + (int64_t)h * HS16, 1 / w->sum[h], HS);
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
        t.nq = run > FEW_ROWS ? cpu_min(TILE_Q, run - r) : 1;
        if (run > FEW_ROWS)
            forward_tile(&t, w);
        else if (a->scale_k)
            int8_decode_query(&t, head, (const int8_t *)a->cache_k + next, w);
        else
            decode_queries(&t, k + begin, v + begin, k + next, w, heads);
    }
}

/* How many query heads from h on, of `end`, read their keys together. */
static int heads_from(const attention_decode *a, int run, int h, int end) {
    int group = a->NH / a->NKV, left = cpu_min((h / group + 1) * group, end) - h;
    if (run > FEW_ROWS || a->scale_k) return 1;
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
