/* adapter_bf16.c: adapters of linear layers by the products of product_bf16.c. Their results are never added to
 * activations in a pass of their own: u b^T and du a are a few more terms of the sums of the layer itself.
 * A, B, u and du are rounded to bf16 for that, as peft has them in a model of bf16; sums are float32. */
#include "adapter.h"

#include "pack.h"

/* Terms of a part are filled up with zeros: to pairs, or to a tile of AMX. */
#ifdef CPU_AMX
enum { WHOLE = 32 };
#else
enum { WHOLE = PAIR };
#endif

static int terms_of(int R) {
    return (int)cpu_round_up(R, WHOLE);
}

/* The parts of `memory`. */
typedef struct adapter_memory {
    bf16 *u, *du;  /* (N, n_parts K), scaled */
    bf16 *factor;  /* a or b, as it makes u or du */
    bf16 *factor2; /* the other one, as the layer's product reads it */
} adapter_memory;

static size_t lay_out(adapter_memory *m, char *base, int N, int R, int widest) {
    int K = terms_of(R), width = GPT_MAX_STACKED * K;
    int64_t rows = (int64_t)N * width;
    const int64_t numbers[] = {rows, rows, pack_panels(width) * pack_panel_size(widest),
                               (pack_panels(widest) + 1) * pack_panel_size(width)};
    bf16 **const places[] = {&m->u, &m->du, &m->factor, &m->factor2};
    size_t used = 0;
    for (int i = 0; i < 4; i++) {
        *places[i] = base ? (bf16 *)(base + used) : NULL;
        used += (size_t)cpu_round_up(numbers[i] * (int64_t)sizeof(bf16), 64);
    }
    return used;
}

size_t cpu_adapter_bytes(int N, int R, int widest) {
    adapter_memory none;
    return lay_out(&none, NULL, N, R, widest);
}

/* ---- A and B in panels ---- */

/* Rows of x (rows, n), `rows` <= 16, as the columns of a panel; NULL: zeros. */
static void pack_rows(bf16 *out, const float *const x[PANEL], int n) {
    enum { TERMS = PANEL * PAIR };
    for (int k = 0; k < n; k += TERMS) {
        bf16 block[PANEL][TERMS] = {{0}};
        pair turned[PANEL][PANEL];
        int terms = cpu_min(TERMS, n - k);
        for (int r = 0; r < PANEL; r++)
            for (int c = 0; x[r] && c < terms; c += LANES) {
                int lanes = cpu_min(LANES, terms - c);
                vf_put(block[r] + c, vf_get(x[r] + k + c, lanes), lanes);
            }
        transpose_pairs(turned[0], PANEL, (const pair *)block, PANEL);
        memcpy(out + (int64_t)k * PANEL, turned, sizeof turned[0] * (size_t)pack_pairs(terms));
    }
}

/* Columns of x (K, n) as panels, `panel` numbers apart. */
static void pack_floats(bf16 *out, int64_t panel, const float *x, int n, int K) {
    for (int k = 0; k < K; k += PAIR, out += PANEL * PAIR)
        for (int col = 0; col < n; col += PANEL) {
            const float *upper = x + (int64_t)k * n + col;
            bf16 rows[PAIR][PANEL];
            int cols = cpu_min(PANEL, n - col), has_lower = k + 1 < K;
            FOR_LANES (c, lanes, cols) {
                vf_put(rows[0] + c, vf_get(upper + c, lanes), lanes);
                if (has_lower) vf_put(rows[1] + c, vf_get(upper + n + c, lanes), lanes);
            }
            interleave_rows((pair *)(out + col / PANEL * panel), rows[0],
                            has_lower ? rows[1] : NULL, cols);
        }
}

/* ---- forward ---- */

typedef struct forward_task {
    const lora_forward *op;
    adapter_memory at;
    int K, width, twin;
} forward_task;

static void pack_a(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const forward_task *t = args;
    const lora_forward *op = t->op;
    for (int64_t i = begin; i < end; i++) {
        const float *rows[PANEL] = {0};
        for (int r = 0; r < PANEL; r++) {
            int row = (int)i * PANEL + r, part = row / t->K, j = row % t->K;
            if (part < op->n_parts && j < op->R)
                rows[r] = op->a + ((int64_t)part * op->R + j) * op->IC;
        }
        pack_rows(t->at.factor + i * pack_panel_size(op->IC), rows, op->IC);
    }
}

