/* classifier_fp32.c: the output head fused with softmax cross-entropy, over chunks of rows. */
#include "known_rows.h"
#include "product.h"
#include "softmax.h"

#include <math.h>

/* Larger chunks read and write dwte less often; smaller ones need less workspace. */
enum { CHUNK_BYTES = 96 << 20, MIN_CHUNK_ROWS = 64 };

static int logits_stride(int V) {
    return (int)cpu_round_up(V, 16);
}

/* Chunks of about the same number of rows, as many as the bound asks for. */
static int most_rows(int V) {
    return cpu_max(CHUNK_BYTES / (int)sizeof(float) / logits_stride(V), MIN_CHUNK_ROWS);
}

static int chunk_rows(int N, int V) {
    int n_chunks = (int)cpu_div_up(N, most_rows(V));
    return cpu_min(most_rows(V), (int)cpu_round_up(cpu_div_up(N, n_chunks), 8));
}

typedef struct chunk_task {
    int32_t *known; /* (N) the rows with a target */
    /* of the chunk; the workspace holds them in this order, after `known` */
    float *logits;       /* (n, stride) */
    float *x;            /* (n, C), then its gradient */
    const int32_t *rows; /* (n) of known: their places in what follows, which is of all N rows */
    float *losses;
    const int32_t *targets;
    const float *weights; /* or NULL */
    float scale;          /* of the gradient */
    float label_smoothing, z_loss;
    float cap;
    const float *b;
    int V, stride, gradient;
} chunk_task;

static size_t lay_out(chunk_task *a, char *base, int N, int rows, int C) {
    size_t known = (size_t)cpu_round_up((int64_t)sizeof(int32_t) * N, 64);
    size_t logits = sizeof(float) * (size_t)rows * (size_t)a->stride;
    if (base) {
        a->known = (int32_t *)base;
        a->logits = (float *)(base + known);
        a->x = (float *)(base + known + logits);
    }
    return known + logits + sizeof(float) * (size_t)rows * (size_t)C;
}

CPU_WORKSPACE(classifier_workspace) {
    (void)n_threads;
    chunk_task a = {.stride = logits_stride(shape->V)};
    return lay_out(&a, NULL, shape->N, cpu_min(shape->N, most_rows(shape->V)), shape->C);
}

static float row_max(const float *x, int V) {
    vf biggest = vf_set(x[0]);
    int v = 0;
    for (; v + LANES <= V; v += LANES) biggest = vf_max(biggest, vf_load(x + v));
    float m = vf_max_lane(biggest);
    for (; v < V; v++) m = x[v] > m ? x[v] : m;
    return m;
}

/* Capped logits become gradients of the products, where those of all tokens but the target are
 * e^(z - max) factor - everywhere, and the target's is less by `hot`. */
static void capped_gradient(const chunk_task *a, float *x, int target, float max, float factor,
                            float everywhere, float hot) {
    float inverse = 1 / a->cap, t = x[target] * inverse;
    FOR_LANES (v, k, a->V) {
        vf z = vf_get(x + v, k), tanh = z * inverse;
        vf dz = vf_exp(z - max) * factor - everywhere;
        vf_put(x + v, dz * (1.0f - tanh * tanh), k);
    }
    x[target] -= hot * (1 - t * t);
}

