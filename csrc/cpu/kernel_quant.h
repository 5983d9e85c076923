/* kernel_quant.h: products of rows rounded to 15 bits with weights of 4 to 8 bits, see quant.h. Groups
 * of terms are summed as integers, on vectors or, for 16 rows at a time, on tiles of AMX. */
#ifndef CPU_KERNEL_QUANT_H
#define CPU_KERNEL_QUANT_H

#include "round_quant.h"

#ifdef CPU_AMX
#include "tiles.h"
#endif

/* The sum of q in group g of the form. */
static inline int32_t sum_of(quant_form f, const rounded_rows *a, int row, int g) {
    const int32_t *sum = a->sum[row];
    return f.group == QUANT_GROUP ? sum[2 * g] + sum[2 * g + 1] : sum[g];
}

/* The sum of q in half `half` of group g, or in all where the form has one scale, times the group's scale. */
static inline float total_of(quant_form f, const rounded_rows *a, int row, int g, int half) {
    if (f.group == QUANT_GROUP) return a->total[row][g];
    return a->scale[row][g] * (float)a->sum[row][2 * g + half];
}

enum { MOST_VECTORS = BAND_PANELS * VECTORS };

/* Sums of a band: of its rows, of so many columns. */
typedef struct band_sums {
    vf x[BAND][MOST_VECTORS];
} band_sums;
typedef struct band_integers {
    vi x[2][BAND][MOST_VECTORS]; /* of both halves of 32 terms */
} band_integers;

/* A section of each panel of a band. The form, M rows and n vectors are constants where one is inlined. */
typedef struct band_section {
    const rounded_rows *a;
    int row, group, groups; /* of a; its groups of 32 terms from `group` on */
    const uint8_t *at[BAND_PANELS], *ask[BAND_PANELS];
    int asks;
} band_section;

static inline const uint8_t *scales_of(quant_form f, const band_section *s, int g, int v) {
    return s->at[v / VECTORS] + quant_in_section(f, s->groups, g).scales;
}

/* Row 0: its sums of upper quads, of which `shifted` ones are 16 times what they should be, join the others
 * or stay. */
SPECIALIZED void join_upper(band_integers *sums, int shifted, int stay, int n) {
    UNROLL
    for (int v = 0; v < n; v++) {
        vi upper = shifted ? sums->x[1][0][v] >> 4 : sums->x[1][0][v];
        if (stay)
            sums->x[1][0][v] = upper;
        else
            sums->x[0][0][v] += upper;
    }
}

/* The sums of u times q of group g: of its halves, or of all where the form has one scale. Where asked,
 * lines of later groups are asked for. */
SPECIALIZED band_integers group_sums(quant_form f, const band_section *s, int g, int M, int n) {
    int last = quant_halves(f) - 1, shifted = M == 1 && f.bits == 4;
    int upper_to =
        M == 1 ? 1 : last; /* one row has two sums at a time, which need not wait for each other */
    int64_t at = quant_in_section(f, s->groups, g).chunks;
    band_integers sums = {0};
    UNROLL
    for (int i = 0; i < 4; i++) {
        quad_halves lower[MOST_VECTORS], upper[MOST_VECTORS];
        UNROLL
        for (int v = 0; v < n; v++) {
            quad_pair u =
                quad_load(f, s->at[v / VECTORS] + at + v % VECTORS * LANES * QUAD, i, shifted);
            lower[v] = halves_of(u.lower), upper[v] = halves_of(u.upper);
        }
        for (int v = 0; v < s->asks; v++) {
            ask_for(s->ask[v] + at + i * CHUNK_BYTES);
            if (i + 4 < f.bits) ask_for(s->ask[v] + at + (i + 4) * CHUNK_BYTES);
        }
        UNROLL
        for (int m = 0; m < M; m++) {
            const int16_t *q = &s->a->q[s->row + m][(s->group + g) * QUANT_GROUP + i * QUAD];
            int32_t x[2], y[2];
            memcpy(x, q, sizeof x);
            memcpy(y, q + 4 * QUAD, sizeof y);
            UNROLL
            for (int v = 0; v < n; v++) {
                vi *to = &sums.x[0][m][v];
                *to = pairs_dot(pairs_dot(*to, lower[v].even, x[0]), lower[v].odd, x[1]);
                to = &sums.x[upper_to][m][v];
                *to = pairs_dot(pairs_dot(*to, upper[v].even, y[0]), upper[v].odd, y[1]);
            }
        }
    }
    if (M == 1) join_upper(&sums, shifted, last, n);
    return sums;
}

