/* adapters.c: copies of a model's adapters, of which the sequences of a session have one each. The base's product
 * is of all rows of a step; that of the adapters, which is small, of the rows that share one. */
#include "model.h"

static const float *take(const char *base, size_t *used, int64_t n) {
    const float *place = base && n ? (const float *)(base + *used) : NULL;
    *used += align_buffer(sizeof(float) * (size_t)n);
    return place;
}

/* Numbers of A, B and the gain of a matrix. */
typedef struct sizes {
    int64_t a, b, gain;
} sizes;

static sizes sizes_of(const gpt_model *m, int matrix) {
    const gpt_lora *o = &m->options.lora;
    lora_shape shape = lora_shape_of(&m->config, o, matrix);
    int64_t R = o->rank, IC = lora_inputs(&m->config, matrix);
    return (sizes){shape.n_parts * R * IC, shape.rows * R, o->dora ? shape.rows : 0};
}

size_t adapter_plan(const gpt_model *m, char *base, gpt_adapter *out) {
    size_t used = 0;
    for (int i = 0; i < m->config.n_layer * LORA_MATRICES; i++) {
        sizes n = sizes_of(m, i % LORA_MATRICES);
        adapter_numbers at = {.a = take(base, &used, n.a)};
        at.b = take(base, &used, n.b);
        at.gain = take(base, &used, n.gain);
        if (base) out->of[i] = at;
    }
    return used;
}

static void copy(gpt_model *m, const float *to, const float *from, int64_t n) {
    if (n) m->ops->copy(m->ctx, (float *)to, from, sizeof(float) * (size_t)n);
}

void adapter_copy(gpt_model *m, gpt_adapter *to) {
    for (int i = 0; i < m->config.n_layer * LORA_MATRICES; i++) {
        int l = i / LORA_MATRICES, matrix = i % LORA_MATRICES;
        sizes n = sizes_of(m, matrix);
        copy(m, to->of[i].a, m->w.layers[l].lora_a[matrix], n.a);
        copy(m, to->of[i].b, m->w.layers[l].lora_b[matrix], n.b);
        copy(m, to->of[i].gain, dora_of(m, l, matrix).gain, n.gain);
    }
}

const gpt_adapter *adapter_of_all(const gpt_session *s, const int32_t *seqs, int n, bool *same) {
    const gpt_adapter *first = s->adapters[seqs[0]];
    *same = true;
    for (int i = 1; i < n; i++) *same = *same && s->adapters[seqs[i]] == first;
    return first;
}

/* How many rows of a step, from `first` on, have the adapter of the first. */
static int rows_alike(const gpt_session *s, const int32_t *seqs, int first, int n) {
    int end = first + 1;
    while (end < n && s->adapters[seqs[end]] == s->adapters[seqs[first]]) end++;
    return end - first;
}

static act *row_of(const gpt_model *m, const act *x, int64_t row, int64_t width) {
    return x ? (char *)x + row * width * (int64_t)m->ops->act_bytes : NULL;
}

/* The same op for rows first to first + n - 1. */
static lora_forward rows_of(const gpt_model *m, const lora_forward *op, int first, int n) {
    lora_forward part = *op;
    int pre = is_gated(op->activation) ? 2 * op->OC : op->OC;
    part.out = row_of(m, op->out, first, op->OC);
    part.pre = row_of(m, op->pre, first, pre);
    part.in = row_of(m, op->in, first, op->IC);
    part.u = op->u + (int64_t)first * op->n_parts * op->R;
    part.N = n;
    return part;
}

void adapter_run(gpt_model *m, const batch *x, int index, const lora_forward *op) {
    const gpt_session *s = x->session;
    const int32_t *seqs = s ? s->rows + STEP_SEQ * x->N : NULL;
    if (!s) m->ops->lora_forward(m->ctx, op);
    for (int first = 0, n; s && first < x->N; first += n) {
        const gpt_adapter *own = s->adapters[seqs[first]];
        n = rows_alike(s, seqs, first, x->N);
        if (own && !own->arena) continue;
        lora_forward part = rows_of(m, op, first, n);
        if (own) {
            part.a = own->of[index].a;
            part.b = own->of[index].b;
            part.gain = own->of[index].gain;
        }
        m->ops->lora_forward(m->ctx, &part);
    }
}
