/* reference_model.h: the whole transformer in float64, out of the layers of reference.h. */
#ifndef GPTC_REFERENCE_MODEL_H
#define GPTC_REFERENCE_MODEL_H

#include "models.h"
#include "reference.h"

typedef struct ref_layer {
    double *resid_1, *norm_1, *stats_1, *qkv, *heads, *stats_qk, *p, *lse, *att;
    double *resid_2, *norm_2, *stats_2, *pre, *fc;
    double *att_out, *stats_att, *mlp_out, *stats_mlp; /* of norms after the branches */
    double *probs, *gates, *expert_out; /* (N, E), (N, K) and (N, K, C) with experts */
    int32_t *choices;                   /* (N, K) */
    gpt_layer is;
    double *rope; /* NULL where queries and keys are not rotated */
} ref_layer;

typedef struct ref_model {
    gpt_config c;
    int n_params, HS, ATT, QKV,
        FC;     /* ATT: outputs of attention; FC: of the first feed-forward layer */
    int turned; /* channels of a head */
    gpt_param info[MAX_PARAMS];
    double *value[MAX_PARAMS], *grad[MAX_PARAMS];

    int B, T, N;
    const int32_t *tokens, *targets;
    ref_layer layers[4];
    double *resid_f, *norm_f, *stats_f, *branch, *logits, *losses;
    double loss; /* the mean over targets that count */
} ref_model;

static inline int ref_find(const ref_model *m, int layer, const char *name) {
    char full[80];
    if (layer < 0)
        snprintf(full, sizeof full, "%s", name);
    else
        snprintf(full, sizeof full, "h.%d.%s", layer, name);
    for (int i = 0; i < m->n_params; i++) {
        if (!strcmp(m->info[i].name, full)) return i;
    }
    return -1;
}

/* A parameter by name, NULL where this configuration has none. */
static inline double *ref_param(const ref_model *m, int layer, const char *name) {
    int i = ref_find(m, layer, name);
    return i < 0 ? NULL : m->value[i];
}
static inline double *ref_grad(const ref_model *m, int layer, const char *name) {
    int i = ref_find(m, layer, name);
    return i < 0 ? NULL : m->grad[i];
}

static inline double *ref_head(const ref_model *m, int grad) {
    const char *name = m->c.tied ? "wte.weight" : "lm_head.weight";
    return grad ? ref_grad(m, -1, name) : ref_param(m, -1, name);
}

static inline void ref_model_allocate(ref_model *m) {
    int N = m->N, C = m->c.n_embd, K = m->c.n_expert ? m->c.n_expert_used : 1;
    m->resid_f = host_zeros(N * C), m->norm_f = host_zeros(N * C), m->stats_f = host_zeros(2 * N);
    m->branch = host_zeros(N * C);
    m->logits = host_zeros(N * m->c.vocab_size), m->losses = host_zeros(N);
    for (int l = 0; l < m->c.n_layer; l++) {
        ref_layer *a = &m->layers[l];
        a->resid_1 = host_zeros(N * C), a->norm_1 = host_zeros(N * C);
        a->stats_1 = host_zeros(2 * N), a->qkv = host_zeros(N * m->QKV);
        a->heads = host_zeros(N * m->QKV);
        a->stats_qk = host_zeros(2 * N * (m->c.n_head + m->c.n_kv_head));
        a->p = host_zeros(N * m->c.n_head * m->T), a->lse = host_zeros(N * m->c.n_head);
        a->att = host_zeros(N * m->ATT), a->resid_2 = host_zeros(N * C);
        a->norm_2 = host_zeros(N * C), a->stats_2 = host_zeros(2 * N);
        a->att_out = host_zeros(N * C), a->mlp_out = host_zeros(N * C);
        a->stats_att = host_zeros(2 * N), a->stats_mlp = host_zeros(2 * N);
        a->pre = host_zeros(N * K * m->FC), a->fc = host_zeros(N * K * m->c.n_ff);
        a->probs = host_zeros(N * m->c.n_expert), a->gates = host_zeros(N * K);
        a->expert_out = host_zeros(N * K * C), a->choices = host_ints(N * K);
    }
}

