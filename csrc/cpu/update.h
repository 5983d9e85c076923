/* update.h: one pass of an optimizer over its segments, which also packs them. */
#ifndef CPU_UPDATE_H
#define CPU_UPDATE_H

#include "weights.h"

/* Updates `size` numbers of a segment from `first` on. */
typedef void update_run_fn(const void *rule, const gpt_segment *s, int64_t first, int size);

typedef struct update_task {
    int kind; /* enum gpt_optimizer_kind: whose segments */
    update_run_fn *run;
    const void *rule;
    float *w;
    const gpt_segment *segments;
    int n_segments;
    int unit; /* numbers from a multiple of this power of two on are updated together */
} update_task;

/* Strips of rows of a piece where the strip is packed in passing: as few as have whole units. */
static int64_t update_strips(const update_task *t, const gpt_segment *s) {
    int64_t n = 1;
    while ((int64_t)STRIP * s->cols * n % t->unit) n *= 2;
    return n;
}

/* Pieces of a segment: blocks of numbers, or strips. */
static int64_t update_piece_size(const update_task *t, const gpt_segment *s) {
    return cpu_strips_are_whole(s) ? (int64_t)STRIP * s->cols * update_strips(t, s) : 1 << 15;
}

static int64_t update_pieces(const update_task *t, const gpt_segment *s) {
    return s->optimizer == t->kind ? cpu_div_up(s->size, update_piece_size(t, s)) : 0;
}

static void update_piece(const update_task *t, const gpt_segment *s, int64_t piece) {
    int64_t size = update_piece_size(t, s), first = piece * size;
    int64_t n = s->size - first < size ? s->size - first : size;
    t->run(t->rule, s, first, (int)n);
    if (!cpu_strips_are_whole(s)) return;
    int64_t strip = first / ((int64_t)STRIP * s->cols), strips = n / ((int64_t)STRIP * s->cols);
    for (int64_t i = 0; i < strips; i++) cpu_pack_strip(s, t->w + s->offset, strip + i, 1);
}

/* Pieces begin to end - 1, counted through the segments. */
static void update_range(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const update_task *t = p;
    for (int i = 0; i < t->n_segments && end > 0; i++) {
        int64_t n = update_pieces(t, &t->segments[i]);
        for (int64_t piece = begin > 0 ? begin : 0; piece < n && piece < end; piece++)
            update_piece(t, &t->segments[i], piece);
        begin -= n;
        end -= n;
    }
}

static void update_segments(gpt_ctx *ctx, update_task t) {
    int64_t n = 0;
    for (int i = 0; i < t.n_segments; i++) n += update_pieces(&t, &t.segments[i]);
    cpu_parallel(ctx, update_range, &t, n, 2);
    for (const gpt_segment *s = t.segments; s < t.segments + t.n_segments; s++) {
        weights_pack pack = {.w = t.w + s->offset, .segment = s, .training = 1};
        if (s->optimizer == t.kind && s->packed && !cpu_strips_are_whole(s))
            CPU_NAME(weights_pack)(ctx, &pack);
    }
}

/* The factor of gradients that brings their norm down to clip; 0: no clipping. */
static inline float update_clip(float norm, float clip) {
    float scale = clip > 0 ? clip / (norm + 1e-6f) : 1;
    return scale < 1 ? scale : 1;
}

#endif
