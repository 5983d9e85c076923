/* kernel_quant.h: products of rows rounded to 8 bits with weights of 8 or 4 bits, see quant.h.
 * Groups of terms are summed as integers, on vectors or, for 16 rows at a time, on tiles of AMX. */
#ifndef CPU_KERNEL_QUANT_H
#define CPU_KERNEL_QUANT_H

#include "quant.h"

#include <math.h>
#ifdef CPU_AMX
#include "tiles.h"
#define kernel_begin() tiles_begin_groups(QUADS)
#define kernel_end()   tiles_end()
#else
#define kernel_begin() ((void)0)
#define kernel_end()   ((void)0)
#endif

/* A tile: its rows are rounded once, and its sums wait until all terms are in. */
enum { ROWS = 48, COLS = 256, TERMS = 4096 };
enum {
    BAND = LANES == 16 ? 4 : 1, /* rows whose sums fit the registers */
    BAND_PANELS = LANES == 16 ? 2 : 1,
};

/* Rows of `a`, rounded by groups. The few rows of decoding are rounded once for all tiles. */
typedef struct rounded_rows {
    /* Rows whose distance is not a power of two are in different cache sets. */
    int8_t q[ROWS][TERMS + 64];
    float scale[ROWS][TERMS / QUANT_GROUP];
    int32_t offset[ROWS][TERMS / QUANT_GROUP]; /* -ZERO times the sum of q */
} rounded_rows;

/* One group of n numbers. One that is not finite makes the scale, and so all that the row gives, NaN. */
static void round_group(rounded_rows *out, int row, int k, const bf16 *a, int n) {
    enum { N = QUANT_GROUP / LANES };
    vf x[N], biggest = {0};
    vi bad = {0};
    UNROLL
    for (int i = 0; i < N; i++) {
        int m = cpu_max(0, cpu_min(LANES, n - i * LANES));
        x[i] = vf_get(a + i * LANES, m);
        biggest = vf_max(biggest, vf_max(x[i], -x[i]));
        bad |= not_finite(x[i]);
    }
    float scale = any_lane(bad) ? NAN : vf_max_lane(biggest) / 127;
    float inverse = scale_inverse(scale);
    vi sum = {0};
    UNROLL
    for (int i = 0; i < N; i++) {
        vf scaled = inverse != 0 ? x[i] * inverse : (vf){0};
        vi q = __builtin_convertvector(scaled + vf_select(scaled < 0, vf_set(-0.5f), vf_set(0.5f)),
                                       vi);
        vc bytes = __builtin_convertvector(q, vc);
        memcpy(&out->q[row][k + i * LANES], &bytes, sizeof bytes);
        sum += q;
    }
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    out->scale[row][k / QUANT_GROUP] = scale;
    out->offset[row][k / QUANT_GROUP] = -ZERO * total;
}

static void round_row(rounded_rows *out, int row, const bf16 *a, int K) {
    int k = 0;
    for (; k + QUANT_GROUP <= K; k += QUANT_GROUP) round_group(out, row, k, a + k, QUANT_GROUP);
    if (k < K) round_group(out, row, k, a + k, K - k);
}

/* What the kernel reads of the weights: a panel's groups from some term on, and its scales; and what
 * it asks for meanwhile, NULL where that is in cache already. */
typedef struct panel_part {
    const uint8_t *chunks, *next;
    const bf16 *scales;
} panel_part;

/* c (M rows, `panels` panels) += a b over n_groups groups, while the `asks` parts `ask` are asked for.
 * M and panels are constants where this is inlined. */
