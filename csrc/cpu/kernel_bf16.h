/* kernel_bf16.h: c (+)= a b for bf16 operands as pack.h lays them out, float32 sums in registers.
 * One instruction does a pair of products where the level has AVX-512 BF16; elsewhere the pairs are
 * split into two float32 vectors first. With AVX2 rows are widened to float32 once for many panels, and the
 * panels are split by each band of rows. */
#ifndef CPU_KERNEL_BF16_H
#define CPU_KERNEL_BF16_H

#include "kernel.h"
#include "pairs_bf16.h"

enum {
    BAND = LANES == 16 ? 12 : 2, /* rows whose sums fit the registers */
    WIDE_BAND =
        6, /* the same of widened rows, with a panel's two vectors and one number, in 16 registers */
};

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
    const bf16 *b = o->b + o->K / PAIR * PAIR * PANEL;
    add_pairs(sum, o->a, o->lda, o->b, o->panel, o->next, o->K / PAIR, M, panels, ask);
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
    int streamed = o->streamed;
    UNROLL
    for (int m = 0; m < M; m++) {
        float *c = o->c + m * o->ldc;
        UNROLL
        for (int v = 0; v < n; v++) {
            if (add) sum[m][v] += vf_load(c + v * LANES);
            if (streamed)
                vf_stream(c + v * LANES, sum[m][v]);
            else
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

/* ---- rows widened to float32 ---- */

/* A compiler keeps both halves of a panel's vectors at once, and then has no registers for the sums. So it is told
 * by which instructions they are split, from where they are in memory. */
#if defined(__AVX2__) && !defined(__AVX512F__)
typedef bf16 column_pairs[LANES * PAIR];
static inline vf first_of_pairs(const bf16 *b) {
    vf x;
    __asm__("vmovdqu %1, %0\n\tvpslld $16, %0, %0" : "=x"(x) : "m"(*(const column_pairs *)b));
    return x;
}
static inline vf second_of_pairs(const bf16 *b) {
    vf x;
    __asm__("vpxor %0, %0, %0\n\tvpblendw $0xaa, %1, %0, %0"
            : "=x"(x)
            : "m"(*(const column_pairs *)b));
    return x;
}
#else
static inline vf first_of_pairs(const bf16 *b) {
    vu x;
    memcpy(&x, b, sizeof x);
    return (vf)(x << 16);
}
static inline vf second_of_pairs(const bf16 *b) {
    vu x;
    memcpy(&x, b, sizeof x);
    return (vf)(x & 0xffff0000u);
}
#endif

/* A band: rows widened to float32, WIDE_STRIDE numbers apart, by K terms of a panel. next: lines that are asked
 * for, `step` numbers further with each pair; or NULL. */
typedef struct wide_place {
    const float *a;
    const bf16 *b, *next;
    float *c;
    int64_t ldc, step;
    int K, add;
} wide_place;

SPECIALIZED void wide_band(const wide_place *p, int M, int ask) {
    vf sum[WIDE_BAND][VECTORS];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            sum[m][v] = p->add ? vf_load(p->c + m * p->ldc + v * LANES) : vf_set(0);
    }
    const float *a = p->a;
    const bf16 *b = p->b, *next = p->next;
    int64_t step = p->step;
    for (int k = 0; k < p->K; k += PAIR, a += PAIR, b += PANEL * PAIR) {
        if (ask) ask_for(next);
        next += ask ? step : 0;
        UNROLL
        for (int half = 0; half < PAIR; half++) {
            vf column[VECTORS];
            UNROLL
            for (int v = 0; v < VECTORS; v++) {
                const bf16 *at = b + v * LANES * PAIR;
                column[v] = half == 0 ? first_of_pairs(at) : second_of_pairs(at);
            }
            UNROLL
            for (int m = 0; m < M; m++) {
                vf row = vf_set(a[m * WIDE_STRIDE + half]);
                UNROLL
                for (int v = 0; v < VECTORS; v++) vf_add_product(&sum[m][v], row, column[v]);
            }
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++) vf_store(p->c + m * p->ldc + v * LANES, sum[m][v]);
    }
}

#define WIDE_BAND_OF(n)                                                                            \
    __attribute__((noinline)) static void wide_band_##n(const wide_place *p) {                     \
        if (p->next)                                                                               \
            wide_band(p, n, 1);                                                                    \
        else                                                                                       \
            wide_band(p, n, 0);                                                                    \
    }
WIDE_BAND_OF(1)
WIDE_BAND_OF(2)
WIDE_BAND_OF(3)
WIDE_BAND_OF(4)
WIDE_BAND_OF(5)
WIDE_BAND_OF(6)

typedef void wide_band_fn(const wide_place *p);
static wide_band_fn *const wide_band_of[] = {NULL,        wide_band_1, wide_band_2, wide_band_3,
                                             wide_band_4, wide_band_5, wide_band_6};

/* Rows of one panel, in as few bands as can be, of about the same size, which ask for `next` evenly. */
static inline void wide_bands(wide_place p, int rows) {
    int n_bands = (rows + WIDE_BAND - 1) / WIDE_BAND;
    p.step = PANEL * PAIR / n_bands;
    for (int M; n_bands > 0; n_bands--, rows -= M) {
        M = (rows + n_bands - 1) / n_bands;
        wide_band_of[M](&p);
        p.a += M * WIDE_STRIDE;
        p.c += M * p.ldc;
        if (p.next) p.next += p.step * (p.K / PAIR);
    }
}

/* Whole pairs of terms of rows from a on, in float32. */
static inline void widen_rows(wide_operands *w, const bf16 *a, int64_t lda, int rows, int K) {
    for (int r = 0; r < rows; r++, a += lda) {
        FOR_LANES (k, n, K) vf_put(w->a[r] + k, vf_get(a + k, n), n);
        if (K % PAIR) w->a[r][K] = 0;
    }
}

/* Rows and terms are taken in parts of about the same size, terms in order: a row's sums do not depend on the
 * number of rows. */
__attribute__((noinline)) static void kernel_widened(const kernel_operands *o, int rows, int panels,
                                                     int add) {
    int n_parts = (int)cpu_div_up(rows, WIDE_ROWS), done;
    int most = (int)cpu_round_up(cpu_div_up(o->K, cpu_div_up(o->K, WIDE_TERMS)), PAIR);
    for (int row = 0; row < rows; row += done, n_parts--) {
        done = (int)cpu_div_up(rows - row, n_parts);
        for (int k = 0; k < o->K; k += most) {
            wide_place p = {.a = o->wide->a[0], .ldc = o->ldc, .add = add || k > 0};
            p.K = cpu_min(most, o->K - k);
            widen_rows(o->wide, o->a + row * o->lda + k, o->lda, done, p.K);
            for (int i = 0; i < panels; i++) {
                p.c = o->c + row * o->ldc + i * PANEL;
                p.b = o->b + i * o->panel + (int64_t)k * PANEL;
                p.next = o->next;
                if (p.next && i + 1 < panels)
                    p.next = p.b + o->panel;
                else if (p.next && k + most < o->K)
                    p.next = o->b + (int64_t)(k + most) * PANEL;
                wide_bands(p, done);
            }
        }
    }
}

/* c (rows, 16 panels) = a b, or c += a b, for up to GROUP panels. */
static inline void kernel_vectors(kernel_operands o, int rows, int panels, int add) {
    if (WIDENS) {
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
