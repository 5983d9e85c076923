/* blas.h: the one product of BLAS that the CPU backend uses, row-major. */
#ifndef CPU_BLAS_H
#define CPU_BLAS_H

#ifdef GPTC_NO_OPENBLAS
#include "plain_blas.h"
#else

/* The PyPI wheel scipy-openblas32 prefixes its symbols, so as not to meet another OpenBLAS. */
#ifdef GPTC_OPENBLAS_PREFIX
#define cblas_sgemm              scipy_cblas_sgemm
#define openblas_set_num_threads scipy_openblas_set_num_threads
#endif

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
void openblas_set_num_threads(int n);

static inline void blas_use_one_thread(void) {
    openblas_set_num_threads(1);
}

enum { BLAS_ROW_MAJOR = 101, BLAS_N = 111, BLAS_T = 112 };

/* c (m, n) = alpha a (m, k) b^T + beta c, where b is (n, k): a product of rows with rows. */
static inline void gemm_nt(int m, int n, int k, float alpha, const float *a, int lda,
                           const float *b, int ldb, float beta, float *c, int ldc) {
    cblas_sgemm(BLAS_ROW_MAJOR, BLAS_N, BLAS_T, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* c (m, n) = alpha a (m, k) b (k, n) + beta c. */
static inline void gemm_nn(int m, int n, int k, float alpha, const float *a, int lda,
                           const float *b, int ldb, float beta, float *c, int ldc) {
    cblas_sgemm(BLAS_ROW_MAJOR, BLAS_N, BLAS_N, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* c (m, n) = alpha a^T b + beta c, where a is (k, m) and b is (k, n): a sum over rows. */
static inline void gemm_tn(int m, int n, int k, float alpha, const float *a, int lda,
                           const float *b, int ldb, float beta, float *c, int ldc) {
    cblas_sgemm(BLAS_ROW_MAJOR, BLAS_T, BLAS_N, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

#endif
#endif
