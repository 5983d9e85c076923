/* forward.c: the transformer, Vaswani et al. 2017 with the norms first (Radford et al. 2019). */
#include "model.h"

/* From (seed, step, micro-step), so that a resumed run drops the same elements. */
void dropout_draw(gpt_model *m) {
    uint64_t key = m->options.seed;
    key = (uint64_t)dropout_bits(key, 1) << 32 | dropout_bits(key, 2);
    key += (uint64_t)m->step * 0xd1342543de82ef95ull;
    key = (uint64_t)dropout_bits(key, 3) << 32 | dropout_bits(key, 4);
    key += (uint64_t)m->n_micro * 0x2545f4914f6cdd1dull;
    m->ops->upload(m->ctx, &m->state->dropout_key, &key, sizeof key);
}

static gpt_dropout_site dropout_site(const gpt_model *m, const batch *x, int site) {
    float p = x->training ? m->options.dropout : 0;
    return (gpt_dropout_site){p, (uint64_t)site, &m->state->dropout_key};
}

gpt_dropout_site dropout_of_embedding(const gpt_model *m, const batch *x) {
    return dropout_site(m, x, 0);
}

gpt_dropout_site dropout_of(const gpt_model *m, const batch *x, int layer, int site) {
    return dropout_site(m, x, 1 + layer * SITES_PER_LAYER + site);
}

static void embedding(gpt_model *m, const acts *a, const batch *x) {
    const gpt_config *c = &m->config;
    act *out = a->layers[0].resid_1;
    m->ops->embedding_forward(m->ctx, out, a->tokens, a->positions, m->w.wte, m->w.wpe, x->N, x->T,
                              c->n_embd);
    m->ops->dropout_forward(m->ctx, out, (int64_t)x->N * c->n_embd, dropout_of_embedding(m, x));
}

/* The residual stream takes in the branch, and is normalised. */
static void norm(gpt_model *m, const batch *x, act *resid_out, act *out, float *stats,
                 const act *resid, const act *branch, const float *w, const float *b,
                 gpt_dropout_site dropout) {
    const gpt_config *c = &m->config;
    m->ops->residual_norm_forward(m->ctx, resid_out, out, stats, resid, branch, w, b, dropout,
                                  c->norm, c->norm_eps, x->N, c->n_embd);
}

static void linear(gpt_model *m, const batch *x, act *out, act *pre, const act *in, const weight *w,
                   const float *b, int activation, int IC, int OC) {
    m->ops->linear_forward(m->ctx, out, pre, in, w, b, activation, x->N, IC, OC);
}

static void rope(gpt_model *m, const acts *a, const layer_acts *la, const batch *x) {
    const gpt_config *c = &m->config;
    if (c->pos == GPT_POS_LEARNED) return;
    m->ops->rope_forward(m->ctx, la->qkv, m->rope, a->positions, c->pos, x->N, x->T, c->n_head,
                         c->n_kv_head, head_size(c));
}

static void attention(gpt_model *m, const acts *a, const layer_acts *la, const batch *x, int l) {
    const gpt_config *c = &m->config;
    int HS = head_size(c);
    if (x->session)
        m->ops->attention_decode(m->ctx, la->att, la->cache_k, la->cache_v, la->qkv, a->seqs,
                                 a->positions, x->N, x->session->n_ctx, c->n_head, c->n_kv_head,
                                 HS);
    else
        m->ops->attention_forward(m->ctx, la->att, la->lse, la->qkv,
                                  dropout_of(m, x, l, SITE_ATTENTION), x->B, x->T, c->n_head,
                                  c->n_kv_head, HS);
}

void model_forward(gpt_model *m, const acts *a, const batch *x) {
    const gpt_config *c = &m->config;
    int C = c->n_embd, F = c->n_ff, L = c->n_layer;

    embedding(m, a, x);
    const act *resid = a->layers[0].resid_1, *branch = NULL;
    gpt_dropout_site dropout = {0};

    for (int l = 0; l < L; l++) {
        const layer_view *w = &m->w.layers[l];
        const layer_acts *la = &a->layers[l];

        norm(m, x, la->resid_1, la->norm_1, la->stats_1, resid, branch, w->norm_1_w, w->norm_1_b,
             dropout);
        linear(m, x, la->qkv, NULL, la->norm_1, w->qkv_w, w->qkv_b, GPT_ACT_NONE, C, qkv_size(c));
        rope(m, a, la, x);
        attention(m, a, la, x, l);
        linear(m, x, a->branch, NULL, la->att, w->att_proj_w, w->att_proj_b, GPT_ACT_NONE, C, C);

        norm(m, x, la->resid_2, la->norm_2, la->stats_2, la->resid_1, a->branch, w->norm_2_w,
             w->norm_2_b, dropout_of(m, x, l, SITE_ATT_PROJ));
        linear(m, x, la->fc, la->fc_pre, la->norm_2, w->fc_w, w->fc_b, c->activation, C, F);
        linear(m, x, a->branch, NULL, la->fc, w->mlp_proj_w, w->mlp_proj_b, GPT_ACT_NONE, F, C);

        resid = la->resid_2;
        branch = a->branch;
        dropout = dropout_of(m, x, l, SITE_MLP_PROJ);
    }
    norm(m, x, a->resid_f, a->norm_f, a->stats_f, resid, branch, m->w.norm_f_w, m->w.norm_f_b,
         dropout);
}
