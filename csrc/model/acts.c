/* acts.c: one plan of every buffer that a forward and backward pass touches. */
#include "model.h"

#include <string.h>

/* Assigns places in the arena, aligned by align_buffer. Without an arena it only counts. */
typedef struct planner {
    char *base;
    size_t used, act_bytes;
} planner;

static void *take(planner *p, bool wanted, int64_t count, size_t element) {
    if (!wanted || count == 0) return NULL;
    void *place = p->base ? p->base + p->used : NULL;
    p->used += align_buffer((size_t)count * element);
    return place;
}

static act *take_acts(planner *p, bool wanted, int64_t rows, int64_t width) {
    return take(p, wanted, rows * width, p->act_bytes);
}

static float *take_floats(planner *p, bool wanted, int64_t rows, int64_t width) {
    return take(p, wanted, rows * width, sizeof(float));
}

static int32_t *take_ints(planner *p, bool wanted, int64_t count) {
    return take(p, wanted, count, sizeof(int32_t));
}

/* What backward reads of the products of an adapter that scales rows. */
static void plan_rows(planner *p, const gpt_config *c, const acts_shape *s, int matrix,
                      layer_acts *a) {
    bool wanted = s->training && dora_rows(&s->lora) > 0;
    a->lora_v[matrix] = take_acts(p, wanted, s->N, lora_shape_of(c, &s->lora, matrix).rows);
}

static void plan_adapter(planner *p, const gpt_config *c, const acts_shape *s, int matrix,
                         layer_acts *a) {
    a->lora_u[matrix] = take_floats(p, true, s->N, lora_width(c, &s->lora, matrix));
    plan_rows(p, c, s, matrix, a);
}

/* The buffers of a layer that go with its branches; the stream itself is there. */
static void plan_branches(planner *p, const gpt_config *c, const acts_shape *s, act *branch,
                          layer_acts *a) {
    int64_t N = s->N, C = c->n_embd;
    bool training = s->training;
    /* Without backward, the residual stream is one buffer, in place, and so is the norm. */
    a->resid_2 = take_acts(p, training, N, C);
    bool apart = training && !c->one_norm;
    a->stats_1 = take_floats(p, training, N, 2);
    a->stats_2 = apart ? take_floats(p, true, N, 2) : a->stats_1;
    a->qkv = take_acts(p, true, N, qkv_size(c));
    int64_t heads = c->n_head + c->n_kv_head;
    a->qk = take_acts(p, training && c->qk_norm, N, heads * head_size(c));
    a->stats_qk = take_floats(p, training && c->qk_norm, N, heads);
    a->att = take_acts(p, true, N, att_size(c));
    a->lse = take_floats(p, training, N, c->n_head);
    a->att_out = norms_after(c) ? take_acts(p, true, N, C) : branch;
    a->stats_att = take_floats(p, training && norms_after(c), N, 2);
    for (int matrix = 0; matrix < LORA_FC; matrix++) plan_adapter(p, c, s, matrix, a);
    a->lora_u[LORA_FC] = take_floats(p, true, N, lora_width(c, &s->lora, LORA_FC));
}

/* What the products of the branches read, where that is not the stream itself. */
static void plan_norms(planner *p, const gpt_config *c, const acts_shape *s, layer_acts *a) {
    a->norm_1 = take_acts(p, norms_before(c), s->N, c->n_embd);
    bool apart = s->training && !c->one_norm;
    a->norm_2 = apart ? take_acts(p, norms_before(c), s->N, c->n_embd) : a->norm_1;
}

/* The choices of a layer's experts, which backward reads in any case, and their outputs. */
static void plan_experts(planner *p, const gpt_config *c, const acts_shape *s, int l,
                         int32_t *begins, layer_acts *a) {
    bool wanted = c->n_expert > 0;
    int64_t R = fc_rows(c, s->N);
    a->probs = take_floats(p, wanted, s->N, c->n_expert);
    a->gates = take_floats(p, wanted, R, 1);
    a->choices = take_ints(p, wanted, R);
    a->places = take_ints(p, wanted, R);
    a->begins = begins ? begins + (int64_t)l * (c->n_expert + 1) : NULL;
    a->expert_out = take_acts(p, wanted, R, c->n_embd);
}

