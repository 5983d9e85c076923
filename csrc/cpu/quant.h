/* quant.h: weights of 4 to 8 bits, as the kernel of product_quant.c reads them.
 *
 * A weight is scale * (u - zero) + minimum, u an unsigned integer. Terms of a sum are taken in groups
 * of 32 or 16, each with one scale, and perhaps one minimum, for each output. Activations are rounded
 * in groups of 32 as they come (round_quant.h; a float32 scale for a row's group), so that a group is integer
 * products, or exact ones of bf16 numbers (pairs_quant.h), and one or two of floats.
 *
 * As in pack.h outputs are in panels of 16, here with four neighbouring terms of each. 32 terms are 8
 * such quads, of which a chunk of 64 bytes has one for every column:
 *
 *     quad i, column j, term h  =  u[16 p + j][32 g + 4 i + h]                        [8][16][4]
 *
 * which is what a tile of AMX takes, and what two masks make operands of 16 bits. With fewer than 8 bits, a
 * byte of chunk i < 4 has quad i in its lower half and quad i + 4 in its upper. The fifth bits of all
 * quads are chunk 4, bit i of a byte that of quad i. The fifth and sixth bits are chunks 4 and 5,
 * bits 2 i and 2 i + 1 those of quad i of the lower, or upper, four. So 32 terms are as many chunks as
 * a weight has bits.
 *
 * A panel is sections of 256 terms, which are read one after another; the last may be of fewer. A section
 * is, in forms of 256 terms ("K"), the float16 of a block, [1 or 2][16]; then the scales of each group in
 * a row, followed by its minima where the form has them: [groups][1 or 2][16], 16-bit floats, or int8 that
 * the float16 of the block multiplies; then the chunks of its groups. Weights past the end of a row count
 * for nothing, as activations there are zeros. */
#ifndef CPU_QUANT_H
#define CPU_QUANT_H

#include "block_types.h"
#include "pairs_bf16.h"

#include <float.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum {
    QUAD = 4,
    QUADS = QUANT_GROUP / QUAD,
    SECTION = QUANT_BLOCK / QUANT_GROUP, /* groups */
    CHUNK_BYTES = PANEL * QUAD,
};

/* ---- a matrix in memory ---- */

/* Rows that follow one another and have one form. */
typedef struct quant_part {
    int32_t form, rows;
    int64_t at; /* of its first panel, in bytes from the matrix's head */
} quant_part;

/* What comes before the panels. */
typedef struct quant_head {
    int64_t bytes; /* of the whole matrix */
    int64_t n_parts;
    quant_part parts[GPT_MAX_STACKED];
} quant_head;
_Static_assert(sizeof(quant_head) == 64, "panels are aligned as the head is");

static inline int64_t quant_panels(int64_t columns) {
    return cpu_div_up(columns, PANEL);
}
static inline int64_t quant_groups(int64_t K) {
    return cpu_div_up(K, QUANT_GROUP);
}
/* Bytes of 32 terms. */
static inline int64_t quant_chunk_bytes(quant_form f) {
    return f.bits * CHUNK_BYTES;
}
/* Bytes of a group's scales and minima, and of those of a block. */
static inline int64_t quant_scale_bytes(quant_form f) {
    return f.rows * PANEL * (f.scale == SCALE_INT8 ? 1 : (int64_t)sizeof(uint16_t));
}
static inline int64_t quant_block_bytes(quant_form f) {
    return f.scale == SCALE_INT8 ? f.rows * PANEL * (int64_t)sizeof(uint16_t) : 0;
}
/* Scales of 32 terms. */
static inline int quant_halves(quant_form f) {
    return QUANT_GROUP / f.group;
}
/* Bytes of a section of so many groups of 32 terms. */
static inline int64_t quant_section_bytes(quant_form f, int64_t groups) {
    return quant_block_bytes(f) +
           groups * (quant_halves(f) * quant_scale_bytes(f) + quant_chunk_bytes(f));
}
static inline int64_t quant_panel_bytes(quant_form f, int64_t K) {
    int64_t groups = quant_groups(K), whole = groups / SECTION, rest = groups % SECTION;
    int64_t bytes = whole * quant_section_bytes(f, SECTION);
    return cpu_round_up(bytes + (rest ? quant_section_bytes(f, rest) : 0), 64);
}
static inline int64_t quant_part_bytes(quant_form f, int64_t rows, int64_t K) {
    return quant_panels(rows) * quant_panel_bytes(f, K);
}

/* Bytes from a section's begin, of a panel's begin for quant_place_of, to these parts of a group. */
typedef struct quant_place {
    int64_t blocks, scales, chunks;
} quant_place;

