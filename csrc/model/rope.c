/* rope.c: rotary tables. They do not depend on weights: a model and each session have their own, as long
 * as their sequences may be, and fill them as far as positions reach. */
#include "model.h"

#include <math.h>

enum { STRIP_FLOATS = 2048 };

int64_t rope_pairs(const gpt_config *c) {
    if (c->pos == GPT_POS_LEARNED) return 0;
    return c->pos == GPT_POS_ROPE ? head_size(c) / 2 : att_size(c) / 2;
}

static bool same_rope(const gpt_config *c, int l, int other) {
    gpt_layer a = config_layer(c, l), b = config_layer(c, other);
    return a.rope && b.rope && a.rope_theta == b.rope_theta;
}

int rope_index(const gpt_config *c, int l) {
    int index = 0, first = 0;
    if (!config_layer(c, l).rope) return -1;
    while (!same_rope(c, l, first)) first++;
    for (int i = 0; i < first; i++) { /* those that are the first of their table */
        int j = 0;
        if (!config_layer(c, i).rope) continue;
        while (!same_rope(c, i, j)) j++;
        index += i == j;
    }
    return index;
}

int rope_table_count(const gpt_config *c) {
    int n = 0;
    if (!c->layers) return c->pos != GPT_POS_LEARNED;
    for (int l = 0; l < c->n_layer; l++)
        if (rope_index(c, l) >= n) n++;
    return n;
}

/* Radians a position of the i-th pair. */
static double rope_frequency(const gpt_config *c, float theta, int64_t i, int64_t pairs) {
    double frequency = pow(theta, -(double)i / (double)pairs);
    if (c->rope_scaling == GPT_ROPE_NONE) return frequency;
    if (c->rope_scaling == GPT_ROPE_LINEAR) return frequency / c->rope_factor;
    double turns = c->rope_original * frequency / (2 * 3.141592653589793);
    double kept = (turns - c->rope_low_freq) / (c->rope_high_freq - c->rope_low_freq);
    kept = fmin(fmax(kept, 0), 1);
    return (1 - kept) * frequency / c->rope_factor + kept * frequency;
}

void rope_frequencies(const gpt_config *c, double *out) {
    int64_t pairs = rope_pairs(c);
    for (int l = 0, n = 0; l < c->n_layer; l++) {
        if (rope_index(c, l) != n) continue;
        for (int64_t i = 0; i < pairs; i++)
            out[n * pairs + i] = rope_frequency(c, config_layer(c, l).rope_theta, i, pairs);
        n++;
    }
}

const float *rope_table(const gpt_model *m, const acts *a, int l) {
    int64_t n = (int64_t)a->rope_rows * rope_pairs(&m->config) * 2;
    return m->rope[l] < 0 ? NULL : a->rope + m->rope[l] * n;
}

/* Rows first to end of one table, made on the host in strips of a few pairs. */
static void fill(const gpt_model *m, const double *frequencies, float *table, int first, int end) {
    float strip[STRIP_FLOATS];
    int64_t pairs = rope_pairs(&m->config), at = first * pairs, i = 0;
    size_t n = 0;
    for (int t = first; t < end; i++) {
        if (i == pairs) i = 0, t++;
        if (t < end) {
            double angle = t * frequencies[i];
            strip[n++] = (float)cos(angle);
            strip[n++] = (float)sin(angle);
        }
        if (n == STRIP_FLOATS || t == end) {
            m->ops->upload(m->ctx, table + 2 * at, strip, sizeof *strip * n);
            at += (int64_t)n / 2;
            n = 0;
        }
    }
}

/* At least doubled, so that a step of decoding seldom does this. */
void rope_reach(const gpt_model *m, acts *a, int n_positions) {
    int64_t pairs = rope_pairs(&m->config), end = n_positions;
    if (!a->rope || n_positions <= a->rope_filled) return;
    if (end < 2 * (int64_t)a->rope_filled) end = 2 * (int64_t)a->rope_filled;
    if (end > a->rope_rows) end = a->rope_rows;
    for (int i = 0, n = rope_table_count(&m->config); i < n; i++)
        fill(m, m->rope_frequencies + i * pairs, a->rope + 2 * i * a->rope_rows * pairs,
             a->rope_filled, (int)end);
    a->rope_filled = (int)end;
}
