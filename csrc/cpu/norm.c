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

size_t cpu_norm_workspace(const gpt_shape *shape, int n_threads) {
    (void)n_threads;
    return shape->training ? sizeof(float) * MAX_BLOCKS * 2 * (size_t)shape->C : 0;
}

typedef struct norm_args {
    elem *resid_out, *out, *dresid, *dbranch;
    const elem *resid, *branch, *dout;
    float *stats_out, *partial, *dw, *db;
    const float *w, *b, *stats;
    gpt_dropout dropout;
    int norm, N, C, n_blocks;
    float eps;
} norm_args;

/* sum = resid + dropout(branch), one row. */
static void residual_row(elem *sum, const elem *resid, const elem *branch, gpt_dropout dropout,
                         int64_t row, int C) {
    FOR_LANES (c, k, C) {
        vf x = vf_get(branch + c, k);
        if (dropout.p > 0) x *= dropout_lanes(dropout, (uint64_t)(row * C + c));
        vf_put(sum + c, vf_get(resid + c, k) + x, k);
    }
}

static void norm_forward_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const norm_args *a = p;
    int C = a->C;
    for (int64_t row = begin; row < end; row++) {
        const elem *x = a->resid + row * C;
        elem *out = a->out + row * C;
        if (a->branch) {
            elem *sum = a->resid_out + row * C;
            residual_row(sum, x, a->branch + row * C, a->dropout, row, C);
            x = sum;
        }
        float mean = 0;
        if (a->norm == GPT_NORM_LAYERNORM) {
            vf s = {0};
            FOR_LANES (c, k, C) s += vf_get(x + c, k);
            mean = vf_sum(s) / (float)C;
        }
        vf s = {0};
        FOR_LANES (c, k, C) {
            vf d = vf_get(x + c, k) - mean;
            if (k < LANES) { /* the lanes past the end hold 0 - mean */
                float tail[LANES];
                vf_store(tail, d);
                d = vf_load_n(tail, k);
            }
            s += d * d;
        }
        float rstd = 1.0f / sqrtf(vf_sum(s) / (float)C + a->eps);
        FOR_LANES (c, k, C) {
            vf y = (vf_get(x + c, k) - mean) * rstd;
            if (a->w) y *= vf_get(a->w + c, k);
            if (a->b) y += vf_get(a->b + c, k);
            vf_put(out + c, y, k);
        }
        if (a->stats_out) {
            a->stats_out[2 * row] = mean;
            a->stats_out[2 * row + 1] = rstd;
        }
    }
}

void cpu_residual_norm_forward(gpt_ctx *ctx, act *resid_out, act *out, float *stats,
                               const act *resid, const act *branch, const float *w, const float *b,
                               gpt_dropout_site dropout, int norm, float eps, int N, int C) {
    norm_args args = {.resid_out = resid_out,
                      .out = out,
                      .stats_out = stats,
                      .resid = resid,
                      .branch = branch,
                      .w = w,
                      .b = b,
                      .dropout = dropout_at(dropout),
                      .norm = norm,
                      .eps = eps,
                      .N = N,
                      .C = C};
    cpu_parallel(ctx, norm_forward_rows, &args, N, cpu_grain(ctx, N, 4));
}

/* With g = dout w, h = (x - mean) rstd:  dx = rstd (g - mean(g) - h mean(g h)); RMSNorm has no
 * mean(g) term. */
static void norm_backward_row(const norm_args *a, int64_t row, float *dw, float *db) {
    int C = a->C;
    const elem *x = a->resid + row * C, *dout = a->dout + row * C;
    elem *dx = a->dresid + row * C;
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
    float mean_gh = vf_sum(sum_gh) / (float)C;
    FOR_LANES (c, k, C) {
        vf d = vf_get(dout + c, k);
        vf h = (vf_get(x + c, k) - mean) * rstd;
        vf g = a->w ? d * vf_get(a->w + c, k) : d;
        vf_put(dx + c, vf_get(dx + c, k) + rstd * (g - mean_g - h * mean_gh), k);
    }
    if (a->dbranch) {
        elem *dbranch = a->dbranch + row * C;
        FOR_LANES (c, k, C)
            vf_put(dbranch + c,
                   vf_get(dx + c, k) * dropout_lanes(a->dropout, (uint64_t)(row * C + c)), k);
    }
}

static void norm_backward_blocks(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const norm_args *a = p;
    int rows = block_rows(a->N);
    for (int64_t block = begin; block < end; block++) {
        float *dw = a->dw ? a->partial + block * 2 * a->C : NULL;
        float *db = a->db ? a->partial + (block * 2 + 1) * a->C : NULL;
        if (dw) memset(dw, 0, sizeof(float) * (size_t)a->C);
        if (db) memset(db, 0, sizeof(float) * (size_t)a->C);
        int64_t last = block * rows + rows < a->N ? block * rows + rows : a->N;
        for (int64_t row = block * rows; row < last; row++) norm_backward_row(a, row, dw, db);
    }
}

static void norm_add_blocks(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const norm_args *a = p;
    for (int block = 0; block < a->n_blocks; block++) {
        const float *dw = a->partial + (int64_t)block * 2 * a->C, *db = dw + a->C;
        for (int64_t c = begin; a->dw && c < end; c++) a->dw[c] += dw[c];
        for (int64_t c = begin; a->db && c < end; c++) a->db[c] += db[c];
    }
}

void cpu_residual_norm_backward(gpt_ctx *ctx, act *dresid, act *dbranch, float *dw, float *db,
                                const act *dout, const act *resid, const float *stats,
                                const float *w, gpt_dropout_site dropout, int norm, int N, int C) {
    norm_args args = {.dresid = dresid,
                      .dbranch = dbranch,
                      .dw = dw,
                      .db = db,
                      .dout = dout,
                      .resid = resid,
                      .stats = stats,
                      .w = w,
                      .dropout = dropout_at(dropout),
                      .norm = norm,
                      .partial = ctx->workspace,
                      .N = N,
                      .C = C,
                      .n_blocks = (int)cpu_div_up(N, block_rows(N))};
    cpu_parallel(ctx, norm_backward_blocks, &args, args.n_blocks, 1);
    if (dw || db) cpu_parallel(ctx, norm_add_blocks, &args, C, 256);
}
