/* reduce.c: the sum of the gradients of all ranks, and the parts of a sharded model. */
#include "comm/background.h"
#include "comm/nccl.h"

#include "api.h"

#include <math.h>
#include <string.h>

/* ---- gradients ---- */

/* The rows of which every element that dropout draws for has a number of 64 bits. */
static int64_t most_rows(const gpt_model *m) {
    const gpt_config *c = &m->config;
    int64_t T = m->options.max_seq, width = c->n_head * T + c->n_embd + 2 * (int64_t)c->n_ff;
    return INT64_MAX / (T * width) - m->options.max_batch;
}

int gpt_model_place(gpt_model *model, int64_t micro, int64_t row) {
    REQUIRE_MODEL(model);
    model->place = (batch_place){0};
    if (micro < 0 || row < 0)
        return fail(GPT_ERR_ARGUMENT, "row %lld of batch %lld; both are 0 or above", (long long)row,
                    (long long)micro);
    if (row > most_rows(model))
        return fail(GPT_ERR_ARGUMENT, "row %lld is too large; this model has rows up to %lld",
                    (long long)row, (long long)most_rows(model));
    model->place = (batch_place){true, micro, row};
    return GPT_OK;
}

/* x (n) of the device, through the host where that has other memory. */
static int reduce_on(gpt_model *m, gpt_comm *comm, float *x, int64_t n, coding coding) {
    if (m->options.device == GPT_DEVICE_CPU) return comm->ops->all_reduce(comm, x, n, coding);
    for (int64_t first = 0; first < n; first += COMM_STAGE) {
        int64_t size = n - first < COMM_STAGE ? n - first : COMM_STAGE;
        size_t bytes = sizeof *x * (size_t)size;
        m->ops->download(m->ctx, comm->stage, x + first, bytes);
        TRY(m->ops->sync(m->ctx));
        TRY(comm->ops->all_reduce(comm, comm->stage, size, coding));
        m->ops->upload(m->ctx, x + first, comm->stage, bytes);
        TRY(m->ops->sync(m->ctx));
    }
    return GPT_OK;
}

static int queue_is_busy(void *model) {
    const gpt_model *m = model;
    return m->ops->is_busy(m->ctx);
}

/* Gradients where they are. The loss goes first and by messages between hosts: a rank that does not come is named
 * there, and GPUs begin with all ranks at the same place. */
static int reduce_on_gpus(gpt_model *m, gpt_comm *comm) {
    device_queue queue = {m->ops->stream(m->ctx), queue_is_busy, m};
    TRY(reduce_on(m, comm, &m->state->report.loss, 1, (coding){0}));
    TRY(nccl_all_reduce(comm, m->grads, m->layout.n_grads, queue));
    return m->ops->sync(m->ctx); /* a device that has failed is not busy either */
}

static coding coding_at(const gpt_model *m, int64_t first) {
    return (coding){m->options.wire, m->residual ? m->residual + first : NULL};
}

/* The same of a sharded state: each rank gets the sums of its pieces. */
static void advance_ranges(gpt_model *m, int layer) {
    const params_layout *l = &m->layout;
    for (int *k = &m->sums.next_range; *k < l->n_shard_ranges; ++*k) {
        int i = shard_range_at(l, *k);
        bucket range = l->shard_ranges[i];
        if (range.layer < layer) return;
        background_add(m->sums.comm, m->grads, range.begin, range.end - range.begin,
                       shard_bounds_of(l, i), coding_at(m, 0));
    }
}

/* Numbers of a sum, at least. A small model has some sums too, since the last begin when backward has ended. */
static int64_t least_sum(const gpt_model *m, const gpt_comm *comm) {
    const int64_t parts = 4, least = 1 << 16, part = m->layout.n_grads / parts;
    int64_t n = part > least ? part : least;
    return n < comm->bucket ? n : comm->bucket;
}

static bucket first_sum(const gpt_model *m, const gpt_comm *comm) {
    return bucket_first(&m->layout, least_sum(m, comm));
}

static bucket sum_after(const gpt_model *m, const gpt_comm *comm, bucket b) {
    return bucket_after(&m->layout, least_sum(m, comm), b);
}

