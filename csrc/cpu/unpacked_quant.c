/* unpacked_quant.c: the products of a training step with weights of 4 to 8 bits. Forward and backward must
 * multiply by the same numbers, so activations are not rounded, and weights become bf16: a slab of columns
 * of the product at a time, in the workspace, which the bf16 table multiplies. A weight is unpacked once for
 * all rows of the batch. */
#include "unpacked_quant.h"

#include "quant.h"

enum { SLAB_BYTES = 4 << 20, LEAST_COLUMNS = 32 };

/* Terms that a panel of a slab has room for: an odd number of pairs, each a cache line, as panels whose distance
 * is a power of two would share few sets of the cache. */
static int slab_rows(int K) {
    return (int)(pack_pairs(K) | 1) * PAIR;
}

/* Columns of a slab with K terms each, where `halves` of them come together. */
static int slab_columns(int K, int halves) {
    int64_t column = (int64_t)sizeof(bf16) * slab_rows(K) * halves;
    int64_t most = SLAB_BYTES / column / LEAST_COLUMNS * LEAST_COLUMNS;
    return most > LEAST_COLUMNS ? (int)most : LEAST_COLUMNS;
}

size_t cpu_product_room(int K) {
    size_t least = 2 * sizeof(bf16) * LEAST_COLUMNS * (size_t)slab_rows(K);
    return least > SLAB_BYTES ? least : SLAB_BYTES;
}

typedef struct unpacking {
    const product *p;
    const quant_head *w;
    bf16 *slab;
    int first, cols; /* of the product */
    int n_cols;      /* of w */
} unpacking;

/* Terms k to k + 31 of up to 16 rows of w, rounded; zeros past its end. */
static void unpack_block(const unpacking *a, int row, int rows, int k,
                         bf16 block[PANEL][QUANT_GROUP]) {
    for (int j = 0; j < PANEL; j++) {
        float terms[QUANT_GROUP] = {0};
        quant_form f = {0};
        int in_part = 0;
        const uint8_t *panel = NULL;
        if (j < rows) panel = quant_panel_of(a->w, a->n_cols, row + j, &f, &in_part);
        if (panel) quant_terms(f, panel, a->n_cols, k, in_part % PANEL, terms);
        FOR_LANES (i, n, QUANT_GROUP) vf_put(block[j] + i, vf_load(terms + i), n);
    }
}

/* Terms k to k + 31 of the 16 rows of a panel of w: term t of all rows is out[t % 16][t / 16]. */
static void unpack_panel(quant_form f, const uint8_t *panel, int K, int k,
                         bf16 out[PANEL][PAIR][PANEL]) {
    quant_place p = quant_place_of(f, K, k / QUANT_GROUP);
    for (int v = 0; v < VECTORS; v++)
        for (int i = 0; i < 4; i++) {
            quad_pair u = quad_load(f, panel + p.chunks + v * LANES * QUAD, i, 0);
            for (int upper = 0; upper < 2; upper++) {
                int half = upper * (quant_halves(f) - 1);
                const uint8_t *scales = panel + p.scales;
                vf scale = quant_scale(f, scales, half, 0, v), least = {0};
                if (f.rows == 2) least = quant_scale(f, scales, half, 1, v);
                if (f.scale == SCALE_INT8) scale *= quant_block_scale(panel + p.blocks, 0, v);
                if (f.scale == SCALE_INT8 && f.rows == 2)
                    least *= quant_block_scale(panel + p.blocks, 1, v);
                vu bytes = (vu)(upper ? u.upper : u.lower);
                for (int t = 0; t < QUAD; t++) {
                    vi integer = (vi)(bytes >> 8 * t & 255) - f.zero;
                    vf product = scale * __builtin_convertvector(integer, vf);
                    vf_put(&out[i * QUAD + t][upper][v * LANES],
                           f.rows == 2 ? product + least : product, LANES);
                }
            }
        }
}

/* Where 16 rows of w from `row` on are one panel: that, else NULL. */
static const uint8_t *whole_panel(const unpacking *a, int row, int rows, quant_form *f) {
    quant_form last;
    int in_part = 0, last_in_part = 0;
    const uint8_t *panel = quant_panel_of(a->w, a->n_cols, row, f, &in_part);
    if (rows < PANEL || !panel || in_part % PANEL) return NULL;
    return panel == quant_panel_of(a->w, a->n_cols, row + PANEL - 1, &last, &last_in_part) ? panel
                                                                                           : NULL;
}