static void plan_layers(planner *p, const gpt_config *c, const gpt_ops *ops, const acts_shape *s,
                        act *branch, layer_acts *layers) {
    bool keeps = s->training;
    bool has_pre = keeps || lora_width(c, &s->lora, LORA_FC) > 0;
    layer_acts shared = {0};
    bool is_int8 = s->kv == GPT_KV_INT8;
    size_t number = is_int8 ? 1 : p->act_bytes;
    int64_t rows = fc_rows(c, s->N);
    int32_t *begins = take_ints(p, c->n_expert > 0, (int64_t)c->n_layer * (c->n_expert + 1));
    for (int l = 0; l < c->n_layer; l++) {
        bool again = recomputes_layer(s->recompute, s->recompute_layers, l);
        bool keeps_branches = keeps && !(again && s->recompute == GPT_RECOMPUTE_BLOCK);
        bool keeps_pre = keeps && !again, keeps_fc = keeps_pre && !ops->makes_activations;
        if (keeps || l == 0) shared.resid_1 = take_acts(p, true, s->N, c->n_embd);
        if (keeps_branches || l == 0) plan_branches(p, c, s, branch, &shared);
        if ((keeps && s->recompute == GPT_RECOMPUTE_NONE) || l == 0) plan_norms(p, c, s, &shared);
        if (!keeps) shared.resid_2 = shared.resid_1;
        if (!norms_before(c)) shared.norm_1 = shared.resid_1, shared.norm_2 = shared.resid_2;
        if (keeps || l == 0) /* the last matrix's are never computed again */
            plan_adapter(p, c, s, LORA_MLP_PROJ, &shared);
        if (keeps_pre || l == 0) plan_rows(p, c, s, LORA_FC, &shared);
        if (keeps || l == 0) plan_experts(p, c, s, l, begins, &shared);
        if (keeps_pre || l == 0) shared.fc_pre = take_acts(p, has_pre, rows, fc_size(c));
        if (keeps || l == 0) { /* nor is its result */
            shared.mlp_out = norms_after(c) ? take_acts(p, true, s->N, c->n_embd) : branch;
            shared.stats_mlp = take_floats(p, keeps && norms_after(c), s->N, 2);
        }
        if (keeps_fc || l == 0) shared.fc = take_acts(p, true, rows, c->n_ff);
        shared.cache_rows = s->n_seq ? cache_rows(c, l, s->n_seq, s->n_ctx) : 0;
        int64_t cache = (int64_t)s->n_seq * c->n_kv_head * shared.cache_rows * head_size(c);
        shared.cache_k = take(p, true, cache, number);
        shared.cache_v = take(p, true, cache, number);
        shared.scale_k = take_floats(p, is_int8, cache / head_size(c), 1);
        shared.scale_v = take_floats(p, is_int8, cache / head_size(c), 1);
        if (layers) layers[l] = shared;
    }
}

/* Whether the gradient of the hidden channels has a place apart from fc_pre: where pre is read after the product
 * that makes it. */
static bool has_dfc(const gpt_config *c, const gpt_ops *ops, const acts_shape *s) {
    bool adapts_after = s->lora.rank > 0 && (s->lora.dropout > 0 || s->lora.dora);
    return s->training && (!ops->makes_activations || c->n_expert > 0 || adapts_after);
}

size_t acts_plan(const gpt_config *c, const gpt_ops *ops, const acts_shape *s, char *base,
                 acts *out) {
    planner p = {base, 0, ops->act_bytes};
    int64_t N = s->N, C = c->n_embd;
    bool training = s->training, session = s->n_seq > 0;
    layer_acts *layers = out->layers;
    memset(out, 0, sizeof *out);
    out->layers = layers;
    if (N == 0) return 0;

    out->tokens = take_ints(&p, true, session ? STEP_INTS * N : N);
    out->targets = take_ints(&p, !session, N);
    out->documents = take_ints(&p, !session, N);
    out->losses = take_floats(&p, !session, N, 1);
    out->weights = take_floats(&p, training, N, 1);
    bool is_fixed = !training || s->lora.rank > 0;
    bool may_look_up = ops->packs_host_memory || ops->blocks_pack;
    out->wte_rows = take_floats(&p, is_fixed && may_look_up, N, C);
    out->rope = take_floats(&p, true, (int64_t)rope_table_count(c) * s->T, 2 * rope_pairs(c));
    out->rope_rows = s->T;
    out->branch = take_acts(&p, true, N, C);
    out->rest = take_acts(&p, ops->keeps_rest && !training, N, C);
    bool experts = c->n_expert > 0;
    int64_t R = fc_rows(c, N);
    out->expert_in = take_acts(&p, experts, R, C);
    plan_layers(&p, c, ops, s, out->branch, layers);
    /* Without backward the stream of the layers is also the stream of the final norm. */
    out->resid_f = training ? take_acts(&p, true, N, C) : layers ? layers[0].resid_1 : NULL;
    bool is_apart = training || !norms_before(c);
    out->norm_f = is_apart ? take_acts(&p, true, N, C) : layers ? layers[0].norm_1 : NULL;
    out->stats_f = take_floats(&p, training, N, 2);
    out->logit_rows = s->logit_rows;
    out->logits = take_floats(&p, true, s->logit_rows, logit_stride(c, ops));
    /* A row may have as many as V; usually all of them together have fewer than they have keys. */
    int64_t keys = s->n_ctx < c->vocab_size ? s->n_ctx : c->vocab_size;
    out->n_adjustments = session ? c->vocab_size + s->logit_rows * keys : 0;
    out->draws = take(&p, session, s->logit_rows, sizeof *out->draws);
    out->adjustments = take(&p, session, out->n_adjustments, sizeof *out->adjustments);
    out->results = take(&p, session, s->logit_rows, sizeof *out->results);

    out->dresid = take_acts(&p, training, N, C);
    out->dbranch = s->dropout || c->parallel ? take_acts(&p, training, N, C) : out->dresid;
    out->dunnormed = take_acts(&p, training && norms_after(c), N, C);
    out->dnorm = take_acts(&p, training, N, C);
    out->dqkv = take_acts(&p, training, N, qkv_size(c));
    out->datt = take_acts(&p, training, N, att_size(c));
    out->dfc = take_acts(&p, has_dfc(c, ops, s), R, fc_size(c));
    out->dexperts = take_acts(&p, training && experts, R, C);
    out->dgates = take_floats(&p, training && experts, R, 1);
    int64_t widest = fc_size(c) > qkv_size(c) ? fc_size(c) : qkv_size(c);
    out->dv = take_acts(&p, training && dora_rows(&s->lora) > 0, N, widest > C ? widest : C);
    return p.used;
}