/* In backward: the gradients down to this layer are complete. */
static void advance(gpt_model *m, int layer) {
    gradient_sums *sums = &m->sums;
    if (is_sharded(&m->layout)) {
        advance_ranges(m, layer);
        return;
    }
    bucket b = sums->next;
    for (; b.begin < b.end && b.layer >= layer; b = sum_after(m, sums->comm, b))
        background_add(sums->comm, m->grads, b.begin, b.end - b.begin, NULL, coding_at(m, 0));
    sums->next = b;
}

/* The rest of sums that began during backward. */
static int end_sums(gpt_model *m, gpt_comm *comm) {
    advance(m, -1);
    m->sums.comm = NULL;
    comm->adding = NULL;
    return background_wait(comm);
}

/* Whole gradients, in ranges that follow from the layout: what a rounded form leaves out depends on them. */
static int reduce_whole(gpt_model *m, gpt_comm *comm) {
    if (m->sums.comm) return end_sums(m, comm);
    for (bucket b = first_sum(m, comm); b.begin < b.end; b = sum_after(m, comm, b))
        TRY(reduce_on(m, comm, m->grads + b.begin, b.end - b.begin, coding_at(m, b.begin)));
    return GPT_OK;
}

void drop_sums(gpt_model *m) {
    gpt_comm *comm = m->sums.comm;
    if (!comm) return;
    background_give_up(comm);
    comm->adding = NULL;
    m->sums.comm = NULL;
}

static int check_part(const gpt_model *m, const gpt_comm *comm) {
    if (!is_sharded(&m->layout))
        return fail(GPT_ERR_ARGUMENT, "the model was created without n_shards: its state is whole");
    if (m->layout.n_shards == comm->size && m->options.shard == comm->rank) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "the model has part %d of %d; this is rank %d of %d",
                m->options.shard, m->layout.n_shards, comm->rank, comm->size);
}

int gpt_model_begin_all_reduce(gpt_model *model, gpt_comm *comm) {
    REQUIRE_MODEL(model);
    REQUIRE(comm);
    TRY(check_trains(model));
    TRY(check_idle(comm));
    if (model->sums.comm) TRY(check_idle(model->sums.comm));
    if (is_sharded(&model->layout)) TRY(check_part(model, comm));
    if (model->options.device != GPT_DEVICE_CPU) return GPT_OK;
    TRY(background_start(comm));
    background_begin(comm);
    comm->adding = model;
    model->sums = (gradient_sums){.comm = comm, .advance = advance, .next = first_sum(model, comm)};
    return GPT_OK;
}

/* ---- a part of the optimizer's state ---- */

/* comm->bounds: those of numbers, as bytes. */
static const int64_t *as_bytes(gpt_comm *comm, const int64_t *bounds, size_t each) {
    for (int rank = 0; rank <= comm->size; rank++)
        comm->bounds[rank] = bounds[rank] * (int64_t)each;
    return comm->bounds;
}

/* The norm of all gradients: as grad_norm adds its blocks, each of which one rank has. */
static int norm_of_parts(gpt_model *m, gpt_comm *comm) {
    const params_layout *l = &m->layout;
    double *squares = l->shard_squares, total = 0;
    m->ops->ctx_set_workspace(m->ctx, m->workspace);
    for (int i = 0; i < l->n_shard_ranges; i++) {
        const int64_t *own = shard_bounds_of(l, i) + l->shard;
        m->ops->grad_norm(
            m->ctx, &(grad_norm){.squares = squares + l->shard_blocks[i * l->n_shards + l->shard],
                                 .grads = m->grads + own[0],
                                 .n = own[1] - own[0]});
    }
    for (int rank = 0; rank < comm->size; rank++)
        comm->bounds[rank] = l->shard_blocks[rank] * (int64_t)sizeof *squares;
    comm->bounds[comm->size] = l->n_shard_blocks * (int64_t)sizeof *squares;
    TRY(comm->ops->all_gather(comm, squares, comm->bounds));
    for (int i = 0; i < l->n_shard_ranges; i++)
        for (int rank = 0; rank < comm->size; rank++) {
            const double *piece = squares + l->shard_blocks[i * l->n_shards + rank];
            for (int64_t b = 0; b < shard_blocks_in(l, i, rank); b++) total += piece[b];
        }
    m->shard_norm = (float)sqrt(total);
    return GPT_OK;
}

