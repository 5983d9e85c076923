/* weights_quant.c: weight matrices rounded to 8 or 4 bits, as quant.h describes. */
#include "quant.h"

#include <math.h>

enum { LARGEST = CPU_QUANT == 8 ? 127 : 7 };

size_t cpu_weights_bytes(int rows, int cols, int parts, int training) {
    (void)training;
    int64_t panels = parts * quant_panels(rows / parts);
    return (size_t)(panels * quant_panel_bytes(cols));
}

/* A group of one row: numbers with zeros past its end, and what they become. */
typedef struct group {
    float x[QUANT_GROUP];
    int32_t q[QUANT_GROUP]; /* -LARGEST - 1 to LARGEST */
} group;

/* Up to the next bf16, so that nothing grows past the largest integer. */
static float scale_above(float x) {
    float scale = bf16_float(bf16_round(x));
    return fabsf(scale) < fabsf(x) ? bf16_float((bf16)(bf16_round(x) + 1)) : scale;
}

/* q, and the scale: the largest number becomes the largest integer, with 4 bits that of the longer
 * side. (Searching for the scale with the least error made no model better that was tried.) */
static float round_group(group *g) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf above = vf_set(0), below = vf_set(0);
    vi bad = {0};
    for (int i = 0; i < QUANT_GROUP; i += LANES) {
        above = vf_max(above, vf_load(g->x + i));
        below = vf_max(below, -vf_load(g->x + i));
        bad |= not_finite(vf_load(g->x + i));
    }
    if (any_lane(bad)) return NAN; /* as all sums with this group are */
    float largest = vf_max_lane(above), least = -vf_max_lane(below);
    float extreme = largest > -least ? largest : least;
    float scale = scale_above(CPU_QUANT == 8 ? extreme / LARGEST : extreme / -(LARGEST + 1));
    vf inverse = vf_set(scale_inverse(scale));
    for (int i = 0; i < QUANT_GROUP; i += LANES) {
        vf n = vf_load(g->x + i) * inverse + shift - shift;
        vi q = __builtin_convertvector(-vf_max(-n, vf_set(-(float)LARGEST)), vi);
        memcpy(g->q + i, &q, sizeof q);
    }
    return scale;
}

/* The group becomes column j of its chunks. */
static void put_group(uint8_t *chunks, const group *g, int j) {
    uint8_t u[QUANT_GROUP];
    for (int k = 0; k < QUANT_GROUP; k++) u[k] = (uint8_t)(g->q[k] + ZERO);
    for (int k = CHUNKS * QUAD; k < QUANT_GROUP; k++) u[k - CHUNKS * QUAD] |= (uint8_t)(u[k] << 4);
    for (int i = 0; i < CHUNKS; i++)
        memcpy(chunks + i * CHUNK_BYTES + j * QUAD, u + i * QUAD, QUAD);
}

static void pack_panels(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const weights_pack *a = p;
    const gpt_segment *s = a->segment;
    int part_rows = s->rows / s->parts, per_part = (int)quant_panels(part_rows), K = s->cols;
    for (int64_t i = begin; i < end; i++) {
        uint8_t *panel = (uint8_t *)s->packed + i * quant_panel_bytes(K);
        bf16 *scales = (bf16 *)(panel + quant_scales_at(K));
        int in_part = (int)i % per_part * PANEL, first = (int)i / per_part * part_rows + in_part;
        memset(panel, 0, (size_t)quant_panel_bytes(K));
        for (int k = 0; k < K; k += QUANT_GROUP)
            for (int j = 0; j < PANEL; j++) {
                group g = {{0}, {0}};
                float scale = 0;
                if (in_part + j < part_rows) {
                    memcpy(g.x, a->w + (int64_t)(first + j) * K + k,
                           sizeof(float) * (size_t)cpu_min(QUANT_GROUP, K - k));
                    scale = round_group(&g);
                }
                put_group(panel + k / QUANT_GROUP * CHUNKS * CHUNK_BYTES, &g, j);
                scales[k / QUANT_GROUP * PANEL + j] = bf16_round(scale);
            }
    }
}

CPU_OP(weights_pack) {
    const gpt_segment *s = op->segment;
    cpu_parallel(ctx, pack_panels, (void *)op, s->parts * quant_panels(s->rows / s->parts), 4);
}
