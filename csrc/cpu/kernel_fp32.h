/* kernel_fp32.h: products of small matrices by one thread, where other ways spend much of their time on copying
 * operands. A vector is columns of the result, and sums stay in registers from the first term to the last. */
#ifndef CPU_KERNEL_FP32_H
#define CPU_KERNEL_FP32_H

#include "simd.h"

enum {
    PANEL = 2 * LANES,           /* columns that a pass over k computes */
    BAND = LANES == 16 ? 12 : 6, /* rows; BAND x 2 sums, two of b and one of a fill the file */
    KERNEL_MOST_B = 512 << 10,   /* numbers in b: it should stay in the second-level cache */
};

/* Rows of a that share a pointer: lda and 2 lda from it are addresses of one instruction. */
enum { NEAR_ROWS = 3 };

/* Rows so many numbers apart, or a multiple of them, are in one set of the first-level cache (64 of 64 bytes), which
 * those of a band do not fit. They are copied, K + APART numbers apart. */
enum { CROWDED = 1024, APART = 32 };

static inline int is_crowded(int64_t lda) {
    return BAND > 8 && lda % CROWDED == 0;
}

/* out (rows, K) = a, closer together. */
static inline const float *rows_closer(float *out, const float *a, int64_t lda, int rows, int K) {
    for (int r = 0; r < rows; r++)
        memcpy(out + (int64_t)r * (K + APART), a + r * lda, sizeof(float) * (size_t)K);
    return out;
}

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

#endif
