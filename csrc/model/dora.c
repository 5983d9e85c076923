/* dora.c: lengths of adapted rows: Liu et al. 2024. Those of the model's matrices are made of the numbers that are
 * written, since a packed form may be the only one that stays; the adapters' part comes from products. */
#include "error.h"
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Rows of blocks that are widened at once, and whose lengths leave together. */
enum { WIDENED_ROWS = 256, UPLOADED_ROWS = 256 };

int dora_rows(const gpt_lora *o) {
    return o->rank && o->dora ? GPT_MAX_STACKED * o->rank : 0;
}

static int outputs_of(const gpt_config *c, int matrix) {
    return matrix == LORA_QKV ? qkv_size(c) : matrix == LORA_FC ? fc_size(c) : c->n_embd;
}

static void *take(char *base, size_t *used, size_t bytes) {
    void *place = base ? base + *used : NULL;
    *used += align_buffer(bytes);
    return place;
}

size_t dora_plan(const gpt_config *c, const gpt_options *o, const gpt_ops *ops, char *base,
                 dora_state *out) {
    size_t used = 0, widest_in = 0, widest_out = 0, rows = (size_t)dora_rows(&o->lora);
    if (!rows) return 0;
    for (int matrix = 0; matrix < LORA_MATRICES; matrix++) {
        size_t n = sizeof(float) * (size_t)lora_shape_of(c, &o->lora, matrix).rows;
        size_t in = (size_t)lora_inputs(c, matrix), outputs = (size_t)outputs_of(c, matrix);
        if (in > widest_in) widest_in = in;
        if (outputs > widest_out) widest_out = outputs;
        for (int l = 0; n && l < c->n_layer; l++) {
            dora_rows_of at = {take(base, &used, n), take(base, &used, n), take(base, &used, n)};
            if (out) out->of[l * LORA_MATRICES + matrix] = at;
        }
    }
    void *in = take(base, &used, rows * widest_in * ops->act_bytes);
    void *products = take(base, &used, rows * widest_out * ops->act_bytes);
    void *hidden = take(base, &used, rows * (size_t)c->n_ff * ops->act_bytes);
    if (out) out->in = in, out->products = products, out->hidden = hidden;
    return used;
}

dora_rows_of dora_of(const gpt_model *m, int l, int matrix) {
    return m->dora.of ? m->dora.of[l * LORA_MATRICES + matrix] : (dora_rows_of){0};
}

/* ---- the model's rows ---- */

/* Whether parameter i is a matrix that may be adapted. */
static bool is_adapted(const gpt_model *m, int i, int *l, int *matrix) {
    bool of_model = m->dora.of && i < params_count(&m->config);
    return of_model && lora_matrix_of(m->layout.slots[i].info.name, l, matrix);
}

static double square_of(const float *values, int64_t n) {
    double sum = 0;
    for (int64_t k = 0; k < n; k++) sum += (double)values[k] * values[k];
    return sum;
}

/* The squared lengths of n rows of a matrix from `first` on, of those that an adapter changes. */
static void set_squares(gpt_model *m, int l, int matrix, int first, int n, const float *values,
                        int64_t cols) {
    lora_shape shape = lora_shape_of(&m->config, &m->options.lora, matrix);
    for (int i = 0, before = 0; i < shape.n_parts; before += shape.parts[i++].rows) {
        const lora_part *part = &shape.parts[i];
        int begin = first > part->first ? first : part->first, end = part->first + part->rows;
        if (end > first + n) end = first + n;
        for (int some; begin < end; begin += some) {
            float squares[UPLOADED_ROWS];
            some = end - begin < UPLOADED_ROWS ? end - begin : UPLOADED_ROWS;
            for (int k = 0; k < some; k++)
                squares[k] = (float)square_of(values + (begin - first + k) * cols, cols);
            float *to = dora_of(m, l, matrix).squares + before + begin - part->first;
            m->ops->upload(m->ctx, to, squares, sizeof *squares * (size_t)some);
        }
    }
}

void dora_written(gpt_model *m, int i, const float *values, int64_t n) {
    int l, matrix;
    m->dora.stale = true;
    if (!is_adapted(m, i, &l, &matrix)) return;
    int64_t cols = m->layout.segments[i].cols;
    set_squares(m, l, matrix, 0, (int)(n / cols), values, cols);
}

