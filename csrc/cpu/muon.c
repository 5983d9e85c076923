/* muon.c: the momentum of each matrix, brought near to an orthogonal matrix by products, is its step. */
#include "product.h"
#include "update.h"

#ifdef CPU_BF16
#include "pack.h"
#endif

#include <math.h>

/* A matrix of so many numbers or fewer is one thread's work; the threads share the products of a larger one. */
enum { MOST_ALONE = 1 << 20 };

typedef struct matrix {
    float *w, *momentum;
    float *v; /* (rows) or NULL */
    const float *grad;
    const gpt_segment *segment;
    int rows, cols;
} matrix;

/* The i-th matrix of the segments; false past the last. */
static int matrix_at(const muon_update *op, int i, matrix *out) {
    for (const gpt_segment *s = op->segments; s < op->segments + op->n_segments; s++) {
        if (s->optimizer != GPT_OPTIMIZER_MUON) continue;
        int64_t row = 0;
        for (int k = 0; k < s->n_matrices; row += s->matrix_rows[k++])
            if (i-- == 0) {
                int64_t first = row * s->cols;
                *out = (matrix){.w = op->w + s->offset + first,
                                .momentum = op->momentum + s->state + first,
                                .v = s->row_state ? op->momentum + s->row_state + row : NULL,
                                .grad = op->grads + s->grad + first,
                                .segment = s,
                                .rows = s->matrix_rows[k],
                                .cols = s->cols};
                return 1;
            }
    }
    return 0;
}

/* ---- memory of one matrix ---- */

typedef struct buffers {
    double *sums;      /* (rows) of squares, of the momentum and then of the step */
    elem *x, *next;    /* (rows, cols) */
    elem *gram, *poly; /* (least, least) of rows and cols */
#ifdef CPU_BF16
    float *wide;  /* (least, least) */
    bf16 *packed; /* an operand of a product */
#endif
} buffers;

#ifdef CPU_BF16
/* Bytes of the operand b of any product of this matrix. */
static size_t packed_bytes(int rows, int cols) {
    int64_t nt = pack_panels(rows) * pack_panel_size(cols);
    int64_t nn = pack_panels(cols) * pack_panel_size(cpu_min(rows, cols));
    size_t most = sizeof(bf16) * (size_t)(nt > nn ? nt : nn);
    size_t tn = cpu_packed_operand_bytes(cols, rows);
    return most > tn ? most : tn;
}
#endif

static void *take(char *base, size_t *used, size_t bytes) {
    void *at = base ? base + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return at;
}

/* Lays the buffers out from base (NULL: only counts). Returns the bytes. */
static size_t lay_out(char *base, int rows, int cols, buffers *out) {
    size_t used = 0, n = (size_t)rows * (size_t)cols, least = (size_t)cpu_min(rows, cols);
    out->sums = take(base, &used, sizeof(double) * (size_t)rows);
    out->x = take(base, &used, sizeof(elem) * n);
    out->next = take(base, &used, sizeof(elem) * n);
    out->gram = take(base, &used, sizeof(elem) * least * least);
    out->poly = take(base, &used, sizeof(elem) * least * least);
#ifdef CPU_BF16
    out->wide = take(base, &used, sizeof(float) * least * least);
    out->packed = take(base, &used, packed_bytes(rows, cols));
#endif
    return used;
}

static int is_alone(int n_threads, int rows, int cols) {
    return n_threads > 1 && (int64_t)rows * cols <= MOST_ALONE;
}

CPU_WORKSPACE(muon_workspace) {
    int A = shape->NH * shape->HS, KV = shape->NKV * shape->HS, C = shape->C, F = shape->F;
    int E = shape->E; /* rows of a router */
    int sizes[][2] = {{A, C}, {KV, C}, {C, A}, {F, C}, {C, F}, {E, C}};
    size_t most = 0;
    for (int i = 0; shape->muon && i < (int)(sizeof sizes / sizeof *sizes); i++) {
        buffers none;
        size_t bytes = lay_out(NULL, sizes[i][0], sizes[i][1], &none);
        if (is_alone(n_threads, sizes[i][0], sizes[i][1])) bytes *= (size_t)n_threads;
        if (bytes > most) most = bytes;
    }
    return most;
}

/* ---- products ---- */

/* out = alpha base + beta y, rows `cols` apart; without base, out = beta y. */
typedef struct combination {
    elem *out;
    const elem *base;
    float alpha, beta;
    int cols;
} combination;

static void combine(void *p, const float *y, const float *y_twin, int ldy, int row, int rows,
                    int col, int cols) {
    (void)y_twin;
    const combination *a = p;
    for (int r = 0; r < rows; r++, y += ldy) {
        int64_t at = (int64_t)(row + r) * a->cols + col;
        FOR_LANES (c, k, cols) {
            vf x = vf_get(y + c, k) * a->beta;
            if (a->base) x += vf_get(a->base + at + c, k) * a->alpha;
            vf_put(a->out + at + c, x, k);
        }
    }
}

#ifdef CPU_BF16

