/* forward.c: the transformer, Vaswani et al. 2017 with the norms first (Radford et al. 2019). */
#include "interrupt.h"
#include "model.h"

#include <string.h>

/* From (seed, step, micro-step), so that a resumed run drops the same elements. */
void dropout_draw(gpt_model *m, int64_t micro) {
    uint64_t key = m->options.seed;
    key = (uint64_t)counter_bits(key, 1) << 32 | counter_bits(key, 2);
    key += (uint64_t)m->step * 0xd1342543de82ef95ull;
    key = (uint64_t)counter_bits(key, 3) << 32 | counter_bits(key, 4);
    key += (uint64_t)micro * 0x2545f4914f6cdd1dull;
    m->ops->upload(m->ctx, &m->state->dropout_key, &key, sizeof key);
}

/* Of a tensor with so many elements a sequence. */
static gpt_dropout_site dropout_site(const gpt_model *m, const batch *x, float p, int site,
                                     int64_t elements) {
    return (gpt_dropout_site){x->training ? p : 0, (uint64_t)site, &m->state->dropout_key,
                              (uint64_t)x->row * (uint64_t)elements};
}

gpt_dropout_site dropout_of_embedding(const gpt_model *m, const batch *x) {
    return dropout_site(m, x, m->options.dropout, 0, (int64_t)x->T * m->config.n_embd);
}

gpt_dropout_site dropout_of(const gpt_model *m, const batch *x, int layer, int site) {
    int64_t T = x->T, width = site == SITE_ATTENTION ? m->config.n_head * T : m->config.n_embd;
    return dropout_site(m, x, m->options.dropout, 1 + layer * SITES_PER_LAYER + site, T * width);
}

gpt_dropout_site dropout_of_adapter(const gpt_model *m, const batch *x, int layer, int matrix) {
    int first = 1 + m->config.n_layer * SITES_PER_LAYER;
    return dropout_site(m, x, m->options.lora.dropout, first + layer * LORA_MATRICES + matrix,
                        (int64_t)x->T * lora_inputs(&m->config, matrix));
}

static void embedding(gpt_model *m, const acts *a, const batch *x) {
    int C = m->config.n_embd;
    embedding_forward op = {.out = a->layers[0].resid_1,
                            .tokens = a->tokens,
                            .positions = a->positions,
                            .wte = rows_are_looked_up(m) ? a->wte_rows : m->w.wte,
                            .wpe = m->w.wpe,
                            .N = x->N,
                            .T = x->T,
                            .scale = m->config.embedding_scale,
                            .C = C,
                            .rest = a->rest};
    dropout_apply drop = {
        .x = op.out, .dropout = dropout_of_embedding(m, x), .n = (int64_t)x->N * C};
    m->ops->embedding_forward(m->ctx, &op);
    m->ops->dropout_apply(m->ctx, &drop);
}

/* The residual stream takes in the branch, and is normalised. */
static void norm(gpt_model *m, const batch *x, int kind, act *resid_out, act *rest, act *out,
                 float *stats, const act *resid, const act *branch, const float *w, const float *b,
                 gpt_dropout_site dropout) {
    residual_norm_forward op = {.resid_out = resid_out,
                                .out = out,
                                .stats = stats,
                                .resid = resid,
                                .branch = branch,
                                .w = w,
                                .b = b,
                                .dropout = dropout,
                                .norm = kind,
                                .eps = m->config.norm_eps,
                                .N = x->N,
                                .C = m->config.n_embd,
                                .rest = rest};
    m->ops->residual_norm_forward(m->ctx, &op);
}

