/* attention_bf16.c: causal attention in bf16 with float32 scores and sums: forward, backward.
 *
 * Forward goes through a head by tiles of queries, which see a span of keys; backward by tiles of keys, which are
 * seen by a span of queries. So scores and their gradients are the transposed ones there, row by row what sums of
 * values and keys need, and only dq waits for the keys of a whole span. */
#include "attention_tiles_bf16.h"

CPU_WORKSPACE(attention_workspace) {
    buffers none;
    size_t bytes = lay_out(&none, NULL, shape_of(shape->T, shape->HS), shape->training);
    return bytes * (size_t)n_threads;
}

/* Where query head n = b NH + h begins, and its keys and values. */
typedef struct head_place {
    int b;
    int64_t q, k, v, out;
} head_place;

static head_place place_of(int64_t n, int T, int NH, int NKV, int HS) {
    int64_t b = n / NH, h = n % NH, kv = h / (NH / NKV), row = b * T * (NH + 2 * NKV) * HS;
    return (head_place){(int)b, row + h * HS, row + (NH + kv) * HS, row + (NH + NKV + kv) * HS,
                        b * T * NH * HS + h * HS};
}

typedef struct forward_task {
    gpt_ctx *ctx;
    const attention_forward *op;
    gpt_dropout dropout;
} forward_task;

/* Item i is a (b, key head): its keys are packed once for all queries of the group. Rows of the next head are
 * asked for meanwhile. */
static void attention_forward_heads(void *p, int thread, int64_t begin, int64_t end) {
    const forward_task *task = p;
    const attention_forward *a = task->op;
    const bf16 *qkv = a->qkv;
    bf16 *out = a->out;
    int HS = a->HS, T = a->T, NH = a->NH, NKV = a->NKV, group = NH / NKV;
    int64_t stride = (int64_t)(NH + 2 * NKV) * HS, ldo = (int64_t)NH * HS, last = end * group - 1;
    head_shape head = shape_of(T, HS);
    buffers w = thread_buffers(task->ctx, thread, head, 0);
    kernel_begin();
    for (int64_t n = begin * group; n <= last; n++) {
        head_place at = place_of(n, T, NH, NKV, HS);
        head_place next = place_of(n < last ? n + 1 : n, T, NH, NKV, HS);
        if (n % group == 0) {
            pack_keys(w.keys, qkv + at.k, stride, T, HS);
            pack_columns(w.values, pack_panel_size(T), qkv + at.v, stride, HS, T);
        }
        for (int q0 = 0; q0 < T; q0 += TILE) {
            int64_t row = n * T + q0;
            query_tile t = {.out = out + at.out + q0 * ldo,
                            .lse = a->lse ? a->lse + row : NULL,
                            .q = qkv + at.q + q0 * stride,
                            .ldo = ldo,
                            .ldq = stride,
                            .head = head,
                            .q0 = q0,
                            .nq = cpu_min(TILE, T - q0),
                            .sight = sight_of(a->window, a->positions, at.b, T),
                            .scoring = scoring_of(a->scale, a->cap, HS),
                            .dropout = task->dropout,
                            .index = (uint64_t)row * (uint64_t)T};
            ask_for_rows(qkv + next.q + q0 * stride, stride, t.nq, HS);
            ask_for_rows(qkv + next.k + q0 * stride, stride, t.nq, HS);
            ask_for_rows(qkv + next.v + q0 * stride, stride, t.nq, HS);
            ask_for_rows(t.out, ldo, t.nq, HS);
            forward_tile(&t, &w);
        }
    }
    kernel_end();
}

CPU_OP(attention_forward) {
    forward_task task = {ctx, op, dropout_at(op->dropout)};
    int64_t n = (int64_t)op->B * op->NKV;
    cpu_parallel(ctx, attention_forward_heads, &task, n, cpu_grain(ctx, n, 1));
}

/* ---- backward ---- */

