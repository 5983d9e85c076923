/* params.c: the one table of parameters, from which follow their names, places, shapes, initial
 * values and weight decay. To add a parameter, add a line. */
#include "error.h"
#include "model.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum dim { ONE, WIDTH, QKV, ATT, QK, FF, FC, EXPERTS, VOCAB, BLOCK } dim;
typedef enum init { ZEROS, ONES, NORMAL, RESIDUAL } init; /* RESIDUAL: normal / sqrt(2 L) */
typedef enum place { FIRST, LAYER, LAST } place;
typedef enum when {
    ALWAYS,
    NO_EXPERTS,
    ROUTER,
    EXPERT, /* a tensor for each expert */
    LEARNED_POS,
    NORM_WEIGHT,
    NORM_BIAS,
    NORM_BEFORE_WEIGHT,
    NORM_BEFORE_BIAS,
    NORM_2_WEIGHT,
    NORM_2_BIAS,
    NORM_AFTER_WEIGHT,
    QKV_BIAS,
    QK_NORM,
    ATT_PROJ_BIAS,
    FC_BIAS,
    MLP_PROJ_BIAS,
    UNTIED,
    HEAD_BIAS
} when;

#define MODEL_FIELD(field) offsetof(params_view, field)
#define LAYER_FIELD(field) offsetof(layer_view, field)

static const struct row {
    place place;
    const char *name;
    size_t field;
    dim rows, cols;
    init init;
    when when;
} table[] = {
    {FIRST, "wte.weight", MODEL_FIELD(wte), VOCAB, WIDTH, NORMAL, ALWAYS},
    {FIRST, "wpe.weight", MODEL_FIELD(wpe), BLOCK, WIDTH, NORMAL, LEARNED_POS},
    {LAYER, "norm_1.weight", LAYER_FIELD(norm_1_w), WIDTH, ONE, ONES, NORM_BEFORE_WEIGHT},
    {LAYER, "norm_1.bias", LAYER_FIELD(norm_1_b), WIDTH, ONE, ZEROS, NORM_BEFORE_BIAS},
    {LAYER, "attn.qkv.weight", LAYER_FIELD(qkv_w), QKV, WIDTH, NORMAL, ALWAYS},
    {LAYER, "attn.qkv.bias", LAYER_FIELD(qkv_b), QKV, ONE, ZEROS, QKV_BIAS},
    {LAYER, "attn.q_norm.weight", LAYER_FIELD(q_norm_w), QK, ONE, ONES, QK_NORM},
    {LAYER, "attn.k_norm.weight", LAYER_FIELD(k_norm_w), QK, ONE, ONES, QK_NORM},
    {LAYER, "attn.proj.weight", LAYER_FIELD(att_proj_w), WIDTH, ATT, RESIDUAL, ALWAYS},
    {LAYER, "attn.proj.bias", LAYER_FIELD(att_proj_b), WIDTH, ONE, ZEROS, ATT_PROJ_BIAS},
    {LAYER, "attn.norm.weight", LAYER_FIELD(att_norm_w), WIDTH, ONE, ONES, NORM_AFTER_WEIGHT},
    {LAYER, "norm_2.weight", LAYER_FIELD(norm_2_w), WIDTH, ONE, ONES, NORM_2_WEIGHT},
    {LAYER, "norm_2.bias", LAYER_FIELD(norm_2_b), WIDTH, ONE, ZEROS, NORM_2_BIAS},
    {LAYER, "mlp.fc.weight", LAYER_FIELD(fc_w), FC, WIDTH, NORMAL, NO_EXPERTS},
    {LAYER, "mlp.fc.bias", LAYER_FIELD(fc_b), FC, ONE, ZEROS, FC_BIAS},
    {LAYER, "mlp.proj.weight", LAYER_FIELD(mlp_proj_w), WIDTH, FF, RESIDUAL, NO_EXPERTS},
    {LAYER, "mlp.proj.bias", LAYER_FIELD(mlp_proj_b), WIDTH, ONE, ZEROS, MLP_PROJ_BIAS},
    {LAYER, "mlp.router.weight", LAYER_FIELD(router_w), EXPERTS, WIDTH, NORMAL, ROUTER},
    {LAYER, "fc.weight", LAYER_FIELD(expert_fc_w), FC, WIDTH, NORMAL, EXPERT},
    {LAYER, "proj.weight", LAYER_FIELD(expert_proj_w), WIDTH, FF, RESIDUAL, EXPERT},
    {LAYER, "mlp.norm.weight", LAYER_FIELD(mlp_norm_w), WIDTH, ONE, ONES, NORM_AFTER_WEIGHT},
    {LAST, "norm_f.weight", MODEL_FIELD(norm_f_w), WIDTH, ONE, ONES, NORM_WEIGHT},
    {LAST, "norm_f.bias", MODEL_FIELD(norm_f_b), WIDTH, ONE, ZEROS, NORM_BIAS},
    {LAST, "lm_head.weight", MODEL_FIELD(head), VOCAB, WIDTH, NORMAL, UNTIED},
    {LAST, "lm_head.bias", MODEL_FIELD(head_b), VOCAB, ONE, ZEROS, HEAD_BIAS},
};
enum { N_ROWS = sizeof table / sizeof *table, ALIGN = 16 /* numbers: a cache line */ };

