/* kernel_bf16.h: c (+)= a b for bf16 operands as pack.h lays them out, float32 sums in registers.
 * One instruction does a pair of products where the level has AVX-512 BF16; elsewhere the pairs are
 * split into two float32 vectors first. With AVX2 that costs more than the products themselves, so
 * operands of several rows are widened to float32 once for all of them. */
#ifndef CPU_KERNEL_BF16_H
#define CPU_KERNEL_BF16_H

#include "kernel.h"

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
        for (int v = 0; v < n; v++)
            sum[m][v] = WIDENS && add ? vf_load(o->c + m * o->ldc + v * LANES) : vf_set(0);
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
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int v = 0; v < n; v++)
                sum[m][v] =
                    pairs_dot(sum[m][v], pairs_set(o->a[m * o->lda + o->K - 1]),
                              pairs_load(b + v / VECTORS * o->panel + v % VECTORS * LANES * PAIR));
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        float *c = o->c + m * o->ldc;
        UNROLL
        for (int v = 0; v < n; v++) {
            if (add && !WIDENS) sum[m][v] += vf_load(c + v * LANES);
            vf_store(c + v * LANES, sum[m][v]);
        }
    }
}

/* A band of n rows is a function, or the registers for addresses would not suffice. */
#define KERNEL_BAND_OF(n)                                                                          \
    __attribute__((noinline)) static void kernel_band_##n(const kernel_operands *o, int panels,    \
                                                          int add, int ask) {                      \
        if (n > BAND) return;                                                                      \
        if (panels < BAND_PANELS)                                                                  \
            kernel_band(o, n, 1, add, 0);                                                          \
        else if (ask == 0)                                                                         \
            kernel_band(o, n, BAND_PANELS, add, 0);                                                \
        else if (ask == 1)                                                                         \
            kernel_band(o, n, BAND_PANELS, add, 1);                                                \
        else                                                                                       \
            kernel_band(o, n, BAND_PANELS, add, BAND_PANELS);                                      \
    }
KERNEL_BAND_OF(1)
KERNEL_BAND_OF(2)
KERNEL_BAND_OF(3)
KERNEL_BAND_OF(4)
KERNEL_BAND_OF(5)
KERNEL_BAND_OF(6)
KERNEL_BAND_OF(7)
KERNEL_BAND_OF(8)
KERNEL_BAND_OF(9)
KERNEL_BAND_OF(10)
KERNEL_BAND_OF(11)
KERNEL_BAND_OF(12)

typedef void kernel_band_fn(const kernel_operands *o, int panels, int add, int ask);
static kernel_band_fn *const kernel_band_of[] = {
    NULL,           kernel_band_1,  kernel_band_2,  kernel_band_3, kernel_band_4,
    kernel_band_5,  kernel_band_6,  kernel_band_7,  kernel_band_8, kernel_band_9,
    kernel_band_10, kernel_band_11, kernel_band_12,
};

/* The rows of one group of panels, in as few bands as can be, of about the same size: few sums are done no
 * sooner than more of them, for each has to wait for the one before it. */
static inline void kernel_bands(kernel_operands o, int rows, int panels, int add, int ask) {
    for (int n_bands = (rows + BAND - 1) / BAND, done; n_bands > 0; n_bands--, rows -= done) {
        done = (rows + n_bands - 1) / n_bands;
        kernel_band_of[done](&o, panels, add, ask);
        if (ask) o.next += o.panel;
        o.a += done * o.lda;
        o.c += done * o.ldc;
    }
}

/* ---- operands widened to float32 ---- */

