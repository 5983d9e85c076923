/* api.c: the C interface. Everything is validated here, so that model/ and the ops cannot fail. */
#include "backend.h"
#include "error.h"
#include "model/model.h"
#include "profile.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef GPTC_VERSION
#define GPTC_VERSION "0"
#endif

int gpt_abi_version(void) {
    return GPT_ABI_VERSION;
}

const char *gpt_version(void) {
    return GPTC_VERSION;
}

#define REQUIRE(pointer)                                                                           \
    do {                                                                                           \
        if (!(pointer)) return fail(GPT_ERR_ARGUMENT, "%s: " #pointer " is NULL", __func__);       \
    } while (0)

/* ---- configuration ---- */

int gpt_config_param_count(const gpt_config *config) {
    return gpt_config_check(config) == GPT_OK ? params_count(config) : -1;
}

int gpt_config_param(const gpt_config *config, int i, gpt_param *out) {
    REQUIRE(out);
    TRY(gpt_config_check(config));
    param_slot slot;
    if (!params_slot(config, i, &slot))
        return fail(GPT_ERR_ARGUMENT, "there is no parameter %d; the model has %d", i,
                    params_count(config));
    *out = slot.info;
    return GPT_OK;
}

/* ---- planning ---- */

enum { LOGIT_ROWS = 64, MAX_THREADS = 1024 };
#define MAX_ROWS ((int64_t)1 << 28)

static int check_options(const gpt_config *c, const gpt_options *given, gpt_options *out) {
    *out = *given;
    if (out->max_seq == 0) out->max_seq = c->block_size;
    if (out->max_seq < 1 || out->max_seq > c->block_size)
        return fail(GPT_ERR_ARGUMENT, "max_seq is %d; it must lie between 1 and block_size %d",
                    out->max_seq, c->block_size);
    if (out->max_batch < 0 || (int64_t)out->max_batch * out->max_seq > MAX_ROWS)
        return fail(GPT_ERR_ARGUMENT, "max_batch is %d; it must be 0 or above, and at most %lld",
                    out->max_batch, (long long)(MAX_ROWS / out->max_seq));
    if (out->training && (out->dtype == GPT_DTYPE_INT8 || out->dtype == GPT_DTYPE_INT4))
        return fail(GPT_ERR_ARGUMENT, "quantized weights cannot be trained: use fp32 or bf16");
    if (out->training && out->max_batch == 0)
        return fail(GPT_ERR_ARGUMENT, "max_batch is 0; training needs at least 1");
    if (out->n_threads < 0 || out->n_threads > MAX_THREADS)
        return fail(GPT_ERR_ARGUMENT, "n_threads is %d; it must lie between 0 and %d",
                    out->n_threads, MAX_THREADS);
    if (out->pin_threads != 0 && out->pin_threads != 1)
        return fail(GPT_ERR_ARGUMENT, "pin_threads is %d; it must be 0 or 1", out->pin_threads);
    if (!(out->dropout >= 0 && out->dropout < 1))
        return fail(GPT_ERR_ARGUMENT, "dropout is %g; it must be at least 0 and below 1",
                    out->dropout);
    return GPT_OK;
}

static acts_shape model_acts_shape(const gpt_config *c, const gpt_options *o) {
    int N = o->max_batch * o->max_seq;
    (void)c;
    return (acts_shape){.N = N,
                        .T = o->max_seq,
                        .training = o->training,
                        .dropout = o->dropout > 0,
                        .logit_rows = N < LOGIT_ROWS ? N : LOGIT_ROWS};
}

static gpt_shape model_shape(const gpt_config *c, const gpt_options *o, int64_t n_stored) {
    gpt_shape shape = config_shape(c);
    shape.N = o->max_batch * o->max_seq;
    shape.T = o->max_seq;
    shape.training = o->training;
    shape.n_params = n_stored;
    return shape;
}

static size_t align_up(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

/* Sizes of the parts of the arena, in the order in which they stand in it. */
typedef struct arena_plan {
    size_t params, packed, grads, moments, rope, state, acts, workspace, total;
} arena_plan;

static arena_plan plan_arena(const gpt_config *c, const gpt_options *o, const gpt_ops *ops,
                             const gpt_ctx *ctx, params_layout *layout) {
    arena_plan p = {0};
    int64_t n_stored = layout->n_stored;
    acts none = {0};
    acts_shape shape = model_acts_shape(c, o);
    gpt_shape extent = model_shape(c, o, n_stored);
    p.params = align_up((size_t)n_stored * sizeof(float));
    p.packed = params_plan_packed(ops, o->training, NULL, layout);
    p.grads = o->training ? p.params : 0;
    p.moments = o->training ? 2 * p.params : 0;
    p.rope = align_up((size_t)rope_table_size(c) * sizeof(float));
    p.state = align_up(sizeof(step_state));
    p.acts = acts_plan(c, ops, &shape, NULL, &none);
    p.workspace = extent.N ? align_up(ops->workspace_bytes(ctx, &extent)) : 0;
    p.total = p.params + p.packed + p.grads + p.moments + p.rope + p.state + p.acts + p.workspace;
    return p;
}

static void fill_plan(const gpt_config *c, const gpt_options *o, const arena_plan *p,
                      int64_t n_params, gpt_plan *out) {
    *out = (gpt_plan){
        .n_params = n_params,
        .param_bytes = p->params + p->packed,
        .grad_bytes = p->grads,
        .optimizer_bytes = p->moments,
        .activation_bytes = p->acts + p->rope + p->state,
        .workspace_bytes = p->workspace,
        .total_bytes = p->total,
        .forward_flops_per_token = forward_flops_per_token(c, o->max_seq),
    };
    out->train_flops_per_token = 3 * out->forward_flops_per_token;
}

int gpt_plan_memory(const gpt_config *config, const gpt_options *options, gpt_plan *out) {
    REQUIRE(options);
    REQUIRE(out);
    TRY(gpt_config_check(config));
    gpt_options o;
    const gpt_ops *ops;
    gpt_ctx *ctx;
    params_layout layout;
    TRY(check_options(config, options, &o));
    TRY(backend_ops(o.device, o.dtype, &ops));
    TRY(params_layout_create(config, ops, o.training, &layout));
    int status = ops->ctx_create(&ctx, o.n_threads, 0);
    if (status == GPT_OK) {
        arena_plan p = plan_arena(config, &o, ops, ctx, &layout);
        fill_plan(config, &o, &p, layout.n_params, out);
        out->library_bytes = ops->thread_library_bytes * (size_t)ops->ctx_threads(ctx);
        ops->ctx_free(ctx);
    }
    params_layout_free(&layout);
    return status;
}

/* ---- model ---- */

/* The largest batch with which the model would fit into so many bytes; 0 where none does. */
static int largest_batch(gpt_model *m, size_t bytes) {
    int fits = 0, fails = m->options.max_batch;
    while (fails - fits > 1) {
        gpt_options o = m->options;
        o.max_batch = fits + (fails - fits) / 2;
        arena_plan p = plan_arena(&m->config, &o, m->ops, m->ctx, &m->layout);
        *(p.total <= bytes ? &fits : &fails) = o.max_batch;
    }
    return fits;
}

static int out_of_memory(gpt_model *m, const arena_plan *p) {
    const gpt_options *o = &m->options;
    char free_now[64] = "", way_on[64] = "try a smaller batch";
    size_t bytes = m->ops->memory_free();
    if (bytes < SIZE_MAX) {
        int batch = largest_batch(m, bytes - bytes / 64); /* no device gives its very last pages */
        snprintf(free_now, sizeof free_now, " and %.2f GB are free", (double)bytes * 1e-9);
        if (batch > 0)
            snprintf(way_on, sizeof way_on, "the largest batch that fits is %d", batch);
        else
            snprintf(way_on, sizeof way_on, "take a smaller model%s",
                     o->device == GPT_DEVICE_CPU ? "" : ", or --device cpu");
    }
    return fail(GPT_ERR_MEMORY,
                "not enough memory: the model needs %.2f GB (%.2f GB of it for a batch of %d x %d "
                "tokens)%s; %s",
                (double)p->total * 1e-9, (double)(p->acts + p->workspace) * 1e-9, o->max_batch,
                o->max_seq, free_now, way_on);
}

/* Without training, matrices get the form for products, which may be their only one, as soon as they
 * are written. */
static bool packs_at_once(const gpt_model *m) {
    return !m->options.training && m->ops->packs_host_memory;
}

static int allocate_arena(gpt_model *m) {
    arena_plan p = plan_arena(&m->config, &m->options, m->ops, m->ctx, &m->layout);
    m->arena_bytes = p.total;
    m->arena = m->ops->buffer_alloc(m->ctx, p.total);
    if (!m->arena) return out_of_memory(m, &p);
    char *at = m->arena;
    m->params = (float *)at, at += p.params;
    params_plan_packed(m->ops, m->options.training, at, &m->layout), at += p.packed;
    if (m->options.training) {
        m->grads = (float *)at, at += p.grads;
        m->moment1 = (float *)at, at += p.moments / 2;
        m->moment2 = (float *)at, at += p.moments / 2;
    }
    m->rope = p.rope ? (float *)at : NULL, at += p.rope;
    m->state = (step_state *)at, at += p.state;
    acts_shape shape = model_acts_shape(&m->config, &m->options);
    acts_plan(&m->config, m->ops, &shape, at, &m->acts), at += p.acts;
    m->workspace = at;
    m->pack_stale = !packs_at_once(m);
    params_view_set(&m->config, &m->layout, m->params, true, &m->w);
    if (m->options.training) params_view_set(&m->config, &m->layout, m->grads, false, &m->dw);
    return GPT_OK;
}

static int upload_rope(gpt_model *m) {
    int64_t n = rope_table_size(&m->config);
    if (n == 0) return GPT_OK;
    float *table = malloc(sizeof(float) * (size_t)n);
    if (!table) return fail(GPT_ERR_MEMORY, "no memory for the rotary table");
    rope_table(&m->config, table);
    m->ops->upload(m->ctx, m->rope, table, sizeof(float) * (size_t)n);
    free(table);
    return GPT_OK;
}

static int create_parts(gpt_model *m) {
    size_t L = (size_t)m->config.n_layer;
    TRY(backend_ops(m->options.device, m->options.dtype, &m->ops));
    TRY(m->ops->ctx_create(&m->ctx, m->options.n_threads, m->options.pin_threads));
    TRY(params_layout_create(&m->config, m->ops, m->options.training, &m->layout));
    m->acts.layers = calloc(L, sizeof *m->acts.layers);
    m->w.layers = calloc(L, sizeof *m->w.layers);
    m->dw.layers = calloc(L, sizeof *m->dw.layers);
    if (!m->acts.layers || !m->w.layers || !m->dw.layers)
        return fail(GPT_ERR_MEMORY, "no memory for the model's tables");
    size_t rows = (size_t)m->options.max_batch * (size_t)m->options.max_seq;
    m->host_losses = malloc(sizeof(float) * (rows ? rows : 1));
    if (!m->host_losses) return fail(GPT_ERR_MEMORY, "no memory for the losses of a batch");
    TRY(allocate_arena(m));
    return upload_rope(m);
}

int gpt_model_create(const gpt_config *config, const gpt_options *options, gpt_model **out) {
    REQUIRE(options);
    REQUIRE(out);
    TRY(gpt_config_check(config));
    gpt_options o;
    TRY(check_options(config, options, &o));
    gpt_model *m = calloc(1, sizeof *m);
    if (!m) return fail(GPT_ERR_MEMORY, "no memory for the model");
    m->config = *config;
    m->options = o;
    int status = create_parts(m);
    if (status != GPT_OK) {
        gpt_model_free(m);
        return status;
    }
    *out = m;
    return GPT_OK;
}

void gpt_model_free(gpt_model *m) {
    if (!m) return;
    if (m->ctx && m->arena) m->ops->buffer_free(m->ctx, m->arena, m->arena_bytes);
    if (m->ctx) m->ops->ctx_free(m->ctx);
    params_layout_free(&m->layout);
    free(m->host_losses);
    free(m->acts.layers);
    free(m->w.layers);
    free(m->dw.layers);
    free(m);
}

int gpt_model_threads(const gpt_model *m) {
    return m ? m->ops->ctx_threads(m->ctx) : 0;
}

static void pack_at_once(gpt_model *m, int i, const float *values, int64_t n) {
    gpt_segment segment = m->layout.segments[i];
    segment.rows = (int)(n / segment.cols); /* perhaps without padding rows, which stay zero */
    segment.size = n;
    if (segment.packed)
        m->ops->weights_pack(m->ctx,
                             &(weights_pack){.w = values, .segment = &segment, .training = 0});
}

static void write_value(gpt_model *m, int i, const float *values, int64_t n) {
    const param_slot *slot = &m->layout.slots[i];
    float *place = m->params + slot->offset;
    if (i == EMBEDDING) m->w.wte = place;
    if (slot->kept) m->ops->upload(m->ctx, place, values, sizeof(float) * (size_t)n);
    if (packs_at_once(m))
        pack_at_once(m, i, values, n);
    else
        m->pack_stale = true;
}

int gpt_model_init(gpt_model *model, uint64_t seed) {
    REQUIRE(model);
    int64_t most = 0;
    for (int i = 0; i < model->layout.n_slots; i++)
        if (model->layout.slots[i].stored > most) most = model->layout.slots[i].stored;
    float *values = malloc(sizeof(float) * (size_t)most);
    if (!values) return fail(GPT_ERR_MEMORY, "no memory for initial values");
    for (int i = 0; i < model->layout.n_slots; i++) {
        const param_slot *slot = &model->layout.slots[i];
        params_init(slot, i, seed, values);
        write_value(model, i, values, slot->stored);
    }
    free(values);
    return model->ops->sync(model->ctx);
}

/* The place of one parameter's values, gradients or moments; NULL where they are not kept. */
static int find_tensor(gpt_model *m, int i, int tensor, int64_t n, float **out) {
    if (i < 0 || i >= m->layout.n_slots)
        return fail(GPT_ERR_ARGUMENT, "there is no parameter %d; the model has %d", i,
                    m->layout.n_slots);
    if (tensor < GPT_TENSOR_VALUE || tensor > GPT_TENSOR_MOMENT2)
        return fail(GPT_ERR_ARGUMENT, "unknown tensor kind %d", tensor);
    const param_slot *slot = &m->layout.slots[i];
    if (n != slot->info.size)
        return fail(GPT_ERR_ARGUMENT, "parameter %s has %lld numbers, not %lld", slot->info.name,
                    (long long)slot->info.size, (long long)n);
    float *buffers[] = {m->params, m->grads, m->moment1, m->moment2};
    if (!buffers[tensor])
        return fail(GPT_ERR_ARGUMENT,
                    "the model was created without training: it has no gradients or moments");
    *out = slot->kept ? buffers[tensor] + slot->offset : NULL;
    if (tensor == GPT_TENSOR_VALUE && i == EMBEDDING) *out = m->w.wte;
    return GPT_OK;
}

int gpt_model_read(gpt_model *model, int i, int tensor, float *out, int64_t n) {
    REQUIRE(model);
    REQUIRE(out);
    float *place = NULL;
    TRY(find_tensor(model, i, tensor, n, &place));
    if (!place)
        return fail(GPT_ERR_ARGUMENT,
                    "the model holds %s only as its products read it: create it with training, or "
                    "in fp32, to read its parameters",
                    model->layout.slots[i].info.name);
    model->ops->download(model->ctx, out, place, sizeof(float) * (size_t)n);
    return model->ops->sync(model->ctx);
}

int gpt_model_write(gpt_model *model, int i, int tensor, const float *values, int64_t n) {
    REQUIRE(model);
    REQUIRE(values);
    float *place = NULL;
    TRY(find_tensor(model, i, tensor, n, &place));
    if (tensor == GPT_TENSOR_GRAD) {
        if (model->grads_stale) TRY(gpt_model_zero_grads(model));
        if (model->n_micro == 0) model->n_micro = 1; /* there is something to apply */
    }
    if (tensor == GPT_TENSOR_VALUE)
        write_value(model, i, values, n);
    else
        model->ops->upload(model->ctx, place, values, sizeof(float) * (size_t)n);
    return model->ops->sync(model->ctx);
}

int gpt_model_lend(gpt_model *model, int i, const float *values, int64_t n, int *kept) {
    REQUIRE(model);
    REQUIRE(values);
    REQUIRE(kept);
    float *place = NULL;
    TRY(find_tensor(model, i, GPT_TENSOR_VALUE, n, &place));
    const gpt_segment *s = &model->layout.segments[i];
    /* Products that read the parameters themselves would read padding rows, too. */
    *kept = i == EMBEDDING && packs_at_once(model) && (s->packed || !s->product);
    if (!*kept) return gpt_model_write(model, i, GPT_TENSOR_VALUE, values, n);
    model->w.wte = (float *)values; /* nothing writes there without gradients */
    pack_at_once(model, i, values, n);
    return model->ops->sync(model->ctx);
}

int64_t gpt_model_step(const gpt_model *model) {
    return model ? model->step : -1;
}

int gpt_model_set_step(gpt_model *model, int64_t step) {
    REQUIRE(model);
    if (step < 0)
        return fail(GPT_ERR_ARGUMENT, "step is %lld; it must be 0 or above", (long long)step);
    model->step = step;
    return GPT_OK;
}

/* ---- measuring ---- */

int gpt_model_peak(gpt_model *model, double *flops, double *bytes) {
    REQUIRE(model);
    REQUIRE(flops);
    if (!model->ops->peak(model->ctx, flops, bytes))
        return fail(GPT_ERR_MEMORY, "no memory to measure memory with");
    return GPT_OK;
}

int gpt_model_profile(gpt_model *model, int on) {
    REQUIRE(model);
    if (model->profiled) profile_free(model->ctx, &model->ops, &model->ctx);
    model->profiled = false;
    if (on) {
        TRY(profile_create(model->ops, model->ctx, &model->ops, &model->ctx));
        model->profiled = true;
    }
    return GPT_OK;
}

int gpt_model_profile_read(const gpt_model *model, int i, gpt_op_time *out) {
    REQUIRE(model);
    REQUIRE(out);
    if (!model->profiled || !profile_read(model->ctx, i, out))
        return fail(GPT_ERR_ARGUMENT, "there is no timed op %d", i);
    return GPT_OK;
}

int gpt_model_profile_busy(const gpt_model *model, int thread, double *seconds) {
    REQUIRE(model);
    REQUIRE(seconds);
    if (!model->profiled || thread < 0 || thread >= model->ops->ctx_threads(model->ctx))
        return fail(GPT_ERR_ARGUMENT, "there is no timed thread %d", thread);
    *seconds = model->ops->ctx_busy_seconds(model->ctx, thread);
    return GPT_OK;
}

/* ---- batches ---- */

static int check_batch(const gpt_model *m, int B, int T) {
    const gpt_options *o = &m->options;
    if (o->max_batch == 0)
        return fail(GPT_ERR_ARGUMENT, "the model was created with max_batch 0, for sessions only");
    if (B < 1 || B > o->max_batch)
        return fail(GPT_ERR_ARGUMENT, "batch size %d; the model was created for 1 to %d", B,
                    o->max_batch);
    if (T < 1 || T > o->max_seq)
        return fail(GPT_ERR_ARGUMENT, "sequence length %d; the model was created for 1 to %d", T,
                    o->max_seq);
    return GPT_OK;
}

static int check_tokens(const gpt_model *m, const char *what, const int32_t *tokens, int64_t n,
                        int32_t least) {
    int32_t V = m->config.vocab_size;
    for (int64_t i = 0; i < n; i++)
        if (tokens[i] < least || tokens[i] >= V)
            return fail(GPT_ERR_ARGUMENT, "%s %lld is %d; the vocabulary is 0 to %d", what,
                        (long long)i, tokens[i], V - 1);
    return GPT_OK;
}

static int check_targets(const gpt_model *m, const int32_t *targets, int N, int *n_valid) {
    TRY(check_tokens(m, "target", targets, N, -1));
    *n_valid = 0;
    for (int i = 0; i < N; i++) *n_valid += targets[i] >= 0;
    if (*n_valid == 0) return fail(GPT_ERR_ARGUMENT, "all targets are -1: there is no loss");
    return GPT_OK;
}

static void set_tokens(gpt_model *m, const int32_t *tokens, const int32_t *targets, int N) {
    size_t bytes = sizeof(int32_t) * (size_t)N;
    m->ops->ctx_set_workspace(m->ctx, m->workspace);
    model_pack(m);
    m->ops->upload(m->ctx, m->acts.tokens, tokens, bytes);
    if (targets) m->ops->upload(m->ctx, m->acts.targets, targets, bytes);
}

/* The mean of acts.losses over the targets that count. */
static int mean_loss(gpt_model *m, int N, int n_valid, float *loss, float *losses) {
    float *host = losses ? losses : m->host_losses;
    m->ops->download(m->ctx, host, m->acts.losses, sizeof(float) * (size_t)N);
    int status = m->ops->sync(m->ctx);
    double sum = 0;
    for (int i = 0; i < N; i++) sum += host[i];
    if (loss) *loss = (float)(sum / n_valid);
    return status;
}

int gpt_model_logits(gpt_model *model, const int32_t *tokens, int B, int T, float *logits) {
    REQUIRE(model);
    REQUIRE(tokens);
    REQUIRE(logits);
    TRY(check_batch(model, B, T));
    int N = B * T, V = model->config.vocab_size, C = model->config.n_embd;
    TRY(check_tokens(model, "token", tokens, N, 0));
    set_tokens(model, tokens, NULL, N);
    batch x = {.B = B, .T = T, .N = N};
    model_forward(model, &model->acts, &x);
    for (int row = 0; row < N; row += model->acts.logit_rows) {
        int n = N - row < model->acts.logit_rows ? N - row : model->acts.logit_rows;
        const char *rows = (const char *)model->acts.norm_f;
        rows += (size_t)row * (size_t)C * model->ops->act_bytes;
        model->ops->head_forward(model->ctx,
                                 &(head_forward){.logits = model->acts.logits,
                                                 .x = rows,
                                                 .wte = model->w.head,
                                                 .N = n,
                                                 .C = C,
                                                 .V = V,
                                                 .Vp = padded_vocab_size(&model->config)});
        model->ops->download(model->ctx, logits + (int64_t)row * V, model->acts.logits,
                             sizeof(float) * (size_t)n * (size_t)V);
    }
    return model->ops->sync(model->ctx);
}

int gpt_model_loss(gpt_model *model, const int32_t *tokens, const int32_t *targets, int B, int T,
                   float *loss, float *losses) {
    REQUIRE(model);
    REQUIRE(tokens);
    REQUIRE(targets);
    TRY(check_batch(model, B, T));
    int N = B * T, n_valid;
    TRY(check_tokens(model, "token", tokens, N, 0));
    TRY(check_targets(model, targets, N, &n_valid));
    set_tokens(model, tokens, targets, N);
    batch x = {.B = B, .T = T, .N = N};
    model_forward(model, &model->acts, &x);
    model->ops->classifier_forward(model->ctx,
                                   &(classifier_forward){.losses = model->acts.losses,
                                                         .x = model->acts.norm_f,
                                                         .wte = model->w.head,
                                                         .targets = model->acts.targets,
                                                         .N = N,
                                                         .C = model->config.n_embd,
                                                         .V = model->config.vocab_size,
                                                         .Vp = padded_vocab_size(&model->config)});
    return mean_loss(model, N, n_valid, loss, losses);
}

int gpt_model_zero_grads(gpt_model *model) {
    REQUIRE(model);
    if (!model->grads)
        return fail(GPT_ERR_ARGUMENT, "the model was created without training: no gradients");
    model->ops->zero(model->ctx, model->grads, sizeof(float) * (size_t)model->layout.n_stored);
    model->ops->zero(model->ctx, &model->state->report, sizeof model->state->report);
    model->grads_stale = false;
    model->n_micro = 0;
    return model->ops->sync(model->ctx);
}

static void forward_backward(gpt_model *m, const batch *x, float scale) {
    const gpt_ops *ops = m->ops;
    int32_t scale_bits;
    memcpy(&scale_bits, &scale, sizeof scale_bits);
    const int64_t key[] = {(int64_t)(intptr_t)m->arena, x->B, x->T, x->first, scale_bits};
    if (m->options.dropout > 0) dropout_draw(m);
    if (ops->replay_begin && ops->replay_begin(m->ctx, key, sizeof key / sizeof *key)) return;
    do {
        model_forward(m, &m->acts, x);
        model_backward(m, &m->acts, x, scale);
    } while (ops->replay_begin && !ops->replay_end(m->ctx));
}

int gpt_model_backward(gpt_model *model, const int32_t *tokens, const int32_t *targets, int B,
                       int T, float scale, float *loss) {
    REQUIRE(model);
    REQUIRE(tokens);
    REQUIRE(targets);
    if (!model->grads)
        return fail(GPT_ERR_ARGUMENT, "the model was created without training: no gradients");
    TRY(check_batch(model, B, T));
    int N = B * T, n_valid;
    TRY(check_tokens(model, "token", tokens, N, 0));
    TRY(check_targets(model, targets, N, &n_valid));
    if (model->grads_stale) model->n_micro = 0;
    set_tokens(model, tokens, targets, N);
    batch x = {.B = B, .T = T, .N = N, .training = true, .first = model->grads_stale};
    forward_backward(model, &x, scale / (float)n_valid);
    model->grads_stale = false;
    model->n_micro++;
    return loss ? mean_loss(model, N, n_valid, loss, NULL) : GPT_OK;
}

static int check_adamw(const gpt_adamw *a) {
    if (!(a->lr >= 0 && isfinite(a->lr)))
        return fail(GPT_ERR_ARGUMENT, "lr is %g; it must be 0 or above", a->lr);
    if (!(a->beta1 >= 0 && a->beta1 < 1))
        return fail(GPT_ERR_ARGUMENT, "beta1 is %g; it must be at least 0 and below 1", a->beta1);
    if (!(a->beta2 >= 0 && a->beta2 < 1))
        return fail(GPT_ERR_ARGUMENT, "beta2 is %g; it must be at least 0 and below 1", a->beta2);
    if (!(a->eps >= 0 && isfinite(a->eps)))
        return fail(GPT_ERR_ARGUMENT, "eps is %g; it must be 0 or above", a->eps);
    if (!(a->weight_decay >= 0 && isfinite(a->weight_decay)))
        return fail(GPT_ERR_ARGUMENT, "weight_decay is %g; it must be 0 or above", a->weight_decay);
    if (!(a->grad_clip >= 0 && isfinite(a->grad_clip)))
        return fail(GPT_ERR_ARGUMENT, "grad_clip is %g; it must be 0 (off) or above", a->grad_clip);
    return GPT_OK;
}

int gpt_model_update(gpt_model *model, const gpt_adamw *adamw, float *loss, float *grad_norm) {
    REQUIRE(model);
    REQUIRE(adamw);
    TRY(check_adamw(adamw));
    if (!model->grads)
        return fail(GPT_ERR_ARGUMENT, "the model was created without training: no gradients");
    if (model->n_micro == 0)
        return fail(GPT_ERR_ARGUMENT, "there are no gradients to apply: call backward first");
    step_report report;
    model->ops->ctx_set_workspace(model->ctx, model->workspace);
    model_update(model, adamw);
    model->ops->download(model->ctx, &report, &model->state->report, sizeof report);
    TRY(model->ops->sync(model->ctx));
    if (loss) *loss = report.loss;
    if (grad_norm) *grad_norm = report.grad_norm;
    model->grads_stale = true;
    model->n_micro = 0;
    if (!isfinite(report.grad_norm))
        return fail(GPT_ERR_NUMERIC,
                    "the gradient norm is %g at step %lld: training diverged; try a lower "
                    "learning rate or a longer warm-up",
                    report.grad_norm, (long long)model->step);
    model->step++;
    return GPT_OK;
}

/* ---- sessions ---- */

static int check_session(const gpt_model *m, int n_seq, int *n_ctx) {
    int block = m->config.block_size;
    if (*n_ctx == 0) *n_ctx = block;
    if (*n_ctx < 1 || *n_ctx > block)
        return fail(GPT_ERR_ARGUMENT, "n_ctx is %d; it must lie between 1 and block_size %d",
                    *n_ctx, block);
    if (n_seq < 1 || (int64_t)n_seq * *n_ctx > MAX_ROWS)
        return fail(GPT_ERR_ARGUMENT, "n_seq is %d; it must be at least 1 and at most %lld", n_seq,
                    (long long)(MAX_ROWS / *n_ctx));
    return GPT_OK;
}

int gpt_session_bytes(const gpt_model *model, int n_seq, int n_ctx, uint64_t *out) {
    REQUIRE(model);
    REQUIRE(out);
    TRY(check_session(model, n_seq, &n_ctx));
    *out = session_plan(model, n_seq, n_ctx, NULL, NULL);
    return GPT_OK;
}

static int session_out_of_memory(const gpt_session *s) {
    double need = (double)s->arena_bytes * 1e-9;
    size_t bytes = s->model->ops->memory_free();
    char missing[64] = "";
    if (bytes < s->arena_bytes)
        snprintf(missing, sizeof missing, ", %.2f GB more than are free",
                 need - (double)bytes * 1e-9);
    return fail(GPT_ERR_MEMORY,
                "not enough memory: a session of %d sequences of %d tokens needs %.2f GB%s; take "
                "fewer of them, or shorter ones",
                s->n_seq, s->n_ctx, need, missing);
}

static int create_session_parts(gpt_session *s) {
    gpt_model *m = s->model;
    s->max_rows = session_max_rows(s->n_seq, s->n_ctx);
    s->length = calloc((size_t)s->n_seq, sizeof *s->length);
    s->positions = calloc((size_t)s->max_rows, sizeof *s->positions);
    s->acts.layers = calloc((size_t)m->config.n_layer, sizeof *s->acts.layers);
    if (!s->length || !s->positions || !s->acts.layers)
        return fail(GPT_ERR_MEMORY, "no memory for the session's tables");
    s->arena_bytes = session_plan(m, s->n_seq, s->n_ctx, NULL, NULL);
    s->arena = m->ops->buffer_alloc(m->ctx, s->arena_bytes);
    if (!s->arena) return session_out_of_memory(s);
    session_plan(m, s->n_seq, s->n_ctx, s->arena, s);
    return GPT_OK;
}

int gpt_session_create(gpt_model *model, int n_seq, int n_ctx, gpt_session **out) {
    REQUIRE(model);
    REQUIRE(out);
    TRY(check_session(model, n_seq, &n_ctx));
    gpt_session *s = calloc(1, sizeof *s);
    if (!s) return fail(GPT_ERR_MEMORY, "no memory for the session");
    s->model = model;
    s->n_seq = n_seq;
    s->n_ctx = n_ctx;
    int status = create_session_parts(s);
    if (status != GPT_OK) {
        gpt_session_free(s);
        return status;
    }
    *out = s;
    return GPT_OK;
}

void gpt_session_free(gpt_session *s) {
    if (!s) return;
    if (s->arena) s->model->ops->buffer_free(s->model->ctx, s->arena, s->arena_bytes);
    free(s->length);
    free(s->positions);
    free(s->acts.layers);
    free(s);
}

/* The tokens of each sequence stand together, and fit. */
static int check_step(const gpt_session *s, const int32_t *seqs, int n) {
    for (int i = 0, count = 0; i < n; i++) {
        int seq = seqs[i];
        if (seq < 0 || seq >= s->n_seq)
            return fail(GPT_ERR_ARGUMENT, "there is no sequence %d; the session holds %d", seq,
                        s->n_seq);
        count = i > 0 && seqs[i - 1] == seq ? count + 1 : 1;
        if (s->length[seq] + count > s->n_ctx)
            return fail(GPT_ERR_ARGUMENT,
                        "sequence %d would have %d tokens or more; the context is %d", seq,
                        s->length[seq] + count, s->n_ctx);
        if (count > 1 || i == 0) continue;
        for (int j = 0; j < i; j++)
            if (seqs[j] == seq)
                return fail(GPT_ERR_ARGUMENT, "the tokens of sequence %d do not stand together",
                            seq);
    }
    return GPT_OK;
}

int gpt_session_decode(gpt_session *session, const int32_t *tokens, const int32_t *seqs,
                       const uint8_t *want, int n, float *logits) {
    REQUIRE(session);
    REQUIRE(tokens);
    REQUIRE(seqs);
    bool some = !want;
    for (int i = 0; want && i < n; i++) some |= want[i];
    if (some) REQUIRE(logits);
    if (n < 1) return fail(GPT_ERR_ARGUMENT, "a step needs at least 1 token, not %d", n);
    TRY(check_tokens(session->model, "token", tokens, n, 0));
    TRY(check_step(session, seqs, n));
    session_step(session, tokens, seqs, want, n, logits);
    return session->model->ops->sync(session->model->ctx);
}

int gpt_session_length(const gpt_session *session, int seq) {
    if (!session || seq < 0 || seq >= session->n_seq) return -1;
    return session->length[seq];
}

static int check_seq(const gpt_session *s, int seq) {
    if (seq >= 0 && seq < s->n_seq) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "there is no sequence %d; the session holds %d", seq, s->n_seq);
}

int gpt_session_fork(gpt_session *session, int from, int to, int length) {
    REQUIRE(session);
    TRY(check_seq(session, from));
    TRY(check_seq(session, to));
    if (length < 0 || length > session->length[from])
        return fail(GPT_ERR_ARGUMENT, "sequence %d holds %d tokens; %d of them cannot be copied",
                    from, session->length[from], length);
    session_fork(session, from, to, length);
    return session->model->ops->sync(session->model->ctx);
}

int gpt_session_rewind(gpt_session *session, int seq, int length) {
    REQUIRE(session);
    TRY(check_seq(session, seq));
    if (length < 0 || length > session->length[seq])
        return fail(GPT_ERR_ARGUMENT, "sequence %d holds %d tokens; it cannot be rewound to %d",
                    seq, session->length[seq], length);
    session->length[seq] = length;
    return GPT_OK;
}