/* Whether a norm has a bias. */
static bool has_norm_bias(const gpt_config *c, int norm) {
    return c->norm_weight && c->bias & GPT_BIAS_NORM && norm == GPT_NORM_LAYERNORM;
}

/* norm: the one of the layer, or of the end of the model. */
static bool present(const gpt_config *c, int norm, when when) {
    switch (when) {
    case ALWAYS:
        return true;
    case NO_EXPERTS:
        return c->n_expert == 0;
    case ROUTER:
    case EXPERT:
        return c->n_expert > 0;
    case LEARNED_POS:
        return c->pos == GPT_POS_LEARNED;
    case NORM_WEIGHT:
        return c->norm_weight;
    case NORM_BIAS:
        return has_norm_bias(c, norm);
    case NORM_BEFORE_WEIGHT:
        return c->norm_weight && norms_before(c);
    case NORM_BEFORE_BIAS:
        return has_norm_bias(c, norm) && norms_before(c);
    case NORM_2_WEIGHT:
        return c->norm_weight && norms_before(c) && !c->one_norm;
    case NORM_2_BIAS:
        return has_norm_bias(c, norm) && norms_before(c) && !c->one_norm;
    case NORM_AFTER_WEIGHT:
        return c->norm_weight && norms_after(c);
    case QKV_BIAS:
        return c->bias & GPT_BIAS_QKV;
    case QK_NORM:
        return c->qk_norm;
    case ATT_PROJ_BIAS:
        return c->bias & GPT_BIAS_ATT_PROJ;
    case FC_BIAS:
        return c->bias & GPT_BIAS_FC;
    case MLP_PROJ_BIAS:
        return c->bias & GPT_BIAS_MLP_PROJ;
    case UNTIED:
        return !c->tied;
    case HEAD_BIAS:
        return c->head_bias;
    }
    return false;
}

static int64_t extent(const gpt_config *c, dim dim) {
    switch (dim) {
    case ONE:
        return 1;
    case WIDTH:
        return c->n_embd;
    case QKV:
        return qkv_size(c);
    case ATT:
        return att_size(c);
    case QK:
        return qk_norm_size(c);
    case FF:
        return c->n_ff;
    case FC:
        return fc_size(c);
    case EXPERTS:
        return c->n_expert;
    case VOCAB:
        return c->vocab_size;
    case BLOCK:
        return c->block_size;
    }
    return 0;
}

/* A tensor: its row of the table, its layer (-1 outside layers) and, of an expert, that one's number. The row
 * is NULL past the end, and then n is how many tensors there are. */
typedef struct location {
    const struct row *row;
    int layer, expert, n;
} location;

/* The i-th tensor of a place, with this norm. */
static location find_in(const gpt_config *c, place place, int norm, int i) {
    location at = {.layer = -1};
    for (const struct row *row = table; row < table + N_ROWS; row++) {
        if (row->place != place || !present(c, norm, row->when)) continue;
        int count = row->when == EXPERT ? c->n_expert : 1;
        if (i >= at.n && i < at.n + count) {
            at.row = row;
            at.expert = i - at.n;
            return at;
        }
        at.n += count;
    }
    return at;
}

