/* attention_bf16.c: causal attention in bf16 with float32 scores and sums: forward, backward,
 * decode. Tiles as in attention_fp32.c; every product of a tile is a row-major operand times a packed one
 * (pack.h), so keys and values are packed once for all queries of a head. */
#include "cache.h"
#include "kernel.h"
#include "softmax.h"

/* Few queries, so that little is computed of what the causal mask hides: two tiles of AMX. */
enum { TILE_Q = 32, TILE_K = 256 };

/* Sizes of one head, and what of them is rounded up to whole panels. */
typedef struct head_shape {
    int T, HS, T16, HS16;
} head_shape;

static head_shape shape_of(int T, int HS) {
    return (head_shape){T, HS, (int)cpu_round_up(T, PANEL), (int)cpu_round_up(HS, PANEL)};
}

/* The memory of a thread for one head. */
typedef struct buffers {
    bf16 *keys;         /* k as rows, transposed: (HS, T) in panels of 16 keys */
    bf16 *values;       /* v as columns: (T, HS) in panels of 16 channels */
    float *s;           /* (TILE_Q, TILE_K) scores, then probabilities */
    float *sum_q;       /* (TILE_Q, HS16) out of a tile, or dq */
    float *max, *sum;   /* (TILE_Q) */
    bf16 *p;            /* (TILE_Q, TILE_K) probabilities, or ds */
    bf16 *values_rows;  /* backward: v as rows, transposed: (HS, T) in panels of 16 keys */
    bf16 *keys_columns; /* k as columns: (T, HS) in panels of 16 channels */
    float *ds;          /* (TILE_Q, TILE_K) */
    bf16 *p_panels;     /* (TILE_Q, TILE_K) in panels of 16 keys */
    bf16 *ds_panels;    /* the same */
    bf16 *q_turned;     /* (HS, TILE_Q) */
    bf16 *dout_turned;  /* (HS, TILE_Q) */
    float *dk_turned;   /* (HS, T16) */
    float *dv_turned;   /* (HS, T16) */
} buffers;

static void *take(char **at, size_t *used, int64_t bytes) {
    size_t size = (size_t)cpu_round_up(bytes, 64);
    void *place = *at ? *at + *used : NULL;
    *used += size;
    return place;
}

/* Lays the buffers out from `at`, or only counts where that is NULL. Returns the bytes. */
static size_t lay_out(buffers *b, char *at, head_shape h, int training) {
    size_t used = 0;
    int64_t f = sizeof(float), e = sizeof(bf16), tile = TILE_Q * TILE_K;
    int64_t rows = h.T16 * pack_pairs(h.HS) * PAIR, columns = h.HS16 * pack_pairs(h.T) * PAIR;
    b->keys = take(&at, &used, e * rows);
    b->values = take(&at, &used, e * columns);
    b->s = take(&at, &used, f * tile);
    b->sum_q = take(&at, &used, f * TILE_Q * h.HS16);
    b->max = take(&at, &used, f * TILE_Q);
    b->sum = take(&at, &used, f * TILE_Q);
    b->p = take(&at, &used, e * tile);
    if (!training) return used;
    b->values_rows = take(&at, &used, e * rows);
    b->keys_columns = take(&at, &used, e * columns);
    b->ds = take(&at, &used, f * tile);
    b->p_panels = take(&at, &used, e * tile);
    b->ds_panels = take(&at, &used, e * tile);
    b->q_turned = take(&at, &used, e * h.HS * TILE_Q);
    b->dout_turned = take(&at, &used, e * h.HS * TILE_Q);
    b->dk_turned = take(&at, &used, f * h.HS * h.T16);
    b->dv_turned = take(&at, &used, f * h.HS * h.T16);
    return used;
}

CPU_WORKSPACE(attention_workspace) {
    buffers none;
    size_t bytes = lay_out(&none, NULL, shape_of(shape->T, shape->HS), shape->training);
    return bytes * (size_t)n_threads;
}

static buffers thread_buffers(const gpt_ctx *ctx, int thread, head_shape head, int training) {
    buffers b;
    size_t bytes = lay_out(&b, NULL, head, training);
    lay_out(&b, (char *)ctx->workspace + bytes * (size_t)thread, head, training);
    return b;
}

/* (n, HS) rows x, ldx apart, as columns: their transpose in panels. */
static void pack_keys(bf16 *out, const bf16 *x, int64_t ldx, int n, int HS) {
    for (int t = 0; t < n; t += PANEL)
        pack_transposed((pair *)(out + t / PANEL * pack_panel_size(HS)), x + t * ldx, ldx,
                        cpu_min(PANEL, n - t), HS);
}

