/* kernel_bf16.h: c (+)= a b for bf16 operands as pack.h lays them out, float32 sums in registers.
 * One instruction does a pair of products where the level has AVX-512 BF16; elsewhere the pairs are
 * split into two float32 vectors first. */
#ifndef CPU_KERNEL_BF16_H
#define CPU_KERNEL_BF16_H

#include "pack.h"

/* a (rows, K): lda numbers from row to row. b: panels, `panel` numbers from one to the next. c: ldc
 * from row to row, whole panels wide. next: the panels that will be read after these, where they
 * come from memory and should be asked for meanwhile, else NULL. */
typedef struct kernel_operands {
    const bf16 *a, *b, *next;
    float *c;
    int64_t lda, panel, ldc;
    int K;
} kernel_operands;

enum {
    GROUP = 2,               /* panels that a call of kernel_product may span */
    VECTORS = PANEL / LANES, /* of one panel */
    BAND_PANELS = LANES == 16 ? 2 : 1,
    BAND = LANES == 16  ? 12
           : LANES == 8 ? 4
                        : 2, /* rows whose sums fit the registers */
    NEAR_ROWS = 3, /* rows of a that share a pointer: lda and 2 lda from it are addresses of one
                    * instruction, and a pointer for each row would not fit the registers */
};

#if defined(__AVX512BF16__)

typedef __m512bh pairs;

static inline pairs pairs_load(const bf16 *p) {
    return (pairs)_mm512_loadu_si512(p);
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

static inline pairs pairs_split(vu x) {
    return (pairs){(vf)(x << 16), (vf)(x & 0xffff0000u)};
}
static inline pairs pairs_load(const bf16 *p) {
    vu x;
    memcpy(&x, p, sizeof x);
    return pairs_split(x);
}
static inline pairs pairs_set(pair x) {
    return pairs_split(x - (vu){0});
}
static inline vf pairs_dot(vf sum, pairs a, pairs b) {
    sum += a.first * b.first;
    return sum + a.second * b.second;
}

#endif

/* One band: M rows by `panels` panels. Both are constants where this is inlined, and so is `ask`: so
 * many of the next panels are asked for. */
SPECIALIZED void kernel_band(const kernel_operands *o, int M, int panels, int add, int ask) {
    vf sum[BAND][BAND_PANELS * VECTORS];
    int n = panels * VECTORS;
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++) sum[m][v] = vf_set(0);
    }
    const bf16 *a[(BAND + NEAR_ROWS - 1) / NEAR_ROWS];
    int n_near = (M + NEAR_ROWS - 1) / NEAR_ROWS;
    int64_t lda = o->lda;
    for (int i = 0; i < n_near; i++) a[i] = o->a + i * NEAR_ROWS * lda;
    const bf16 *b = o->b, *next = ask ? o->next : o->b;
    for (int k = 0; k + 1 < o->K; k += PAIR, b += PANEL * PAIR, next += PANEL * PAIR) {
        pairs column[BAND_PANELS * VECTORS];
        UNROLL
        for (int v = 0; v < n; v++)
            column[v] = pairs_load(b + v / VECTORS * o->panel + v % VECTORS * LANES * PAIR);
        for (int v = 0; v < ask; v++) ask_for(next + v * o->panel);
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
    if (o->K % PAIR) { /* the last one has no partner */
        for (int m = 0; m < M; m++)
            for (int v = 0; v < n; v++)
                sum[m][v] =
                    pairs_dot(sum[m][v], pairs_set(o->a[m * o->lda + o->K - 1]),
                              pairs_load(b + v / VECTORS * o->panel + v % VECTORS * LANES * PAIR));
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        float *c = o->c + m * o->ldc;
        UNROLL
        for (int v = 0; v < n; v++) {
            if (add) sum[m][v] += vf_load(c + v * LANES);
            vf_store(c + v * LANES, sum[m][v]);
        }
    }
}

/* The rows of one group of panels: whole bands, then what is left in ever smaller ones. */
SPECIALIZED void kernel_bands(kernel_operands o, int rows, int panels, int add, int ask) {
    for (int left = rows, done; left > 0; left -= done) {
        if (left >= BAND && !(ask && left == 16)) /* twice 8 ask evenly */
            kernel_band(&o, done = BAND, panels, add, ask);
        else if (BAND > 8 && left >= 8)
            kernel_band(&o, done = 8, panels, add, ask);
        else if (BAND > 4 && left >= 4)
            kernel_band(&o, done = 4, panels, add, ask);
        else
            kernel_band(&o, done = 1, panels, add, ask);
        if (ask) o.next += o.panel;
        o.a += done * o.lda;
        o.c += done * o.ldc;
    }
}

/* c (rows, 16 panels) = a b, or c += a b, for 1 or 2 panels. */
static inline void kernel_vectors(kernel_operands o, int rows, int panels, int add) {
    if (BAND_PANELS == 2 && panels == 2) {
        if (!o.next)
            kernel_bands(o, rows, BAND_PANELS, add, 0);
        else if (rows <= BAND)
            kernel_bands(o, rows, BAND_PANELS, add, 2);
        else
            kernel_bands(o, rows, BAND_PANELS, add, 1);
        return;
    }
    for (; panels > 0; panels--, o.b += o.panel, o.c += PANEL) kernel_bands(o, rows, 1, add, 0);
}

#endif
