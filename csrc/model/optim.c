/* optim.c: one update of all parameters, and of the form in which products read them. */
#include "model.h"
#include "moments.h"

#include <math.h>

void model_pack(gpt_model *m) {
    for (int i = 0; m->pack_stale && i < m->layout.n_slots; i++) {
        const gpt_segment *s = &m->layout.segments[i];
        weights_pack op = {
            .w = m->params + s->offset, .segment = s, .training = m->options.training};
        if (s->packed && !s->n_stacked) m->ops->weights_pack(m->ctx, &op);
    }
    m->pack_stale = false;
}

static float correction(float beta, int64_t step) {
    return (float)(1 - pow((double)beta, (double)step));
}

static void upload_settings(gpt_model *m, const gpt_optimizer *const settings[N_OPTIMIZERS]) {
    const gpt_optimizer *adamw = settings[GPT_OPTIMIZER_ADAMW];
    const gpt_optimizer *sgd = settings[GPT_OPTIMIZER_SGD], *muon = settings[GPT_OPTIMIZER_MUON];
    if (adamw) {
        gpt_adamw_step step = {adamw->adamw, correction(adamw->adamw.beta1, m->step + 1),
                               correction(adamw->adamw.beta2, m->step + 1), moment_key(m->step)};
        m->ops->upload(m->ctx, &m->state->adamw, &step, sizeof step);
    }
    if (sgd) m->ops->upload(m->ctx, &m->state->sgd, &sgd->sgd, sizeof sgd->sgd);
    if (muon) m->ops->upload(m->ctx, &m->state->muon, &muon->muon, sizeof muon->muon);
}

double update_flops(const params_layout *layout) {
    double flops = 0;
    for (const gpt_segment *s = layout->segments; s < layout->segments + layout->n_slots; s++)
        for (int i = 0; s->optimizer == GPT_OPTIMIZER_MUON && i < s->n_matrices; i++)
            flops += muon_flops(s->matrix_rows[i], s->cols);
    return flops;
}

void model_update(gpt_model *m, const gpt_optimizer *const settings[N_OPTIMIZERS]) {
    const gpt_ops *ops = m->ops;
    const int64_t key[] = {(int64_t)(intptr_t)m->arena};
    grad_norm norm = {
        .norm = &m->state->report.grad_norm, .grads = m->grads, .n = m->layout.n_grads};
    void **moments = m->optimizer_state[GPT_OPTIMIZER_ADAMW];
    adamw_update by_adamw = {.w = m->params,
                             .m = moments[0],
                             .v = moments[1],
                             .m_scales = moment_scales(&m->layout, moments[0]),
                             .v_scales = moment_scales(&m->layout, moments[1]),
                             .moments = m->layout.moments,
                             .grads = m->grads,
                             .norm = norm.norm,
                             .step = &m->state->adamw,
                             .segments = m->layout.segments,
                             .n_segments = m->layout.n_slots};
    sgd_update by_sgd = {.w = m->params,
                         .momentum = m->optimizer_state[GPT_OPTIMIZER_SGD][0],
                         .grads = m->grads,
                         .norm = norm.norm,
                         .step = &m->state->sgd,
                         .segments = m->layout.segments,
                         .n_segments = m->layout.n_slots};
    muon_update by_muon = {.w = m->params,
                           .momentum = m->optimizer_state[GPT_OPTIMIZER_MUON][0],
                           .grads = m->grads,
                           .norm = norm.norm,
                           .step = &m->state->muon,
                           .segments = m->layout.segments,
                           .n_segments = m->layout.n_slots};
    if (is_sharded(&m->layout)) {
        by_adamw.segments = by_sgd.segments = by_muon.segments = m->layout.shard_segments;
        by_adamw.n_segments = by_sgd.n_segments = by_muon.n_segments = m->layout.n_shard_segments;
        m->state->report.grad_norm = m->shard_norm;
    }
    model_pack(m); /* so that a step that is refused leaves both forms alike */
    upload_settings(m, settings);
    m->dora.stale = true;
    _Static_assert(sizeof key <= GPT_REPLAY_KEY * sizeof *key, "GPT_REPLAY_KEY is too small");
    if (ops->replay_begin && ops->replay_begin(m->ctx, key, sizeof key / sizeof *key)) return;
    do {
        if (!is_sharded(&m->layout)) ops->grad_norm(m->ctx, &norm);
        if (settings[GPT_OPTIMIZER_ADAMW]) ops->adamw_update(m->ctx, &by_adamw);
        if (settings[GPT_OPTIMIZER_SGD]) ops->sgd_update(m->ctx, &by_sgd);
        if (settings[GPT_OPTIMIZER_MUON]) ops->muon_update(m->ctx, &by_muon);
    } while (ops->replay_begin && !ops->replay_end(m->ctx));
}