typedef struct pack_task {
    bf16 *out;
    const bf16 *b;
    product_kind kind;
    int N, K;
} pack_task;

/* Panels of b: (N, K) for NT, (K, N) for NN. */
static void pack_some(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const pack_task *t = args;
    int64_t size = pack_panel_size(t->K);
    for (int64_t i = begin; i < end; i++) {
        int col = (int)i * PANEL, n = cpu_min(PANEL, t->N - col);
        if (t->kind == PRODUCT_NT)
            pack_transposed((pair *)(t->out + i * size), t->b + (int64_t)col * t->K, t->K, n, t->K);
        else
            pack_columns(t->out + i * size, size, t->b + col, t->N, n, t->K);
    }
}

/* The product's b from its place in p->b. */
static void pack_operand(gpt_ctx *ctx, const buffers *m, product *p) {
    pack_task task = {m->packed, p->b, p->kind, p->N, p->K};
    if (p->kind == PRODUCT_TN)
        cpu_pack_operand(ctx, m->packed, p->b, p->ldb, p->N, p->K);
    else
        cpu_parallel(ctx, pack_some, &task, pack_panels(p->N), 4);
    p->panels = m->packed;
    p->w = m->packed;
}

static void round_some(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const combination *a = args;
    const float *wide = (const float *)a->base + begin;
    FOR_LANES (i, k, end - begin) vf_put(a->out + begin + i, vf_get(wide + i, k), k);
}

#endif

/* Runs p, whose b is in p->b, and combines the result. */
static void multiply(gpt_ctx *ctx, const buffers *m, product p, combination to) {
    int is_gradient = p.kind == PRODUCT_TN;
    to.cols = p.ldo = p.N;
#ifdef CPU_BF16
    pack_operand(ctx, m, &p);
    p.out = is_gradient ? m->wide : NULL;
#else
    (void)m;
    p.w = p.b;
    p.out = to.out;
#endif
    if (!is_gradient) p.epilogue = combine, p.epilogue_args = &to;
    cpu_product(ctx, &p);
#ifdef CPU_BF16
    combination rounded = {.out = to.out, .base = (const elem *)m->wide};
    if (is_gradient) cpu_parallel(ctx, round_some, &rounded, (int64_t)p.M * p.N, 1 << 15);
#endif
}

/* gram = x x^T, or x^T x where that is smaller. */
static void multiply_gram(gpt_ctx *ctx, const buffers *m, int rows, int cols) {
    product p = {.kind = PRODUCT_NT, .a = m->x, .b = m->x, .lda = cols, .ldb = cols};
    p.M = p.N = cpu_min(rows, cols), p.K = cpu_max(rows, cols);
    if (rows > cols) p.kind = PRODUCT_TN;
    multiply(ctx, m, p, (combination){.out = m->gram, .beta = 1});
}

/* x = a x + (b gram + c gram^2) x, or from the right. */
static void iterate(gpt_ctx *ctx, buffers *m, int rows, int cols, const float abc[3]) {
    int least = cpu_min(rows, cols);
    product square = {.kind = PRODUCT_NN, .a = m->gram, .b = m->gram};
    square.lda = square.ldb = square.M = square.N = square.K = least;
    product last = {.kind = PRODUCT_NN, .M = rows, .N = cols, .K = least};
    last.a = rows > cols ? m->x : m->poly;
    last.b = rows > cols ? m->poly : m->x;
    last.lda = least;
    last.ldb = cols;
    multiply_gram(ctx, m, rows, cols);
    multiply(ctx, m, square, (combination){m->poly, m->gram, abc[1], abc[2], 0});
    multiply(ctx, m, last, (combination){m->next, m->x, abc[0], 1, 0});
    elem *x = m->x;
    m->x = m->next;
    m->next = x;
}

/* ---- one matrix ---- */

typedef struct muon_task {
    const muon_update *op;
    gpt_ctx *ctx;
    float clip;
    int64_t stride; /* bytes of workspace for each thread */
} muon_task;

typedef struct row_task {
    matrix at;
    buffers m;
    float g, momentum; /* factors of the gradient and of the momentum buffer */
    float scale;       /* of x */
    float keep, rate;  /* factors of w, and of the step */
    float beta2;
    int cautious;
} row_task;

static vf mix(const row_task *t, int64_t i, int k) {
    return vf_get(t->at.grad + i, k) * t->g + vf_get(t->at.momentum + i, k) * t->momentum;
}

/* The momentum, and the sum of squares of each row of Nesterov's. */
static void gather_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const row_task *t = args;
    for (int64_t row = begin; row < end; row++) {
        int64_t first = row * t->at.cols;
        vf sum = {0};
        FOR_LANES (c, k, t->at.cols) {
            vf_put(t->at.momentum + first + c, mix(t, first + c, k), k);
            vf u = mix(t, first + c, k);
            sum += u * u; /* lanes past the end are 0 */
        }
        t->m.sums[row] = (double)vf_sum(sum);
    }
}

