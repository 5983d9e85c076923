/* band_quant.h: several rows with a section of a panel, or two. The section is unpacked once for all rows of
 * a tile, so that bands are alike for all forms. */
#ifndef CPU_BAND_QUANT_H
#define CPU_BAND_QUANT_H

#include "round_quant.h"

enum {
    MOST_VECTORS = BAND_PANELS * VECTORS,
    /* Bytes of a panel's group as bands read it: whole quads, or twice as many of 16 bits. */
    UNPACKED_GROUP = QUADS * CHUNK_BYTES * (BYTES ? 1 : 2),
    /* Whether all bands ask for what is read next, or the first one, which is sooner done. */
    EVENLY = LANES == 8,
};

/* With AVX2 a core takes few enough instructions a cycle for the loop's to count. All rounds at once are too many:
 * the sums then leave the registers. */
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__clang__)
#define UNROLL_TWICE _Pragma("GCC unroll 2")
#else
#define UNROLL_TWICE
#endif

/* The sum of q in half `half` of group g, or in all where a group has one scale. */
static inline int32_t sum_of(const rounded_rows *a, int row, int g, int halves, int half) {
    const int32_t *sum = a->sum[row];
    return halves == 1 ? sum[2 * g] + sum[2 * g + 1] : sum[2 * g + half];
}

/* The same times the group's scale. */
static inline float total_of(const rounded_rows *a, int row, int g, int halves, int half) {
    if (halves == 1) return a->total[row][g];
    return a->scale[row][g] * (float)a->sum[row][2 * g + half];
}

/* Scales and minima of a section of the panels of bands, and what multiplies them in forms of 256. Columns of the
 * second panel follow those of the first. */
typedef struct section_scales {
    float scale[2 * SECTION][BAND_PANELS * PANEL], least[2 * SECTION][BAND_PANELS * PANEL];
    float block[2][BAND_PANELS * PANEL];
} section_scales;

SPECIALIZED void open_scales(quant_form f, section_scales *s, int groups, int panel,
                             const uint8_t *at) {
    int halves = quant_halves(f);
    for (int g = 0; g < groups; g++) {
        const uint8_t *scales = at + quant_in_section(f, groups, g).scales;
        for (int half = 0; half < halves; half++)
            for (int v = 0; v < VECTORS; v++) {
                int to = g * halves + half, column = panel * PANEL + v * LANES;
                vf_store(&s->scale[to][column], quant_scale(f, scales, half, 0, v));
                if (f.rows == 2)
                    vf_store(&s->least[to][column], quant_scale(f, scales, half, 1, v));
            }
    }
    for (int v = 0; v < VECTORS && f.scale == SCALE_INT8; v++)
        for (int row = 0; row < f.rows; row++)
            vf_store(&s->block[row][panel * PANEL + v * LANES], quant_block_scale(at, row, v));
}

/* A section of the panels of bands. */
typedef struct open_section {
    int group, groups; /* of the rows, the first; of the section */
    int halves, zero, minima, of_block;
    int lines; /* that a band asks for with each group, of each panel */
    const uint8_t *ask[BAND_PANELS];
    const uint8_t *u[BAND_PANELS]; /* groups of UNPACKED_GROUP bytes */
    section_scales by;
    uint8_t room[BAND_PANELS][SECTION * UNPACKED_GROUP];
} open_section;

/* Makes 32 terms what they are in 8 bits. */
SPECIALIZED void whole_quads(quant_form f, uint8_t *out, const uint8_t *chunks) {
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            quad_pair u = quad_load(f, chunks + v * LANES * QUAD, i, 0);
            memcpy(out + i * CHUNK_BYTES + v * LANES * QUAD, &u.lower, sizeof u.lower);
            memcpy(out + (i + 4) * CHUNK_BYTES + v * LANES * QUAD, &u.upper, sizeof u.upper);
        }
    }
}

/* Two chunks of 16-bit numbers without their zero from a quad. */
static inline void put_halves(quant_form f, uint8_t *out, vb u) {
    quad_halves x = halves_of(u);
    x.even -= (int16_t)f.zero, x.odd -= (int16_t)f.zero;
    memcpy(out, &x.even, sizeof x.even);
    memcpy(out + CHUNK_BYTES, &x.odd, sizeof x.odd);
}
SPECIALIZED void words_of_quads(quant_form f, uint8_t *out, const uint8_t *chunks) {
    for (int i = 0; i < 4; i++)
        for (int v = 0; v < VECTORS; v++) {
            quad_pair u = quad_load(f, chunks + v * LANES * QUAD, i, 0);
            uint8_t *to = out + 2 * i * CHUNK_BYTES + v * LANES * QUAD;
            put_halves(f, to, u.lower);
            put_halves(f, to + 8 * CHUNK_BYTES, u.upper);
        }
}