/* The loss of each row; with gradient, its logits become that: ops.h has the formula. */
static void softmax_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const chunk_task *a = p;
    for (int64_t i = begin; i < end; i++) {
        float *x = a->logits + i * a->stride;
        int n = a->rows[i], target = a->targets[n];
        if (target < 0) {
            a->losses[n] = 0;
            if (a->gradient) memset(x, 0, sizeof(float) * (size_t)a->V);
            continue;
        }
        if (a->b) add_row(x, a->b, a->V);
        if (a->cap > 0) cap_row(x, a->V, (scoring){1, a->cap});
        int keeps = a->gradient && a->cap == 0; /* exponentials, in place of logits */
        float max = row_max(x, a->V), picked = x[target] - max;
        vf sum = {0};
        FOR_LANES (v, k, a->V) {
            vf e = vf_exp(vf_get(x + v, k) - max);
            if (keeps) vf_put(x + v, e, k);
            if (k < LANES) {
                float tail[LANES];
                vf_store(tail, e);
                e = vf_load_n(tail, k);
            }
            sum += e;
        }
        float total = vf_sum(sum);
        float log_total = logf(total);
        a->losses[n] = log_total - picked;
        if (!a->gradient) continue;
        float scale = a->weights ? a->scale * a->weights[n] : a->scale;
        float factor = scale * (1 + 2 * a->z_loss * (max + log_total)) / total;
        float everywhere = scale * a->label_smoothing / (float)a->V;
        float hot = scale * (1 - a->label_smoothing);
        if (!keeps) {
            capped_gradient(a, x, target, max, factor, everywhere, hot);
            continue;
        }
        FOR_LANES (v, k, a->V) vf_put(x + v, vf_get(x + v, k) * factor - everywhere, k);
        x[target] -= hot;
    }
}

static void chunk_gradients(gpt_ctx *ctx, const chunk_task *a, const classifier_backward *op,
                            const float *x, float *dx, int add, int n) {
    product dweight = {.kind = PRODUCT_TN,
                       .out = op->dwte,
                       .sums = op->db,
                       .add = add,
                       .a = a->logits,
                       .b = x,
                       .lda = a->stride,
                       .ldb = op->C,
                       .ldo = op->C,
                       .M = op->V,
                       .N = op->C,
                       .K = n};
    if (op->dwte || op->db) cpu_product(ctx, &dweight);
    product dinput = {.kind = PRODUCT_NN,
                      .out = dx,
                      .a = a->logits,
                      .w = op->wte,
                      .lda = a->stride,
                      .ldb = op->C,
                      .ldo = op->C,
                      .M = n,
                      .N = op->C,
                      .K = op->V};
    cpu_product(ctx, &dinput);
}

/* Without dx: the losses alone. */
static void classifier(gpt_ctx *ctx, const classifier_backward *op) {
    int N = op->N, C = op->C, V = op->V;
    const float *x = op->x;
    float *dx = op->dx;
    chunk_task a = {.losses = op->losses,
                    .targets = op->targets,
                    .weights = op->weights,
                    .scale = op->scale,
                    .label_smoothing = op->label_smoothing,
                    .z_loss = op->z_loss,
                    .cap = op->cap,
                    .b = op->b,
                    .V = V,
                    .stride = logits_stride(V),
                    .gradient = dx != NULL};
    lay_out(&a, ctx->workspace, N, cpu_min(N, most_rows(V)), C);
    int n_known = list_known_rows(a.known, op->losses, dx, op->targets, N, C);
    int rows = chunk_rows(n_known, V), all = n_known == N;
    for (int row = 0; row < n_known; row += rows) {
        int n = cpu_min(rows, n_known - row);
        a.rows = a.known + row;
        if (!all) {
            known_task gather = {.out = a.x, .x = x, .known = a.rows, .C = C};
            cpu_parallel(ctx, gather_known_rows, &gather, n, cpu_grain(ctx, n, 16));
        }
        const float *x_chunk = all ? x + (int64_t)row * C : a.x;
        product head = {.kind = PRODUCT_NT,
                        .out = a.logits,
                        .a = x_chunk,
                        .w = op->wte,
                        .lda = C,
                        .ldb = C,
                        .ldo = a.stride,
                        .M = n,
                        .N = V,
                        .K = C};
        cpu_product(ctx, &head);
        cpu_parallel(ctx, softmax_rows, &a, n, cpu_grain(ctx, n, 1));
        if (!dx) continue;
        chunk_gradients(ctx, &a, op, x_chunk, all ? dx + (int64_t)row * C : a.x, op->add || row > 0,
                        n);
        known_task scatter = {.out = dx, .x = a.x, .known = a.rows, .C = C};
        if (!all) cpu_parallel(ctx, scatter_known_rows, &scatter, n, cpu_grain(ctx, n, 16));
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
    classifier(ctx, &losses);
}

CPU_OP(classifier_backward) {
    classifier(ctx, op);
    cpu_add_losses(op->total, op->losses, op->weights, op->scale, op->add, op->N);
}
