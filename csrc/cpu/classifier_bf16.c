/* classifier_bf16.c: the output head fused with softmax cross-entropy in bf16, over chunks of rows.
 *
 * The head's epilogue has logits in float32 and in cache, so it is there that they become
 * exponentials: each relative to the largest of its row within 32 columns, which is kept in float32
 * with the sum. The numbers stored in bf16 are thus between 0 and 1, and one factor for 32 columns makes
 * a gradient of it. The loss itself is of float32 logits. */
#include "known_rows.h"
#include "product.h"
#include "softmax.h"

/* Larger chunks read and write wte and dwte less often; smaller ones need less workspace. SLICE
 * columns of a chunk become a gradient and are used up while they are in cache. */
enum {
    CHUNK_BYTES = 112 << 20,
    FROZEN_CHUNK_BYTES = 52 << 20, /* without dwte */
    MIN_CHUNK_ROWS = 64,
    BLOCK = EPILOGUE,
    SLICE = 2048
};

/* From row to row of logits: an odd number of cache lines, for a power of two would crowd the rows of a
 * band into one set of the cache. */
static int row_stride(int Vp) {
    enum { LINE = 64 / sizeof(bf16) };
    return (int)(cpu_div_up(Vp, LINE) | 1) * LINE;
}

/* A row has its logits, with a cap as many slopes, its dx and its packed x. */
static int most_rows(int C, int Vp, int capped, int frozen) {
    int64_t row_bytes =
        (int64_t)sizeof(bf16) * ((1 + capped) * row_stride(Vp) + C) + (int64_t)sizeof(float) * C;
    return cpu_max((int)((frozen ? FROZEN_CHUNK_BYTES : CHUNK_BYTES) / row_bytes), MIN_CHUNK_ROWS);
}

/* Chunks of about the same number of rows, as many as the bound asks for. */
static int chunk_rows(int N, int C, int Vp, int capped, int frozen) {
    int most = most_rows(C, Vp, capped, frozen), n_chunks = (int)cpu_div_up(N, most);
    return cpu_min(most, (int)cpu_round_up(cpu_div_up(N, n_chunks), 8));
}

typedef struct chunk_task {
    int32_t *known; /* (N) the rows with a target */
    /* of the chunk; the workspace holds them in this order, after `known` */
    bf16 *dlogits;    /* (n, Vp), rows `stride` apart: exponentials, then gradients */
    float *max, *sum; /* (n, Vp / BLOCK); max becomes the factor of each block */
    float *picked;    /* (n) the target's logit */
    float *dx;        /* (n, C) */
    bf16 *x_panels;
    bf16 *slopes;        /* as dlogits: derivatives of capped logits; NULL without a cap */
    bf16 *x;             /* (n, C) */
    const int32_t *rows; /* (n) of known: their places in what follows, which is of all N rows */
    float *losses;
    const int32_t *targets;
    bf16 *dx_out;
    const float *weights; /* or NULL */
    float scale;          /* of the gradient */
    float label_smoothing, z_loss;
    float cap;      /* 0: none */
    const float *b; /* or NULL */
    int C, V, Vp, stride, n_blocks, gradient, exact;
    int slice, slice_end; /* columns */
} chunk_task;

