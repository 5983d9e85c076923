/* product_bf16.c: products in bf16 with float32 sums, see product.h. */
#include "activation.h"
#include "kernel.h"
#include "product.h"

/* A tile's share of b stays in the second-level cache while the rows of a pass by; sums of one call of the
 * kernel, ROWS x GROUP_COLS of them, in the first, or in the second where operands are widened (kernel_bf16.h). */
enum { ROWS = 96, COLS = 256, LEAST_ROWS = 32, LEAST_COLS = 64, GROUP_COLS = GROUP * PANEL };
/* What the columns of a tile are a multiple of. */
enum { BLOCK = EPILOGUE };
#ifdef CPU_AMX
enum { WHOLE_ROWS = 16 }; /* what the rows of a tile are a multiple of */
#else
enum { WHOLE_ROWS = 2 };
#endif
/* Terms of a sum that are taken at once, so that the group of panels stays in cache for all rows of
 * a tile. Sums of more wait in a tile of float32. */
enum { TERMS = 1024, MOST_TERMS = TERMS + TERMS / 2 };
/* Between rows or panels that are laid out here: their distance should not be a power of two, which
 * would crowd few sets of the cache. */
enum { PAD = PANEL * PAIR };
/* Rows of a weight gradient's operands that are packed at once. */
enum { CHUNK = 2 * TERMS };
/* A gradient of up to NARROW rows takes STEP terms of a tile's columns at a time, and packs them itself. */
enum { NARROW = ROWS, STEP = 128 };

/* Up to this many rows, panels come from memory and products wait for them. Up to ASKED rows, they are asked for. */
enum { FEW = 64, ASKED = WIDENS ? ROWS : FEW, NEAR = 24 * PANEL * PAIR };

/* Whether the kernel is so soon done with a panel that what follows in the same one is asked for. */
static int is_single(const product *p) {
    return !WIDENS && p->M == 1;
}

/* Whether rows so far apart share one or two sets of the first-level cache (64 of 64 bytes), which a band's do not
 * fit. Such rows are copied closer together first, if the kernel does not do so. */
static int is_crowded(const product *p) {
    return !WIDENS && p->M > FEW && p->lda % (16 * PANEL * PAIR * PAIR) == 0;
}

static int terms_at_once(const product *p) {
    return p->K <= (is_crowded(p) ? TERMS : MOST_TERMS) ? p->K : TERMS;
}

typedef struct product_tiles {
    gpt_ctx *ctx;
    const product *p;
    const bf16 *b; /* in panels; NULL: each tile packs its own */
    int64_t panel;
    int rows, cols, n_rows; /* of a tile; tiles below one another */
    int first, K;           /* TN: the rows of this chunk */
} product_tiles;

/* A thread's scratch. */
typedef struct tile_memory {
    _Alignas(64) float sums[2 * ROWS * COLS]; /* of a tile and of its twin */
    bf16 rows[ROWS * (TERMS + PAD)];          /* a's rows closer together, or its columns as rows */
    wide_operands wide;
} tile_memory;

_Static_assert(sizeof(tile_memory) <= CPU_SCRATCH, "scratch");

static const bf16 *panels_at(const product_tiles *t, int64_t col, int k) {
    return t->b + col / PANEL * t->panel + (int64_t)k * PANEL;
}

/* The panels to ask for while those of terms from k on and columns from c on are multiplied by several rows: what
 * the thread multiplies next, in this tile or in the one that it will take if the threads take turns. NULL: none.
 * By a single row, that would be over too soon, and the terms NEAR in the same panels are asked for. */
static const bf16 *read_next(const product_tiles *t, int64_t tile, int k, int c) {
    const product *p = t->p;
    int64_t col = tile / t->n_rows * t->cols;
    if (p->M > ASKED) return NULL;
    if (is_single(p)) return panels_at(t, c, k) + NEAR;
    if (c + GROUP_COLS < col + t->cols && c + GROUP_COLS < p->N)
        return panels_at(t, c + GROUP_COLS, k);
    if (k + terms_at_once(p) < p->K) return panels_at(t, col, k + terms_at_once(p));
    col = (tile + t->ctx->n_threads) / t->n_rows * t->cols;
    return col < p->N ? panels_at(t, col, 0) : NULL;
}

