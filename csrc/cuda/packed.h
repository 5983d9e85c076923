/* packed.h: matrices of 4 to 8 bits on the GPU, as GGUF's blocks give them (block_types.h): the numbers are those of
 * cpu/quant.h, here row by row. Activations are not rounded.
 *
 * A row has its integers, (K/32) groups of 16 bytes, or 32 where they have 8 bits: byte i of 16 has that of
 * term i in its lower half, and of term i + 16 in its upper. The fifth bits of a group follow in 4 bytes, bit i that of term
 * i, or the fifth and sixth in 8, bits 2 i and 2 i + 1. Then come the scales, each followed by its minimum where
 * the form has them: 16-bit floats, or int8 that the float16 of a block of 256 terms multiplies, which come last.
 *
 * A matrix that is given as floats is bf16, (rows, K). */
#ifndef CUDA_PACKED_H
#define CUDA_PACKED_H

#include "block_types.h"
#include "product.h"

enum { BF16_BITS = 16 };

/* Rows that follow one another and have one form. */
typedef struct packed_part {
    int64_t at, row_bytes; /* from the matrix's head; a multiple of 16 */
    int32_t rows;
    int32_t bits; /* BF16_BITS: not rounded */
    int32_t zero;
    int32_t upper, scales,
        blocks;       /* in a row, in bytes from its begin: fifth bits, scales, float16 of blocks */
    int32_t of_16;    /* 1: scales are of 16 terms, else 32 */
    int32_t of_block; /* 1: they are int8, else float16 */
    int32_t has_minima;
} packed_part;

/* What comes before the rows. */
typedef struct alignas(16) packed_head {
    int64_t bytes; /* of the whole matrix */
    int64_t n_parts;
    packed_part parts[GPT_MAX_STACKED];
    int64_t unused[9];
} packed_head;
static_assert(sizeof(packed_head) == 256, "rows are aligned as the head is");

/* Rows of a form; the last block of each may be of fewer than 256 terms. */
static inline packed_part packed_part_of(quant_form f, int rows, int cols, int64_t at) {
    int groups = (int)div_up(cols, QUANT_GROUP), scales = groups * (QUANT_GROUP / f.group) * f.rows;
    bool of_block = f.scale == SCALE_INT8;
    packed_part p = {};
    p.at = at;
    p.rows = rows;
    p.bits = f.bits;
    p.zero = f.zero;
    p.upper = groups * (f.bits == 8 ? 32 : 16);
    p.scales = p.upper + groups * (f.bits == 5 ? 4 : f.bits == 6 ? 8 : 0);
    p.blocks = p.scales + scales * (of_block ? 1 : (int)sizeof(uint16_t));
    p.of_16 = f.group == 16;
    p.of_block = of_block;
    p.has_minima = f.rows == 2;
    int64_t blocks = of_block ? div_up(cols, QUANT_BLOCK) * f.rows * (int64_t)sizeof(uint16_t) : 0;
    p.row_bytes = div_up(p.blocks + blocks, 16) * 16;
    return p;
}

/* The place of a row, and its part; without bits past the end, where rows are zeros. */
typedef struct packed_row {
    packed_part part;
    const uint8_t *at;
} packed_row;

static __device__ inline packed_row packed_row_of(const packed_head *head, int row) {
    for (int i = 0; i < head->n_parts; row -= head->parts[i++].rows)
        if (row < head->parts[i].rows) {
            const packed_part *p = &head->parts[i];
            return {*p, (const uint8_t *)head + p->at + row * p->row_bytes};
        }
    return {};
}

/* The scale of 16 terms, or their minimum, at entry `at` of a row's. */
static __device__ inline float packed_scale(const packed_part &p, const uint8_t *row, int at,
                                            int block) {
    if (!p.of_block) return half_float(((const uint16_t *)(row + p.scales))[at]);
    return half_float(((const uint16_t *)(row + p.blocks))[block]) *
           (float)((const int8_t *)(row + p.scales))[at];
}

