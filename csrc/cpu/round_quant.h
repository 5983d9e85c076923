/* round_quant.h: rows of activations, rounded to 15 bits, or 13, for the kernels of kernel_quant.h. */
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

/* True where many rows meet weights as bf16 numbers (pairs_quant.h). */
#if (defined(__AVX512BF16__) && !defined(CPU_AMX)) || defined(PLAIN_PAIRS)
enum { PAIRS = 1 };
#else
enum { PAIRS = 0 };
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

/* The same before weights of so many bits. Where PAIRS, a group's products, in units of the last bits of both, have a
 * sum below 2^24, which float32 holds: so it is exact as it is in integers. */
static inline int rounded_bits(int weight_bits) {
    return PAIRS && weight_bits == 8 ? ROUNDED_BITS - 2 : ROUNDED_BITS;
}

/* sum + x by the scales of a row's group, which is exact, and of columns, in the order of pairs. */
static inline vf add_scaled(vf sum, vf x, float of_row, vf of_columns) {
    return sum + x * of_row * of_columns;
}

/* A power of two, so that only numbers far smaller than the largest have bits to lose. 0 for groups
 * without a number that counts. */
static inline float group_scale(float largest, int rounded) {
    uint32_t bits, below = (uint32_t)(rounded - 1) << 23;
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

/* A group: whole numbers, and what they are multiples of. */
typedef struct rounded_group {
    vf whole[QUANT_GROUP / LANES];
    float scale;
} rounded_group;

/* One group of n numbers. One that is not finite makes the scale, and so all that the row gives, NaN. */
static inline rounded_group round_group(const bf16 *a, int n, int bits) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    rounded_group g;
    vf largest = {0};
    vi bad = {0};
    UNROLL
    for (int i = 0; i < QUANT_GROUP / LANES; i++) {
        int m = cpu_max(0, cpu_min(LANES, n - i * LANES));
        g.whole[i] = vf_get(a + i * LANES, m);
        largest = vf_max(largest, vf_max(g.whole[i], -g.whole[i]));
        bad |= not_finite(g.whole[i]);
    }
    g.scale = any_lane(bad) ? NAN : group_scale(vf_max_lane(largest), bits);
    float inverse = scale_inverse(g.scale);
    UNROLL
    for (int i = 0; i < QUANT_GROUP / LANES; i++) {
        vf scaled = inverse != 0 ? g.whole[i] * inverse : (vf){0};
        g.whole[i] = scaled + shift - shift;
    }
    return g;
}

static void put_group(rounded_rows *out, int row, int k, const bf16 *a, int n, int bits) {
    rounded_group g = round_group(a, n, bits);
    vi sum[2] = {{0}, {0}};
    UNROLL
    for (int i = 0; i < QUANT_GROUP / LANES; i++) {
        vi q = __builtin_convertvector(g.whole[i], vi);
        put_terms(out->q[row][k / QUANT_GROUP], i * LANES, q);
        sum[i * LANES / HALF_GROUP] += q;
    }
    int32_t both = 0;
    for (int half = 0; half < 2; half++) {
        int32_t total = vi_sum(sum[half]);
        out->sum[row][k / HALF_GROUP + half] = total;
        both += total;
    }
    out->scale[row][k / QUANT_GROUP] = g.scale;
    out->total[row][k / QUANT_GROUP] = g.scale * (float)both;
}

static void round_row(rounded_rows *out, int row, const bf16 *a, int K, int bits) {
    int k = 0;
    for (; k + QUANT_GROUP <= K; k += QUANT_GROUP) put_group(out, row, k, a + k, QUANT_GROUP, bits);
    if (k < K) put_group(out, row, k, a + k, K - k, bits);
}

#endif