/* Column `col` of a layer's outputs as column j of a panel. */
static void pack_output(const forward_task *t, bf16 *panel, int col, int j) {
    const lora_forward *op = t->op;
    const float *b = op->b;
    for (int i = 0; i < op->n_parts; b += (int64_t)op->parts[i++].rows * op->R) {
        int row = col - op->parts[i].first;
        if (row < 0 || row >= op->parts[i].rows) continue;
        for (int k = 0; k < op->R; k++) {
            int term = i * t->K + k;
            panel[term / PAIR * PANEL * PAIR + j * PAIR + term % PAIR] =
                bf16_round(b[(int64_t)row * op->R + k]);
        }
    }
}

static void pack_b(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const forward_task *t = args;
    int64_t per_half = pack_panels(t->op->OC), size = pack_panel_size(t->width);
    for (int64_t i = begin; i < end; i++) {
        bf16 *panel = t->at.factor2 + i * size;
        int first = (int)(i % per_half) * PANEL, before = i >= per_half ? t->twin : 0;
        memset(panel, 0, sizeof *panel * (size_t)size);
        for (int j = 0; j < cpu_min(PANEL, t->op->OC - first); j++)
            pack_output(t, panel, before + first + j, j);
    }
}

static void store_u(void *args, const float *y, const float *y_twin, int ldy, int row, int rows,
                    int col, int cols) {
    (void)y_twin;
    const forward_task *t = args;
    const lora_forward *op = t->op;
    for (int r = row; r < row + rows; r++, y += ldy) {
        bf16 *u = t->at.u + (int64_t)r * t->width + col;
        float *kept = op->u + (int64_t)r * op->n_parts * op->R;
        FOR_LANES (c, k, cols) vf_put(u + c, vf_get(y + c, k) * op->scale, k);
        for (int c = 0; c < cols; c++) {
            int part = (col + c) / t->K, j = (col + c) % t->K;
            if (j < op->R) kept[part * op->R + j] = y[c];
        }
    }
}

product_more cpu_adapter_forward(gpt_ctx *ctx, const lora_forward *op, void *memory) {
    int twin = is_gated(op->activation) ? op->OC : 0, K = terms_of(op->R);
    forward_task t = {.op = op, .K = K, .width = op->n_parts * K, .twin = twin};
    lay_out(&t.at, memory, op->N, op->R, cpu_max(op->IC, op->OC + twin));
    cpu_parallel(ctx, pack_a, &t, pack_panels(t.width), 1);
    cpu_parallel(ctx, pack_b, &t, (twin ? 2 : 1) * pack_panels(op->OC), 8);
    product u = {.kind = PRODUCT_NT,
                 .a = op->in,
                 .w = (const weight *)t.at.factor,
                 .lda = op->IC,
                 .M = op->N,
                 .N = t.width,
                 .K = op->IC,
                 .epilogue = store_u,
                 .epilogue_args = &t};
    cpu_product(ctx, &u);
    product_more more = {.a = t.at.u,
                         .b = t.at.factor2,
                         .lda = t.width,
                         .K = K,
                         .n_parts = op->n_parts,
                         .twin = twin};
    memcpy(more.parts, op->parts, sizeof more.parts);
    return more;
}

/* ---- backward ---- */

typedef struct backward_task {
    const lora_backward *op;
    adapter_memory at;
    int K, width, part;
} backward_task;

static backward_task new_backward(const lora_backward *op, void *memory) {
    int K = terms_of(op->R), twin = is_gated(op->activation) ? op->IC : 0;
    backward_task t = {.op = op, .K = K, .width = op->n_parts * K};
    lay_out(&t.at, memory, op->N, op->R, cpu_max(op->IC + twin, op->OC));
    return t;
}

static void store_du(void *args, const float *y, const float *y_twin, int ldy, int row, int rows,
                     int col, int cols) {
    (void)y_twin;
    const backward_task *t = args;
    for (int r = row; r < row + rows; r++, y += ldy) {
        bf16 *du = t->at.du + (int64_t)r * t->width + t->part * t->K + col;
        FOR_LANES (c, k, cols) vf_put(du + c, vf_get(y + c, k) * t->op->scale, k);
    }
}