/* Sums of the kernel go where they belong. */
static void store(const product *p, const float *y, int64_t ldy, int add, int row, int rows,
                  int col, int cols) {
    for (int r = 0; r < rows; r++, y += ldy) {
        float *out = p->out + (int64_t)(row + r) * p->ldo + col;
        FOR_LANES (c, k, cols) {
            vf x = vf_get(y + c, k);
            vf_put(out + c, add ? vf_get(out + c, k) + x : x, k);
        }
    }
}

/* y (rows, n) += the terms that p->more has for columns col to col + n - 1, where `panel` is the first of them. */
static void add_more(const product *p, tile_memory *memory, float *y, int64_t ldc, int row,
                     int rows, int col, int n, int64_t panel) {
    const product_more *m = p->more;
    int begin = m->n_parts, end = 0;
    for (int i = 0; i < m->n_parts; i++) {
        const lora_part *part = &m->parts[i];
        if (part->first >= col + n || col >= part->first + part->rows) continue;
        begin = cpu_min(begin, i);
        end = i + 1;
    }
    if (begin >= end) return;
    int64_t size = pack_panel_size(m->n_parts * m->K), k = (int64_t)begin * m->K;
    kernel_operands o = {.a = m->a + (int64_t)row * m->lda + k,
                         .b = m->b + panel * size + k * PANEL,
                         .c = y,
                         .lda = m->lda,
                         .panel = size,
                         .ldc = ldc,
                         .K = (end - begin) * m->K,
                         .wide = &memory->wide};
    kernel_product(o, rows, (int)pack_panels(n), 1);
}

static void add_to_columns(const product *p, tile_memory *memory, float *y, float *y_twin,
                           int64_t ldc, int row, int rows, int col, int n) {
    int at = p->more->first + col;
    add_more(p, memory, y, ldc, row, rows, at, n, at / PANEL);
    if (p->twin)
        add_more(p, memory, y_twin, ldc, row, rows, p->more->twin + at, n,
                 pack_panels(p->more->twin) + at / PANEL);
}

/* ---- b in panels ---- */

typedef struct pack_args {
    bf16 *out;
    int64_t panel; /* from one to the next */
    const bf16 *b;
    int ldb, N, K;
    int activation; /* unless NONE, of b, whose rows then hold N gates and, for SwiGLU, N ups */
} pack_args;

/* Up to PANEL columns of one row of activation(pre). */
static void activate_row(bf16 *out, const bf16 *pre, int twin, int activation, int n) {
    FOR_LANES (c, k, n) {
        vf up = {0};
        if (is_gated(activation)) up = vf_get(pre + twin + c, k);
        vf_put(out + c, activation_forward(activation, vf_get(pre + c, k), up), k);
    }
}

/* As pack_columns, of activation(b). */
static void pack_activated(const pack_args *a, bf16 *panels, int col, int last) {
    for (int k = 0; k < a->K; k += PAIR) {
        const bf16 *pre = a->b + (int64_t)k * a->ldb;
        for (int c = col; c < last; c += PANEL) {
            int n = cpu_min(PANEL, last - c);
            bf16 upper[PANEL], lower[PANEL] = {0};
            activate_row(upper, pre + c, a->N, a->activation, n);
            if (k + 1 < a->K) activate_row(lower, pre + a->ldb + c, a->N, a->activation, n);
            bf16 *out = panels + (c - col) / PANEL * a->panel + (int64_t)k * PANEL;
            interleave_rows((pair *)out, upper, lower, n);
        }
    }
}

/* Columns col to last - 1. */
static void pack(const pack_args *a, bf16 *panels, int col, int last) {
    if (a->activation == GPT_ACT_NONE)
        pack_columns(panels, a->panel, a->b + col, a->ldb, last - col, a->K);
    else
        pack_activated(a, panels, col, last);
}

/* Rows first to first + K - 1 of b. */
static pack_args pack_args_of(const product *p, bf16 *out, int64_t panel, int first, int K) {
    pack_args args = {out, panel, p->b, p->ldb, p->N, K, p->activation};
    if (p->activation != GPT_ACT_NONE) {
        args.b = p->pre;
        args.ldb = is_gated(p->activation) ? 2 * p->N : p->N;
    }
    args.b += (int64_t)first * args.ldb;
    return args;
}