static lora_forward lora(const gpt_model *m, const linear_forward *layer, adapter r) {
    lora_forward op = {.out = layer->out,
                       .pre = layer->pre,
                       .u = r.u,
                       .v = r.v,
                       .in = layer->in,
                       .a = r.a,
                       .b = r.b,
                       .gain = r.gain,
                       .bias = layer->b,
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

/* Writes the adapter's part of y to where y will be, so that y is rounded once. Added to a y that is rounded, a
 * part of less than half a unit in its last place would be lost. */
static void run_before(gpt_model *m, const batch *x, int index, const lora_forward *op) {
    lora_forward alone = *op;
    if (op->activation != GPT_ACT_NONE) {
        alone.out = op->pre;
        alone.OC = is_gated(op->activation) ? 2 * op->OC : op->OC;
    }
    alone.pre = NULL;
    alone.activation = GPT_ACT_NONE;
    m->ops->zero(m->ctx, alone.out, m->ops->act_bytes * (size_t)alone.N * (size_t)alone.OC);
    adapter_run(m, x, index, &alone);
}

static void linear(gpt_model *m, const batch *x, adapter r, act *out, act *pre, const act *in,
                   const weight *w, const weight *b, int activation, int IC, int OC) {
    linear_forward op = {.out = out,
                         .pre = pre,
                         .in = in,
                         .w = w,
                         .b = b,
                         .activation = activation,
                         .exact = x->training,
                         .N = x->N,
                         .IC = IC,
                         .OC = OC};
    lora_forward adapts = lora(m, &op, r);
    if (adapter_joins(m, r) && x->training) {
        op.lora = &adapts;
    } else if (adapter_joins(m, r)) {
        run_before(m, x, r.index, &adapts);
        op.add = 1;
    }
    m->ops->linear_forward(m->ctx, &op);
    if (r.a && !op.lora && !op.add) adapter_run(m, x, r.index, &adapts);
}

static void qk_norm(gpt_model *m, const layer_acts *la, const batch *x, int l) {
    const gpt_config *c = &m->config;
    qk_norm_forward op = {.qkv = la->qkv,
                          .in = la->qk,
                          .stats = la->stats_qk,
                          .q_w = m->w.layers[l].q_norm_w,
                          .k_w = m->w.layers[l].k_norm_w,
                          .eps = c->norm_eps,
                          .N = x->N,
                          .NH = c->n_head,
                          .NKV = c->n_kv_head,
                          .HS = head_size(c)};
    if (c->qk_norm == GPT_QK_NORM_WIDTH) op.NH = op.NKV = 1, op.HS = att_size(c);
    if (c->qk_norm) m->ops->qk_norm_forward(m->ctx, &op);
}

static void rope(gpt_model *m, const acts *a, const layer_acts *la, const batch *x, int l) {
    const gpt_config *c = &m->config;
    rope_forward op = {.qkv = la->qkv,
                       .table = rope_table(m, a, l),
                       .positions = a->positions,
                       .pos = c->pos,
                       .turned = c->rope_dim,
                       .N = x->N,
                       .T = x->T,
                       .NH = c->n_head,
                       .NKV = c->n_kv_head,
                       .HS = head_size(c)};
    if (op.table) m->ops->rope_forward(m->ctx, &op);
}

static void attention(gpt_model *m, const acts *a, const layer_acts *la, const batch *x, int l) {
    const gpt_config *c = &m->config;
    attention_forward op = {.out = la->att,
                            .lse = la->lse,
                            .qkv = la->qkv,
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
    m->ops->attention_forward(m->ctx, &op);
}

static const int32_t *cache_positions(const acts *a, const layer_acts *la, const gpt_session *s) {
    return la->cache_rows < s->n_ctx ? a->cache_positions : a->positions;
}

static void cached_attention(gpt_model *m, const acts *a, const layer_acts *la, const batch *x,
                             int l) {
    const gpt_config *c = &m->config;
    attention_decode op = {.out = la->att,
                           .cache_k = la->cache_k,
                           .cache_v = la->cache_v,
                           .scale_k = la->scale_k,
                           .scale_v = la->scale_v,
                           .qkv = la->qkv,
                           .seqs = a->seqs,
                           .positions = cache_positions(a, la, x->session),
                           .window = m->layers[l].window,
                           .scale = layer_score_scale(c, l),
                           .cap = c->score_cap,
                           .N = x->N,
                           .n_ctx = la->cache_rows,
                           .NH = c->n_head,
                           .NKV = c->n_kv_head,
                           .HS = head_size(c)};
    m->ops->attention_decode(m->ctx, &op);
}

bool model_stops(gpt_model *m) {
    bool asks = !m->interrupted && m->options.device == GPT_DEVICE_CPU;
    if (asks) m->interrupted = interrupt_wanted();
    return m->interrupted;
}

/* The norm after a branch, where there is one. */
static void branch_norm(gpt_model *m, const acts *a, const batch *x, int l, float *stats,
                        const act *in, const float *w) {
    if (norms_after(&m->config))
        norm(m, x, m->layers[l].norm, NULL, NULL, a->branch, stats, in, NULL, w, NULL,
             (gpt_dropout_site){0});
}

/* The branch of attention, from norm 1. */
static void attend(gpt_model *m, const acts *a, const batch *x, int l) {
    const gpt_config *c = &m->config;
    const layer_view *w = &m->w.layers[l];
    const layer_acts *la = &a->layers[l];

    linear(m, x, adapter_of(m, a, x, l, LORA_QKV), la->qkv, NULL, la->norm_1, w->qkv_w, w->qkv_b,
           GPT_ACT_NONE, c->n_embd, qkv_size(c));
    qk_norm(m, la, x, l);
    rope(m, a, la, x, l);
    if (x->session)
        cached_attention(m, a, la, x, l);
    else
        attention(m, a, la, x, l);
    linear(m, x, adapter_of(m, a, x, l, LORA_ATT_PROJ), la->att_out, NULL, la->att, w->att_proj_w,
           w->att_proj_b, GPT_ACT_NONE, att_size(c), c->n_embd);
    branch_norm(m, a, x, l, la->stats_att, la->att_out, w->att_norm_w);
}

/* The stream takes in the branch of attention. Norm 2 reads it, or in parallel layers what norm 1 has read; or it is
 * norm 1. */
static void join(gpt_model *m, const acts *a, const batch *x, int l) {
    const layer_view *w = &m->w.layers[l];
    const layer_acts *la = &a->layers[l];
    if (!m->config.parallel) {
        norm(m, x, norm_before(m, l), la->resid_2, a->rest, la->norm_2, la->stats_2, la->resid_1,
             a->branch, w->norm_2_w, w->norm_2_b, dropout_of(m, x, l, SITE_ATT_PROJ));
        return;
    }
    if (!m->config.one_norm)
        norm(m, x, norm_before(m, l), NULL, a->rest, la->norm_2, la->stats_2, la->resid_1, NULL,
             w->norm_2_w, w->norm_2_b, (gpt_dropout_site){0});
    norm(m, x, NORM_NONE, la->resid_2, a->rest, la->resid_2, NULL, la->resid_1, a->branch, NULL,
         NULL, dropout_of(m, x, l, SITE_MLP_PROJ));
}

/* The hidden channels of the feed-forward layer, from norm 2. */
static void expand(gpt_model *m, const acts *a, const batch *x, int l) {
    const gpt_config *c = &m->config;
    const layer_view *w = &m->w.layers[l];
    const layer_acts *la = &a->layers[l];
    if (c->n_expert)
        experts_expand(m, a, x, l);
    else
        linear(m, x, adapter_of(m, a, x, l, LORA_FC), la->fc, la->fc_pre, la->norm_2, w->fc_w,
               w->fc_b, c->activation, c->n_embd, c->n_ff);
}

/* The rest of that branch. */
static void contract(gpt_model *m, const acts *a, const batch *x, int l) {
    const gpt_config *c = &m->config;
    const layer_view *w = &m->w.layers[l];
    const layer_acts *la = &a->layers[l];
    if (c->n_expert)
        experts_contract(m, a, x, l);
    else
        linear(m, x, adapter_of(m, a, x, l, LORA_MLP_PROJ), la->mlp_out, NULL, la->fc,
               w->mlp_proj_w, w->mlp_proj_b, GPT_ACT_NONE, c->n_ff, c->n_embd);
    branch_norm(m, a, x, l, la->stats_mlp, la->mlp_out, w->mlp_norm_w);
}

void model_forward(gpt_model *m, const acts *a, const batch *x) {
    const gpt_config *c = &m->config;

    m->layer = -1;
    embedding(m, a, x);
    const act *resid = a->layers[0].resid_1, *branch = NULL;
    gpt_dropout_site dropout = {0};

    for (int l = 0; l < c->n_layer && !model_stops(m); l++) {
        const layer_view *w = &m->w.layers[l];
        const layer_acts *la = &a->layers[l];

        m->layer = l;
        norm(m, x, norm_before(m, l), la->resid_1, a->rest, la->norm_1, la->stats_1, resid, branch,
             w->norm_1_w, w->norm_1_b, dropout);
        attend(m, a, x, l);
        join(m, a, x, l);
        experts_route(m, a, x, l);
        expand(m, a, x, l);
        contract(m, a, x, l);

        resid = la->resid_2;
        branch = a->branch;
        dropout = dropout_of(m, x, l, SITE_MLP_PROJ);
    }
    m->layer = -1;
    norm(m, x, c->norm, a->resid_f, a->rest, a->norm_f, a->stats_f, resid, branch, m->w.norm_f_w,
         m->w.norm_f_b, dropout);
}

void model_remake(gpt_model *m, const acts *a, const batch *x, int l) {
    const layer_view *w = &m->w.layers[l];
    const layer_acts *la = &a->layers[l];
    const gpt_options *o = &m->options;
    bool again = recomputes_layer(o->recompute, o->recompute_layers, l);
    if (o->recompute == GPT_RECOMPUTE_NONE) return;
    norm(m, x, norm_before(m, l), NULL, NULL, la->norm_1, la->stats_1, la->resid_1, NULL,
         w->norm_1_w, w->norm_1_b, (gpt_dropout_site){0});
    if (again && o->recompute == GPT_RECOMPUTE_BLOCK) {
        attend(m, a, x, l);
        join(m, a, x, l);
    } else if (!m->config.one_norm) {
        const act *resid = m->config.parallel ? la->resid_1 : la->resid_2;
        norm(m, x, norm_before(m, l), NULL, NULL, la->norm_2, la->stats_2, resid, NULL, w->norm_2_w,
             w->norm_2_b, (gpt_dropout_site){0});
    }
    if (again) expand(m, a, x, l);
}
