/* pack.h: the layout of bf16 matrices for the kernels of kernel_bf16.h and kernel_amx.h.
 *
 * Both kernels multiply pairs: acc[m][n] += a[m][k] b[k][n] + a[m][k + 1] b[k + 1][n]. So `a` is
 * row-major as it comes, and b is in panels of 16 columns, in which rows k and k + 1 alternate:
 *
 *     panel p, pair i, column j, half h  =  b[2 i + h][16 p + j]        [K/2][16][2], 1 KB a tile
 *
 * A panel's 16 pairs are one tile of AMX. What b does not have (columns up to a whole panel, the
 * second half of the last pair) is zero.
 *
 * A weight matrix w (rows, cols) is packed twice: forward multiplies by its transpose, b[k][n] =
 * w[n][k]; then, for training, backward by itself, b[k][n] = w[k][n]. */
#ifndef CPU_PACK_H
#define CPU_PACK_H

#include "cpu.h"
#include "transpose.h"

enum { PANEL = 16, PAIR = 2 };

static inline int64_t pack_panels(int64_t columns) {
    return cpu_div_up(columns, PANEL);
}
static inline int64_t pack_pairs(int64_t K) {
    return cpu_div_up(K, PAIR);
}
/* Numbers in one panel. */
static inline int64_t pack_panel_size(int64_t K) {
    return pack_pairs(K) * PANEL * PAIR;
}
/* Numbers in the form that forward reads. Each of two parts may end in its own panel. */
static inline int64_t pack_forward_size(int rows, int cols) {
    return (pack_panels(rows) + 1) * pack_panel_size(cols);
}
static inline int64_t pack_backward_size(int rows, int cols) {
    return pack_panels(cols) * pack_panel_size(rows);
}

/* ---- rows to columns ---- */

/* out[j] = (upper[j], lower[j]), n of them and zeros up to 16: one pair of rows of one panel. lower
 * may be NULL for a last row without a partner. */
static inline void interleave_rows(pair *out, const bf16 *upper, const bf16 *lower, int n) {
#if defined(__AVX512F__)
    __mmask16 mask = (__mmask16)((1u << n) - 1);
    __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, upper));
    __m512i b = _mm512_setzero_si512();
    if (lower) b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, lower));
    _mm512_storeu_si512(out, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
#else
#if defined(__AVX2__)
    if (n == PANEL && lower) {
        __m256i a = _mm256_loadu_si256((const void *)upper);
        __m256i b = _mm256_loadu_si256((const void *)lower);
        __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
        _mm256_storeu_si256((void *)out, _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((void *)(out + 8), _mm256_permute2x128_si256(low, high, 0x31));
        return;
    }
#endif
    for (int j = 0; j < PANEL; j++)
        out[j] = j < n ? upper[j] | (pair)(lower ? lower[j] : 0) << 16 : 0;
#endif
}

/* Columns of x (K, n) as panels, `panel` numbers apart. Rows may be far apart in memory, and are asked for
 * some pairs before they are read. */
static inline void pack_columns(bf16 *out, int64_t panel, const bf16 *x, int64_t ldx, int n,
                                int K) {
    enum { AHEAD = 8 * PAIR };
    for (int k = 0; k < K; k += PAIR, x += PAIR * ldx, out += PANEL * PAIR)
        for (int col = 0; col < n; col += PANEL) {
            if (k + AHEAD + 1 < K) {
                ask_for(x + AHEAD * ldx + col);
                ask_for(x + (AHEAD + 1) * ldx + col);
            }
            interleave_rows((pair *)(out + col / PANEL * panel), x + col,
                            k + 1 < K ? x + ldx + col : NULL, cpu_min(PANEL, n - col));
        }
}

/* The transpose of `rows` <= 16 rows x (rows, K) as one panel: out[i][j] = pair i of row j. */
static inline void pack_transposed(pair *out, const bf16 *x, int64_t ldx, int rows, int K) {
    int i = 0;
    for (; rows == PANEL && (i + PANEL) * PAIR <= K; i += PANEL) {
        pair block[PANEL][PANEL];
        for (int j = 0; j < PANEL; j++) memcpy(block[j], x + j * ldx + i * PAIR, sizeof block[j]);
        transpose_pairs(out + (int64_t)i * PANEL, PANEL, block[0], PANEL);
    }
    for (; i * PAIR < K; i++) {
        for (int j = 0; j < PANEL; j++) {
            const bf16 *p = x + j * ldx + i * PAIR;
            pair value = 0;
            if (j < rows) value = p[0] | (pair)(i * PAIR + 1 < K ? p[1] : 0) << 16;
            out[(int64_t)i * PANEL + j] = value;
        }
    }
}

/* out (n, K) row-major, rows ldo apart, from columns of x (K, ldx): out[j][k] = x[k][j]. An odd K
 * is rounded up with zeros, so out has room for pairs. */
static inline void transpose_columns(bf16 *out, int64_t ldo, const bf16 *x, int64_t ldx, int n,
                                     int K) {
    for (int k = 0; k < K; k += PANEL * PAIR) {
        int pairs = cpu_min(PANEL, (int)pack_pairs(K - k));
        for (int j = 0; j < n; j += PANEL) {
            pair block[PANEL][PANEL], turned[PANEL][PANEL];
            int width = cpu_min(PANEL, n - j);
            for (int i = 0; i < pairs; i++) {
                const bf16 *upper = x + (int64_t)(k + i * PAIR) * ldx + j;
                interleave_rows(block[i], upper, k + i * PAIR + 1 < K ? upper + ldx : NULL, width);
            }
            if (pairs == PANEL && width == PANEL && (ldo * (int64_t)sizeof(bf16)) % 4 == 0) {
                transpose_pairs((pair *)(out + j * ldo + k), ldo / PAIR, block[0], PANEL);
                continue;
            }
            memset(block[pairs], 0, sizeof block[0] * (size_t)(PANEL - pairs));
            transpose_pairs(turned[0], PANEL, block[0], PANEL);
            for (int r = 0; r < width; r++)
                memcpy(out + (j + r) * ldo + k, turned[r], sizeof(pair) * (size_t)pairs);
        }
    }
}

#endif