static size_t lay_out(chunk_task *a, char *base, int N, int rows) {
    int64_t blocks = (int64_t)rows * a->n_blocks;
    const int64_t bytes[] = {(int64_t)sizeof(int32_t) * N,
                             a->gradient ? (int64_t)sizeof(bf16) * rows * a->stride : 0,
                             (int64_t)sizeof(float) * blocks,
                             (int64_t)sizeof(float) * blocks,
                             (int64_t)sizeof(float) * rows,
                             a->gradient ? (int64_t)sizeof(float) * rows * a->C : 0,
                             a->gradient ? (int64_t)cpu_packed_operand_bytes(a->C, rows) : 0,
                             a->gradient && a->cap > 0 ? (int64_t)sizeof(bf16) * rows * a->stride
                                                       : 0,
                             (int64_t)sizeof(bf16) * rows * a->C};
    void *places[sizeof bytes / sizeof *bytes];
    /* An exact product unpacks weights to the start of the workspace. */
    size_t used = a->gradient || a->exact ? cpu_product_room(cpu_max(a->C, SLICE)) : 0;
    for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++) {
        places[i] = base ? base + used : NULL;
        used += (size_t)cpu_round_up(bytes[i], 64);
    }
    a->known = places[0];
    a->dlogits = places[1];
    a->max = places[2];
    a->sum = places[3];
    a->picked = places[4];
    a->dx = places[5];
    a->x_panels = places[6];
    a->slopes = a->gradient && a->cap > 0 ? places[7] : NULL;
    a->x = places[8];
    return used;
}

CPU_WORKSPACE(classifier_workspace) {
    (void)n_threads;
    chunk_task a = {.C = shape->C,
                    .Vp = shape->Vp,
                    .stride = row_stride(shape->Vp),
                    .n_blocks = (int)cpu_div_up(shape->Vp, BLOCK),
                    .cap = (float)shape->logit_cap,
                    .gradient = shape->training};
    int most =
        most_rows(shape->C, shape->Vp, shape->logit_cap, shape->training && shape->lora_rank > 0);
    return lay_out(&a, NULL, shape->N, cpu_min(shape->N, most));
}

/* The logits z of a block's products y. */
static const float *biased_block(const chunk_task *a, float *z, const float *y, int col, int cols) {
    FOR_LANES (c, k, cols) vf_put(z + c, vf_get(y + c, k) + vf_get(a->b + col + c, k), k);
    return z;
}

/* The capped logits z of a block's y, which they may be, and their slopes for backward. */
static const float *cap_block(const chunk_task *a, float *z, const float *y, int row, int col,
                              int cols) {
    float inverse = 1 / a->cap;
    FOR_LANES (c, k, cols) {
        vf t = vf_tanh(vf_get(y + c, k) * inverse);
        vf_put(z + c, t * a->cap, k);
        if (a->slopes) vf_put(a->slopes + (int64_t)row * a->stride + col + c, 1.0f - t * t, k);
    }
    return z;
}

/* Logits y become exponentials; columns start at a multiple of BLOCK. */
SPECIALIZED void exponentials_of(const chunk_task *a, const float *products, int ldy, int row,
                                 int rows, int col, int cols) {
    float changed[BLOCK];
    for (int r = row; r < row + rows; r++) {
        int64_t block = (int64_t)r * a->n_blocks + col / BLOCK;
        const float *y = products + (int64_t)(r - row) * ldy;
        if (a->b) y = biased_block(a, changed, y, col, cols);
        if (a->cap > 0) y = cap_block(a, changed, y, r, col, cols);
        int target = a->targets[a->rows[r]] - col;
        if (target >= 0 && target < cols) a->picked[r] = y[target];
        bf16 *e_out = a->gradient ? a->dlogits + (int64_t)r * a->stride + col : NULL;
        vf biggest = vf_set(-INFINITY), sum = {0};
        FOR_LANES (c, k, cols) biggest = vf_max(biggest, vf_first(vf_get(y + c, k), k, -INFINITY));
        float max = vf_max_lane(biggest);
        FOR_LANES (c, k, cols) {
            vf e = vf_first(vf_exp(vf_get(y + c, k) - max), k, 0);
            if (e_out) vf_put(e_out + c, e, k);
            sum += e;
        }
        a->max[block] = max;
        a->sum[block] = vf_sum(sum);
    }
}

static void exponentials(void *p, const float *y, const float *y_twin, int ldy, int row, int rows,
                         int col, int cols) {
    (void)y_twin;
    if (cols == BLOCK)
        exponentials_of(p, y, ldy, row, rows, col, BLOCK);
    else
        exponentials_of(p, y, ldy, row, rows, col, cols);
}