/* Walks the tensors in their order: FIRST, the layers, LAST. */
static location locate(const gpt_config *c, int i) {
    location at = find_in(c, FIRST, c->norm, i);
    int n = at.n, in_layer[2];
    if (at.row) return at;
    for (int norm = 0; norm < 2; norm++) in_layer[norm] = find_in(c, LAYER, norm, -1).n;
    for (int l = 0; l < c->n_layer; l++) {
        int norm = config_layer(c, l).norm;
        if (i - n < in_layer[norm]) {
            at = find_in(c, LAYER, norm, i - n);
            at.layer = l;
            return at;
        }
        n += in_layer[norm];
    }
    at = find_in(c, LAST, c->norm, i - n);
    at.n += n;
    return at;
}

bool params_slot(const gpt_config *c, int i, param_slot *out) {
    location at = i < 0 ? (location){0} : locate(c, i);
    const struct row *row = at.row;
    if (!row) return false;
    memset(out, 0, sizeof *out);
    gpt_param *info = &out->info;
    out->layer = row->place == LAST ? c->n_layer : at.layer;
    if (row->when == EXPERT)
        snprintf(info->name, sizeof info->name, "h.%d.mlp.experts.%d.%s", at.layer, at.expert,
                 row->name);
    else if (at.layer >= 0)
        snprintf(info->name, sizeof info->name, "h.%d.%s", at.layer, row->name);
    else
        snprintf(info->name, sizeof info->name, "%s", row->name);
    info->shape[0] = extent(c, row->rows);
    info->shape[1] = extent(c, row->cols);
    info->n_dim = row->cols == ONE ? 1 : 2;
    info->decay = info->n_dim == 2;
    info->size = info->shape[0] * info->shape[1];
    int64_t rows = row->rows == VOCAB ? padded_vocab_size(c) : info->shape[0];
    out->stored = rows * info->shape[1];
    out->init_ones = row->init == ONES;
    if (row->init == NORMAL) out->init_std = 0.02f;
    if (row->init == RESIDUAL) out->init_std = 0.02f / sqrtf(2.0f * (float)c->n_layer);
    return true;
}

int params_count(const gpt_config *c) {
    return locate(c, INT_MAX).n;
}

/* The i-th tensor of a model, perhaps one of its adapters. */
static bool slot_of(const gpt_config *c, const gpt_options *o, int i, param_slot *out) {
    return params_slot(c, i, out) || lora_slot(c, &o->lora, i - params_count(c), out);
}

static int64_t rounded_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

static int64_t aligned(int64_t n) {
    return rounded_up(n, ALIGN);
}

/* A tensor's place in the gradients, and in the state. With moments of 8 bits it is a border of their blocks in both,
 * so that a block is in one part of the state. */
static int64_t aligned_state(const params_layout *layout, int64_t n) {
    return rounded_up(n, state_unit(layout));
}

/* Whether a product reads it: every matrix but the positions, and wte where the head is another. */
static bool is_product(const gpt_config *c, const struct row *row) {
    if (row->cols == ONE || row->rows == BLOCK || row->when == ROUTER) return false;
    return row->place != FIRST || c->tied;
}

/* Whether a product adds it. */
static bool is_product_bias(const struct row *row) {
    return row->when == QKV_BIAS || row->when == ATT_PROJ_BIAS || row->when == FC_BIAS ||
           row->when == MLP_PROJ_BIAS;
}

/* Whether products read it, in their form, or it is given as blocks. */
static bool has_form(const gpt_segment *s) {
    return s->product || s->parts == 0 || s->n_stacked;
}

static size_t form_bytes(const gpt_ops *ops, const gpt_segment *s, bool training) {
    if (!has_form(s)) return 0;
    if (s->n_stacked) return ops->blocks_bytes(s);
    return ops->weights_bytes(s->rows, s->cols, s->parts, training);
}

