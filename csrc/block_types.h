/* block_types.h: GGUF's types of blocks, as the numbers that both backends keep: integers, scales and minima.
 * The layouts of blocks are those of ggml (ggml/src/ggml-quants.c). A weight is scale * (u - zero) + minimum. */
#ifndef GPT_BLOCK_TYPES_H
#define GPT_BLOCK_TYPES_H

#include "ops.h"

#include <string.h>

/* Terms of a sum, and of a block of the types that have the most. */
enum { QUANT_GROUP = 32, QUANT_BLOCK = 256 };

/* How scales are stored. */
enum { SCALE_BF16, SCALE_FP16, SCALE_INT8 };

typedef struct quant_form {
    int bits, zero;
    int group; /* terms of a scale: 32 or 16 */
    int scale; /* SCALE_BF16 or another */
    int rows;  /* of a group's scales: 2 with minima, else 1 */
} quant_form;

/* name, bits, zero, group, scale, rows. The first is ours, the others those of GGUF's types. */
#define QUANT_FORMS(X)                                                                             \
    X(INT8, 8, 128, 32, SCALE_BF16, 1)                                                             \
    X(Q4_0, 4, 8, 32, SCALE_FP16, 1)                                                               \
    X(Q4_1, 4, 0, 32, SCALE_FP16, 2)                                                               \
    X(Q5_0, 5, 16, 32, SCALE_FP16, 1)                                                              \
    X(Q5_1, 5, 0, 32, SCALE_FP16, 2)                                                               \
    X(Q8_0, 8, 128, 32, SCALE_FP16, 1) /* IQ4_NL too */                                            \
    X(Q2_K, 4, 0, 16, SCALE_INT8, 2)                                                               \
    X(Q3_K, 4, 4, 16, SCALE_INT8, 1)                                                               \
    X(Q4_K, 4, 0, 32, SCALE_INT8, 2)                                                               \
    X(Q5_K, 5, 0, 32, SCALE_INT8, 2)                                                               \
    X(Q6_K, 6, 32, 16, SCALE_INT8, 1)                                                              \
    X(IQ4_XS, 8, 128, 32, SCALE_INT8, 1)

enum {
#define FORM(name, ...) FORM_##name,
    QUANT_FORMS(FORM)
#undef FORM
        FORM_BF16, /* a matrix that is not rounded */
};

static const quant_form quant_forms[] = {
#define FORM(name, ...) {__VA_ARGS__},
    QUANT_FORMS(FORM)
#undef FORM
};

/* ---- blocks ---- */

/* One block: its integers as the form has them, its scales and minima. */
typedef struct block_parts {
    uint8_t u[QUANT_BLOCK];
    int8_t scale[QUANT_BLOCK / 16], least[QUANT_BLOCK / 16]; /* of each group, in forms of 256 */
    uint16_t d, d_least; /* float16. The minimum is d_least, or d_least times least */
} block_parts;

static inline uint16_t half_at(const uint8_t *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}

/* Integers of `bits` bits in runs of `width` bytes: the lowest bits of a run are its first integers.
 * They are put above the `shift` bits that are there. */
static inline void planes(uint8_t *u, const uint8_t *packed, int n, int width, int bits,
                          int shift) {
    int per_run = width * 8 / bits, most = (1 << bits) - 1;
    for (int k = 0; k < n; k++) {
        int run = k / per_run, plane = k % per_run / width;
        u[k] |= (uint8_t)((packed[run * width + k % width] >> plane * bits & most) << shift);
    }
}

/* ---- types of 32 ---- */

static inline void block_q4_0(const uint8_t *b, block_parts *out) {
    out->d = half_at(b);
    planes(out->u, b + 2, 32, 16, 4, 0);
}

static inline void block_q4_1(const uint8_t *b, block_parts *out) {
    out->d = half_at(b), out->d_least = half_at(b + 2);
    planes(out->u, b + 4, 32, 16, 4, 0);
}

/* Bit i of 32 is the fifth of integer i. */
static inline void fifth_bits(uint8_t *u, const uint8_t *bits) {
    for (int k = 0; k < 32; k++) u[k] |= (uint8_t)((bits[k / 8] >> k % 8 & 1) << 4);
}

static inline void block_q5_0(const uint8_t *b, block_parts *out) {
    out->d = half_at(b);
    planes(out->u, b + 6, 32, 16, 4, 0);
    fifth_bits(out->u, b + 2);
}

static inline void block_q5_1(const uint8_t *b, block_parts *out) {
    out->d = half_at(b), out->d_least = half_at(b + 2);
    planes(out->u, b + 8, 32, 16, 4, 0);
    fifth_bits(out->u, b + 4);
}

static inline void block_q8_0(const uint8_t *b, block_parts *out) {
    out->d = half_at(b);
    for (int k = 0; k < 32; k++) out->u[k] = b[2 + k] ^ 0x80;
}

/* Integers that stand for others. */
static inline void nonlinear(uint8_t *u, int n) {
    static const int8_t steps[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};
    for (int k = 0; k < n; k++) u[k] = (uint8_t)(steps[u[k]] + 128);
}

static inline void block_iq4_nl(const uint8_t *b, block_parts *out) {
    block_q4_0(b, out);
    nonlinear(out->u, 32);
}

/* ---- types of 256 ---- */

static inline uint16_t negative(uint16_t half) {
    return half ^ 0x8000;
}

static inline void block_q2_k(const uint8_t *b, block_parts *out) {
    out->d = half_at(b + 80), out->d_least = negative(half_at(b + 82));
    for (int g = 0; g < 16; g++) out->scale[g] = b[g] & 15, out->least[g] = (int8_t)(b[g] >> 4);
    planes(out->u, b + 16, 256, 32, 2, 0);
}

