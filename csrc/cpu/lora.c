/* lora.c: adapters of linear layers. Their matrices have few rows, so that a product is limited by reading
 * activations: each of the three loops below takes those in tiles of float32. Sums over a row, and over all
 * rows, are in one order, whoever computes them. */
#include "activation.h"
#include "cpu.h"

enum {
    ROWS = 4,           /* of a tile: activations that a vector of a or b is used for */
    COLS = 1024,        /* of a tile */
    GRADIENT = 64,      /* columns of a gradient that are summed at once, */
    GRADIENT_ROWS = 32, /* over so many rows */
};

/* ---- the three loops ---- */

/* sums[i] (R) of each row += x[i] (n) w (R, n)^T for two rows of w, or one. */
SPECIALIZED void dot_tile(float *sums, int64_t stride, const float x[ROWS][COLS], const float *w,
                          int64_t ldw, int n, int n_w) {
    vf s[ROWS][2] = {{{0}}};
    FOR_LANES (c, k, n) {
        vf w0 = vf_get(w + c, k), w1 = n_w > 1 ? vf_get(w + ldw + c, k) : w0;
        UNROLL for (int i = 0; i < ROWS; i++) {
            vf xi = vf_load(x[i] + c);
            s[i][0] += xi * w0;
            if (n_w > 1) s[i][1] += xi * w1;
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < n_w; j++) sums[i * stride + j] += vf_sum(s[i][j]);
}

static void dot(float *sums, int64_t stride, const float x[ROWS][COLS], const float *w, int64_t ldw,
                int n, int R) {
    int j = 0;
    for (; j + 2 <= R; j += 2) dot_tile(sums + j, stride, x, w + j * ldw, ldw, n, 2);
    if (j < R) dot_tile(sums + j, stride, x, w + j * ldw, ldw, n, 1);
}

/* y[i] (n) = sums[i] (R) of each row times w (R, n). */
static void combine(float y[ROWS][COLS], const float *sums, int64_t stride, const float *w,
                    int64_t ldw, int n, int R) {
    FOR_LANES (c, k, n) {
        vf s[ROWS] = {{0}};
        for (int j = 0; j < R; j++) {
            vf wj = vf_get(w + j * ldw + c, k);
            UNROLL for (int i = 0; i < ROWS; i++) s[i] += sums[i * stride + j] * wj;
        }
        UNROLL for (int i = 0; i < ROWS; i++) vf_store(y[i] + c, s[i]);
    }
}

/* dw (4 rows, ldw), two vectors of it, += u (rows, 4)^T x (rows): up to `n_u` of the 4. */
SPECIALIZED void outer_tile(float *dw, int64_t ldw, const float *u, int64_t ldu,
                            const float x[][GRADIENT], int rows, int n, int n_u) {
    vf s[4][2] = {{{0}}};
    for (int r = 0; r < rows; r++) {
        vf x0 = vf_load(x[r]), x1 = vf_load(x[r] + LANES);
        UNROLL for (int j = 0; j < n_u; j++) {
            s[j][0] += u[r * ldu + j] * x0;
            s[j][1] += u[r * ldu + j] * x1;
        }
    }
    UNROLL for (int j = 0; j < n_u; j++) {
        float *to = dw + j * ldw;
        int k = cpu_min(n, LANES), rest = cpu_min(n - LANES, LANES);
        vf_put(to, vf_get(to, k) + s[j][0], k);
        if (rest > 0) vf_put(to + LANES, vf_get(to + LANES, rest) + s[j][1], rest);
    }
}

static void outer(float *dw, int64_t ldw, const float *u, int64_t ldu, const float x[][GRADIENT],
                  int rows, int n, int R) {
    for (int c = 0; c < n; c += 2 * LANES) {
        int j = 0;
        const float(*at)[GRADIENT] = (const float(*)[GRADIENT])(x[0] + c);
        for (; j + 4 <= R; j += 4)
            outer_tile(dw + j * ldw + c, ldw, u + j, ldu, at, rows, n - c, 4);
        for (; j < R; j++) outer_tile(dw + j * ldw + c, ldw, u + j, ldu, at, rows, n - c, 1);
    }
}

/* ---- activations ---- */

/* Rows of activations (N, K) as the adapter reads them: after the activation that made them, where they
 * are only kept before it, and after dropout. */
typedef struct source {
    const elem *x;   /* or NULL: */
    const elem *pre; /* (N, K), or (N, 2 K) for SwiGLU */
    int activation;
    gpt_dropout dropout;
    int64_t K, stride; /* of x, from row to row */
} source;

/* Columns col to col + n - 1 of a row; zeros up to a whole vector. */
static void take(float *out, const source *s, int64_t row, int col, int n) {
    int64_t twin = is_gated(s->activation) ? s->K : 0;
    const elem *pre = s->x ? NULL : s->pre + row * (s->K + twin) + col;
    const elem *x = s->x ? s->x + row * s->stride + col : NULL;
    FOR_LANES (c, k, n) {
        vf v, up = {0};
        if (x) {
            v = vf_get(x + c, k);
        } else {
            if (twin) up = vf_get(pre + twin + c, k);
            v = activation_forward(s->activation, vf_get(pre + c, k), up);
        }
        if (s->dropout.p > 0) v *= dropout_lanes(s->dropout, (uint64_t)(row * s->K + col + c));
        vf_store(out + c, k < LANES ? vf_first(v, k, 0) : v);
    }
}

/* Rows begin to end - 1, at most ROWS; the others are zeros. */
static void take_tile(float out[ROWS][COLS], const source *s, int64_t begin, int64_t end, int col,
                      int n) {
    for (int i = 0; i < ROWS; i++)
        if (begin + i < end)
            take(out[i], s, begin + i, col, n);
        else
            memset(out[i], 0, sizeof(float) * (size_t)cpu_round_up(n, LANES));
}

/* sums (ROWS, R) of rows from `row` on, stride apart, = their products with w (R, K). */
static void project(float *sums, int64_t stride, const source *s, int64_t row, int64_t end,
                    const float *w, int R) {
    float x[ROWS][COLS];
    for (int i = 0; i < ROWS; i++) memset(sums + i * stride, 0, sizeof *sums * (size_t)R);
    for (int col = 0; col < s->K; col += COLS) {
        int n = cpu_min(COLS, (int)s->K - col);
        take_tile(x, s, row, end, col, n);
        dot(sums, stride, x, w + col, s->K, n, R);
    }
}

/* ---- B by columns ---- */

static int part_rows(const lora_part *parts, int n_parts) {
    int rows = 0;
    for (int p = 0; p < n_parts; p++) rows += parts[p].rows;
    return rows;
}

/* out (R, rows) = b (rows, R)^T. */
static void turn(float *out, const float *b, int rows, int R) {
    for (int o = 0; o < rows; o++)
        for (int j = 0; j < R; j++) out[(int64_t)j * rows + o] = b[(int64_t)o * R + j];
}

/* Each part of b becomes (R, rows), one after the other. */
static void turn_parts(float *out, const float *b, const lora_part *parts, int n_parts, int R) {
    for (int p = 0; p < n_parts; p++) {
        turn(out, b, parts[p].rows, R);
        out += (int64_t)parts[p].rows * R;
        b += (int64_t)parts[p].rows * R;
    }
}

/* Numbers of the workspace: b by columns, its gradient, and du and scale u of all rows; or A A^T of each part
 * for dora_gain. */
CPU_WORKSPACE(lora_workspace) {
    (void)n_threads;
    if (!shape->lora_rank) return 0;
    int fc = is_gated(shape->activation) ? 2 * shape->F : shape->F;
    int qkv = (shape->NH + 2 * shape->NKV) * shape->HS;
    int64_t R = shape->lora_rank, widest = cpu_max(cpu_max(fc, qkv), shape->C);
    int64_t u = cpu_round_up(shape->N, ROWS) * GPT_MAX_STACKED * R, all = 2 * widest * R + u;
    if (shape->dora && all < GPT_MAX_STACKED * R * R) all = GPT_MAX_STACKED * R * R;
    return sizeof(float) * (size_t)all;
}

/* ---- forward ---- */

typedef struct forward_task {
    const lora_forward *op;
    source in;
    const float *turned; /* b by columns */
    float *u;            /* (N up to a multiple of ROWS, n_parts R) */
} forward_task;

/* y = gain v + bias of up to LANES columns, where v = y + sum - bias. */
static vf scaled(vf v, elem *kept, const float *gain, const float *bias, int k) {
    vf shift = {0};
    if (bias) shift = vf_get_f32(bias, k);
    v -= shift;
    if (kept) vf_put(kept, v, k);
    return vf_get_f32(gain, k) * v + shift;
}

/* y += scale u b^T in the columns of part i, of rows begin to end - 1. `before`: rows of the parts before. */
static void add_part(const forward_task *t, elem *y, int64_t stride, int i, const float *u,
                     int before, int64_t begin, int64_t end) {
    const lora_forward *a = t->op;
    const lora_part *part = &a->parts[i];
    const float *b = t->turned + (int64_t)before * a->R;
    int64_t all = part_rows(a->parts, a->n_parts);
    float sums[ROWS][COLS];
    for (int col = 0; col < part->rows; col += COLS) {
        int n = cpu_min(COLS, part->rows - col);
        combine(sums, u, (int64_t)a->n_parts * a->R, b + col, part->rows, n, a->R);
        for (int64_t row = begin; row < end; row++) {
            elem *to = y + row * stride + part->first + col;
            const float *from = sums[row - begin];
            elem *v = a->v ? (elem *)a->v + row * all + before + col : NULL;
            const float *gain = a->gain ? a->gain + before + col : NULL;
            const float *bias = a->bias ? (const float *)a->bias + part->first + col : NULL;
            FOR_LANES (c, k, n) {
                vf sum = vf_get(to + c, k) + a->scale * vf_load(from + c);
                if (gain) sum = scaled(sum, v ? v + c : NULL, gain + c, bias ? bias + c : NULL, k);
                vf_put(to + c, sum, k);
            }
        }
    }
}

static void activate_row(const lora_forward *a, int64_t row) {
    int64_t twin = is_gated(a->activation) ? a->OC : 0;
    const elem *pre = (const elem *)a->pre + row * (a->OC + twin);
    elem *out = (elem *)a->out + row * a->OC;
    FOR_LANES (c, k, a->OC) {
        vf up = {0};
        if (twin) up = vf_get(pre + twin + c, k);
        vf_put(out + c, activation_forward(a->activation, vf_get(pre + c, k), up), k);
    }
}

static void forward_rows(void *p, int thread, int64_t first, int64_t last) {
    (void)thread;
    const forward_task *t = p;
    const lora_forward *a = t->op;
    int64_t width = (int64_t)a->n_parts * a->R;
    int activates = a->activation != GPT_ACT_NONE;
    int64_t stride = is_gated(a->activation) ? 2 * (int64_t)a->OC : a->OC;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t begin = tile * ROWS, end = begin + ROWS < a->N ? begin + ROWS : a->N;
        float *u = t->u + begin * width;
        project(u, width, &t->in, begin, end, a->a, (int)width);
        for (int i = 0, before = 0; i < a->n_parts; before += a->parts[i++].rows)
            add_part(t, activates ? a->pre : a->out, stride, i, u + i * a->R, before, begin, end);
        memcpy(a->u + begin * width, u, sizeof *u * (size_t)((end - begin) * width));
        for (int64_t row = begin; activates && row < end; row++) activate_row(a, row);
    }
}