/* The integers of group g of a row. BITS: 4, 5, 6 or 8. */
template <int BITS>
static __device__ inline void packed_integers(float (&q)[QUANT_GROUP], const packed_part &p,
                                              const uint8_t *row, int g) {
    typedef packed<uint32_t, 4> words;
    if (BITS == 8) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            words w = *(const words *)(row + g * 32 + 16 * h);
#pragma unroll
            for (int i = 0; i < 16; i++) q[16 * h + i] = (float)(w.x[i / 4] >> i % 4 * 8 & 255);
        }
        return;
    }
    words w = *(const words *)(row + g * 16);
    uint32_t upper[2] = {};
    if (BITS == 5) upper[0] = *(const uint32_t *)(row + p.upper + g * 4);
    if (BITS == 6) {
        packed<uint32_t, 2> u = *(const packed<uint32_t, 2> *)(row + p.upper + g * 8);
        upper[0] = u.x[0], upper[1] = u.x[1];
    }
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++) {
        uint32_t x = w.x[k % 16 / 4] >> (k % 4 * 8 + k / 16 * 4) & 15;
        if (BITS == 5) x |= (upper[0] >> k & 1) << 4;
        if (BITS == 6) x |= (upper[k / 16] >> k % 16 * 2 & 3) << 4;
        q[k] = (float)x;
    }
}

/* The 32 numbers of group g of a row: rounded once, since scales times integers are exact. */
template <int BITS>
static __device__ inline void packed_group(float (&q)[QUANT_GROUP], const packed_part &p,
                                           const uint8_t *row, int g) {
    packed_integers<BITS>(q, p, row, g);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int at = p.of_16 ? 2 * g + h : g, block = g / (QUANT_BLOCK / QUANT_GROUP);
        int step = 1 + p.has_minima;
        float scale = packed_scale(p, row, at * step, block * step);
        float least = p.has_minima ? packed_scale(p, row, at * step + 1, block * step + 1) : 0;
#pragma unroll
        for (int k = 16 * h; k < 16 * h + 16; k++) q[k] = fmaf(scale, q[k] - (float)p.zero, least);
    }
}

/* call(BITS), where the number of bits is a constant. */
#define BY_BITS(bits, call)                                                                        \
    switch (bits) {                                                                                \
    case 4:                                                                                        \
        call(4);                                                                                   \
        break;                                                                                     \
    case 5:                                                                                        \
        call(5);                                                                                   \
        break;                                                                                     \
    case 6:                                                                                        \
        call(6);                                                                                   \
        break;                                                                                     \
    case 8:                                                                                        \
        call(8);                                                                                   \
        break;                                                                                     \
    case BF16_BITS:                                                                                \
        call(BF16_BITS);                                                                           \
        break;                                                                                     \
    }

/* A bf16 row has K numbers, which may end within the group. */
static __device__ inline void bf16_group(float (&q)[QUANT_GROUP], const uint8_t *row, int g,
                                         int K) {
    const elem *x = (const elem *)row + (int64_t)g * QUANT_GROUP;
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++) q[k] = g * QUANT_GROUP + k < K ? to_float(x[k]) : 0;
}

template <int BITS>
static __device__ inline void read_group(float (&q)[QUANT_GROUP], const packed_row &r, int g,
                                         int K) {
    if constexpr (BITS == BF16_BITS)
        bf16_group(q, r.at, g, K);
    else
        packed_group<BITS>(q, r.part, r.at, g);
}

/* Rows first to first + n - 1 of w (rows, K) as the bf16 table has them: to (n, K). */
#define cuda_unpack CUDA_FORM_NAME(unpack)
void cuda_unpack(gpt_ctx *ctx, elem *to, const void *w, int first, int n, int rows, int K);

/* blocks_packed.cu: slots of gpt_ops. */
extern "C" {
size_t cuda_blocks_bytes(const gpt_segment *segment);
void cuda_blocks_pack(gpt_ctx *ctx, const gpt_segment *segment, int part, const void *blocks);
void cuda_blocks_unpack(gpt_ctx *ctx, float *out, const gpt_segment *segment, const int32_t *rows,
                        int n);
size_t cuda_weight_bytes(gpt_ctx *ctx, const weight *w);
}

#endif
