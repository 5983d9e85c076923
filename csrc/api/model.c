/* model.c: configurations, plans, models, and their parameters. */
#include "api.h"
#include "backend.h"
#include "block_types.h"
#include "fork.h"
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

/* ---- configuration ---- */

int gpt_config_layer(const gpt_config *config, int l, gpt_layer *out) {
    REQUIRE(out);
    TRY(gpt_config_check(config));
    if (l < 0 || l >= config->n_layer)
        return fail(GPT_ERR_ARGUMENT, "layer %d does not exist; the model has %d", l,
                    config->n_layer);
    *out = config_layer(config, l);
    return GPT_OK;
}

int gpt_config_param_count(const gpt_config *config) {
    return gpt_config_check(config) == GPT_OK ? params_count(config) : -1;
}

int gpt_config_param(const gpt_config *config, int i, gpt_param *out) {
    REQUIRE(out);
    TRY(gpt_config_check(config));
    param_slot slot;
    if (!params_slot(config, i, &slot))
        return fail(GPT_ERR_ARGUMENT, "parameter %d does not exist; the model has %d", i,
                    params_count(config));
    *out = slot.info;
    return GPT_OK;
}

int gpt_lora_param_count(const gpt_config *config, const gpt_lora *lora) {
    bool possible =
        lora && gpt_config_check(config) == GPT_OK && lora_check(config, lora) == GPT_OK;
    return possible ? lora_count(config, lora) : -1;
}

int gpt_lora_param(const gpt_config *config, const gpt_lora *lora, int i, gpt_param *out) {
    REQUIRE(lora);
    REQUIRE(out);
    TRY(gpt_config_check(config));
    TRY(lora_check(config, lora));
    param_slot slot;
    if (!lora_slot(config, lora, i, &slot))
        return fail(GPT_ERR_ARGUMENT, "parameter %d of adapters does not exist; there are %d", i,
                    lora_count(config, lora));
    *out = slot.info;
    return GPT_OK;
}

/* ---- planning ---- */

enum { MAX_THREADS = 1024 };

static int check_group(const gpt_group *group, int g) {
    if (!group->pattern) return fail(GPT_ERR_ARGUMENT, "group %d has no pattern", g);
    if (group->frozen != 0 && group->frozen != 1)
        return fail(GPT_ERR_ARGUMENT, "frozen of group %d is %d; it must be 0 or 1", g,
                    group->frozen);
    if (group->optimizer < GPT_OPTIMIZER_DEFAULT || group->optimizer > GPT_OPTIMIZER_MUON)
        return fail(GPT_ERR_ARGUMENT,
                    "optimizer of group %d is %d; it must be an enum gpt_optimizer_kind", g,
                    group->optimizer);
    if (group->decay < GPT_DECAY_DEFAULT || group->decay > GPT_DECAY_ON)
        return fail(GPT_ERR_ARGUMENT, "decay of group %d is %d; it must be an enum gpt_decay", g,
                    group->decay);
    if (!(group->lr_scale >= 0 && isfinite(group->lr_scale)))
        return fail(GPT_ERR_ARGUMENT, "lr_scale of group %d is %g; it must be 0 (1) or above", g,
                    group->lr_scale);
    return GPT_OK;
}

static int check_block_rows(const gpt_config *c, const gpt_options *o) {
    if (o->n_block_rows < 0 || (o->n_block_rows > 0 && !o->block_rows))
        return fail(GPT_ERR_ARGUMENT, "n_block_rows is %d; it must be the number of entries",
                    o->n_block_rows);
    if (o->n_block_rows > 0 && o->dtype != GPT_DTYPE_PACKED)
        return fail(GPT_ERR_ARGUMENT, "block_rows needs the dtype GPT_DTYPE_PACKED");
    for (int k = 0; k < o->n_block_rows; k++)
        if (o->block_rows[k].param < 0 || o->block_rows[k].param >= params_count(c))
            return fail(GPT_ERR_ARGUMENT,
                        "entry %d of block_rows is of parameter %d; the model has %d", k,
                        o->block_rows[k].param, params_count(c));
    return GPT_OK;
}

