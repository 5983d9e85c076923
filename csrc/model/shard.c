/* shard.c: the part of the optimizer's state that a rank has: ZeRO-1, Rajbhandari et al. 2020.
 *
 * The gradients are ranges, which backward completes one after the other, so that ranks can add one while
 * it computes the next. Each range has a piece for each part. The borders are those of blocks of grad_norm, so that
 * the norm of all ranks has the bits of one. Muon needs whole matrices: then there is one range, and a border
 * within a matrix moves to its nearer end. */
#include "error.h"
#include "model.h"

#include <stdlib.h>
#include <string.h>

enum { RANGE = 1 << 21 /* numbers of a range, or more */ };

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t n_blocks(int64_t n) {
    return (n + GRAD_BLOCK - 1) / GRAD_BLOCK;
}

static int64_t rounded_up(int64_t n) {
    return n_blocks(n) * GRAD_BLOCK;
}

int64_t shard_blocks_in(const params_layout *layout, int i, int shard) {
    const int64_t *bounds = shard_bounds_of(layout, i);
    return n_blocks(bounds[shard + 1] - bounds[shard]);
}

/* ---- ranges ---- */

/* One range, or the buckets with their borders at those of blocks. A block of two buckets is in that which
 * backward completes later. */
static int find_ranges(params_layout *l) {
    int n = 0, is_whole = l->n_states[GPT_OPTIMIZER_MUON] > 0;
    bucket all = {0, l->n_grads, -1}, last = all;
    for (bucket b = bucket_first(l, RANGE); b.begin < b.end && !is_whole;
         b = bucket_after(l, RANGE, b))
        n++, last = b;
    l->n_shard_ranges = n > 1 ? n : 1;
    l->shard_ranges = calloc((size_t)l->n_shard_ranges, sizeof *l->shard_ranges);
    if (!l->shard_ranges) return fail(GPT_ERR_MEMORY, "no memory for the parts of the gradients");
    l->shard_tail = n > 1 && last.end == l->n_grads;
    l->shard_ranges[l->n_shard_ranges - 1] = all;
    if (n <= 1) return GPT_OK;
    int64_t top = l->shard_tail ? last.begin / GRAD_BLOCK * GRAD_BLOCK : l->n_grads;
    bucket b = bucket_first(l, RANGE);
    for (int k = 0; k < n - l->shard_tail; k++, b = bucket_after(l, RANGE, b))
        l->shard_ranges[shard_range_at(l, k)] =
            (bucket){least(rounded_up(b.begin), top), least(rounded_up(b.end), top), b.layer};
    if (l->shard_tail) l->shard_ranges[n - 1] = (bucket){top, l->n_grads, -1};
    return GPT_OK;
}

/* The border, moved to the nearer end of the matrix of Muon that it is in. */
static int64_t outside_matrices(const params_layout *l, int64_t border) {
    for (const gpt_segment *s = l->segments; s < l->segments + l->n_slots; s++) {
        if (s->optimizer != GPT_OPTIMIZER_MUON || border <= s->grad || border >= s->grad + s->size)
            continue;
        int64_t begin = s->grad, end = begin;
        for (int k = 0; k < s->n_matrices; k++, begin = end) {
            end = begin + (int64_t)s->matrix_rows[k] * s->cols;
            if (border < end) return border - begin < end - border ? begin : end;
        }
    }
    return border;
}

static int cut_ranges(params_layout *l) {
    size_t n = (size_t)l->n_shard_ranges, parts = (size_t)l->n_shards;
    l->shard_bounds = calloc(n * (parts + 1), sizeof *l->shard_bounds);
    l->shard_blocks = calloc(n * parts, sizeof *l->shard_blocks);
    if (!l->shard_bounds || !l->shard_blocks)
        return fail(GPT_ERR_MEMORY, "no memory for the parts of the gradients");
    for (int i = 0; i < l->n_shard_ranges; i++) {
        bucket range = l->shard_ranges[i];
        int64_t blocks = n_blocks(range.end - range.begin);
        for (int r = 0; r <= l->n_shards; r++) {
            int64_t border = range.begin + blocks * r / l->n_shards * GRAD_BLOCK;
            l->shard_bounds[i * (l->n_shards + 1) + r] =
                outside_matrices(l, least(border, range.end));
        }
    }
    for (int r = 0; r < l->n_shards; r++)
        for (int i = 0; i < l->n_shard_ranges; i++) {
            l->shard_blocks[i * l->n_shards + r] = l->n_shard_blocks;
            l->n_shard_blocks += shard_blocks_in(l, i, r);
        }
    l->shard_squares = calloc((size_t)l->n_shard_blocks, sizeof *l->shard_squares);
    return l->shard_squares ? GPT_OK : fail(GPT_ERR_MEMORY, "no memory for the gradients' norm");
}

/* ---- state ---- */