typedef struct backward_task {
    gpt_ctx *ctx;
    const attention_backward *op;
    gpt_dropout dropout;
    head_shape head;
    scoring scoring;
} backward_task;

/* Keys k0 to k0 + nk - 1 of one head and queries q0 to q0 + nq - 1, whose buffers w has. Of the queries, `from` to
 * `to` - 1 see some of the keys. */
typedef struct key_tile {
    const bf16 *k, *v;
    int k0, nk, q0, nq, from, to;
    int add;        /* dk and dv have sums already */
    uint64_t index; /* of the probability (query q0, key k0), for dropout */
} key_tile;

/* ds is a b of dq's products, of so many queries each. */
enum { DQ_COLUMNS = 2 * PANEL };

/* p and ds of one key, 0 where a query does not see it; ds for all columns of dq's products. */
static void backward_row(const backward_task *task, const key_tile *t, buffers *w, int r) {
    const float *s = w->s + r * SPAN, *dp = w->dp + r * SPAN;
    const float *lse = w->lse + t->q0, *delta = w->delta + t->q0;
    bf16 *p = w->p + r * SPAN, *ds = w->ds + r * SPAN;
    uint64_t index = t->index + (uint64_t)r, T = (uint64_t)task->head.T;
    int drops = task->dropout.p > 0, begin = t->k0 + r - t->q0;
    int end = cpu_min(w->ends[t->k0 + r] - t->q0, t->nq), j = t->from / DQ_COLUMNS * DQ_COLUMNS;
    for (; j < t->from; j += LANES) vf_put(ds + j, vf_set(0), LANES);
    for (; j < t->to; j += LANES) {
        vf pj = vf_load(s + j), dj = vf_load(dp + j), keep = vf_set(1);
        if (drops) {
            keep = dropout_steps(task->dropout, index + (uint64_t)j * T, T);
            dj *= keep;
        }
        softmax_gradient(&pj, &dj, task->scoring, vf_load(lse + j), vf_load(delta + j));
        if (drops) pj *= keep;
        vf_put(p + j, vf_within(pj, begin - j, end - j, 0), LANES);
        vf_put(ds + j, vf_within(dj, begin - j, end - j, 0), LANES);
    }
    for (; j % DQ_COLUMNS; j += LANES) vf_put(ds + j, vf_set(0), LANES);
}

/* dk +=, dv +=, and ds for dq. */
static void backward_tile(const backward_task *task, const key_tile *t, buffers *w) {
    const attention_backward *a = task->op;
    int HS = a->HS, nk = t->nk, n = t->to - t->from, query = t->q0 + t->from;
    int first = t->from / DQ_COLUMNS * DQ_COLUMNS;
    int64_t stride = (int64_t)(a->NH + 2 * a->NKV) * HS, HS16 = task->head.HS16;
    int64_t rows = pack_panel_size(HS), columns = pack_panel_size(a->T);
    int64_t panel = pack_panel_size(SPAN);
    int64_t row = query / PANEL * rows, column = (int64_t)query * PANEL;
    multiply(w, w->s + t->from, SPAN, t->k, stride, w->q_rows + row, rows, nk, n, HS, 0);
    multiply(w, w->dp + t->from, SPAN, t->v, stride, w->dout_rows + row, rows, nk, n, HS, 0);
    for (int r = 0; r < nk; r++) backward_row(task, t, w, r);
    pack_columns(w->ds_panels + first / PANEL * panel + t->k0 % SPAN * PANEL, panel, w->ds + first,
                 SPAN, (int)cpu_round_up(t->to, DQ_COLUMNS) - first, nk);
    multiply(w, w->dv + t->k0 * HS16, HS16, w->p + t->from, SPAN, w->dout_columns + column, columns,
             nk, HS, n, t->add); /* dv += p^T dout */
    multiply(w, w->dk + t->k0 * HS16, HS16, w->ds + t->from, SPAN, w->q_columns + column, columns,
             nk, HS, n, t->add); /* dk += ds^T q */
}

