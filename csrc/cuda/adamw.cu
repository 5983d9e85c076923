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
    int32_t decay;
} adamw_segment;

/* In one launch: as many as a kernel's arguments hold. */
enum { MAX_SEGMENTS = 512 };

size_t cuda_adamw_workspace(const gpt_shape *shape) {
    (void)shape;
    return align_up(sizeof(double) * MAX_NORM_BLOCKS);
}

/* ---- gradient norm ---- */

/* The sum over the block's threads, in thread 0. */
static __device__ inline double block_sum(double x) {
    double *sums = shared_memory<double>(); /* (THREADS) */
    sums[threadIdx.x] = x;
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];
}

static __global__ void grad_norm_kernel(double *sums /* (blocks) */, const float *grads,
                                        int64_t n) {
    double sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * THREADS)
        sum += (double)grads[i] * grads[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

static __global__ void grad_norm_end_kernel(float *norm, const double *sums, int n) {
    double sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) sum += sums[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

void cuda_grad_norm(gpt_ctx *ctx, float *norm, const float *grads, int64_t n) {
    double *sums = (double *)ctx->workspace;
    size_t shared_bytes = sizeof(double) * THREADS;
    int blocks = (int)least<int64_t>(div_up(n, PIECE), MAX_NORM_BLOCKS);
    launch(ctx, grad_norm_kernel, dim3((unsigned)blocks), THREADS, shared_bytes, sums, grads, n);
    launch(ctx, grad_norm_end_kernel, dim3(1), THREADS, shared_bytes, norm, (const double *)sums,
           blocks);
}

/* ---- update ---- */

typedef struct adamw_args {
    float *w, *m, *v;
    const float *grads, *norm;
    float lr, beta1, beta2, eps, weight_decay, grad_clip;
    float correct1, correct2; /* 1 - beta^step */
    int n_segments;
    adamw_segment segments[MAX_SEGMENTS];
} adamw_args;

/* Loshchilov and Hutter 2019, algorithm 2. */
static __device__ inline void adamw_number(const adamw_args &a, int64_t i, float clip, float decay,
                                           elem *packed) {
    float g = clip * a.grads[i];
    float m = a.beta1 * a.m[i] + (1 - a.beta1) * g;
    float v = a.beta2 * a.v[i] + (1 - a.beta2) * g * g;
    float direction = m / a.correct1 / (sqrtf(v / a.correct2) + a.eps);
    float w = a.w[i] - a.lr * (direction + decay * a.w[i]);
    a.m[i] = m;
    a.v[i] = v;
    a.w[i] = w;
    if (packed) *packed = from_float<elem>(w);
}

static __global__ void adamw_update_kernel(const __grid_constant__ adamw_args a) {
    float norm = *a.norm, clip = 1;
    if (!isfinite(norm)) return;
    if (a.grad_clip > 0) clip = fminf(1.0f, a.grad_clip / (norm + 1e-6f));
    int piece = (int)blockIdx.x, s = 0, end = a.n_segments;
    while (end - s > 1) { /* the last segment that starts at or before this piece */
        int middle = (s + end) / 2;
        if (a.segments[middle].first_piece <= piece)
            s = middle;
        else
            end = middle;
    }
    const adamw_segment &segment = a.segments[s];
    float decay = segment.decay ? a.weight_decay : 0;
    int64_t first = (int64_t)(piece - segment.first_piece) * PIECE;
    int64_t last = least<int64_t>(first + PIECE, segment.size);
    for (int64_t i = first + threadIdx.x; i < last; i += THREADS)
        adamw_number(a, segment.offset + i, clip, decay,
                     segment.packed ? segment.packed + i : NULL);
}

void cuda_adamw_update(gpt_ctx *ctx, float *w, float *m, float *v, const float *grads,
                       const float *norm, gpt_adamw adamw, int64_t step,
                       const gpt_segment *segments, int n_segments) {
    adamw_args a = {w,
                    m,
                    v,
                    grads,
                    norm,
                    adamw.lr,
                    adamw.beta1,
                    adamw.beta2,
                    adamw.eps,
                    adamw.weight_decay,
                    adamw.grad_clip,
                    (float)(1 - pow((double)adamw.beta1, (double)step)),
                    (float)(1 - pow((double)adamw.beta2, (double)step)),
                    0,
                    {}};
    /* The table is a kernel's argument, which a launch copies: nothing to allocate or to wait for. */
    for (int first = 0; first < n_segments; first += MAX_SEGMENTS) {
        int pieces = 0;
        a.n_segments = least<int>(MAX_SEGMENTS, n_segments - first);
        for (int i = 0; i < a.n_segments; i++) {
            const gpt_segment *s = &segments[first + i];
            a.segments[i] = {s->offset, s->size, (elem *)s->packed, pieces, s->decay};
            pieces += (int)div_up(s->size, PIECE);
        }
        launch(ctx, adamw_update_kernel, dim3((unsigned)pieces), THREADS, 0, a);
    }
}
