/* weights_quant.c: weight matrices rounded to 8 or 4 bits, as quant.h describes. */
#include "weights_quant.h"

#include <math.h>

/* ---- matrices that stay bf16 ---- */

CPU_ACTS_OP(weights_pack);
size_t CPU_ACTS_NAME(weights_bytes)(int rows, int cols, int parts, int training);

size_t quant_bf16_bytes(int rows, int cols, int parts, int training) {
    return sizeof(quant_head) + CPU_ACTS_NAME(weights_bytes)(rows, cols, parts, training);
}

void quant_bf16_pack(gpt_ctx *ctx, const weights_pack *op) {
    gpt_segment inner = *op->segment;
    weights_pack plain = {
        .w = op->w, .segment = &inner, .given = op->given, .training = op->training};
    quant_head *head = inner.packed;
    *head = (quant_head){
        .bytes = (int64_t)quant_bf16_bytes(inner.rows, inner.cols, inner.parts, op->training),
        .n_parts = 1,
        .parts = {{.form = FORM_BF16, .rows = inner.rows, .at = sizeof *head}}};
    inner.packed = head + 1;
    CPU_ACTS_NAME(weights_pack)(ctx, &plain);
}

/* ---- rounding ---- */

/* A group of one row: numbers with zeros past its end, and what they become. */
typedef struct group {
    float x[QUANT_GROUP];
    int32_t q[QUANT_GROUP]; /* -127 to 127 */
} group;

/* Up to the next bf16, so that nothing grows past the largest integer. */
static float scale_above(float x) {
    float scale = bf16_float(bf16_round(x));
    return fabsf(scale) < fabsf(x) ? bf16_float((bf16)(bf16_round(x) + 1)) : scale;
}

/* q, and the scale: the largest number becomes the largest integer. */
static float round_group(group *g) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf largest = vf_set(0);
    vi bad = {0};
    for (int i = 0; i < QUANT_GROUP; i += LANES) {
        vf x = vf_load(g->x + i);
        largest = vf_max(largest, vf_max(x, -x));
        bad |= not_finite(x);
    }
    if (any_lane(bad)) return NAN; /* as all sums with this group are */
    float scale = scale_above(vf_max_lane(largest) / 127);
    vf inverse = vf_set(scale_inverse(scale));
    for (int i = 0; i < QUANT_GROUP; i += LANES) {
        vi q = __builtin_convertvector(vf_load(g->x + i) * inverse + shift - shift, vi);
        memcpy(g->q + i, &q, sizeof q);
    }
    return scale;
}

/* A matrix to be rounded: its parts are as long as each other. */
typedef struct rounding {
    const weights_pack *op;
    int form;
    quant_head *head;
} rounding;

/* Row j of a panel, from w (K). */
static void put_groups(uint8_t *panel, int j, const float *w, int K) {
    quant_form f = quant_forms[FORM_INT8];
    for (int k = 0; k < K; k += QUANT_GROUP) {
        group g = {{0}, {0}};
        uint8_t u[QUANT_GROUP];
        memcpy(g.x, w + k, sizeof(float) * (size_t)cpu_min(QUANT_GROUP, K - k));
        float scale = round_group(&g);
        for (int h = 0; h < QUANT_GROUP; h++) u[h] = (uint8_t)(g.q[h] + f.zero);
        quant_place p = quant_place_of(f, K, k / QUANT_GROUP);
        quant_put(f, panel + p.chunks, u, j);
        ((bf16 *)(panel + p.scales))[j] = bf16_round(scale);
    }
}

/* The rows of a panel, from w (rows, K). The last blocks may be of fewer than 256 terms. */
static void put_blocks(uint8_t *panel, int rows, const float *w, int K) {
    for (int k = 0; k < K; k += QUANT_BLOCK) {
        block_parts b[PANEL] = {0};
        int n = cpu_min(QUANT_BLOCK, K - k);
        quant_search_blocks(b, w + k, K, rows, n);
        for (int j = 0; j < rows; j++)
            quant_put_block(quant_forms[FORM_Q4_K], panel, K, j, k, n, &b[j]);
    }
}

static void pack_quantized(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const rounding *a = p;
    const gpt_segment *s = a->op->segment;
    int part_rows = s->rows / s->parts, per_part = (int)quant_panels(part_rows), K = s->cols;
    int64_t size = quant_panel_bytes(quant_forms[a->form], K);
    for (int64_t i = begin; i < end; i++) {
        uint8_t *panel = (uint8_t *)a->head + a->head->parts[0].at + i * size;
        int in_part = (int)i % per_part * PANEL, rows = cpu_min(PANEL, part_rows - in_part);
        const float *w = a->op->w + (int64_t)((int)i / per_part * part_rows + in_part) * K;
        memset(panel, 0, (size_t)size);
        if (a->form == FORM_Q4_K) put_blocks(panel, rows, w, K);
        for (int j = 0; j < rows && a->form == FORM_INT8; j++)
            put_groups(panel, j, w + (int64_t)j * K, K);
    }
}

size_t quant_rounded_bytes(int form, int rows, int cols, int parts) {
    return sizeof(quant_head) +
           (size_t)(parts * quant_part_bytes(quant_forms[form], rows / parts, cols));
}

void quant_round(gpt_ctx *ctx, int form, const weights_pack *op) {
    gpt_segment given = *op->segment; /* without padding rows, which are zeros */
    const gpt_segment *s = &given;
    if (op->given) given.rows = op->given;
    weights_pack pack = {.w = op->w, .segment = s};
    rounding a = {.op = &pack, .form = form, .head = s->packed};
    int part_rows = s->rows / s->parts;
    int64_t part_bytes = quant_part_bytes(quant_forms[form], part_rows, s->cols);
    *a.head = (quant_head){.bytes = (int64_t)quant_rounded_bytes(form, s->rows, s->cols, s->parts),
                           .n_parts = s->parts};
    for (int part = 0; part < s->parts; part++)
        a.head->parts[part] = (quant_part){
            .form = form, .rows = part_rows, .at = (int64_t)sizeof *a.head + part * part_bytes};
    cpu_parallel(ctx, pack_quantized, &a, s->parts * quant_panels(part_rows), 4);
}

size_t quant_weight_bytes(gpt_ctx *ctx, const weight *w) {
    (void)ctx;
    return (size_t)((const quant_head *)w)->bytes;
}
