/* rope.c: rotary tables. They do not depend on weights: a model and each session have their own, as long
 * as their sequences may be, and fill them as far as positions reach. */
#include "model.h"

#include <math.h>

enum { STRIP_FLOATS = 2048 };
static const double PI = 3.141592653589793;

int64_t rope_pairs(const gpt_config *c) {
    if (c->pos == GPT_POS_LEARNED) return 0;
    if (c->pos == GPT_POS_ROPE_WIDE) return att_size(c) / 2;
    return (c->rope_dim ? c->rope_dim : head_size(c)) / 2;
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

/* The index of the pair that turns so often within rope_original: Peng et al. 2023, section 3.2. */
static double pair_of_turns(const gpt_config *c, float theta, int64_t pairs, double turns) {
    return (double)pairs * log(c->rope_original / (turns * 2 * PI)) / log(theta);
}

/* How much of the i-th pair's frequency is kept: 0 to 1. The rest is divided by rope_factor. */
static double kept_share(const gpt_config *c, float theta, int64_t i, int64_t pairs) {
    double at = (double)i, slow, fast;
    switch (c->rope_scaling) {
    case GPT_ROPE_LINEAR:
        return 0;
    case GPT_ROPE_LLAMA3: /* by its turns */
        at = c->rope_original * pow(theta, -at / (double)pairs) / (2 * PI);
        slow = c->rope_low_freq;
        fast = c->rope_high_freq;
        break;
    case GPT_ROPE_YARN: /* by its index, which falls as turns rise */
        slow =
            fmin(ceil(pair_of_turns(c, theta, pairs, c->rope_low_freq)), 2.0 * (double)pairs - 1);
        fast = fmax(floor(pair_of_turns(c, theta, pairs, c->rope_high_freq)), 0);
        if (slow == fast) slow += 0.001;
        break;
    default:
        return 1;
    }
    return fmin(fmax((at - slow) / (fast - slow), 0), 1);
}

/* Radians a position of the i-th pair. */
static double rope_frequency(const gpt_config *c, float theta, int64_t i, int64_t pairs) {
    double frequency = pow(theta, -(double)i / (double)pairs);
    double kept = kept_share(c, theta, i, pairs);
    return kept < 1 ? (1 - kept) * frequency / c->rope_factor + kept * frequency : frequency;
}

int rope_sets(const gpt_config *c) {
    return c->rope_scaling == GPT_ROPE_LONGROPE ? 2 : 1;
}

static void fill_set(const gpt_config *c, const float *divisors, double *out) {
    int64_t pairs = rope_pairs(c);
    for (int l = 0, n = 0; l < c->n_layer; l++) {
        if (rope_index(c, l) != n) continue;
        for (int64_t i = 0; i < pairs; i++) {
            double frequency = rope_frequency(c, config_layer(c, l).rope_theta, i, pairs);
            out[n * pairs + i] = divisors ? frequency / divisors[i] : frequency;
        }
        n++;
    }
}

void rope_frequencies(const gpt_config *c, double *out) {
    int64_t pairs = rope_pairs(c), size = rope_table_count(c) * pairs;
    for (int set = 0; set < rope_sets(c); set++)
        fill_set(c, rope_sets(c) > 1 ? c->rope_divisors + set * pairs : NULL, out + set * size);
}

/* Those for tables of so many rows. */
static const double *frequencies_for(const gpt_model *m, int rows) {
    const gpt_config *c = &m->config;
    bool is_long = rope_sets(c) > 1 && rows > c->rope_original;
    return m->rope_frequencies + (is_long ? rope_table_count(c) * rope_pairs(c) : 0);
}

const float *rope_table(const gpt_model *m, const acts *a, int l) {
    int64_t n = (int64_t)a->rope_rows * rope_pairs(&m->config) * 2;
    return m->rope[l] < 0 ? NULL : a->rope + m->rope[l] * n;
}

/* Queries and keys are multiplied by it: Peng et al. 2023, section 3.4. */
static double rope_attention(const gpt_config *c) {
    if (c->rope_scaling == GPT_ROPE_LONGROPE) return c->rope_attention;
    if (c->rope_scaling != GPT_ROPE_YARN) return 1;
    return c->rope_attention > 0 ? c->rope_attention : 0.1 * log(c->rope_factor) + 1;
}

/* Rows first to end of one table, made on the host in strips of a few pairs. The base is multiplied by
 * growth^(pairs / (pairs - 1)): see GPT_ROPE_DYNAMIC. */
static void fill(const gpt_model *m, const double *frequencies, double growth, float *table,
                 int first, int end) {
    float strip[STRIP_FLOATS];
    int64_t pairs = rope_pairs(&m->config), at = first * pairs, i = 0;
    double length = rope_attention(&m->config);
    size_t n = 0;
    for (int t = first; t < end; i++) {
        if (i == pairs) i = 0, t++;
        if (t < end) {
            double angle = t * frequencies[i];
            if (growth > 1) angle *= pow(growth, -(double)i / (double)(pairs - 1));
            strip[n++] = (float)(length * cos(angle));
            strip[n++] = (float)(length * sin(angle));
        }
        if (n == STRIP_FLOATS || t == end) {
            m->ops->upload(m->ctx, table + 2 * at, strip, sizeof *strip * n);
            at += (int64_t)n / 2;
            n = 0;
        }
    }
}

/* Of GPT_ROPE_DYNAMIC, in sequences of this length; else 1. */
static double growth_at(const gpt_config *c, int length) {
    if (c->rope_scaling != GPT_ROPE_DYNAMIC || length <= c->rope_original) return 1;
    return (double)c->rope_factor * length / c->rope_original - ((double)c->rope_factor - 1);
}

/* At least doubled, so that a step of decoding seldom does this; but what has grown holds for this
 * call alone. */
void rope_reach(const gpt_model *m, acts *a, int first, int end, int length) {
    int64_t pairs = rope_pairs(&m->config), last = end;
    double growth = growth_at(&m->config, length);
    if (!a->rope || (growth == 1 && end <= a->rope_filled)) return;
    if (growth == 1) {
        first = a->rope_filled;
        if (last < 2 * (int64_t)first) last = 2 * (int64_t)first;
        if (last > a->rope_rows) last = a->rope_rows;
    }
    const double *frequencies = frequencies_for(m, a->rope_rows);
    for (int i = 0, n = rope_table_count(&m->config); i < n; i++)
        fill(m, frequencies + i * pairs, growth, a->rope + 2 * i * a->rope_rows * pairs, first,
             (int)last);
    if (growth == 1)
        a->rope_filled = (int)last;
    else if (a->rope_filled > first)
        a->rope_filled = first;
}
