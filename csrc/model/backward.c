/* backward.c: the mirror of forward.c, step by step from the last to the first. */
#include "model.h"

#include <string.h>

static void classifier(gpt_model *m, const acts *a, const batch *x, float scale) {
    const gpt_config *c = &m->config;
    classifier_backward op = {.losses = a->losses,
                              .total = &m->state->report.loss,
                              .dx = a->dnorm,
                              .dwte = m->dw.head,
                              .x = a->norm_f,
                              .wte = m->w.head,
                              .targets = a->targets,
                              .weights = x->weighted ? a->weights : NULL,
                              .scale = scale,
                              .label_smoothing = x->weighted ? 0 : m->options.label_smoothing,
                              .z_loss = x->weighted ? 0 : m->options.z_loss,
                              .cap = c->logit_cap,
                              .b = m->w.head_b,
                              .db = m->dw.head_b,
                              .add = !x->first,
                              .N = x->N,
                              .C = c->n_embd,
                              .V = c->vocab_size,
                              .Vp = padded_vocab_size(c)};
    m->ops->classifier_backward(m->ctx, &op);
}

/* Whether norms sum the gradient of the bias of a branch's last layer, which has no norm after it. */
static bool norm_sums(const gpt_model *m) {
    return m->ops->sums_branches && !norms_after(&m->config);
}

/* The norm's gradient joins dresid; what then flows into the branch is dbranch, of which the bias of
 * the branch's last layer has the sums. */
static void norm(gpt_model *m, const acts *a, const batch *x, int kind, float *dw, float *db,
                 float *dbias, const act *resid, const float *stats, const float *w,
                 gpt_dropout_site dropout) {
    bool apart = dropout.p > 0 || m->config.parallel;
    residual_norm_backward op = {.dresid = a->dresid,
                                 .dbranch = apart ? a->dbranch : NULL,
                                 .dw = dw,
                                 .db = db,
                                 .dbias = norm_sums(m) ? dbias : NULL,
                                 .dout = a->dnorm,
                                 .resid = resid,
                                 .stats = stats,
                                 .w = w,
                                 .dropout = dropout,
                                 .norm = kind,
                                 .N = x->N,
                                 .C = m->config.n_embd};
    m->ops->residual_norm_backward(m->ctx, &op);
}

/* The last layer of a branch: its bias, where the norm has not summed its gradient. */
static float *branch_bias(const gpt_model *m, float *dbias) {
    return norm_sums(m) ? NULL : dbias;
}

/* A norm that no branch goes into: dresid += its gradient. */
static void plain_norm(gpt_model *m, const batch *x, int kind, act *dresid, float *dw, float *db,
                       const act *dout, const act *resid, const float *stats, const float *w) {
    residual_norm_backward op = {.dresid = dresid,
                                 .dw = dw,
                                 .db = db,
                                 .dout = dout,
                                 .resid = resid,
                                 .stats = stats,
                                 .w = w,
                                 .norm = kind,
                                 .N = x->N,
                                 .C = m->config.n_embd};
    m->ops->residual_norm_backward(m->ctx, &op);
}

/* The gradient of a branch before the norm after it, where there is one. */
static const act *branch_norm(gpt_model *m, const acts *a, const batch *x, int l, float *dw,
                              const act *in, const float *stats, const float *w) {
    if (!norms_after(&m->config)) return a->dbranch;
    size_t bytes = (size_t)x->N * (size_t)m->config.n_embd * m->ops->act_bytes;
    m->ops->zero(m->ctx, a->dunnormed, bytes);
    plain_norm(m, x, m->layers[l].norm, a->dunnormed, dw, NULL, a->dbranch, in, stats, w);
    return a->dunnormed;
}

/* In parallel layers dbranch is that of both branches, and norm 2 has read what norm 1 has. With one norm the
 * gradient of this branch goes through it apart from the other's. */
static void join(gpt_model *m, const acts *a, const batch *x, int l) {
    const layer_view *w = &m->w.layers[l], *dw = &m->dw.layers[l];
    const layer_acts *la = &a->layers[l];
    if (m->config.parallel)
        plain_norm(m, x, norm_before(m, l), a->dresid, dw->norm_2_w, dw->norm_2_b, a->dnorm,
                   la->resid_1, la->stats_2, w->norm_2_w);
    else
        norm(m, a, x, norm_before(m, l), dw->norm_2_w, dw->norm_2_b, dw->att_proj_b, la->resid_2,
             la->stats_2, w->norm_2_w, dropout_of(m, x, l, SITE_ATT_PROJ));
}

static lora_backward lora(const gpt_model *m, const linear_backward *layer, adapter r) {
    lora_backward op = {.din = layer->din,
                        .da = r.da,
                        .db = r.db,
                        .dout = layer->dout,
                        .in = layer->in,
                        .pre = layer->pre,
                        .u = r.u,
                        .a = r.a,
                        .b = r.b,
                        .dropout = r.dropout,
                        .scale = m->options.lora.scale,
                        .activation = layer->activation,
                        .n_parts = r.shape.n_parts,
                        .N = layer->N,
                        .IC = layer->IC,
                        .OC = layer->OC,
                        .R = m->options.lora.rank};
    memcpy(op.parts, r.shape.parts, sizeof op.parts);
    return op;
}