/* Whether all of a name matches: * any text, ? any character. Only the last * can need another try. */
static bool matches(const char *pattern, const char *name) {
    const char *after_star = NULL, *retry = NULL;
    while (*name) {
        if (*pattern == '*') {
            after_star = ++pattern, retry = name;
        } else if (*pattern == '?' || *pattern == *name) {
            pattern++, name++;
        } else if (after_star) {
            pattern = after_star, name = ++retry;
        } else {
            return false;
        }
    }
    while (*pattern == '*') pattern++;
    return !*pattern;
}

/* Settings of a tensor, from the first group that matches, and places of its gradient and state. row is
 * NULL for an adapter. */
static void train_segment(const gpt_options *o, const char *name, const struct row *row,
                          gpt_segment *s, params_layout *out) {
    gpt_group group = {0};
    for (int g = 0; g < o->n_groups; g++) {
        if (!matches(o->groups[g].pattern, name)) continue;
        group = o->groups[g];
        break;
    }
    s->grad = -1;
    if (group.frozen || (o->lora.rank && row)) return;
    s->optimizer = group.optimizer ? group.optimizer : o->optimizer;
    bool is_hidden = row && row->place == LAYER && row->cols != ONE;
    if (s->optimizer == GPT_OPTIMIZER_MUON && !is_hidden) s->optimizer = GPT_OPTIMIZER_ADAMW;
    if (s->optimizer == GPT_OPTIMIZER_DEFAULT) s->optimizer = GPT_OPTIMIZER_ADAMW;
    s->lr_scale = group.lr_scale > 0 ? group.lr_scale : 1;
    if (group.decay != GPT_DECAY_DEFAULT) s->decay = group.decay == GPT_DECAY_ON;
    s->grad = 0; /* place_gradients moves it */
    s->state = out->n_states[s->optimizer];
    out->n_states[s->optimizer] += aligned_state(out, s->size);
    if (s->optimizer == GPT_OPTIMIZER_MUON && o->muon_rows) {
        s->row_state = out->n_states[s->optimizer];
        out->n_states[s->optimizer] += aligned(s->rows);
    }
}

/* Gradients that products write come first, where the buffer is aligned best; the others are then
 * neighbours, and cleared at once. */
static void place_gradients(params_layout *out) {
    for (int product = 1; product >= 0; product--)
        for (int i = 0; i < out->n_slots; i++) {
            gpt_segment *s = &out->segments[i];
            if (s->grad < 0 || s->product != product) continue;
            s->grad = out->n_grads;
            out->n_grads += aligned_state(out, s->size);
        }
}

/* A group without parameters is a mistake in its pattern. */
static int check_groups(const gpt_options *o, const params_layout *layout) {
    for (int g = 0; g < o->n_groups; g++) {
        int i = 0;
        while (i < layout->n_slots && !matches(o->groups[g].pattern, layout->slots[i].info.name))
            i++;
        if (i == layout->n_slots)
            return fail(GPT_ERR_ARGUMENT, "the pattern '%s' of group %d matches no parameter",
                        o->groups[g].pattern, g);
    }
    if (layout->n_grads == 0)
        return fail(GPT_ERR_ARGUMENT, "all parameters are frozen: there is nothing to train");
    return GPT_OK;
}

/* The rows of a tensor that are given as blocks. */
static int stack_rows(const gpt_ops *ops, const gpt_options *o, int i, const param_slot *slot,
                      bool may_be_blocks, gpt_segment *s) {
    const char *name = slot->info.name;
    int64_t rows = 0;
    for (int k = 0; k < o->n_block_rows; k++) {
        const gpt_block_rows *given = &o->block_rows[k];
        if (given->param != i) continue;
        if (!may_be_blocks) return fail(GPT_ERR_ARGUMENT, "%s cannot be given as blocks", name);
        if (s->n_stacked == GPT_MAX_STACKED)
            return fail(GPT_ERR_ARGUMENT, "%s has more than %d entries of blocks", name,
                        GPT_MAX_STACKED);
        if (given->rows < 1)
            return fail(GPT_ERR_ARGUMENT, "an entry of blocks of %s has %d rows", name,
                        given->rows);
        s->stacked[s->n_stacked++] = (gpt_stack){given->rows, given->block};
        rows += given->rows;
        if (!ops->blocks_bytes(s))
            return fail(GPT_ERR_ARGUMENT,
                        "blocks of type %d are not known, or do not fill the %d columns of %s",
                        given->block, s->cols, name);
    }
    if (!s->n_stacked) return GPT_OK;
    if (rows != slot->info.shape[0])
        return fail(GPT_ERR_ARGUMENT, "the entries of blocks of %s have %lld rows, not %lld", name,
                    (long long)rows, (long long)slot->info.shape[0]);
    if (s->parts == 2 && (s->n_stacked != 2 || s->stacked[0].rows != s->stacked[1].rows))
        return fail(GPT_ERR_ARGUMENT, "gates and ups of %s must be two entries of blocks", name);
    return GPT_OK;
}

