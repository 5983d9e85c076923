/* pairs_quant.h: many rows with weights of 4 to 8 bits, as bf16 numbers. Rows that are rounded (round_quant.h) are such
 * numbers, and so is a weight's integer without its zero. A section of two panels becomes pairs of them (pack.h) once
 * for all rows of a tile. A group's sum in float32 is exact (rounded_bits), and meets its scale as that of integers
 * does: a row has the same bits in both ways. */
#ifndef CPU_PAIRS_QUANT_H
#define CPU_PAIRS_QUANT_H

#include "band_quant.h"

enum {
    PAIRS_BAND = 6, /* rows whose sums of a group, and of all groups, fit the registers */
    LD_PAIRS = BAND_PANELS * PANEL, /* from row to row of sums */
};

/* Rows of `a`, rounded: `groups` of 32 terms, zeros past the last, and how far it is from row to row. */
typedef struct pair_rows {
    bf16 *a;
    float *totals; /* NULL, or of each group and of its halves, [3][groups] */
    int64_t lda;   /* an odd number of cache lines */
    int groups, bits;
} pair_rows;

static inline int64_t pairs_lda(int K) {
    return (quant_groups(K) | 1) * QUANT_GROUP;
}

static void round_pairs(const pair_rows *out, int row, const bf16 *a, int K) {
    bf16 *to = out->a + row * out->lda;
    for (int i = 0; i < out->groups; i++, a += QUANT_GROUP, to += QUANT_GROUP) {
        rounded_group g = round_group(a, cpu_min(QUANT_GROUP, K - i * QUANT_GROUP), out->bits);
        vf sum[2] = {{0}, {0}};
        UNROLL
        for (int v = 0; v < QUANT_GROUP / LANES; v++) {
            vf_put(to + v * LANES, g.whole[v] * g.scale, LANES);
            sum[v * LANES / HALF_GROUP] += g.whole[v];
        }
        if (!out->totals) continue;
        float *totals = out->totals + row * 3 * (int64_t)out->groups;
        float first = vf_sum(sum[0]), second = vf_sum(sum[1]);
        totals[i] = g.scale * (first + second);
        totals[out->groups + 2 * i] = g.scale * first;
        totals[out->groups + 2 * i + 1] = g.scale * second;
    }
}

/* A section of the panels of bands. */
typedef struct pairs_section {
    int group, groups; /* of the rows, the first; of the section */
    int halves, minima, of_block;
    section_scales by;
    bf16 b[BAND_PANELS][SECTION * QUANT_GROUP * PANEL];
} pairs_section;

/* Two pairs of terms of all columns from a quad. */
static inline void put_pairs(quant_form f, bf16 *out, vb quad) {
    vu x[QUAD];
    UNROLL
    for (int t = 0; t < QUAD; t++) {
        vi u = (vi)((vu)quad >> 8 * t & 255) - f.zero;
        x[t] = (vu) __builtin_convertvector(u, vf); /* whose lower half is zero */
    }
    UNROLL
    for (int i = 0; i < QUAD / PAIR; i++) {
        vu two = x[PAIR * i] >> 16 | x[PAIR * i + 1];
        memcpy(out + i * PANEL * PAIR, &two, sizeof two);
    }
}

SPECIALIZED void open_pairs(quant_form f, pairs_section *s, int panel, const uint8_t *at) {
    for (int g = 0; g < s->groups; g++) {
        const uint8_t *chunks = at + quant_in_section(f, s->groups, g).chunks;
        UNROLL
        for (int i = 0; i < 4; i++) {
            UNROLL
            for (int v = 0; v < VECTORS; v++) {
                quad_pair u = quad_load(f, chunks + v * LANES * QUAD, i, 0);
                bf16 *to = s->b[panel] + (g * QUANT_GROUP + i * QUAD) * PANEL + v * LANES * PAIR;
                put_pairs(f, to, u.lower);
                put_pairs(f, to + 4 * QUAD * PANEL, u.upper);
            }
        }
    }
    open_scales(f, &s->by, s->groups, panel, at);
}

/* c (M rows, so many panels) += the groups of a section of `rows` by their scales, and in forms of 256 these sums, and
 * the minima's, by what multiplies them. */
