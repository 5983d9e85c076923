/* kernel_quant.h: products of rows rounded to 8 bits with weights of 4 to 8 bits, see quant.h. Groups
 * of terms are summed as integers, on vectors or, for 16 rows at a time, on tiles of AMX. */
#ifndef CPU_KERNEL_QUANT_H
#define CPU_KERNEL_QUANT_H

#include "round_quant.h"

#ifdef CPU_AMX
#include "tiles.h"
#endif

/* The sum of q in group g of the form. */
static inline int32_t sum_of(quant_form f, const rounded_rows *a, int row, int g) {
    const int16_t *sum = a->sum[row];
    return f.group == QUANT_GROUP ? sum[2 * g] + sum[2 * g + 1] : sum[g];
}

/* The sum of q in half `half` of group g, or in all where the form has one scale, times the group's scale. */
static inline float total_of(quant_form f, const rounded_rows *a, int row, int g, int half) {
    if (f.group == QUANT_GROUP) return a->total[row][g];
    return a->scale[row][g] * (float)a->sum[row][2 * g + half];
}

/* The sums of both halves of 32 terms, in every lane. */
static inline vs sum_pairs(const rounded_rows *a, int row, int g) {
    int32_t both;
    memcpy(&both, &a->sum[row][2 * g], sizeof both);
    return (vs)((vi){0} + both);
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

/* What pairs of each half of 32 terms are multiplied by as they are joined. */
typedef struct joins {
    vs by[2][MOST_VECTORS];
} joins;

SPECIALIZED joins joins_of(quant_form f, const band_section *s, int g, int n) {
    joins join;
    UNROLL
    for (int half = 0; half < quant_halves(f); half++) {
        UNROLL
        for (int v = 0; v < n; v++) {
            vi by = (vi){0} + 1;
            if (scales_join(f)) by = quant_integers(f, scales_of(f, s, g, v), half, 0, v % VECTORS);
            join.by[half][v] = pairs_of(by, by);
        }
    }
    return join;
}

/* Row 0: its sums of upper quads, which are 16 times what they should be, join the others or stay. */
SPECIALIZED void join_shifted(band_integers *sums, int stay, int n) {
    UNROLL
    for (int v = 0; v < n; v++) {
        vi upper = sums->x[1][0][v] >> 4;
        if (stay)
            sums->x[1][0][v] = upper;
        else
            sums->x[0][0][v] += upper;
    }
}

/* The sums of u times q of group g: of its halves, or of all where the form has one scale, or where the
 * integer scales join. Where asked, lines of later groups are asked for. */
SPECIALIZED band_integers group_sums(quant_form f, const band_section *s, int g, int M, int n) {
    int in_pairs = quads_in_pairs(f), last = quant_halves(f) - 1, held = 0;
    int shifted = M == 1 && !HAS_PAIRS && f.bits == 4; /* upper quads are 16 times what they are */
    int upper_to = shifted ? 1 : last;
    int64_t at = quant_in_section(f, s->groups, g).chunks;
    band_integers sums = {0};
    vs pairs[2][BAND][MOST_VECTORS] = {0};
    joins join = joins_of(f, s, g, in_pairs ? n : 0);
    UNROLL
    for (int i = 0; i < 4; i++) {
        quad_pair u[MOST_VECTORS];
        UNROLL
        for (int v = 0; v < n; v++)
            u[v] = quad_load(f, s->at[v / VECTORS] + at + v % VECTORS * LANES * QUAD, i, shifted);
        for (int v = 0; v < s->asks; v++) {
            ask_for(s->ask[v] + at + i * CHUNK_BYTES);
            if (i + 4 < f.bits) ask_for(s->ask[v] + at + (i + 4) * CHUNK_BYTES);
        }
        UNROLL
        for (int m = 0; m < M; m++) {
            const int8_t *q = &s->a->q[s->row + m][(s->group + g) * QUANT_GROUP + i * QUAD];
            int32_t lower, upper;
            memcpy(&lower, q, sizeof lower);
            memcpy(&upper, q + 4 * QUAD, sizeof upper);
            UNROLL
            for (int v = 0; v < n; v++) {
                if (in_pairs) {
                    pairs[0][m][v] = pairs_dot(pairs[0][m][v], u[v].lower, lower);
                    pairs[last][m][v] = pairs_dot(pairs[last][m][v], u[v].upper, upper);
                } else {
                    sums.x[0][m][v] = quad_dot(sums.x[0][m][v], u[v].lower, lower);
                    sums.x[upper_to][m][v] = quad_dot(sums.x[upper_to][m][v], u[v].upper, upper);
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
                    vi *to = &sums.x[scales_join(f) ? 0 : half][m][v];
                    *to = pairs_join(*to, pairs[half][m][v], join.by[half][v]);
                    pairs[half][m][v] = (vs){0};
                }
            }
        }
    }
    if (shifted) join_shifted(&sums, last, n);
    return sums;
}

/* The sums of q in both halves of group g, each times its integer scales. */
static inline vi joined_zeros(quant_form f, const band_section *s, int g, int m, int v) {
    const uint8_t *scales = scales_of(f, s, g, v);
    vs by = pairs_of(quant_integers(f, scales, 0, 0, v % VECTORS),
                     quant_integers(f, scales, quant_halves(f) - 1, 0, v % VECTORS));
    return pairs_join((vi){0}, sum_pairs(s->a, s->row + m, s->group + g), by);
}

/* sums += those of group g, by scales and without the factor of the block. */
SPECIALIZED void add_group(quant_form f, band_sums *sums, const band_section *s, int g, int M,
                           int n) {
    band_integers group = group_sums(f, s, g, M, n);
    int halves = scales_join(f) ? 1 : quant_halves(f);
    UNROLL
    for (int half = 0; half < halves; half++) {
        UNROLL
        for (int v = 0; v < n; v++) {
            vf scale = {0};
            if (!scales_join(f))
                scale = quant_scale(f, scales_of(f, s, g, v), half, 0, v % VECTORS);
            UNROLL
            for (int m = 0; m < M; m++) {
                int row = s->row + m, at = (s->group + g) * quant_halves(f) + half;
                vi sum = group.x[half][m][v];
                if (scales_join(f) && f.zero)
                    sum -= zero_to_subtract(f) * joined_zeros(f, s, g, m, v);
                else if (f.zero)
                    sum -= zero_to_subtract(f) * sum_of(f, s->a, row, at);
                vf x = __builtin_convertvector(sum, vf);
                if (!scales_join(f)) x *= scale;
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

/* y (16 rows) += sums, by the scales of half `half` of group g of a section that begins at `at`. */
SPECIALIZED void add_tile(quant_form f, float *y, int32_t sums[TILE_ROWS][PANEL],
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
            vi sum;
            memcpy(&sum, &sums[m][v * LANES], sizeof sum);
            sum -= f.zero * sum_of(f, a, row + m, g * quant_halves(f) + half);
            total += __builtin_convertvector(sum, vf) * (scale * a->scale[row + m][g]);
            if (f.rows == 2) total += least * total_of(f, a, row + m, g, half);
            vf_store(y + m * COLS + v * LANES, total);
        }
    }
}

/* c (16 rows, one panel) += a b over n_groups groups of 32: each of the form's is one product of
 * tiles, whose sums then meet their scales. */
SPECIALIZED void quant_tiles(quant_form f, float *c, const rounded_rows *a, int row,
                             const panel_part *b, int n_groups) {
    int32_t sums[TILE_ROWS][PANEL];
    uint8_t room[QUADS * CHUNK_BYTES];
    for (int g = 0; g < n_groups; g++) {
        const uint8_t *at = b->at + g / SECTION * quant_section_bytes(f, SECTION);
        int groups = cpu_min(SECTION, n_groups - g / SECTION * SECTION);
        quant_place p = quant_in_section(f, groups, g % SECTION);
        const uint8_t *quads = whole_quads(f, room, at + p.chunks);
        for (int half = 0; half < quant_halves(f); half++) {
            int first = half * f.group;
            tiles_sync();
            tile_zero(TILE_SUMS);
            tile_load(TILE_A, &a->q[row][g * QUANT_GROUP + first], (int64_t)sizeof a->q[0]);
            tile_load(TILE_B, quads + first / QUAD * CHUNK_BYTES, CHUNK_BYTES);
            tile_dot_bytes(TILE_SUMS, TILE_A, TILE_B);
            tile_store(TILE_SUMS, sums, sizeof sums[0]);
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
    if (rows == 1) { /* one panel after another, as they come from memory */
        for (int i = 0; i < panels; i++)
            quant_band(f, c + i * PANEL, a, 0, b + i, b + i, b->next ? 1 : 0, n_groups, 1, 1);
        return;
    }
    const panel_part *ask = b, *end = b->next ? b + panels : b; /* a panel a band */
    for (; BAND > 1 && row + BAND <= rows; row += BAND, ask += ask < end)
        quant_band(f, c + row * COLS, a, row, b, ask, ask < end, n_groups, BAND, panels);
    for (; row < rows; row++, ask += ask < end)
        quant_band(f, c + row * COLS, a, row, b, ask, ask < end, n_groups, 1, panels);
}

/* Term k of LANES columns from vector v on, of a panel from which n_groups groups are read. */
SPECIALIZED vf quant_term(quant_form f, const uint8_t *panel, int n_groups, int k, int v) {
    int g = k / QUANT_GROUP, quad = k % QUANT_GROUP / QUAD, half = k % QUANT_GROUP / f.group;
    const uint8_t *at = panel + g / SECTION * quant_section_bytes(f, SECTION);
    quant_place p =
        quant_in_section(f, cpu_min(SECTION, n_groups - g / SECTION * SECTION), g % SECTION);
    quad_pair u = quad_load(f, at + p.chunks + v * LANES * QUAD, quad % 4, 0);
    vi x = (vi)((vu)(quad < 4 ? u.lower : u.upper) >> 8 * (k % QUAD)) & 255;
    vf scale = quant_scale(f, at + p.scales, half, 0, v), least = {0};
    if (f.rows == 2) least = quant_scale(f, at + p.scales, half, 1, v);
    if (f.scale == SCALE_INT8) scale *= quant_block_scale(at, 0, v);
    if (f.scale == SCALE_INT8 && f.rows == 2) least *= quant_block_scale(at, 1, v);
    return __builtin_convertvector(x - f.zero, vf) * scale + least;
}

/* c (rows, panels) += the rows' terms apart. Mostly it is the same one in all rows. */
SPECIALIZED void add_apart(quant_form f, float *c, const rounded_rows *a, int rows,
                           const panel_part *b, int n_groups, int panels) {
    vf w[MOST_VECTORS] = {0};
    for (int row = 0, known = -1; row < rows; row++, c += COLS) {
        int k = a->apart[row];
        if (k < 0) continue;
        if (k != known) {
            UNROLL
            for (int v = 0; v < panels * VECTORS; v++)
                w[v] = quant_term(f, b[v / VECTORS].at, n_groups, k, v % VECTORS);
            known = k;
        }
        UNROLL
        for (int v = 0; v < panels * VECTORS; v++)
            vf_store(c + v * LANES, vf_load(c + v * LANES) + a->apart_x[row] * w[v]);
    }
}

/* One function for each form: c (rows, panels) += a b. `panels` is 1 or BAND_PANELS. */
typedef void quant_kernel(float *c, const rounded_rows *a, int rows, const panel_part *b,
                          int n_groups, int panels);
#define KERNEL(name, ...)                                                                          \
    static void kernel_##name(float *c, const rounded_rows *a, int rows, const panel_part *b,      \
                              int n_groups, int panels) {                                          \
        const quant_form f = {__VA_ARGS__};                                                        \
        if (panels == BAND_PANELS) {                                                               \
            quant_bands(f, c, a, rows, b, n_groups, BAND_PANELS);                                  \
            add_apart(f, c, a, rows, b, n_groups, BAND_PANELS);                                    \
        } else {                                                                                   \
            quant_bands(f, c, a, rows, b, n_groups, 1);                                            \
            add_apart(f, c, a, rows, b, n_groups, 1);                                              \
        }                                                                                          \
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
