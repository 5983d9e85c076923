/* attention_fp32.c: causal attention in fp32, in tiles of queries and keys: forward, backward, decode. */
#include "cpu.h"

#include "attention_int8.h"
#include "blas.h"
#include "cache.h"
#include "panels_fp32.h"
#include "softmax.h"

/* A tile of probabilities, TILE_Q x TILE_K floats, stays in the second-level cache. */
enum { TILE_Q = 64, TILE_K = 256 };

/* Per thread: S and dS tiles, for each query of a tile its maximum, sum and delta, and of an int8 cache a tile
 * of its rows, or a query and its result. */
static size_t thread_floats(int int8_HS) {
    return 2 * TILE_Q * TILE_K + 4 * TILE_Q + TILE_K * (size_t)int8_HS;
}

CPU_WORKSPACE(attention_workspace) {
    return sizeof(float) * thread_floats(shape->kv_int8 ? shape->HS : 0) * (size_t)n_threads;
}

/* panels: a tile of keys or values as columns, in the threads' own scratch memory. */
typedef struct scratch {
    float *s, *ds, *max, *sum, *delta, *rows, *panels;
} scratch;

static scratch thread_scratch_int8(gpt_ctx *ctx, int thread, int int8_HS) {
    float *p = (float *)ctx->workspace + thread_floats(int8_HS) * (size_t)thread;
    float *after = p + 2 * TILE_Q * TILE_K;
    return (scratch){p,
                     p + TILE_Q * TILE_K,
                     after,
                     after + TILE_Q,
                     after + 2 * TILE_Q,
                     after + 4 * TILE_Q,
                     cpu_scratch(ctx, thread)};
}

static scratch thread_scratch(gpt_ctx *ctx, int thread) {
    return thread_scratch_int8(ctx, thread, 0);
}

/* ---- products of tiles: our own with 16 lanes, where they are measured, else those of BLAS ---- */

static int is_own(int HS) {
    return LANES == 16 && sizeof(float) * TILE_K * (size_t)HS <= CPU_SCRATCH;
}

/* s (nq, nk), rows TILE_K apart, = q k^T. */
static void multiply_keys(float *s, const float *q, int ldq, const float *k, int ldk, int nq,
                          int nk, int HS, float *panels) {
    if (!is_own(HS)) {
        gemm_nt(nq, nk, HS, 1, q, ldq, k, ldk, 0, s, TILE_K);
        return;
    }
    panels_of_rows(panels, k, ldk, nk, HS);
    panel_operands o = {.a = q,
                        .b = panels,
                        .c = s,
                        .a_row = ldq,
                        .a_band = BAND * (int64_t)ldq,
                        .ldc = TILE_K,
                        .K = HS};
    panel_product(o, nq, nk);
}

/* out (nq, HS) = p v, or += with add; p (nq, nk) has rows TILE_K apart. */
static void sum_values(float *out, int ldo, const float *p, const float *v, int ldv, int nq, int nk,
                       int HS, int add) {
    if (!is_own(HS)) {
        gemm_nn(nq, HS, nk, 1, p, TILE_K, v, ldv, (float)add, out, ldo);
        return;
    }
    kernel_operands o = {
        .a = p, .b = v, .c = out, .a_row = TILE_K, .a_k = 1, .ldb = ldv, .ldc = ldo, .K = nk};
    kernel_product(o, nq, HS, add);
}

/* out (nk, HS) += p^T x, with x (nq, HS). */
static void sum_queries(float *out, int ldo, const float *p, const float *x, int ldx, int nq,
                        int nk, int HS) {
    if (!is_own(HS)) {
        gemm_tn(nk, HS, nq, 1, p, TILE_K, x, ldx, 1, out, ldo);
        return;
    }
    kernel_operands o = {
        .a = p, .b = x, .c = out, .a_row = 1, .a_k = TILE_K, .ldb = ldx, .ldc = ldo, .K = nq};
    kernel_product(o, nk, HS, 1);
}