/* c (rows, n columns) = a (rows, K) b, or c += a b, over any number of panels of b. */
static void multiply(float *c, int64_t ldc, const bf16 *a, int64_t lda, const bf16 *b,
                     int64_t panel, int rows, int n, int K, int add) {
    for (int col = 0; col < n; col += GROUP * PANEL) {
        kernel_operands o = {.a = a,
                             .b = b + col / PANEL * panel,
                             .c = c + col,
                             .lda = lda,
                             .panel = panel,
                             .ldc = ldc,
                             .K = K};
        kernel_product(o, rows, (int)pack_panels(cpu_min(GROUP * PANEL, n - col)), add);
    }
}

/* Dropout of nq x nk numbers, whose first element has this index and whose rows are T apart. */
static void drop_tile(float *s, int nq, int nk, gpt_dropout dropout, uint64_t index, int T) {
    if (dropout.p <= 0) return;
    for (int r = 0; r < nq; r++, s += TILE_K, index += (uint64_t)T)
        FOR_LANES (j, k, nk)
            vf_put(s + j, vf_get(s + j, k) * dropout_lanes(dropout, index + (uint64_t)j), k);
}

static void round_row(bf16 *out, const float *x, float factor, int n) {
    FOR_LANES (c, k, n) vf_put(out + c, vf_get(x + c, k) * factor, k);
}

/* Queries q0 to q0 + nq - 1 of one head, whose keys and values are packed in w. */
typedef struct query_tile {
    bf16 *out;  /* rows ldo apart */
    float *lse; /* (nq) or NULL */
    const bf16 *q;
    int64_t ldo, ldq;
    head_shape head;
    int q0, nq;
    sight sight;
    float scale; /* of the scores */
    gpt_dropout dropout;
    uint64_t index; /* of the probability (q0, key 0), for dropout */
} query_tile;

static void forward_tile(const query_tile *t, buffers *w) {
    int HS = t->head.HS, HS16 = t->head.HS16, n_keys = t->q0 + t->nq;
    int first = first_key(t->sight, t->q0);
    for (int r = 0; r < t->nq; r++) {
        w->max[r] = -INFINITY;
        w->sum[r] = 0;
    }
    for (int k0 = first; k0 < n_keys; k0 += TILE_K) {
        int nk = cpu_min(TILE_K, n_keys - k0);
        multiply(w->s, TILE_K, t->q, t->ldq, w->keys + k0 / PANEL * pack_panel_size(HS),
                 pack_panel_size(HS), t->nq, nk, HS, 0);
        for (int r = 0; r < t->nq; r++) {
            seen_keys seen = keys_seen(t->sight, t->q0 + r, k0, nk);
            float *s = w->s + r * TILE_K, *sum = w->sum_q + (int64_t)r * HS16;
            if (seen.begin == seen.end) { /* a block of keys that this query does not see */
                memset(s, 0, sizeof(float) * (size_t)nk);
                continue;
            }
            for (int j = 0; j < seen.begin; j++) s[j] = 0;
            float shrink = softmax_row(s + seen.begin, seen.end - seen.begin, nk - seen.begin,
                                       t->scale, &w->max[r], &w->sum[r]);
            if (k0 > first && shrink != 1)
                FOR_LANES (c, k, HS16) vf_put(sum + c, vf_get(sum + c, k) * shrink, k);
        }
        drop_tile(w->s, t->nq, nk, t->dropout, t->index + (uint64_t)k0, t->head.T);
        for (int r = 0; r < t->nq; r++) round_row(w->p + r * TILE_K, w->s + r * TILE_K, 1, nk);
        multiply(w->sum_q, HS16, w->p, TILE_K, w->values + (int64_t)k0 * PANEL,
                 pack_panel_size(t->head.T), t->nq, HS, nk, k0 > first);
    }
    for (int r = 0; r < t->nq; r++) {
        round_row(t->out + r * t->ldo, w->sum_q + (int64_t)r * HS16, 1 / w->sum[r], HS);
        if (t->lse) t->lse[r] = w->max[r] + logf(w->sum[r]);
    }
}

typedef struct forward_task {
    gpt_ctx *ctx;
    const attention_forward *op;
    gpt_dropout dropout;
} forward_task;

