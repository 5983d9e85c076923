/* search_quant.c: numbers rounded to 4 bits in blocks of 256, with scales and minima that are searched
 * for as ggml's quantizer does (ggml/src/ggml-quants.c), with fewer candidates. */
#include "weights_quant.h"

#include <math.h>

enum { LEVELS = 15, SIXTHS = 63, GROUPS = QUANT_BLOCK / QUANT_GROUP, N = QUANT_GROUP / LANES };

/* From here on a float16 may be too small for a scale. */
static const float MOST = 0x1p20f;

/* Steps into which candidates divide a group's range, of which LEVELS are there. */
static const float candidates[] = {14.5f, 15, 15.5f};

/* A group's numbers, with what an error of each costs. */
typedef struct group {
    vf x[N], w[N];
    float sum_w, sum_x, sum_xx; /* of w, w x, w x x */
} group;

static group take_group(const float *x) {
    group g;
    vf squares = {0}, sum_w = {0}, sum_x = {0}, sum_xx = {0};
    for (int i = 0; i < N; i++) {
        g.x[i] = vf_load(x + i * LANES);
        squares += g.x[i] * g.x[i];
    }
    float mean = sqrtf(vf_sum(squares) / QUANT_GROUP);
    for (int i = 0; i < N; i++) {
        g.w[i] = vf_max(g.x[i], -g.x[i]) + mean;
        sum_w += g.w[i], sum_x += g.w[i] * g.x[i], sum_xx += g.w[i] * g.x[i] * g.x[i];
    }
    g.sum_w = vf_sum(sum_w), g.sum_x = vf_sum(sum_x), g.sum_xx = vf_sum(sum_xx);
    return g;
}

/* x in steps from low on: 0 to LEVELS. */
static inline vf steps_of(vf x, float low, float per_step) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf steps = (x - low) * per_step + shift - shift;
    return vf_max(-vf_max(-steps, vf_set(-LEVELS)), vf_set(0));
}

/* A scale, and a minimum of at most 0, with little error: each candidate's by least squares. */
static void search(const group *g, float *scale, float *least) {
    vf above = {0}, below = {0};
    for (int i = 0; i < N; i++) above = vf_max(above, g->x[i]), below = vf_max(below, -g->x[i]);
    float high = vf_max_lane(above), low = -vf_max_lane(below), best = INFINITY;
    *scale = (high - low) / LEVELS, *least = low;
    for (size_t c = 0; c < sizeof candidates / sizeof *candidates; c++) {
        float per_step = candidates[c] * scale_inverse(high - *least);
        vf sum_l = {0}, sum_ll = {0}, sum_xl = {0};
        for (int i = 0; i < N; i++) {
            vf l = steps_of(g->x[i], *least, per_step), wl = g->w[i] * l;
            sum_l += wl, sum_ll += wl * l, sum_xl += wl * g->x[i];
        }
        float L = vf_sum(sum_l), LL = vf_sum(sum_ll), XL = vf_sum(sum_xl);
        float determinant = g->sum_w * LL - L * L;
        if (!(determinant > 0)) continue; /* one number */
        float unit = (g->sum_w * XL - g->sum_x * L) / determinant;
        float min = (LL * g->sum_x - L * XL) / determinant;
        if (min > 0) min = 0, unit = XL / LL;
        float error = g->sum_xx + unit * (unit * LL - 2 * XL) +
                      min * (min * g->sum_w + 2 * unit * L - 2 * g->sum_x);
        if (error < best) best = error, *scale = unit, *least = min;
    }
}

/* The nearest float16 of x >= 0; infinity from 65520 on. */
static uint16_t half_of(float x) {
    const float least = 0x1p-14f; /* of those with all bits */
    uint32_t bits;
    if (x < least) return (uint16_t)lrintf(x * 0x1p24f);
    memcpy(&bits, &x, sizeof bits);
    if (!(x < 65520)) return 0x7c00;
    return (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

/* Integers of 6 bits for values >= 0, and the float16 that multiplies them. */
static uint16_t six_bits(int8_t *out, const float *values) {
    float largest = 0;
    for (int g = 0; g < GROUPS; g++) largest = values[g] > largest ? values[g] : largest;
    float inverse = SIXTHS * scale_inverse(largest);
    for (int g = 0; g < GROUPS; g++) out[g] = (int8_t)lrintf(values[g] * inverse);
    return half_of(largest / SIXTHS);
}

void quant_search_block(block_parts *out, const float *x) {
    float scale[GROUPS], least[GROUPS];
    vi bad = {0};
    for (int k = 0; k < QUANT_BLOCK; k += LANES) {
        vf size = vf_max(vf_load(x + k), -vf_load(x + k));
        bad |= not_finite(vf_load(x + k)) | (size >= MOST);
    }
    if (any_lane(bad)) { /* not a number, as all sums with this block are */
        out->d = 0x7e00;
        out->scale[0] = 1;
        return;
    }
    for (int g = 0; g < GROUPS; g++) {
        group numbers = take_group(x + g * QUANT_GROUP);
        search(&numbers, &scale[g], &least[g]);
        least[g] = -least[g];
    }
    out->d = six_bits(out->scale, scale);
    out->d_least = six_bits(out->least, least) ^ 0x8000;
    for (int g = 0; g < GROUPS; g++) {
        float unit = half_float(out->d) * (float)out->scale[g];
        float low = half_float(out->d_least) * (float)out->least[g];
        for (int k = g * QUANT_GROUP; k < (g + 1) * QUANT_GROUP; k += LANES) {
            vf steps = steps_of(vf_load(x + k), low, scale_inverse(unit));
            for (int i = 0; i < LANES; i++) out->u[k + i] = (uint8_t)steps[i];
        }
    }
}
