/* optim.c: one update of all parameters, and of the form in which products read them. */
#include "model.h"

void model_pack(gpt_model *m) {
    if (m->pack_stale)
        m->ops->weights_pack(m->ctx, m->params, m->layout.segments, m->layout.n_slots,
                             m->options.training);
    m->pack_stale = false;
}

void model_update(gpt_model *m, const gpt_adamw *adamw) {
    model_pack(m); /* so that a step that is refused leaves both forms alike */
    m->ops->grad_norm(m->ctx, m->grad_norm, m->grads, m->layout.n_stored);
    m->ops->adamw_update(m->ctx, m->params, m->moment1, m->moment2, m->grads, m->grad_norm, *adamw,
                         m->step + 1, m->layout.segments, m->layout.n_slots);
}
