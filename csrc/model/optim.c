/* optim.c: one update of all parameters, and of the form in which products read them. */
#include "model.h"

#include <math.h>

void model_pack(gpt_model *m) {
    for (int i = 0; m->pack_stale && i < m->layout.n_slots; i++) {
        const gpt_segment *s = &m->layout.segments[i];
        weights_pack op = {
            .w = m->params + s->offset, .segment = s, .training = m->options.training};
        if (s->packed) m->ops->weights_pack(m->ctx, &op);
    }
    m->pack_stale = false;
}

static float correction(float beta, int64_t step) {
    return (float)(1 - pow((double)beta, (double)step));
}

void model_update(gpt_model *m, const gpt_adamw *adamw) {
    const gpt_ops *ops = m->ops;
    const gpt_adamw_step step = {*adamw, correction(adamw->beta1, m->step + 1),
                                 correction(adamw->beta2, m->step + 1)};
    const int64_t key[] = {(int64_t)(intptr_t)m->arena};
    grad_norm norm = {
        .norm = &m->state->report.grad_norm, .grads = m->grads, .n = m->layout.n_stored};
    adamw_update op = {.w = m->params,
                       .m = m->moment1,
                       .v = m->moment2,
                       .grads = m->grads,
                       .norm = norm.norm,
                       .step = &m->state->adamw,
                       .segments = m->layout.segments,
                       .n_segments = m->layout.n_slots};
    model_pack(m); /* so that a step that is refused leaves both forms alike */
    ops->upload(m->ctx, &m->state->adamw, &step, sizeof step);
    if (ops->replay_begin && ops->replay_begin(m->ctx, key, sizeof key / sizeof *key)) return;
    do {
        ops->grad_norm(m->ctx, &norm);
        ops->adamw_update(m->ctx, &op);
    } while (ops->replay_begin && !ops->replay_end(m->ctx));
}