/* One tile of NT or NN. */
static void multiply_tile(const product_tiles *t, tile_memory *memory, int64_t tile, int row,
                          int rows, int col, int cols) {
    const product *p = t->p;
    float *sums = memory->sums;
    bf16 *near = memory->rows;
    int step = terms_at_once(p), in_steps = step < p->K, is_copied = is_crowded(p);
    int64_t ldc = in_steps ? COLS : GROUP_COLS, twin_sums = ROWS * ldc;
    int64_t twin_panels = p->twin ? pack_panels(p->N) * t->panel : 0;
    for (int k = 0; k < p->K; k += step) {
        int terms = cpu_min(step, p->K - k);
        const bf16 *a = p->a + (int64_t)row * p->lda + k;
        for (int r = 0; is_copied && r < rows; r++)
            memcpy(near + (int64_t)r * (TERMS + PAD), a + (int64_t)r * p->lda,
                   sizeof(bf16) * (size_t)terms);
        for (int c = col; c < col + cols; c += GROUP_COLS) {
            int n = cpu_min(GROUP_COLS, col + cols - c);
            float *y = in_steps ? sums + (c - col) : sums;
            const bf16 *b = panels_at(t, c, k), *next = read_next(t, tile, k, c);
            int twin_is_next = next && p->twin && !is_single(p);
            kernel_operands o = {.a = is_copied ? near : a,
                                 .b = b,
                                 .next = twin_is_next ? b + twin_panels : next,
                                 .c = y,
                                 .lda = is_copied ? TERMS + PAD : p->lda,
                                 .panel = t->panel,
                                 .ldc = ldc,
                                 .K = terms,
                                 .wide = &memory->wide};
            kernel_product(o, rows, (int)pack_panels(n), k > 0);
            if (p->twin) {
                o.b += twin_panels;
                o.c += twin_sums;
                o.next = is_single(p) ? next + twin_panels : next;
                kernel_product(o, rows, (int)pack_panels(n), k > 0);
            }
            if (k + terms < p->K) continue;
            if (p->more) add_to_columns(p, memory, y, y + twin_sums, ldc, row, rows, c, n);
            if (!p->epilogue) store(p, y, ldc, p->add, row, rows, c, n);
            for (int i = 0; p->epilogue && i < n; i += BLOCK)
                p->epilogue(p->epilogue_args, y + i, y + twin_sums + i, (int)ldc, row, rows, c + i,
                            cpu_min(BLOCK, n - i));
        }
    }
}

/* One tile of TN: columns of a become rows first. The kernel writes whole panels where they belong, unless it takes a
 * row's terms in parts and so writes the same sums several times. */
static void gradient_tile(const product_tiles *t, tile_memory *memory, int row, int rows, int col,
                          int cols) {
    const product *p = t->p;
    float *sums = memory->sums;
    bf16 *turned = memory->rows;
    int streamed = is_streamed(p->out, (int64_t)p->M * p->N) && p->ldo % PANEL == 0;
    for (int k = 0; k < t->K; k += TERMS) {
        int terms = cpu_min(TERMS, t->K - k), stride = (int)cpu_round_up(terms, PAIR) + PAD;
        const bf16 *a = p->a + (int64_t)(t->first + k) * p->lda + row;
        transpose_columns(turned, stride, a, p->lda, rows, terms);
        for (int r = 0; p->sums && col == 0 && r < rows; r++) {
            vf sum = {0};
            FOR_LANES (i, n, terms) sum += vf_get(turned + (int64_t)r * stride + i, n);
            p->sums[row + r] += vf_sum(sum);
        }
        for (int c = col; p->out && c < col + cols; c += GROUP_COLS) {
            int n = cpu_min(GROUP_COLS, col + cols - c), add = p->add || t->first + k > 0;
            int direct = !WIDENS && n % PANEL == 0;
            kernel_operands o = {.a = turned,
                                 .b = t->b + c / PANEL * t->panel + (int64_t)k * PANEL,
                                 .c = direct ? p->out + (int64_t)row * p->ldo + c : sums,
                                 .lda = stride,
                                 .panel = t->panel,
                                 .ldc = direct ? p->ldo : GROUP_COLS,
                                 .K = terms,
                                 .streamed = direct && !add && streamed,
                                 .wide = &memory->wide};
            kernel_product(o, rows, (int)pack_panels(n), direct && add);
            if (!direct) store(p, sums, GROUP_COLS, add, row, rows, c, n);
        }
    }
}

