/* product_quant.c: products with weights of 4 to 8 bits, see quant.h. Such weights are not trained; a product
 * of a training step is unpacked_quant.c's. */
#include "kernel_quant.h"
#include "unpacked_quant.h"

enum { BLOCK = 32 /* columns of an epilogue */ };
/* Up to FEW rows, panels come from memory and are asked for: those that follow, or by one row, which is over so soon,
 * the terms so many bytes further in the same ones. With fewer than 8 bits a row takes longer for a byte, and the
 * processor's own prefetching, which is near, is late (measured with Zen 4). */
enum { FEW = 64, NEAR = 24 * CHUNK_BYTES, FAR = 4 * NEAR };
/* More rows than PAIRS_LEAST are multiplied in pairs. A tile of them has two panels, which are unpacked once for as
 * many rows as there is room for sums. */
enum { PAIRS_LEAST = 32, PAIRS_ROWS = ROWS * COLS / LD_PAIRS };

/* A thread's scratch. */
typedef struct tile_memory {
    float sums[2][ROWS * COLS]; /* of the tile, and of its twin */
    rounded_rows rows;
} tile_memory;
_Static_assert(sizeof(tile_memory) <= CPU_SCRATCH, "scratch");
enum { ROUNDED_TILES = CPU_ROUNDED / sizeof(rounded_rows) };

typedef struct product_tiles {
    gpt_ctx *ctx;
    const product *p;
    const quant_head *w;
    rounded_rows *all;      /* (n_rows) rounded beforehand; NULL: each tile rounds its own */
    pair_rows pairs;        /* of rows in pairs; its a is NULL without */
    int bits;               /* that rows are rounded to */
    int first, M;           /* rows of the product that are multiplied now */
    int rows, cols, n_rows; /* of a tile; tiles below one another */
} product_tiles;

/* How far it is from row to row of a tile's sums. */
static int ld_sums(const product_tiles *t) {
    return t->pairs.a ? LD_PAIRS : COLS;
}

/* Rows and columns of the product, and where these begin in their part of the weights. */
typedef struct tile {
    int row, rows, col, cols;
    int part, in_part;
} tile;

/* Columns of a part, of those that the product has. */
static int part_columns(const product_tiles *t, int part, int first) {
    return cpu_max(0, cpu_min(t->w->parts[part].rows, t->p->N - first));
}

/* Tiles of all parts; of a twin the first half, whose other half comes with it. */
static int64_t count_tiles(const product_tiles *t) {
    int64_t n = 0;
    for (int part = 0, first = 0; part < t->w->n_parts; first += t->w->parts[part++].rows)
        n += cpu_div_up(part_columns(t, part, first), t->cols);
    return n * t->n_rows;
}

static tile tile_at(const product_tiles *t, int64_t i) {
    int row = (int)(i % t->n_rows) * t->rows, first = 0, part = 0;
    int64_t k = i / t->n_rows, n;
    while (k >= (n = cpu_div_up(part_columns(t, part, first), t->cols)))
        k -= n, first += t->w->parts[part++].rows;
    int in_part = (int)k * t->cols;
    return (tile){.row = row,
                  .rows = cpu_min(t->rows, t->M - row),
                  .col = first + in_part,
                  .cols = cpu_min(t->cols, part_columns(t, part, first) - in_part),
                  .part = part,
                  .in_part = in_part};
}

/* What is asked for while a panel is multiplied; NULL: nothing. */
static const uint8_t *next_of(const product_tiles *t, quant_form f, const uint8_t *panel) {
    int64_t bytes = quant_panel_bytes(f, t->p->K);
    if (t->pairs.a) /* if threads take turns, the thread's next tile */
        return t->n_rows == 1 ? panel + t->ctx->n_threads * BAND_PANELS * bytes : NULL;
    if (t->p->M > FEW) return NULL;
    if (t->p->M > 1) return panel + BAND_PANELS * bytes;
    return panel + (f.bits == 8 ? NEAR : FAR);
}

