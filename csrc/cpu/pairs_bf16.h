/* pairs_bf16.h: products of pairs of bf16 numbers, with float32 sums. */
#ifndef CPU_PAIRS_BF16_H
#define CPU_PAIRS_BF16_H

#include "pack.h"

enum {
    VECTORS = PANEL / LANES, /* of one panel */
    BAND_PANELS = LANES == 16 ? 2 : 1,
    NEAR_ROWS = 3, /* rows of a that share a pointer: lda and 2 lda from it are addresses of one
                    * instruction, and a pointer for each row would not fit the registers */
};

#if defined(__AVX512BF16__)

typedef __m512bh pairs;

static inline pairs pairs_of(vu x) {
    return (pairs)x;
}
static inline pairs pairs_set(pair x) {
    return (pairs)_mm512_set1_epi32((int)x);
}
static inline vf pairs_dot(vf sum, pairs a, pairs b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, a, b);
}

#else

typedef struct pairs {
    vf first, second;
} pairs;

static inline pairs pairs_of(vu x) {
    return (pairs){(vf)(x << 16), (vf)(x & 0xffff0000u)};
}
static inline pairs pairs_set(pair x) {
    return pairs_of(x - (vu){0});
}
static inline vf pairs_dot(vf sum, pairs a, pairs b) {
    sum += a.first * b.first;
    return sum + a.second * b.second;
}

#endif

static inline pairs pairs_load(const bf16 *p) {
    vu x;
    memcpy(&x, p, sizeof x);
    return pairs_of(x);
}

/* sum (M rows, the vectors of `panels`) += so many pairs of terms of a, lda numbers from row to row, and b, whose
 * panels are `panel` apart. As many panels are asked for as `ask` says, from next on. */
SPECIALIZED void add_pairs(vf (*sum)[BAND_PANELS * VECTORS], const bf16 *rows, int64_t lda,
                           const bf16 *b, int64_t panel, const bf16 *next, int n_pairs, int M,
                           int panels, int ask) {
    enum { MOST_NEAR = 4 };
    const bf16 *a[MOST_NEAR];
    int n_near = (M + NEAR_ROWS - 1) / NEAR_ROWS, n = panels * VECTORS;
    for (int i = 0; i < n_near; i++) a[i] = rows + i * NEAR_ROWS * lda;
    if (!ask) next = b;
    for (int k = 0; k < n_pairs; k++, b += PANEL * PAIR, next += PANEL * PAIR) {
        pairs column[BAND_PANELS * VECTORS];
        UNROLL
        for (int v = 0; v < n; v++)
            column[v] = pairs_load(b + v / VECTORS * panel + v % VECTORS * LANES * PAIR);
        for (int v = 0; v < ask; v++) ask_for(next + v * panel);
        UNROLL
        for (int m = 0; m < M; m++) {
            pair x;
            memcpy(&x, a[m / NEAR_ROWS] + m % NEAR_ROWS * lda, sizeof x);
            pairs row = pairs_set(x);
            UNROLL
            for (int v = 0; v < n; v++) sum[m][v] = pairs_dot(sum[m][v], row, column[v]);
        }
        UNROLL
        for (int i = 0; i < n_near; i++) a[i] += PAIR;
    }
}

#endif