/* out (N, M) += y^T, or = y^T. */
static void store_turned(const product *p, const float *y, int add, int row, int rows, int col,
                         int cols) {
    for (int c = 0; c < cols; c++) {
        float *out = p->out + (int64_t)(col + c) * p->ldo + row;
        for (int r = 0; r < rows; r++) out[r] = (add ? out[r] : 0) + y[(int64_t)r * COLS + c];
    }
}

/* One tile of TN with few rows: b is read once, a few rows at a time, and packed where it is then multiplied. */
static void narrow_tile(const product *p, tile_memory *memory, int row, int rows, int col,
                        int cols) {
    enum { STRIDE = STEP + PAD };
    float *sums = memory->sums;
    bf16 *turned = memory->rows;
    bf16 *panels = turned + NARROW * STRIDE;
    int64_t panel = pack_panel_size(STEP) + PAD;
    for (int k = 0; k < p->K; k += STEP) {
        int terms = cpu_min(STEP, p->K - k);
        transpose_columns(turned, STRIDE, p->a + (int64_t)k * p->lda + row, p->lda, rows, terms);
        pack_args args = pack_args_of(p, NULL, panel, k, terms);
        pack(&args, panels, col, col + cols);
        for (int c = 0; c < cols; c += GROUP_COLS) {
            kernel_operands o = {.a = turned,
                                 .b = panels + c / PANEL * panel,
                                 .c = sums + c,
                                 .lda = STRIDE,
                                 .panel = panel,
                                 .ldc = COLS,
                                 .K = terms,
                                 .wide = &memory->wide};
            int n = cpu_min(GROUP_COLS, cols - c);
            kernel_product(o, rows, (int)pack_panels(n), k > 0);
        }
    }
    if (p->turned)
        store_turned(p, sums, p->add, row, rows, col, cols);
    else
        store(p, sums, COLS, p->add, row, rows, col, cols);
}

_Static_assert(NARROW *(STEP + PAD) + COLS / PANEL * (STEP * PANEL + PAD) <= ROWS * (TERMS + PAD),
               "scratch of a narrow tile");

static void run_tiles(void *args, int thread, int64_t begin, int64_t end) {
    const product_tiles *t = args;
    const product *p = t->p;
    tile_memory *memory = cpu_scratch(t->ctx, thread);
    kernel_begin();
    for (int64_t i = begin; i < end; i++) {
        int row = (int)(i % t->n_rows) * t->rows, col = (int)(i / t->n_rows) * t->cols;
        int rows = cpu_min(t->rows, p->M - row), cols = cpu_min(t->cols, p->N - col);
        if (!t->b)
            narrow_tile(p, memory, row, rows, col, cols);
        else if (p->kind == PRODUCT_TN)
            gradient_tile(t, memory, row, rows, col, cols);
        else
            multiply_tile(t, memory, i, row, rows, col, cols);
    }
    kernel_end();
}

/* Columns that the busiest thread multiplies, if tiles have `cols` of them and threads take turns. */
static int64_t busiest_columns(const product *p, int n_threads, int cols) {
    return cpu_div_up(cpu_div_up(p->N, cols), n_threads) * cols;
}

/* Rows of a tile where there are about n_rows below one another: as few for the busiest thread as can be. */
static int tile_rows(const product *p, int n_threads, int n_rows, int n_cols) {
    int unit = p->kind == PRODUCT_TN ? 16 : WHOLE_ROWS, best = 0, last = n_rows;
    int64_t least = INT64_MAX;
    if (p->M > FEW) last = cpu_min(n_rows + n_threads, cpu_max(n_rows, p->M / LEAST_ROWS));
    for (int n = n_rows; n <= last; n++) {
        int rows = (int)cpu_round_up(cpu_div_up(p->M, n), unit);
        int64_t busiest = cpu_div_up(cpu_div_up(p->M, rows) * n_cols, n_threads) * rows;
        if (busiest >= least - least / 50) continue; /* smaller tiles are slower */
        least = busiest;
        best = rows;
    }
    return best;
}