int dora_written_blocks(gpt_model *m, int i, int part) {
    const gpt_segment *s = &m->layout.segments[i];
    int l, matrix, first = 0, status = GPT_OK;
    m->dora.stale = true;
    if (!is_adapted(m, i, &l, &matrix)) return GPT_OK;
    float *values = malloc(sizeof(float) * WIDENED_ROWS * (size_t)s->cols);
    if (!values) return fail(GPT_ERR_MEMORY, "no memory to widen %d rows", WIDENED_ROWS);
    for (int k = 0; k < part; k++) first += s->stacked[k].rows;
    int end = first + s->stacked[part].rows;
    for (int row = first; row < end && status == GPT_OK; row += WIDENED_ROWS) {
        int n = end - row < WIDENED_ROWS ? end - row : WIDENED_ROWS;
        status = rows_read(m, s, row, n, values);
        if (status == GPT_OK) set_squares(m, l, matrix, row, n, values, s->cols);
    }
    free(values);
    return status;
}

void dora_init(gpt_model *m, int i, float *values) {
    const param_slot *slot = &m->layout.slots[i];
    int l, matrix;
    if (slot->info.n_dim != 1 || !lora_matrix_of(slot->info.name, &l, &matrix)) return;
    size_t bytes = sizeof(float) * (size_t)slot->info.size;
    m->ops->download(m->ctx, values, dora_of(m, l, matrix).squares, bytes);
    for (int64_t k = 0; k < slot->info.size; k++) values[k] = sqrtf(values[k]);
}

/* ---- with the adapters ---- */

static const weight *matrix_of(const layer_view *w, int matrix) {
    const weight *const all[] = {w->qkv_w, w->att_proj_w, w->fc_w, w->mlp_proj_w};
    return all[matrix];
}

/* products (parts R, outputs) = A W^T. */
static void multiply(gpt_model *m, int l, int matrix, int n_parts) {
    const gpt_config *c = &m->config;
    const dora_state *d = &m->dora;
    bool pairs = matrix == LORA_FC && is_gated(c->activation);
    int N = n_parts * m->options.lora.rank, IC = lora_inputs(c, matrix);
    dora_inputs in = {.out = d->in, .a = m->w.layers[l].lora_a[matrix], .n = (int64_t)N * IC};
    linear_forward op = {.out = pairs ? d->hidden : d->products,
                         .pre = pairs ? d->products : NULL,
                         .in = d->in,
                         .w = matrix_of(&m->w.layers[l], matrix),
                         .activation = pairs ? c->activation : GPT_ACT_NONE,
                         .exact = m->options.training,
                         .N = N,
                         .IC = IC,
                         .OC = pairs ? c->n_ff : outputs_of(c, matrix)};
    m->ops->dora_inputs(m->ctx, &in);
    m->ops->linear_forward(m->ctx, &op);
}

static void measure(gpt_model *m, int l, int matrix) {
    const gpt_lora *o = &m->options.lora;
    lora_shape shape = lora_shape_of(&m->config, o, matrix);
    dora_rows_of rows = dora_of(m, l, matrix);
    if (!shape.n_parts) return;
    multiply(m, l, matrix, shape.n_parts);
    dora_gain op = {.gain = rows.gain,
                    .per_norm = rows.per_norm,
                    .m = m->w.layers[l].lora_m[matrix],
                    .squares = rows.squares,
                    .aw = m->dora.products,
                    .a = m->w.layers[l].lora_a[matrix],
                    .b = m->w.layers[l].lora_b[matrix],
                    .scale = o->scale,
                    .n_parts = shape.n_parts,
                    .IC = lora_inputs(&m->config, matrix),
                    .OC = outputs_of(&m->config, matrix),
                    .R = o->rank};
    memcpy(op.parts, shape.parts, sizeof op.parts);
    m->ops->dora_gain(m->ctx, &op);
}

size_t dora_workspace(const gpt_model *m) {
    gpt_shape shape = config_shape(&m->config);
    shape.N = dora_rows(&m->options.lora);
    shape.T = shape.n_ctx = 1;
    shape.lora_rank = m->options.lora.rank;
    shape.dora = 1;
    return shape.N ? m->ops->workspace_bytes(m->ctx, &shape) : 0;
}

void dora_measure(gpt_model *m) {
    int before = m->layer;
    for (int l = 0; m->dora.stale && m->dora.of && l < m->config.n_layer; l++) {
        m->layer = l;
        for (int matrix = 0; matrix < LORA_MATRICES; matrix++) measure(m, l, matrix);
    }
    m->layer = before;
    m->dora.stale = false;
}
