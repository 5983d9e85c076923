/* round_quant.h: rows of activations, rounded to 15 bits for the kernels of kernel_quant.h. */
#ifndef CPU_ROUND_QUANT_H
#define CPU_ROUND_QUANT_H

#include "quant.h"

#include <math.h>

/* A tile: its rows are rounded once, and its sums wait until all terms are in. */
enum { ROWS = 48, COLS = 256, TERMS = 4096, HALF_GROUP = QUANT_GROUP / 2 };
enum {
    BAND = LANES == 16  ? 8
           : LANES == 8 ? 4
                        : 2, /* rows whose sums of a group fit the registers */
    LEAST_BAND = LANES == 4 ? 2 : 4,
    BAND_PANELS = LANES == 16 ? 2 : 1,
#ifdef CPU_AMX
    EVEN_ROWS = 16, /* of a tile, so that few are left over */
#else
    EVEN_ROWS = BAND,
#endif
};

/* True where weights and activations meet as bytes (vpdpbusd, and AMX's tiles), not as 16-bit numbers. */
#if defined(__AVX512VNNI__) || defined(CPU_AMX)
enum { BYTES = 1 };
#else
enum { BYTES = 0 };
#endif

/* Rows of `a`, rounded by groups. Those of decoding and of prompts are rounded once for all tiles. */
typedef struct rounded_rows {
    /* 32 terms each. BYTES: the upper 8 bits of all, then the lower 8, q = 256 times the first + the second,
     * both signed. Else 16 bits by quads, terms 0, 2, 1 and 3 of each, as kernels pair them (quad_halves).
     * Rows whose distance is not a power of two are in different cache sets. */
    int32_t q[ROWS][TERMS / QUANT_GROUP + 1][2 * QUADS];
    float scale[ROWS][TERMS / QUANT_GROUP];
    int32_t sum[ROWS][TERMS / HALF_GROUP];  /* of q in each half of a group */
    float total[ROWS][TERMS / QUANT_GROUP]; /* of a group, times its scale */
} rounded_rows;

/* Bits of a group's largest number, without its sign: two planes of int8 hold them. */
enum { ROUNDED_BITS = 14 };

/* A power of two, so that only numbers far smaller than the largest have bits to lose. 0 for groups
 * without a number that counts. */
static inline float group_scale(float largest) {
    uint32_t bits, below = (ROUNDED_BITS - 1) << 23;
    memcpy(&bits, &largest, sizeof bits);
    bits &= 0x7f800000;
    bits = bits > below ? bits - below : 0;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

/* LANES terms of q from term i of a group on. */
static inline void put_terms(int32_t *to, int i, vi q) {
    if (BYTES) {
        vc upper = __builtin_convertvector((q + 128) >> 8, vc);
        vc lower = __builtin_convertvector(q, vc);
        memcpy((int8_t *)to + i, &upper, sizeof upper);
        memcpy((int8_t *)to + QUANT_GROUP + i, &lower, sizeof lower);
        return;
    }
    typedef uint64_t quads __attribute__((vector_size(LANES * sizeof(int16_t))));
    vh words = __builtin_convertvector(q, vh);
    quads x = (quads)words, ends = x & 0xffff00000000ffff;
    x = ends | (x & 0xffff0000) << 16 | (x >> 16 & 0xffff0000);
    memcpy((int16_t *)to + i, &x, sizeof x);
}

/* One group of n numbers. One that is not finite makes the scale, and so all that the row gives, NaN. */
static void round_group(rounded_rows *out, int row, int k, const bf16 *a, int n) {
    enum { N = QUANT_GROUP / LANES };
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf x[N], largest = {0};
    vi bad = {0};
    UNROLL
    for (int i = 0; i < N; i++) {
        int m = cpu_max(0, cpu_min(LANES, n - i * LANES));
        x[i] = vf_get(a + i * LANES, m);
        largest = vf_max(largest, vf_max(x[i], -x[i]));
        bad |= not_finite(x[i]);
    }
    float scale = any_lane(bad) ? NAN : group_scale(vf_max_lane(largest));
    float inverse = scale_inverse(scale);
    vi sum[2] = {{0}, {0}};
    UNROLL
    for (int i = 0; i < N; i++) {
        vf scaled = inverse != 0 ? x[i] * inverse : (vf){0};
        vi q = __builtin_convertvector(scaled + shift - shift, vi);
        put_terms(out->q[row][k / QUANT_GROUP], i * LANES, q);
        sum[i * LANES / HALF_GROUP] += q;
    }
    int32_t both = 0;
    for (int half = 0; half < 2; half++) {
        int32_t total = vi_sum(sum[half]);
        out->sum[row][k / HALF_GROUP + half] = total;
        both += total;
    }
    out->scale[row][k / QUANT_GROUP] = scale;
    out->total[row][k / QUANT_GROUP] = scale * (float)both;
}

static void round_row(rounded_rows *out, int row, const bf16 *a, int K) {
    int k = 0;
    for (; k + QUANT_GROUP <= K; k += QUANT_GROUP) round_group(out, row, k, a + k, QUANT_GROUP);
    if (k < K) round_group(out, row, k, a + k, K - k);
}

#endif
