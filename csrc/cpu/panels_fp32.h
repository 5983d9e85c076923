/* panels_fp32.h: products of larger matrices, by one thread, from copies of their operands that stay in its
 * caches (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008).
 *
 * - b: a block of terms of some columns, in panels b[k][PANEL]. A panel stays in the first-level cache while
 *   all bands of rows pass it, the block in the second-level cache.
 * - a: a block of rows. Row-major ones are read as they are; those of a transposed a are copied, in bands
 *   a[k][BAND]. */
#ifndef CPU_PANELS_FP32_H
#define CPU_PANELS_FP32_H

#include "kernel_fp32.h"
#include "transpose.h"

enum {
    BLOCK_K = 256,                  /* terms */
    BLOCK_ROWS = 16 * BAND,         /* of a */
    BLOCK_COLS = 384,               /* of b */
    BLOCK_B = BLOCK_K * BLOCK_COLS, /* numbers */
    BLOCK_A = (BLOCK_K + APART) * BLOCK_ROWS,
};

/* ---- copies ---- */

/* Rows that are copied before the next ones, whose lines are asked for meanwhile: they are far apart in memory. */
enum { TURN = 8 };

/* b (K, cols) as panels; columns up to a whole panel are zeros. */
static inline void panels_of_columns(float *out, const float *b, int64_t ldb, int cols, int K) {
    for (int k = 0; k < K; k++, b += ldb, out += PANEL) {
        float *to = out;
        for (int col = 0; col < cols; col += PANEL, to += (int64_t)K * PANEL) {
            const float *from = b + col;
            __builtin_prefetch(from + TURN * ldb);
            if (cols - col >= PANEL) {
                vf_store(to, vf_load(from));
                vf_store(to + LANES, vf_load(from + LANES));
                continue;
            }
            for (int j = 0; j < PANEL; j++) to[j] = col + j < cols ? from[j] : 0;
        }
    }
}

/* out[k][j] = in[j][k] for LANES rows of LANES terms; rows of `in` are ld apart, those of out PANEL. */
static inline void turn_lanes(float *out, const float *in, int64_t ld) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256 r[8], t[8];
    UNROLL
    for (int i = 0; i < 4; i++) { /* rows i and i + 4, so that halves need no exchange later */
        const float *upper = in + i * ld, *lower = in + (i + 4) * ld;
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper)),
                                    _mm_loadu_ps(lower), 1);
        r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper + 4)),
                                        _mm_loadu_ps(lower + 4), 1);
    }
    UNROLL
    for (int h = 0; h < 8; h += 4) {
        t[h] = _mm256_unpacklo_ps(r[h], r[h + 1]);
        t[h + 1] = _mm256_unpackhi_ps(r[h], r[h + 1]);
        t[h + 2] = _mm256_unpacklo_ps(r[h + 2], r[h + 3]);
        t[h + 3] = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
        _mm256_storeu_ps(out + h * PANEL, _mm256_shuffle_ps(t[h], t[h + 2], 0x44));
        _mm256_storeu_ps(out + (h + 1) * PANEL, _mm256_shuffle_ps(t[h], t[h + 2], 0xee));
        _mm256_storeu_ps(out + (h + 2) * PANEL, _mm256_shuffle_ps(t[h + 1], t[h + 3], 0x44));
        _mm256_storeu_ps(out + (h + 3) * PANEL, _mm256_shuffle_ps(t[h + 1], t[h + 3], 0xee));
    }
#elif defined(__AVX512F__)
    transpose_pairs((pair *)out, PANEL, (const pair *)in, ld);
#else
    for (int j = 0; j < LANES; j++)
        for (int k = 0; k < LANES; k++) out[k * PANEL + j] = in[j * ld + k];
#endif
}

/* The transpose of b (cols, K) as panels. */
static inline void panels_of_rows(float *out, const float *b, int64_t ldb, int cols, int K) {
    for (int col = 0; col < cols; col += PANEL, b += PANEL * ldb, out += (int64_t)K * PANEL) {
        int k = 0, n = cols - col < PANEL ? cols - col : PANEL;
        for (; n == PANEL && k + LANES <= K; k += LANES) {
            turn_lanes(out + (int64_t)k * PANEL, b + k, ldb);
            turn_lanes(out + (int64_t)k * PANEL + LANES, b + LANES * ldb + k, ldb);
        }
        for (; k < K; k++)
            for (int j = 0; j < PANEL; j++) out[k * PANEL + j] = j < n ? b[j * ldb + k] : 0;
    }
}

/* n rows of a as rows k and on of one band. The vectors reach into the next row of the band, which is written
 * after them. */
SPECIALIZED void fill_band(float *to, const float *a, int64_t lda, int n, int wide, float *sums) {
    vf sum = wide && sums ? vf_load(sums) : vf_set(0);
    for (int k = 0; k < n; k++, a += lda, to += BAND) {
        __builtin_prefetch(a + TURN * lda);
        if (!wide) {
            memcpy(to, a, BAND * sizeof(float));
            for (int m = 0; sums && m < BAND; m++) sums[m] += a[m];
            continue;
        }
        vf x = vf_load(a);
        vf_store(to, x);
        sum += x;
    }
    for (int m = 0; wide && sums && m < BAND; m++) sums[m] = sum[m];
}

