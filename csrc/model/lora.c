/* lora.c: the adapters of a model: which matrices have them, their parameters, and their buffers. */
#include "error.h"
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* A target, and the outputs of its matrix that it names. */
typedef struct target {
    int bit, matrix, first, rows;
} target;

enum { MAX_TARGETS = 9 };

static int list_targets(const gpt_config *c, target *out) {
    int HS = head_size(c), Q = c->n_head * HS, KV = c->n_kv_head * HS, F = c->n_ff, C = c->n_embd;
    const target all[MAX_TARGETS] = {
        {GPT_LORA_QKV, LORA_QKV, 0, Q + 2 * KV},
        {GPT_LORA_Q, LORA_QKV, 0, Q},
        {GPT_LORA_K, LORA_QKV, Q, KV},
        {GPT_LORA_V, LORA_QKV, Q + KV, KV},
        {GPT_LORA_ATT_PROJ, LORA_ATT_PROJ, 0, C},
        {GPT_LORA_FC, LORA_FC, 0, fc_size(c)},
        {GPT_LORA_MLP_PROJ, LORA_MLP_PROJ, 0, C},
        {GPT_LORA_GATE, LORA_FC, 0, F},
        {GPT_LORA_UP, LORA_FC, F, F},
    };
    memcpy(out, all, sizeof all);
    return is_gated(c->activation) ? MAX_TARGETS : MAX_TARGETS - 2;
}

lora_shape lora_shape_of(const gpt_config *c, const gpt_lora *o, int matrix) {
    target targets[MAX_TARGETS];
    lora_shape shape = {0};
    int n = o->rank ? list_targets(c, targets) : 0;
    for (const target *t = targets; t < targets + n; t++) {
        if (t->matrix != matrix || !(o->targets & t->bit)) continue;
        shape.parts[shape.n_parts++] = (lora_part){t->first, t->rows};
        shape.rows += t->rows;
    }
    return shape;
}

int lora_check(const gpt_config *c, const gpt_lora *o) {
    enum { MOST_RANK = 1 << 12 };
    const int qkv = GPT_LORA_Q | GPT_LORA_K | GPT_LORA_V, fc = GPT_LORA_GATE | GPT_LORA_UP;
    target targets[MAX_TARGETS];
    int known = 0;
    if (o->rank == 0) return GPT_OK;
    if (o->rank < 0 || o->rank > MOST_RANK)
        return fail(GPT_ERR_ARGUMENT, "the rank of adapters is %d; it must be between 0 and %d",
                    o->rank, MOST_RANK);
    for (int n = list_targets(c, targets), i = 0; i < n; i++) known |= targets[i].bit;
    if (o->targets & fc && !(known & fc))
        return fail(GPT_ERR_ARGUMENT,
                    "adapters of gates or ups need a model with gates, such as SwiGLU's");
    if (c->n_expert && o->targets & (fc | GPT_LORA_FC | GPT_LORA_MLP_PROJ))
        return fail(GPT_ERR_ARGUMENT, "experts have no adapters: choose targets of attention");
    if (!o->targets || o->targets & ~known)
        return fail(GPT_ERR_ARGUMENT,
                    "the targets of adapters are %d; they must be a sum of enum gpt_lora_target",
                    o->targets);
    if ((o->targets & GPT_LORA_QKV && o->targets & qkv) ||
        (o->targets & GPT_LORA_FC && o->targets & fc))
        return fail(GPT_ERR_ARGUMENT,
                    "a matrix has an adapter, or its rows have; the targets %d name both",
                    o->targets);
    if (o->dora != 0 && o->dora != 1)
        return fail(GPT_ERR_ARGUMENT, "dora of adapters is %d; it must be 0 or 1", o->dora);
    if (!isfinite(o->scale))
        return fail(GPT_ERR_ARGUMENT, "the scale of adapters is %g; it must be finite", o->scale);
    if (!(o->dropout >= 0 && o->dropout < 1))
        return fail(GPT_ERR_ARGUMENT,
                    "the dropout of adapters is %g; it must be at least 0 and below 1", o->dropout);
    return GPT_OK;
}

/* ---- parameters ---- */

static const char *const names[] = {"attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"};