static void scale_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const row_task *t = args;
    for (int64_t row = begin; row < end; row++) {
        int64_t first = row * t->at.cols;
        FOR_LANES (c, k, t->at.cols) vf_put(t->m.x + first + c, mix(t, first + c, k) * t->scale, k);
    }
}

static float row_factor(const row_task *t, int64_t row) {
    return 1 / (sqrtf(t->at.v[row]) + MUON_ROW_EPS);
}

/* The average of each row's mean square, and the sum of squares of the row that it scales. */
static void average_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const row_task *t = args;
    for (int64_t row = begin; row < end; row++) {
        const elem *x = t->m.x + row * t->at.cols;
        vf sum = {0};
        FOR_LANES (c, k, t->at.cols) {
            vf u = vf_get(x + c, k);
            sum += u * u;
        }
        float squares = vf_sum(sum), *v = &t->at.v[row];
        *v = t->beta2 * *v + (1 - t->beta2) * (squares / (float)t->at.cols);
        t->m.sums[row] = (double)squares * row_factor(t, row) * row_factor(t, row);
    }
}

static void step_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const row_task *t = args;
    for (int64_t row = begin; row < end; row++) {
        int64_t first = row * t->at.cols;
        float *w = t->at.w + first, rate = t->at.v ? t->rate * row_factor(t, row) : t->rate;
        FOR_LANES (c, k, t->at.cols) {
            vf x = vf_get(t->m.x + first + c, k), now = vf_get(w + c, k), keep = vf_set(t->keep);
            if (t->cautious) keep = vf_select(x * now >= 0.0f, keep, vf_set(1.0f));
            vf_put(w + c, now * keep - x * rate, k);
        }
    }
}

static double sum_of(const row_task *t) {
    double sum = 0;
    for (int row = 0; row < t->at.rows; row++) sum += t->m.sums[row];
    return sum;
}

static void update_matrix(gpt_ctx *ctx, const muon_task *all, matrix at, void *memory) {
    static const float polynomials[MUON_ITERATIONS][3] = MUON_POLYNOMIALS;
    const gpt_muon *s = all->op->step;
    float lr = s->lr * at.segment->lr_scale;
    row_task t = {.at = at,
                  .g = all->clip * (1 - s->momentum),
                  .momentum = s->momentum,
                  .keep = 1 - lr * (at.segment->decay ? s->weight_decay : 0),
                  .rate = lr * muon_scale(at.rows, at.cols),
                  .beta2 = s->beta2,
                  .cautious = s->cautious};
    lay_out(memory, at.rows, at.cols, &t.m);
    cpu_parallel(ctx, gather_rows, &t, at.rows, 16);
    double sum = sum_of(&t);
    t.scale = sum > MUON_LEAST * at.rows * at.cols ? (float)(1 / (MUON_MARGIN * sqrt(sum))) : 0;
    cpu_parallel(ctx, scale_rows, &t, at.rows, 16);
    for (int i = 0; i < MUON_ITERATIONS; i++) iterate(ctx, &t.m, at.rows, at.cols, polynomials[i]);
    if (at.v) {
        cpu_parallel(ctx, average_rows, &t, at.rows, 16);
        double size = (double)cpu_min(at.rows, at.cols), scaled = sum_of(&t);
        t.rate *= scaled > 0 ? (float)sqrt(size / scaled) : 0;
    }
    cpu_parallel(ctx, step_rows, &t, at.rows, 16);
}

/* ---- all of them ---- */

/* Matrices begin to end - 1, those that are one thread's work. */
static void update_small(void *args, int thread, int64_t begin, int64_t end) {
    const muon_task *t = args;
    gpt_ctx alone = {.n_threads = 1, .scratch = cpu_scratch(t->ctx, thread)};
    char *memory = (char *)t->ctx->workspace + thread * t->stride;
    matrix at;
    for (int64_t i = begin; i < end; i++)
        if (matrix_at(t->op, (int)i, &at) && is_alone(t->ctx->n_threads, at.rows, at.cols))
            update_matrix(&alone, t, at, memory);
}

static void nothing(const void *rule, const gpt_segment *s, int64_t first, int size) {
    (void)rule, (void)s, (void)first, (void)size;
}

CPU_OP(muon_update) {
    muon_task t = {op, ctx, update_clip(*op->norm, op->step->grad_clip), 0};
    update_task pack = {GPT_OPTIMIZER_MUON, nothing, NULL, op->w, op->segments, op->n_segments, 1};
    matrix at;
    int n = 0;
    if (!isfinite(*op->norm)) return;
    for (; matrix_at(op, n, &at); n++) {
        buffers none;
        int64_t bytes = (int64_t)lay_out(NULL, at.rows, at.cols, &none);
        if (is_alone(ctx->n_threads, at.rows, at.cols) && bytes > t.stride) t.stride = bytes;
    }
    cpu_parallel(ctx, update_small, &t, n, 1);
    for (int i = 0; i < n; i++)
        if (matrix_at(op, i, &at) && !is_alone(ctx->n_threads, at.rows, at.cols))
            update_matrix(ctx, &t, at, ctx->workspace);
    update_segments(ctx, pack);
}
