/* kernel_bf16.h: c (+)= a b for bf16 operands as pack.h lays them out, float32 sums in registers.
 * One instruction does a pair of products where the level has AVX-512 BF16; elsewhere the pairs are
 * split into two float32 vectors first. With AVX2 that costs more than the products themselves, so
 * operands of several rows are widened to float32 once for all of them. */
#ifndef CPU_KERNEL_BF16_H
#define CPU_KERNEL_BF16_H

#include "pack.h"

enum {
    WIDENS = LANES == 8,
    GROUP = WIDENS ? 16 : 2, /* panels that a call of kernel_product may span */
    VECTORS = PANEL / LANES, /* of one panel */
    BAND_PANELS = LANES == 16 ? 2 : 1,
    BAND = LANES == 16  ? 12
           : LANES == 8 ? 4
                        : 2, /* rows whose sums fit the registers */
    NEAR_ROWS = 3, /* rows of a that share a pointer: lda and 2 lda from it are addresses of one
                    * instruction, and a pointer for each row would not fit the registers */
};

/* A panel's share of TERMS fits half of the first-level cache, rows half of the second. A band's sums, its
 * panel's two vectors and one number fit 16 registers. WIDE_STRIDE: from row to row, not a power of two.
 * WIDE_TURN: terms of a turn of the loop. Fewer rows than LEAST_WIDE are done before their panel would be widened. */
enum {
    WIDE_ROWS = 96,
    WIDE_TERMS = 256,
    WIDE_STRIDE = WIDE_TERMS + 8,
    WIDE_BAND = 6,
    WIDE_TURN = 4,
    ROWS_AHEAD = 8,
    LINE = 32, /* bf16 numbers of a cache line */
    LEAST_WIDE = 5
};

typedef struct wide_operands {
    _Alignas(64) float a[WIDE_ROWS][WIDE_STRIDE];
    float b[WIDE_TERMS][PANEL];
} wide_operands;

/* a (rows, K): lda numbers from row to row. b: panels, `panel` numbers from one to the next. c: ldc
 * from row to row, whole panels wide. next: the panels that will be read after these, where they
 * come from memory and should be asked for meanwhile, else NULL. wide: room that the thread has for operands
 * widened to float32, where this level widens them. */
typedef struct kernel_operands {
    const bf16 *a, *b, *next;
    float *c;
    int64_t lda, panel, ldc;
    int K;
    wide_operands *wide;
} kernel_operands;

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

/* Where a band is. */
typedef struct wide_place {
    const float *a, *b;
    float *c;
    const bf16 *next;
    int64_t step, ldc;
    int add;
} wide_place;

/* One term of a band of M rows. */
SPECIALIZED void wide_term(vf (*sum)[VECTORS], const float *a, const float *b, int M) {
    vf column[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; v++) column[v] = vf_load(b + v * LANES);
    UNROLL
    for (int m = 0; m < M; m++) {
        vf row = vf_set(a[m * WIDE_STRIDE]);
        UNROLL
        for (int v = 0; v < VECTORS; v++) vf_add_product(&sum[m][v], row, column[v]);
    }
}

/* One band of M rows by K terms, `turn` of them at once: instructions that are not products take time, too. With
 * `ask`, lines from `next` on are asked for, `step` numbers further with each term. */
SPECIALIZED void wide_band(const wide_place *at, int K, int M, int turn, int ask) {
    vf sum[WIDE_BAND][VECTORS];
    float *c = at->c;
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            sum[m][v] = at->add ? vf_load(c + m * at->ldc + v * LANES) : vf_set(0);
    }
    const float *a = at->a, *b = at->b;
    const bf16 *next = at->next;
    for (int64_t step = at->step; K > 0; K -= turn, a += turn, b += turn * PANEL) {
        UNROLL
        for (int i = 0; i < turn; i++) {
            if (ask && i % PAIR == 0) { /* the steps of two terms are a line at most */
                ask_for(next);
                next += PAIR * step;
            }
            wide_term(sum, a + i, b + i * PANEL, M);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++) vf_store(c + m * at->ldc + v * LANES, sum[m][v]);
    }
}