static inline void block_q3_k(const uint8_t *b, block_parts *out) {
    uint8_t scale[16] = {0};
    out->d = half_at(b + 108);
    planes(scale, b + 96, 16, 8, 4, 0);
    planes(scale, b + 104, 16, 4, 2, 4);
    for (int g = 0; g < 16; g++) out->scale[g] = (int8_t)(scale[g] - 32);
    planes(out->u, b + 32, 256, 32, 2, 0);
    planes(out->u, b, 256, 32, 1, 2);
}

/* 8 scales and 8 minima of 6 bits. */
static inline void scales_k(const uint8_t *b, block_parts *out) {
    out->d = half_at(b), out->d_least = negative(half_at(b + 2));
    for (int g = 0; g < 4; g++) {
        uint8_t first = b[4 + g], second = b[8 + g], third = b[12 + g];
        out->scale[g] = first & 63, out->least[g] = second & 63;
        out->scale[g + 4] = (int8_t)((third & 15) | (first >> 2 & 48));
        out->least[g + 4] = (int8_t)(third >> 4 | (second >> 2 & 48));
    }
}

static inline void block_q4_k(const uint8_t *b, block_parts *out) {
    scales_k(b, out);
    planes(out->u, b + 16, 256, 32, 4, 0);
}

static inline void block_q5_k(const uint8_t *b, block_parts *out) {
    scales_k(b, out);
    planes(out->u, b + 48, 256, 32, 4, 0);
    planes(out->u, b + 16, 256, 32, 1, 4);
}

static inline void block_q6_k(const uint8_t *b, block_parts *out) {
    out->d = half_at(b + 208);
    memcpy(out->scale, b + 192, 16);
    planes(out->u, b, 256, 64, 4, 0);
    planes(out->u, b + 128, 256, 32, 2, 4);
}

static inline void block_iq4_xs(const uint8_t *b, block_parts *out) {
    uint8_t scale[8] = {0};
    out->d = half_at(b);
    planes(scale, b + 4, 8, 1, 4, 0);
    planes(scale, b + 2, 8, 1, 2, 4);
    for (int g = 0; g < 8; g++) out->scale[g] = (int8_t)(scale[g] - 32);
    planes(out->u, b + 8, 256, 16, 4, 0);
    nonlinear(out->u, 256);
}

/* ---- the table ---- */

typedef struct block_type {
    int type, form; /* enum gpt_block; FORM_Q4_0 or another */
    int size, bytes;
    void (*take)(const uint8_t *block, block_parts *out); /* which is zero */
} block_type;

static const block_type block_types[] = {
    {GPT_BLOCK_Q4_0, FORM_Q4_0, 32, 18, block_q4_0},
    {GPT_BLOCK_Q4_1, FORM_Q4_1, 32, 20, block_q4_1},
    {GPT_BLOCK_Q5_0, FORM_Q5_0, 32, 22, block_q5_0},
    {GPT_BLOCK_Q5_1, FORM_Q5_1, 32, 24, block_q5_1},
    {GPT_BLOCK_Q8_0, FORM_Q8_0, 32, 34, block_q8_0},
    {GPT_BLOCK_Q2_K, FORM_Q2_K, 256, 84, block_q2_k},
    {GPT_BLOCK_Q3_K, FORM_Q3_K, 256, 110, block_q3_k},
    {GPT_BLOCK_Q4_K, FORM_Q4_K, 256, 144, block_q4_k},
    {GPT_BLOCK_Q5_K, FORM_Q5_K, 256, 176, block_q5_k},
    {GPT_BLOCK_Q6_K, FORM_Q6_K, 256, 210, block_q6_k},
    {GPT_BLOCK_IQ4_NL, FORM_Q8_0, 32, 18, block_iq4_nl},
    {GPT_BLOCK_IQ4_XS, FORM_IQ4_XS, 256, 136, block_iq4_xs},
};

/* NULL where a type is not known. */
static inline const block_type *block_type_of(int type) {
    for (size_t i = 0; i < sizeof block_types / sizeof *block_types; i++)
        if (block_types[i].type == type) return &block_types[i];
    return NULL;
}

/* Bytes of the blocks of run `part` of a matrix's rows. */
static inline size_t block_bytes(const gpt_segment *s, int part) {
    const block_type *t = block_type_of(s->stacked[part].block);
    return (size_t)s->stacked[part].rows * (size_t)(s->cols / t->size * t->bytes);
}

/* A float16 number. */
GPT_EVERYWHERE static inline float half_float(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, size = (uint32_t)(x & 0x7fff) << 13;
    float value;
    memcpy(&value, &size, sizeof value);
    value *= 0x1p112f; /* the difference of the exponents' biases; subnormal numbers too */
    memcpy(&size, &value, sizeof size);
    if ((x & 0x7c00) == 0x7c00) size |= 0x7f800000; /* infinite, or not a number */
    size |= sign;
    memcpy(&value, &size, sizeof value);
    return value;
}

/* The nearest float16 of x >= 0; infinity from 65520 on. */
GPT_EVERYWHERE static inline uint16_t half_of(float x) {
    uint32_t bits;
    int subnormal = x < 0x1p-14f;
    if (subnormal) x = x * 0x1p24f + 0x1p23f; /* whose lower bits are an integer */
    memcpy(&bits, &x, sizeof bits);
    if (subnormal) return (uint16_t)bits;
    if (!(x < 65520)) return 0x7c00;
    return (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

#endif