/* sums (rows, cols) += the terms k to k + terms - 1, by the weights of a part. Rows in pairs have all terms. */
static void multiply(const product_tiles *t, float *sums, const rounded_rows *a, int part,
                     const tile *at, int k, int terms) {
    const product *p = t->p;
    const quant_part *w = &t->w->parts[part];
    quant_form f = quant_forms[w->form];
    int64_t size = quant_panel_bytes(f, p->K);
    for (int c = 0; c < at->cols; c += BAND_PANELS * PANEL) {
        panel_part b[BAND_PANELS];
        int panels = cpu_min(BAND_PANELS, (int)quant_panels(at->cols - c));
        for (int i = 0; i < panels; i++) {
            int64_t panel = (at->in_part + c) / PANEL + i;
            b[i] = panel_from(f, (const uint8_t *)t->w + w->at + panel * size, k / QUANT_GROUP);
            b[i].next = next_of(t, f, b[i].at);
        }
        if (t->pairs.a) {
            quant_pairs_kernels[w->form](sums, &t->pairs, at->row, at->rows, b, panels);
            continue;
        }
        for (int i = 0; i < panels; i += panels == BAND_PANELS ? BAND_PANELS : 1)
            quant_kernels[w->form](sums + c + i * PANEL, a, at->rows, b + i,
                                   (int)quant_groups(terms), panels);
    }
}

static void store(const product *p, const float *y, int ldy, int row, int rows, int col, int cols) {
    for (int r = 0; r < rows; r++, y += ldy) {
        float *out = p->out + (int64_t)(row + r) * p->ldo + col;
        FOR_LANES (c, k, cols) vf_put(out + c, vf_get(y + c, k), k);
    }
}

static void run_tile(const product_tiles *t, tile_memory *m, const tile *at) {
    const product *p = t->p;
    int halves = p->twin ? 2 : 1, ld = ld_sums(t), step = t->pairs.a ? p->K : TERMS;
    for (int half = 0; half < halves; half++)
        memset(m->sums[half], 0, sizeof m->sums[0][0] * (size_t)(at->rows * ld));
    for (int k = 0; k < p->K; k += step) {
        int terms = cpu_min(step, p->K - k);
        for (int r = 0; r < at->rows && !t->all && !t->pairs.a; r++)
            round_row(&m->rows, r, p->a + (int64_t)(at->row + r) * p->lda + k, terms, t->bits);
        for (int half = 0; half < halves; half++)
            multiply(t, m->sums[half], t->all ? t->all + at->row / t->rows : &m->rows,
                     at->part + half, at, k, terms);
    }
    for (int c = 0; c < at->cols; c += BLOCK) {
        int n = cpu_min(BLOCK, at->cols - c);
        const float *y = &m->sums[0][c];
        int row = t->first + at->row;
        if (p->epilogue)
            p->epilogue(p->epilogue_args, y, &m->sums[1][c], ld, row, at->rows, at->col + c, n);
        else
            store(p, y, ld, row, at->rows, at->col + c, n);
    }
}

static void run_tiles(void *args, int thread, int64_t begin, int64_t end) {
    const product_tiles *t = args;
    tile_memory *m = cpu_scratch(t->ctx, thread);
    for (int64_t i = begin; i < end; i++) {
        tile at = tile_at(t, i);
        run_tile(t, m, &at);
    }
}

static void round_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const product_tiles *t = args;
    const product *p = t->p;
    for (int64_t row = begin; row < end; row++)
        round_row(t->all + row / t->rows, (int)(row % t->rows), p->a + row * p->lda, p->K, t->bits);
}

/* ---- rows in pairs ---- */

static void round_to_pairs(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const product_tiles *t = args;
    const product *p = t->p;
    for (int row = (int)begin; row < end; row++)
        round_pairs(&t->pairs, row, p->a + (int64_t)(t->first + row) * p->lda, p->K);
}

static int has_minima(const quant_head *w) {
    int any = 0;
    for (int i = 0; i < w->n_parts; i++) any |= quant_forms[w->parts[i].form].rows == 2;
    return any;
}