CPU_OP(lora_forward) {
    float *turned = ctx->workspace;
    turn_parts(turned, op->b, op->parts, op->n_parts, op->R);
    forward_task t = {
        .op = op,
        .in = {.x = op->in, .dropout = dropout_at(op->dropout), .K = op->IC, .stride = op->IC},
        .turned = turned,
        .u = turned + (int64_t)part_rows(op->parts, op->n_parts) * op->R};
    cpu_parallel(ctx, forward_rows, &t, cpu_div_up(op->N, ROWS), cpu_grain(ctx, op->N, 16) / ROWS);
}

/* ---- backward ---- */

typedef struct backward_task {
    const lora_backward *op;
    source in;
    source dout[GPT_MAX_STACKED]; /* the columns of each part */
    const float *turned;          /* b by columns */
    float *du;                    /* (N up to a multiple of ROWS, n_parts R) */
    float *turned_gradient;       /* of b by columns */
} backward_task;

/* din += y, through dropout and the activation, in columns col to col + n - 1. */
static void add_input(const backward_task *t, const float *y, int64_t row, int col, int n) {
    const lora_backward *a = t->op;
    int64_t twin = is_gated(a->activation) ? a->IC : 0, at = row * (a->IC + twin) + col;
    elem *din = (elem *)a->din + at;
    const elem *pre = a->activation == GPT_ACT_NONE ? NULL : (const elem *)a->pre + at;
    gpt_dropout dropout = t->in.dropout;
    FOR_LANES (c, k, n) {
        vf d = vf_load(y + c), up = {0}, dup = {0}, made;
        if (dropout.p > 0) d *= dropout_lanes(dropout, (uint64_t)(row * a->IC + col + c));
        if (twin) up = vf_get(pre + twin + c, k);
        if (a->activation != GPT_ACT_NONE)
            d = activation_backward(a->activation, d, vf_get(pre + c, k), up, &dup, &made);
        if (twin) vf_put(din + twin + c, vf_get(din + twin + c, k) + dup, k);
        vf_put(din + c, vf_get(din + c, k) + d, k);
    }
}

