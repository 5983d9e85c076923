/* adamw.cu: the gradient norm, and one update of all parameters in one launch, which also writes
 * them in the form that products read. */
#include "cuda.h"

#include <math.h>

enum { THREADS = 256, MAX_NORM_BLOCKS = 1024, PIECE = 4096 /* numbers a block updates */ };

/* A segment as the kernels see it. */
typedef struct adamw_segment {
    int64_t offset, size;
    elem *packed;
    int32_t first_piece; /* blocks of the segments before it */
    int16_t decay;
    int16_t aligned; /* PACK numbers may be read as one */
} adamw_segment;

/* In one launch: as many as a kernel's arguments hold. */
enum { MAX_SEGMENTS = 512 };

CUDA_WORKSPACE(adamw_workspace) {
    (void)shape;
    return align_up(sizeof(double) * MAX_NORM_BLOCKS);
}

/* ---- gradient norm ---- */

static __global__ void grad_norm_kernel(double *sums /* (blocks) */, grad_norm a) {
    const float *grads = a.grads;
    int64_t n = a.n;
    enum { W = 16 / sizeof(float) };
    int64_t thread = (int64_t)blockIdx.x * THREADS + threadIdx.x, whole = n / W * W;
    int64_t step = (int64_t)gridDim.x * THREADS;
    double sum = 0;
    for (int64_t i = thread * W; i < whole; i += step * W) {
        float g[W];
        load(g, grads + i);
#pragma unroll
        for (int k = 0; k < W; k++) sum += (double)g[k] * g[k];
    }
    for (int64_t i = whole + thread; i < n; i += step) sum += (double)grads[i] * grads[i];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

static __global__ void grad_norm_end_kernel(float *norm, const double *sums, int n) {
    double sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) sum += sums[i];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

CUDA_OP(grad_norm) {
    double *sums = (double *)ctx->workspace;
    size_t shared_bytes = sizeof(double) * THREADS;
    int blocks = (int)least<int64_t>(div_up(op->n, PIECE), MAX_NORM_BLOCKS);
    launch(ctx, grad_norm_kernel, dim3((unsigned)blocks), THREADS, shared_bytes, sums, *op);
    launch(ctx, grad_norm_end_kernel, dim3(1), THREADS, shared_bytes, op->norm,
           (const double *)sums, blocks);
}

/* ---- update ---- */

typedef struct adamw_args {
    adamw_update op; /* segments are those below: op's are on the host */
    int n_segments;
    adamw_segment segments[MAX_SEGMENTS];
} adamw_args;

/* W numbers from i on: Loshchilov and Hutter 2019, algorithm 2. */
template <int W>
static __device__ inline void adamw_numbers(const adamw_args &a, const gpt_adamw_step &step,
                                            int64_t i, float clip, float decay, elem *packed) {
    const gpt_adamw &s = step.adamw;
    float w[W], m[W], v[W], g[W];
    load(w, a.op.w + i);
    load(m, a.op.m + i);
    load(v, a.op.v + i);
    load(g, a.op.grads + i);
#pragma unroll
    for (int k = 0; k < W; k++) {
        g[k] *= clip;
        m[k] = s.beta1 * m[k] + (1 - s.beta1) * g[k];
        v[k] = s.beta2 * v[k] + (1 - s.beta2) * g[k] * g[k];
        float direction = m[k] / step.correction1 / (sqrtf(v[k] / step.correction2) + s.eps);
        w[k] -= s.lr * (direction + decay * w[k]);
    }
    store(a.op.m + i, m);
    store(a.op.v + i, v);
    store(a.op.w + i, w);
    if (packed) store(packed, w);
}

static __global__ void adamw_update_kernel(const __grid_constant__ adamw_args a) {
    const gpt_adamw_step step = *a.op.step;
    float norm = *a.op.norm, clip = 1, most = step.adamw.grad_clip;
    if (!isfinite(norm)) return;
    if (most > 0) clip = fminf(1.0f, most / (norm + 1e-6f));
    int piece = (int)blockIdx.x, s = 0, end = a.n_segments;
    while (end - s > 1) { /* the last segment that starts at or before this piece */
        int middle = (s + end) / 2;
        if (a.segments[middle].first_piece <= piece)
            s = middle;
        else
            end = middle;
    }
    const adamw_segment &segment = a.segments[s];
    float decay = segment.decay ? step.adamw.weight_decay : 0;
    int64_t first = (int64_t)(piece - segment.first_piece) * PIECE;
    int64_t last = least<int64_t>(first + PIECE, segment.size);
    int64_t whole = segment.aligned ? last - (last - first) % PACK : first;
    elem *packed = segment.packed;
    const int stride = THREADS * (int)PACK;
    for (int64_t i = first + threadIdx.x * PACK; i < whole; i += stride)
        adamw_numbers<PACK>(a, step, segment.offset + i, clip, decay, packed ? packed + i : NULL);
    for (int64_t i = whole + threadIdx.x; i < last; i += THREADS)
        adamw_numbers<1>(a, step, segment.offset + i, clip, decay, packed ? packed + i : NULL);
}

CUDA_OP(adamw_update) {
    adamw_args a = {*op, 0, {}};
    /* The table is a kernel's argument, which a launch copies: nothing to allocate or to wait for. */
    for (int first = 0; first < op->n_segments; first += MAX_SEGMENTS) {
        int pieces = 0;
        a.n_segments = least<int>(MAX_SEGMENTS, op->n_segments - first);
        for (int i = 0; i < a.n_segments; i++) {
            const gpt_segment *s = &op->segments[first + i];
            a.segments[i] = {s->offset, s->size,           (elem *)s->packed,
                             pieces,    (int16_t)s->decay, s->offset % PACK == 0};
            pieces += (int)div_up(s->size, PIECE);
        }
        launch(ctx, adamw_update_kernel, dim3((unsigned)pieces), THREADS, 0, a);
    }
}