/* sums += those of group g, by scales and without the factor of the block. */
SPECIALIZED void add_group(quant_form f, band_sums *sums, const band_section *s, int g, int M,
                           int n) {
    band_integers group = group_sums(f, s, g, M, n);
    UNROLL
    for (int half = 0; half < quant_halves(f); half++) {
        UNROLL
        for (int v = 0; v < n; v++) {
            vf scale = quant_scale(f, scales_of(f, s, g, v), half, 0, v % VECTORS);
            UNROLL
            for (int m = 0; m < M; m++) {
                int row = s->row + m, at = (s->group + g) * quant_halves(f) + half;
                vi sum = group.x[half][m][v];
                if (f.zero) sum -= f.zero * sum_of(f, s->a, row, at);
                vf x = __builtin_convertvector(sum, vf) * scale;
                sums->x[m][v] += x * s->a->scale[row][s->group + g];
            }
        }
    }
}

/* sums += the minima of all groups, without the factor of the block. */
SPECIALIZED void add_minima(quant_form f, band_sums *sums, const band_section *s, int M, int n) {
    for (int g = 0; g < s->groups; g++) {
        UNROLL
        for (int half = 0; half < quant_halves(f); half++) {
            UNROLL
            for (int v = 0; v < n; v++) {
                vf least = quant_scale(f, scales_of(f, s, g, v), half, 1, v % VECTORS);
                UNROLL
                for (int m = 0; m < M; m++)
                    sums->x[m][v] += least * total_of(f, s->a, s->row + m, s->group + g, half);
            }
        }
    }
}

/* c (M rows, n vectors) += a section. */
SPECIALIZED void quant_section(quant_form f, float *c, const band_section *s, int M, int n) {
    int of_block = f.scale == SCALE_INT8;
    band_sums sums = {0}, minima = {0};
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++)
            if (!of_block) sums.x[m][v] = vf_load(c + m * COLS + v * LANES);
    }
    for (int v = 0; v < s->asks; v++)
        for (int64_t i = 0; i < quant_in_section(f, s->groups, 0).chunks; i += 64)
            ask_for(s->ask[v] + i);
    /* Before the chunks, so that memory is read in order; but there are not registers for both sums. */
    if (f.rows == 2 && !of_block) add_minima(f, &sums, s, M, n);
    for (int g = 0; g < s->groups; g++) add_group(f, &sums, s, g, M, n);
    if (f.rows == 2 && of_block) add_minima(f, &minima, s, M, n);
    UNROLL
    for (int v = 0; v < n; v++) {
        const uint8_t *blocks = s->at[v / VECTORS];
        vf scale = {0}, least = {0};
        if (of_block) scale = quant_block_scale(blocks, 0, v % VECTORS);
        if (of_block && f.rows == 2) least = quant_block_scale(blocks, 1, v % VECTORS);
        UNROLL
        for (int m = 0; m < M; m++) {
            float *y = c + m * COLS + v * LANES;
            vf total = sums.x[m][v];
            if (of_block) total = vf_load(y) + total * scale;
            if (of_block && f.rows == 2) total += minima.x[m][v] * least;
            vf_store(y, total);
        }
    }
}

/* c (M rows, `panels` panels) += a b over n_groups groups of 32 terms, while the `asks` parts `ask`
 * are asked for. The form, M and panels are constants where this is inlined. */
SPECIALIZED void quant_band(quant_form f, float *c, const rounded_rows *a, int row,
                            const panel_part *b, const panel_part *ask, int asks, int n_groups,
                            int M, int panels) {
    band_section s = {.a = a, .row = row, .asks = asks};
    int64_t at = 0;
    for (; s.group < n_groups; s.group += SECTION, at += quant_section_bytes(f, SECTION)) {
        s.groups = cpu_min(SECTION, n_groups - s.group);
        UNROLL
        for (int i = 0; i < panels; i++) s.at[i] = b[i].at + at;
        for (int i = 0; i < asks; i++) s.ask[i] = ask[i].next + at;
        quant_section(f, c, &s, M, panels * VECTORS);
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
            quad_pair u = quad_load(f, chunks + v * LANES * QUAD, i, 0);
            memcpy(room + i * CHUNK_BYTES + v * LANES * QUAD, &u.lower, sizeof u.lower);
            memcpy(room + (i + 4) * CHUNK_BYTES + v * LANES * QUAD, &u.upper, sizeof u.upper);
        }
    }
    return room;
}