/* Item i is a (b, key head): its keys are packed once for all queries of the group. */
static void attention_forward_heads(void *p, int thread, int64_t begin, int64_t end) {
    const forward_task *task = p;
    const attention_forward *a = task->op;
    const bf16 *all_qkv = a->qkv;
    bf16 *out = a->out;
    int HS = a->HS, T = a->T, NH = a->NH, group = NH / a->NKV;
    int64_t stride = (int64_t)(NH + 2 * a->NKV) * HS;
    head_shape head = shape_of(T, HS);
    buffers w = thread_buffers(task->ctx, thread, head, 0);
    kernel_begin();
    for (int64_t i = begin; i < end; i++) {
        int kv = (int)(i % a->NKV), b = (int)(i / a->NKV);
        const bf16 *qkv = all_qkv + b * T * stride, *k = qkv + (NH + kv) * HS;
        pack_keys(w.keys, k, stride, T, HS);
        pack_columns(w.values, pack_panel_size(T), k + a->NKV * HS, stride, HS, T);
        for (int h = kv * group; h < (kv + 1) * group; h++) {
            for (int q0 = 0; q0 < T; q0 += TILE_Q) {
                int64_t row = ((int64_t)b * NH + h) * T + q0;
                query_tile t = {.out = out + ((int64_t)b * T + q0) * NH * HS + h * HS,
                                .lse = a->lse ? a->lse + row : NULL,
                                .q = qkv + q0 * stride + h * HS,
                                .ldo = (int64_t)NH * HS,
                                .ldq = stride,
                                .head = head,
                                .q0 = q0,
                                .nq = cpu_min(TILE_Q, T - q0),
                                .sight = sight_of(a->window, a->positions, b, T),
                                .scale = 1 / sqrtf((float)HS),
                                .dropout = task->dropout,
                                .index = (uint64_t)row * (uint64_t)T};
                forward_tile(&t, &w);
            }
        }
    }
    kernel_end();
}

CPU_OP(attention_forward) {
    forward_task task = {ctx, op, dropout_at(op->dropout)};
    cpu_parallel(ctx, attention_forward_heads, &task, (int64_t)op->B * op->NKV, 1);
}

/* ---- backward ---- */

typedef struct backward_task {
    gpt_ctx *ctx;
    const attention_backward *op;
    gpt_dropout dropout;
    head_shape head;
    float scale;
} backward_task;

/* p = exp(scale s - lse) and ds = p (dp - delta) scale, row by row; the columns up to nk16 are 0
 * where the query does not see them. In place: ds held dp. w->sum is delta. */
static void backward_rows(const backward_task *task, buffers *w, sight sight, const float *lse,
                          int q0, int nq, int k0, int nk16) {
    float scale = task->scale;
    for (int r = 0; r < nq; r++) {
        float *s = w->s + r * TILE_K, *ds = w->ds + r * TILE_K;
        seen_keys seen = keys_seen(sight, q0 + r, k0, nk16);
        for (int j = 0; j < seen.begin; j++) s[j] = ds[j] = 0;
        for (int j = seen.end; j < nk16; j++) s[j] = ds[j] = 0;
        s += seen.begin, ds += seen.begin;
        FOR_LANES (j, k, seen.end - seen.begin) {
            vf prob = vf_exp(vf_get(s + j, k) * scale - lse[r]);
            vf_put(ds + j, prob * (vf_get(ds + j, k) - w->sum[r]) * scale, k);
            vf_put(s + j, prob, k);
        }
    }
}

/* x (nq, nk16) as b of a product over queries. */
static void pack_tile(bf16 *out, const float *x, int nq, int nk16) {
    for (int r = 0; r < nq; r += PAIR, x += PAIR * TILE_K, out += PANEL * PAIR) {
        for (int col = 0; col < nk16; col += PANEL) {
            bf16 upper[PANEL], lower[PANEL] = {0};
            round_row(upper, x + col, 1, PANEL);
            if (r + 1 < nq) round_row(lower, x + TILE_K + col, 1, PANEL);
            interleave_rows((pair *)(out + col / PANEL * pack_panel_size(TILE_Q)), upper, lower,
                            PANEL);
        }
    }
}

