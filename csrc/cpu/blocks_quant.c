/* blocks_quant.c: blocks of GGUF's types become panels of quant.h, number by number: nothing is
 * rounded. The layouts of blocks are those of ggml (ggml/src/ggml-quants.c). */
#include "weights_quant.h"

/* One block: its integers as the form has them, its scales and minima. */
typedef struct block_parts {
    uint8_t u[QUANT_BLOCK];
    int8_t scale[QUANT_BLOCK / 16], least[QUANT_BLOCK / 16]; /* of each group, in forms of 256 */
    uint16_t d, d_least; /* float16. The minimum is d_least, or d_least times least */
} block_parts;

static uint16_t half_at(const uint8_t *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}

/* Integers of `bits` bits in runs of `width` bytes: the lowest bits of a run are its first integers.
 * They are put above the `shift` bits that are there. */
static void planes(uint8_t *u, const uint8_t *packed, int n, int width, int bits, int shift) {
    int per_run = width * 8 / bits, most = (1 << bits) - 1;
    for (int k = 0; k < n; k++) {
        int run = k / per_run, plane = k % per_run / width;
        u[k] |= (uint8_t)((packed[run * width + k % width] >> plane * bits & most) << shift);
    }
}

/* ---- types of 32 ---- */

static void block_q4_0(const uint8_t *b, block_parts *out) {
    out->d = half_at(b);
    planes(out->u, b + 2, 32, 16, 4, 0);
}

static void block_q4_1(const uint8_t *b, block_parts *out) {
    out->d = half_at(b), out->d_least = half_at(b + 2);
    planes(out->u, b + 4, 32, 16, 4, 0);
}

/* Bit i of 32 is the fifth of integer i. */
static void fifth_bits(uint8_t *u, const uint8_t *bits) {
    for (int k = 0; k < 32; k++) u[k] |= (uint8_t)((bits[k / 8] >> k % 8 & 1) << 4);
}

static void block_q5_0(const uint8_t *b, block_parts *out) {
    out->d = half_at(b);
    planes(out->u, b + 6, 32, 16, 4, 0);
    fifth_bits(out->u, b + 2);
}

static void block_q5_1(const uint8_t *b, block_parts *out) {
    out->d = half_at(b), out->d_least = half_at(b + 2);
    planes(out->u, b + 8, 32, 16, 4, 0);
    fifth_bits(out->u, b + 4);
}

static void block_q8_0(const uint8_t *b, block_parts *out) {
    out->d = half_at(b);
    for (int k = 0; k < 32; k++) out->u[k] = b[2 + k] ^ 0x80;
}

/* Integers that stand for others. */
static void nonlinear(uint8_t *u, int n) {
    static const int8_t steps[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};
    for (int k = 0; k < n; k++) u[k] = (uint8_t)(steps[u[k]] + 128);
}

static void block_iq4_nl(const uint8_t *b, block_parts *out) {
    block_q4_0(b, out);
    nonlinear(out->u, 32);
}

/* ---- types of 256 ---- */

static uint16_t negative(uint16_t half) {
    return half ^ 0x8000;
}

static void block_q2_k(const uint8_t *b, block_parts *out) {
    out->d = half_at(b + 80), out->d_least = negative(half_at(b + 82));
    for (int g = 0; g < 16; g++) out->scale[g] = b[g] & 15, out->least[g] = (int8_t)(b[g] >> 4);
    planes(out->u, b + 16, 256, 32, 2, 0);
}

static void block_q3_k(const uint8_t *b, block_parts *out) {
    uint8_t scale[16] = {0};
    out->d = half_at(b + 108);
    planes(scale, b + 96, 16, 8, 4, 0);
    planes(scale, b + 104, 16, 4, 2, 4);
    for (int g = 0; g < 16; g++) out->scale[g] = (int8_t)(scale[g] - 32);
    planes(out->u, b + 32, 256, 32, 2, 0);
    planes(out->u, b, 256, 32, 1, 2);
}

/* 8 scales and 8 minima of 6 bits. */
static void scales_k(const uint8_t *b, block_parts *out) {
    out->d = half_at(b), out->d_least = negative(half_at(b + 2));
    for (int g = 0; g < 4; g++) {
        uint8_t first = b[4 + g], second = b[8 + g], third = b[12 + g];
        out->scale[g] = first & 63, out->least[g] = second & 63;
        out->scale[g + 4] = (int8_t)((third & 15) | (first >> 2 & 48));
        out->least[g + 4] = (int8_t)(third >> 4 | (second >> 2 & 48));
    }
}

static void block_q4_k(const uint8_t *b, block_parts *out) {
    scales_k(b, out);
    planes(out->u, b + 16, 256, 32, 4, 0);
}

static void block_q5_k(const uint8_t *b, block_parts *out) {
    scales_k(b, out);
    planes(out->u, b + 48, 256, 32, 4, 0);
    planes(out->u, b + 16, 256, 32, 1, 4);
}

static void block_q6_k(const uint8_t *b, block_parts *out) {
    out->d = half_at(b + 208);
    memcpy(out->scale, b + 192, 16);
    planes(out->u, b, 256, 64, 4, 0);
    planes(out->u, b + 128, 256, 32, 2, 4);
}