/* y (16 rows) += the sums of both planes, by the scales of half `half` of group g of a section that begins at `at`. */
SPECIALIZED void add_tile(quant_form f, float *y, int32_t sums[2][TILE_ROWS][PANEL],
                          const rounded_rows *a, int row, const uint8_t *at, const uint8_t *scales,
                          int g, int half) {
    UNROLL
    for (int v = 0; v < VECTORS; v++) {
        vf scale = quant_scale(f, scales, half, 0, v), least = {0};
        if (f.rows == 2) least = quant_scale(f, scales, half, 1, v);
        if (f.scale == SCALE_INT8) scale *= quant_block_scale(at, 0, v);
        if (f.scale == SCALE_INT8 && f.rows == 2) least *= quant_block_scale(at, 1, v);
        for (int m = 0; m < TILE_ROWS; m++) {
            vf total = vf_load(y + m * COLS + v * LANES);
            vi sum, lower;
            memcpy(&sum, &sums[0][m][v * LANES], sizeof sum);
            memcpy(&lower, &sums[1][m][v * LANES], sizeof lower);
            sum = sum * 256 + lower;
            sum -= f.zero * sum_of(f, a, row + m, g * quant_halves(f) + half);
            total += __builtin_convertvector(sum, vf) * (scale * a->scale[row + m][g]);
            if (f.rows == 2) total += least * total_of(f, a, row + m, g, half);
            vf_store(y + m * COLS + v * LANES, total);
        }
    }
}

/* c (16 rows, one panel) += a b over n_groups groups of 32: each of the form's is a product of
 * tiles for each plane, whose sums then meet their scales. */
SPECIALIZED void quant_tiles(quant_form f, float *c, const rounded_rows *a, int row,
                             const panel_part *b, int n_groups) {
    int32_t sums[2][TILE_ROWS][PANEL];
    uint8_t room[QUADS * CHUNK_BYTES];
    for (int g = 0; g < n_groups; g++) {
        const uint8_t *at = b->at + g / SECTION * quant_section_bytes(f, SECTION);
        int groups = cpu_min(SECTION, n_groups - g / SECTION * SECTION);
        quant_place p = quant_in_section(f, groups, g % SECTION);
        const uint8_t *quads = whole_quads(f, room, at + p.chunks);
        for (int half = 0; half < quant_halves(f); half++) {
            int first = half * f.group;
            tiles_sync();
            tile_load(TILE_B, quads + first / QUAD * CHUNK_BYTES, CHUNK_BYTES);
            UNROLL
            for (int i = 0; i < 2; i++) {
                tile_zero(TILE_SUMS);
                tile_load(TILE_A, &a->plane[i][row][g * QUANT_GROUP + first],
                          (int64_t)sizeof a->plane[i][0]);
                tile_dot_bytes(TILE_SUMS, TILE_A, TILE_B);
                tile_store(TILE_SUMS, sums[i], sizeof sums[i][0]);
            }
            tiles_sync();
            add_tile(f, c, sums, a, row, at, at + p.scales, g, half);
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
    /* A panel alone, the last one of some, is not worth the code of long bands. */
    int most = panels < BAND_PANELS ? BAND / 2 : BAND, band = cpu_max(1, most / quant_halves(f));
    const panel_part *ask = b, *end = b->next ? b + panels : b; /* a panel a band */
    for (; band > 1 && row + band <= rows; row += band, ask += ask < end)
        quant_band(f, c + row * COLS, a, row, b, ask, ask < end, n_groups, band, panels);
    if (BAND > 4 && band > 4 && row + 4 <= rows) {
        quant_band(f, c + row * COLS, a, row, b, ask, ask < end, n_groups, 4, panels);
        row += 4, ask += ask < end;
    }
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
        if (BAND_PANELS > 1 && panels == BAND_PANELS && rows > 1) {                                \
            quant_bands(f, c, a, rows, b, n_groups, BAND_PANELS);                                  \
            return;                                                                                \
        }                                                                                          \
        for (int i = 0; i < panels; i++) /* those of one row one by one, as they are in memory */  \
            quant_bands(f, c + i * PANEL, a, rows, b + i, n_groups, 1);                            \
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
