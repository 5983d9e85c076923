/* norm.c: residual add, dropout of the branch, and LayerNorm or RMSNorm, one row at a time. */
#include "cpu.h"

#include "simd.h"

#include <math.h>

/* Weight gradients are sums over all rows. Each block of rows sums its own in the workspace, then
 * the blocks are added in order: the result does not depend on which thread took which block. */
enum { MAX_BLOCKS = 64, MIN_BLOCK_ROWS = 8 };

static int block_rows(int N) {
    return cpu_max(MIN_BLOCK_ROWS, (int)cpu_div_up(N, MAX_BLOCKS));
}

CPU_WORKSPACE(norm_workspace) {
    (void)n_threads;
    return shape->training ? sizeof(float) * MAX_BLOCKS * 2 * (size_t)shape->C : 0;
}

/* sum = resid + dropout(branch), one row; with `rest` as residual_norm_forward says. */
static void residual_row(elem *sum, elem *rest, const elem *resid, const elem *branch,
                         gpt_dropout dropout, int64_t row, int C) {
    FOR_LANES (c, k, C) {
        vf x = vf_get(branch + c, k);
        if (dropout.p > 0) x *= dropout_lanes(dropout, (uint64_t)(row * C + c));
        x += vf_get(resid + c, k);
        if (rest) x += vf_get(rest + c, k);
        vf_put(sum + c, x, k);
        if (rest) vf_put(rest + c, x - vf_get(sum + c, k), k);
    }
}

/* Channels of a row from c on, with what they lack. */
static inline vf whole(const elem *x, const elem *rest, int c, int k) {
    vf v = vf_get(x + c, k);
    return rest ? v + vf_get(rest + c, k) : v;
}

typedef struct forward_task {
    const residual_norm_forward *op;
    gpt_dropout dropout;
} forward_task;

static void norm_forward_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const forward_task *task = p;
    const residual_norm_forward *a = task->op;
    const elem *resid = a->resid, *branch = a->branch;
    elem *resid_out = a->resid_out, *all_out = a->out, *all_rest = a->rest;
    int C = a->C;
    for (int64_t row = begin; row < end; row++) {
        const elem *x = resid + row * C;
        elem *out = all_out + row * C, *rest = all_rest ? all_rest + row * C : NULL;
        if (branch) {
            elem *sum = resid_out + row * C;
            residual_row(sum, rest, x, branch + row * C, task->dropout, row, C);
            x = sum;
        }
        if (rest && out == x) continue; /* NORM_NONE: it is there, and has lost nothing more */
        float mean = 0;
        if (a->norm == GPT_NORM_LAYERNORM) {
            vf s = {0};
            FOR_LANES (c, k, C) s += whole(x, rest, c, k);
            mean = vf_sum(s) / (float)C;
        }
        vf s = {0};
        FOR_LANES (c, k, C) {
            vf d = whole(x, rest, c, k) - mean;
            if (k < LANES) { /* the lanes past the end hold 0 - mean */
                float tail[LANES];
                vf_store(tail, d);
                d = vf_load_n(tail, k);
            }
            s += d * d;
        }
        float rstd = a->norm == NORM_NONE ? 1 : 1.0f / sqrtf(vf_sum(s) / (float)C + a->eps);
        FOR_LANES (c, k, C) {
            vf y = (whole(x, rest, c, k) - mean) * rstd;
            if (a->w) y *= vf_get(a->w + c, k);
            if (a->b) y += vf_get(a->b + c, k);
            vf_put(out + c, y, k);
        }
        if (a->stats) {
            a->stats[2 * row] = mean;
            a->stats[2 * row + 1] = rstd;
        }
    }
}

CPU_OP(residual_norm_forward) {
    forward_task task = {op, dropout_at(op->dropout)};
    cpu_parallel(ctx, norm_forward_rows, &task, op->N, cpu_grain(ctx, op->N, 4));
}

typedef struct backward_task {
    const residual_norm_backward *op;
    gpt_dropout dropout;
    float *partial; /* (n_blocks, 2, C) sums of a block's rows for dw and db */
    int n_blocks;
} backward_task;

/* With g = dout w, h = (x - mean) rstd:  dx = rstd (g - mean(g) - h mean(g h)); RMSNorm has no
 * mean(g) term. */
static void norm_backward_row(const backward_task *task, int64_t row, float *dw, float *db) {
    const residual_norm_backward *a = task->op;
    int C = a->C;
    const elem *x = (const elem *)a->resid + row * C, *dout = (const elem *)a->dout + row * C;
    elem *dx = (elem *)a->dresid + row * C;
    float mean = a->stats[2 * row], rstd = a->stats[2 * row + 1];
    vf sum_g = {0}, sum_gh = {0};
    FOR_LANES (c, k, C) {
        vf d = vf_get(dout + c, k);
        vf h = (vf_get(x + c, k) - mean) * rstd;
        vf g = a->w ? d * vf_get(a->w + c, k) : d;
        sum_g += g; /* lanes past the end: d and g are 0 there */
        sum_gh += g * h;
        if (dw) vf_put(dw + c, vf_get(dw + c, k) + d * h, k);
        if (db) vf_put(db + c, vf_get(db + c, k) + d, k);
    }
    float mean_g = a->norm == GPT_NORM_LAYERNORM ? vf_sum(sum_g) / (float)C : 0;
    float mean_gh = a->norm == NORM_NONE ? 0 : vf_sum(sum_gh) / (float)C;
    FOR_LANES (c, k, C) {
        vf d = vf_get(dout + c, k);
        vf h = (vf_get(x + c, k) - mean) * rstd;
        vf g = a->w ? d * vf_get(a->w + c, k) : d;
        vf_put(dx + c, vf_get(dx + c, k) + rstd * (g - mean_g - h * mean_gh), k);
    }
    if (a->dbranch) {
        elem *dbranch = (elem *)a->dbranch + row * C;
        FOR_LANES (c, k, C)
            vf_put(dbranch + c,
                   vf_get(dx + c, k) * dropout_lanes(task->dropout, (uint64_t)(row * C + c)), k);
    }
}

static void norm_backward_blocks(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const backward_task *task = p;
    const residual_norm_backward *a = task->op;
    int rows = block_rows(a->N);
    for (int64_t block = begin; block < end; block++) {
        float *dw = a->dw ? task->partial + block * 2 * a->C : NULL;
        float *db = a->db ? task->partial + (block * 2 + 1) * a->C : NULL;
        if (dw) memset(dw, 0, sizeof(float) * (size_t)a->C);
        if (db) memset(db, 0, sizeof(float) * (size_t)a->C);
        int64_t last = block * rows + rows < a->N ? block * rows + rows : a->N;
        for (int64_t row = block * rows; row < last; row++) norm_backward_row(task, row, dw, db);
    }
}

static void norm_add_blocks(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const backward_task *task = p;
    const residual_norm_backward *a = task->op;
    for (int block = 0; block < task->n_blocks; block++) {
        const float *dw = task->partial + (int64_t)block * 2 * a->C, *db = dw + a->C;
        for (int64_t c = begin; a->dw && c < end; c++) a->dw[c] += dw[c];
        for (int64_t c = begin; a->db && c < end; c++) a->db[c] += db[c];
    }
}

CPU_OP(residual_norm_backward) {
    backward_task task = {op, dropout_at(op->dropout), ctx->workspace,
                          (int)cpu_div_up(op->N, block_rows(op->N))};
    cpu_parallel(ctx, norm_backward_blocks, &task, task.n_blocks, 1);
    if (op->dw || op->db) cpu_parallel(ctx, norm_add_blocks, &task, op->C, 256);
}
