/* plain_blas.h: the products of blas.h where there is no OpenBLAS. They are right, not fast: for
 * machines on which the CPU only checks what a GPU computes. */
#ifndef CPU_PLAIN_BLAS_H
#define CPU_PLAIN_BLAS_H

#include "simd.h"

static inline void blas_use_one_thread(void) {}

/* c = beta c, where 0 clears NaN too. */
static inline void plain_scale(int n, float beta, float *c) {
    for (int j = 0; j < n; j++) c[j] = beta == 0 ? 0 : beta * c[j];
}

/* c (m, n) = alpha a b + beta c, where a (i, p) is a[i a_row + p a_col] and b is (k, n). */
static inline void plain_gemm(int m, int n, int k, float alpha, const float *a, int a_row,
                              int a_col, const float *b, int ldb, float beta, float *c, int ldc) {
    for (int i = 0; i < m; i++, a += a_row, c += ldc) {
        plain_scale(n, beta, c);
        for (int p = 0; p < k; p++) {
            vf x = vf_set(alpha * a[(size_t)p * a_col]);
            const float *row = b + (size_t)p * ldb;
            FOR_LANES (j, lanes, n)
                vf_put_f32(c + j, vf_get_f32(c + j, lanes) + x * vf_get_f32(row + j, lanes), lanes);
        }
    }
}

static inline void gemm_nn(int m, int n, int k, float alpha, const float *a, int lda,
                           const float *b, int ldb, float beta, float *c, int ldc) {
    plain_gemm(m, n, k, alpha, a, lda, 1, b, ldb, beta, c, ldc);
}

static inline void gemm_tn(int m, int n, int k, float alpha, const float *a, int lda,
                           const float *b, int ldb, float beta, float *c, int ldc) {
    plain_gemm(m, n, k, alpha, a, 1, lda, b, ldb, beta, c, ldc);
}

static inline void gemm_nt(int m, int n, int k, float alpha, const float *a, int lda,
                           const float *b, int ldb, float beta, float *c, int ldc) {
    for (int i = 0; i < m; i++, a += lda, c += ldc) {
        plain_scale(n, beta, c);
        for (int j = 0; j < n; j++) {
            vf sum = {0};
            FOR_LANES (p, lanes, k)
                sum += vf_get_f32(a + p, lanes) * vf_get_f32(b + (size_t)j * ldb + p, lanes);
            c[j] += alpha * vf_sum(sum);
        }
    }
}

#endif