/* Functions, in which the registers suffice. Terms that are less than a turn are last. */
#define WIDE_BAND_OF(n)                                                                            \
    __attribute__((noinline)) static void wide_band_##n(const wide_place *at, int K) {             \
        wide_band(at, K, n, WIDE_TURN, 0);                                                         \
    }                                                                                              \
    __attribute__((noinline)) static void wide_band_asking_##n(const wide_place *at, int K) {      \
        wide_band(at, K, n, WIDE_TURN, 1);                                                         \
    }                                                                                              \
    __attribute__((noinline)) static void wide_band_rest_##n(const wide_place *at, int K) {        \
        wide_band(at, K, n, 1, 0);                                                                 \
    }
WIDE_BAND_OF(1)
WIDE_BAND_OF(2)
WIDE_BAND_OF(3)
WIDE_BAND_OF(4)
WIDE_BAND_OF(5)
WIDE_BAND_OF(6)

typedef void wide_band_fn(const wide_place *at, int K);
static wide_band_fn *const wide_band_of[][3] = {
    {0},
    {wide_band_1, wide_band_asking_1, wide_band_rest_1},
    {wide_band_2, wide_band_asking_2, wide_band_rest_2},
    {wide_band_3, wide_band_asking_3, wide_band_rest_3},
    {wide_band_4, wide_band_asking_4, wide_band_rest_4},
    {wide_band_5, wide_band_asking_5, wide_band_rest_5},
    {wide_band_6, wide_band_asking_6, wide_band_rest_6},
};

/* next: the numbers of b that are widened after these, which the bands ask for evenly; or NULL. from_memory: they ask
 * in their loops, as few bands are not long enough to wait for some of the lines before them. */
static inline void wide_bands(const wide_operands *w, float *c, int64_t ldc, int rows, int K,
                              int add, const bf16 *next, int from_memory) {
    int n_bands = (rows + WIDE_BAND - 1) / WIDE_BAND, ask = from_memory, rest = K % WIDE_TURN;
    int share = next && !ask ? (K * PANEL / n_bands + LINE - 1) / LINE * LINE : 0;
    wide_place at = {.next = next, .step = PANEL / n_bands, .ldc = ldc};
    for (int row = 0, M; n_bands > 0; n_bands--, row += M) {
        M = (rows - row + n_bands - 1) / n_bands;
        wide_band_fn *const *band = wide_band_of[M];
        at.a = w->a[row];
        at.b = w->b[0];
        at.c = c + row * ldc;
        at.add = add;
        for (int i = 0; i < share; i += LINE) ask_for(at.next + i);
        if (K > rest) band[ask](&at, K - rest);
        at.next += ask ? at.step * K : share;
        if (!rest) continue;
        at.a += K - rest;
        at.b += (K - rest) * PANEL;
        at.add = add || K > rest;
        band[2](&at, rest);
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
                const bf16 *a = o->a + (row + r) * o->lda + k, *soon = a + ROWS_AHEAD * o->lda;
                for (int i = 0; k == 0 && r + ROWS_AHEAD < n_rows && i < terms; i += LINE)
                    ask_for(soon + i);
                FOR_LANES (i, n, terms) vf_put(w->a[r] + i, vf_get(a + i, n), n);
            }
            const bf16 *after =
                k + WIDE_TERMS < o->K ? o->b + (int64_t)(k + WIDE_TERMS) * PANEL : NULL;
            for (int i = 0; i < panels; i++) {
                float *c = o->c + row * o->ldc + i * PANEL;
                const bf16 *b = o->b + i * o->panel + (int64_t)k * PANEL, *next = o->next;
                if (i + 1 < panels)
                    next = b + o->panel;
                else if (after)
                    next = after;
                for (int r = i; after && r < n_rows; r += panels) {
                    const bf16 *a = o->a + (row + r) * o->lda + k + WIDE_TERMS;
                    for (int j = 0; j < WIDE_TERMS; j += LINE) ask_for(a + j);
                }
                widen_panel(w->b, b, terms);
                wide_bands(w, c, o->ldc, n_rows, terms, add || k > 0, next, o->next != NULL);
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
