/* losses.cu: softmax cross-entropy of logits, which become its gradient in place. */
#include "instructions.h"
#include "losses.h"

/* Twice these threads are what a multiprocessor of every kind has room for. */
#ifndef CLASSIFIER_THREADS
#define CLASSIFIER_THREADS 768
#endif
enum { LOSS_THREADS = CLASSIFIER_THREADS, LOSS_WARPS = LOSS_THREADS / WARP, TOTAL_THREADS = 1024 };

/* e to the x, for x up to 0: within 1e-6 of the largest. */
static __device__ inline float exp_of(float x) {
    return exp2_of(x * LOG2E);
}

/* A running maximum, and the sum of exponentials relative to it. */
typedef struct softmax_state {
    float max, sum;
} softmax_state;

static __device__ inline softmax_state merge(softmax_state a, softmax_state b) {
    float max = fmaxf(a.max, b.max);
    softmax_state none = {-INFINITY, a.sum + b.sum}; /* nothing seen, or only NaN */
    if (max == -INFINITY) return none;
    softmax_state both = {max, a.sum * exp_of(a.max - max) + b.sum * exp_of(b.max - max)};
    return both;
}

static __device__ inline softmax_state merge_warp(softmax_state s) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        softmax_state other = {__shfl_xor_sync(~0u, s.max, offset),
                               __shfl_xor_sync(~0u, s.sum, offset)};
        /* Both lanes of a pair merge in the same order, so that all end with the same bits. */
        s = threadIdx.x & (unsigned)offset ? merge(other, s) : merge(s, other);
    }
    return s;
}

/* Where a kernel finds a row the second time it reads it. */
enum row_place {
    ROW_IN_CACHE,  /* in the cache, or past it: a block a row, of any length */
    ROW_IN_SHARED, /* in shared memory: a block a row */
    ROW_OF_WARP,   /* in the cache: a warp a row, which is short */
};
/* Logits of a row of a warp; and bytes of shared memory that a block of every device may have, from
 * compute capability 8.0 on. */
enum { WARP_LOGITS = 1024, MOST_SHARED_BYTES = 99 << 10 };

template <row_place PLACE> static inline size_t classifier_shared_bytes(int Vp) {
    size_t states = PLACE == ROW_OF_WARP ? 0 : sizeof(softmax_state) * LOSS_WARPS;
    return states + (PLACE == ROW_IN_SHARED ? sizeof(elem) * (size_t)Vp : 0);
}

/* The maximum of W logits from v on and of those before, and the sum. */
template <int W> static __device__ inline void softmax_add(softmax_state *s, float (&y)[W]) {
    float biggest = s->max;
#pragma unroll
    for (int k = 0; k < W; k++) biggest = fmaxf(biggest, y[k]);
    float sum = s->max == -INFINITY ? 0 : s->sum * exp_of(s->max - biggest);
#pragma unroll
    for (int k = 0; k < W; k++) sum += exp_of(y[k] - biggest);
    s->max = biggest;
    s->sum = sum;
}

/* The logit of token v from its product. */
static __device__ inline float changed(float x, const classifier_args &a, int v) {
    if (a.b) x += a.b[v];
    return a.cap > 0 ? a.cap * tanhf(x / a.cap) : x;
}

/* The logits from V on take no part: their exponentials are 0. */
template <bool CHANGED, int W>
static __device__ inline void load_logits(float (&y)[W], const elem *x, int v,
                                          const classifier_args &a) {
    load(y, x + v);
    if (CHANGED)
#pragma unroll
        for (int k = 0; k < W; k++) y[k] = changed(y[k], a, v + k);
    if (v + W <= a.V) return;
#pragma unroll
    for (int k = 0; k < W; k++)
        if (v + k >= a.V) y[k] = -INFINITY;
}