/* dq^T (+)= k^T ds^T of queries q0 to q0 + nq - 1 and the span of keys from k0 on. */
static void backward_queries(const buffers *w, sight sight, head_shape head, int k0, int q0,
                             int nq) {
    int64_t panel = pack_panel_size(SPAN);
    for (int j = 0; j < nq; j += DQ_COLUMNS) {
        int n = cpu_min(DQ_COLUMNS, nq - j), first = first_key(sight, q0 + j);
        int begin = cpu_max(k0, first), end = cpu_min(k0 + SPAN, q0 + j + n);
        if (begin < end)
            multiply(w, w->dq_turned + j, SPAN, w->k_turned + begin, turned_stride(head),
                     w->ds_panels + j / PANEL * panel + (begin - k0) * PANEL, panel, head.HS, n,
                     end - begin, k0 > first);
    }
}

/* out (n, HS) rows, ldo apart, = factor times the transpose of x (HS16, SPAN). */
static void store_turned(bf16 *out, int64_t ldo, const float *x, float factor, int n, int HS) {
    for (int t = 0; t < n; t += PANEL)
        for (int c = 0; c < HS; c += PANEL) {
            pair turned[PANEL][PANEL];
            transpose_pairs(turned[0], PANEL, (const pair *)(x + c * SPAN + t), SPAN);
            for (int r = 0; r < cpu_min(PANEL, n - t); r++) {
                float row[PANEL];
                memcpy(row, turned[r], sizeof row);
                round_row(out + (t + r) * ldo + c, row, factor, cpu_min(PANEL, HS - c));
            }
        }
}

/* The queries that see key k are k to ends[k] - 1. */
static void find_ends(int *ends, sight sight, int T) {
    int k = 0;
    for (int q = 0; q < T; q++)
        while (k < first_seen(sight, q)) ends[k++] = q;
    while (k < T) ends[k++] = T;
}

/* What all tiles of a query head read. */
static void pack_head(const backward_task *task, int64_t n, head_place at, buffers *w) {
    const attention_backward *a = task->op;
    int HS = a->HS, T = a->T;
    int64_t stride = (int64_t)(a->NH + 2 * a->NKV) * HS, ldo = (int64_t)a->NH * HS;
    const bf16 *q = (const bf16 *)a->qkv + at.q;
    const bf16 *out = (const bf16 *)a->out + at.out, *dout = (const bf16 *)a->dout + at.out;
    pack_keys(w->q_rows, q, stride, T, HS);
    pack_keys(w->dout_rows, dout, ldo, T, HS);
    pack_columns(w->q_columns, pack_panel_size(T), q, stride, HS, T);
    pack_columns(w->dout_columns, pack_panel_size(T), dout, ldo, HS, T);
    for (int t = 0; t < T; t++) { /* delta = sum_j p_j dp_j, which is dout . out */
        vf sum = {0};
        FOR_LANES (c, k, HS) sum += vf_get(dout + t * ldo + c, k) * vf_get(out + t * ldo + c, k);
        w->delta[t] = vf_sum(sum);
        w->lse[t] = a->lse[n * T + t] * LOG2E;
    }
}

