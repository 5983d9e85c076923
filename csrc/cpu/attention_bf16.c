/* attention_bf16.c: causal attention in bf16 with float32 scores and sums: forward, backward. Tiles as in
 * attention_fp32.c. */
#include "attention_tiles_bf16.h"

CPU_WORKSPACE(attention_workspace) {
    buffers none;
    size_t bytes = lay_out(&none, NULL, shape_of(shape->T, shape->HS), shape->training);
    return bytes * (size_t)n_threads;
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
                                .scoring = scoring_of(a->scale, a->cap, HS),
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
    scoring scoring;
} backward_task;

/* p and the gradients of the products, row by row; the columns up to nk16 are 0
 * where the query does not see them. In place: ds held dp. w->sum is delta. */
static void backward_rows(const backward_task *task, buffers *w, sight sight, const float *lse,
                          int q0, int nq, int k0, int nk16) {
    for (int r = 0; r < nq; r++) {
        float *s = w->s + r * TILE_K, *ds = w->ds + r * TILE_K;
        seen_keys seen = keys_seen(sight, q0 + r, k0, nk16);
        for (int j = 0; j < seen.begin; j++) s[j] = ds[j] = 0;
        for (int j = seen.end; j < nk16; j++) s[j] = ds[j] = 0;
        softmax_gradient_row(s + seen.begin, ds + seen.begin, seen.end - seen.begin, task->scoring,
                             lse[r], w->sum[r]);
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
        multiply(w, w->s, TILE_K, q, stride, keys, panel, nq, nk, HS, 0);    /* s = q k^T */
        multiply(w, w->ds, TILE_K, dout, ldo, values, panel, nq, nk, HS, 0); /* dp = dout v^T */
        drop_tile(w->ds, nq, nk, task->dropout, index, T);
        backward_rows(task, w, sight, lse, q0, nq, k0, nk16);
        drop_tile(w->s, nq, nk, task->dropout, index, T);
        pack_tile(w->p_panels, w->s, nq, nk16);
        pack_tile(w->ds_panels, w->ds, nq, nk16);
        for (int r = 0; r < nq; r++) round_row(w->p + r * TILE_K, w->ds + r * TILE_K, 1, nk);
        multiply(w, w->dv_turned + k0, T16, w->dout_turned, TILE_Q, w->p_panels,
                 pack_panel_size(TILE_Q), HS, nk, nq, 1); /* dv^T += dout^T p */
        multiply(w, w->dk_turned + k0, T16, w->q_turned, TILE_Q, w->ds_panels,
                 pack_panel_size(TILE_Q), HS, nk, nq, 1); /* dk^T += q^T ds */
        multiply(w, w->sum_q, HS16, w->p, TILE_K, w->keys_columns + (int64_t)k0 * PANEL,
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
                          scoring_of(op->scale, op->cap, op->HS)};
    cpu_parallel(ctx, attention_backward_heads, &task, (int64_t)op->B * op->NKV, 1);
}
