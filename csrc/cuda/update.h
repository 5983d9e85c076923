/* update.h: an optimizer's update of all its parameters in one launch, which also writes them in the form
 * that products read. */
#ifndef CUDA_UPDATE_H
#define CUDA_UPDATE_H

#include "cuda.h"

#include <math.h>
#include <type_traits>

enum { UPDATE_THREADS = 256, UPDATE_PIECE = 4096 /* numbers a block updates */ };

/* A segment as the kernels see it. */
typedef struct update_segment {
    int64_t offset, grad, state, size;
    elem *packed;
    float lr_scale;
    int32_t first_piece; /* blocks of the segments before it */
    int16_t decay;
    int16_t aligned; /* PACK numbers may be read as one */
} update_segment;

/* In one launch: as many as a kernel's arguments hold. */
#ifndef MAX_SEGMENTS
#define MAX_SEGMENTS 512
#endif

template <typename Op> struct update_args {
    Op op; /* its segments are those below: op's are on the host */
    int n_segments;
    update_segment segments[MAX_SEGMENTS];
};

/* The factor of gradients that brings their norm down to clip; 0: no clipping. */
static __device__ inline float update_clip(float norm, float clip) {
    return clip > 0 ? fminf(1.0f, clip / (norm + 1e-6f)) : 1;
}

/* Calls numbers(width, segment, i, packed) for all numbers of this block's piece: for width.value of them
 * from i on. */
template <typename Op, typename F>
static __device__ inline void update_numbers(const update_args<Op> &a, F numbers) {
    int piece = (int)blockIdx.x, s = 0, end = a.n_segments;
    while (end - s > 1) { /* the last segment that starts at or before this piece */
        int middle = (s + end) / 2;
        if (a.segments[middle].first_piece <= piece)
            s = middle;
        else
            end = middle;
    }
    const update_segment &segment = a.segments[s];
    int64_t first = (int64_t)(piece - segment.first_piece) * UPDATE_PIECE;
    int64_t last = least<int64_t>(first + UPDATE_PIECE, segment.size);
    int64_t whole = segment.aligned ? last - (last - first) % PACK : first;
    elem *packed = segment.packed;
    const int stride = UPDATE_THREADS * (int)PACK;
    for (int64_t i = first + threadIdx.x * PACK; i < whole; i += stride)
        numbers(std::integral_constant<int, PACK>{}, segment, i, packed ? packed + i : NULL);
    for (int64_t i = whole + threadIdx.x; i < last; i += UPDATE_THREADS)
        numbers(std::integral_constant<int, 1>{}, segment, i, packed ? packed + i : NULL);
}

/* Starts the kernel on the segments of this kind. The table is a kernel's argument, which a launch
 * copies: nothing to allocate or to wait for. */
template <typename Op>
static void launch_update(gpt_ctx *ctx, void (*kernel)(update_args<Op>), const Op &op, int kind) {
    update_args<Op> a = {op, 0, {}};
    int pieces = 0;
    for (int i = 0; i < op.n_segments; i++) {
        const gpt_segment *s = &op.segments[i];
        if (s->optimizer == kind) {
            int aligned = s->offset % PACK == 0 && s->grad % PACK == 0 && s->state % PACK == 0;
            a.segments[a.n_segments++] = {s->offset, s->grad,           s->state,
                                          s->size,   (elem *)s->packed, s->lr_scale,
                                          pieces,    (int16_t)s->decay, (int16_t)aligned};
            pieces += (int)div_up(s->size, UPDATE_PIECE);
        }
        if (a.n_segments == 0 || (a.n_segments < MAX_SEGMENTS && i + 1 < op.n_segments)) continue;
        launch(ctx, kernel, dim3((unsigned)pieces), UPDATE_THREADS, 0, a);
        a.n_segments = pieces = 0;
    }
}

#endif