/* One query head's gradients: dq =, dk +=, dv +=. Rows of the next head are asked for meanwhile. */
static void backward_head(const backward_task *task, int64_t n, head_place at, head_place next,
                          buffers *w) {
    const attention_backward *a = task->op;
    const bf16 *qkv = a->qkv, *out = a->out, *dout = a->dout;
    bf16 *dqkv = a->dqkv;
    int HS = a->HS, T = a->T, group = a->NH / a->NKV;
    int64_t stride = (int64_t)(a->NH + 2 * a->NKV) * HS, ldo = (int64_t)a->NH * HS;
    sight sight = sight_of(a->window, a->positions, at.b, T);
    pack_head(task, n, at, w);
    for (int q0 = 0; q0 < T; q0 += SPAN) {
        int nq = cpu_min(SPAN, T - q0);
        for (int span = first_key(sight, q0) / SPAN * SPAN; span <= q0; span += SPAN) {
            for (int k0 = span; k0 < cpu_min(span + SPAN, q0 + nq); k0 += TILE) {
                int nk = cpu_min(TILE, cpu_min(span + SPAN, q0 + nq) - k0);
                key_tile t = {.k = qkv + at.k + k0 * stride,
                              .v = qkv + at.v + k0 * stride,
                              .k0 = k0,
                              .nk = nk,
                              .q0 = q0,
                              .nq = nq,
                              .from = cpu_max(0, k0 - q0),
                              .to = cpu_min(nq, w->ends[k0 + nk - 1] - q0),
                              .add = n % group > 0 || span < q0,
                              .index = ((uint64_t)n * T + q0) * T + k0};
                if (span == q0) {
                    ask_for_rows(qkv + next.q + k0 * stride, stride, nk, HS);
                    ask_for_rows(qkv + next.k + k0 * stride, stride, nk, HS);
                    ask_for_rows(qkv + next.v + k0 * stride, stride, nk, HS);
                    ask_for_rows(out + next.out + k0 * ldo, ldo, nk, HS);
                    ask_for_rows(dout + next.out + k0 * ldo, ldo, nk, HS);
                    ask_for_rows(dqkv + at.q + k0 * stride, stride, nk, HS);
                    ask_for_rows(dqkv + at.k + k0 * stride, stride, nk, HS);
                    ask_for_rows(dqkv + at.v + k0 * stride, stride, nk, HS);
                }
                if (t.from < t.to) backward_tile(task, &t, w);
            }
            backward_queries(w, sight, task->head, span, q0, nq);
        }
        store_turned(dqkv + at.q + q0 * stride, stride, w->dq_turned, task->scoring.scale, nq, HS);
    }
}

/* Item i is a (b, key head): all queries of these keys, so that dk, dv have one writer. */
static void attention_backward_heads(void *p, int thread, int64_t begin, int64_t end) {
    const backward_task *task = p;
    const attention_backward *a = task->op;
    bf16 *dqkv = a->dqkv;
    int HS = a->HS, T = a->T, NH = a->NH, NKV = a->NKV, group = NH / NKV;
    int64_t stride = (int64_t)(NH + 2 * NKV) * HS, HS16 = task->head.HS16, last = end * group - 1;
    buffers w = thread_buffers(task->ctx, thread, task->head, 1);
    kernel_begin();
    for (int64_t n = begin * group; n <= last; n++) {
        head_place at = place_of(n, T, NH, NKV, HS);
        head_place next = place_of(n < last ? n + 1 : n, T, NH, NKV, HS);
        if (n % group == 0) {
            find_ends(w.ends, sight_of(a->window, a->positions, at.b, T), T);
            transpose_columns(w.k_turned, turned_stride(task->head), (const bf16 *)a->qkv + at.k,
                              stride, HS, T);
        }
        backward_head(task, n, at, next, &w);
        if (n % group < group - 1) continue;
        for (int t = 0; t < T; t++) {
            round_row(dqkv + at.k + t * stride, w.dk + t * HS16, task->scoring.scale, HS);
            round_row(dqkv + at.v + t * stride, w.dv + t * HS16, 1, HS);
        }
    }
    kernel_end();
}

CPU_OP(attention_backward) {
    backward_task task = {ctx, op, dropout_at(op->dropout), shape_of(op->T, op->HS),
                          scoring_of(op->scale, op->cap, op->HS)};
    int64_t n = (int64_t)op->B * op->NKV;
    cpu_parallel(ctx, attention_backward_heads, &task, n, cpu_grain(ctx, n, 1));
}