/* Queries q0 to q0 + nq - 1 of one head; their keys and values start at position 0. */
typedef struct query_tile {
    float *out; /* rows ldo apart */
    float *lse; /* (nq) or NULL */
    const float *q, *k, *v;
    int8_head int8; /* in place of k and v, where it has keys */
    int ldo, ldq, ldk, ldv;
    int q0, nq, HS;
    sight sight;
    scoring scoring;
    gpt_dropout dropout;
    uint64_t index; /* of the probability (q0, key 0), for dropout */
    int T;          /* distance of two rows of probabilities in that index */
} query_tile;

/* Dropout of the probabilities s (nq, nk), whose first element has this index. */
static void drop_tile(float *s, int nq, int nk, gpt_dropout dropout, uint64_t index, int T) {
    if (dropout.p <= 0) return;
    for (int r = 0; r < nq; r++)
        for (int j = 0; j < nk; j++)
            s[r * TILE_K + j] *= dropout_factor(dropout, index + (uint64_t)r * (uint64_t)T + j);
}

/* (n, HS) = scale x: rows of an int8 cache as floats. */
static const float *widen_int8(float *out, const int8_t *x, const float *scale, int n, int HS) {
    for (int j = 0; j < n; j++, x += HS)
        FOR_LANES (c, k, HS) vf_put(out + j * (int64_t)HS + c, vf_get_int8(x + c, k) * scale[j], k);
    return out;
}

/* The keys, or values, of a tile from key k0 on; ld apart. */
static const float *tile_keys(const query_tile *t, int k0, int nk, scratch w) {
    int64_t first = (int64_t)k0 * t->ldk;
    if (!t->int8.k) return t->k + first;
    return widen_int8(w.rows, t->int8.k + first, t->int8.scale_k + k0, nk, t->HS);
}
static const float *tile_values(const query_tile *t, int k0, int nk, scratch w) {
    int64_t first = (int64_t)k0 * t->ldv;
    if (!t->int8.k) return t->v + first;
    return widen_int8(w.rows, t->int8.v + first, t->int8.scale_v + k0, nk, t->HS);
}

static void forward_tile(const query_tile *t, scratch w) {
    int HS = t->HS, n_keys = t->q0 + t->nq, first = first_key(t->sight, t->q0);
    for (int r = 0; r < t->nq; r++) {
        w.max[r] = -INFINITY;
        w.sum[r] = 0;
        memset(t->out + (int64_t)r * t->ldo, 0, sizeof(float) * (size_t)HS);
    }
    for (int k0 = first; k0 < n_keys; k0 += TILE_K) {
        int nk = cpu_min(TILE_K, n_keys - k0);
        multiply_keys(w.s, t->q, t->ldq, tile_keys(t, k0, nk, w), t->ldk, t->nq, nk, HS, w.panels);
        for (int r = 0; r < t->nq; r++) {
            seen_keys seen = keys_seen(t->sight, t->q0 + r, k0, nk);
            float *s = w.s + r * TILE_K;
            if (seen.begin == seen.end) { /* a block of keys that this query does not see */
                memset(s, 0, sizeof(float) * (size_t)nk);
                continue;
            }
            for (int j = 0; j < seen.begin; j++) s[j] = 0;
            float shrink = softmax_row(s + seen.begin, seen.end - seen.begin, nk - seen.begin,
                                       t->scoring, &w.max[r], &w.sum[r]);
            float *out = t->out + (int64_t)r * t->ldo;
            if (k0 > first && shrink != 1)
                FOR_LANES (c, k, HS) vf_put(out + c, vf_get(out + c, k) * shrink, k);
        }
        drop_tile(w.s, t->nq, nk, t->dropout, t->index + (uint64_t)k0, t->T);
        sum_values(t->out, t->ldo, w.s, tile_values(t, k0, nk, w), t->ldv, t->nq, nk, HS, 1);
    }
    for (int r = 0; r < t->nq; r++) {
        float *out = t->out + (int64_t)r * t->ldo, inverse = 1 / w.sum[r];
        FOR_LANES (c, k, HS) vf_put(out + c, vf_get(out + c, k) * inverse, k);
        if (t->lse) t->lse[r] = w.max[r] + logf(w.sum[r]);
    }
}

