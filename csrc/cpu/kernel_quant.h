/* kernel_quant.h: products of rows rounded to 8 bits with weights of 4 to 8 bits, see quant.h. Groups
 * of terms are summed as integers, on vectors or, for 16 rows at a time, on tiles of AMX. */
#ifndef CPU_KERNEL_QUANT_H
#define CPU_KERNEL_QUANT_H

#include "quant.h"

#include <math.h>
#ifdef CPU_AMX
#include "tiles.h"
#endif

/* A tile: its rows are rounded once, and its sums wait until all terms are in. */
enum { ROWS = 48, COLS = 256, TERMS = 4096, HALF_GROUP = QUANT_GROUP / 2 };
enum {
    BAND = LANES >= 8 ? 4 : 1, /* rows whose sums fit the registers */
    BAND_PANELS = LANES == 16 ? 2 : 1,
};

/* Rows of `a`, rounded by groups. The few rows of decoding are rounded once for all tiles. */
typedef struct rounded_rows {
    /* Rows whose distance is not a power of two are in different cache sets. */
    int8_t q[ROWS][TERMS + 64];
    float scale[ROWS][TERMS / QUANT_GROUP];
    int16_t sum[ROWS][TERMS / HALF_GROUP]; /* of q in each half of a group */
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
    vi sum[2] = {{0}, {0}};
    UNROLL
    for (int i = 0; i < N; i++) {
        vf scaled = inverse != 0 ? x[i] * inverse : (vf){0};
        vi q = __builtin_convertvector(scaled + vf_select(scaled < 0, vf_set(-0.5f), vf_set(0.5f)),
                                       vi);
        vc bytes = __builtin_convertvector(q, vc);
        memcpy(&out->q[row][k + i * LANES], &bytes, sizeof bytes);
        sum[i * LANES / HALF_GROUP] += q;
    }
    for (int half = 0; half < 2; half++) {
        int32_t total = 0;
        for (int i = 0; i < LANES; i++) total += sum[half][i];
        out->sum[row][k / HALF_GROUP + half] = (int16_t)total;
    }
    out->scale[row][k / QUANT_GROUP] = scale;
}

static void round_row(rounded_rows *out, int row, const bf16 *a, int K) {
    int k = 0;
    for (; k + QUANT_GROUP <= K; k += QUANT_GROUP) round_group(out, row, k, a + k, QUANT_GROUP);
    if (k < K) round_group(out, row, k, a + k, K - k);
}

/* The sum of q in group g of the form. */
static inline int32_t sum_of(quant_form f, const rounded_rows *a, int row, int g) {
    const int16_t *sum = a->sum[row];
    return f.group == QUANT_GROUP ? sum[2 * g] + sum[2 * g + 1] : sum[g];
}

/* The sums of both halves of 32 terms, in every lane. */
static inline vs sum_pairs(const rounded_rows *a, int row, int g) {
    int32_t both;
    memcpy(&both, &a->sum[row][2 * g], sizeof both);
    return (vs)((vi){0} + both);
}

enum { MOST_VECTORS = BAND_PANELS * VECTORS };

/* What pairs of each half of 32 terms are multiplied by as they are joined. */
typedef struct joins {
    vs by[2][MOST_VECTORS];
} joins;

/* sums (groups of 32 terms, rows, vectors) of group g: u times q. If scales join, the sums of both halves
 * are one. Where asked, lines of later groups are asked for. */
SPECIALIZED void group_sums(quant_form f, vi sums[2][BAND][MOST_VECTORS], const joins *join,
                            const rounded_rows *a, int row, const panel_part *b,
                            const panel_part *ask, int asks, int g, int M, int n) {
    int in_pairs = quads_in_pairs(f), last = QUANT_GROUP / f.group - 1, held = 0;
    vs pairs[2][BAND][MOST_VECTORS] = {0};
    UNROLL
    for (int i = 0; i < 4; i++) {
        int64_t at = g * quant_chunk_bytes(f);
        quad_pair u[MOST_VECTORS];
        UNROLL
        for (int v = 0; v < n; v++)
            u[v] = quad_load(f, b[v / VECTORS].chunks + at + v % VECTORS * LANES * QUAD, i);
        for (int v = 0; v < asks; v++) {
            ask_for(ask[v].next + at + i * CHUNK_BYTES);
            if (i + 4 < f.bits) ask_for(ask[v].next + at + (i + 4) * CHUNK_BYTES);
        }
        UNROLL
        for (int m = 0; m < M; m++) {
            const int8_t *q = &a->q[row + m][g * QUANT_GROUP + i * QUAD];
            int32_t lower, upper;
            memcpy(&lower, q, sizeof lower);
            memcpy(&upper, q + 4 * QUAD, sizeof upper);
            UNROLL
            for (int v = 0; v < n; v++) {
                if (in_pairs) {
                    pairs[0][m][v] = pairs_dot(pairs[0][m][v], u[v].lower, lower);
                    pairs[last][m][v] = pairs_dot(pairs[last][m][v], u[v].upper, upper);
                } else {
                    sums[0][m][v] = quad_dot(sums[0][m][v], u[v].lower, lower);
                    sums[last][m][v] = quad_dot(sums[last][m][v], u[v].upper, upper);
                }
            }
        }
        held += last ? 1 : 2;
        if (!in_pairs || (held < in_pairs && i < 3)) continue;
        held = 0;
        UNROLL
        for (int half = 0; half <= last; half++) {
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int v = 0; v < n; v++) {
                    int to = scales_join(f) ? 0 : half;
                    sums[to][m][v] =
                        pairs_join(sums[to][m][v], pairs[half][m][v], join->by[half][v]);
                    pairs[half][m][v] = (vs){0};
                }
            }
        }
    }
}

