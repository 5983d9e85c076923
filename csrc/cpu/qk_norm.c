/* qk_norm.c: RMSNorm of the heads of queries and keys, in place. */
#include "cpu.h"

#include "simd.h"

#include <math.h>

/* As in norm.c: each block of rows sums its own weight gradients, then the blocks are added in order. */
enum { MAX_BLOCKS = 64, MIN_BLOCK_ROWS = 8 };

static int block_rows(int N) {
    return cpu_max(MIN_BLOCK_ROWS, (int)cpu_div_up(N, MAX_BLOCKS));
}

CPU_WORKSPACE(qk_norm_workspace) {
    (void)n_threads;
    return shape->training ? sizeof(float) * MAX_BLOCKS * 2 * (size_t)cpu_max(shape->QK, shape->HS)
                           : 0;
}

/* 1 / sqrt(mean(x^2) + eps) of a head. */
static float head_rstd(const elem *x, float eps, int HS) {
    vf s = {0};
    FOR_LANES (c, k, HS) {
        vf v = vf_get(x + c, k);
        s += v * v; /* lanes past the end are 0 */
    }
    return 1.0f / sqrtf(vf_sum(s) / (float)HS + eps);
}

static void qk_norm_forward_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const qk_norm_forward *a = p;
    int HS = a->HS, heads = a->NH + a->NKV, width = heads * HS;
    elem *in = a->in;
    for (int64_t n = begin; n < end; n++) {
        elem *row = (elem *)a->qkv + n * (width + a->NKV * HS);
        if (in) memcpy(in + n * width, row, sizeof(elem) * (size_t)width);
        for (int h = 0; h < heads; h++) {
            elem *x = row + h * HS;
            const float *w = h < a->NH ? a->q_w : a->k_w;
            float rstd = head_rstd(x, a->eps, HS);
            FOR_LANES (c, k, HS) vf_put(x + c, vf_get(x + c, k) * rstd * vf_get(w + c, k), k);
            if (a->stats) a->stats[n * heads + h] = rstd;
        }
    }
}

CPU_OP(qk_norm_forward) {
    qk_norm_forward task = *op;
    cpu_parallel(ctx, qk_norm_forward_rows, &task, op->N, cpu_grain(ctx, op->N, 4));
}

typedef struct backward_task {
    const qk_norm_backward *op;
    float *partial; /* (n_blocks, 2, HS) sums of a block's rows for dq_w and dk_w */
    int n_blocks;
} backward_task;

/* With g = d w, h = x rstd:  dx = rstd (g - h mean(g h)), in place of d, and dw += d h. */
static void head_backward(elem *d, const elem *x, float rstd, const float *w, float *dw, int HS) {
    vf sum = {0};
    FOR_LANES (c, k, HS) {
        vf h = vf_get(x + c, k) * rstd, dh = vf_get(d + c, k) * h;
        sum += dh * vf_get(w + c, k);
        vf_put(dw + c, vf_get(dw + c, k) + dh, k);
    }
    float mean_gh = vf_sum(sum) / (float)HS;
    FOR_LANES (c, k, HS) {
        vf h = vf_get(x + c, k) * rstd, g = vf_get(d + c, k) * vf_get(w + c, k);
        vf_put(d + c, rstd * (g - h * mean_gh), k);
    }
}

static void qk_norm_backward_blocks(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const backward_task *task = p;
    const qk_norm_backward *a = task->op;
    int HS = a->HS, heads = a->NH + a->NKV, rows = block_rows(a->N);
    for (int64_t block = begin; block < end; block++) {
        float *dq_w = task->partial + block * 2 * HS, *dk_w = dq_w + HS;
        memset(dq_w, 0, sizeof(float) * 2 * (size_t)HS);
        int64_t last = block * rows + rows < a->N ? block * rows + rows : a->N;
        for (int64_t n = block * rows; n < last; n++) {
            elem *d = (elem *)a->dqkv + n * (heads + a->NKV) * HS;
            const elem *x = (const elem *)a->in + n * heads * HS;
            for (int h = 0; h < heads; h++)
                head_backward(d + h * HS, x + h * HS, a->stats[n * heads + h],
                              h < a->NH ? a->q_w : a->k_w, h < a->NH ? dq_w : dk_w, HS);
        }
    }
}

CPU_OP(qk_norm_backward) {
    backward_task task = {op, ctx->workspace, (int)cpu_div_up(op->N, block_rows(op->N))};
    cpu_parallel(ctx, qk_norm_backward_blocks, &task, task.n_blocks, 1);
    for (int block = 0; block < task.n_blocks; block++) {
        const float *dq_w = task.partial + (int64_t)block * 2 * op->HS, *dk_w = dq_w + op->HS;
        for (int c = 0; op->dq_w && c < op->HS; c++) op->dq_w[c] += dq_w[c];
        for (int c = 0; op->dk_w && c < op->HS; c++) op->dk_w[c] += dk_w[c];
    }
}