/* Tiles of about the same size, and enough of them for the threads to end together. */
static int64_t split(product_tiles *t, int n_threads, int most_cols) {
    const product *p = t->p;
    int n_rows = (int)cpu_div_up(p->M, ROWS), n_cols = (int)cpu_div_up(p->N, most_cols);
    int wanted = 4 * n_threads;
    while (n_rows * n_cols < wanted && p->N / n_cols >= 2 * LEAST_COLS) n_cols *= 2;
    n_rows = cpu_max(n_rows, cpu_min(p->M / LEAST_ROWS, (int)cpu_div_up(wanted, n_cols)));
    t->rows = tile_rows(p, n_threads, n_rows, n_cols);
    t->cols = cpu_min(most_cols, (int)cpu_round_up(cpu_div_up(p->N, n_cols), BLOCK));
    t->n_rows = (int)cpu_div_up(p->M, t->rows);
    int64_t least = busiest_columns(p, n_threads, t->cols);
    int blocks = t->cols / BLOCK; /* all columns of a gradient may end within one */
    for (int cols = blocks * BLOCK; p->M <= FEW && cols >= LEAST_COLS; cols -= BLOCK) {
        if (busiest_columns(p, n_threads, cols) >= least) continue;
        least = busiest_columns(p, n_threads, cols);
        t->cols = cols;
    }
    return t->n_rows * cpu_div_up(p->N, t->cols);
}

static void multiply(gpt_ctx *ctx, const product *p) {
    product_tiles t = {.ctx = ctx, .p = p, .b = p->w, .panel = pack_panel_size(p->K)};
    if (p->kind == PRODUCT_NN) {
        int rows = p->rows ? p->rows : p->K;
        t.panel = pack_panel_size(rows);
        if (p->panels)
            t.b = p->panels;
        else
            t.b += pack_forward_size(rows, p->N) + (int64_t)p->first * PANEL;
    }
    int64_t n_tiles = split(&t, ctx->n_threads, COLS);
    cpu_parallel(ctx, run_tiles, &t, n_tiles, 1);
}

/* ---- weight gradients ---- */

/* From panel to panel of an operand. */
static int64_t operand_panel(int K) {
    return pack_panel_size(K) + PAD;
}

size_t cpu_packed_operand_bytes(int N, int K) {
    return sizeof(bf16) * (size_t)(pack_panels(N) * operand_panel(K));
}

size_t cpu_product_room(int K) {
    (void)K;
    return 0;
}

size_t cpu_product_workspace(int N, int K) {
    return cpu_packed_operand_bytes(N, cpu_min(K, CHUNK));
}

static void pack_blocks(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const pack_args *a = args;
    int col = (int)begin * BLOCK, last = cpu_min((int)end * BLOCK, a->N);
    pack(a, a->out + col / PANEL * a->panel, col, last);
}

void cpu_pack_operand(gpt_ctx *ctx, bf16 *out, const bf16 *b, int ldb, int N, int K) {
    pack_args args = {out, operand_panel(K), b, ldb, N, K, GPT_ACT_NONE};
    cpu_parallel(ctx, pack_blocks, &args, cpu_div_up(N, BLOCK), 2);
}

/* Rows first to first + K - 1 of b, into the workspace. */
static void pack_chunk(gpt_ctx *ctx, const product *p, int first, int K) {
    pack_args args = pack_args_of(p, ctx->workspace, operand_panel(K), first, K);
    cpu_parallel(ctx, pack_blocks, &args, cpu_div_up(p->N, BLOCK), 2);
}

/* Whether the tiles of a gradient pack b themselves: few of them share it. */
static int is_narrow(const product *p) {
    return p->turned || (p->M <= NARROW && p->out && !p->sums && !p->panels);
}

static void add_narrow(gpt_ctx *ctx, const product *p) {
    product_tiles t = {.ctx = ctx, .p = p};
    int64_t n_tiles = split(&t, ctx->n_threads, COLS);
    cpu_parallel(ctx, run_tiles, &t, n_tiles, 1);
}

static void add_gradient(gpt_ctx *ctx, const product *p) {
    product_tiles t = {.ctx = ctx, .p = p, .b = p->panels ? p->panels : ctx->workspace};
    int64_t n_tiles = split(&t, ctx->n_threads, p->N);
    int chunk = p->panels ? p->K : CHUNK;
    for (t.first = 0; t.first < p->K; t.first += chunk) {
        t.K = cpu_min(chunk, p->K - t.first);
        t.panel = operand_panel(t.K);
        if (p->out && !p->panels) pack_chunk(ctx, p, t.first, t.K);
        cpu_parallel(ctx, run_tiles, &t, n_tiles, 1);
    }
}

void cpu_product(gpt_ctx *ctx, product *p) {
    if (p->kind != PRODUCT_TN)
        multiply(ctx, p);
    else if (is_narrow(p))
        add_narrow(ctx, p);
    else
        add_gradient(ctx, p);
}