/* a (K, rows) as bands, and sums += those of its columns, in the order of the rows; sums may be NULL. */
static inline void bands_of_columns(float *out, const float *a, int64_t lda, int rows, int K,
                                    float *sums) {
    for (int k0 = 0; k0 < K; k0 += TURN, a += TURN * lda) {
        int n = K - k0 < TURN ? K - k0 : TURN, row = 0;
        float *to = out + (int64_t)k0 * BAND;
        for (; row + BAND <= rows; row += BAND, to += (int64_t)K * BAND) {
            float *sum = sums ? sums + row : NULL;
            if ((int)BAND <= (int)LANES && row + LANES <= rows && k0 + n < K)
                fill_band(to, a + row, lda, n, 1, sum);
            else
                fill_band(to, a + row, lda, n, 0, sum);
        }
        for (int k = 0; k < n; k++)
            for (int m = 0; m < rows - row; m++) {
                to[k * BAND + m] = a[k * lda + row + m];
                if (sums) sums[row + m] += a[k * lda + row + m];
            }
    }
}

/* ---- products ---- */

/* a: rows a_row apart, or bands a[k][BAND], with an a_row of 1. Bands are a_band apart. add: c += */
typedef struct panel_operands {
    const float *a, *b;
    float *c;
    int64_t a_row, a_band, ldc;
    int K, add, is_banded;
} panel_operands;

/* Terms of a turn of the loop over them, as instructions that are not products take time, too. */
enum { TERM_TURN = 4, POINTERS = (BAND + NEAR_ROWS - 1) / NEAR_ROWS };

/* sum += `terms` terms of M rows and one panel. */
SPECIALIZED void panel_terms(vf (*sum)[2], const float *const *a, int64_t a_row, const float *b,
                             int terms, int M, int wide, int is_banded) {
    UNROLL
    for (int k = 0; k < terms; k++, b += PANEL) {
        vf b0 = vf_load(b), b1 = wide ? vf_load(b + LANES) : b0;
        UNROLL
        for (int m = 0; m < M; m++) {
            vf x = vf_set(is_banded ? a[0][k * BAND + m]
                                    : a[m / NEAR_ROWS][m % NEAR_ROWS * a_row + k]);
            vf_add_product(&sum[m][0], x, b0);
            if (wide) vf_add_product(&sum[m][1], x, b1);
        }
    }
}

/* M rows by n columns of one panel. M, whether n is more than one vector, and whether a is in bands, are constants
 * where this is inlined. */
SPECIALIZED void panel_band(const panel_operands *o, int M, int n, int wide, int is_banded) {
    vf sum[BAND][2];
    float *c = o->c;
    UNROLL
    for (int m = 0; m < M; m++) {
        __builtin_prefetch(c + m * o->ldc, 1);
        __builtin_prefetch(c + m * o->ldc + PANEL - 1, 1);
        sum[m][0] = sum[m][1] = vf_set(0);
    }
    const float *a[POINTERS], *b = o->b;
    int64_t a_row = o->a_row, a_k = is_banded ? BAND : 1;
    UNROLL
    for (int i = 0; i < POINTERS; i++) a[i] = is_banded ? o->a : o->a + i * NEAR_ROWS * a_row;
    int left = o->K;
    for (; left >= TERM_TURN; left -= TERM_TURN, b += TERM_TURN * PANEL) {
        panel_terms(sum, a, a_row, b, TERM_TURN, M, wide, is_banded);
        UNROLL
        for (int i = 0; i < POINTERS; i++) a[i] += TERM_TURN * a_k;
    }
    for (; left > 0; left--, b += PANEL) {
        panel_terms(sum, a, a_row, b, 1, M, wide, is_banded);
        UNROLL
        for (int i = 0; i < POINTERS; i++) a[i] += a_k;
    }
    int n0 = wide ? LANES : n, n1 = n - n0, add = o->add;
    UNROLL
    for (int m = 0; m < M; m++, c += o->ldc) {
        if (add) sum[m][0] += vf_get(c, n0);
        vf_put(c, sum[m][0], n0);
        if (!wide) continue;
        if (add) sum[m][1] += vf_get(c + LANES, n1);
        vf_put(c + LANES, sum[m][1], n1);
    }
}

/* Functions, in which the registers suffice: of whole panels, of more than a vector, and of up to one. */
#define PANEL_BAND_OF(name, M, is_banded)                                                          \
    __attribute__((noinline)) static void name(const panel_operands *o, int n) {                   \
        if (n == PANEL)                                                                            \
            panel_band(o, M, PANEL, 1, is_banded);                                                 \
        else if (n > LANES)                                                                        \
            panel_band(o, M, n, 1, is_banded);                                                     \
        else                                                                                       \
            panel_band(o, M, n, 0, is_banded);                                                     \
    }
PANEL_BAND_OF(panel_band_rows, BAND, 0)
PANEL_BAND_OF(panel_band_banded, BAND, 1)
PANEL_BAND_OF(panel_band_rows_4, 4, 0)
PANEL_BAND_OF(panel_band_banded_4, 4, 1)
PANEL_BAND_OF(panel_band_rows_1, 1, 0)
PANEL_BAND_OF(panel_band_banded_1, 1, 1)

/* n columns of one panel. */
static inline void panel_rows(panel_operands o, int rows, int n) {
    int is_banded = o.is_banded;
    for (int done; rows > 0; rows -= done, o.c += done * o.ldc) {
        done = rows >= BAND ? BAND : rows >= 4 ? 4 : 1;
        if (done == BAND)
            (is_banded ? panel_band_banded : panel_band_rows)(&o, n);
        else if (done == 4)
            (is_banded ? panel_band_banded_4 : panel_band_rows_4)(&o, n);
        else
            (is_banded ? panel_band_banded_1 : panel_band_rows_1)(&o, n);
        o.a += done == BAND ? o.a_band : done * o.a_row;
    }
}

/* c (rows, cols) = a b, or c += a b. */
static inline void panel_product(panel_operands o, int rows, int cols) {
    for (int col = 0; col < cols; col += PANEL, o.b += (int64_t)o.K * PANEL, o.c += PANEL)
        panel_rows(o, rows, cols - col < PANEL ? cols - col : PANEL);
}

#endif
