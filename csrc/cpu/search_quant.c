/* search_quant.c: numbers rounded to blocks of Q4_K, with scales and minima that are searched for as ggml's
 * quantizer does (ggml/src/ggml-quants.c), with fewer candidates. A lane has a row, so that no sum depends on
 * LANES. */
#include "weights_quant.h"

#include <math.h>

enum { LEVELS = 15, SIXTHS = 63 };

/* From here on a float16 may be too small for a scale. */
static const float MOST = 0x1p20f;

/* Steps into which candidates divide a group's range, of which LEVELS are there. */
static const float candidates[] = {14.5f, 15, 15.5f};

/* Numbers of LANES rows. */
typedef struct group {
    vf x[QUANT_GROUP], w[QUANT_GROUP]; /* w: what an error costs, 0 past the end of a row */
    vf sum_w, sum_x, sum_xx;           /* of w, w x, w x x */
} group;

/* From term k on, of rows that are ld apart. */
static void take_group(group *g, const float *x, int64_t ld, int rows, int n) {
    vf squares = {0};
    *g = (group){0};
    for (int k = 0; k < n; k++) {
        for (int j = 0; j < rows; j++) g->x[k][j] = x[j * ld + k];
        squares += g->x[k] * g->x[k];
    }
    vf mean = vf_sqrt(squares / (float)n);
    for (int k = 0; k < n; k++) {
        g->w[k] = vf_max(g->x[k], -g->x[k]) + mean;
        vf wx = g->w[k] * g->x[k];
        g->sum_w += g->w[k], g->sum_x += wx, g->sum_xx += wx * g->x[k];
    }
}

static vf inverse_of(vf x) {
    return vf_select((x >= FLT_MIN) & (x <= FLT_MAX), 1.0f / x, (vf){0});
}

static vf to_integer(vf x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    return x + shift - shift;
}

/* x in steps from low on: 0 to LEVELS. */
static vf steps_of(vf x, vf low, vf per_step) {
    vf steps = to_integer((x - low) * per_step);
    return vf_max(-vf_max(-steps, vf_set(-LEVELS)), vf_set(0));
}

/* A scale, and a minimum of at most 0, with little error: each candidate's by least squares. */
static void search(const group *g, vf *scale, vf *least) {
    vf high = {0}, low = {0}, best = vf_set(INFINITY);
    for (int k = 0; k < QUANT_GROUP; k++)
        high = vf_max(high, g->x[k]), low = -vf_max(-low, -g->x[k]);
    *scale = (high - low) / LEVELS, *least = low;
    for (size_t c = 0; c < sizeof candidates / sizeof *candidates; c++) {
        vf per_step = candidates[c] * inverse_of(high - *least);
        vf L = {0}, LL = {0}, XL = {0};
        for (int k = 0; k < QUANT_GROUP; k++) {
            vf l = steps_of(g->x[k], *least, per_step), wl = g->w[k] * l;
            L += wl, LL += wl * l, XL += wl * g->x[k];
        }
        vf determinant = g->sum_w * LL - L * L; /* 0: one number */
        vf unit = (g->sum_w * XL - g->sum_x * L) / determinant;
        vf min = (LL * g->sum_x - L * XL) / determinant;
        vi above = min > 0;
        unit = vf_select(above, XL / LL, unit), min = vf_select(above, (vf){0}, min);
        vf error = g->sum_xx + unit * (unit * LL - 2 * XL) +
                   min * (min * g->sum_w + 2 * unit * L - 2 * g->sum_x);
        vi better = (determinant > 0) & (error < best);
        best = vf_select(better, error, best);
        *scale = vf_select(better, unit, *scale), *least = vf_select(better, min, *least);
    }
}

/* Values >= 0 of groups become integers of 6 bits; the result is what multiplies them: float16. */
static vf six_bits(vf *values, int groups) {
    vf largest = {0};
    for (int g = 0; g < groups; g++) largest = vf_max(largest, values[g]);
    vf inverse = SIXTHS * inverse_of(largest), unit = largest / SIXTHS;
    for (int g = 0; g < groups; g++) values[g] = to_integer(values[g] * inverse);
    for (int j = 0; j < LANES; j++) unit[j] = half_float(half_of(unit[j]));
    return unit;
}

/* Lanes with a number that has no scale. */
static vi without_scale(const group *g) {
    vi bad = {0};
    for (int k = 0; k < QUANT_GROUP; k++)
        bad |= not_finite(g->x[k]) | (vf_max(g->x[k], -g->x[k]) >= MOST);
    return bad;
}

static void search_rows(block_parts *out, const float *x, int64_t ld, int rows, int n) {
    group groups[QUANT_BLOCK / QUANT_GROUP];
    vf scale[QUANT_BLOCK / QUANT_GROUP], least[QUANT_BLOCK / QUANT_GROUP];
    int n_groups = cpu_div_up(n, QUANT_GROUP);
    vi bad = {0};
    for (int g = 0; g < n_groups; g++) {
        int k = g * QUANT_GROUP;
        take_group(&groups[g], x + k, ld, rows, cpu_min(QUANT_GROUP, n - k));
        bad |= without_scale(&groups[g]);
        search(&groups[g], &scale[g], &least[g]);
        least[g] = -least[g];
    }
    vf d = six_bits(scale, n_groups), d_least = six_bits(least, n_groups);
    for (int g = 0; g < n_groups; g++) {
        vf low = -d_least * least[g], per_step = inverse_of(d * scale[g]);
        for (int k = 0; k < QUANT_GROUP; k++) {
            vf steps = steps_of(groups[g].x[k], low, per_step);
            for (int j = 0; j < rows; j++) out[j].u[g * QUANT_GROUP + k] = (uint8_t)steps[j];
        }
        for (int j = 0; j < rows; j++)
            out[j].scale[g] = (int8_t)scale[g][j], out[j].least[g] = (int8_t)least[g][j];
    }
    for (int j = 0; j < rows; j++) {
        out[j].d = half_of(d[j]), out[j].d_least = half_of(d_least[j]) ^ 0x8000;
        if (!bad[j]) continue; /* else not a number, as all sums with this block are */
        out[j] = (block_parts){.d = 0x7e00};
        out[j].scale[0] = 1;
    }
}

void quant_search_blocks(block_parts *out, const float *x, int64_t ld, int rows, int n) {
    for (int j = 0; j < rows; j += LANES)
        search_rows(out + j, x + j * ld, ld, cpu_min(LANES, rows - j), n);
}