static int check_shards(const gpt_options *o) {
    if (o->n_shards < 0 || o->shard < 0 || (o->shard > 0 && o->shard >= o->n_shards))
        return fail(GPT_ERR_ARGUMENT, "shard is %d of %d; it must be from 0 on and below n_shards",
                    o->shard, o->n_shards);
    if (o->n_shards > 1 && o->device != GPT_DEVICE_CPU)
        return fail(GPT_ERR_ARGUMENT,
                    "the optimizer's state is in parts on a CPU only: use its device");
    return GPT_OK;
}

static int check_options(const gpt_config *c, const gpt_options *given, gpt_options *out) {
    *out = *given;
    if (out->max_seq == 0) out->max_seq = c->block_size;
    if (out->max_seq < 1 || out->max_seq > c->block_size)
        return fail(GPT_ERR_ARGUMENT, "max_seq is %d; it must be between 1 and block_size %d",
                    out->max_seq, c->block_size);
    if (out->max_batch < 0 || (int64_t)out->max_batch * out->max_seq > MAX_ROWS)
        return fail(GPT_ERR_ARGUMENT, "max_batch is %d; it must be 0 or above, and at most %lld",
                    out->max_batch, (long long)(MAX_ROWS / out->max_seq));
    if (out->training && out->dtype >= GPT_DTYPE_INT8 && !out->lora.rank)
        return fail(GPT_ERR_ARGUMENT,
                    "quantized weights cannot be trained: use fp32 or bf16, or train adapters");
    TRY(lora_check(c, &out->lora));
    if (out->recompute < GPT_RECOMPUTE_NONE || out->recompute > GPT_RECOMPUTE_BLOCK)
        return fail(GPT_ERR_ARGUMENT, "recompute is %d; it must be an enum gpt_recompute",
                    out->recompute);
    if (out->recompute_layers < 0 || out->recompute_layers > c->n_layer)
        return fail(GPT_ERR_ARGUMENT,
                    "recompute_layers is %d; it must be between 0, for all, and n_layer %d",
                    out->recompute_layers, c->n_layer);
    if (out->training && out->max_batch == 0)
        return fail(GPT_ERR_ARGUMENT, "max_batch is 0; training needs at least 1");
    if (out->n_threads < 0 || out->n_threads > MAX_THREADS)
        return fail(GPT_ERR_ARGUMENT, "n_threads is %d; it must be between 0 and %d",
                    out->n_threads, MAX_THREADS);
    if (out->pin_threads != 0 && out->pin_threads != 1)
        return fail(GPT_ERR_ARGUMENT, "pin_threads is %d; it must be 0 or 1", out->pin_threads);
    if (!(out->dropout >= 0 && out->dropout < 1))
        return fail(GPT_ERR_ARGUMENT, "dropout is %g; it must be at least 0 and below 1",
                    out->dropout);
    if (!(out->label_smoothing >= 0 && out->label_smoothing < 1))
        return fail(GPT_ERR_ARGUMENT, "label_smoothing is %g; it must be at least 0 and below 1",
                    out->label_smoothing);
    if (!(out->z_loss >= 0 && isfinite(out->z_loss)))
        return fail(GPT_ERR_ARGUMENT, "z_loss is %g; it must be 0 or above", out->z_loss);
    if (out->optimizer < GPT_OPTIMIZER_DEFAULT || out->optimizer > GPT_OPTIMIZER_MUON)
        return fail(GPT_ERR_ARGUMENT, "optimizer is %d; it must be an enum gpt_optimizer_kind",
                    out->optimizer);
    if (out->muon_rows != 0 && out->muon_rows != 1)
        return fail(GPT_ERR_ARGUMENT, "muon_rows is %d; it must be 0 or 1", out->muon_rows);
    if (out->moments < GPT_MOMENTS_FP32 || out->moments > GPT_MOMENTS_INT8)
        return fail(GPT_ERR_ARGUMENT, "moments is %d; it must be an enum gpt_moments",
                    out->moments);
    if (out->moments != GPT_MOMENTS_FP32 && out->device != GPT_DEVICE_CPU)
        return fail(GPT_ERR_ARGUMENT,
                    "moments of fewer bits are on a CPU only: use its device, or fp32 moments");
    TRY(check_shards(out));
    TRY(check_wire(out->wire));
    if (out->wire != GPT_WIRE_FP32 && out->device != GPT_DEVICE_CPU)
        return fail(GPT_ERR_ARGUMENT, "wire is %d on a GPU; it must be fp32", out->wire);
    if (out->n_groups < 0 || (out->n_groups > 0 && !out->groups))
        return fail(GPT_ERR_ARGUMENT, "n_groups is %d; it must be the number of groups",
                    out->n_groups);
    for (int g = 0; g < out->n_groups; g++) TRY(check_group(&out->groups[g], g));
    return check_block_rows(c, out);
}