/* Group `group` of a section of `groups`. */
static inline quant_place quant_in_section(quant_form f, int64_t groups, int64_t group) {
    int64_t scales = quant_halves(f) * quant_scale_bytes(f), first = quant_block_bytes(f);
    return (quant_place){.scales = first + group * scales,
                         .chunks = first + groups * scales + group * quant_chunk_bytes(f)};
}
/* Group `group` of a row of K terms. */
static inline quant_place quant_place_of(quant_form f, int64_t K, int64_t group) {
    int64_t section = group / SECTION, rest = quant_groups(K) - section * SECTION;
    int64_t at = section * quant_section_bytes(f, SECTION);
    quant_place p = quant_in_section(f, rest < SECTION ? rest : SECTION, group % SECTION);
    return (quant_place){at, at + p.scales, at + p.chunks};
}

/* The 32 integers u become column j of their chunks, which are zero there. */
static inline void quant_put(quant_form f, uint8_t *chunks, const uint8_t *u, int j) {
    for (int k = 0; k < QUANT_GROUP; k++) {
        int i = k / QUAD, at = j * QUAD + k % QUAD;
        if (f.bits == 8) {
            chunks[i * CHUNK_BYTES + at] = u[k];
            continue;
        }
        chunks[i % 4 * CHUNK_BYTES + at] |= (uint8_t)((u[k] & 15) << i / 4 * 4);
        if (f.bits == 5) chunks[4 * CHUNK_BYTES + at] |= (uint8_t)(u[k] >> 4 << i);
        if (f.bits == 6)
            chunks[(4 + i / 4) * CHUNK_BYTES + at] |= (uint8_t)(u[k] >> 4 << i % 4 * 2);
    }
}

/* The same back. */
static inline void quant_get(quant_form f, const uint8_t *chunks, uint8_t *u, int j) {
    for (int k = 0; k < QUANT_GROUP; k++) {
        int i = k / QUAD, at = j * QUAD + k % QUAD;
        if (f.bits == 8) {
            u[k] = chunks[i * CHUNK_BYTES + at];
            continue;
        }
        u[k] = chunks[i % 4 * CHUNK_BYTES + at] >> i / 4 * 4 & 15;
        if (f.bits == 5) u[k] |= (uint8_t)((chunks[4 * CHUNK_BYTES + at] >> i & 1) << 4);
        if (f.bits == 6)
            u[k] |= (uint8_t)((chunks[(4 + i / 4) * CHUNK_BYTES + at] >> i % 4 * 2 & 3) << 4);
    }
}

/* The scale of column j, or in row 1 its minimum: of half 0 or 1 of 32 terms. */
static inline float quant_scale_at(quant_form f, const uint8_t *panel, quant_place p, int half,
                                   int row, int j) {
    int at = (half * f.rows + row) * PANEL + j;
    const uint8_t *scales = panel + p.scales;
    if (f.scale == SCALE_BF16) return bf16_float(((const uint16_t *)scales)[at]);
    if (f.scale == SCALE_FP16) return half_float(((const uint16_t *)scales)[at]);
    const uint16_t *blocks = (const uint16_t *)(panel + p.blocks);
    return half_float(blocks[row * PANEL + j]) * (float)(int8_t)scales[at];
}

/* The 32 weights of column j from term k on; zeros past the end. */
static inline void quant_terms(quant_form f, const uint8_t *panel, int K, int k, int j,
                               float *out) {
    uint8_t u[QUANT_GROUP];
    quant_place p = quant_place_of(f, K, k / QUANT_GROUP);
    quant_get(f, panel + p.chunks, u, j);
    for (int half = 0; half < quant_halves(f); half++) {
        float scale = quant_scale_at(f, panel, p, half, 0, j);
        float least = f.rows == 2 ? quant_scale_at(f, panel, p, half, 1, j) : 0;
        for (int h = half * f.group; h < (half + 1) * f.group; h++) {
            float product = scale * (float)(u[h] - f.zero);
            out[h] = f.rows == 2 ? product + least : product;
        }
    }
    for (int h = cpu_min(K - k, QUANT_GROUP); h < QUANT_GROUP; h++) out[h] = 0;
}

/* The panel of row `row` of the matrix, whose column in it is row % PANEL of *in_part; NULL past the end. */
static inline const uint8_t *quant_panel_of(const quant_head *head, int K, int row, quant_form *f,
                                            int *in_part) {
    const quant_part *part = head->parts, *end = part + head->n_parts;
    for (; part < end && row >= part->rows; part++) row -= part->rows;
    if (part == end) return NULL;
    *f = quant_forms[part->form];
    *in_part = row;
    return (const uint8_t *)head + part->at + row / PANEL * quant_panel_bytes(*f, K);
}

/* ---- a group's scale ---- */