static void backward_rows(void *p, int thread, int64_t first, int64_t last) {
    (void)thread;
    const backward_task *t = p;
    const lora_backward *a = t->op;
    int64_t width = (int64_t)a->n_parts * a->R;
    float y[ROWS][COLS];
    for (int64_t tile = first; tile < last; tile++) {
        int64_t begin = tile * ROWS, end = begin + ROWS < a->N ? begin + ROWS : a->N;
        float *du = t->du + begin * width;
        const float *b = t->turned;
        for (int i = 0; i < a->n_parts; i++) {
            project(du + i * a->R, width, &t->dout[i], begin, end, b, a->R);
            b += (int64_t)a->parts[i].rows * a->R;
        }
        for (int64_t j = 0; j < ROWS * width; j++) du[j] *= a->scale;
        for (int col = 0; col < a->IC; col += COLS) {
            int n = cpu_min(COLS, a->IC - col);
            combine(y, du, width, a->a + col, a->IC, n, (int)width);
            for (int64_t row = begin; row < end; row++) add_input(t, y[row - begin], row, col, n);
        }
    }
}

/* dw (R, K) += u (N, R)^T x (N, K) in columns col to col + n - 1. */
static void add_gradient(float *dw, const float *u, int64_t ldu, const source *x, int N, int col,
                         int n, int R) {
    float tile[GRADIENT_ROWS][GRADIENT] = {{0}};
    for (int row = 0; row < N; row += GRADIENT_ROWS) {
        int rows = cpu_min(GRADIENT_ROWS, N - row);
        for (int r = 0; r < rows; r++) take(tile[r], x, row + r, col, n);
        outer(dw + col, x->K, u + row * ldu, ldu, (const float(*)[GRADIENT])tile, rows, n, R);
    }
}