static void fill_plan(const gpt_config *c, const gpt_options *o, const arena_plan *p,
                      const params_layout *layout, gpt_plan *out) {
    *out = (gpt_plan){
        .n_params = layout->n_params,
        .n_active_params = layout->n_active,
        .param_bytes = p->params + p->packed,
        .grad_bytes = p->grads + p->residual,
        .optimizer_bytes = p->states,
        .activation_bytes = p->acts + p->state + p->dora,
        .workspace_bytes = p->workspace,
        .total_bytes = p->total,
        .forward_flops_per_token = forward_flops_per_token(c, o->max_seq),
    };
    out->train_flops_per_token = 3 * out->forward_flops_per_token;
    out->update_flops = update_flops(layout);
}

/* Whether the device computes the model. */
static int check_device(const gpt_config *c, const gpt_ops *ops) {
    if (!c->n_expert || ops->expert_forward) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT,
                "a GPU computes experts in fp32 and bf16 alone, not with weights of fewer bits "
                "(%s): use --dtype bf16 or --device cpu",
                ops->name);
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
    TRY(check_device(config, ops));
    TRY(params_layout_create(config, ops, &o, &layout));
    int status = ops->ctx_create(&ctx, o.n_threads, 0);
    if (status == GPT_OK) {
        arena_plan p = arena_plan_of(config, &o, ops, ctx, &layout);
        fill_plan(config, &o, &p, &layout, out);
        out->library_bytes = ops->thread_library_bytes * (size_t)ops->ctx_threads(ctx);
        ops->ctx_free(ctx);
    }
    params_layout_free(&layout);
    return status;
}

/* ---- model ---- */