/* The factor of a row's gradient. */
static float row_scale(const chunk_task *a, int64_t n) {
    return a->weights ? a->scale * a->weights[a->rows[n]] : a->scale;
}

/* The loss of each row from its blocks; with gradient, max becomes the factor of each block's exponentials. */
static void finish_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const chunk_task *a = p;
    int used = (int)cpu_div_up(a->V, BLOCK);
    for (int64_t n = begin; n < end; n++) {
        float *max = a->max + n * a->n_blocks, *sum = a->sum + n * a->n_blocks;
        int known = a->targets[a->rows[n]] >= 0;
        float m = -INFINITY, total = 0;
        for (int b = 0; b < used; b++) m = max[b] > m ? max[b] : m;
        vf totals = {0};
        FOR_LANES (b, k, used) {
            vf shrink = vf_first(vf_exp(vf_get(max + b, k) - m), k, 0);
            totals += shrink * vf_get(sum + b, k);
            vf_put(max + b, shrink, k);
        }
        total = vf_sum(totals);
        float log_sum = m + logf(total);
        a->losses[a->rows[n]] = known ? log_sum - a->picked[n] : 0;
        float factor = known ? row_scale(a, n) * (1 + 2 * a->z_loss * log_sum) / total : 0;
        FOR_LANES (b, k, used) vf_put(max + b, vf_get(max + b, k) * factor, k);
        for (int b = used; b < a->n_blocks; b++) max[b] = 0;
        if (a->gradient)
            memset(a->dlogits + n * a->stride + a->V, 0, sizeof(bf16) * (size_t)(a->Vp - a->V));
    }
}

static float square(float x) {
    return x * x;
}

/* The columns of a slice become gradients: ops.h has the formula. Those from V on are 0. */
static void gradient_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const chunk_task *a = p;
    for (int64_t n = begin; n < end; n++) {
        bf16 *x = a->dlogits + n * a->stride;
        const float *factor = a->max + n * a->n_blocks;
        const bf16 *slopes = a->slopes ? a->slopes + n * a->stride : NULL;
        int target = a->targets[a->rows[n]], here = target >= a->slice && target < a->slice_end;
        float smoothed = target < 0 ? 0 : row_scale(a, n) * a->label_smoothing;
        float everywhere = smoothed / (float)a->V, at_target = 0;
        if (here)
            at_target = bf16_float(x[target]) * factor[target / BLOCK] - everywhere -
                        (row_scale(a, n) - smoothed);
        if (here && slopes) at_target *= 1 - square(a->picked[n] / a->cap);
        for (int c = a->slice, end = cpu_min(a->slice_end, a->V); c < end; c += BLOCK) {
            float f = factor[c / BLOCK];
            int width = cpu_min(BLOCK, end - c);
            FOR_LANES (i, k, width) {
                vf dz = vf_get(x + c + i, k) * f - everywhere;
                vf_put(x + c + i, slopes ? dz * vf_get(slopes + c + i, k) : dz, k);
            }
        }
        if (here) x[target] = bf16_round(at_target);
    }
}

static void store_dx(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const chunk_task *a = p;
    for (int64_t n = begin; n < end; n++) {
        bf16 *out = a->dx_out + (int64_t)a->rows[n] * a->C;
        FOR_LANES (c, k, a->C) vf_put(out + c, vf_get(a->dx + n * a->C + c, k), k);
    }
}