static void block_iq4_xs(const uint8_t *b, block_parts *out) {
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
    int type, form; /* enum gpt_block; of quant.h */
    int size, bytes;
    void (*take)(const uint8_t *block, block_parts *out); /* which is zero */
} block_type;

static const block_type types[] = {
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

static const block_type *type_of(int type) {
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (types[i].type == type) return &types[i];
    return NULL;
}

/* The matrix's head; without bytes where a type is not known, or its blocks do not fill rows. */
static quant_head lay_out(const gpt_segment *s) {
    quant_head head = {.n_parts = s->n_stacked};
    int64_t at = sizeof head;
    for (int part = 0; part < s->n_stacked; part++) {
        const block_type *t = type_of(s->stacked[part].block);
        if (!t || s->cols % t->size) return (quant_head){0};
        head.parts[part] = (quant_part){.form = t->form, .rows = s->stacked[part].rows, .at = at};
        at += quant_part_bytes(quant_forms[t->form], s->stacked[part].rows, s->cols);
    }
    head.bytes = at;
    return head;
}

size_t quant_blocks_bytes(const gpt_segment *s) {
    return (size_t)lay_out(s).bytes;
}

size_t quant_blocks_given(const gpt_segment *s, int part) {
    const block_type *t = type_of(s->stacked[part].block);
    return (size_t)s->stacked[part].rows * (size_t)(s->cols / t->size * t->bytes);
}

/* ---- packing ---- */

typedef struct packing {
    const block_type *type;
    const uint8_t *blocks; /* (rows, cols / size) */
    uint8_t *panels;
    int rows, cols;
} packing;

/* Scales, or minima in row 1, of column j. */
static void put_scale(quant_form f, uint8_t *panel, int K, int group, int row, int j, int value) {
    int64_t at = (int64_t)(group * f.rows + row) * PANEL + j;
    uint8_t *scales = panel + quant_scales_at(f, K);
    if (f.scale == SCALE_INT8)
        scales[at] = (uint8_t)value;
    else
        ((uint16_t *)scales)[at] = (uint16_t)value;
}

static void put_block(const packing *a, uint8_t *panel, int j, int first, const block_parts *b) {
    quant_form f = quant_forms[a->type->form];
    for (int k = 0; k < a->type->size; k += QUANT_GROUP)
        quant_put(f, panel + (first + k) / QUANT_GROUP * quant_chunk_bytes(f), b->u + k, j);
    for (int g = 0; g < a->type->size / f.group; g++) {
        int at = first / f.group + g, whole = f.scale == SCALE_INT8;
        put_scale(f, panel, a->cols, at, 0, j, whole ? b->scale[g] : b->d);
        if (f.rows == 2) put_scale(f, panel, a->cols, at, 1, j, whole ? b->least[g] : b->d_least);
    }
    if (f.scale != SCALE_INT8) return;
    uint16_t *blocks = (uint16_t *)(panel + quant_blocks_at(f, a->cols)) +
                       (int64_t)first / QUANT_BLOCK * f.rows * PANEL;
    blocks[j] = b->d;
    if (f.rows == 2) blocks[PANEL + j] = b->d_least;
}

static void pack_quantized(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const packing *a = p;
    const block_type *t = a->type;
    int64_t size = quant_panel_bytes(quant_forms[t->form], a->cols);
    int64_t row_bytes = (int64_t)a->cols / t->size * t->bytes;
    for (int64_t i = begin; i < end; i++) {
        uint8_t *panel = a->panels + i * size;
        memset(panel, 0, (size_t)size);
        for (int j = 0; j < PANEL && i * PANEL + j < a->rows; j++) {
            const uint8_t *block = a->blocks + (i * PANEL + j) * row_bytes;
            for (int k = 0; k < a->cols; k += t->size, block += t->bytes) {
                block_parts b = {0};
                t->take(block, &b);
                put_block(a, panel, j, k, &b);
            }
        }
    }
}

void quant_blocks_pack(gpt_ctx *ctx, const gpt_segment *s, int part, const void *blocks) {
    quant_head *head = s->packed;
    *head = lay_out(s);
    packing a = {.type = type_of(s->stacked[part].block),
                 .blocks = blocks,
                 .panels = (uint8_t *)head + head->parts[part].at,
                 .rows = s->stacked[part].rows,
                 .cols = s->cols};
    cpu_parallel(ctx, pack_quantized, &a, quant_panels(a.rows), 4);
}

/* ---- unpacking ---- */

typedef struct unpacking {
    float *out;
    const quant_head *head;
    const int32_t *rows;
    int cols;
} unpacking;

static void unpack_row(const unpacking *a, int row, float *out) {
    quant_form f = {0};
    int in_part = 0;
    const uint8_t *panel = quant_panel_of(a->head, a->cols, row, &f, &in_part);
    for (int k = 0; k < a->cols; k += QUANT_GROUP)
        quant_terms(f, panel, a->cols, k, in_part % PANEL, out + k);
}

static void unpack_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const unpacking *a = p;
    for (int64_t i = begin; i < end; i++)
        unpack_row(a, a->rows ? a->rows[i] : (int)i, a->out + i * a->cols);
}

void quant_blocks_unpack(gpt_ctx *ctx, float *out, const gpt_segment *s, const int32_t *rows,
                         int n) {
    unpacking a = {.out = out, .head = s->packed, .rows = rows, .cols = s->cols};
    cpu_parallel(ctx, unpack_rows, &a, n, 16);
}