__attribute__((always_inline)) static inline void quant_band(float *c, const rounded_rows *a,
                                                             int row, const panel_part *b,
                                                             const panel_part *ask, int asks,
                                                             int n_groups, int M, int panels) {
    vf total[BAND][BAND_PANELS * VECTORS];
    int n = panels * VECTORS;
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++) total[m][v] = vf_load(c + m * COLS + v * LANES);
    }
    for (int g = 0; g < n_groups; g++) {
        vi sum[BAND][BAND_PANELS * VECTORS];
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int v = 0; v < n; v++)
                sum[m][v] = (vi){0} + (SUM_IS_OFFSET ? a->offset[row + m][g] : 0);
        }
        for (int i = 0; i < CHUNKS; i++) {
            vb u[BAND_PANELS * VECTORS];
            UNROLL
            for (int v = 0; v < n; v++)
                u[v] = vb_load(b[v / VECTORS].chunks + (g * CHUNKS + i) * CHUNK_BYTES +
                               v % VECTORS * LANES * QUAD);
            for (int v = 0; v < asks; v++) ask_for(ask[v].next + (g * CHUNKS + i) * CHUNK_BYTES);
            UNROLL
            for (int m = 0; m < M; m++) {
                const int8_t *q = &a->q[row + m][g * QUANT_GROUP + i * QUAD];
                int32_t quad;
                memcpy(&quad, q, sizeof quad);
                UNROLL
                for (int v = 0; v < n; v++) sum[m][v] = quad_dot(sum[m][v], vb_lower(u[v]), quad);
                if (CPU_QUANT == 8) continue;
                memcpy(&quad, q + CHUNKS * QUAD, sizeof quad);
                UNROLL
                for (int v = 0; v < n; v++) sum[m][v] = quad_dot(sum[m][v], vb_upper(u[v]), quad);
            }
        }
        UNROLL
        for (int v = 0; v < n; v++) {
            vf scale = vf_get(b[v / VECTORS].scales + g * PANEL + v % VECTORS * LANES, LANES);
            UNROLL
            for (int m = 0; m < M; m++)
                total[m][v] +=
                    __builtin_convertvector(sum[m][v], vf) * (scale * a->scale[row + m][g]);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++) vf_store(c + m * COLS + v * LANES, total[m][v]);
    }
}

#ifdef CPU_AMX

enum { TILE_ROWS = 16 };

/* Makes a group's quads of 4 bits what they are in 8. */
static inline const uint8_t *whole_quads(uint8_t *room, const uint8_t *chunks) {
    if (CPU_QUANT == 8) return chunks;
    for (int i = 0; i < CHUNKS * CHUNK_BYTES; i += LANES * QUAD) {
        vb u = vb_load(chunks + i), lower = vb_lower(u), upper = vb_upper(u);
        memcpy(room + i, &lower, sizeof lower);
        memcpy(room + CHUNKS * CHUNK_BYTES + i, &upper, sizeof upper);
    }
    return room;
}

/* c (16 rows, one panel) += a b over n_groups groups: a group is one product of tiles, whose sums
 * then meet their scales. */
static inline void quant_tiles(float *c, const rounded_rows *a, int row, const panel_part *b,
                               int n_groups) {
    int32_t sums[TILE_ROWS][PANEL];
    uint8_t room[QUADS * CHUNK_BYTES];
    vf total[TILE_ROWS][VECTORS];
    UNROLL
    for (int m = 0; m < TILE_ROWS; m++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++) total[m][v] = vf_load(c + m * COLS + v * LANES);
    }
    for (int g = 0; g < n_groups; g++) {
        const uint8_t *quads = whole_quads(room, b->chunks + (int64_t)g * CHUNKS * CHUNK_BYTES);
        tiles_sync();
        tile_zero(TILE_SUMS);
        tile_load(TILE_A, &a->q[row][g * QUANT_GROUP], (int64_t)sizeof a->q[0]);
        tile_load(TILE_B, quads, CHUNK_BYTES);
        tile_dot_bytes(TILE_SUMS, TILE_A, TILE_B);
        tile_store(TILE_SUMS, sums, sizeof sums[0]);
        tiles_sync();
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            vf scale = vf_get(b->scales + g * PANEL + v * LANES, LANES);
            UNROLL
            for (int m = 0; m < TILE_ROWS; m++) {
                vi sum;
                memcpy(&sum, &sums[m][v * LANES], sizeof sum);
                sum += a->offset[row + m][g];
                total[m][v] += __builtin_convertvector(sum, vf) * (scale * a->scale[row + m][g]);
            }
        }
    }
    UNROLL
    for (int m = 0; m < TILE_ROWS; m++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++) vf_store(c + m * COLS + v * LANES, total[m][v]);
    }
}

#endif

__attribute__((always_inline)) static inline void quant_bands(float *c, const rounded_rows *a,
                                                              int rows, const panel_part *b,
                                                              int n_groups, int panels) {
    int row = 0;
#ifdef CPU_AMX
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
        for (int i = 0; i < panels; i++)
            quant_tiles(c + row * COLS + i * PANEL, a, row, &b[i], n_groups);
#endif
    if (rows == 1) {
        quant_band(c, a, 0, b, b, b->next ? panels : 0, n_groups, 1, panels);
        return;
    }
    const panel_part *ask = b, *end = b->next ? b + panels : b; /* a panel a band */
    for (; BAND > 1 && row + BAND <= rows; row += BAND, ask += ask < end)
        quant_band(c + row * COLS, a, row, b, ask, ask < end, n_groups, BAND, panels);
    for (; row < rows; row++, ask += ask < end)
        quant_band(c + row * COLS, a, row, b, ask, ask < end, n_groups, 1, panels);
}

#endif