SPECIALIZED void open_panel(quant_form f, open_section *s, int panel, const uint8_t *at) {
    if (BYTES && f.bits == 8) s->u[panel] = at + quant_in_section(f, s->groups, 0).chunks;
    for (int g = 0; g < s->groups; g++) {
        quant_place p = quant_in_section(f, s->groups, g);
        if (!BYTES)
            words_of_quads(f, s->room[panel] + g * UNPACKED_GROUP, at + p.chunks);
        else if (f.bits < 8)
            whole_quads(f, s->room[panel] + g * UNPACKED_GROUP, at + p.chunks);
    }
    open_scales(f, &s->by, s->groups, panel, at);
}

typedef struct band_integers {
    vi x[BAND][MOST_VECTORS];
} band_integers;

/* Rows of a band: numbers of the first one's group, and those between rows. */
typedef struct band_group {
    const int32_t *q, *sum;
    const float *scale;
} band_group;
enum {
    NEXT_Q = sizeof(((rounded_rows *)0)->q[0]) / sizeof(int32_t),
    NEXT_SUM = TERMS / HALF_GROUP,
    NEXT_SCALE = TERMS / QUANT_GROUP,
};

/* sums += products of `count` chunks of each panel with operands of rows. */
SPECIALIZED void add_chunks(band_integers *sums, const uint8_t *const *u, const int32_t *q,
                            int count, int M, int n) {
    UNROLL_TWICE
    for (int i = 0; i < count; i++) {
        vb x[MOST_VECTORS];
        UNROLL
        for (int v = 0; v < n; v++)
            x[v] = vb_load(u[v / VECTORS] + i * CHUNK_BYTES + v % VECTORS * LANES * QUAD);
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int v = 0; v < n; v++)
                sums->x[m][v] = BYTES ? bytes_dot(sums->x[m][v], x[v], q[m * NEXT_Q + i])
                                      : words_dot(sums->x[m][v], (vs)x[v], q[m * NEXT_Q + i]);
        }
    }
}

/* The sums of u - zero times q in half `half` of a group. */
SPECIALIZED band_integers sums_of_group(const uint8_t *const *u, const band_group *a, int zero,
                                        int halves, int half, int M, int n) {
    int count = UNPACKED_GROUP / CHUNK_BYTES / halves, first = half * count;
    const uint8_t *from[BAND_PANELS];
    for (int i = 0; i < BAND_PANELS; i++) from[i] = u[i] + first * CHUNK_BYTES;
    band_integers sums = {0};
    add_chunks(&sums, from, a->q + first, count, M, n);
    if (!BYTES) return sums;
    UNROLL
    for (int m = 0; m < M; m++) {
        const int32_t *sum = a->sum + m * NEXT_SUM;
        int32_t zeros = zero * (halves == 1 ? sum[0] + sum[1] : sum[half]);
        UNROLL
        for (int v = 0; v < n; v++) sums.x[m][v] = (sums.x[m][v] << 8) - zeros;
    }
    add_chunks(&sums, from, a->q + QUADS + first, count, M, n);
    return sums;
}

/* y (M rows, ld apart, n vectors) += the groups of a section by their scales. Lines are asked for meanwhile. */
SPECIALIZED void add_groups(float *y, int64_t ld, const open_section *s, const rounded_rows *a,
                            int row, int asks, int halves, int M, int n) {
    band_group at = {a->q[row][s->group], &a->sum[row][2 * s->group], &a->scale[row][s->group]};
    const uint8_t *u[BAND_PANELS];
    const float *scales = s->by.scale[0];
    for (int i = 0; i < BAND_PANELS; i++) u[i] = s->u[i];
    for (int g = 0; g < s->groups; g++) {
        for (int i = 0; i < asks; i++)
            for (int line = g * s->lines; line < (g + 1) * s->lines; line++)
                ask_for(s->ask[i] + line * 64);
        UNROLL
        for (int half = 0; half < halves; half++) {
            band_integers sums = sums_of_group(u, &at, s->zero, halves, half, M, n);
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int v = 0; v < n; v++) {
                    float *to = y + m * ld + v * LANES;
                    vf x = __builtin_convertvector(sums.x[m][v], vf);
                    vf_store(to, add_scaled(vf_load(to), x, at.scale[m * NEXT_SCALE],
                                            vf_load(scales + v * LANES)));
                }
            }
            scales += BAND_PANELS * PANEL;
        }
        at.q += 2 * QUADS, at.sum += 2, at.scale++;
        for (int i = 0; i < BAND_PANELS; i++) u[i] += UNPACKED_GROUP;
    }
}

/* y (M rows, ld apart, n vectors) += the minima of `count` groups by the rows' totals, ld_totals apart. */
SPECIALIZED void add_minima(float *y, int64_t ld, const section_scales *by, const float *totals,
                            int64_t ld_totals, int count, int M, int n) {
    vf sums[BAND][MOST_VECTORS];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++) sums[m][v] = vf_load(y + m * ld + v * LANES);
    }
    for (int i = 0; i < count; i++) {
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int v = 0; v < n; v++)
                sums[m][v] += vf_load(by->least[i] + v * LANES) * totals[m * ld_totals + i];
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++) vf_store(y + m * ld + v * LANES, sums[m][v]);
    }
}