typedef struct forward_task {
    gpt_ctx *ctx;
    const attention_forward *op;
    gpt_dropout dropout;
    int n_tiles; /* of the queries of a head */
} forward_task;

/* Item i is a (b, query tile, head); late tiles, which see most keys, come first. */
static void attention_forward_tiles(void *p, int thread, int64_t begin, int64_t end) {
    const forward_task *task = p;
    const attention_forward *a = task->op;
    const elem *all_qkv = a->qkv;
    elem *out = a->out;
    int HS = a->HS, T = a->T, NH = a->NH, stride = (NH + 2 * a->NKV) * HS;
    for (int64_t i = begin; i < end; i++) {
        int h = (int)(i % NH), b = (int)(i / NH % a->B);
        int q0 = (task->n_tiles - 1 - (int)(i / NH / a->B)) * TILE_Q;
        int kv = h / (NH / a->NKV);
        const float *qkv = all_qkv + (int64_t)b * T * stride;
        query_tile t = {
            .out = out + ((int64_t)b * T + q0) * NH * HS + h * HS,
            .lse = a->lse ? a->lse + ((int64_t)b * NH + h) * T + q0 : NULL,
            .q = qkv + (int64_t)q0 * stride + h * HS,
            .k = qkv + (NH + kv) * HS,
            .v = qkv + (NH + a->NKV + kv) * HS,
            .ldo = NH * HS,
            .ldq = stride,
            .ldk = stride,
            .ldv = stride,
            .q0 = q0,
            .nq = cpu_min(TILE_Q, T - q0),
            .HS = HS,
            .sight = sight_of(a->window, a->positions, b, T),
            .scoring = scoring_of(a->scale, a->cap, HS),
            .dropout = task->dropout,
            .index = (((uint64_t)b * NH + h) * T + q0) * T,
            .T = T,
        };
        forward_tile(&t, thread_scratch(task->ctx, thread));
    }
}

CPU_OP(attention_forward) {
    forward_task task = {ctx, op, dropout_at(op->dropout), (int)cpu_div_up(op->T, TILE_Q)};
    cpu_parallel(ctx, attention_forward_tiles, &task, (int64_t)op->B * op->NH * task.n_tiles, 1);
}

typedef struct backward_task {
    gpt_ctx *ctx;
    const attention_backward *op;
    gpt_dropout dropout;
    scoring scoring;
} backward_task;

/* p and the gradients of the products, row by row. In place: ds held dp. */
static void backward_rows(const backward_task *task, scratch w, sight sight, const float *lse,
                          int q0, int nq, int k0, int nk) {
    for (int r = 0; r < nq; r++) {
        float *s = w.s + r * TILE_K, *ds = w.ds + r * TILE_K;
        seen_keys seen = keys_seen(sight, q0 + r, k0, nk);
        for (int j = 0; j < seen.begin; j++) s[j] = ds[j] = 0;
        for (int j = seen.end; j < nk; j++) s[j] = ds[j] = 0;
        softmax_gradient_row(s + seen.begin, ds + seen.begin, seen.end - seen.begin, task->scoring,
                             lse[r], w.delta[r]);
    }
}

