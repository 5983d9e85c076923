/* adamw.c: global gradient norm, clipping and AdamW, each one pass over memory. */
#include "simd.h"
#include "weights.h"

#include <math.h>

enum { BLOCK = 1 << 15 };

CPU_WORKSPACE(adamw_workspace) {
    (void)n_threads;
    return shape->training ? sizeof(double) * (size_t)cpu_div_up(shape->n_params, BLOCK) : 0;
}

typedef struct norm_task {
    const float *grads;
    double *sums; /* of squares, a block each */
    int64_t n;
} norm_task;

static void square_sums(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const norm_task *a = p;
    for (int64_t block = begin; block < end; block++) {
        const float *g = a->grads + block * BLOCK;
        int size = (int)(a->n - block * BLOCK < BLOCK ? a->n - block * BLOCK : BLOCK);
        vf sum[4] = {{0}};
        int i = 0;
        for (; i + 4 * LANES <= size; i += 4 * LANES)
            for (int j = 0; j < 4; j++) {
                vf x = vf_load(g + i + j * LANES);
                sum[j] += x * x;
            }
        double total = vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
        for (; i < size; i++) total += (double)g[i] * g[i];
        a->sums[block] = total;
    }
}

CPU_OP(grad_norm) {
    norm_task task = {op->grads, ctx->workspace, op->n};
    int64_t blocks = cpu_div_up(op->n, BLOCK);
    cpu_parallel(ctx, square_sums, &task, blocks, 4);
    double total = 0;
    for (int64_t i = 0; i < blocks; i++) total += task.sums[i];
    *op->norm = (float)sqrt(total);
}

typedef struct adamw_task {
    const adamw_update *op;
    float lr, beta1, beta2, eps, decay, grad_scale, correction1, correction2;
} adamw_task;

/* m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
 * w -= lr decay w;  w -= lr (m / correction1) / (sqrt(v / correction2) + eps) */
static void adamw_run(const adamw_task *a, int64_t begin, int64_t end, float decay) {
    float keep = 1.0f - a->lr * decay, rate = a->lr / a->correction1;
    float root = 1.0f / sqrtf(a->correction2);
    float *w = a->op->w + begin, *m = a->op->m + begin, *v = a->op->v + begin;
    const float *grads = a->op->grads + begin;
    int size = (int)(end - begin);
    FOR_LANES (i, k, size) {
        vf g = vf_get(grads + i, k) * a->grad_scale;
        vf m1 = vf_get(m + i, k) * a->beta1 + g * (1.0f - a->beta1);
        vf v1 = vf_get(v + i, k) * a->beta2 + g * g * (1.0f - a->beta2);
        vf w1 = vf_get(w + i, k) * keep - rate * (m1 / (vf_sqrt(v1) * root + a->eps));
        vf_put(m + i, m1, k);
        vf_put(v + i, v1, k);
        vf_put(w + i, w1, k);
    }
}

/* Pieces of a segment: blocks of numbers, or strips of rows where the strip is packed in passing. */
static int64_t pieces(const gpt_segment *s) {
    return cpu_strips_are_whole(s) ? s->rows / STRIP : cpu_div_up(s->size, BLOCK);
}

static void adamw_piece(const adamw_task *a, const gpt_segment *s, int64_t piece) {
    int64_t size = cpu_strips_are_whole(s) ? (int64_t)STRIP * s->cols : BLOCK, first = piece * size;
    int64_t last = first + size < s->size ? first + size : s->size;
    adamw_run(a, s->offset + first, s->offset + last, s->decay ? a->decay : 0);
    if (cpu_strips_are_whole(s)) cpu_pack_strip(s, a->op->w + s->offset, piece, 1);
}

/* Pieces begin to end - 1, counted through the segments. */
static void adamw_pieces(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const adamw_task *a = p;
    const gpt_segment *segments = a->op->segments;
    for (int i = 0; i < a->op->n_segments && end > 0; i++) {
        int64_t n = pieces(&segments[i]);
        for (int64_t piece = begin > 0 ? begin : 0; piece < n && piece < end; piece++)
            adamw_piece(a, &segments[i], piece);
        begin -= n;
        end -= n;
    }
}

CPU_OP(adamw_update) {
    float norm = *op->norm;
    if (!isfinite(norm)) return;
    const gpt_segment *segments = op->segments;
    gpt_adamw adamw = op->step->adamw;
    float scale = adamw.grad_clip > 0 ? adamw.grad_clip / (norm + 1e-6f) : 1;
    adamw_task task = {.op = op,
                       .lr = adamw.lr,
                       .beta1 = adamw.beta1,
                       .beta2 = adamw.beta2,
                       .eps = adamw.eps,
                       .decay = adamw.weight_decay,
                       .grad_scale = scale < 1 ? scale : 1,
                       .correction1 = op->step->correction1,
                       .correction2 = op->step->correction2};
    int64_t n = 0;
    for (int i = 0; i < op->n_segments; i++) n += pieces(&segments[i]);
    cpu_parallel(ctx, adamw_pieces, &task, n, 2);
    for (const gpt_segment *s = segments; s < segments + op->n_segments; s++) {
        weights_pack pack = {.w = op->w + s->offset, .segment = s, .training = 1};
        if (s->packed && !cpu_strips_are_whole(s)) CPU_NAME(weights_pack)(ctx, &pack);
    }
}
