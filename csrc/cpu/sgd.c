/* sgd.c: clipping and SGD with momentum in one pass over memory. */
#include "simd.h"
#include "update.h"

#include <math.h>

typedef struct sgd_rule {
    const sgd_update *op;
    gpt_sgd sgd;
    float grad_scale;
} sgd_rule;

static void sgd_run(const void *p, const gpt_segment *s, int64_t first, int size) {
    const sgd_rule *a = p;
    float lr = a->sgd.lr * s->lr_scale, decay = s->decay ? a->sgd.weight_decay : 0;
    float *w = a->op->w + s->offset + first, *m = a->op->momentum + s->state + first;
    const float *grads = a->op->grads + s->grad + first;
    FOR_LANES (i, k, size) {
        vf w0 = vf_get(w + i, k), g = vf_get(grads + i, k) * a->grad_scale + w0 * decay;
        vf m1 = vf_get(m + i, k) * a->sgd.momentum + g;
        vf_put(m + i, m1, k);
        vf_put(w + i, w0 - m1 * lr, k);
    }
}

CPU_OP(sgd_update) {
    sgd_rule rule = {op, *op->step, update_clip(*op->norm, op->step->grad_clip)};
    update_task task = {GPT_OPTIMIZER_SGD, sgd_run, &rule, op->w, op->segments, op->n_segments, 1};
    if (isfinite(*op->norm)) update_segments(ctx, task);
}
