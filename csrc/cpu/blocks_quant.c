/* blocks_quant.c: blocks of GGUF's types become panels of quant.h, number by number: nothing is
 * rounded. */
#include "weights_quant.h"

/* The matrix's head; without bytes where a type is not known, or its blocks do not fill rows. */
static quant_head lay_out(const gpt_segment *s) {
    quant_head head = {.n_parts = s->n_stacked};
    int64_t at = sizeof head;
    for (int part = 0; part < s->n_stacked; part++) {
        const block_type *t = block_type_of(s->stacked[part].block);
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

/* ---- packing ---- */

typedef struct packing {
    const block_type *type;
    const uint8_t *blocks; /* (rows, cols / size) */
    uint8_t *panels;
    int rows, cols;
} packing;

/* The scale, or minimum in row 1, of half `half` of a group, and of its block. */
static void put_scale(quant_form f, uint8_t *panel, quant_place p, int half, int row, int j,
                      int integer, uint16_t number) {
    int at = (half * f.rows + row) * PANEL + j;
    if (f.scale == SCALE_INT8) {
        panel[p.scales + at] = (uint8_t)integer;
        ((uint16_t *)(panel + p.blocks))[row * PANEL + j] = number;
    } else {
        ((uint16_t *)(panel + p.scales))[at] = number;
    }
}

void quant_put_block(quant_form f, uint8_t *panel, int K, int j, int first, int size,
                     const block_parts *b) {
    for (int k = 0; k < size; k += QUANT_GROUP) {
        quant_place p = quant_place_of(f, K, (first + k) / QUANT_GROUP);
        quant_put(f, panel + p.chunks, b->u + k, j);
        for (int half = 0; half < quant_halves(f); half++) {
            int g = k / f.group + half;
            put_scale(f, panel, p, half, 0, j, b->scale[g], b->d);
            if (f.rows == 2) put_scale(f, panel, p, half, 1, j, b->least[g], b->d_least);
        }
    }
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
                quant_put_block(quant_forms[t->form], panel, a->cols, j, k, t->size, &b);
            }
        }
    }
}

void quant_blocks_pack(gpt_ctx *ctx, const gpt_segment *s, int part, const void *blocks) {
    quant_head *head = s->packed;
    *head = lay_out(s);
    packing a = {.type = block_type_of(s->stacked[part].block),
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
