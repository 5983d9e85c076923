/* arena.c: the one allocation of a model, planned before it is made. */
#include "model.h"

enum { LOGIT_ROWS = 64 };

static acts_shape model_acts_shape(const gpt_options *o) {
    int N = o->max_batch * o->max_seq;
    return (acts_shape){.N = N,
                        .T = o->max_seq,
                        .training = o->training,
                        .dropout = o->dropout > 0,
                        .recompute = o->training ? o->recompute : GPT_RECOMPUTE_NONE,
                        .recompute_layers = o->recompute_layers,
                        .lora = o->lora,
                        .logit_rows = N < LOGIT_ROWS ? N : LOGIT_ROWS};
}

static gpt_shape model_shape(const gpt_config *c, const gpt_options *o,
                             const params_layout *layout) {
    gpt_shape shape = config_shape(c);
    shape.N = o->max_batch * o->max_seq;
    shape.T = o->max_seq;
    shape.training = o->training;
    shape.lora_rank = o->lora.rank;
    shape.dora = dora_rows(&o->lora) > 0;
    if (shape.N && shape.N < dora_rows(&o->lora)) shape.N = dora_rows(&o->lora);
    shape.n_params = layout->n_stored;
    shape.muon = layout->n_states[GPT_OPTIMIZER_MUON] > 0;
    return shape;
}

arena_plan arena_plan_of(const gpt_config *c, const gpt_options *o, const gpt_ops *ops,
                         const gpt_ctx *ctx, params_layout *layout) {
    arena_plan p = {0};
    int64_t n_stored = layout->n_stored;
    acts none = {0};
    acts_shape shape = model_acts_shape(o);
    gpt_shape extent = model_shape(c, o, layout);
    p.params = align_buffer((size_t)n_stored * sizeof(float));
    p.packed = params_plan_packed(ops, o->training, NULL, layout);
    p.grads = align_buffer((size_t)layout->n_grads * sizeof(float));
    p.residual = o->wire == GPT_WIRE_FP32 ? 0 : p.grads;
    for (int kind = 0; kind < N_OPTIMIZERS; kind++)
        p.states += (size_t)optimizer_states(kind) * state_bytes(layout, kind);
    p.state = align_buffer(sizeof(step_state));
    p.dora = dora_plan(c, o, ops, NULL, NULL);
    p.acts = acts_plan(c, ops, &shape, NULL, &none);
    p.workspace = extent.N ? align_buffer(ops->workspace_bytes(ctx, &extent)) : 0;
    p.total = p.params + p.packed + p.grads + p.residual + p.states + p.state + p.dora + p.acts +
              p.workspace;
    return p;
}

int arena_largest_batch(gpt_model *m, size_t bytes) {
    int fits = 0, fails = m->options.max_batch;
    while (fails - fits > 1) {
        gpt_options o = m->options;
        o.max_batch = fits + (fails - fits) / 2;
        arena_plan p = arena_plan_of(&m->config, &o, m->ops, m->ctx, &m->layout);
        *(p.total <= bytes ? &fits : &fails) = o.max_batch;
    }
    return fits;
}

void arena_lay_out(gpt_model *m, const arena_plan *p) {
    char *at = m->arena;
    m->params = (float *)at, at += p->params;
    params_plan_packed(m->ops, m->options.training, at, &m->layout), at += p->packed;
    m->grads = p->grads ? (float *)at : NULL, at += p->grads;
    m->residual = p->residual ? (float *)at : NULL, at += p->residual;
    for (int kind = 0; kind < N_OPTIMIZERS; kind++)
        for (int k = 0; k < optimizer_states(kind) && m->layout.n_states[kind]; k++)
            m->optimizer_state[kind][k] = at, at += state_bytes(&m->layout, kind);
    m->state = (step_state *)at, at += p->state;
    dora_plan(&m->config, &m->options, m->ops, at, &m->dora), at += p->dora;
    acts_shape shape = model_acts_shape(&m->options);
    acts_plan(&m->config, m->ops, &shape, at, &m->acts), at += p->acts;
    m->workspace = at;
    params_view_set(&m->config, &m->layout, m->params, &m->w);
    if (m->grads) grads_view_set(&m->config, &m->layout, m->grads, &m->dw);
}