SPECIALIZED void add_pair_groups(float *c, const pairs_section *s, const bf16 *rows, int64_t lda,
                                 const float *minima, int M, int panels) {
    int n = panels * VECTORS, n_pairs = QUANT_GROUP / PAIR / s->halves;
    const bf16 *b = s->b[0];
    vf total[PAIRS_BAND][MOST_VECTORS];
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++)
            total[m][v] = s->of_block ? vf_set(0) : vf_load(c + m * LD_PAIRS + v * LANES);
    }
    for (int i = 0; i < s->groups * s->halves; i++) {
        vf sum[PAIRS_BAND][MOST_VECTORS];
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int v = 0; v < n; v++) sum[m][v] = vf_set(0);
        }
        add_pairs(sum, rows, lda, b, SECTION * QUANT_GROUP * PANEL, NULL, n_pairs, M, panels, 0);
        rows += n_pairs * PAIR, b += n_pairs * PAIR * PANEL;
        UNROLL
        for (int v = 0; v < n; v++) {
            vf scale = vf_load(&s->by.scale[i][v * LANES]);
            UNROLL
            for (int m = 0; m < M; m++) total[m][v] += sum[m][v] * scale;
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int v = 0; v < n; v++) {
            float *to = c + m * LD_PAIRS + v * LANES;
            if (s->of_block)
                total[m][v] = vf_load(to) + total[m][v] * vf_load(&s->by.block[0][v * LANES]);
            if (s->of_block && s->minima)
                total[m][v] += vf_load(minima + m * LD_PAIRS + v * LANES) *
                               vf_load(&s->by.block[1][v * LANES]);
            vf_store(to, total[m][v]);
        }
    }
}

/* c (M rows, so many panels) += a section, of rows from `row` on. */
SPECIALIZED void pairs_band(float *c, const pairs_section *s, const pair_rows *a, int row, int M,
                            int panels) {
    float of_block[PAIRS_BAND * LD_PAIRS], *minima = s->of_block ? of_block : c;
    if (s->minima) {
        int64_t ld = 3 * (int64_t)a->groups;
        const float *totals = a->totals + row * ld;
        totals += s->halves == 1 ? s->group : a->groups + 2 * s->group;
        if (s->of_block) memset(of_block, 0, sizeof of_block);
        add_minima(minima, LD_PAIRS, &s->by, totals, ld, s->groups * s->halves, M,
                   panels * VECTORS);
    }
    const bf16 *rows = a->a + row * a->lda + s->group * QUANT_GROUP;
    add_pair_groups(c, s, rows, a->lda, minima, M, panels);
}

#define PAIRS_BAND_OF(n)                                                                           \
    __attribute__((noinline)) static void pairs_band_##n(                                          \
        float *c, const pairs_section *s, const pair_rows *a, int row, int panels) {               \
        if (panels < BAND_PANELS)                                                                  \
            pairs_band(c, s, a, row, n, 1);                                                        \
        else                                                                                       \
            pairs_band(c, s, a, row, n, BAND_PANELS);                                              \
    }
PAIRS_BAND_OF(1)
PAIRS_BAND_OF(2)
PAIRS_BAND_OF(3)
PAIRS_BAND_OF(4)
PAIRS_BAND_OF(5)
PAIRS_BAND_OF(6)

typedef void pairs_band_fn(float *c, const pairs_section *s, const pair_rows *a, int row,
                           int panels);
static pairs_band_fn *const pairs_band_of[] = {
    NULL, pairs_band_1, pairs_band_2, pairs_band_3, pairs_band_4, pairs_band_5, pairs_band_6};

/* Asks for the lines from *at on, unless it is NULL, and moves it on. */
static inline void ask_for_lines(const uint8_t **at, int lines) {
    if (!*at) return;
    for (int i = 0; i < lines; i++) ask_for(*at + i * 64);
    *at += lines * 64;
}

/* c (rows, LD_PAIRS apart; panels) += a b over all groups, of rows from `row` on, in as few bands as can be, of about
 * the same size. They ask for the next section, and those of the last one for the begin of `next`. */
SPECIALIZED void quant_pairs(quant_form f, float *c, const pair_rows *a, int row, int rows,
                             const panel_part *b, int panels) {
    pairs_section s;
    s.halves = quant_halves(f), s.minima = f.rows == 2, s.of_block = f.scale == SCALE_INT8;
    int64_t at = 0, bytes = quant_section_bytes(f, SECTION);
    for (s.group = 0; s.group < a->groups; s.group += SECTION, at += bytes) {
        s.groups = cpu_min(SECTION, a->groups - s.group);
        const uint8_t *ask[BAND_PANELS];
        for (int i = 0; i < panels; i++) {
            ask[i] = s.group + SECTION < a->groups ? b[i].at + at + bytes : b[i].next;
            open_pairs(f, &s, i, b[i].at + at);
        }
        int n_bands = (int)cpu_div_up(rows, PAIRS_BAND);
        int lines = (int)cpu_div_up(bytes, 64 * (int64_t)n_bands);
        for (int r = 0, M; r < rows; r += M, n_bands--) {
            M = (int)cpu_div_up(rows - r, n_bands);
            for (int i = 0; i < panels; i++) ask_for_lines(&ask[i], lines);
            pairs_band_of[M](c + r * LD_PAIRS, &s, a, row + r, panels);
        }
    }
}

#endif
