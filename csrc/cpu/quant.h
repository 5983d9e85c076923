/* quant.h: weights of 8 or 4 bits, as the kernel of product_quant.c reads them.
 *
 * Terms of a sum are taken in groups of 32, each with one scale for each output:
 * w[n][k] = scale[k / 32][n] * (u - ZERO), u an unsigned byte or nibble. Activations are rounded in
 * the same groups as they come (8 bits, a float32 scale for a row's group), so that a group is 32
 * integer products and one of floats.
 *
 * As in pack.h outputs are in panels of 16, here with four neighbouring terms of each:
 *
 *     group g, quad i, column j, term h  =  u[16 p + j][32 g + 4 i + h]      [K/32][8][16][4]
 *
 * which is what one instruction of AVX-512 VNNI takes, and a tile of AMX. With 4 bits, a byte of
 * quad i has quad i + 4 in its upper half. The scales of a panel, bf16 [K/32][16], come after its
 * groups. Weights past the end of w are ZERO. */
#ifndef CPU_QUANT_H
#define CPU_QUANT_H

#include "cpu.h"
#include "simd.h"

#include <float.h>

enum {
    PANEL = 16,
    QUAD = 4,
    QUANT_GROUP = 32,
    QUADS = QUANT_GROUP / QUAD,
    ZERO = CPU_QUANT == 8 ? 128 : 8,
    CHUNK_BYTES = PANEL * QUAD, /* a quad of every column; two with 4 bits */
    CHUNKS = CPU_QUANT == 8 ? QUADS : QUADS / 2,
    VECTORS = PANEL / LANES,
};

static inline int64_t quant_panels(int64_t columns) {
    return cpu_div_up(columns, PANEL);
}
static inline int64_t quant_groups(int64_t K) {
    return cpu_div_up(K, QUANT_GROUP);
}
static inline int64_t quant_scales_at(int64_t K) {
    return quant_groups(K) * CHUNKS * CHUNK_BYTES;
}
static inline int64_t quant_panel_bytes(int64_t K) {
    return cpu_round_up(quant_scales_at(K) + quant_groups(K) * PANEL * (int64_t)sizeof(bf16), 64);
}

/* ---- a group's scale ---- */

/* Whether a lane of x is a NaN or an infinity: 0 for none. */
static inline vi not_finite(vf x) {
    return ~(x * 0.0f == (vf){0});
}
static inline int any_lane(vi mask) {
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= mask[i];
    return any;
}

/* 1 / scale where that is a finite number, else 0: then the group's integers are 0. */
static inline float scale_inverse(float scale) {
    float size = scale < 0 ? -scale : scale;
    return size >= FLT_MIN && size <= FLT_MAX ? 1 / scale : 0;
}

/* ---- a group's integer products ---- */

/* Four bytes for each of LANES columns. */
typedef uint8_t vb __attribute__((vector_size(LANES * QUAD)));

static inline vb vb_load(const uint8_t *p) {
    vb v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* The quads of a chunk's lower, or upper, halves. */
static inline vb vb_lower(vb x) {
    return CPU_QUANT == 8 ? x : x & 15;
}
static inline vb vb_upper(vb x) {
    return (vb)((vu)x >> 4) & 15;
}

static inline vi plain_quad_dot(vi sum, vb u, int32_t a, int zero) {
    int8_t x[QUAD];
    memcpy(x, &a, sizeof x);
    for (int lane = 0; lane < LANES; lane++)
        for (int h = 0; h < QUAD; h++) sum[lane] += ((int)u[lane * QUAD + h] - zero) * x[h];
    return sum;
}

#if defined(__AVX512VNNI__) || defined(GPTC_EMULATE_VNNI)

/* u times a rather than (u - ZERO) times a: the sum begins with what that is too much. */
enum { SUM_IS_OFFSET = 1 };

static inline vi quad_dot(vi sum, vb u, int32_t a) {
#if defined(GPTC_EMULATE_VNNI)
    return plain_quad_dot(sum, u, a, 0);
#else
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, _mm512_set1_epi32(a));
#endif
}

#else

enum { SUM_IS_OFFSET = 0 };

/* |w| times a with w's sign: two such products fit 16 bits. */
static inline vi quad_dot(vi sum, vb u, int32_t a) {
#if defined(__AVX512F__)
    __m512i w = _mm512_sub_epi8((__m512i)u, _mm512_set1_epi8((char)ZERO));
    __m512i x = _mm512_set1_epi32(a);
    x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), x);
    return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    __m256i w = _mm256_sub_epi8((__m256i)u, _mm256_set1_epi8((char)ZERO));
    __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(a), w);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), x);
    return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return plain_quad_dot(sum, u, a, ZERO);
#endif
}

#endif

#endif