/* The matrices in the rows of a tensor. */
static void split_rows(const gpt_config *c, const struct row *row, gpt_segment *s) {
    int head = head_size(c), kv = c->n_kv_head * head;
    if (row && row->rows == QKV) {
        s->n_matrices = 3;
        s->matrix_rows[0] = c->n_head * head, s->matrix_rows[1] = s->matrix_rows[2] = kv;
        return;
    }
    s->n_matrices = s->parts == 2 ? 2 : 1;
    for (int i = 0; i < s->n_matrices; i++) s->matrix_rows[i] = s->rows / s->n_matrices;
}

static int lay_out_slot(const gpt_config *c, const gpt_ops *ops, const gpt_options *o, int i,
                        params_layout *out) {
    param_slot *slot = &out->slots[i];
    gpt_segment *s = &out->segments[i];
    location at = locate(c, i);
    const struct row *row = at.row; /* NULL: an adapter */
    slot_of(c, o, i, slot);
    slot->offset = out->n_stored;
    int cols = slot->info.n_dim == 2 ? (int)slot->info.shape[1] : 1;
    *s = (gpt_segment){.offset = slot->offset,
                       .size = slot->stored,
                       .grad = -1,
                       .decay = slot->info.decay,
                       .product = row && is_product(c, row),
                       .rows = (int)(slot->stored / cols),
                       .cols = cols,
                       .parts = 1};
    /* Gates and ups are read in pairs. */
    if (row && row->rows == FC && row->cols != ONE && is_gated(c->activation)) s->parts = 2;
    split_rows(c, row, s);
    if (row && is_product_bias(row) && ops->packs_biases) s->parts = 0;
    bool may_be_blocks = row && (is_product(c, row) || (row->rows == VOCAB && row->cols != ONE));
    TRY(stack_rows(ops, o, i, slot, may_be_blocks, s));
    bool read_too = row && row->place == FIRST && !s->n_stacked;
    bool packs_host_memory = ops->packs_host_memory || s->n_stacked;
    slot->kept =
        !weights_are_fixed(o) || !form_bytes(ops, s, o->training) || read_too || !packs_host_memory;
    out->n_params += slot->info.size;
    bool idle = row && row->when == EXPERT && at.expert >= c->n_expert_used;
    if (!idle) out->n_active += slot->info.size;
    if (slot->kept) out->n_stored += aligned(slot->stored);
    if (o->training) train_segment(o, slot->info.name, row, s, out);
    return GPT_OK;
}

int params_layout_create(const gpt_config *c, const gpt_ops *ops, const gpt_options *o,
                         params_layout *out) {
    memset(out, 0, sizeof *out);
    out->lora = o->lora;
    out->moments = o->moments;
    out->n_slots = params_count(c) + lora_count(c, &o->lora);
    out->slots = calloc((size_t)out->n_slots, sizeof *out->slots);
    out->segments = calloc((size_t)out->n_slots, sizeof *out->segments);
    int status = GPT_OK;
    if (!out->slots || !out->segments)
        status = fail(GPT_ERR_MEMORY, "no memory for the parameter table");
    for (int i = 0; status == GPT_OK && i < out->n_slots; i++)
        status = lay_out_slot(c, ops, o, i, out);
    if (status == GPT_OK) place_gradients(out);
    if (status == GPT_OK && o->training) status = check_groups(o, out);
    if (status == GPT_OK && o->training) status = shard_lay_out(o, out);
    if (status != GPT_OK) params_layout_free(out);
    return status;
}