/* du of a part, whose rows of B are these. */
static void make_du(gpt_ctx *ctx, backward_task *t, const float *b, lora_part part) {
    const lora_backward *op = t->op;
    int64_t panel = pack_panel_size(part.rows);
    memset(t->at.factor, 0, sizeof(bf16) * (size_t)(pack_panels(t->K) * panel));
    pack_floats(t->at.factor, panel, b, op->R, part.rows);
    product du = {.kind = PRODUCT_NT,
                  .a = (const bf16 *)op->dout + part.first,
                  .w = (const weight *)t->at.factor,
                  .lda = op->OC,
                  .M = op->N,
                  .N = t->K,
                  .K = part.rows,
                  .epilogue = store_du,
                  .epilogue_args = t};
    cpu_product(ctx, &du);
}

product_more cpu_adapter_backward(gpt_ctx *ctx, const lora_backward *op, void *memory) {
    backward_task t = new_backward(op, memory);
    int64_t panel = pack_panel_size(t.width);
    memset(t.at.factor2, 0, sizeof(bf16) * (size_t)(pack_panels(op->IC) * panel));
    const float *a = op->a, *b = op->b;
    for (t.part = 0; t.part < op->n_parts; t.part++) {
        lora_part part = op->parts[t.part];
        make_du(ctx, &t, b, part);
        pack_floats(t.at.factor2 + (int64_t)t.part * t.K * PANEL, panel, a, op->IC, op->R);
        a += (int64_t)op->R * op->IC;
        b += (int64_t)part.rows * op->R;
    }
    return (product_more){.a = t.at.du,
                          .b = t.at.factor2,
                          .lda = t.width,
                          .K = t.width,
                          .n_parts = 1,
                          .parts = {{0, op->IC}}};
}

/* u as forward had it. */
static void round_u(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const backward_task *t = args;
    const lora_backward *op = t->op;
    for (int64_t i = begin * op->n_parts; i < end * op->n_parts; i++) {
        bf16 *u = t->at.u + i * t->K;
        FOR_LANES (c, k, op->R) vf_put(u + c, vf_get(op->u + i * op->R + c, k) * op->scale, k);
    }
}

static void add_da(gpt_ctx *ctx, const backward_task *t) {
    const lora_backward *op = t->op;
    int joined = t->K == op->R; /* rows of all parts follow one another */
    for (int part = 0; part < (joined ? 1 : op->n_parts); part++) {
        product da = {.kind = PRODUCT_TN,
                      .out = op->da + (int64_t)part * op->R * op->IC,
                      .add = 1,
                      .a = t->at.du + part * t->K,
                      .b = op->in,
                      .activation = op->in ? GPT_ACT_NONE : op->activation,
                      .pre = op->pre,
                      .lda = t->width,
                      .ldb = op->IC,
                      .ldo = op->IC,
                      .M = joined ? t->width : op->R,
                      .N = op->IC,
                      .K = op->N};
        cpu_product(ctx, &da);
    }
}

static void add_db(gpt_ctx *ctx, const backward_task *t) {
    const lora_backward *op = t->op;
    float *db = op->db;
    cpu_parallel(ctx, round_u, (void *)t, op->N, cpu_grain(ctx, op->N, 64));
    for (int i = 0; i < op->n_parts; db += (int64_t)op->parts[i++].rows * op->R) {
        product part = {.kind = PRODUCT_TN,
                        .out = db,
                        .add = 1,
                        .turned = 1,
                        .a = t->at.u + i * t->K,
                        .b = (const bf16 *)op->dout + op->parts[i].first,
                        .lda = t->width,
                        .ldb = op->OC,
                        .ldo = op->R,
                        .M = op->R,
                        .N = op->parts[i].rows,
                        .K = op->N};
        cpu_product(ctx, &part);
    }
}

void cpu_adapter_gradients(gpt_ctx *ctx, const lora_backward *op, void *memory) {
    backward_task t = new_backward(op, memory);
    if (op->da) add_da(ctx, &t);
    if (op->db) add_db(ctx, &t);
}