static int out_of_memory(gpt_model *m, const arena_plan *p) {
    const gpt_options *o = &m->options;
    char free_now[64] = "", way_on[64] = "try a smaller batch";
    size_t bytes = m->ops->memory_free();
    if (bytes < SIZE_MAX) {
        int batch =
            arena_largest_batch(m, bytes - bytes / 64); /* no device gives its very last pages */
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

/* A matrix that is not trained is packed as it is written. The packed form may be its only one. */
static bool packs_at_once(const gpt_model *m) {
    return weights_are_fixed(&m->options) && m->ops->packs_host_memory;
}

static int allocate_arena(gpt_model *m) {
    arena_plan p = arena_plan_of(&m->config, &m->options, m->ops, m->ctx, &m->layout);
    m->arena_bytes = p.total;
    m->arena = m->ops->buffer_alloc(m->ctx, p.total, BUFFER_WHOLE);
    if (!m->arena) {
        TRY(m->ops->sync(m->ctx)); /* the device failed, before or now */
        return out_of_memory(m, &p);
    }
    arena_lay_out(m, &p);
    m->pack_stale = !packs_at_once(m);
    return GPT_OK;
}

static int prepare_rope(gpt_model *m) {
    const gpt_config *c = &m->config;
    size_t n = (size_t)(rope_sets(c) * rope_table_count(c)) * (size_t)rope_pairs(c);
    m->rope_frequencies = malloc(sizeof(double) * (n ? n : 1));
    if (!m->rope_frequencies) return fail(GPT_ERR_MEMORY, "no memory for rotary frequencies");
    for (int l = 0; l < c->n_layer; l++) m->rope[l] = rope_index(c, l);
    rope_frequencies(c, m->rope_frequencies);
    m->config.rope_divisors = NULL; /* the caller's memory */
    return GPT_OK;
}

static int create_parts(gpt_model *m) {
    size_t L = (size_t)m->config.n_layer;
    m->layers = calloc(L, sizeof *m->layers);
    m->rope = calloc(L, sizeof *m->rope);
    if (!m->layers || !m->rope) return fail(GPT_ERR_MEMORY, "no memory for the model's layers");
    for (int l = 0; l < m->config.n_layer; l++) m->layers[l] = config_layer(&m->config, l);
    m->config.layers = m->layers;
    TRY(backend_ops(m->options.device, m->options.dtype, &m->ops));
    TRY(check_device(&m->config, m->ops));
    TRY(m->ops->ctx_create(&m->ctx, m->options.n_threads, m->options.pin_threads));
    TRY(params_layout_create(&m->config, m->ops, &m->options, &m->layout));
    if (dora_rows(&m->options.lora)) {
        m->dora.of = calloc(L * LORA_MATRICES, sizeof *m->dora.of);
        if (!m->dora.of) return fail(GPT_ERR_MEMORY, "no memory for the adapters' tables");
    }
    m->options.groups = NULL; /* the caller's memory; the layout has copied both */
    m->options.block_rows = NULL;
    m->acts.layers = calloc(L, sizeof *m->acts.layers);
    m->w.layers = calloc(L, sizeof *m->w.layers);
    m->dw.layers = calloc(L, sizeof *m->dw.layers);
    if (!m->acts.layers || !m->w.layers || !m->dw.layers)
        return fail(GPT_ERR_MEMORY, "no memory for the model's tables");
    size_t rows = (size_t)m->options.max_batch * (size_t)m->options.max_seq;
    m->host_losses = malloc(sizeof(float) * (rows ? rows : 1));
    if (!m->host_losses) return fail(GPT_ERR_MEMORY, "no memory for the losses of a batch");
    TRY(prepare_rope(m));
    return allocate_arena(m);
}

int gpt_model_create(const gpt_config *config, const gpt_options *options, gpt_model **out) {
    REQUIRE(options);
    REQUIRE(out);
    TRY(gpt_config_check(config));
    gpt_options o;
    TRY(check_options(config, options, &o));
    gpt_model *m = calloc(1, sizeof *m);
    if (!m) return fail(GPT_ERR_MEMORY, "no memory for the model");
    m->layer = -1;
    m->config = *config;
    m->options = o;
    m->forks = fork_count();
    int status = create_parts(m);
    if (status != GPT_OK) {
        gpt_model_free(m);
        return status;
    }
    *out = m;
    return GPT_OK;
}

static bool is_of_this_process(const gpt_model *m) {
    return m->options.device == GPT_DEVICE_CPU || m->forks == fork_count();
}

int check_process(const gpt_model *m) {
    if (is_of_this_process(m)) return GPT_OK;
    return fail(GPT_ERR_DEVICE,
                "the model is on a GPU, and this process was forked after it was created; create "
                "it in the child, or start the child with spawn");
}

void gpt_model_free(gpt_model *m) {
    if (!m) return;
    drop_sums(m);
    bool here = is_of_this_process(m); /* else the GPU's memory is the parent's */
    if (here && m->ctx && m->arena) m->ops->buffer_free(m->ctx, m->arena, m->arena_bytes);
    if (here && m->ctx) m->ops->ctx_free(m->ctx);
    lent_close(m);
    params_layout_free(&m->layout);
    free(m->host_losses);
    free(m->acts.layers);
    free(m->w.layers);
    free(m->dw.layers);
    free(m->layers);
    free(m->rope);
    free(m->rope_frequencies);
    free(m->dora.of);
    free(m);
}

int gpt_model_threads(const gpt_model *m) {
    return m ? m->ops->ctx_threads(m->ctx) : 0;
}

/* The n numbers may leave out padding rows, which are zeros. */
static void pack_at_once(gpt_model *m, int i, const float *values, int64_t n) {
    const gpt_segment *s = &m->layout.segments[i];
    weights_pack op = {
        .w = values, .segment = s, .given = (int)(n / s->cols), .training = m->options.training};
    if (s->packed) m->ops->weights_pack(m->ctx, &op);
}

/* Gives a parameter these values, which may be in its place already. */
static void write_value(gpt_model *m, int i, const float *values, int64_t n) {
    const param_slot *slot = &m->layout.slots[i];
    float *place = m->params + slot->offset;
    m->forward_B = m->forward_T = 0; /* whose weights are gone */
    if (i == EMBEDDING) lent_close(m);
    dora_written(m, i, values, n);
    if (slot->kept && values != place)
        m->ops->upload(m->ctx, place, values, sizeof(float) * (size_t)n);
    if (packs_at_once(m))
        pack_at_once(m, i, values, n);
    else
        m->pack_stale = true;
}

/* Floats cannot replace what is kept as blocks. */
static int check_floats(const gpt_model *m, int i) {
    if (!m->layout.segments[i].n_stacked) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "%s is kept as blocks: give it with gpt_model_write_blocks",
                m->layout.slots[i].info.name);
}

/* Parameters from `first` on. */
static int init_from(gpt_model *model, int first, uint64_t seed) {
    int64_t most = 1;
    for (int i = first; i < model->layout.n_slots; i++)
        if (model->layout.slots[i].stored > most) most = model->layout.slots[i].stored;
    float *values = malloc(sizeof(float) * (size_t)most);
    if (!values) return fail(GPT_ERR_MEMORY, "no memory for initial values");
    for (int i = first; i < model->layout.n_slots; i++) {
        const param_slot *slot = &model->layout.slots[i];
        params_init(slot, i, seed, values);
        dora_init(model, i, values);
        write_value(model, i, values, slot->stored);
    }
    free(values);
    return model->ops->sync(model->ctx);
}

int gpt_model_init(gpt_model *model, uint64_t seed) {
    REQUIRE_MODEL(model);
    TRY(check_gathered(model));
    for (int i = 0; i < model->layout.n_slots; i++) TRY(check_floats(model, i));
    return init_from(model, 0, seed);
}

int gpt_model_init_lora(gpt_model *model, uint64_t seed) {
    REQUIRE_MODEL(model);
    if (!model->options.lora.rank)
        return fail(GPT_ERR_ARGUMENT, "the model was created without adapters");
    return init_from(model, params_count(&model->config), seed);
}

/* The place of one parameter's values, gradients or optimizer state. */
typedef struct tensor_place {
    float *floats; /* values or gradients; NULL where they are not kept, and of a state */
    int64_t at;    /* a state: its place in the buffer of slot k of its optimizer */
    int k;
} tensor_place;

static int find_state(const gpt_model *m, int i, int k, int64_t n, tensor_place *out) {
    const gpt_segment *s = &m->layout.segments[i];
    if (k >= gpt_model_state_count(m, i))
        return fail(GPT_ERR_ARGUMENT, "the optimizer of parameter %s has no state slot %d",
                    m->layout.slots[i].info.name, k);
    int64_t size = gpt_model_state_size(m, i, k);
    if (n != size)
        return fail(GPT_ERR_ARGUMENT, "state slot %d of parameter %s has %lld numbers, not %lld", k,
                    m->layout.slots[i].info.name, (long long)size, (long long)n);
    bool is_of_rows = k == 1 && s->row_state;
    *out = (tensor_place){.at = is_of_rows ? s->row_state : s->state, .k = is_of_rows ? 0 : k};
    return GPT_OK;
}

static int find_tensor(const gpt_model *m, int i, int tensor, int64_t n, tensor_place *out) {
    *out = (tensor_place){0};
    if (i < 0 || i >= m->layout.n_slots)
        return fail(GPT_ERR_ARGUMENT, "parameter %d does not exist; the model has %d", i,
                    m->layout.n_slots);
    bool known = tensor >= GPT_TENSOR_VALUE && tensor < GPT_TENSOR_STATE0 + MAX_STATES;
    if (!known && tensor != GPT_TENSOR_RESIDUAL)
        return fail(GPT_ERR_ARGUMENT, "unknown tensor kind %d", tensor);
    const param_slot *slot = &m->layout.slots[i];
    const gpt_segment *s = &m->layout.segments[i];
    bool is_state = tensor >= GPT_TENSOR_STATE0 && tensor < GPT_TENSOR_STATE0 + MAX_STATES;
    if (n != slot->info.size && !(is_state && s->row_state))
        return fail(GPT_ERR_ARGUMENT, "parameter %s has %lld numbers, not %lld", slot->info.name,
                    (long long)slot->info.size, (long long)n);
    if (tensor == GPT_TENSOR_VALUE) {
        out->floats = slot->kept ? m->params + slot->offset : NULL;
        return GPT_OK;
    }
    if (!m->grads)
        return fail(GPT_ERR_ARGUMENT,
                    "the model was created without training: it has no gradients or moments");
    if (s->grad < 0)
        return fail(GPT_ERR_ARGUMENT, "parameter %s is frozen: it has no gradient or moments",
                    slot->info.name);
    if (is_state) return find_state(m, i, tensor - GPT_TENSOR_STATE0, n, out);
    if (tensor == GPT_TENSOR_RESIDUAL && !m->residual)
        return fail(GPT_ERR_ARGUMENT,
                    "the model was created with the wire fp32: all gradients are sent");
    out->floats = (tensor == GPT_TENSOR_RESIDUAL ? m->residual : m->grads) + s->grad;
    return GPT_OK;
}

static int read_value(gpt_model *m, int i, const float *place, float *out, int64_t n) {
    TRY(check_gathered(m));
    const gpt_segment *s = &m->layout.segments[i];
    if (s->n_stacked) {
        TRY(rows_read(m, s, 0, (int)(n / s->cols), out));
        return m->ops->sync(m->ctx);
    }
    if (!place)
        return fail(GPT_ERR_ARGUMENT,
                    "the model holds %s only in packed form; to read it, create the model with "
                    "training, or in fp32",
                    m->layout.slots[i].info.name);
    if (i == EMBEDDING && m->lent.is_open) return lent_read(m, 0, n, out);
    m->ops->download(m->ctx, out, place, sizeof(float) * (size_t)n);
    return m->ops->sync(m->ctx);
}

int gpt_model_read(gpt_model *model, int i, int tensor, float *out, int64_t n) {
    REQUIRE_MODEL(model);
    REQUIRE(out);
    tensor_place place;
    TRY(find_tensor(model, i, tensor, n, &place));
    if (tensor == GPT_TENSOR_VALUE) return read_value(model, i, place.floats, out, n);
    if (place.floats) {
        model->ops->download(model->ctx, out, place.floats, sizeof(float) * (size_t)n);
        return model->ops->sync(model->ctx);
    }
    if (is_sharded(&model->layout))
        return fail(GPT_ERR_ARGUMENT, "the state is in %d parts; call gpt_model_gather_state",
                    model->layout.n_shards);
    return state_read(model, model->layout.segments[i].optimizer, place.k, place.at, n, out);
}

int gpt_model_write(gpt_model *model, int i, int tensor, const float *values, int64_t n) {
    REQUIRE_MODEL(model);
    REQUIRE(values);
    tensor_place place;
    TRY(find_tensor(model, i, tensor, n, &place));
    if (tensor == GPT_TENSOR_GRAD) {
        if (model->grads_stale) TRY(gpt_model_zero_grads(model));
        if (model->n_micro == 0) model->n_micro = 1; /* there is something to apply */
    }
    if (tensor == GPT_TENSOR_VALUE) {
        TRY(check_gathered(model));
        TRY(check_floats(model, i));
        write_value(model, i, values, n);
    } else if (place.floats) {
        model->ops->upload(model->ctx, place.floats, values, sizeof(float) * (size_t)n);
    } else if (is_sharded(&model->layout)) {
        shard_state_set(model, i, tensor - GPT_TENSOR_STATE0, values, n);
    } else {
        TRY(state_write(model, model->layout.segments[i].optimizer, place.k, place.at, n, values));
    }
    return model->ops->sync(model->ctx);
}

int gpt_model_write_blocks(gpt_model *model, int i, int part, const void *blocks,
                           uint64_t n_bytes) {
    REQUIRE_MODEL(model);
    REQUIRE(blocks);
    if (i < 0 || i >= model->layout.n_slots || part < 0 ||
        part >= model->layout.segments[i].n_stacked)
        return fail(GPT_ERR_ARGUMENT, "parameter %d has no entry %d of blocks", i, part);
    const gpt_segment *s = &model->layout.segments[i];
    uint64_t wanted = block_bytes(s, part);
    if (n_bytes != wanted)
        return fail(GPT_ERR_ARGUMENT, "entry %d of %s has %llu bytes of blocks, not %llu", part,
                    model->layout.slots[i].info.name, (unsigned long long)wanted,
                    (unsigned long long)n_bytes);
    model->forward_B = model->forward_T = 0;
    model->ops->blocks_pack(model->ctx, s, part, blocks);
    TRY(dora_written_blocks(model, i, part));
    return model->ops->sync(model->ctx);
}

/* Reads a parameter from a file and gives it to the model, or lends the file to it. */
static int fetch_value(gpt_model *m, int i, float *values, int64_t n, int descriptor,
                       int64_t offset, bool transposed, bool lend) {
    const gpt_param *info = &m->layout.slots[i].info;
    m->forward_B = m->forward_T = 0;
    TRY(lent_fetch(descriptor, offset, info->shape[0], n / info->shape[0], transposed, values));
    if (lend) {
        pack_at_once(m, i, values, n);
        return lent_open(m, descriptor, offset);
    }
    write_value(m, i, values, n);
    return m->ops->sync(m->ctx);
}

int gpt_model_lend(gpt_model *model, int i, int64_t n, int descriptor, int64_t offset,
                   int transposed, int *kept) {
    REQUIRE_MODEL(model);
    tensor_place place;
    TRY(find_tensor(model, i, GPT_TENSOR_VALUE, n, &place));
    if (offset < 0)
        return fail(GPT_ERR_ARGUMENT, "offset is %lld; it must be 0 or above", (long long)offset);
    if (transposed != 0 && transposed != 1)
        return fail(GPT_ERR_ARGUMENT, "transposed is %d; it must be 0 or 1", transposed);
    const gpt_segment *s = &model->layout.segments[i];
    TRY(check_gathered(model));
    TRY(check_floats(model, i));
    /* Products that read the parameters themselves would read padding rows, too. */
    bool lend =
        kept && !transposed && i == EMBEDDING && packs_at_once(model) && (s->packed || !s->product);
    if (kept) *kept = lend;
    if (lend && !s->packed) return lent_open(model, descriptor, offset);
    bool in_place = place.floats && !lend && model->ops->packs_host_memory;
    float *values = in_place ? place.floats : malloc(sizeof(float) * (size_t)n);
    if (!values)
        return fail(GPT_ERR_MEMORY, "no memory to read %s", model->layout.slots[i].info.name);
    int status = fetch_value(model, i, values, n, descriptor, offset, transposed, lend);
    if (!in_place) free(values);
    return status;
}

int gpt_model_state_count(const gpt_model *model, int i) {
    if (!model || i < 0 || i >= model->layout.n_slots) return -1;
    const gpt_segment *s = &model->layout.segments[i];
    return optimizer_states(s->optimizer) + (s->row_state > 0);
}

int64_t gpt_model_state_size(const gpt_model *model, int i, int k) {
    int n = gpt_model_state_count(model, i);
    if (n < 0 || k < 0 || k >= n) return n < 0 ? -1 : 0;
    const gpt_segment *s = &model->layout.segments[i];
    return k == 1 && s->row_state ? s->rows : model->layout.slots[i].info.size;
}

int64_t gpt_model_step(const gpt_model *model) {
    return model ? model->step : -1;
}

int gpt_model_set_step(gpt_model *model, int64_t step) {
    REQUIRE_MODEL(model);
    if (step < 0)
        return fail(GPT_ERR_ARGUMENT, "step is %lld; it must be 0 or above", (long long)step);
    model->step = step;
    return GPT_OK;
}
