/* experts.c: the feed-forward branch of layers with experts, forward and backward. */
#include "model.h"

void experts_route(gpt_model *m, const acts *a, const batch *x, int l) {
    const gpt_config *c = &m->config;
    const layer_acts *la = &a->layers[l];
    route_forward op = {.probs = la->probs,
                        .gates = la->gates,
                        .choices = la->choices,
                        .places = la->places,
                        .begins = la->begins,
                        .in = la->norm_2,
                        .w = m->w.layers[l].router_w,
                        .norm = c->expert_norm,
                        .N = x->N,
                        .C = c->n_embd,
                        .E = c->n_expert,
                        .K = c->n_expert_used};
    if (c->n_expert) m->ops->route_forward(m->ctx, &op);
}

/* The rows of choices, from those of tokens. */
static void spread(gpt_model *m, const batch *x, const layer_acts *la, act *out, float *dgates,
                   const act *in, const act *values) {
    expert_spread op = {.out = out,
                        .dgates = dgates,
                        .in = in,
                        .values = values,
                        .gates = dgates ? la->gates : NULL,
                        .places = la->places,
                        .N = x->N,
                        .C = m->config.n_embd,
                        .K = m->config.n_expert_used};
    m->ops->expert_spread(m->ctx, &op);
}

/* And back. */
static void combine(gpt_model *m, const batch *x, const layer_acts *la, act *out, const act *in,
                    const float *gates) {
    expert_combine op = {.out = out,
                         .in = in,
                         .gates = gates,
                         .places = la->places,
                         .N = x->N,
                         .C = m->config.n_embd,
                         .K = m->config.n_expert_used};
    m->ops->expert_combine(m->ctx, &op);
}

static void linear(gpt_model *m, const batch *x, const layer_acts *la, act *out, act *pre,
                   const act *in, weight *const *w, int activation, int IC, int OC) {
    expert_forward op = {.out = out,
                         .pre = pre,
                         .in = in,
                         .w = w,
                         .begins = la->begins,
                         .activation = activation,
                         .exact = x->training,
                         .R = x->N * m->config.n_expert_used,
                         .E = m->config.n_expert,
                         .IC = IC,
                         .OC = OC};
    m->ops->expert_forward(m->ctx, &op);
}

void experts_expand(gpt_model *m, const acts *a, const batch *x, int l) {
    const gpt_config *c = &m->config;
    const layer_acts *la = &a->layers[l];
    spread(m, x, la, a->expert_in, NULL, la->norm_2, NULL);
    linear(m, x, la, la->fc, la->fc_pre, a->expert_in, m->w.layers[l].expert_fc_w, c->activation,
           c->n_embd, c->n_ff);
}

void experts_contract(gpt_model *m, const acts *a, const batch *x, int l) {
    const gpt_config *c = &m->config;
    const layer_acts *la = &a->layers[l];
    linear(m, x, la, la->expert_out, NULL, la->fc, m->w.layers[l].expert_proj_w, GPT_ACT_NONE,
           c->n_ff, c->n_embd);
    combine(m, x, la, la->mlp_out, la->expert_out, la->gates);
}

static void linear_back(gpt_model *m, const batch *x, const layer_acts *la, act *din,
                        weight *const *dw, const act *dout, const act *in, weight *const *w,
                        const act *pre, int activation, int IC, int OC) {
    expert_backward op = {.din = din,
                          .dw = dw,
                          .dout = dout,
                          .in = in,
                          .w = w,
                          .pre = pre,
                          .begins = la->begins,
                          .activation = activation,
                          .add = !x->first,
                          .R = x->N * m->config.n_expert_used,
                          .E = m->config.n_expert,
                          .IC = IC,
                          .OC = OC};
    m->ops->expert_backward(m->ctx, &op);
}

static void route_back(gpt_model *m, const acts *a, const batch *x, int l) {
    const gpt_config *c = &m->config;
    const layer_acts *la = &a->layers[l];
    route_backward op = {.din = a->dnorm,
                         .dw = m->dw.layers[l].router_w,
                         .dgates = a->dgates,
                         .in = la->norm_2,
                         .w = m->w.layers[l].router_w,
                         .probs = la->probs,
                         .gates = la->gates,
                         .choices = la->choices,
                         .begins = a->layers[0].begins,
                         .balance = x->balance,
                         .norm = c->expert_norm,
                         .N = x->N,
                         .C = c->n_embd,
                         .E = c->n_expert,
                         .K = c->n_expert_used,
                         .L = c->n_layer};
    m->ops->route_backward(m->ctx, &op);
}

void experts_backward(gpt_model *m, const acts *a, const batch *x, int l, const act *dbranch) {
    const gpt_config *c = &m->config;
    const layer_acts *la = &a->layers[l];
    const layer_view *w = &m->w.layers[l], *dw = &m->dw.layers[l];
    const act *fc = m->ops->makes_activations ? NULL : la->fc;
    spread(m, x, la, a->dexperts, a->dgates, dbranch, la->expert_out);
    linear_back(m, x, la, a->dfc, dw->expert_proj_w, a->dexperts, fc, w->expert_proj_w, la->fc_pre,
                c->activation, c->n_ff, c->n_embd);
    spread(m, x, la, a->expert_in, NULL, la->norm_2, NULL);
    linear_back(m, x, la, a->dexperts, dw->expert_fc_w, a->dfc, a->expert_in, w->expert_fc_w, NULL,
                GPT_ACT_NONE, c->n_embd, fc_size(c));
    combine(m, x, la, a->dnorm, a->dexperts, NULL);
    route_back(m, a, x, l);
}
