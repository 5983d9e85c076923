/* kernel_fp32.h: our own single-threaded products, in two forms. Sums stay in registers from the first
 * term to the last in both.
 *
 * - Of small matrices, where BLAS spends much of its time on copying its operands and on clearing the
 *   result first: a vector is columns of the result. A transposed b is copied, a panel at a time.
 * - Of rows with rows (a b^T): a vector is terms of a sum, so that nothing is copied or turned. Each
 *   number of the result is the same to the bit however many rows are multiplied at once. */
#ifndef CPU_KERNEL_FP32_H
#define CPU_KERNEL_FP32_H

#include "simd.h"

enum {
    PANEL = 2 * LANES,           /* columns that a pass over k computes */
    BAND = LANES == 16 ? 12 : 6, /* rows; BAND x 2 sums, two of b and one of a fill the file */
    KERNEL_MOST_K = 512,         /* of a transposed b: its panel is on the stack */
    KERNEL_MOST_B = 512 << 10,   /* numbers in b: it should stay in the second-level cache */
    DOT_ROWS = 4, /* DOT_ROWS x DOT_COLS sums, DOT_COLS of b and one of a: the same */
    DOT_COLS = LANES == 16  ? 4
               : LANES == 8 ? 3
                            : 2,
    DOT_SHARES = LANES == 8, /* bands share the asking for lines: measured at this level alone */
};

/* a (row, k) is a[row * a_row + k * a_k]; b (k, col) is b[k * ldb + col]. */
typedef struct kernel_operands {
    const float *a, *b;
    float *c;
    int a_row, a_k, ldb, ldc, K;
} kernel_operands;

/* One band of M rows by one panel of n0 + n1 columns. M is a constant where this is inlined. */
SPECIALIZED void kernel_band(const kernel_operands *o, int M, int n0, int n1, int add) {
    vf sum[BAND][2];
    UNROLL
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = vf_set(0);
    const float *a = o->a, *b = o->b;
    for (int k = 0; k < o->K; k++, a += o->a_k, b += o->ldb) {
        vf b0 = vf_get(b, n0), b1 = n1 == LANES ? vf_load(b + LANES) : vf_load_n(b + LANES, n1);
        UNROLL
        for (int m = 0; m < M; m++) {
            vf x = vf_set(a[(int64_t)m * o->a_row]);
            sum[m][0] += x * b0;
            sum[m][1] += x * b1;
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        float *c = o->c + (int64_t)m * o->ldc;
        if (add) {
            sum[m][0] += vf_get(c, n0);
            if (n1) sum[m][1] += vf_get(c + LANES, n1);
        }
        vf_put(c, sum[m][0], n0);
        if (n1) vf_put(c + LANES, sum[m][1], n1);
    }
}

/* The rows of one panel: whole bands, then what is left in ever smaller ones. */
SPECIALIZED void kernel_rows(kernel_operands o, int rows, int n0, int n1, int add) {
    for (int left = rows, done; left > 0; left -= done) {
        if (left >= BAND)
            kernel_band(&o, done = BAND, n0, n1, add);
        else if (left >= 4)
            kernel_band(&o, done = 4, n0, n1, add);
        else
            kernel_band(&o, done = 1, n0, n1, add);
        o.a += (int64_t)done * o.a_row;
        o.c += (int64_t)done * o.ldc;
    }
}

static inline void kernel_panel(const kernel_operands *o, int rows, int cols, int add) {
    if (cols == PANEL)
        kernel_rows(*o, rows, LANES, LANES, add);
    else if (cols > LANES)
        kernel_rows(*o, rows, LANES, cols - LANES, add);
    else
        kernel_rows(*o, rows, cols, 0, add);
}

/* c (rows, cols) = a b, or c += a b. */
static inline void kernel_product(kernel_operands o, int rows, int cols, int add) {
    for (int col = 0; col < cols; col += PANEL, o.b += PANEL, o.c += PANEL)
        kernel_panel(&o, rows, cols - col < PANEL ? cols - col : PANEL, add);
}

/* c (rows, cols) = a b^T with b (cols, K): each panel of b is turned first. */
static inline void kernel_product_nt(kernel_operands o, int rows, int cols) {
    float panel[KERNEL_MOST_K * PANEL];
    const float *b = o.b;
    int ldb = o.ldb;
    o.b = panel;
    o.ldb = PANEL;
    for (int col = 0; col < cols; col += PANEL, o.c += PANEL) {
        int n = cols - col < PANEL ? cols - col : PANEL;
        for (int j = 0; j < n; j++) {
            const float *from = b + (int64_t)(col + j) * ldb;
            for (int k = 0; k < o.K; k++) panel[k * PANEL + j] = from[k];
        }
        kernel_panel(&o, rows, n, 0);
    }
}

/* ---- rows with rows ---- */

/* How far ahead of what is read of b its next numbers are asked for, where it comes from memory. */
enum { AHEAD = 2048 };

/* What a block asks for: nothing, lines that its bands share, or those AHEAD. */
typedef enum dot_ask { ASK_NOTHING, ASK_SHARE, ASK_AHEAD } dot_ask;

/* sums[m][n] = the terms of a's row m times b's row n, lane by lane, while lines from `next` on are asked for,
 * `step` numbers further with each vector. M, N and ask are constants where this is inlined. */
SPECIALIZED void dot_block(vf (*sums)[LANES], const kernel_operands *o, const float *b, int M,
                           int N, dot_ask ask, const float *next, int step) {
    const float *a = o->a;
    int K = o->K, lda = o->a_row, ldb = o->ldb, k = 0;
    vf sum[DOT_ROWS][DOT_COLS];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int n = 0; n < N; n++) sum[m][n] = vf_set(0);
    }
    for (; k + LANES <= K; k += LANES) {
        vf y[DOT_COLS];
        UNROLL
        for (int n = 0; n < N; n++) y[n] = vf_load(b + (int64_t)n * ldb + k);
        if (ask == ASK_AHEAD) ask_for(b + k + AHEAD);
        if (ask == ASK_SHARE) __builtin_prefetch(next); /* to the first level: it is read next */
        if (ask == ASK_SHARE) next += step;
        UNROLL
        for (int m = 0; m < M; m++) {
            vf x = vf_load(a + (int64_t)m * lda + k);
            UNROLL
            for (int n = 0; n < N; n++) sum[m][n] += x * y[n];
        }
    }
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            if (k < K)
                sum[m][n] += vf_load_n(a + (int64_t)m * lda + k, K - k) *
                             vf_load_n(b + (int64_t)n * ldb + k, K - k);
            sums[m][n] = sum[m][n];
        }
    }
}

