/* product_quant.c: products with weights of 8 or 4 bits, see quant.h. There is only the forward one:
 * such weights are not trained. */
#include "kernel_quant.h"
#include "product.h"

enum { BLOCK = 32 /* columns of an epilogue */ };
/* Up to FEW rows, panels come from memory and are asked for: those that follow, or by one row, which
 * is over so soon, the terms NEAR in the same ones. */
enum { FEW = 64, NEAR = 24 * CHUNK_BYTES };

/* A thread's scratch. */
typedef struct tile_memory {
    float sums[2][ROWS][COLS]; /* of the tile, and of its twin */
    rounded_rows rows;
} tile_memory;
_Static_assert(sizeof(tile_memory) <= CPU_SCRATCH, "scratch");

typedef struct product_tiles {
    gpt_ctx *ctx;
    const product *p;
    rounded_rows *all;      /* every row, rounded beforehand; NULL: each tile rounds its own */
    int rows, cols, n_rows; /* of a tile; tiles below one another */
} product_tiles;

/* sums (rows, cols) += the terms k to k + terms - 1, of columns from col on. */
static void multiply(tile_memory *m, const rounded_rows *a, int half, const product *p, int rows,
                     int col, int cols, int k, int terms) {
    int64_t size = quant_panel_bytes(p->K), skip = k / QUANT_GROUP;
    for (int c = 0; c < cols; c += BAND_PANELS * PANEL) {
        panel_part b[BAND_PANELS];
        int panels = cpu_min(BAND_PANELS, (int)quant_panels(cols - c));
        for (int i = 0; i < panels; i++) {
            const uint8_t *panel = (const uint8_t *)p->w + ((col + c) / PANEL + i) * size;
            if (half) panel += quant_panels(p->N) * size;
            b[i].chunks = panel + skip * CHUNKS * CHUNK_BYTES;
            b[i].next = p->M > FEW ? NULL : b[i].chunks + (p->M == 1 ? NEAR : BAND_PANELS * size);
            b[i].scales = (const bf16 *)(panel + quant_scales_at(p->K)) + skip * PANEL;
        }
        int n_groups = (int)quant_groups(terms);
        if (panels == BAND_PANELS)
            quant_bands(&m->sums[half][0][c], a, rows, b, n_groups, BAND_PANELS);
        else
            quant_bands(&m->sums[half][0][c], a, rows, b, n_groups, 1);
    }
}

static void store(const product *p, const float *y, int row, int rows, int col, int cols) {
    for (int r = 0; r < rows; r++, y += COLS) {
        float *out = p->out + (int64_t)(row + r) * p->ldo + col;
        FOR_LANES (c, k, cols) vf_put(out + c, vf_get(y + c, k), k);
    }
}

static void run_tiles(void *args, int thread, int64_t begin, int64_t end) {
    const product_tiles *t = args;
    const product *p = t->p;
    tile_memory *m = cpu_scratch(t->ctx, thread);
    kernel_begin();
    for (int64_t i = begin; i < end; i++) {
        int row = (int)(i % t->n_rows) * t->rows, col = (int)(i / t->n_rows) * t->cols;
        int rows = cpu_min(t->rows, p->M - row), cols = cpu_min(t->cols, p->N - col);
        for (int half = 0; half < (p->twin ? 2 : 1); half++)
            memset(m->sums[half], 0, sizeof m->sums[0][0] * (size_t)rows);
        for (int k = 0; k < p->K; k += TERMS) {
            int terms = cpu_min(TERMS, p->K - k);
            for (int r = 0; r < rows && !t->all; r++)
                round_row(&m->rows, r, p->a + (int64_t)(row + r) * p->lda + k, terms);
            for (int half = 0; half < (p->twin ? 2 : 1); half++)
                multiply(m, t->all ? t->all : &m->rows, half, p, rows, col, cols, k, terms);
        }
        for (int c = 0; c < cols; c += BLOCK) {
            int n = cpu_min(BLOCK, cols - c);
            const float *y = &m->sums[0][0][c];
            if (p->epilogue)
                p->epilogue(p->epilogue_args, y, &m->sums[1][0][c], COLS, row, rows, col + c, n);
            else
                store(p, y, row, rows, col + c, n);
        }
    }
    kernel_end();
}

static void round_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const product_tiles *t = args;
    const product *p = t->p;
    for (int64_t row = begin; row < end; row++)
        round_row(t->all, (int)row, p->a + row * p->lda, p->K);
}

void cpu_product(gpt_ctx *ctx, product *p) {
    product_tiles t = {.ctx = ctx, .p = p, .rows = ROWS, .cols = COLS};
    if (p->kind != PRODUCT_NT) return; /* such models are not trained */
    t.n_rows = (int)cpu_div_up(p->M, ROWS);
    t.rows = (int)cpu_div_up(p->M, t.n_rows);
    if (p->M <= ROWS && p->K <= TERMS) {
        t.all = &((tile_memory *)cpu_scratch(ctx, 0))->rows;
        cpu_parallel(ctx, round_rows, &t, p->M, 4);
    }
    while (t.cols > 2 * BLOCK && t.n_rows * cpu_div_up(p->N, t.cols) < 8 * ctx->n_threads)
        t.cols /= 2;
    cpu_parallel(ctx, run_tiles, &t, t.n_rows * cpu_div_up(p->N, t.cols), 1);
}

/* Parts of the backward pass, which there is not. */
size_t cpu_product_workspace(int N, int K) {
    (void)N, (void)K;
    return 0;
}
size_t cpu_packed_operand_bytes(int N, int K) {
    (void)N, (void)K;
    return 0;
}
void cpu_pack_operand(gpt_ctx *ctx, bf16 *out, const bf16 *b, int ldb, int N, int K) {
    (void)ctx, (void)out, (void)b, (void)ldb, (void)N, (void)K;
}