/* Panels of the form that forward reads: 16 rows of w each, those of a twin behind the others. */
static void unpack_forward(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const unpacking *a = args;
    int K = a->p->K;
    int64_t per_half = pack_panels(a->cols), panel = pack_panel_size(K);
    for (int64_t i = begin; i < end; i++) {
        int in_half = (int)(i % per_half) * PANEL;
        int row = a->first + in_half + (i >= per_half ? a->p->twin : 0);
        int rows = cpu_min(PANEL, a->cols - in_half);
        quant_form f = {0};
        const uint8_t *from = whole_panel(a, row, rows, &f);
        for (int k = 0; k < K; k += QUANT_GROUP) {
            if (from && K - k >= QUANT_GROUP) {
                bf16 terms[PANEL][PAIR][PANEL];
                unpack_panel(f, from, K, k, terms);
                for (int t = 0; t < QUANT_GROUP; t += PAIR)
                    interleave_rows((pair *)(a->slab + i * panel + (k + t) * PANEL),
                                    terms[t % PANEL][t / PANEL], terms[t % PANEL + 1][t / PANEL],
                                    PANEL);
                continue;
            }
            bf16 block[PANEL][QUANT_GROUP];
            pair turned[PANEL][PANEL];
            unpack_block(a, row, rows, k, block);
            transpose_pairs(turned[0], PANEL, (const pair *)block, PANEL);
            memcpy(a->slab + i * panel + k * PANEL, turned,
                   sizeof turned[0] * (size_t)pack_pairs(cpu_min(QUANT_GROUP, K - k)));
        }
    }
}

/* 16 rows of w, of the K that count, in the form that backward reads. */
static void unpack_backward(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const unpacking *a = args;
    int64_t panel = pack_panel_size(slab_rows(a->p->K));
    for (int64_t i = begin; i < end; i++) {
        int row = (int)i * PANEL, rows = cpu_min(PANEL, a->p->K - row);
        quant_form f = {0};
        const uint8_t *from = whole_panel(a, a->p->first + row, rows, &f);
        for (int c = 0; c < a->cols; c += QUANT_GROUP) {
            int cols = cpu_min(QUANT_GROUP, a->cols - c);
            if (from && a->n_cols - a->first - c >= QUANT_GROUP) {
                bf16 terms[PANEL][PAIR][PANEL];
                pair turned[PANEL][PANEL]; /* pairs of rows: 8 of 16 columns, 8 of the next 16 */
                unpack_panel(f, from, a->n_cols, a->first + c, terms);
                transpose_pairs(turned[0], PANEL, (const pair *)terms, PANEL);
                for (int h = 0; h < cols; h += PANEL)
                    memcpy(a->slab + (c + h) / PANEL * panel + row * PANEL, turned[h / PAIR],
                           sizeof turned / PAIR);
                continue;
            }
            bf16 block[PANEL][QUANT_GROUP];
            unpack_block(a, a->p->first + row, rows, a->first + c, block);
            for (int h = 0; h < cols; h += PANEL) {
                bf16 *out = a->slab + (c + h) / PANEL * panel + row * PANEL;
                for (int r = 0; r < rows; r += PAIR)
                    interleave_rows((pair *)(out + r * PANEL), block[r] + h, block[r + 1] + h,
                                    PANEL);
            }
        }
    }
}

/* An epilogue of a slab, whose columns begin at 0. */
typedef struct shifted {
    const product *p;
    int first;
} shifted;

static void shifted_epilogue(void *args, const float *y, const float *y_twin, int ldy, int row,
                             int rows, int col, int cols) {
    const shifted *s = args;
    s->p->epilogue(s->p->epilogue_args, y, y_twin, ldy, row, rows, s->first + col, cols);
}

void quant_unpacked_product(gpt_ctx *ctx, product *p) {
    int forward = p->kind == PRODUCT_NT, halves = p->twin ? 2 : 1;
    unpacking a = {.p = p, .w = p->w, .slab = ctx->workspace, .n_cols = forward ? p->K : p->N};
    int most = slab_columns(p->K, halves);
    for (a.first = 0; a.first < p->N; a.first += most) {
        a.cols = cpu_min(most, p->N - a.first);
        shifted s = {p, a.first};
        product slab = *p;
        slab.N = a.cols;
        slab.first = 0, slab.rows = slab_rows(p->K); /* the slab has those K rows alone */
        slab.w = slab.panels = a.slab;
        slab.twin = p->twin ? a.cols : 0;
        if (p->out) slab.out = p->out + a.first;
        product_more more;
        if (p->more) {
            more = *p->more;
            more.first += a.first;
            slab.more = &more;
        }
        if (p->epilogue) slab.epilogue = shifted_epilogue, slab.epilogue_args = &s;
        if (forward)
            cpu_parallel(ctx, unpack_forward, &a, halves * pack_panels(a.cols), 4);
        else
            cpu_parallel(ctx, unpack_backward, &a, pack_panels(p->K), 4);
        CPU_ACTS_NAME(product)(ctx, &slab);
    }
}
