/* dot_fp32.h: products of rows with rows (a b^T) by one thread, of few rows of a: a vector is terms of a sum, so that
 * nothing is copied or turned. Sums stay in registers from the first term to the last. Each number of the result is
 * the same to the bit however many rows are multiplied at once.
 *
 * b comes from memory, and several bands of rows pass its columns. With 32 registers (dot_wide) all bands pass
 * WIDE_COLS columns before the next ones, and in the bands after the first the lines of the next columns are asked for.
 * With 16 (dot_narrow) the bands pass a vector of columns, whose sums are then added together. */
#ifndef CPU_DOT_FP32_H
#define CPU_DOT_FP32_H

#include "kernel_fp32.h"

enum { DOT_WIDE = LANES == 16 };

/* ---- 32 registers ---- */

/* vf_sums adds WIDE_COLS sums of each of SUM_ROWS rows. Bands of up to WIDE_ROWS rows by WIDE_COLS columns, and one of
 * up to TALL_ROWS by TALL_COLS, have registers for their sums, WIDE_COLS of b and one of a. */
enum {
    WIDE_ROWS = 6,
    WIDE_COLS = 4,
    TALL_ROWS = 8,
    TALL_COLS = 3,
    FEWEST_ROWS = 4, /* of a band; fewer rows are for dot_narrow */
    SUM_ROWS = LANES / WIDE_COLS,
};

/* c = M rows of a by N columns of b. Of the next columns, which begin at `next`, `asks` are asked for. M, N and asks
 * are constants where this is inlined. */
SPECIALIZED void dot_wide_band(const kernel_operands *o, int M, int N, const float *next,
                               int asks) {
    vf sum[TALL_ROWS][WIDE_COLS];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int n = 0; n < N; n++) sum[m][n] = vf_set(0);
    }
    const float *a[(TALL_ROWS + NEAR_ROWS - 1) / NEAR_ROWS], *b = o->b;
    int64_t lda = o->a_row, ldb = o->ldb;
    int K = o->K, k = 0;
    UNROLL
    for (int i = 0; i * NEAR_ROWS < M; i++) a[i] = o->a + i * NEAR_ROWS * lda;
    for (; k + LANES <= K; k += LANES) {
        vf y[WIDE_COLS];
        UNROLL
        for (int n = 0; n < N; n++) y[n] = vf_load(b + n * ldb + k);
        UNROLL
        for (int n = 0; n < asks; n++) ask_for(next + n * ldb + k);
        UNROLL
        for (int m = 0; m < M; m++) {
            vf x = vf_in_register(vf_load(a[m / NEAR_ROWS] + m % NEAR_ROWS * lda + k));
            UNROLL
            for (int n = 0; n < N; n++) sum[m][n] += x * y[n];
        }
    }
    if (k < K) {
        UNROLL
        for (int m = 0; m < M; m++) {
            vf x = vf_load_n(o->a + m * lda + k, K - k);
            UNROLL
            for (int n = 0; n < N; n++) sum[m][n] += x * vf_load_n(b + n * ldb + k, K - k);
        }
    }
    UNROLL
    for (int row = 0; row < M; row += SUM_ROWS) {
        vf fours[LANES];
        float sums[LANES];
        UNROLL
        for (int i = 0; i < LANES; i++) {
            int m = row + i / WIDE_COLS, n = i % WIDE_COLS;
            fours[i] = m < M && n < N ? sum[m][n] : vf_set(0);
        }
        vf_store(sums, vf_sums(fours));
        UNROLL
        for (int i = 0; i < SUM_ROWS; i++)
            if (row + i < M)
                memcpy(o->c + (int64_t)(row + i) * o->ldc, sums + i * WIDE_COLS,
                       sizeof(float) * (size_t)N);
    }
}

/* A function for each number of rows. */
#define DOT_WIDE_OF(M, N)                                                                          \
    __attribute__((noinline)) static void dot_wide_band_##M(const kernel_operands *o, int cols,    \
                                                            const float *next, int asks) {         \
        if (cols < N)                                                                              \
            dot_wide_band(o, M, 1, next, 0);                                                       \
        else if (asks == 0)                                                                        \
            dot_wide_band(o, M, N, next, 0);                                                       \
        else if (asks == 2)                                                                        \
            dot_wide_band(o, M, N, next, 2);                                                       \
        else                                                                                       \
            dot_wide_band(o, M, N, next, N);                                                       \
    }
DOT_WIDE_OF(4, WIDE_COLS)
DOT_WIDE_OF(5, WIDE_COLS)
DOT_WIDE_OF(6, WIDE_COLS)
DOT_WIDE_OF(7, TALL_COLS)
DOT_WIDE_OF(8, TALL_COLS)

typedef void dot_wide_band_fn(const kernel_operands *o, int cols, const float *next, int asks);
static dot_wide_band_fn *const dot_wide_band_of[] = {
    dot_wide_band_4, dot_wide_band_5, dot_wide_band_6, dot_wide_band_7, dot_wide_band_8};

/* Columns whose lines are asked for while band `band` of so many passes: by the only one all, else by the second
 * and third. The first reads lines that are just arriving, and is slower if it asks for more. */
static inline int dot_asks(int band, int bands, int cols) {
    if (bands == 1) return cols;
    if (bands == 2) return band == 1 ? cols : 0;
    return band == 1 || band == 2 ? cols / 2 : 0;
}

/* c (rows, cols) = a b^T, in as few bands as can be, of about the same size. */
static inline void dot_wide(kernel_operands o, int rows, int cols) {
    int bands = rows <= TALL_ROWS ? 1 : (rows + WIDE_ROWS - 1) / WIDE_ROWS;
    int wide = bands == 1 && rows > WIDE_ROWS ? TALL_COLS : WIDE_COLS;
    for (int col = 0, n; col < cols; col += n, o.b += (int64_t)n * o.ldb, o.c += n) {
        n = cols - col < wide ? 1 : wide;
        kernel_operands band = o;
        const float *next = o.b + (int64_t)n * o.ldb;
        for (int i = 0, row = 0, M; i < bands; i++, row += M) {
            M = (rows - row + bands - i - 1) / (bands - i);
            int asks = dot_asks(i, bands, wide);
            dot_wide_band_of[M - FEWEST_ROWS](&band, n, next, asks);
            next += asks * (int64_t)o.ldb;
            band.a += (int64_t)M * o.a_row;
            band.c += (int64_t)M * o.ldc;
        }
    }
}

/* ---- 16 registers, or up to DOT_ROWS rows ---- */

enum {
    DOT_ROWS = 4, /* DOT_ROWS x DOT_COLS sums, DOT_COLS of b and one of a fill the file */
    DOT_COLS = LANES == 16  ? 4
               : LANES == 8 ? 3
                            : 2,
    DOT_SHARES = LANES == 8, /* bands share the asking for lines: measured at this level alone */
};

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

/* c (rows, cols) = a b^T. The first band reads b from memory, unless other bands ask for it. */
static inline void dot_narrow(kernel_operands o, int rows, int cols) {
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

/* ---- both ---- */

/* c (rows, cols) = a b^T with b (cols, K); rows of a are a_row apart, a_k is 1. */
static inline void kernel_dot(kernel_operands o, int rows, int cols) {
    if (DOT_WIDE && rows > DOT_ROWS)
        dot_wide(o, rows, cols);
    else
        dot_narrow(o, rows, cols);
}

#endif