/* One head's gradients for one tile of queries: dq =, dk +=, dv +=. */
static void backward_tile(const backward_task *task, int b, int h, int q0, scratch w) {
    const attention_backward *a = task->op;
    const float *qkv = a->qkv;
    float *dqkv = a->dqkv;
    int HS = a->HS, T = a->T, NH = a->NH, stride = (NH + 2 * a->NKV) * HS, ldo = NH * HS;
    int kv = h / (NH / a->NKV), nq = cpu_min(TILE_Q, T - q0), n_keys = q0 + nq;
    sight sight = sight_of(a->window, a->positions, b, T);
    int first = first_key(sight, q0);
    int64_t base = (int64_t)b * T * stride, key = (NH + kv) * HS, value = key + a->NKV * HS;
    const float *q = qkv + base + (int64_t)q0 * stride + h * HS;
    const float *out = (const float *)a->out + ((int64_t)b * T + q0) * ldo + h * HS;
    const float *dout = (const float *)a->dout + ((int64_t)b * T + q0) * ldo + h * HS;
    const float *lse = a->lse + ((int64_t)b * NH + h) * T + q0;
    float *dq = dqkv + base + (int64_t)q0 * stride + h * HS;

    for (int r = 0; r < nq; r++) { /* delta = sum_j p_j dp_j, which is dout . out */
        vf sum = {0};
        FOR_LANES (c, k, HS)
            sum += vf_get(dout + (int64_t)r * ldo + c, k) * vf_get(out + (int64_t)r * ldo + c, k);
        w.delta[r] = vf_sum(sum);
    }
    for (int k0 = first; k0 < n_keys; k0 += TILE_K) {
        int nk = cpu_min(TILE_K, n_keys - k0);
        int64_t keys = base + (int64_t)k0 * stride;
        const float *k = qkv + keys + key, *v = qkv + keys + value;
        uint64_t index = (((uint64_t)b * NH + h) * T + q0) * T + k0;
        multiply_keys(w.s, q, stride, k, stride, nq, nk, HS, w.panels);  /* s = q k^T */
        multiply_keys(w.ds, dout, ldo, v, stride, nq, nk, HS, w.panels); /* dp = dout v^T */
        drop_tile(w.ds, nq, nk, task->dropout, index, T);
        backward_rows(task, w, sight, lse, q0, nq, k0, nk);
        drop_tile(w.s, nq, nk, task->dropout, index, T);
        sum_queries(dqkv + keys + value, stride, w.s, dout, ldo, nq, nk, HS);
        sum_queries(dqkv + keys + key, stride, w.ds, q, stride, nq, nk, HS);
        sum_values(dq, stride, w.ds, k, stride, nq, nk, HS, k0 > first);
    }
}

/* Item i is a (b, key head): all queries of these keys, so that dk, dv have one writer. */
static void attention_backward_heads(void *p, int thread, int64_t begin, int64_t end) {
    const backward_task *task = p;
    const attention_backward *a = task->op;
    float *dqkv = a->dqkv;
    int HS = a->HS, NH = a->NH, stride = (NH + 2 * a->NKV) * HS, group = NH / a->NKV;
    for (int64_t i = begin; i < end; i++) {
        int kv = (int)(i % a->NKV), b = (int)(i / a->NKV);
        for (int t = 0; t < a->T; t++) {
            float *dk = dqkv + ((int64_t)b * a->T + t) * stride + (NH + kv) * HS;
            memset(dk, 0, sizeof(float) * (size_t)HS);
            memset(dk + a->NKV * HS, 0, sizeof(float) * (size_t)HS);
        }
        for (int h = kv * group; h < (kv + 1) * group; h++)
            for (int q0 = 0; q0 < a->T; q0 += TILE_Q)
                backward_tile(task, b, h, q0, thread_scratch(task->ctx, thread));
    }
}

CPU_OP(attention_backward) {
    backward_task task = {ctx, op, dropout_at(op->dropout), scoring_of(op->scale, op->cap, op->HS)};
    cpu_parallel(ctx, attention_backward_heads, &task, (int64_t)op->B * op->NKV, 1);
}

typedef struct decode_task {
    gpt_ctx *ctx;
    const attention_decode *op;
    int n_parts; /* of a head: each has every n_parts-th tile */
} decode_task;

/* One query of an int8 cache. */
static void int8_decode_query(const query_tile *t, const int8_t *next, scratch w) {
    int8_queries o = {.sum = t->out,
                      .q = t->q,
                      .head = t->int8,
                      .sight = t->sight,
                      .scoring = t->scoring,
                      .position = t->q0,
                      .heads = 1,
                      .HS = t->HS,
                      .s = w.s,
                      .tile = TILE_K,
                      .memory = w.rows,
                      .next = next};
    int8_attend(&o);
    FOR_LANES (c, k, t->HS) vf_put(t->out + c, vf_get(t->out + c, k) * o.factor[0], k);
}