/* The gradient of a layer's products before their rows were scaled, where they were. */
static const act *dora(gpt_model *m, const batch *x, adapter r, const act *dout, int OC) {
    dora_backward op = {.dv = m->acts.dv,
                        .dm = r.dm,
                        .dout = dout,
                        .v = r.v,
                        .gain = r.gain,
                        .per_norm = r.per_norm,
                        .n_parts = r.shape.n_parts,
                        .N = x->N,
                        .OC = OC};
    if (!r.gain) return dout;
    memcpy(op.parts, r.shape.parts, sizeof op.parts);
    m->ops->dora_backward(m->ctx, &op);
    return op.dv;
}

/* Whether backward makes the layer's input from pre, and the adapter reads it there and not pre. */
static bool makes_input(const gpt_model *m, adapter r) {
    return m->ops->makes_activations && (!r.a || adapter_joins(m, r));
}

/* With a pre, `in` may be the place of activation(pre) only. */
static void linear(gpt_model *m, const batch *x, adapter r, act *din, weight *dw, float *db,
                   const act *dout, act *in, const weight *w, const act *pre, int activation,
                   int IC, int OC) {
    bool again = pre && m->ops->makes_activations;
    linear_backward op = {.din = din,
                          .dw = dw,
                          .db = db,
                          .dout = dora(m, x, r, dout, OC),
                          .in = again ? NULL : in,
                          .w = w,
                          .pre = pre,
                          .activation = activation,
                          .add = !x->first,
                          .N = x->N,
                          .IC = IC,
                          .OC = OC,
                          .made = again && makes_input(m, r) ? in : NULL};
    lora_backward adapts = lora(m, &op, r);
    if (adapter_joins(m, r)) op.lora = &adapts;
    m->ops->linear_backward(m->ctx, &op);
    if (r.a && !op.lora) m->ops->lora_backward(m->ctx, &adapts);
}

static void rope(gpt_model *m, const acts *a, const batch *x, int l) {
    const gpt_config *c = &m->config;
    rope_backward op = {.dqkv = a->dqkv,
                        .table = rope_table(m, a, l),
                        .positions = a->positions,
                        .pos = c->pos,
                        .turned = c->rope_dim,
                        .N = x->N,
                        .T = x->T,
                        .NH = c->n_head,
                        .NKV = c->n_kv_head,
                        .HS = head_size(c)};
    if (op.table) m->ops->rope_backward(m->ctx, &op);
}

static void qk_norm(gpt_model *m, const acts *a, const layer_acts *la, const batch *x, int l) {
    const gpt_config *c = &m->config;
    qk_norm_backward op = {.dqkv = a->dqkv,
                           .dq_w = m->dw.layers[l].q_norm_w,
                           .dk_w = m->dw.layers[l].k_norm_w,
                           .in = la->qk,
                           .stats = la->stats_qk,
                           .q_w = m->w.layers[l].q_norm_w,
                           .k_w = m->w.layers[l].k_norm_w,
                           .N = x->N,
                           .NH = c->n_head,
                           .NKV = c->n_kv_head,
                           .HS = head_size(c)};
    if (c->qk_norm == GPT_QK_NORM_WIDTH) op.NH = op.NKV = 1, op.HS = att_size(c);
    if (c->qk_norm) m->ops->qk_norm_backward(m->ctx, &op);
}

/* Whether attention sums the gradient of the bias of queries, keys and values: where nothing is between them. */
static int attention_sums(const gpt_model *m, int l) {
    return m->ops->sums_attention && m->rope[l] < 0 && !m->config.qk_norm;
}

static void attention(gpt_model *m, const acts *a, const layer_acts *la, const batch *x, int l) {
    const gpt_config *c = &m->config;
    attention_backward op = {.dqkv = a->dqkv,
                             .db = attention_sums(m, l) ? m->dw.layers[l].qkv_b : NULL,
                             .dout = a->datt,
                             .qkv = la->qkv,
                             .out = la->att,
                             .lse = la->lse,
                             .positions = a->positions,
                             .dropout = dropout_of(m, x, l, SITE_ATTENTION),
                             .window = m->layers[l].window,
                             .scale = layer_score_scale(c, l),
                             .cap = c->score_cap,
                             .B = x->B,
                             .T = x->T,
                             .NH = c->n_head,
                             .NKV = c->n_kv_head,
                             .HS = head_size(c)};
    m->ops->attention_backward(m->ctx, &op);
}

