/* kernel_quant.h: products of rounded rows with weights of 4 to 8 bits, see quant.h. Groups of terms are summed as
 * integers, on vectors or, for 16 rows at a time, on tiles of AMX; of many rows as pairs of bf16 numbers. */
#ifndef CPU_KERNEL_QUANT_H
#define CPU_KERNEL_QUANT_H

#include "pairs_quant.h"

#ifdef CPU_AMX
#include "tiles.h"
#endif

/* ---- one row, one panel ---- */

typedef struct row_sums {
    vf x[VECTORS];
} row_sums;
typedef struct row_integers {
    vi x[2][VECTORS]; /* of both halves of 32 terms, or where a group has one scale, of all */
} row_integers;

/* A section. The form is a constant where it is inlined. */
typedef struct row_section {
    const rounded_rows *a;
    int row, group, groups;  /* of a; its groups of 32 terms from `group` on */
    const uint8_t *at, *ask; /* ask: NULL, or lines to ask for as `at` is read */
} row_section;

/* The sums of u times q of group g. Sums do not wait for one another. Where asked, lines of later groups are asked for. */
SPECIALIZED row_integers row_group_sums(quant_form f, const row_section *s, int g) {
    int shifted = f.bits == 4; /* upper quads are 16 times what they should be */
    int64_t at = quant_in_section(f, s->groups, g).chunks;
    const int32_t *q = s->a->q[s->row][s->group + g];
    vi sums[2][2][VECTORS] = {0}; /* of lower and upper quads; of their upper and lower bytes */
    UNROLL
    for (int i = 0; i < 4; i++) {
        if (s->ask) {
            ask_for(s->ask + at + i * CHUNK_BYTES);
            if (i + 4 < f.bits) ask_for(s->ask + at + (i + 4) * CHUNK_BYTES);
        }
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            quad_pair both = quad_load(f, s->at + at + v * LANES * QUAD, i, shifted);
            UNROLL
            for (int upper = 0; upper < 2; upper++) {
                vb u = upper ? both.upper : both.lower;
                int quad = i + 4 * upper;
                vi *x = &sums[upper][0][v], *y = &sums[upper][1][v];
                if (BYTES) {
                    *x = bytes_dot(*x, u, q[quad]);
                    *y = bytes_dot(*y, u, q[QUADS + quad]);
                } else {
                    quad_halves halves = halves_of(u);
                    *x = words_dot(*x, halves.even, q[2 * quad]);
                    *x = words_dot(*x, halves.odd, q[2 * quad + 1]);
                }
            }
        }
    }
    row_integers all;
    UNROLL
    for (int v = 0; v < VECTORS; v++) {
        vi lower = (BYTES ? sums[0][0][v] << 8 : sums[0][0][v]) + sums[0][1][v];
        vi upper = (BYTES ? sums[1][0][v] << 8 : sums[1][0][v]) + sums[1][1][v];
        if (shifted) upper >>= 4;
        all.x[0][v] = quant_halves(f) == 1 ? lower + upper : lower;
        all.x[1][v] = upper;
    }
    return all;
}

/* sums += those of group g, by scales and without the factor of the block. */
SPECIALIZED void row_group(quant_form f, row_sums *sums, const row_section *s, int g) {
    row_integers group = row_group_sums(f, s, g);
    const uint8_t *scales = s->at + quant_in_section(f, s->groups, g).scales;
    UNROLL
    for (int half = 0; half < quant_halves(f); half++) {
        int32_t zeros = 0;
        if (f.zero) zeros = f.zero * sum_of(s->a, s->row, s->group + g, quant_halves(f), half);
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            vi sum = group.x[half][v] - zeros;
            vf x = __builtin_convertvector(sum, vf);
            sums->x[v] = add_scaled(sums->x[v], x, s->a->scale[s->row][s->group + g],
                                    quant_scale(f, scales, half, 0, v));
        }
    }
}

/* sums += the minima of all groups, without the factor of the block. */
SPECIALIZED void row_minima(quant_form f, row_sums *sums, const row_section *s) {
    for (int g = 0; g < s->groups; g++) {
        const uint8_t *scales = s->at + quant_in_section(f, s->groups, g).scales;
        UNROLL
        for (int half = 0; half < quant_halves(f); half++) {
            float total = total_of(s->a, s->row, s->group + g, quant_halves(f), half);
            UNROLL
            for (int v = 0; v < VECTORS; v++)
                sums->x[v] += quant_scale(f, scales, half, 1, v) * total;
        }
    }
}

/* sums += a section. */
SPECIALIZED void row_add(quant_form f, row_sums *sums, const row_section *s) {
    int of_block = f.scale == SCALE_INT8;
    row_sums inner = {0}, minima = {0};
    row_sums *to = of_block ? &inner : sums;
    if (s->ask)
        for (int64_t i = 0; i < quant_in_section(f, s->groups, 0).chunks; i += 64)
            ask_for(s->ask + i);
    /* Before the chunks, so that memory is read in order. */
    if (f.rows == 2) row_minima(f, of_block ? &minima : sums, s);
    for (int g = 0; g < s->groups; g++) row_group(f, to, s, g);
    UNROLL
    for (int v = 0; v < VECTORS && of_block; v++) {
        sums->x[v] += inner.x[v] * quant_block_scale(s->at, 0, v);
        if (f.rows == 2) sums->x[v] += minima.x[v] * quant_block_scale(s->at, 1, v);
    }
}

