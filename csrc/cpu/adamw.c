/* adamw.c: clipping and AdamW in one pass over memory. */
#include "simd.h"
#include "update.h"

#include <math.h>

typedef struct adamw_rule {
    const adamw_update *op;
    float lr, beta1, beta2, eps, decay, grad_scale, correction1, correction2;
} adamw_rule;

/* m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
 * w -= lr decay w;  w -= lr (m / correction1) / (sqrt(v / correction2) + eps) */
static void adamw_run(const void *p, const gpt_segment *s, int64_t first, int size) {
    const adamw_rule *a = p;
    float lr = a->lr * s->lr_scale, keep = 1.0f - lr * (s->decay ? a->decay : 0);
    float rate = lr / a->correction1, root = 1.0f / sqrtf(a->correction2);
    float *w = a->op->w + s->offset + first;
    float *m = a->op->m + s->state + first, *v = a->op->v + s->state + first;
    const float *grads = a->op->grads + s->grad + first;
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

CPU_OP(adamw_update) {
    gpt_adamw adamw = op->step->adamw;
    adamw_rule rule = {.op = op,
                       .lr = adamw.lr,
                       .beta1 = adamw.beta1,
                       .beta2 = adamw.beta2,
                       .eps = adamw.eps,
                       .decay = adamw.weight_decay,
                       .grad_scale = update_clip(*op->norm, adamw.grad_clip),
                       .correction1 = op->step->correction1,
                       .correction2 = op->step->correction2};
    update_task task = {GPT_OPTIMIZER_ADAMW, adamw_run, &rule, op->w, op->segments, op->n_segments};
    if (isfinite(*op->norm)) update_segments(ctx, task);
}