/* One of the bands that pass the same columns. Each asks for as large a share of the columns after these, evenly,
 * for more lines at once would have to wait for memory. */
typedef struct dot_band_of {
    int at, bands;
} dot_band_of;

/* Columns n to n + N - 1, which other bands read too. */
SPECIALIZED void dot_shared(vf (*sums)[LANES], const kernel_operands *o, int n, int M, int N,
                            dot_band_of band) {
    const float *b = o->b + (int64_t)n * o->ldb;
    int step = N * LANES / band.bands;
    const float *next = b + (int64_t)LANES * o->ldb + (int64_t)band.at * step * (o->K / LANES);
    dot_block((vf(*)[LANES]) & sums[0][n], o, b, M, N, DOT_SHARES ? ASK_SHARE : ASK_NOTHING, next,
              step);
}

/* c (M, cols) = a b^T with b (cols, K), for at most LANES columns. They are taken one by one where b
 * comes from memory, which is fastest from one end to the other. */
SPECIALIZED void dot_rows(const kernel_operands *o, int M, int cols, int from_memory,
                          dot_band_of band) {
    vf sums[DOT_ROWS][LANES];
    int n = 0;
    for (; !from_memory && n + DOT_COLS <= cols; n += DOT_COLS)
        dot_shared(sums, o, n, M, DOT_COLS, band);
    for (; DOT_COLS == 3 && !from_memory && n + 2 <= cols; n += 2)
        dot_shared(sums, o, n, M, 2, band);
    for (; n < cols; n++)
        dot_block((vf(*)[LANES]) & sums[0][n], o, o->b + (int64_t)n * o->ldb, M, 1,
                  from_memory && M > 1 ? ASK_AHEAD : ASK_NOTHING, NULL, 0);
    for (int m = 0; m < M; m++) {
        for (n = cols; n < LANES; n++) sums[m][n] = vf_set(0);
        vf_put(o->c + (int64_t)m * o->ldc, vf_sums(sums[m]), cols);
    }
}

SPECIALIZED void dot_band(const kernel_operands *o, int rows, int cols, int from_memory,
                          dot_band_of band) {
    switch (rows) {
    case 1:
        dot_rows(o, 1, cols, from_memory, band);
        break;
    case 2:
        dot_rows(o, 2, cols, from_memory, band);
        break;
    case 3:
        dot_rows(o, 3, cols, from_memory, band);
        break;
    default:
        dot_rows(o, DOT_ROWS, cols, from_memory, band);
        break;
    }
}

/* c (rows, cols) = a b^T with b (cols, K); rows of a are a_row apart, a_k is 1. The first band reads b from memory,
 * unless other bands ask for it. */
static inline void kernel_dot(kernel_operands o, int rows, int cols) {
    int bands = (rows + DOT_ROWS - 1) / DOT_ROWS, shares = DOT_SHARES && rows >= 2 * DOT_ROWS;
    for (int col = 0; col < cols; col += LANES, o.b += (int64_t)LANES * o.ldb, o.c += LANES) {
        int n = cols - col < LANES ? cols - col : LANES;
        kernel_operands band = o;
        if (!shares) dot_band(&band, rows, n, 1, (dot_band_of){0, bands});
        for (int i = !shares; i < bands; i++) {
            band.a = o.a + (int64_t)i * DOT_ROWS * o.a_row;
            band.c = o.c + (int64_t)i * DOT_ROWS * o.ldc;
            dot_band(&band, rows - i * DOT_ROWS, n, 0, (dot_band_of){i, bands});
        }
    }
}

#endif