/* c (1, one panel) += a b over n_groups groups of 32 terms, while lines from `ask` on are asked for. */
SPECIALIZED void quant_row(quant_form f, float *c, const rounded_rows *a, int row,
                           const uint8_t *at, const uint8_t *ask, int n_groups) {
    row_section s = {.a = a, .row = row, .at = at, .ask = ask};
    row_sums sums;
    UNROLL
    for (int v = 0; v < VECTORS; v++) sums.x[v] = vf_load(c + v * LANES);
    for (; s.group < n_groups; s.group += SECTION) {
        s.groups = cpu_min(SECTION, n_groups - s.group);
        row_add(f, &sums, &s);
        s.at += quant_section_bytes(f, SECTION);
        if (s.ask) s.ask += quant_section_bytes(f, SECTION);
    }
    UNROLL
    for (int v = 0; v < VECTORS; v++) vf_store(c + v * LANES, sums.x[v]);
}

#ifdef CPU_AMX

enum { TILE_ROWS = 16 };

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
            sum -= f.zero * sum_of(a, row + m, g, quant_halves(f), half);
            total += __builtin_convertvector(sum, vf) * (scale * a->scale[row + m][g]);
            if (f.rows == 2) total += least * total_of(a, row + m, g, quant_halves(f), half);
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
        const uint8_t *quads = f.bits == 8 ? at + p.chunks : room;
        if (f.bits < 8) whole_quads(f, room, at + p.chunks);
        for (int half = 0; half < quant_halves(f); half++) {
            int first = half * f.group;
            tiles_sync();
            tile_load(TILE_B, quads + first / QUAD * CHUNK_BYTES, CHUNK_BYTES);
            UNROLL
            for (int i = 0; i < 2; i++) {
                tile_zero(TILE_SUMS);
                tile_load(TILE_A, &a->q[row][g][i * QUADS + first / QUAD], (int64_t)sizeof a->q[0]);
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
    int end = row + (rows - row) / LEAST_BAND * LEAST_BAND, asks = end == row;
    if (row < end) quant_band_rows(f, c + row * COLS, a, row, end, b, n_groups, panels);
    for (row = end; row < rows; row++, asks = 0)
        for (int i = 0; i < panels; i++)
            quant_row(f, c + row * COLS + i * PANEL, a, row, b[i].at, asks ? b[i].next : NULL,
                      n_groups);
}

/* One function for each form: c (rows, panels) += a b. `panels` is 1 or BAND_PANELS. */
typedef void quant_kernel(float *c, const rounded_rows *a, int rows, const panel_part *b,
                          int n_groups, int panels);
#define KERNEL(name, ...)                                                                          \
    static void kernel_##name(float *c, const rounded_rows *a, int rows, const panel_part *b,      \
                              int n_groups, int panels) {                                          \
        const quant_form f = {__VA_ARGS__};                                                        \
        quant_bands(f, c, a, rows, b, n_groups, panels);                                           \
    }
QUANT_FORMS(KERNEL)
#undef KERNEL

static quant_kernel *const quant_kernels[] = {
#define KERNEL(name, ...) kernel_##name,
    QUANT_FORMS(KERNEL)
#undef KERNEL
};

/* The same for many rows, where PAIRS: c (rows, BAND_PANELS) += a b, of all groups and the rows from `row` on. */
typedef void quant_pairs_kernel(float *c, const pair_rows *a, int row, int rows,
                                const panel_part *b, int panels);
#define KERNEL(name, ...)                                                                          \
    static void pairs_##name(float *c, const pair_rows *a, int row, int rows, const panel_part *b, \
                             int panels) {                                                         \
        const quant_form f = {__VA_ARGS__};                                                        \
        if (PAIRS) quant_pairs(f, c, a, row, rows, b, panels);                                     \
    }
QUANT_FORMS(KERNEL)
#undef KERNEL

static quant_pairs_kernel *const quant_pairs_kernels[] = {
#define KERNEL(name, ...) pairs_##name,
    QUANT_FORMS(KERNEL)
#undef KERNEL
};

/* What a level compiles from this file: tests call it. */
typedef struct quant_level {
    quant_kernel *const *kernels;
    void (*round_row)(rounded_rows *out, int row, const bf16 *a, int K, int bits);
    quant_pairs_kernel *const *pairs_kernels;
    void (*round_pairs)(const pair_rows *out, int row, const bf16 *a, int K);
    int band_panels, bytes, pairs;
} quant_level;
#define QUANT_LEVEL                                                                                \
    {quant_kernels, round_row, quant_pairs_kernels, round_pairs, BAND_PANELS, BYTES, PAIRS}

#endif