/* One band of M rows. With `ask`, lines from `next` on are asked for, `step` numbers further with each term. */
SPECIALIZED void wide_band(const float *a, const float *b, float *c, int64_t ldc, int K, int M,
                           int add, int ask, const bf16 *next, int step) {
    vf sum[WIDE_BAND][VECTORS];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            sum[m][v] = add ? vf_load(c + m * ldc + v * LANES) : vf_set(0);
    }
    for (int k = 0; k < K; k++, a++, b += PANEL) {
        if (ask) ask_for(next);
        next += ask ? step : 0;
        vf column[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; v++) column[v] = vf_load(b + v * LANES);
        UNROLL
        for (int m = 0; m < M; m++) {
            vf row = vf_set(a[m * WIDE_STRIDE]);
            UNROLL
            for (int v = 0; v < VECTORS; v++) sum[m][v] += row * column[v];
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++) vf_store(c + m * ldc + v * LANES, sum[m][v]);
    }
}

/* next: the numbers of b that are widened after these, which the bands ask for evenly; or NULL. */
SPECIALIZED void wide_bands(const wide_operands *w, float *c, int64_t ldc, int rows, int K, int add,
                            int ask, const bf16 *next) {
    int n_bands = (rows + WIDE_BAND - 1) / WIDE_BAND, step = PANEL / n_bands;
    for (int row = 0, M; n_bands > 0; n_bands--, row += M, next += ask ? step * K : 0) {
        M = (rows - row + n_bands - 1) / n_bands;
        const float *a = w->a[row], *b = w->b[0];
        float *to = c + row * ldc;
        if (M == 6)
            wide_band(a, b, to, ldc, K, 6, add, ask, next, step);
        else if (M == 5)
            wide_band(a, b, to, ldc, K, 5, add, ask, next, step);
        else if (M == 4)
            wide_band(a, b, to, ldc, K, 4, add, ask, next, step);
        else /* of 7 rows */
            wide_band(a, b, to, ldc, K, 3, add, ask, next, step);
    }
}

/* b's terms 0 to K - 1 of a panel, of which pairs are whole. */
static inline void widen_panel(float b[][PANEL], const bf16 *panel, int K) {
    for (int k = 0; k < K; k += PAIR, panel += PANEL * PAIR) {
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            vu x;
            memcpy(&x, panel + v * LANES * PAIR, sizeof x);
            vf_store(b[k] + v * LANES, (vf)(x << 16));
            vf_store(b[k + 1] + v * LANES, (vf)(x & 0xffff0000u));
        }
    }
}

/* Terms are taken in order, as by kernel_band, so that a row's sums do not depend on the number of rows. */
__attribute__((noinline)) static void kernel_widened(const kernel_operands *o, int rows, int panels,
                                                     int add) {
    wide_operands *w = o->wide;
    for (int row = 0; row < rows; row += WIDE_ROWS)
        for (int k = 0; k < o->K; k += WIDE_TERMS) {
            int terms = cpu_min(WIDE_TERMS, o->K - k), n_rows = cpu_min(WIDE_ROWS, rows - row);
            for (int r = 0; r < n_rows; r++) {
                const bf16 *a = o->a + (row + r) * o->lda + k;
                FOR_LANES (i, n, terms) vf_put(w->a[r] + i, vf_get(a + i, n), n);
            }
            for (int i = 0; i < panels; i++) {
                float *c = o->c + row * o->ldc + i * PANEL;
                const bf16 *b = o->b + i * o->panel + (int64_t)k * PANEL, *next = o->next;
                if (i + 1 < panels)
                    next = b + o->panel;
                else if (k + WIDE_TERMS < o->K)
                    next = o->b + (int64_t)(k + WIDE_TERMS) * PANEL;
                widen_panel(w->b, b, terms);
                if (o->next)
                    wide_bands(w, c, o->ldc, n_rows, terms, add || k > 0, 1, next);
                else
                    wide_bands(w, c, o->ldc, n_rows, terms, add || k > 0, 0, NULL);
            }
        }
}

/* c (rows, 16 panels) = a b, or c += a b, for up to GROUP panels. */
static inline void kernel_vectors(kernel_operands o, int rows, int panels, int add) {
    if (WIDENS && rows >= LEAST_WIDE) {
        kernel_widened(&o, rows, panels, add);
        return;
    }
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