/* One head's gradients for one tile of queries: dq =, dk +=, dv +=. */
static void backward_tile(const backward_task *task, int b, int h, int q0, buffers *w) {
    const attention_backward *a = task->op;
    int HS = task->head.HS, HS16 = task->head.HS16, T = a->T, T16 = task->head.T16, NH = a->NH;
    int nq = cpu_min(TILE_Q, T - q0), n_keys = q0 + nq;
    sight sight = sight_of(a->window, a->positions, b, T);
    int first = first_key(sight, q0);
    int64_t stride = (int64_t)(NH + 2 * a->NKV) * HS, ldo = (int64_t)NH * HS;
    int64_t row = (int64_t)b * T + q0, panel = pack_panel_size(HS);
    const bf16 *q = (const bf16 *)a->qkv + row * stride + h * HS;
    const bf16 *out = (const bf16 *)a->out + row * ldo + h * HS;
    const bf16 *dout = (const bf16 *)a->dout + row * ldo + h * HS;
    const float *lse = a->lse + ((int64_t)b * NH + h) * T + q0;
    bf16 *dq = (bf16 *)a->dqkv + row * stride + h * HS;

    for (int r = 0; r < nq; r++) { /* delta = sum_j p_j dp_j, which is dout . out */
        vf sum = {0};
        FOR_LANES (c, k, HS) sum += vf_get(dout + r * ldo + c, k) * vf_get(out + r * ldo + c, k);
        w->sum[r] = vf_sum(sum);
    }
    transpose_columns(w->q_turned, TILE_Q, q, stride, HS, nq);
    transpose_columns(w->dout_turned, TILE_Q, dout, ldo, HS, nq);
    for (int k0 = first; k0 < n_keys; k0 += TILE_K) {
        int nk = cpu_min(TILE_K, n_keys - k0), nk16 = (int)cpu_round_up(nk, PANEL);
        uint64_t index = (((uint64_t)b * NH + h) * T + q0) * T + k0;
        const bf16 *keys = w->keys + k0 / PANEL * panel;
        const bf16 *values = w->values_rows + k0 / PANEL * panel;
        multiply(w->s, TILE_K, q, stride, keys, panel, nq, nk, HS, 0);    /* s = q k^T */
        multiply(w->ds, TILE_K, dout, ldo, values, panel, nq, nk, HS, 0); /* dp = dout v^T */
        drop_tile(w->ds, nq, nk, task->dropout, index, T);
        backward_rows(task, w, sight, lse, q0, nq, k0, nk16);
        drop_tile(w->s, nq, nk, task->dropout, index, T);
        pack_tile(w->p_panels, w->s, nq, nk16);
        pack_tile(w->ds_panels, w->ds, nq, nk16);
        for (int r = 0; r < nq; r++) round_row(w->p + r * TILE_K, w->ds + r * TILE_K, 1, nk);
        multiply(w->dv_turned + k0, T16, w->dout_turned, TILE_Q, w->p_panels,
                 pack_panel_size(TILE_Q), HS, nk, nq, 1); /* dv^T += dout^T p */
        multiply(w->dk_turned + k0, T16, w->q_turned, TILE_Q, w->ds_panels, pack_panel_size(TILE_Q),
                 HS, nk, nq, 1); /* dk^T += q^T ds */
        multiply(w->sum_q, HS16, w->p, TILE_K, w->keys_columns + (int64_t)k0 * PANEL,
                 pack_panel_size(T), nq, HS, nk, k0 > first); /* dq += ds k */
    }
    for (int r = 0; r < nq; r++) round_row(dq + r * stride, w->sum_q + (int64_t)r * HS16, 1, HS);
}

/* out (T, HS) rows, ldo apart, = the transpose of x (HS, T16). */
static void store_turned(bf16 *out, int64_t ldo, const float *x, head_shape h) {
    for (int t = 0; t < h.T; t += PANEL) {
        for (int c = 0; c < h.HS; c += PANEL) {
            pair block[PANEL][PANEL] = {{0}}, turned[PANEL][PANEL];
            int rows = cpu_min(PANEL, h.HS - c);
            for (int r = 0; r < rows; r++)
                memcpy(block[r], x + (int64_t)(c + r) * h.T16 + t, sizeof block[r]);
            transpose_pairs(turned[0], PANEL, block[0], PANEL);
            for (int r = 0; r < cpu_min(PANEL, h.T - t); r++) {
                float row[PANEL];
                memcpy(row, turned[r], sizeof row);
                round_row(out + (t + r) * ldo + c, row, 1, rows);
            }
        }
    }
}

