/* optim.c: one update of all parameters. */
#include "model.h"

void model_update(gpt_model *m, const gpt_adamw *adamw) {
    m->ops->grad_norm(m->ctx, m->grad_norm, m->grads, m->layout.n_stored);
    m->ops->adamw_update(m->ctx, m->params, m->moment1, m->moment2, m->grads, m->grad_norm, *adamw,
                         m->step + 1, m->layout.segments, m->layout.n_slots);
}