static void a_columns(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const backward_task *t = p;
    const lora_backward *a = t->op;
    int width = a->n_parts * a->R;
    for (int64_t i = begin; i < end; i++) {
        int col = (int)i * GRADIENT;
        add_gradient(a->da, t->du, width, &t->in, a->N, col, cpu_min(GRADIENT, a->IC - col), width);
    }
}

/* Of all parts, each divided by itself. */
static void b_columns(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const backward_task *t = p;
    const lora_backward *a = t->op;
    int64_t first = 0, at = 0; /* of the part: among pieces, and among rows of b */
    for (int part = 0; part < a->n_parts; part++) {
        int rows = a->parts[part].rows;
        float *turned = t->turned_gradient + at * a->R, *db = a->db + at * a->R;
        for (int64_t i = begin; i < end; i++) {
            int64_t col = (i - first) * GRADIENT;
            if (col < 0 || col >= rows) continue;
            int n = cpu_min(GRADIENT, rows - (int)col);
            for (int j = 0; j < a->R; j++)
                memset(turned + (int64_t)j * rows + col, 0, sizeof *turned * (size_t)n);
            add_gradient(turned, a->u + (int64_t)part * a->R, (int64_t)a->n_parts * a->R,
                         &t->dout[part], a->N, (int)col, n, a->R);
            for (int64_t o = col; o < col + n; o++)
                for (int j = 0; j < a->R; j++)
                    db[o * a->R + j] += a->scale * turned[(int64_t)j * rows + o];
        }
        first += cpu_div_up(rows, GRADIENT);
        at += rows;
    }
}

CPU_OP(lora_backward) {
    int64_t size = (int64_t)part_rows(op->parts, op->n_parts) * op->R, pieces = 0;
    float *turned = ctx->workspace;
    turn_parts(turned, op->b, op->parts, op->n_parts, op->R);
    backward_task t = {.op = op,
                       .in = {.x = op->in,
                              .pre = op->pre,
                              .activation = op->in ? GPT_ACT_NONE : op->activation,
                              .dropout = dropout_at(op->dropout),
                              .K = op->IC,
                              .stride = op->IC},
                       .turned = turned,
                       .turned_gradient = turned + size,
                       .du = turned + 2 * size};
    for (int i = 0; i < op->n_parts; i++) {
        t.dout[i] = (source){.x = (const elem *)op->dout + op->parts[i].first,
                             .K = op->parts[i].rows,
                             .stride = op->OC};
        pieces += cpu_div_up(op->parts[i].rows, GRADIENT);
    }
    cpu_parallel(ctx, backward_rows, &t, cpu_div_up(op->N, ROWS), cpu_grain(ctx, op->N, 16) / ROWS);
    if (op->da) cpu_parallel(ctx, a_columns, &t, cpu_div_up(op->IC, GRADIENT), 1);
    if (op->db) cpu_parallel(ctx, b_columns, &t, pieces, 1);
}