/* Item i is a (b, key head): all queries of these keys, so that dk, dv have one writer. */
static void attention_backward_heads(void *p, int thread, int64_t begin, int64_t end) {
    const backward_task *task = p;
    const attention_backward *a = task->op;
    const bf16 *qkv = a->qkv;
    bf16 *dqkv = a->dqkv;
    int HS = a->HS, T = a->T, NH = a->NH, group = NH / a->NKV;
    int64_t stride = (int64_t)(NH + 2 * a->NKV) * HS;
    size_t turned_bytes = sizeof(float) * (size_t)HS * (size_t)task->head.T16;
    buffers w = thread_buffers(task->ctx, thread, task->head, 1);
    kernel_begin();
    for (int64_t i = begin; i < end; i++) {
        int kv = (int)(i % a->NKV), b = (int)(i / a->NKV);
        int64_t key = b * T * stride + (NH + kv) * HS, value = key + a->NKV * HS;
        pack_keys(w.keys, qkv + key, stride, T, HS);
        pack_keys(w.values_rows, qkv + value, stride, T, HS);
        pack_columns(w.keys_columns, pack_panel_size(T), qkv + key, stride, HS, T);
        memset(w.dk_turned, 0, turned_bytes);
        memset(w.dv_turned, 0, turned_bytes);
        for (int h = kv * group; h < (kv + 1) * group; h++)
            for (int q0 = 0; q0 < T; q0 += TILE_Q) backward_tile(task, b, h, q0, &w);
        store_turned(dqkv + key, stride, w.dk_turned, task->head);
        store_turned(dqkv + value, stride, w.dv_turned, task->head);
    }
    kernel_end();
}

CPU_OP(attention_backward) {
    backward_task task = {ctx, op, dropout_at(op->dropout), shape_of(op->T, op->HS),
                          1 / sqrtf((float)op->HS)};
    cpu_parallel(ctx, attention_backward_heads, &task, (int64_t)op->B * op->NKV, 1);
}

/* ---- decode ---- */

/* So many rows of a sequence go one by one, which gives each what it would get alone: the rows of a
 * draft in speculative decoding are judged as they will be again. */
enum { FEW_ROWS = 16 };

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
        float shrink = softmax_row(w->s, nk, nk, t->scale, &max, &sum);
        add_values(w->sum_q, shrink, w->s, values, nk, HS,
                   k0 + nk < n_keys ? keys + (int64_t)nk * HS : next);
    }
    round_row(t->out, w->sum_q, 1 / sum, HS);
}

typedef struct decode_task {
    gpt_ctx *ctx;
    const attention_decode *op;
} decode_task;

/* Item h is a query head. Rows that follow each other in one sequence share its packed keys. */
static void decode_heads(void *p, int thread, int64_t begin, int64_t end) {
    const decode_task *task = p;
    const attention_decode *a = task->op;
    const bf16 *qkv = a->qkv, *cache_k = a->cache_k, *cache_v = a->cache_v;
    bf16 *out = a->out;
    int HS = a->HS, NH = a->NH;
    int64_t stride = (int64_t)(NH + 2 * a->NKV) * HS;
    head_shape head = shape_of(a->n_ctx, HS);
    buffers w = thread_buffers(task->ctx, thread, head, 0);
    kernel_begin();
    for (int64_t h = begin; h < end; h++) {
        for (int n = 0, run; n < a->N; n += run) {
            run = cache_run(a, n, a->N);
            int64_t rows = cache_begin(a, n, h / (NH / a->NKV));
            int position = a->positions[n];
            const bf16 *k = cache_k + rows, *v = cache_v + rows;
            const bf16 *next = k;
            if (n + run < a->N) next = cache_k + cache_begin(a, n + run, h / (NH / a->NKV));
            query_tile t = {.ldo = (int64_t)NH * HS,
                            .ldq = stride,
                            .head = head,
                            .sight = {a->window, NULL},
                            .scale = 1 / sqrtf((float)HS)};
            if (run > FEW_ROWS) {
                pack_keys(w.keys, k, HS, position + run, HS);
                pack_columns(w.values, pack_panel_size(head.T), v, HS, HS, position + run);
            }
            for (int r = 0; r < run; r += t.nq) {
                t.out = out + ((int64_t)(n + r) * NH + h) * HS;
                t.q = qkv + (n + r) * stride + h * HS;
                t.q0 = position + r;
                t.nq = run > FEW_ROWS ? cpu_min(TILE_Q, run - r) : 1;
                if (run > FEW_ROWS)
                    forward_tile(&t, &w);
                else
                    decode_query(&t, k, v, next, &w);
            }
        }
    }
    kernel_end();
}

CPU_OP(attention_decode) {
    decode_task task = {ctx, op};
    cpu_parallel(ctx, cache_store_rows, (void *)op, op->N, 16);
    cpu_parallel(ctx, decode_heads, &task, op->NH, 1);
}
