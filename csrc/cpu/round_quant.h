/* round_quant.h: rows of activations, rounded to 8 bits for the kernels of kernel_quant.h. */
#ifndef CPU_ROUND_QUANT_H
#define CPU_ROUND_QUANT_H

#include "quant.h"

#include <math.h>

/* A tile: its rows are rounded once, and its sums wait until all terms are in. */
enum { ROWS = 48, COLS = 256, TERMS = 4096, HALF_GROUP = QUANT_GROUP / 2 };
enum {
    BAND = LANES >= 8 ? 4 : 1, /* rows whose sums fit the registers */
    BAND_PANELS = LANES == 16 ? 2 : 1,
#ifdef CPU_AMX
    EVEN_ROWS = 16, /* of a tile, so that few are left over */
#else
    EVEN_ROWS = BAND,
#endif
};

/* Rows of `a`, rounded by groups. Those of decoding and of prompts are rounded once for all tiles. */
typedef struct rounded_rows {
    /* Rows whose distance is not a power of two are in different cache sets. */
    int8_t q[ROWS][TERMS + 64];
    float scale[ROWS][TERMS / QUANT_GROUP];
    int16_t sum[ROWS][TERMS / HALF_GROUP];  /* of q in each half of a group */
    float total[ROWS][TERMS / QUANT_GROUP]; /* of a group, times its scale */
    int16_t apart[ROWS]; /* the term that is multiplied as it is, and 0 in q; -1: there is none */
    float apart_x[ROWS];
} rounded_rows;

/* One group of n numbers. One that is not finite makes the scale, and so all that the row gives, NaN. */
static void round_group(rounded_rows *out, int row, int k, const bf16 *a, int n) {
    enum { N = QUANT_GROUP / LANES };
    vf x[N], biggest = {0};
    vi bad = {0};
    UNROLL
    for (int i = 0; i < N; i++) {
        int m = cpu_max(0, cpu_min(LANES, n - i * LANES));
        x[i] = vf_get(a + i * LANES, m);
        biggest = vf_max(biggest, vf_max(x[i], -x[i]));
        bad |= not_finite(x[i]);
    }
    float scale = any_lane(bad) ? NAN : vf_max_lane(biggest) / 127;
    float inverse = scale_inverse(scale);
    vi sum[2] = {{0}, {0}};
    UNROLL
    for (int i = 0; i < N; i++) {
        vf scaled = inverse != 0 ? x[i] * inverse : (vf){0};
        vi q = __builtin_convertvector(scaled + vf_select(scaled < 0, vf_set(-0.5f), vf_set(0.5f)),
                                       vi);
        vc bytes = __builtin_convertvector(q, vc);
        memcpy(&out->q[row][k + i * LANES], &bytes, sizeof bytes);
        sum[i * LANES / HALF_GROUP] += q;
    }
    int32_t both = 0;
    for (int half = 0; half < 2; half++) {
        int32_t total = 0;
        for (int i = 0; i < LANES; i++) total += sum[half][i];
        out->sum[row][k / HALF_GROUP + half] = (int16_t)total;
        both += total;
    }
    out->scale[row][k / QUANT_GROUP] = scale;
    out->total[row][k / QUANT_GROUP] = scale * (float)both;
}

/* The error of a group's rounding is as its scale, which one large number makes large: models have channels
 * that are far larger than all others (Dettmers et al. 2022, LLM.int8()). Without the largest
 * number of the row's largest group, squared scales add up to less: by a quarter, or it stays. */
static void set_apart(rounded_rows *out, int row, const bf16 *a, int K) {
    const float least_gain = 0.25f;
    float *scale = out->scale[row];
    vf squares = {0}, biggest = {0};
    FOR_LANES (g, k, (int)quant_groups(K)) {
        vf x = vf_get(scale + g, k);
        squares += x * x;
        biggest = vf_max(biggest, x);
    }
    float most = vf_max_lane(biggest), needed = least_gain * vf_sum(squares);
    out->apart[row] = -1;
    if (!(most * most > needed)) return; /* or one of them is a NaN */
    int g = 0;
    while (scale[g] != most) g++;
    bf16 x[QUANT_GROUP] = {0};
    int n = cpu_min(QUANT_GROUP, K - g * QUANT_GROUP), at = 0, first = 0, second = 0;
    memcpy(x, a + g * QUANT_GROUP, sizeof *x * (size_t)n);
    for (int k = 0; k < n; k++) {
        int size = x[k] & 0x7fff; /* ordered as the numbers are */
        if (size > first)
            second = first, first = size, at = k;
        else if (size > second)
            second = size;
    }
    float rest = bf16_float((bf16)second) / 127;
    if (!(most * most - rest * rest > needed)) return;
    out->apart[row] = (int16_t)(g * QUANT_GROUP + at);
    out->apart_x[row] = bf16_float(x[at]);
    x[at] = 0;
    round_group(out, row, g * QUANT_GROUP, x, n);
}

static void round_row(rounded_rows *out, int row, const bf16 *a, int K) {
    int k = 0;
    for (; k + QUANT_GROUP <= K; k += QUANT_GROUP) round_group(out, row, k, a + k, QUANT_GROUP);
    if (k < K) round_group(out, row, k, a + k, K - k);
    set_apart(out, row, a, K);
}

#endif