void params_layout_free(params_layout *layout) {
    free(layout->slots);
    free(layout->segments);
    shard_layout_free(layout);
    memset(layout, 0, sizeof *layout);
}

size_t params_plan_packed(const gpt_ops *ops, bool training, char *base, params_layout *layout) {
    size_t used = 0;
    for (int i = 0; i < layout->n_slots; i++) {
        gpt_segment *s = &layout->segments[i];
        size_t bytes = form_bytes(ops, s, training);
        if (base && bytes) s->packed = base + used;
        used += align_buffer(bytes);
    }
    return used;
}

/* The place of a tensor for the embedding and norms, and for products. */
typedef struct tensor_places {
    void *own, *products;
} tensor_places;

static void set_field(const gpt_config *c, const params_layout *layout, int i, tensor_places at,
                      params_view *view) {
    location found = locate(c, i);
    const struct row *row = found.row;
    if (!row) {
        *lora_field(c, &layout->lora, i - found.n, view->layers) = at.own;
        return;
    }
    char *base = found.layer >= 0 ? (char *)&view->layers[found.layer] : (char *)view;
    bool is_wte = row->field == MODEL_FIELD(wte) && row->place == FIRST;
    void *place = is_wte || !has_form(&layout->segments[i]) ? at.own : at.products;
    memcpy(base + row->field + sizeof place * (size_t)found.expert, &place, sizeof place);
    if (is_wte) view->head = at.products; /* lm_head, which comes later, where there is one */
}

static void clear_view(const gpt_config *c, params_view *view) {
    layer_view *layers = view->layers;
    memset(view, 0, sizeof *view);
    memset(layers, 0, sizeof *layers * (size_t)c->n_layer);
    view->layers = layers;
}

/* With one_norm, norm 2 is norm 1. */
static void share_norms(const gpt_config *c, params_view *view) {
    for (int l = 0; c->one_norm && l < c->n_layer; l++) {
        layer_view *layer = &view->layers[l];
        layer->norm_2_w = layer->norm_1_w;
        layer->norm_2_b = layer->norm_1_b;
    }
}

void params_view_set(const gpt_config *c, const params_layout *layout, float *params,
                     params_view *view) {
    clear_view(c, view);
    for (int i = 0; i < layout->n_slots; i++) {
        void *own = params + layout->slots[i].offset, *packed = layout->segments[i].packed;
        set_field(c, layout, i, (tensor_places){own, packed ? packed : own}, view);
    }
    share_norms(c, view);
}

void grads_view_set(const gpt_config *c, const params_layout *layout, float *grads,
                    params_view *view) {
    clear_view(c, view);
    for (int i = 0; i < layout->n_slots; i++) {
        const gpt_segment *s = &layout->segments[i];
        void *grad = s->grad < 0 ? NULL : grads + s->grad;
        set_field(c, layout, i, (tensor_places){grad, grad}, view);
    }
    share_norms(c, view);
}

/* 64 well-mixed bits from a counter (SplitMix64: Steele, Lea and Flood 2014). */
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* Normal numbers in pairs by Box and Muller 1958; those of adapters are uniform. */
void params_init(const param_slot *slot, int i, uint64_t seed, float *out) {
    memset(out, 0, sizeof(float) * (size_t)slot->stored);
    uint64_t key = mix(seed) ^ mix((uint64_t)i + 1);
    for (int64_t j = 0; j < slot->info.size; j++) {
        if (slot->init_ones) out[j] = 1;
        if (slot->init_bound > 0)
            out[j] = slot->init_bound * ((float)(mix(key + (uint64_t)j) >> 40) * 0x1p-23f - 1);
        if (slot->init_std == 0 || j % 2) continue;
        uint64_t bits = mix(key + (uint64_t)j);
        double radius = sqrt(-2 * log(((double)(bits >> 32) + 1) * 0x1p-32));
        double angle = 6.283185307179586 * (double)(bits & 0xffffffffu) * 0x1p-32;
        out[j] = (float)(slot->init_std * radius * cos(angle));
        if (j + 1 < slot->info.size) out[j + 1] = (float)(slot->init_std * radius * sin(angle));
    }
}
