/* shard.c: the part of the optimizer's state that a rank has: ZeRO-1, Rajbhandari et al. 2020.
 *
 * A part is a range of the gradients. Its borders are those of blocks of grad_norm, so that the norm of all
 * ranks has the bits of one. */
#include "error.h"
#include "model.h"

#include <stdlib.h>
#include <string.h>

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

int64_t shard_bound(const params_layout *layout, int shard) {
    int64_t blocks = (layout->n_grads + GRAD_BLOCK - 1) / GRAD_BLOCK;
    return least(blocks * shard / layout->n_shards * GRAD_BLOCK, layout->n_grads);
}

int64_t shard_bound_in(const params_layout *layout, int i, int shard) {
    int64_t size = layout->slots[i].info.size;
    return least(most(shard_bound(layout, shard) - layout->segments[i].grad, 0), size);
}

/* The numbers of a segment whose gradients are begin to end, as a segment; false where there are none. */
static bool cut(const gpt_segment *s, int64_t begin, int64_t end, gpt_segment *out) {
    int64_t first = most(begin - s->grad, 0), last = least(end - s->grad, s->size);
    if (s->grad < 0 || first >= last) return false;
    *out = (gpt_segment){.offset = s->offset + first,
                         .size = last - first,
                         .grad = s->grad + first,
                         .state = s->state + first,
                         .optimizer = s->optimizer,
                         .lr_scale = s->lr_scale,
                         .decay = s->decay,
                         .rows = (int)(last - first),
                         .cols = 1,
                         .parts = 1};
    return true;
}

int shard_lay_out(const gpt_options *o, params_layout *layout) {
    layout->n_shards = o->n_shards;
    if (!is_sharded(layout)) return GPT_OK;
    layout->shard_segments = calloc((size_t)layout->n_slots, sizeof *layout->shard_segments);
    if (!layout->shard_segments) return fail(GPT_ERR_MEMORY, "no memory for the parameter table");
    layout->shard_begin = shard_bound(layout, o->shard);
    layout->shard_end = shard_bound(layout, o->shard + 1);
    for (int i = 0; i < layout->n_slots; i++) {
        gpt_segment *s = &layout->segments[i];
        if (s->grad >= 0 && s->optimizer != GPT_OPTIMIZER_ADAMW)
            return fail(GPT_ERR_ARGUMENT,
                        "the optimizer of %s is not AdamW, whose state alone can be in %d parts",
                        layout->slots[i].info.name, o->n_shards);
        s->state = s->grad - layout->shard_begin;
        gpt_segment *part = &layout->shard_segments[layout->n_shard_segments];
        layout->n_shard_segments += cut(s, layout->shard_begin, layout->shard_end, part);
    }
    layout->n_states[GPT_OPTIMIZER_ADAMW] = layout->shard_end - layout->shard_begin;
    return GPT_OK;
}

static void copy(gpt_model *m, int64_t begin, int64_t end, bool exports) {
    gpt_segment part;
    for (int i = 0; i < m->layout.n_slots; i++) {
        if (!cut(&m->layout.segments[i], begin, end, &part)) continue;
        float *param = m->params + part.offset, *grad = m->grads + part.grad;
        memcpy(exports ? grad : param, exports ? param : grad, sizeof *param * (size_t)part.size);
    }
}

void shard_export(gpt_model *m, int64_t begin, int64_t end) {
    copy(m, begin, end, true);
}

void shard_import(gpt_model *m, int64_t begin, int64_t end) {
    copy(m, begin, end, false);
}