/* Whether a lane of x is a NaN or an infinity: 0 for none. */
static inline vi not_finite(vf x) {
    return ~(x * 0.0f == (vf){0});
}
static inline int any_lane(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= mask[i];
    return any;
#endif
}
static inline int32_t vi_sum(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

/* 1 / scale where that is a finite number, else 0: then the group's integers are 0. */
static inline float scale_inverse(float scale) {
    float size = scale < 0 ? -scale : scale;
    return size >= FLT_MIN && size <= FLT_MAX ? 1 / scale : 0;
}

/* A panel from some section on. */
typedef struct panel_part {
    const uint8_t *at;
    const uint8_t *next; /* asked for meanwhile, as far as `at` is read; NULL: nothing */
} panel_part;

/* The sections of a panel from `group` of 32 terms on, the first of one. */
static inline panel_part panel_from(quant_form f, const uint8_t *panel, int64_t group) {
    return (panel_part){.at = panel + group / SECTION * quant_section_bytes(f, SECTION)};
}

/* LANES float16 numbers. */
static inline vf vf_from_half(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = half_float(p[i]);
    return v;
#endif
}

/* Scales (row 0) or minima (row 1) of LANES columns from vector v on, where forms of 256 have them: as
 * integers, of a group's half, and what multiplies these. */
static inline vi quant_integers(quant_form f, const uint8_t *scales, int half, int row, int v) {
    return vi_from_bytes((const int8_t *)scales + (half * f.rows + row) * PANEL + v * LANES);
}
static inline vf quant_block_scale(const uint8_t *blocks, int row, int v) {
    return vf_from_half((const uint16_t *)blocks + row * PANEL + v * LANES);
}

/* The same as numbers, without the factor of the block. */
static inline vf quant_scale(quant_form f, const uint8_t *scales, int half, int row, int v) {
    const uint16_t *halves = (const uint16_t *)scales + (half * f.rows + row) * PANEL + v * LANES;
    if (f.scale == SCALE_BF16) return vf_get_bf16(halves, LANES);
    if (f.scale == SCALE_FP16) return vf_from_half(halves);
    return __builtin_convertvector(quant_integers(f, scales, half, row, v), vf);
}

/* ---- a group's integer products ---- */

/* Four bytes for each of LANES columns. */
typedef uint8_t vb __attribute__((vector_size(LANES * QUAD)));
/* Two numbers of 16 bits. */
typedef int16_t vs __attribute__((vector_size(LANES * QUAD)));
typedef uint16_t vw __attribute__((vector_size(LANES * QUAD)));

static inline vb vb_load(const uint8_t *p) {
    vb v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Quad i < 4 of 32 terms, and quad i + 4, or where `shifted` (4 bits) 16 times that. All but p are constants
 * where this is inlined. */
typedef struct quad_pair {
    vb lower, upper;
} quad_pair;

SPECIALIZED quad_pair quad_load(quant_form f, const uint8_t *p, int i, int shifted) {
    vb x = vb_load(p + i * CHUNK_BYTES);
    if (f.bits == 8) return (quad_pair){x, vb_load(p + (i + 4) * CHUNK_BYTES)};
    if (shifted) return (quad_pair){x & 15, x & 240};
    vb lower = x & 15, upper = (vb)((vu)x >> 4) & 15;
    if (f.bits == 5) {
        vu fifth = (vu)vb_load(p + 4 * CHUNK_BYTES);
        lower |= (vb)(fifth << (4 - i)) & 16;
        upper |= (vb)(fifth >> i) & 16;
    }
    if (f.bits == 6) {
        vu one = (vu)vb_load(p + 4 * CHUNK_BYTES), two = (vu)vb_load(p + 5 * CHUNK_BYTES);
        lower |= (vb)(i < 2 ? one << (4 - 2 * i) : one >> (2 * i - 4)) & 48;
        upper |= (vb)(i < 2 ? two << (4 - 2 * i) : two >> (2 * i - 4)) & 48;
    }
    return (quad_pair){lower, upper};
}

/* A quad as numbers of 16 bits: terms 0 and 2, then 1 and 3. */
typedef struct quad_halves {
    vs even, odd;
} quad_halves;

static inline quad_halves halves_of(vb u) {
    return (quad_halves){(vs)((vu)u & 0xff00ff), (vs)((vw)u >> 8)};
}

/* sum + both products of u with the two numbers of 16 bits in a. */
static inline vi words_dot(vi sum, vs u, int32_t a) {
#if defined(__AVX512F__)
    return sum + (vi)_mm512_madd_epi16((__m512i)u, _mm512_set1_epi32(a));
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)u, _mm256_set1_epi32(a));
#elif defined(__SSE2__) && !defined(PLAIN_LANES)
    return sum + (vi)_mm_madd_epi16((__m128i)u, _mm_set1_epi32(a));
#else
    int16_t x[2];
    memcpy(x, &a, sizeof x);
    return sum + ((vi)u << 16 >> 16) * x[0] + ((vi)u >> 16) * x[1];
#endif
}

/* sum + the four products of the bytes of u, which are not negative, with the signed ones in a. */
static inline vi bytes_dot(vi sum, vb u, int32_t a) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, _mm512_set1_epi32(a));
#else
    int8_t x[QUAD];
    memcpy(x, &a, sizeof x);
    for (int h = 0; h < QUAD; h++) sum += ((vi)u >> 8 * h & 255) * x[h];
    return sum;
#endif
}

#endif