/* A float64 copy of a model's parameters, with zero gradients, for B sequences of T tokens. */
static inline ref_model ref_model_of(gpt_model *model, const gpt_config *config,
                                     const int32_t *tokens, const int32_t *targets, int B, int T) {
    ref_model m = {.c = *config, .B = B, .T = T, .N = B * T, .tokens = tokens, .targets = targets};
    m.HS = config->head_size ? config->head_size : config->n_embd / config->n_head;
    m.turned = config->rope_dim ? config->rope_dim : m.HS;
    m.ATT = config->n_head * m.HS;
    m.QKV = (config->n_head + 2 * config->n_kv_head) * m.HS;
    m.FC = ref_activation_width(config->activation, config->n_ff);
    EXPECT(config->n_layer <= TEST_COUNT(m.layers));
    param_set values = read_params(model, config, GPT_TENSOR_VALUE);
    m.n_params = values.n;
    for (int i = 0; i < values.n; i++) {
        m.info[i] = values.info[i];
        m.value[i] = doubles_of(values.x[i], values.info[i].size);
        m.grad[i] = host_zeros(values.info[i].size);
    }
    for (int l = 0; l < config->n_layer; l++) {
        ref_layer *a = &m.layers[l];
        EXPECT(gpt_config_layer(config, l, &a->is) == GPT_OK);
        if (!a->is.rope) continue;
        a->rope = host_zeros((int64_t)T * m.ATT);
        int width = config->pos == GPT_POS_ROPE ? m.turned : m.HS;
        ref_rope_table(a->rope, config->pos, a->is.rope_theta, T, width, m.ATT);
        if (config->rope_scaling == GPT_ROPE_LONGROPE)
            ref_divided_table(a->rope, a->is.rope_theta, rope_divisors + width / 2,
                              config->rope_attention, T, width);
        if (config->rope_scaling == GPT_ROPE_YARN)
            ref_yarn_table(a->rope, a->is.rope_theta, config->rope_factor, config->rope_low_freq,
                           config->rope_high_freq, config->rope_original,
                           0.1 * log(config->rope_factor) + 1, T, m.HS);
    }
    ref_model_allocate(&m);
    return m;
}

/* ---- forward ---- */

static inline void ref_linear(const ref_model *m, double *out, const double *in, int layer,
                              const char *w, const char *b, int IC, int OC) {
    ref_linear_forward(out, in, ref_param(m, layer, w), ref_param(m, layer, b), m->N, IC, OC);
}

static inline void ref_norm(const ref_model *m, double *out, double *stats, const double *in,
                            int layer, const char *w, const char *b) {
    ref_norm_forward(out, stats, in, ref_param(m, layer, w), ref_param(m, layer, b),
                     layer < 0 ? m->c.norm : m->layers[layer].is.norm, m->c.norm_eps, m->N,
                     m->c.n_embd);
}

/* The norm before a branch, where there is one. */
static inline void ref_norm_before(const ref_model *m, double *out, double *stats, const double *in,
                                   int layer, const char *w, const char *b) {
    if (m->c.norm_at == GPT_NORM_AFTER)
        memcpy(out, in, sizeof *out * (size_t)(m->N * m->c.n_embd));
    else
        ref_norm(m, out, stats, in, layer, w, b);
}

/* The norm after a branch, where there is one: in place, with its input in `in`. */
static inline void ref_norm_after(const ref_model *m, double *branch, double *stats, double *in,
                                  int layer, const char *w) {
    if (m->c.norm_at == GPT_NORM_BEFORE) return;
    memcpy(in, branch, sizeof *in * (size_t)(m->N * m->c.n_embd));
    ref_norm(m, branch, stats, in, layer, w, "none");
}

/* Queries times the factor that makes the usual scale of scores the model's. */
static inline void ref_scale_queries(const ref_model *m, int l, double *qkv) {
    double factor = m->c.score_scale > 0 ? m->c.score_scale * sqrt(m->HS) : 1;
    if (m->c.score_by_layer) factor /= l + 1;
    for (int n = 0; n < m->N; n++)
        for (int c = 0; c < m->ATT; c++) qkv[n * m->QKV + c] *= factor;
}

static inline void ref_rotate(const ref_model *m, int l, double *qkv, int sign) {
    if (!m->layers[l].rope) return;
    ref_rope(qkv, m->layers[l].rope, NULL, m->c.pos, sign, m->N, m->T, m->c.n_head, m->c.n_kv_head,
             m->HS, m->turned);
}