/* The numbers of a segment whose gradients are begin to end, as a segment; false where there are none. */
static bool cut(const gpt_segment *s, int64_t begin, int64_t end, gpt_segment *out) {
    int64_t first = most(begin - s->grad, 0), last = least(end - s->grad, s->size);
    if (s->grad < 0 || first >= last) return false;
    *out = (gpt_segment){.offset = s->offset + first,
                         .size = last - first,
                         .grad = s->grad + first,
                         .optimizer = s->optimizer,
                         .lr_scale = s->lr_scale,
                         .decay = s->decay,
                         .rows = (int)(last - first),
                         .cols = 1,
                         .parts = 1};
    return true;
}

/* The matrices of s that are in the piece. */
static void cut_matrices(const gpt_segment *s, gpt_segment *piece) {
    int64_t at = s->grad, end = piece->grad + piece->size;
    piece->cols = s->cols, piece->rows = (int)(piece->size / s->cols);
    for (int k = 0; k < s->n_matrices; at += (int64_t)s->matrix_rows[k++] * s->cols)
        if (at >= piece->grad && at < end)
            piece->matrix_rows[piece->n_matrices++] = s->matrix_rows[k];
}

static int64_t take(params_layout *l, int optimizer, int64_t n) {
    int64_t at = l->n_states[optimizer];
    int64_t unit = state_unit(l);
    l->n_states[optimizer] += (n + unit - 1) / unit * unit;
    return at;
}

/* What the own piece of a range updates, and the places of its state. */
static void lay_out_piece(params_layout *l, const int64_t *bounds) {
    for (const gpt_segment *s = l->segments; s < l->segments + l->n_slots; s++) {
        gpt_segment *piece = &l->shard_segments[l->n_shard_segments];
        if (!cut(s, bounds[l->shard], bounds[l->shard + 1], piece)) continue;
        if (s->optimizer == GPT_OPTIMIZER_MUON) cut_matrices(s, piece);
        piece->state = take(l, s->optimizer, piece->size);
        if (s->row_state) piece->row_state = take(l, s->optimizer, piece->rows);
        l->n_shard_segments++;
    }
}

int shard_lay_out(const gpt_options *o, params_layout *layout) {
    layout->n_shards = o->n_shards, layout->shard = o->shard;
    if (!is_sharded(layout)) return GPT_OK;
    TRY(find_ranges(layout));
    TRY(cut_ranges(layout));
    /* The pieces of a range cut one segment at their begin, and one at their end. */
    size_t n = (size_t)layout->n_slots + 2 * (size_t)layout->n_shard_ranges;
    layout->shard_segments = calloc(n, sizeof *layout->shard_segments);
    if (!layout->shard_segments) return fail(GPT_ERR_MEMORY, "no memory for the parameter table");
    memset(layout->n_states, 0, sizeof layout->n_states);
    for (int i = 0; i < layout->n_shard_ranges; i++)
        lay_out_piece(layout, shard_bounds_of(layout, i));
    return GPT_OK;
}

void shard_layout_free(params_layout *layout) {
    free(layout->shard_ranges);
    free(layout->shard_bounds);
    free(layout->shard_blocks);
    free(layout->shard_squares);
    free(layout->shard_segments);
}

/* ---- numbers ---- */

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

/* Whether slot k has a number for each row. */
static bool is_of_rows(const gpt_segment *s, int k) {
    return k == 1 && s->row_state;
}

/* Where the state of a piece is: in the slot of the whole parameter, and in the buffer of its slot. */
typedef struct piece_state {
    int64_t first, n; /* n 0: it has none of it */
    int slot;
    int64_t at;
} piece_state;

static piece_state state_of(const gpt_model *m, int i, int k, int64_t n, const gpt_segment *piece) {
    const gpt_segment *s = &m->layout.segments[i];
    int64_t first = piece->offset - s->offset;
    if (first < 0 || first >= s->size) return (piece_state){0};
    if (is_of_rows(s, k)) return (piece_state){first / s->cols, piece->rows, 0, piece->row_state};
    /* Less than all where there are rows of padding. */
    return (piece_state){first, most(least(piece->size, n - first), 0), k, piece->state};
}

void shard_state_get(gpt_model *m, int i, int k, float *out, int64_t n) {
    const params_layout *l = &m->layout;
    for (int p = 0; p < l->n_shard_segments; p++) {
        piece_state own = state_of(m, i, k, n, &l->shard_segments[p]);
        if (own.n)
            state_read(m, l->segments[i].optimizer, own.slot, own.at, own.n, out + own.first);
    }
}

void shard_state_set(gpt_model *m, int i, int k, const float *values, int64_t n) {
    const params_layout *l = &m->layout;
    for (int p = 0; p < l->n_shard_segments; p++) {
        piece_state own = state_of(m, i, k, n, &l->shard_segments[p]);
        if (own.n)
            state_write(m, l->segments[i].optimizer, own.slot, own.at, own.n, values + own.first);
    }
}

void shard_state_bounds(const params_layout *layout, int i, int param, int k, int64_t n,
                        int64_t *bounds) {
    const gpt_segment *s = &layout->segments[param];
    for (int r = 0; r <= layout->n_shards; r++) {
        int64_t at = most(shard_bounds_of(layout, i)[r] - s->grad, 0);
        bounds[r] = least(is_of_rows(s, k) ? at / s->cols : at, n);
    }
}