/* The sums of the own pieces. */
static int reduce_part(gpt_model *m, gpt_comm *comm) {
    const params_layout *l = &m->layout;
    if (m->sums.comm)
        TRY(end_sums(m, comm));
    else
        for (int k = 0; k < l->n_shard_ranges; k++)
            TRY(comm->ops->reduce_scatter(comm, m->grads, shard_bounds_of(l, shard_range_at(l, k)),
                                          coding_at(m, 0)));
    return norm_of_parts(m, comm);
}

/* Whether the gradients that are there may be added with these ranks. */
static int check_sums(gpt_model *m, gpt_comm *comm) {
    TRY(check_trains(m));
    if (m->sums.comm != comm && (m->sums.comm || background_is_busy(comm)))
        return fail(GPT_ERR_ARGUMENT,
                    "gradients are being added with other ranks or another model");
    return is_sharded(&m->layout) ? check_part(m, comm) : GPT_OK;
}

/* Gradients and losses. */
static int reduce(gpt_model *m, gpt_comm *comm) {
    if (m->ops->stream && nccl_is_there(comm)) return reduce_on_gpus(m, comm);
    if (nccl_has_failed(comm))
        return fail(GPT_ERR_COMM, "an earlier sum of the GPUs failed: end all ranks");
    TRY(is_sharded(&m->layout) ? reduce_part(m, comm) : reduce_whole(m, comm));
    return reduce_on(m, comm, &m->state->report.loss, 1, (coding){0});
}

int gpt_model_all_reduce(gpt_model *model, gpt_comm *comm) {
    REQUIRE_MODEL(model);
    REQUIRE(comm);
    TRY(check_sums(model, comm));
    if (model->grads_stale) TRY(zero_grads(model));
    TRY(model->ops->sync(model->ctx));
    int status = reduce(model, comm);
    if (status != GPT_OK)
        model->grads_stale = true, model->n_micro = 0; /* some are sums, and some are not */
    else if (!model->n_micro)
        model->n_micro = 1; /* there is something to apply */
    model->shard_summed = status == GPT_OK && is_sharded(&model->layout);
    return status;
}

int gpt_model_gather(gpt_model *model, gpt_comm *comm) {
    REQUIRE_MODEL(model);
    REQUIRE(comm);
    TRY(check_idle(comm));
    TRY(check_part(model, comm));
    if (!model->shard_updated)
        return fail(GPT_ERR_ARGUMENT, "there was no update since the last gpt_model_gather");
    const params_layout *layout = &model->layout;
    model->grads_stale = true; /* parameters come through their buffer */
    model->shard_summed = false;
    model->n_micro = 0;
    for (int i = 0; i < layout->n_shard_ranges; i++) {
        const int64_t *bounds = shard_bounds_of(layout, i), *own = bounds + layout->shard;
        shard_export(model, own[0], own[1]);
        TRY(comm->ops->all_gather(comm, model->grads, as_bytes(comm, bounds, sizeof(float))));
        shard_import(model, bounds[0], own[0]);
        shard_import(model, own[1], bounds[comm->size]);
    }
    if (!weights_are_fixed(&model->options)) model->pack_stale = true;
    model->dora.stale = true;
    model->shard_updated = false;
    return GPT_OK;
}

int gpt_model_gather_state(gpt_model *model, gpt_comm *comm, int i, int k, float *out, int64_t n) {
    REQUIRE_MODEL(model);
    REQUIRE(comm);
    REQUIRE(out);
    TRY(check_idle(comm));
    TRY(check_part(model, comm));
    if (k < 0 || k >= gpt_model_state_count(model, i))
        return fail(GPT_ERR_ARGUMENT, "parameter %d has no state slot %d", i, k);
    if (n != gpt_model_state_size(model, i, k))
        return fail(GPT_ERR_ARGUMENT, "state slot %d of parameter %d has %lld numbers, not %lld", k,
                    i, (long long)gpt_model_state_size(model, i, k), (long long)n);
    shard_state_get(model, i, k, out, n);
    for (int range = 0; range < model->layout.n_shard_ranges; range++) {
        shard_state_bounds(&model->layout, range, i, k, n, comm->bounds);
        TRY(comm->ops->all_gather(comm, out, as_bytes(comm, comm->bounds, sizeof *out)));
    }
    return GPT_OK;
}
