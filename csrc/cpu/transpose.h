/* transpose.h: rows to columns, of 16 x 16 numbers of 32 bits or pairs of 16. */
#ifndef CPU_TRANSPOSE_H
#define CPU_TRANSPOSE_H

#include "simd.h"

/* Two 16-bit numbers, or one float32 that is moved like them. */
typedef uint32_t __attribute__((may_alias)) pair;

#if defined(__AVX2__) && !defined(__AVX512F__)
/* The same as transpose_pairs for 8 x 8 pairs. */
static inline void transpose_8x8(pair *out, int64_t out_stride, const pair *in, int64_t in_stride) {
    __m256i r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256((const void *)(in + i * in_stride));
    for (int i = 0; i < 8; i += 2) { /* pairs of rows, within halves */
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) { /* fours of rows: r[i + c] has column c of each half */
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        __m256i left = _mm256_permute2x128_si256(r[c], r[4 + c], 0x20);
        __m256i right = _mm256_permute2x128_si256(r[c], r[4 + c], 0x31);
        _mm256_storeu_si256((void *)(out + c * out_stride), left);
        _mm256_storeu_si256((void *)(out + (4 + c) * out_stride), right);
    }
}
#endif

/* out[j] = row j of the transpose of 16 x 16 pairs: out[j][i] = in[i][j]. Rows of `in` are
 * in_stride pairs apart, those of `out` out_stride. */
static inline void transpose_pairs(pair *out, int64_t out_stride, const pair *in,
                                   int64_t in_stride) {
#if defined(__AVX512F__)
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(in + i * in_stride);
    for (int i = 0; i < 16; i += 2) { /* pairs of rows, within quarters */
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* fours of rows: r[i + c] has column c of each quarter */
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) { /* quarters: 4 x 4 blocks of 128 bits */
        __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        __m512i b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        __m512i d = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        _mm512_storeu_si512(out + c * out_stride, _mm512_shuffle_i32x4(a, d, 0x88));
        _mm512_storeu_si512(out + (4 + c) * out_stride, _mm512_shuffle_i32x4(b, e, 0x88));
        _mm512_storeu_si512(out + (8 + c) * out_stride, _mm512_shuffle_i32x4(a, d, 0xdd));
        _mm512_storeu_si512(out + (12 + c) * out_stride, _mm512_shuffle_i32x4(b, e, 0xdd));
    }
#elif defined(__AVX2__)
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 16; j += 8)
            transpose_8x8(out + j * out_stride + i, out_stride, in + i * in_stride + j, in_stride);
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}

#endif