/* total (M rows, n vectors) += the sums of group g, by the scales of each of its halves. */
SPECIALIZED void add_halves(quant_form f, vf total[BAND][MOST_VECTORS],
                            vi sums[2][BAND][MOST_VECTORS], const rounded_rows *a, int row,
                            const panel_part *b, int g, int M, int n) {
    int halves = QUANT_GROUP / f.group;
    UNROLL
    for (int half = 0; half < halves; half++) {
        int at = g * halves + half;
        UNROLL
        for (int v = 0; v < n; v++) {
            const panel_part *p = &b[v / VECTORS];
            vf scale = quant_scale(f, p, at, 0, v % VECTORS), least = {0};
            if (f.rows == 2) least = quant_scale(f, p, at, 1, v % VECTORS);
            UNROLL
            for (int m = 0; m < M; m++) {
                int32_t q = sum_of(f, a, row + m, at);
                float unit = a->scale[row + m][g];
                vi sum = sums[half][m][v] - zero_to_subtract(f) * q;
                total[m][v] += __builtin_convertvector(sum, vf) * (scale * unit);
                if (f.rows == 2) total[m][v] += least * (unit * (float)q);
            }
        }
    }
}

/* The same of sums that have met their integer scales. */
SPECIALIZED void add_joined(quant_form f, vf total[BAND][MOST_VECTORS], vi sums[BAND][MOST_VECTORS],
                            const rounded_rows *a, int row, const panel_part *b, int g, int M,
                            int n) {
    int halves = QUANT_GROUP / f.group, first = g * halves, last = first + halves - 1;
    UNROLL
    for (int v = 0; v < n; v++) {
        const panel_part *p = &b[v / VECTORS];
        vf scale = quant_block_scale(f, p, first, 0, v % VECTORS), least = {0};
        vs by = pairs_of(quant_integers(f, p, first, f.rows - 1, v % VECTORS),
                         quant_integers(f, p, last, f.rows - 1, v % VECTORS));
        if (f.rows == 2) least = quant_block_scale(f, p, first, 1, v % VECTORS);
        UNROLL
        for (int m = 0; m < M; m++) {
            vi all = pairs_join((vi){0}, sum_pairs(a, row + m, g), by), sum = sums[m][v];
            float unit = a->scale[row + m][g];
            if (f.rows == 1) sum -= zero_to_subtract(f) * all;
            total[m][v] += __builtin_convertvector(sum, vf) * (scale * unit);
            if (f.rows == 2) total[m][v] += __builtin_convertvector(all, vf) * (least * unit);
        }
    }
}

/* c (M rows, `panels` panels) += a b over n_groups groups of 32 terms, while the `asks` parts `ask`
 * are asked for. The form, M and panels are constants where this is inlined. */
SPECIALIZED void quant_band(quant_form f, float *c, const rounded_rows *a, int row,
                            const panel_part *b, const panel_part *ask, int asks, int n_groups,
                            int M, int panels) {
    vf total[BAND][MOST_VECTORS];
    int n = panels * VECTORS, halves = QUANT_GROUP / f.group;
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++) total[m][v] = vf_load(c + m * COLS + v * LANES);
    }
    for (int g = 0; g < n_groups; g++) {
        vi sums[2][BAND][MOST_VECTORS] = {0};
        joins join;
        UNROLL
        for (int half = 0; half < halves; half++) {
            UNROLL
            for (int v = 0; v < n; v++) {
                vi by = (vi){0} + 1;
                if (scales_join(f))
                    by = quant_integers(f, &b[v / VECTORS], g * halves + half, 0, v % VECTORS);
                join.by[half][v] = pairs_of(by, by);
            }
        }
        group_sums(f, sums, &join, a, row, b, ask, asks, g, M, n);
        if (scales_join(f))
            add_joined(f, total, sums[0], a, row, b, g, M, n);
        else
            add_halves(f, total, sums, a, row, b, g, M, n);
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++) vf_store(c + m * COLS + v * LANES, total[m][v]);
    }
}

#ifdef CPU_AMX

