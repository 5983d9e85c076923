/* backward.c: the mirror of forward.c, step by step from the last to the first. */
#include "model.h"

/* The norm's gradient joins dresid; what then flows into the branch is dbranch. */
static void norm_backward(gpt_model *m, const acts *a, const batch *x, float *dw, float *db,
                          const act *resid, const float *stats, const float *w,
                          gpt_dropout_site dropout) {
    const gpt_config *c = &m->config;
    act *dbranch = dropout.p > 0 ? a->dbranch : NULL;
    m->ops->residual_norm_backward(m->ctx, a->dresid, dbranch, dw, db, a->dnorm, resid, stats, w,
                                   dropout, c->norm, x->N, c->n_embd);
}

static void linear_backward(gpt_model *m, const batch *x, act *din, weight *dw, float *db,
                            const act *dout, const act *in, const weight *w, const act *pre,
                            int activation, int IC, int OC) {
    m->ops->linear_backward(m->ctx, din, dw, db, dout, in, w, pre, activation, !x->first, x->N, IC,
                            OC);
}

static void rope_backward(gpt_model *m, const acts *a, const batch *x) {
    const gpt_config *c = &m->config;
    if (c->pos == GPT_POS_LEARNED) return;
    m->ops->rope_backward(m->ctx, a->dqkv, m->rope, c->pos, x->N, x->T, c->n_head, c->n_kv_head,
                          head_size(c));
}

static void attention_backward(gpt_model *m, const acts *a, const layer_acts *la, const batch *x,
                               int l) {
    const gpt_config *c = &m->config;
    m->ops->attention_backward(m->ctx, a->dqkv, a->datt, la->qkv, la->att, la->lse,
                               dropout_of(m, x, l, SITE_ATTENTION), x->B, x->T, c->n_head,
                               c->n_kv_head, head_size(c));
}

static void embedding_backward(gpt_model *m, const acts *a, const batch *x) {
    const gpt_config *c = &m->config;
    m->ops->dropout_backward(m->ctx, a->dresid, (int64_t)x->N * c->n_embd,
                             dropout_of_embedding(m, x));
    m->ops->embedding_backward(m->ctx, m->dw.wte, m->dw.wpe, a->dresid, a->tokens, x->N, x->T,
                               c->n_embd, c->vocab_size);
}

/* What products do not overwrite. */
static void zero_added_gradients(gpt_model *m) {
    for (int i = 0; i < m->layout.n_slots; i++) {
        const gpt_segment *s = &m->layout.segments[i];
        if (!s->product)
            m->ops->zero(m->ctx, m->grads + s->offset, sizeof(float) * (size_t)s->size);
    }
}

void model_backward(gpt_model *m, const acts *a, const batch *x, float scale) {
    const gpt_config *c = &m->config;
    int C = c->n_embd, F = c->n_ff, L = c->n_layer;

    if (x->first) zero_added_gradients(m);
    m->ops->classifier_backward(m->ctx, a->losses, &m->state->report.loss, a->dnorm, m->dw.head,
                                a->norm_f, m->w.head, a->targets, scale, !x->first, x->N, C,
                                c->vocab_size, padded_vocab_size(c));
    m->ops->zero(m->ctx, a->dresid, (size_t)x->N * (size_t)C * m->ops->act_bytes);
    norm_backward(m, a, x, m->dw.norm_f_w, m->dw.norm_f_b, a->resid_f, a->stats_f, m->w.norm_f_w,
                  dropout_of(m, x, L - 1, SITE_MLP_PROJ));

    for (int l = L - 1; l >= 0; l--) {
        const layer_view *w = &m->w.layers[l], *dw = &m->dw.layers[l];
        const layer_acts *la = &a->layers[l];

        const act *fc = m->ops->makes_activations ? NULL : la->fc;
        linear_backward(m, x, a->dfc, dw->mlp_proj_w, dw->mlp_proj_b, a->dbranch, fc, w->mlp_proj_w,
                        la->fc_pre, c->activation, F, C);
        linear_backward(m, x, a->dnorm, dw->fc_w, dw->fc_b, a->dfc, la->norm_2, w->fc_w, NULL,
                        GPT_ACT_NONE, C, fc_size(c));
        norm_backward(m, a, x, dw->norm_2_w, dw->norm_2_b, la->resid_2, la->stats_2, w->norm_2_w,
                      dropout_of(m, x, l, SITE_ATT_PROJ));

        linear_backward(m, x, a->datt, dw->att_proj_w, dw->att_proj_b, a->dbranch, la->att,
                        w->att_proj_w, NULL, GPT_ACT_NONE, C, C);
        attention_backward(m, a, la, x, l);
        rope_backward(m, a, x);
        linear_backward(m, x, a->dnorm, dw->qkv_w, dw->qkv_b, a->dqkv, la->norm_1, w->qkv_w, NULL,
                        GPT_ACT_NONE, C, qkv_size(c));
        /* Layer 0 stands on the embedding, which was not a branch. */
        gpt_dropout_site dropout = {0};
        if (l > 0) dropout = dropout_of(m, x, l - 1, SITE_MLP_PROJ);
        norm_backward(m, a, x, dw->norm_1_w, dw->norm_1_b, la->resid_1, la->stats_1, w->norm_1_w,
                      dropout);
    }
    embedding_backward(m, a, x);
}