static inline void ref_add(double *out, const double *a, const double *b, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

/* A matrix of one expert, or its gradient. */
static inline double *ref_expert(const ref_model *m, int layer, int expert, const char *name,
                                 int grad) {
    char full[64];
    snprintf(full, sizeof full, "mlp.experts.%d.%s.weight", expert, name);
    return grad ? ref_grad(m, layer, full) : ref_param(m, layer, full);
}

/* The feed-forward branch of each token by its experts, to m->branch. */
static inline void ref_experts_forward(const ref_model *m, int l) {
    const ref_layer *a = &m->layers[l];
    int C = m->c.n_embd, F = m->c.n_ff, E = m->c.n_expert, K = m->c.n_expert_used;
    memset(m->branch, 0, sizeof *m->branch * (size_t)(m->N * C));
    for (int n = 0; n < m->N; n++) {
        const double *x = a->norm_2 + n * C;
        ref_route(a->probs + n * E, a->gates + n * K, a->choices + n * K, x,
                  ref_param(m, l, "mlp.router.weight"), m->c.expert_norm, C, E, K);
        for (int i = n * K; i < (n + 1) * K; i++) {
            double *pre = a->pre + i * m->FC, *fc = a->fc + i * F, *y = a->expert_out + i * C;
            int e = a->choices[i];
            ref_linear_forward(pre, x, ref_expert(m, l, e, "fc", 0), NULL, 1, C, m->FC);
            ref_activation_forward(fc, pre, m->c.activation, 1, F);
            ref_linear_forward(y, fc, ref_expert(m, l, e, "proj", 0), NULL, 1, F, C);
            for (int c = 0; c < C; c++) m->branch[n * C + c] += a->gates[i] * y[c];
        }
    }
}

/* The gradient of norm_2 from that of the branch. */
static inline double *ref_experts_backward(const ref_model *m, int l, const double *dbranch) {
    const ref_layer *a = &m->layers[l];
    int C = m->c.n_embd, F = m->c.n_ff, E = m->c.n_expert, K = m->c.n_expert_used;
    double *din = host_zeros(m->N * C), *dgates = host_zeros(K), *dprobs = host_zeros(E);
    double *dy = host_zeros(C), *dfc = host_zeros(F), *dpre = host_zeros(m->FC);
    for (int n = 0; n < m->N; n++) {
        const double *x = a->norm_2 + n * C, *d = dbranch + n * C;
        for (int k = 0; k < K; k++) {
            int i = n * K + k, e = a->choices[i];
            memset(dfc, 0, sizeof *dfc * (size_t)F);
            memset(dpre, 0, sizeof *dpre * (size_t)m->FC);
            dgates[k] = test_dot(d, a->expert_out + i * C, C);
            for (int c = 0; c < C; c++) dy[c] = a->gates[i] * d[c];
            ref_linear_backward(dfc, ref_expert(m, l, e, "proj", 1), NULL, dy, a->fc + i * F,
                                ref_expert(m, l, e, "proj", 0), 1, F, C);
            ref_activation_backward(dpre, dfc, a->pre + i * m->FC, m->c.activation, 1, F);
            ref_linear_backward(din + n * C, ref_expert(m, l, e, "fc", 1), NULL, dpre, x,
                                ref_expert(m, l, e, "fc", 0), 1, C, m->FC);
        }
        memset(dprobs, 0, sizeof *dprobs * (size_t)E);
        ref_route_backward(din + n * C, ref_grad(m, l, "mlp.router.weight"), dprobs, dgates,
                           a->probs + n * E, a->choices + n * K, x,
                           ref_param(m, l, "mlp.router.weight"), m->c.expert_norm, C, E, K);
    }
    return din;
}

/* resid_1 to what leaves the layer. */
static inline void ref_layer_forward(const ref_model *m, int l, double *out) {
    const ref_layer *a = &m->layers[l];
    int C = m->c.n_embd, F = m->c.n_ff;
    gpt_dropout none = {0};
    int wide = m->c.qk_norm == GPT_QK_NORM_WIDTH;
    ref_norm_before(m, a->norm_1, a->stats_1, a->resid_1, l, "norm_1.weight", "norm_1.bias");
    ref_linear(m, a->qkv, a->norm_1, l, "attn.qkv.weight", "attn.qkv.bias", C, m->QKV);
    if (m->c.qk_norm)
        ref_qk_norm_forward(a->qkv, a->heads, a->stats_qk, ref_param(m, l, "attn.q_norm.weight"),
                            ref_param(m, l, "attn.k_norm.weight"), m->c.norm_eps, m->N,
                            wide ? 1 : m->c.n_head, wide ? 1 : m->c.n_kv_head,
                            wide ? m->ATT : m->HS);
    ref_rotate(m, l, a->qkv, 1);
    ref_scale_queries(m, l, a->qkv);
    ref_attention_forward(a->att, a->lse, a->p, a->qkv, none, a->is.window, NULL, m->B, m->T,
                          m->c.n_head, m->c.n_kv_head, m->HS);
    ref_linear(m, m->branch, a->att, l, "attn.proj.weight", "attn.proj.bias", m->ATT, C);
    ref_norm_after(m, m->branch, a->stats_att, a->att_out, l, "attn.norm.weight");
    ref_add(a->resid_2, a->resid_1, m->branch, (int64_t)m->N * C);
    const char *norm_2 = m->c.one_norm ? "norm_1.weight" : "norm_2.weight";
    ref_norm_before(m, a->norm_2, a->stats_2, m->c.parallel ? a->resid_1 : a->resid_2, l, norm_2,
                    m->c.one_norm ? "norm_1.bias" : "norm_2.bias");
    if (m->c.n_expert) {
        ref_experts_forward(m, l);
    } else {
        ref_linear(m, a->pre, a->norm_2, l, "mlp.fc.weight", "mlp.fc.bias", C, m->FC);
        ref_activation_forward(a->fc, a->pre, m->c.activation, m->N, F);
        ref_linear(m, m->branch, a->fc, l, "mlp.proj.weight", "mlp.proj.bias", F, C);
    }
    ref_norm_after(m, m->branch, a->stats_mlp, a->mlp_out, l, "mlp.norm.weight");
    ref_add(out, a->resid_2, m->branch, (int64_t)m->N * C);
}

static inline double ref_model_forward(void *pointer) {
    ref_model *m = pointer;
    int C = m->c.n_embd, V = m->c.vocab_size, L = m->c.n_layer;
    ref_score_cap = m->c.score_cap;
    ref_embedding_forward(m->layers[0].resid_1, m->tokens, NULL, ref_param(m, -1, "wte.weight"),
                          ref_param(m, -1, "wpe.weight"), m->N, m->T, C);
    for (int i = 0; m->c.embedding_scale > 0 && i < m->N * C; i++)
        m->layers[0].resid_1[i] *= m->c.embedding_scale;
    for (int l = 0; l < L; l++) {
        ref_layer_forward(m, l, l + 1 < L ? m->layers[l + 1].resid_1 : m->resid_f);
    }
    ref_norm(m, m->norm_f, m->stats_f, m->resid_f, -1, "norm_f.weight", "norm_f.bias");
    ref_head_bias = ref_param(m, -1, "lm_head.bias");
    ref_linear_forward(m->logits, m->norm_f, ref_head(m, 0), ref_head_bias, m->N, C, V);
    ref_logit_cap = m->c.logit_cap;
    for (int i = 0; i < m->N * V; i++) m->logits[i] = ref_capped(m->logits[i], ref_logit_cap);
    ref_classifier(m->losses, NULL, NULL, m->norm_f, ref_head(m, 0), m->targets, 1.0, m->N, C, V);
    m->loss = 0.0;
    for (int n = 0; n < m->N; n++) m->loss += m->losses[n] / count_targets(m->targets, m->N);
    return m->loss;
}

/* ---- backward ---- */

static inline double *ref_linear_back(const ref_model *m, const double *dout, const double *in,
                                      int layer, const char *w, const char *b, int IC, int OC) {
    double *din = host_zeros((int64_t)m->N * IC);
    ref_linear_backward(din, ref_grad(m, layer, w), ref_grad(m, layer, b), dout, in,
                        ref_param(m, layer, w), m->N, IC, OC);
    return din;
}

static inline void ref_norm_back(const ref_model *m, double *dresid, const double *dout,
                                 const double *in, const double *stats, int layer, const char *w,
                                 const char *b) {
    ref_norm_backward(dresid, ref_grad(m, layer, w), ref_grad(m, layer, b), dout, in, stats,
                      ref_param(m, layer, w), layer < 0 ? m->c.norm : m->layers[layer].is.norm,
                      m->N, m->c.n_embd);
}

static inline void ref_norm_before_back(const ref_model *m, double *dresid, const double *dout,
                                        const double *in, const double *stats, int layer,
                                        const char *w, const char *b) {
    if (m->c.norm_at == GPT_NORM_AFTER)
        ref_add(dresid, dresid, dout, (int64_t)m->N * m->c.n_embd);
    else
        ref_norm_back(m, dresid, dout, in, stats, layer, w, b);
}

/* The gradient of a branch before the norm after it. */
static inline double *ref_norm_after_back(const ref_model *m, const double *dbranch,
                                          const double *in, const double *stats, int layer,
                                          const char *w) {
    int64_t size = (int64_t)m->N * m->c.n_embd;
    double *din = host_zeros(size);
    if (m->c.norm_at == GPT_NORM_BEFORE)
        memcpy(din, dbranch, sizeof *din * (size_t)size);
    else
        ref_norm_back(m, din, dbranch, in, stats, layer, w, "none");
    return din;
}

static inline void ref_layer_backward(const ref_model *m, int l, double *dresid) {
    const ref_layer *a = &m->layers[l];
    int C = m->c.n_embd, F = m->c.n_ff;
    gpt_dropout none = {0};
    double *dpre = host_zeros((int64_t)m->N * m->FC), *dqkv = host_zeros((int64_t)m->N * m->QKV);
    int wide = m->c.qk_norm == GPT_QK_NORM_WIDTH;
    double *dbranch =
        ref_norm_after_back(m, dresid, a->mlp_out, a->stats_mlp, l, "mlp.norm.weight");
    double *dnorm;
    if (m->c.n_expert) {
        dnorm = ref_experts_backward(m, l, dbranch);
    } else {
        double *dfc =
            ref_linear_back(m, dbranch, a->fc, l, "mlp.proj.weight", "mlp.proj.bias", F, C);
        ref_activation_backward(dpre, dfc, a->pre, m->c.activation, m->N, F);
        dnorm = ref_linear_back(m, dpre, a->norm_2, l, "mlp.fc.weight", "mlp.fc.bias", C, m->FC);
    }
    if (!m->c.parallel) /* else attention gets what the feed-forward layer does */
        ref_norm_before_back(m, dresid, dnorm, a->resid_2, a->stats_2, l, "norm_2.weight",
                             "norm_2.bias");
    dbranch = ref_norm_after_back(m, dresid, a->att_out, a->stats_att, l, "attn.norm.weight");
    if (m->c.parallel)
        ref_norm_before_back(m, dresid, dnorm, a->resid_1, a->stats_2, l,
                             m->c.one_norm ? "norm_1.weight" : "norm_2.weight",
                             m->c.one_norm ? "norm_1.bias" : "norm_2.bias");
    double *datt =
        ref_linear_back(m, dbranch, a->att, l, "attn.proj.weight", "attn.proj.bias", m->ATT, C);
    ref_attention_backward(dqkv, datt, a->p, a->qkv, none, m->B, m->T, m->c.n_head, m->c.n_kv_head,
                           m->HS);
    ref_scale_queries(m, l, dqkv);
    ref_rotate(m, l, dqkv, -1);
    if (m->c.qk_norm)
        ref_qk_norm_backward(dqkv, ref_grad(m, l, "attn.q_norm.weight"),
                             ref_grad(m, l, "attn.k_norm.weight"), a->heads, a->stats_qk,
                             ref_param(m, l, "attn.q_norm.weight"),
                             ref_param(m, l, "attn.k_norm.weight"), m->N, wide ? 1 : m->c.n_head,
                             wide ? 1 : m->c.n_kv_head, wide ? m->ATT : m->HS);
    dnorm = ref_linear_back(m, dqkv, a->norm_1, l, "attn.qkv.weight", "attn.qkv.bias", C, m->QKV);
    ref_norm_before_back(m, dresid, dnorm, a->resid_1, a->stats_1, l, "norm_1.weight",
                         "norm_1.bias");
}

/* Adds scale times the gradient of the mean loss; after ref_model_forward. */
static inline void ref_model_backward(ref_model *m, double scale) {
    int C = m->c.n_embd, n_valid = count_targets(m->targets, m->N);
    ref_score_cap = m->c.score_cap, ref_logit_cap = m->c.logit_cap;
    ref_head_bias = ref_param(m, -1, "lm_head.bias"), ref_head_db = ref_grad(m, -1, "lm_head.bias");
    double *dnorm = host_zeros((int64_t)m->N * C), *dresid = host_zeros((int64_t)m->N * C);
    ref_classifier(m->losses, dnorm, ref_head(m, 1), m->norm_f, ref_head(m, 0), m->targets,
                   scale / n_valid, m->N, C, m->c.vocab_size);
    ref_head_db = NULL;
    ref_norm_back(m, dresid, dnorm, m->resid_f, m->stats_f, -1, "norm_f.weight", "norm_f.bias");
    for (int l = m->c.n_layer - 1; l >= 0; l--) ref_layer_backward(m, l, dresid);
    for (int i = 0; m->c.embedding_scale > 0 && i < m->N * C; i++)
        dresid[i] *= m->c.embedding_scale;
    ref_embedding_backward(ref_grad(m, -1, "wte.weight"), ref_grad(m, -1, "wpe.weight"), dresid,
                           m->tokens, NULL, m->N, m->T, C);
}

#endif
