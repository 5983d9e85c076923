/* profile.c: the ops of another table, timed. It is a backend like any other, whose context holds
 * the one that does the work. Calls are told apart by op and by the shape that matters to it. */
#define _POSIX_C_SOURCE 200809L
#include "profile.h"

#include "error.h"

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
};

static double now(const gpt_ctx *p) {
    struct timespec t;
    p->ops->sync(p->inner);
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* flops: of products only. bytes: what must at least be read and written. */
static void record(gpt_ctx *p, const char *op, int a, int b, double begin, double flops,
                   double bytes) {
    double seconds = now(p) - begin;
    char name[sizeof p->kinds->name];
    if (b)
        snprintf(name, sizeof name, "%s %d x %d", op, a, b);
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
    kind->flops += flops;
    kind->bytes += bytes;
}

/* Bytes of n activations, and of n floats. */
static double acts(const gpt_ctx *p, double n) {
    return n * (double)p->ops->act_bytes;
}
static double floats(double n) {
    return n * (double)sizeof(float);
}
/* Bytes of a matrix of weights as products read it. */
static double weights(const gpt_ctx *p, int rows, int cols, int parts) {
    size_t packed = p->ops->weights_bytes(rows, cols, parts, 0);
    return packed ? (double)packed : floats((double)rows * cols);
}

static void profile_embedding_forward(gpt_ctx *p, act *out, const int32_t *tokens,
                                      const int32_t *positions, const float *wte, const float *wpe,
                                      int N, int T, int C) {
    double begin = now(p), size = (double)N * C;
    p->ops->embedding_forward(p->inner, out, tokens, positions, wte, wpe, N, T, C);
    record(p, "embedding_forward", 0, 0, begin, 0, acts(p, size) + floats(wpe ? 2 * size : size));
}

static void profile_embedding_backward(gpt_ctx *p, float *dwte, float *dwpe, const act *dout,
                                       const int32_t *tokens, int N, int T, int C, int V) {
    double begin = now(p), size = (double)N * C;
    p->ops->embedding_backward(p->inner, dwte, dwpe, dout, tokens, N, T, C, V);
    record(p, "embedding_backward", 0, 0, begin, 0,
           acts(p, size) + floats(dwpe ? 4 * size : 2 * size));
}

static void profile_dropout_forward(gpt_ctx *p, act *x, int64_t n, gpt_dropout_site dropout) {
    double begin = now(p);
    p->ops->dropout_forward(p->inner, x, n, dropout);
    if (dropout.p > 0) record(p, "dropout", 0, 0, begin, 0, acts(p, 2 * (double)n));
}

static void profile_residual_norm_forward(gpt_ctx *p, act *resid_out, act *out, float *stats,
                                          const act *resid, const act *branch, const float *w,
                                          const float *b, gpt_dropout_site dropout, int norm,
                                          float eps, int N, int C) {
    double begin = now(p);
    p->ops->residual_norm_forward(p->inner, resid_out, out, stats, resid, branch, w, b, dropout,
                                  norm, eps, N, C);
    record(p, "residual_norm_forward", 0, 0, begin, 0, acts(p, (branch ? 4.0 : 2.0) * N * C));
}

static void profile_residual_norm_backward(gpt_ctx *p, act *dresid, act *dbranch, float *dw,
                                           float *db, const act *dout, const act *resid,
                                           const float *stats, const float *w,
                                           gpt_dropout_site dropout, int norm, int N, int C) {
    double begin = now(p);
    p->ops->residual_norm_backward(p->inner, dresid, dbranch, dw, db, dout, resid, stats, w,
                                   dropout, norm, N, C);
    record(p, "residual_norm_backward", 0, 0, begin, 0, acts(p, (dbranch ? 5.0 : 4.0) * N * C));
}

static void profile_linear_forward(gpt_ctx *p, act *out, act *pre, const act *in, const weight *w,
                                   const float *b, int activation, int N, int IC, int OC) {
    double begin = now(p);
    int parts = activation == GPT_ACT_SWIGLU ? 2 : 1, width = parts * OC;
    p->ops->linear_forward(p->inner, out, pre, in, w, b, activation, N, IC, OC);
    record(p, "linear_forward", IC, width, begin, 2.0 * N * IC * width,
           acts(p, (double)N * (IC + OC + (pre ? width : 0))) + weights(p, width, IC, parts));
}

static void profile_linear_backward(gpt_ctx *p, act *din, float *dw, float *db, const act *dout,
                                    const act *in, const weight *w, const act *pre, int activation,
                                    int add, int N, int IC, int OC) {
    double begin = now(p), width = activation == GPT_ACT_SWIGLU ? 2.0 * IC : IC;
    p->ops->linear_backward(p->inner, din, dw, db, dout, in, w, pre, activation, add, N, IC, OC);
    record(p, "linear_backward", IC, OC, begin, 4.0 * N * IC * OC,
           acts(p, (double)N * (OC + IC + 2 * width)) + weights(p, OC, IC, 1) +
               floats((add ? 2.0 : 1.0) * IC * OC));
}

static void profile_head_forward(gpt_ctx *p, float *logits, const act *x, const weight *wte, int N,
                                 int C, int V, int Vp) {
    double begin = now(p);
    p->ops->head_forward(p->inner, logits, x, wte, N, C, V, Vp);
    record(p, "head_forward", C, V, begin, 2.0 * N * C * V,
           acts(p, (double)N * C) + weights(p, V, C, 1) + floats((double)N * V));
}

static void profile_rope_forward(gpt_ctx *p, act *qkv, const float *table, const int32_t *positions,
                                 int pos, int N, int T, int NH, int NKV, int HS) {
    double begin = now(p);
    p->ops->rope_forward(p->inner, qkv, table, positions, pos, N, T, NH, NKV, HS);
    record(p, "rope_forward", 0, 0, begin, 0, acts(p, 2.0 * N * (NH + NKV) * HS));
}

static void profile_rope_backward(gpt_ctx *p, act *dqkv, const float *table, int pos, int N, int T,
                                  int NH, int NKV, int HS) {
    double begin = now(p);
    p->ops->rope_backward(p->inner, dqkv, table, pos, N, T, NH, NKV, HS);
    record(p, "rope_backward", 0, 0, begin, 0, acts(p, 2.0 * N * (NH + NKV) * HS));
}

/* Products of T queries with the T (T + 1) / 2 keys they see, `n` of them. */
static double attention_flops(int n, int B, int T, int NH, int HS) {
    return (double)n * B * NH * HS * ((double)T * (T + 1));
}

static void profile_attention_forward(gpt_ctx *p, act *out, float *lse, const act *qkv,
                                      gpt_dropout_site dropout, int B, int T, int NH, int NKV,
                                      int HS) {
    double begin = now(p);
    p->ops->attention_forward(p->inner, out, lse, qkv, dropout, B, T, NH, NKV, HS);
    record(p, "attention_forward", 0, 0, begin, attention_flops(2, B, T, NH, HS),
           acts(p, (double)B * T * (2 * NH + 2 * NKV) * HS));
}

static void profile_attention_backward(gpt_ctx *p, act *dqkv, const act *dout, const act *qkv,
                                       const act *out, const float *lse, gpt_dropout_site dropout,
                                       int B, int T, int NH, int NKV, int HS) {
    double begin = now(p);
    p->ops->attention_backward(p->inner, dqkv, dout, qkv, out, lse, dropout, B, T, NH, NKV, HS);
    record(p, "attention_backward", 0, 0, begin, attention_flops(5, B, T, NH, HS),
           acts(p, (double)B * T * (4 * NH + 4 * NKV) * HS));
}

static void profile_attention_decode(gpt_ctx *p, act *out, act *cache_k, act *cache_v,
                                     const act *qkv, const int32_t *seqs, const int32_t *positions,
                                     int N, int n_ctx, int NH, int NKV, int HS) {
    double begin = now(p), keys = 0;
    int32_t some[64]; /* positions are the device's */
    for (int n = 0, count; n < N; n += count) {
        count = N - n < 64 ? N - n : 64;
        p->ops->download(p->inner, some, positions + n, sizeof *some * (size_t)count);
        for (int i = 0; i < count; i++) keys += some[i] + 1;
    }
    p->ops->attention_decode(p->inner, out, cache_k, cache_v, qkv, seqs, positions, N, n_ctx, NH,
                             NKV, HS);
    record(p, "attention_decode", 0, 0, begin, 4.0 * keys * NH * HS,
           acts(p, 2.0 * keys * NKV * HS));
}

static void profile_classifier_forward(gpt_ctx *p, float *losses, const act *x, const weight *wte,
                                       const int32_t *targets, int N, int C, int V, int Vp) {
    double begin = now(p);
    p->ops->classifier_forward(p->inner, losses, x, wte, targets, N, C, V, Vp);
    record(p, "classifier_forward", C, V, begin, 2.0 * N * C * V,
           acts(p, (double)N * C) + weights(p, V, C, 1));
}

static void profile_classifier_backward(gpt_ctx *p, float *losses, float *total, act *dx,
                                        float *dwte, const act *x, const weight *wte,
                                        const int32_t *targets, float scale, int add, int N, int C,
                                        int V, int Vp) {
    double begin = now(p);
    p->ops->classifier_backward(p->inner, losses, total, dx, dwte, x, wte, targets, scale, add, N,
                                C, V, Vp);
    record(p, "classifier_backward", C, V, begin, 6.0 * N * C * V,
           acts(p, 2.0 * N * C) + weights(p, V, C, 1) + floats((add ? 2.0 : 1.0) * C * V));
}

static void profile_zero(gpt_ctx *p, void *device, size_t bytes) {
    double begin = now(p);
    p->ops->zero(p->inner, device, bytes);
    record(p, "zero", 0, 0, begin, 0, (double)bytes);
}

static void profile_weights_pack(gpt_ctx *p, const float *w, const gpt_segment *segment,
                                 int training) {
    double begin = now(p), size = (double)segment->size;
    p->ops->weights_pack(p->inner, w, segment, training);
    record(p, "weights_pack", 0, 0, begin, 0, floats(size) + acts(p, training ? 2 * size : size));
}

static void profile_grad_norm(gpt_ctx *p, float *norm, const float *grads, int64_t n) {
    double begin = now(p);
    p->ops->grad_norm(p->inner, norm, grads, n);
    record(p, "grad_norm", 0, 0, begin, 0, floats((double)n));
}

static void profile_adamw_update(gpt_ctx *p, float *w, float *m, float *v, const float *grads,
                                 const float *norm, const gpt_adamw_step *step,
                                 const gpt_segment *segments, int n_segments) {
    double begin = now(p), size = 0, packed = 0;
    for (int i = 0; i < n_segments; i++) {
        size += (double)segments[i].size;
        if (segments[i].packed) packed += 2 * (double)segments[i].size;
    }
    p->ops->adamw_update(p->inner, w, m, v, grads, norm, step, segments, n_segments);
    record(p, "adamw_update", 0, 0, begin, 0, floats(7 * size) + acts(p, packed));
}

/* What is not an op goes through. */
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
    return p->ops->sync(p->inner);
}
static void *profile_alloc(gpt_ctx *p, size_t bytes) {
    return p->ops->buffer_alloc(p->inner, bytes);
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

int profile_create(const gpt_ops *ops, gpt_ctx *ctx, const gpt_ops **out_ops, gpt_ctx **out_ctx) {
    gpt_ctx *p = calloc(1, sizeof *p);
    if (!p) return fail(GPT_ERR_MEMORY, "no memory for the profile");
    p->ops = ops;
    p->inner = ctx;
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
    p->table.buffer_alloc = profile_alloc;
    p->table.buffer_free = profile_free_buffer;
    p->table.upload = profile_upload;
    p->table.download = profile_download;
    p->table.copy = profile_copy;
    p->table.zero = profile_zero;
    p->table.embedding_forward = profile_embedding_forward;
    p->table.embedding_backward = profile_embedding_backward;
    p->table.dropout_forward = profile_dropout_forward;
    p->table.dropout_backward = profile_dropout_forward; /* the same factors again */
    p->table.residual_norm_forward = profile_residual_norm_forward;
    p->table.residual_norm_backward = profile_residual_norm_backward;
    p->table.linear_forward = profile_linear_forward;
    p->table.linear_backward = profile_linear_backward;
    p->table.head_forward = profile_head_forward;
    p->table.rope_forward = profile_rope_forward;
    p->table.rope_backward = profile_rope_backward;
    p->table.attention_forward = profile_attention_forward;
    p->table.attention_backward = profile_attention_backward;
    p->table.attention_decode = profile_attention_decode;
    p->table.classifier_forward = profile_classifier_forward;
    p->table.classifier_backward = profile_classifier_backward;
    p->table.weights_pack = profile_weights_pack;
    p->table.grad_norm = profile_grad_norm;
    p->table.adamw_update = profile_adamw_update;
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