/* As many rows at a time as there is room for, in the largest tiles of which each thread has a few. */
static void multiply_pairs(product_tiles *t) {
    const product *p = t->p;
    char *memory = cpu_scratch(t->ctx, t->ctx->n_threads);
    pair_rows *a = &t->pairs;
    *a = (pair_rows){.lda = pairs_lda(p->K), .groups = (int)quant_groups(p->K), .bits = t->bits};
    int64_t row_bytes = a->lda * (int64_t)sizeof(bf16);
    int64_t totals = has_minima(t->w) ? 3 * (int64_t)sizeof(float) * a->groups : 0;
    int most = (int)(CPU_ROUNDED / (row_bytes + totals));
    a->a = (bf16 *)memory;
    t->cols = LD_PAIRS;
    for (t->first = 0; t->first < p->M; t->first += most) {
        t->M = cpu_min(most, p->M - t->first);
        if (totals) a->totals = (float *)(memory + t->M * row_bytes);
        cpu_parallel(t->ctx, round_to_pairs, t, t->M, 4);
        t->rows = (int)cpu_div_up(t->M, cpu_div_up(t->M, PAIRS_ROWS));
        for (;;) {
            t->n_rows = (int)cpu_div_up(t->M, t->rows);
            if (count_tiles(t) >= 4 * t->ctx->n_threads || t->rows < 2 * ROWS) break;
            t->rows = (int)cpu_round_up(t->rows / 2, PAIRS_BAND);
        }
        cpu_parallel(t->ctx, run_tiles, t, count_tiles(t), 1);
    }
}

/* Bits that all parts of the weights allow for. */
static int bits_of(const quant_head *w) {
    int bits = ROUNDED_BITS;
    for (int i = 0; i < w->n_parts; i++)
        bits = cpu_min(bits, rounded_bits(quant_forms[w->parts[i].form].bits));
    return bits;
}

void cpu_product(gpt_ctx *ctx, product *p) {
    product_tiles t = {.ctx = ctx, .p = p, .w = p->w, .M = p->M, .rows = ROWS, .cols = COLS};
    if (p->kind == PRODUCT_TN) return; /* a gradient of weights that are not trained */
    if (t.w->parts[0].form == FORM_BF16) {
        product plain = *p;
        plain.w = (const char *)p->w + t.w->parts[0].at;
        CPU_ACTS_NAME(product)(ctx, &plain);
        return;
    }
    if (p->kind == PRODUCT_NN || p->exact) {
        quant_unpacked_product(ctx, p);
        return;
    }
    t.bits = bits_of(t.w);
    if (PAIRS && p->M > PAIRS_LEAST) {
        multiply_pairs(&t);
        return;
    }
    t.rows = (int)cpu_round_up(cpu_div_up(p->M, cpu_div_up(p->M, ROWS)), EVEN_ROWS);
    t.n_rows = (int)cpu_div_up(p->M, t.rows);
    if (t.n_rows <= ROUNDED_TILES && p->K <= TERMS) {
        t.all = cpu_scratch(ctx, ctx->n_threads);
        cpu_parallel(ctx, round_rows, &t, p->M, 4);
    }
    while (t.cols > 2 * BLOCK && count_tiles(&t) < 8 * ctx->n_threads) t.cols /= 2;
    cpu_parallel(ctx, run_tiles, &t, count_tiles(&t), 1);
}

/* Parts of a gradient of weights, which there is not. */
size_t cpu_product_workspace(int N, int K) {
    (void)K;
    return cpu_product_room(N);
}
size_t cpu_packed_operand_bytes(int N, int K) {
    (void)N, (void)K;
    return 0;
}
void cpu_pack_operand(gpt_ctx *ctx, bf16 *out, const bf16 *b, int ldb, int N, int K) {
    (void)ctx, (void)out, (void)b, (void)ldb, (void)N, (void)K;
}

extern const quant_level CPU_NAME(quant_level);
const quant_level CPU_NAME(quant_level) = QUANT_LEVEL;