/* One query of a float32 cache: products of one row are too small for BLAS. `next`: the keys that are read next. */
static void decode_query(const query_tile *t, const float *next, scratch w) {
    int HS = t->HS, n_keys = t->q0 + 1;
    float max = -INFINITY, total = 0, shrink;
    memset(t->out, 0, sizeof(float) * (size_t)HS);
    for (int k0 = first_seen(t->sight, t->q0), nk; k0 < n_keys; k0 += nk) {
        nk = cpu_min(TILE_K, n_keys - k0);
        const float *key = t->k + (int64_t)k0 * HS, *value = t->v + (int64_t)k0 * HS;
        const float *after = k0 + nk < n_keys ? key + (int64_t)nk * HS : next;
        few_rows keys = {.at = (const char *)key, .next = (const char *)value, .n = nk, .HS = HS};
        few_rows values = {
            .at = (const char *)value, .next = (const char *)after, .n = nk, .HS = HS};
        few_score_1(&(few_scores){.s = w.s, .q = t->q, .k = keys});
        shrink = softmax_row(w.s, nk, nk, t->scoring, &max, &total);
        few_sum_1(&(few_sums){.sum = t->out, .shrink = &shrink, .p = w.s, .v = values});
    }
    FOR_LANES (c, k, HS) vf_put(t->out + c, vf_get(t->out + c, k) * (1 / total), k);
}

/* Item i is a part of a query head, late ones first. Many rows that follow each other in one sequence share a tile. */
static void decode_heads(void *p, int thread, int64_t begin, int64_t end) {
    const decode_task *task = p;
    const attention_decode *a = task->op;
    const float *qkv = a->qkv, *cache_k = a->cache_k, *cache_v = a->cache_v;
    float *out = a->out;
    int HS = a->HS, NH = a->NH, stride = (NH + 2 * a->NKV) * HS;
    scratch w = thread_scratch_int8(task->ctx, thread, a->scale_k ? HS : 0);
    for (int64_t i = begin; i < end; i++) {
        int64_t h = i % NH, part = task->n_parts - 1 - i / NH;
        for (int n = 0, tile = 0, nq; n < a->N; n += nq, tile++) {
            int kv = (int)h / (NH / a->NKV), run = cache_run(a, n, TILE_Q);
            int64_t rows = cache_begin(a, n, kv);
            nq = run <= FEW_ROWS ? 1 : run;
            if (tile % task->n_parts != part) continue;
            query_tile t = {.out = out + ((int64_t)n * NH + h) * HS,
                            .q = qkv + (int64_t)n * stride + h * HS,
                            .k = cache_k + rows,
                            .v = cache_v + rows,
                            .int8 = int8_head_of(a, n, kv),
                            .ldo = NH * HS,
                            .ldq = stride,
                            .ldk = HS,
                            .ldv = HS,
                            .q0 = a->positions[n],
                            .nq = nq,
                            .HS = HS,
                            .sight = {a->window, NULL},
                            .scoring = scoring_of(a->scale, a->cap, HS)};
            int after = n + 1 < a->N ? n + 1 : n;
            if (nq > 1)
                forward_tile(&t, w);
            else if (a->scale_k)
                int8_decode_query(&t, int8_head_of(a, after, kv).k, w);
            else
                decode_query(&t, cache_k + cache_begin(a, after, kv), w);
        }
    }
}

CPU_OP(attention_decode) {
    decode_task task = {ctx, op, (int)cpu_div_up(op->N, TILE_Q)};
    cpu_parallel(ctx, cache_store_rows, (void *)op, op->N, 16);
    cpu_parallel(ctx, decode_heads, &task, (int64_t)op->NH * task.n_parts, 1);
}