static void open_minima(float *y, int64_t ld, const open_section *s, const rounded_rows *a, int row,
                        int M, int n) {
    float of_halves[LEAST_BAND][2 * SECTION];
    for (int m = 0; m < M; m += LEAST_BAND, y += LEAST_BAND * ld, row += LEAST_BAND) {
        const float *totals = &a->total[row][s->group];
        int64_t ld_totals = NEXT_SCALE;
        for (int r = 0; s->halves == 2 && r < LEAST_BAND; r++)
            for (int i = 0; i < 2 * s->groups; i++)
                of_halves[r][i] = total_of(a, row + r, s->group + i / 2, 2, i % 2);
        if (s->halves == 2) totals = of_halves[0], ld_totals = 2 * SECTION;
        int count = s->groups * s->halves;
        if (n == VECTORS)
            add_minima(y, ld, &s->by, totals, ld_totals, count, LEAST_BAND, VECTORS);
        else
            add_minima(y, ld, &s->by, totals, ld_totals, count, LEAST_BAND, MOST_VECTORS);
    }
}

/* c (M rows, n vectors) += a section. M is BAND of BAND_PANELS, or LEAST_BAND. */
static void open_band(float *c, const open_section *s, const rounded_rows *a, int row, int asks,
                      int M, int n) {
    enum { LD = BAND_PANELS * PANEL };
    float sums[2][BAND * LD], *y = s->of_block ? sums[0] : c;
    int64_t ld = s->of_block ? LD : COLS;
    if (s->of_block) memset(sums, 0, sizeof sums[0] * (size_t)(1 + s->minima));
    if (s->minima) open_minima(s->of_block ? sums[1] : c, ld, s, a, row, M, n);
#define GROUPS(rows, vectors)                                                                      \
    do {                                                                                           \
        if (s->halves == 1)                                                                        \
            add_groups(y, ld, s, a, row, asks, 1, rows, vectors);                                  \
        else                                                                                       \
            add_groups(y, ld, s, a, row, asks, 2, rows, vectors);                                  \
    } while (0)
    if (BAND > LEAST_BAND && M == BAND)
        GROUPS(BAND, MOST_VECTORS);
    else if (BAND_PANELS == 1 || n == MOST_VECTORS)
        GROUPS(LEAST_BAND, MOST_VECTORS);
    else
        GROUPS(LEAST_BAND, VECTORS);
#undef GROUPS
    for (int m = 0; m < M && s->of_block; m++)
        for (int v = 0; v < n; v++) {
            float *to = c + m * COLS + v * LANES;
            int at = m * LD + v * LANES;
            vf total = vf_load(to) + vf_load(sums[0] + at) * vf_load(&s->by.block[0][v * LANES]);
            if (s->minima) total += vf_load(sums[1] + at) * vf_load(&s->by.block[1][v * LANES]);
            vf_store(to, total);
        }
}

/* c (rows up to `end`, panels) += a section. */
static void open_bands(float *c, open_section *s, const rounded_rows *a, int row, int end,
                       int panels) {
    int asks = s->ask[0] ? panels : 0, asking = EVENLY ? (int)cpu_div_up(end - row, BAND) : 1;
    s->lines = (int)cpu_div_up(s->lines, asking);
    for (int M; row < end; row += M, c += M * COLS) {
        M = panels == BAND_PANELS && end - row >= BAND ? BAND : LEAST_BAND;
        open_band(c, s, a, row, asks, M, panels * VECTORS);
        if (!EVENLY) asks = 0;
        for (int i = 0; i < asks; i++) s->ask[i] += s->groups * s->lines * 64;
    }
}

/* c (rows up to `end`, whole bands; panels) += a b over n_groups groups of 32 terms. */
SPECIALIZED void quant_band_rows(quant_form f, float *c, const rounded_rows *a, int row, int end,
                                 const panel_part *b, int n_groups, int panels) {
    open_section s;
    s.halves = quant_halves(f), s.zero = f.zero;
    s.minima = f.rows == 2, s.of_block = f.scale == SCALE_INT8;
    int64_t at = 0;
    for (s.group = 0; s.group < n_groups;
         s.group += SECTION, at += quant_section_bytes(f, SECTION)) {
        s.groups = cpu_min(SECTION, n_groups - s.group);
        s.lines = (int)cpu_div_up(quant_section_bytes(f, s.groups), 64 * s.groups);
        for (int i = 0; i < BAND_PANELS; i++) s.u[i] = s.room[i];
        for (int i = 0; i < panels; i++) {
            s.ask[i] = b[i].next ? b[i].next + at : NULL;
            open_panel(f, &s, i, b[i].at + at);
        }
        open_bands(c, &s, a, row, end, panels);
    }
}

#endif