enum { TILE_ROWS = 16 };

/* Makes 32 terms what they are in 8 bits. */
static inline const uint8_t *whole_quads(quant_form f, uint8_t *room, const uint8_t *chunks) {
    if (f.bits == 8) return chunks;
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            quad_pair u = quad_load(f, chunks + v * LANES * QUAD, i);
            memcpy(room + i * CHUNK_BYTES + v * LANES * QUAD, &u.lower, sizeof u.lower);
            memcpy(room + (i + 4) * CHUNK_BYTES + v * LANES * QUAD, &u.upper, sizeof u.upper);
        }
    }
    return room;
}

/* c (16 rows, one panel) += a b over n_groups groups of 32: each of the form's is one product of
 * tiles, whose sums then meet their scales. */
SPECIALIZED void quant_tiles(quant_form f, float *c, const rounded_rows *a, int row,
                             const panel_part *b, int n_groups) {
    int32_t sums[TILE_ROWS][PANEL];
    uint8_t room[QUADS * CHUNK_BYTES];
    int halves = QUANT_GROUP / f.group;
    for (int at = 0; at < n_groups * halves; at++) {
        int g = at / halves, first = at % halves * f.group;
        const uint8_t *quads = whole_quads(f, room, b->chunks + g * quant_chunk_bytes(f));
        tiles_sync();
        tile_zero(TILE_SUMS);
        tile_load(TILE_A, &a->q[row][g * QUANT_GROUP + first], (int64_t)sizeof a->q[0]);
        tile_load(TILE_B, quads + first / QUAD * CHUNK_BYTES, CHUNK_BYTES);
        tile_dot_bytes(TILE_SUMS, TILE_A, TILE_B);
        tile_store(TILE_SUMS, sums, sizeof sums[0]);
        tiles_sync();
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            vf scale = quant_scale(f, b, at, 0, v), least = {0};
            if (f.rows == 2) least = quant_scale(f, b, at, 1, v);
            for (int m = 0; m < TILE_ROWS; m++) {
                float *y = c + m * COLS + v * LANES, unit = a->scale[row + m][g];
                int32_t q = sum_of(f, a, row + m, at);
                vf total = vf_load(y);
                vi sum;
                memcpy(&sum, &sums[m][v * LANES], sizeof sum);
                sum -= f.zero * q;
                total += __builtin_convertvector(sum, vf) * (scale * unit);
                if (f.rows == 2) total += least * (unit * (float)q);
                vf_store(y, total);
            }
        }
    }
}

#endif

SPECIALIZED void quant_bands(quant_form f, float *c, const rounded_rows *a, int rows,
                             const panel_part *b, int n_groups, int panels) {
    int row = 0;
#ifdef CPU_AMX
    if (rows >= TILE_ROWS) {
        tiles_begin_groups(f.group / QUAD);
        for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
            for (int i = 0; i < panels; i++)
                quant_tiles(f, c + row * COLS + i * PANEL, a, row, &b[i], n_groups);
        tiles_end();
    }
#endif
    if (rows == 1) {
        quant_band(f, c, a, 0, b, b, b->next ? panels : 0, n_groups, 1, panels);
        return;
    }
    const panel_part *ask = b, *end = b->next ? b + panels : b; /* a panel a band */
    for (; BAND > 1 && row + BAND <= rows; row += BAND, ask += ask < end)
        quant_band(f, c + row * COLS, a, row, b, ask, ask < end, n_groups, BAND, panels);
    for (; row < rows; row++, ask += ask < end)
        quant_band(f, c + row * COLS, a, row, b, ask, ask < end, n_groups, 1, panels);
}

/* One function for each form: c (rows, panels) += a b. `panels` is 1 or BAND_PANELS. */
typedef void quant_kernel(float *c, const rounded_rows *a, int rows, const panel_part *b,
                          int n_groups, int panels);
#define KERNEL(name, ...)                                                                          \
    static void kernel_##name(float *c, const rounded_rows *a, int rows, const panel_part *b,      \
                              int n_groups, int panels) {                                          \
        const quant_form f = {__VA_ARGS__};                                                        \
        if (panels == BAND_PANELS)                                                                 \
            quant_bands(f, c, a, rows, b, n_groups, BAND_PANELS);                                  \
        else                                                                                       \
            quant_bands(f, c, a, rows, b, n_groups, 1);                                            \
    }
QUANT_FORMS(KERNEL)
#undef KERNEL

static quant_kernel *const quant_kernels[] = {
#define KERNEL(name, ...) kernel_##name,
    QUANT_FORMS(KERNEL)
#undef KERNEL
};

/* What a level compiles from this file: tests call it. */
typedef struct quant_level {
    quant_kernel *const *kernels;
    void (*round_row)(rounded_rows *out, int row, const bf16 *a, int K);
    int band_panels;
} quant_level;
#define QUANT_LEVEL {quant_kernels, round_row, BAND_PANELS}

#endif