bool lora_matrix_of(const char *name, int *layer, int *matrix) {
    int end = 0;
    if (sscanf(name, "h.%d.%n", layer, &end) != 1 || !end) return false;
    const char *rest = strrchr(name, '.');
    bool is_bias = !strcmp(rest, ".bias");
    for (*matrix = 0; *matrix < LORA_MATRICES; ++*matrix) {
        size_t n = strlen(names[*matrix]);
        if (!is_bias && (size_t)(rest - name) == (size_t)end + n &&
            !memcmp(name + end, names[*matrix], n))
            return true;
    }
    return false;
}

static int kinds(const gpt_lora *o) {
    return o->dora ? 3 : 2;
}

/* Matrices of a layer that have adapters, in order. */
static int list_matrices(const gpt_config *c, const gpt_lora *o, int *out) {
    int n = 0;
    for (int matrix = 0; matrix < LORA_MATRICES; matrix++)
        if (lora_shape_of(c, o, matrix).n_parts) out[n++] = matrix;
    return n;
}

int lora_count(const gpt_config *c, const gpt_lora *o) {
    int matrices[LORA_MATRICES];
    return kinds(o) * c->n_layer * list_matrices(c, o, matrices);
}

int lora_inputs(const gpt_config *c, int matrix) {
    const int inputs[] = {c->n_embd, att_size(c), c->n_embd, c->n_ff};
    return inputs[matrix];
}

bool lora_slot(const gpt_config *c, const gpt_lora *o, int i, param_slot *out) {
    int matrices[LORA_MATRICES], n = list_matrices(c, o, matrices), kind = i % kinds(o);
    if (i < 0 || i >= kinds(o) * n * c->n_layer) return false;
    int matrix = matrices[i / kinds(o) % n];
    lora_shape shape = lora_shape_of(c, o, matrix);
    memset(out, 0, sizeof *out);
    gpt_param *info = &out->info;
    snprintf(info->name, sizeof info->name, "h.%d.%s.lora_%c", i / (kinds(o) * n), names[matrix],
             "abm"[kind]);
    info->n_dim = kind == 2 ? 1 : 2;
    info->decay = kind != 2;
    info->shape[0] = kind ? shape.rows : shape.n_parts * o->rank;
    info->shape[1] = kind == 2 ? 1 : kind ? o->rank : lora_inputs(c, matrix);
    info->size = out->stored = info->shape[0] * info->shape[1];
    if (kind == 0) out->init_bound = 1 / sqrtf((float)lora_inputs(c, matrix));
    return true;
}

float **lora_field(const gpt_config *c, const gpt_lora *o, int i, layer_view *layers) {
    int matrices[LORA_MATRICES], n = list_matrices(c, o, matrices);
    layer_view *layer = &layers[i / (kinds(o) * n)];
    float **const fields[] = {layer->lora_a, layer->lora_b, layer->lora_m};
    return &fields[i % kinds(o)][matrices[i / kinds(o) % n]];
}

/* ---- a pass ---- */

bool adapter_joins(const gpt_model *m, adapter r) {
    return m->ops->joins_adapters && r.a && !r.gain && !(r.dropout.p > 0);
}

adapter adapter_of(const gpt_model *m, const acts *a, const batch *x, int l, int matrix) {
    const gpt_lora *o = &m->options.lora;
    if (!m->w.layers[l].lora_a[matrix]) return (adapter){0};
    dora_rows_of rows = dora_of(m, l, matrix);
    return (adapter){.shape = lora_shape_of(&m->config, o, matrix),
                     .index = l * LORA_MATRICES + matrix,
                     .a = m->w.layers[l].lora_a[matrix],
                     .b = m->w.layers[l].lora_b[matrix],
                     .gain = rows.gain,
                     .per_norm = rows.per_norm,
                     .da = m->dw.layers[l].lora_a[matrix],
                     .db = m->dw.layers[l].lora_b[matrix],
                     .dm = m->dw.layers[l].lora_m[matrix],
                     .u = a->layers[l].lora_u[matrix],
                     .v = a->layers[l].lora_v[matrix],
                     .dropout = dropout_of_adapter(m, x, l, matrix)};
}