/* Both products of the feed-forward layer, contract and expand. */
static void feed_forward(gpt_model *m, const acts *a, const batch *x, int l, const act *dbranch) {
    const gpt_config *c = &m->config;
    const layer_view *w = &m->w.layers[l], *dw = &m->dw.layers[l];
    const layer_acts *la = &a->layers[l];
    if (c->n_expert) {
        experts_backward(m, a, x, l, dbranch);
        return;
    }
    adapter r = adapter_of(m, a, x, l, LORA_MLP_PROJ);
    act *dfc = makes_input(m, r) && la->fc_pre ? la->fc_pre : a->dfc;
    linear(m, x, r, dfc, dw->mlp_proj_w, branch_bias(m, dw->mlp_proj_b), dbranch, la->fc,
           w->mlp_proj_w, la->fc_pre, c->activation, c->n_ff, c->n_embd);
    linear(m, x, adapter_of(m, a, x, l, LORA_FC), a->dnorm, dw->fc_w, dw->fc_b, dfc, la->norm_2,
           w->fc_w, NULL, GPT_ACT_NONE, c->n_embd, fc_size(c));
}

static void embedding(gpt_model *m, const acts *a, const batch *x) {
    const gpt_config *c = &m->config;
    dropout_apply drop = {
        .x = a->dresid, .dropout = dropout_of_embedding(m, x), .n = (int64_t)x->N * c->n_embd};
    embedding_backward op = {.dwte = m->dw.wte,
                             .dwpe = m->dw.wpe,
                             .dout = a->dresid,
                             .tokens = a->tokens,
                             .positions = a->positions,
                             .scale = c->embedding_scale,
                             .N = x->N,
                             .T = x->T,
                             .C = c->n_embd,
                             .V = c->vocab_size};
    m->ops->dropout_apply(m->ctx, &drop);
    m->ops->embedding_backward(m->ctx, &op);
}

/* Gradients that products do not overwrite: params.c puts them last. */
static void zero_added_gradients(gpt_model *m) {
    int64_t end = m->layout.n_grads, begin = end;
    for (int i = 0; i < m->layout.n_slots; i++) {
        const gpt_segment *s = &m->layout.segments[i];
        if (s->grad >= 0 && !s->product && s->grad < begin) begin = s->grad;
    }
    if (begin < end) m->ops->zero(m->ctx, m->grads + begin, sizeof(float) * (size_t)(end - begin));
}

/* The gradients of a layer are complete. */
static void advance_sums(gpt_model *m, int layer) {
    if (m->sums.comm) m->sums.advance(m, layer);
}

void model_backward(gpt_model *m, const acts *a, const batch *x, float scale) {
    const gpt_config *c = &m->config;
    int C = c->n_embd, A = att_size(c), L = c->n_layer;

    if (model_stops(m)) return;
    if (x->first) zero_added_gradients(m);
    classifier(m, a, x, scale);
    m->ops->zero(m->ctx, a->dresid, (size_t)x->N * (size_t)C * m->ops->act_bytes);
    norm(m, a, x, c->norm, m->dw.norm_f_w, m->dw.norm_f_b, m->dw.layers[L - 1].mlp_proj_b,
         a->resid_f, a->stats_f, m->w.norm_f_w, dropout_of(m, x, L - 1, SITE_MLP_PROJ));
    advance_sums(m, L);

    for (int l = L - 1; l >= 0 && !model_stops(m); l--) {
        const layer_view *w = &m->w.layers[l], *dw = &m->dw.layers[l];
        const layer_acts *la = &a->layers[l];

        m->layer = l;
        model_remake(m, a, x, l);
        const act *dbranch =
            branch_norm(m, a, x, l, dw->mlp_norm_w, la->mlp_out, la->stats_mlp, w->mlp_norm_w);
        feed_forward(m, a, x, l, dbranch);
        join(m, a, x, l);

        dbranch =
            branch_norm(m, a, x, l, dw->att_norm_w, la->att_out, la->stats_att, w->att_norm_w);
        linear(m, x, adapter_of(m, a, x, l, LORA_ATT_PROJ), a->datt, dw->att_proj_w,
               c->parallel ? dw->att_proj_b : branch_bias(m, dw->att_proj_b), dbranch, la->att,
               w->att_proj_w, NULL, GPT_ACT_NONE, A, C);
        attention(m, a, la, x, l);
        rope(m, a, x, l);
        qk_norm(m, a, la, x, l);
        linear(m, x, adapter_of(m, a, x, l, LORA_QKV), a->dnorm, dw->qkv_w,
               attention_sums(m, l) ? NULL : dw->qkv_b, a->dqkv, la->norm_1, w->qkv_w, NULL,
               GPT_ACT_NONE, C, qkv_size(c));
        /* Layer 0 reads the embedding, which was not a branch. */
        gpt_dropout_site dropout = {0};
        float *dbias = l > 0 ? m->dw.layers[l - 1].mlp_proj_b : NULL;
        if (l > 0) dropout = dropout_of(m, x, l - 1, SITE_MLP_PROJ);
        norm(m, a, x, norm_before(m, l), dw->norm_1_w, dw->norm_1_b, dbias, la->resid_1,
             la->stats_1, w->norm_1_w, dropout);
        advance_sums(m, l);
    }
    m->layer = -1;
    embedding(m, a, x);
    if (!m->interrupted) advance_sums(m, -1);
}
