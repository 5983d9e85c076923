/* profile.c: the ops of another table, timed. It is a backend like any other, whose context holds
 * the one that does the work. Calls are told apart by op and by the shape that matters to it. */
#define _POSIX_C_SOURCE 200809L
#include "profile.h"

#include "error.h"
#include "finite.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_KINDS = 64 };

struct gpt_ctx {
    gpt_ops table; /* ours */
    const gpt_ops *ops;
    gpt_ctx *inner;
    int n_kinds;
    gpt_op_time kinds[MAX_KINDS];
    const int *layer;   /* the one that is computed; NULL: outputs are not checked */
    gpt_not_finite bad; /* the first number that was not finite; no op: none yet */
    int status;         /* the first failure of the device, which sync then reports */
    char message[256];  /* its sentence */
};

/* A status, or the one kept from before. */
static int kept(gpt_ctx *p, int status) {
    if (status != GPT_OK && p->status == GPT_OK) {
        p->status = status;
        snprintf(p->message, sizeof p->message, "%s", gpt_last_error());
    }
    return p->status;
}

static double now(gpt_ctx *p) {
    struct timespec t;
    kept(p, p->ops->sync(p->inner));
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The cost of one call. */
typedef struct cost {
    double flops; /* of products only */
    double bytes; /* that must at least be read and written; 0: the call does nothing */
    int a, b;     /* the numbers in its name; 0: none */
} cost;

/* An op that failed looks fast: it and all after it are left out. */
static void record(gpt_ctx *p, const char *op, cost cost, double seconds) {
    char name[sizeof p->kinds->name];
    if (cost.bytes == 0 || p->status != GPT_OK) return;
    if (cost.b)
        snprintf(name, sizeof name, "%s %d x %d", op, cost.a, cost.b);
    else
        snprintf(name, sizeof name, "%s", op);
    int i = 0;
    while (i < p->n_kinds && strcmp(p->kinds[i].name, name)) i++;
    if (i == MAX_KINDS) return;
    gpt_op_time *kind = &p->kinds[i];
    if (i == p->n_kinds) {
        p->n_kinds++;
        memcpy(kind->name, name, sizeof name);
    }
    kind->calls++;
    kind->seconds += seconds;
    kind->flops += cost.flops;
    kind->bytes += cost.bytes;
}

/* Bytes of n activations, and of n floats. */
static double acts(const gpt_ctx *p, double n) {
    return n * (double)p->ops->act_bytes;
}
static double floats(double n) {
    return n * (double)sizeof(float);
}
/* Bytes of a matrix of weights as products read it. */
static double weights(const gpt_ctx *p, const weight *w, int rows, int cols, int parts) {
    if (p->ops->weight_bytes) return (double)p->ops->weight_bytes(p->inner, w);
    size_t packed = p->ops->weights_bytes(rows, cols, parts, 0);
    return packed ? (double)packed : floats((double)rows * cols);
}

/* ---- the cost of each op: a function a slot ---- */

#define COST(name) static cost cost_of_##name(gpt_ctx *p, const struct name *op)

COST(embedding_forward) {
    double size = (double)op->N * op->C;
    return (cost){.bytes = acts(p, size) + floats(op->wpe ? 2 * size : size)};
}

COST(embedding_backward) {
    double size = (double)op->N * op->C;
    double sums = (op->dwte ? 2 : 0) + (op->dwpe ? 2 : 0); /* read and written */
    return (cost){.bytes = acts(p, size) + floats(sums * size)};
}

COST(dropout_apply) {
    return (cost){.bytes = op->dropout.p > 0 ? acts(p, 2 * (double)op->n) : 0};
}

COST(residual_norm_forward) {
    return (cost){.bytes = acts(p, (op->branch ? 4.0 : 2.0) * op->N * op->C)};
}

COST(residual_norm_backward) {
    return (cost){.bytes = acts(p, (op->dbranch ? 5.0 : 4.0) * op->N * op->C)};
}

/* Of an adapter's products with A and B. */
static double adapter_numbers(const lora_part *parts, int n_parts, int R, int IC) {
    double width = 0;
    for (int i = 0; i < n_parts; i++) width += parts[i].rows;
    return R * (width + (double)n_parts * IC);
}

COST(linear_forward) {
    const struct lora_forward *lora = op->lora;
    double adapter = lora ? adapter_numbers(lora->parts, lora->n_parts, lora->R, lora->IC) : 0;
    int parts = is_gated(op->activation) ? 2 : 1, width = parts * op->OC;
    double kept = op->pre ? width : 0;
    return (cost){.flops = 2.0 * op->N * ((double)op->IC * width + adapter),
                  .bytes = acts(p, (double)op->N * (op->IC + op->OC + kept)) +
                           weights(p, op->w, width, op->IC, parts) + floats(adapter),
                  .a = op->IC,
                  .b = width};
}

COST(linear_backward) {
    const struct lora_backward *lora = op->lora;
    double adapter = lora ? adapter_numbers(lora->parts, lora->n_parts, lora->R, lora->IC) : 0;
    double width = is_gated(op->activation) ? 2.0 * op->IC : op->IC;
    double written = op->dw ? (op->add ? 2.0 : 1.0) * op->IC * op->OC : 0;
    double products = (op->dw ? 4.0 : 2.0) * op->IC * op->OC + 4.0 * adapter;
    return (cost){.flops = op->N * products,
                  .bytes = acts(p, (double)op->N * (op->OC + op->IC + 2 * width)) +
                           weights(p, op->w, op->OC, op->IC, 1) + floats(written + 3 * adapter),
                  .a = op->IC,
                  .b = op->OC};
}

/* Two products with A and B, which are small: activations are read for each, and the results added to. */
COST(lora_forward) {
    double width = 0, kept = op->activation == GPT_ACT_NONE ? 2 : 3;
    for (int i = 0; i < op->n_parts; i++) width += op->parts[i].rows;
    double numbers = adapter_numbers(op->parts, op->n_parts, op->R, op->IC);
    return (cost){.flops = 2.0 * op->N * numbers,
                  .bytes = acts(p, op->N * (op->IC + kept * width)) + floats(numbers),
                  .a = op->IC,
                  .b = (int)width};
}

COST(lora_backward) {
    double width = 0;
    for (int i = 0; i < op->n_parts; i++) width += op->parts[i].rows;
    double numbers = adapter_numbers(op->parts, op->n_parts, op->R, op->IC);
    return (cost){.flops = 4.0 * op->N * numbers,
                  .bytes = acts(p, op->N * (3.0 * op->IC + 2 * width)) + floats(3 * numbers),
                  .a = op->IC,
                  .b = (int)width};
}

COST(dora_inputs) {
    return (cost){.bytes = acts(p, (double)op->n) + floats((double)op->n)};
}

COST(dora_gain) {
    double rows = 0;
    for (int i = 0; i < op->n_parts; i++) rows += op->parts[i].rows;
    double square = (double)op->R * op->R;
    return (cost){.flops = 2 * square * (rows + (double)op->n_parts * op->IC),
                  .bytes = floats((double)op->R * (rows + (double)op->n_parts * op->IC)) +
                           acts(p, op->R * rows),
                  .a = op->IC,
                  .b = op->OC};
}

COST(dora_backward) {
    return (cost){.bytes = acts(p, 3.0 * op->N * op->OC)};
}

COST(head_forward) {
    return (cost){.flops = 2.0 * op->N * op->C * op->V,
                  .bytes = acts(p, (double)op->N * op->C) + weights(p, op->wte, op->V, op->C, 1) +
                           floats((double)op->N * op->V),
                  .a = op->C,
                  .b = op->V};
}

COST(qk_norm_forward) {
    double kept = op->in ? 3 : 2;
    return (cost){.bytes = acts(p, kept * op->N * (op->NH + op->NKV) * op->HS)};
}

COST(qk_norm_backward) {
    return (cost){.bytes = acts(p, 3.0 * op->N * (op->NH + op->NKV) * op->HS)};
}

COST(rope_forward) {
    return (cost){.bytes = acts(p, 2.0 * op->N * (op->NH + op->NKV) * op->HS)};
}

COST(rope_backward) {
    return (cost){.bytes = acts(p, 2.0 * op->N * (op->NH + op->NKV) * op->HS)};
}

/* Products of T queries with the T (T + 1) / 2 keys they see, `n` of them. */
static double attention_flops(int n, int B, int T, int NH, int HS) {
    return (double)n * B * NH * HS * ((double)T * (T + 1));
}

COST(attention_forward) {
    return (cost){.flops = attention_flops(2, op->B, op->T, op->NH, op->HS),
                  .bytes = acts(p, (double)op->B * op->T * (2 * op->NH + 2 * op->NKV) * op->HS)};
}

COST(attention_backward) {
    return (cost){.flops = attention_flops(5, op->B, op->T, op->NH, op->HS),
                  .bytes = acts(p, (double)op->B * op->T * (4 * op->NH + 4 * op->NKV) * op->HS)};
}

COST(attention_decode) {
    double keys = 0;
    int32_t some[64]; /* positions are the device's */
    for (int n = 0, count; n < op->N; n += count) {
        count = op->N - n < 64 ? op->N - n : 64;
        p->ops->download(p->inner, some, op->positions + n, sizeof *some * (size_t)count);
        for (int i = 0; i < count; i++) keys += some[i] + 1;
    }
    double numbers = 2.0 * keys * op->NKV * op->HS;
    return (cost){.flops = 4.0 * keys * op->NH * op->HS,
                  .bytes = op->scale_k ? numbers + floats(2.0 * keys * op->NKV) : acts(p, numbers)};
}

COST(route_forward) {
    return (cost){.flops = 2.0 * op->N * op->C * op->E,
                  .bytes = acts(p, (double)op->N * op->C) + floats((double)op->E * op->C)};
}

COST(route_backward) {
    return (cost){.flops = (op->dw ? 4.0 : 2.0) * op->N * op->C * op->E,
                  .bytes = acts(p, 3.0 * op->N * op->C) + floats(3.0 * op->E * op->C)};
}

COST(expert_spread) {
    return (cost){.bytes = acts(p, (1.0 + (op->dgates ? 2 : 1) * op->K) * op->N * op->C)};
}

COST(expert_combine) {
    return (cost){.bytes = acts(p, (1.0 + op->K) * op->N * op->C)};
}

/* Bytes of the matrices of experts that have rows. */
static double used_experts(gpt_ctx *p, const int32_t *begins, weight *const *w, int E, int rows,
                           int cols, int parts) {
    int32_t found[GPT_MAX_EXPERTS + 1];
    double bytes = 0;
    p->ops->download(p->inner, found, begins, sizeof *found * (size_t)(E + 1));
    for (int e = 0; e < E; e++)
        if (found[e + 1] > found[e]) bytes += weights(p, w[e], rows, cols, parts);
    return bytes;
}

COST(expert_forward) {
    int parts = is_gated(op->activation) ? 2 : 1, width = parts * op->OC;
    double kept = op->pre ? width : 0;
    return (cost){.flops = 2.0 * op->R * op->IC * width,
                  .bytes = acts(p, (double)op->R * (op->IC + op->OC + kept)) +
                           used_experts(p, op->begins, op->w, op->E, width, op->IC, parts),
                  .a = op->IC,
                  .b = width};
}

COST(expert_backward) {
    double width = is_gated(op->activation) ? 2.0 * op->IC : op->IC, written = 0;
    for (int e = 0; e < op->E; e++)
        if (op->dw[e]) written += (op->add ? 2.0 : 1.0) * op->IC * op->OC;
    return (cost){.flops = (written > 0 ? 4.0 : 2.0) * op->R * op->IC * op->OC,
                  .bytes = acts(p, (double)op->R * (op->OC + op->IC + 2 * width)) +
                           used_experts(p, op->begins, op->w, op->E, op->OC, op->IC, 1) +
                           floats(written),
                  .a = op->IC,
                  .b = op->OC};
}

COST(classifier_forward) {
    return (cost){.flops = 2.0 * op->N * op->C * op->V,
                  .bytes = acts(p, (double)op->N * op->C) + weights(p, op->wte, op->V, op->C, 1),
                  .a = op->C,
                  .b = op->V};
}

COST(classifier_backward) {
    double written = op->dwte ? (op->add ? 2.0 : 1.0) * op->C * op->V : 0;
    return (cost){.flops = (op->dwte ? 6.0 : 4.0) * op->N * op->C * op->V,
                  .bytes = acts(p, 2.0 * op->N * op->C) + weights(p, op->wte, op->V, op->C, 1) +
                           floats(written),
                  .a = op->C,
                  .b = op->V};
}

COST(weights_pack) {
    double size = (double)op->segment->size;
    return (cost){.bytes = floats(size) + acts(p, op->training ? 2 * size : size)};
}

COST(sample) {
    (void)p;
    return (cost){.bytes = floats((double)op->N * op->V)};
}

COST(grad_norm) {
    (void)p;
    return (cost){.bytes = floats((double)op->n)};
}

/* An optimizer reads and writes `floats_each` floats for each number, and writes its packed forms. */
static cost update_cost(const gpt_ctx *p, const gpt_segment *segments, int n, int kind,
                        double floats_each) {
    double size = 0, packed = 0;
    for (int i = 0; i < n; i++) {
        if (segments[i].optimizer != kind) continue;
        size += (double)segments[i].size;
        if (segments[i].packed) packed += 2 * (double)segments[i].size;
    }
    return (cost){.bytes = floats(floats_each * size) + acts(p, packed)};
}

COST(adamw_update) {
    static const double bytes[] = {4, 2, 1}; /* of a moment */
    return update_cost(p, op->segments, op->n_segments, GPT_OPTIMIZER_ADAMW,
                       3 + bytes[op->moments]); /* two moments, read and written: 4 of 4 bytes */
}

COST(sgd_update) {
    return update_cost(p, op->segments, op->n_segments, GPT_OPTIMIZER_SGD, 5);
}

COST(muon_update) {
    cost all = update_cost(p, op->segments, op->n_segments, GPT_OPTIMIZER_MUON, 5);
    for (const gpt_segment *s = op->segments; s < op->segments + op->n_segments; s++)
        for (int i = 0; s->optimizer == GPT_OPTIMIZER_MUON && i < s->n_matrices; i++)
            all.flops += muon_flops(s->matrix_rows[i], s->cols);
    return all;
}

/* ---- the wrappers ---- */

/* Keeps the first number of the outputs that is not finite, unless there was one before. */
static void look(gpt_ctx *p, const char *op, const output *outputs) {
    float value;
    for (; outputs->name && p->layer && !p->bad.op[0]; outputs++) {
        gpt_not_finite *bad = &p->bad;
        if (!finite_find(p->ops, p->inner, outputs, &bad->index, &value)) continue;
        bad->layer = *p->layer;
        bad->value = value;
        snprintf(bad->op, sizeof bad->op, "%s", op);
        snprintf(bad->tensor, sizeof bad->tensor, "%s", outputs->name);
    }
}

#define TIMED(name)                                                                                \
    static void profile_##name(gpt_ctx *p, const struct name *op) {                                \
        cost cost = cost_of_##name(p, op);                                                         \
        double begin = now(p);                                                                     \
        p->ops->name(p->inner, op);                                                                \
        record(p, #name, cost, now(p) - begin);                                                    \
        output outputs[MAX_OUTPUTS];                                                               \
        outputs_of_##name(op, outputs);                                                            \
        look(p, #name, outputs);                                                                   \
    }
GPT_OPS(TIMED)

static void profile_zero(gpt_ctx *p, void *device, size_t bytes) {
    double begin = now(p);
    p->ops->zero(p->inner, device, bytes);
    record(p, "zero", (cost){.bytes = (double)bytes}, now(p) - begin);
}

/* The other slots are passed on. */
static void profile_free_ctx(gpt_ctx *p) {
    p->ops->ctx_free(p->inner);
    free(p);
}
static int profile_threads(const gpt_ctx *p) {
    return p->ops->ctx_threads(p->inner);
}
static void profile_measure(gpt_ctx *p, int on) {
    p->ops->ctx_measure(p->inner, on);
}
static double profile_busy_seconds(const gpt_ctx *p, int thread) {
    return p->ops->ctx_busy_seconds(p->inner, thread);
}
static int profile_peak(gpt_ctx *p, double *flops, double *bytes) {
    return p->ops->peak(p->inner, flops, bytes);
}
static size_t profile_workspace_bytes(const gpt_ctx *p, const gpt_shape *shape) {
    return p->ops->workspace_bytes(p->inner, shape);
}
static void profile_set_workspace(gpt_ctx *p, void *workspace) {
    p->ops->ctx_set_workspace(p->inner, workspace);
}
static int profile_sync(gpt_ctx *p) {
    int status = kept(p, p->ops->sync(p->inner));
    p->status = GPT_OK;
    return status == GPT_OK ? GPT_OK : fail(status, "%s", p->message);
}
static void *profile_stream(gpt_ctx *p) {
    return p->ops->stream(p->inner);
}
static int profile_is_busy(gpt_ctx *p) {
    return p->ops->is_busy(p->inner);
}
static void *profile_alloc(gpt_ctx *p, size_t bytes, buffer_use use) {
    return p->ops->buffer_alloc(p->inner, bytes, use);
}
static void profile_free_buffer(gpt_ctx *p, void *buffer, size_t bytes) {
    p->ops->buffer_free(p->inner, buffer, bytes);
}
static void profile_upload(gpt_ctx *p, void *device, const void *host, size_t bytes) {
    p->ops->upload(p->inner, device, host, bytes);
}
static void profile_copy(gpt_ctx *p, void *to, const void *from, size_t bytes) {
    p->ops->copy(p->inner, to, from, bytes);
}
static void profile_download(gpt_ctx *p, void *host, const void *device, size_t bytes) {
    p->ops->download(p->inner, host, device, bytes);
}
static void profile_blocks_pack(gpt_ctx *p, const gpt_segment *segment, int part,
                                const void *blocks) {
    p->ops->blocks_pack(p->inner, segment, part, blocks);
}
static void profile_blocks_unpack(gpt_ctx *p, float *out, const gpt_segment *segment,
                                  const int32_t *rows, int n) {
    p->ops->blocks_unpack(p->inner, out, segment, rows, n);
}
static void profile_download_rows(gpt_ctx *p, void *host, const void *device, int rows,
                                  size_t bytes, size_t stride) {
    p->ops->download_rows(p->inner, host, device, rows, bytes, stride);
}

int profile_create(const gpt_ops *ops, gpt_ctx *ctx, const int *layer, const gpt_ops **out_ops,
                   gpt_ctx **out_ctx) {
    gpt_ctx *p = calloc(1, sizeof *p);
    if (!p) return fail(GPT_ERR_MEMORY, "no memory for the profile");
    p->ops = ops;
    p->inner = ctx;
    p->layer = layer;
    p->table = *ops;
    p->table.replay_begin = NULL; /* each op is to be seen */
    p->table.ctx_free = profile_free_ctx;
    p->table.ctx_threads = profile_threads;
    p->table.ctx_measure = profile_measure;
    p->table.ctx_busy_seconds = profile_busy_seconds;
    p->table.peak = profile_peak;
    p->table.workspace_bytes = profile_workspace_bytes;
    p->table.ctx_set_workspace = profile_set_workspace;
    p->table.sync = profile_sync;
    p->table.stream = ops->stream ? profile_stream : NULL;
    p->table.is_busy = profile_is_busy;
    p->table.buffer_alloc = profile_alloc;
    p->table.buffer_free = profile_free_buffer;
    p->table.upload = profile_upload;
    p->table.download = profile_download;
    p->table.download_rows = profile_download_rows;
    p->table.copy = profile_copy;
    p->table.zero = profile_zero;
    p->table.blocks_pack = profile_blocks_pack;
    p->table.blocks_unpack = profile_blocks_unpack;
#define WRAP(name) p->table.name = profile_##name;
    GPT_OPS(WRAP)
#undef WRAP
    ops->ctx_measure(ctx, 1);
    *out_ops = &p->table;
    *out_ctx = p;
    return GPT_OK;
}

void profile_free(gpt_ctx *profile, const gpt_ops **ops, gpt_ctx **ctx) {
    profile->ops->ctx_measure(profile->inner, 0);
    *ops = profile->ops;
    *ctx = profile->inner;
    free(profile);
}

int profile_read(const gpt_ctx *profile, int i, gpt_op_time *out) {
    if (i < 0 || i >= profile->n_kinds) return 0;
    *out = profile->kinds[i];
    return 1;
}

int profile_not_finite(const gpt_ctx *profile, gpt_not_finite *out) {
    *out = profile->bad;
    return out->op[0] != 0;
}

int profile_product(const gpt_ctx *profile, int i, gpt_product_time *out) {
    const gpt_ops *ops = profile->ops;
    return ops->product ? ops->product(profile->inner, i, out) : 0;
}
