/* kernel_fp32.h: our own single-threaded product for small matrices, where BLAS spends much of its time
 * on copying its operands and on clearing the result first. Sums stay in registers from the first
 * term to the last; only a transposed b is copied, a panel of columns at a time. */
#ifndef CPU_KERNEL_FP32_H
#define CPU_KERNEL_FP32_H

#include "simd.h"

enum {
    PANEL = 2 * LANES,           /* columns that a pass over k computes */
    BAND = LANES == 16 ? 12 : 6, /* rows; BAND x 2 sums, two of b and one of a fill the file */
    KERNEL_MOST_K = 512,         /* of a transposed b: its panel lies on the stack */
    KERNEL_MOST_B = 512 << 10,   /* numbers in b: it should stay in the second-level cache */
};

/* a (row, k) stands at a[row * a_row + k * a_k]; b (k, col) at b[k * ldb + col]. */
typedef struct kernel_operands {
    const float *a, *b;
    float *c;
    int a_row, a_k, ldb, ldc, K;
} kernel_operands;

/* One band of M rows by one panel of n0 + n1 columns. M is a constant where this is inlined. */
__attribute__((always_inline)) static inline void kernel_band(const kernel_operands *o, int M,
                                                              int n0, int n1, int add) {
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
__attribute__((always_inline)) static inline void kernel_rows(kernel_operands o, int rows, int n0,
                                                              int n1, int add) {
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

#endif
