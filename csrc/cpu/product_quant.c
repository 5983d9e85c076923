/* product_quant.c: products with weights of 8 or 4 bits, see quant.h. There is only the forward one:
 * such weights are not trained. */
#include "product.h"
#include "quant.h"

#include <math.h>

/* A tile: its rows are rounded once, and its sums wait until all terms are in. */
enum { ROWS = 48, COLS = 256, TERMS = 4096, BLOCK = 32 /* columns of an epilogue */ };
enum {
    BAND = LANES == 16 ? 4 : 1, /* rows whose sums fit the registers */
    BAND_PANELS = LANES == 16 ? 2 : 1,
};

/* Rows of `a`, rounded by groups. The few rows of decoding are rounded once for all tiles. */
typedef struct rounded_rows {
    int8_t q[ROWS][TERMS];
    float scale[ROWS][TERMS / QUANT_GROUP];
    int32_t offset[ROWS][TERMS / QUANT_GROUP]; /* -ZERO times the sum of q */
} rounded_rows;

/* A thread's scratch. */
typedef struct tile_memory {
    float sums[2][ROWS][COLS]; /* of the tile, and of its twin */
    rounded_rows rows;
} tile_memory;
_Static_assert(sizeof(tile_memory) <= CPU_SCRATCH, "scratch");

/* One group of n numbers. */
static void round_group(rounded_rows *out, int row, int k, const bf16 *a, int n) {
    enum { N = QUANT_GROUP / LANES };
    vf x[N], biggest = {0};
    UNROLL
    for (int i = 0; i < N; i++) {
        int m = cpu_max(0, cpu_min(LANES, n - i * LANES));
        x[i] = vf_get(a + i * LANES, m);
        biggest = vf_max(biggest, vf_max(x[i], -x[i]));
    }
    float scale = vf_max_lane(biggest) / 127, inverse = scale > 0 ? 1 / scale : 0;
    vi sum = {0};
    UNROLL
    for (int i = 0; i < N; i++) {
        vf scaled = x[i] * inverse;
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

/* What the kernel reads of the weights: a panel's groups from some term on, and its scales. */
typedef struct panel_part {
    const uint8_t *chunks;
    const bf16 *scales;
} panel_part;

/* c (M rows, `panels` panels) += a b over n_groups groups. M and panels are constants where this is
 * inlined. */
__attribute__((always_inline)) static inline void quant_band(float *c, const rounded_rows *a,
                                                             int row, const panel_part *b,
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

__attribute__((always_inline)) static inline void quant_bands(float *c, const rounded_rows *a,
                                                              int rows, const panel_part *b,
                                                              int n_groups, int panels) {
    int row = 0;
    for (; BAND > 1 && row + BAND <= rows; row += BAND)
        quant_band(c + row * COLS, a, row, b, n_groups, BAND, panels);
    for (; row < rows; row++) quant_band(c + row * COLS, a, row, b, n_groups, 1, panels);
}

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
    if (p->kind != PRODUCT_NT) return; /* api.c trains no such model */
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