/* Biases and soft caps have kernels of their own, since they take registers. */
template <bool CHANGED, int W, row_place PLACE>
static __global__ void __launch_bounds__(LOSS_THREADS, 2) classifier_kernel(classifier_args a) {
    const int LANES = PLACE == ROW_OF_WARP ? (int)WARP : (int)LOSS_THREADS, STRIDE = LANES * W;
    int thread = (int)threadIdx.x, lane = thread % LANES;
    int row = (int)blockIdx.x * (LOSS_THREADS / LANES) + thread / LANES, V = a.V;
    if (row >= a.n) return;
    int target = a.targets[row];
    elem *out = a.logits + (int64_t)row * a.Vp;
    const elem *x = out;
    softmax_state *warps = shared_memory<softmax_state>(); /* (LOSS_WARPS) */
    float hot = lane == 0 && target >= 0 ? to_float(x[target]) : 0;
    if (CHANGED && target >= 0) hot = changed(hot, a, target);
    if (PLACE == ROW_IN_SHARED) {
        elem *copy =
            (elem *)(warps + LOSS_WARPS); /* (Vp), of which each thread reads what it wrote */
        for (int v = lane * W; v < V; v += STRIDE) copy_async(copy + v, x + v, true);
        copy_wait();
        x = copy;
    }
    softmax_state s = {-INFINITY, 0};
    float y[W];
    for (int v = lane * W; v < V; v += STRIDE) {
        load_logits<CHANGED>(y, x, v, a);
        softmax_add(&s, y);
    }
    s = merge_warp(s);
    if (PLACE == ROW_OF_WARP) {
        __syncwarp(); /* lane 0 has read its logit */
    } else {
        if (thread % WARP == 0) warps[thread / WARP] = s;
        __syncthreads();
        softmax_state none = {-INFINITY, 0};
        s = merge_warp(thread % WARP < LOSS_WARPS ? warps[thread % WARP] : none);
    }
    float log_sum = s.max + logf(s.sum);
    if (lane == 0) a.losses[row] = target < 0 ? 0 : log_sum - hot;
    if (!a.gradient) return;
    float scale = a.weights ? a.scale * a.weights[row] : a.scale;
    float factor = scale * (1 + 2 * a.z_loss * log_sum) / s.sum;
    float smoothed = scale * a.label_smoothing, everywhere = smoothed / (float)V;
    for (int v = lane * W; v < a.Vp; v += STRIDE) {
#pragma unroll
        for (int k = 0; k < W; k++) y[k] = 0;
        if (target >= 0 && v < V) {
            load_logits<CHANGED>(y, x, v, a);
#pragma unroll
            for (int k = 0; k < W; k++) {
                float t = CHANGED && a.cap > 0 ? y[k] / a.cap : 0;
                float dz = exp_of(y[k] - s.max) * factor - everywhere;
                if (CHANGED && v + k == target) dz -= scale - smoothed;
                y[k] = v + k < V ? dz * (1 - t * t) : 0;
            }
            if (!CHANGED && target >= v && target < v + W)
#pragma unroll
                for (int k = 0; k < W; k++)
                    if (v + k == target) y[k] -= scale - smoothed;
        }
        store(out + v, y);
    }
}

template <int W, row_place PLACE>
static void launch_classifier(gpt_ctx *ctx, const classifier_args &a) {
    int rows = PLACE == ROW_OF_WARP ? (int)LOSS_WARPS : 1;
    bool is_changed = a.b || a.cap > 0;
    launch(ctx, is_changed ? classifier_kernel<true, W, PLACE> : classifier_kernel<false, W, PLACE>,
           dim3((unsigned)div_up(a.n, rows)), LOSS_THREADS, classifier_shared_bytes<PLACE>(a.Vp),
           a);
}

void cuda_losses(gpt_ctx *ctx, const classifier_args &a) {
    if (a.Vp % PACK)
        launch_classifier<1, ROW_IN_CACHE>(ctx, a);
    else if (a.Vp <= WARP_LOGITS)
        launch_classifier<PACK, ROW_OF_WARP>(ctx, a);
    else if (classifier_shared_bytes<ROW_IN_SHARED>(a.Vp) <= MOST_SHARED_BYTES)
        launch_classifier<PACK, ROW_IN_SHARED>(ctx, a);
    else
        launch_classifier<PACK, ROW_IN_CACHE>(ctx, a);
}

/* One block. */
static __global__ void total_kernel(float *total, const float *losses, const float *weights,
                                    float scale, int add, int N) {
    double sum = 0;
    for (int n = (int)threadIdx.x; n < N; n += TOTAL_THREADS)
        sum += weights ? (double)weights[n] * losses[n] : losses[n];
    sum = block_sum<TOTAL_THREADS>(sum);
    if (threadIdx.x == 0) *total = (float)((add ? *total : 0) + scale * sum);
}

void cuda_total_losses(gpt_ctx *ctx, float *total, const float *losses, const float *weights,
                       float scale, int add, int N) {
    launch(ctx, total_kernel, dim3(1), TOTAL_THREADS, sizeof(double) * TOTAL_THREADS, total, losses,
           weights, scale, add, N);
}