static void chunk_gradients(gpt_ctx *ctx, chunk_task *a, const classifier_backward *op,
                            const bf16 *x, int add, int n) {
    if (op->dwte) cpu_pack_operand(ctx, a->x_panels, x, a->C, a->C, n);
    for (a->slice = 0; a->slice < a->Vp; a->slice = a->slice_end) {
        a->slice_end = cpu_min(a->slice + SLICE, a->Vp);
        cpu_parallel(ctx, gradient_rows, a, n, cpu_grain(ctx, n, 4));
        product dinput = {.kind = PRODUCT_NN,
                          .out = a->dx,
                          .a = a->dlogits + a->slice,
                          .w = op->wte,
                          .lda = a->stride,
                          .ldo = a->C,
                          .M = n,
                          .N = a->C,
                          .K = a->slice_end - a->slice,
                          .first = a->slice,
                          .rows = a->Vp,
                          .add = a->slice > 0};
        cpu_product(ctx, &dinput);
        product dweight = {.kind = PRODUCT_TN,
                           .out = op->dwte ? op->dwte + (int64_t)a->slice * a->C : NULL,
                           .sums = op->db ? op->db + a->slice : NULL,
                           .add = add,
                           .a = a->dlogits + a->slice,
                           .panels = a->x_panels,
                           .lda = a->stride,
                           .ldo = a->C,
                           .M = cpu_min(a->slice_end, a->V) - a->slice,
                           .N = a->C,
                           .K = n};
        if ((op->dwte || op->db) && dweight.M > 0) cpu_product(ctx, &dweight);
    }
    cpu_parallel(ctx, store_dx, a, n, cpu_grain(ctx, n, 16));
}

/* Without dx: the losses alone. */
static void classifier(gpt_ctx *ctx, const classifier_backward *op, int exact) {
    int N = op->N, C = op->C, V = op->V, Vp = op->Vp, capped = op->cap > 0;
    int frozen = op->dx && !op->dwte;
    const bf16 *x = op->x;
    chunk_task a = {.losses = op->losses,
                    .targets = op->targets,
                    .weights = op->weights,
                    .dx_out = op->dx,
                    .C = C,
                    .V = V,
                    .Vp = Vp,
                    .stride = row_stride(Vp),
                    .n_blocks = (int)cpu_div_up(Vp, BLOCK),
                    .scale = op->scale,
                    .label_smoothing = op->label_smoothing,
                    .z_loss = op->z_loss,
                    .cap = op->cap,
                    .b = op->b,
                    .gradient = op->dx != NULL,
                    .exact = exact};
    lay_out(&a, ctx->workspace, N, cpu_min(N, most_rows(C, Vp, capped, frozen)));
    int n_known = list_known_rows(a.known, op->losses, op->dx, op->targets, N, C);
    int rows = chunk_rows(n_known, C, Vp, capped, frozen), all = n_known == N;
    for (int row = 0; row < n_known; row += rows) {
        int n = cpu_min(rows, n_known - row);
        a.rows = a.known + row;
        if (!all) {
            known_task gather = {.out = a.x, .x = x, .known = a.rows, .C = C};
            cpu_parallel(ctx, gather_known_rows, &gather, n, cpu_grain(ctx, n, 16));
        }
        const bf16 *x_chunk = all ? x + (int64_t)row * C : a.x;
        product head = {.kind = PRODUCT_NT,
                        .a = x_chunk,
                        .w = op->wte,
                        .lda = C,
                        .M = n,
                        .N = V,
                        .K = C,
                        .exact = exact,
                        .epilogue = exponentials,
                        .epilogue_args = &a};
        cpu_product(ctx, &head);
        cpu_parallel(ctx, finish_rows, &a, n, cpu_grain(ctx, n, 4));
        if (op->dx) chunk_gradients(ctx, &a, op, x_chunk, op->add || row > 0, n);
    }
}

CPU_OP(classifier_forward) {
    classifier_backward losses = {.losses = op->losses,
                                  .x = op->x,
                                  .wte = op->wte,
                                  .targets = op->targets,
                                  .cap = op->cap,
                                  .b = op->b,
                                  .N = op->N,
                                  .C = op->C,
                                  .V = op->V,
                                  .Vp = op->Vp};
    classifier(ctx, &losses, op->exact);
}

CPU_OP(classifier_backward) {
    classifier(ctx, op, 1);
    cpu_add_losses(op->total, op->losses, op->weights, op->scale, op->add, op->N);
}
