/* classifier.cu: the output head fused with softmax cross-entropy, over chunks of rows: a chunk's logits
 * become its gradient in place. */
#include "columns.h"
#include "instructions.h"
#include "weights.h"

/* Twice these threads are what a multiprocessor of every kind has room for. */
#ifndef CLASSIFIER_THREADS
#define CLASSIFIER_THREADS 768
#endif
enum {
    THREADS = CLASSIFIER_THREADS,
    WARPS = THREADS / WARP,
    TOTAL_THREADS = 1024,
    MIN_CHUNK_ROWS = 128
};
/* Larger chunks read and write dwte less often; smaller ones need less workspace. With GPT-2's
 * vocabulary in bf16 this is 44 tiles of 128 rows: with 3 of 256 columns, for dx, as many as a large GPU
 * has multiprocessors. */
#ifndef CHUNK_BYTES
#define CHUNK_BYTES ((size_t)544 << 20)
#endif

/* The most rows that a chunk has of N or more. */
static int most_chunk_rows(int N, int Vp) {
    int rows = (int)least<size_t>(CHUNK_BYTES / (sizeof(elem) * (size_t)Vp), (size_t)1 << 30);
    return least(N, most(rows / MIN_CHUNK_ROWS, 1) * MIN_CHUNK_ROWS);
}

/* As few chunks as that allows, of nearly equal size. */
static int chunk_rows(int N, int Vp) {
    int64_t n_chunks = div_up(N, most_chunk_rows(N, Vp));
    return (int)least<int64_t>(N, div_up(div_up(N, n_chunks), MIN_CHUNK_ROWS) * MIN_CHUNK_ROWS);
}

static size_t logits_bytes(int N, int Vp) {
    return align_up(sizeof(elem) * (size_t)most_chunk_rows(N, Vp) * (size_t)Vp);
}

/* Logits, quantized weights as bf16 again, all of them for gradients, and sums of the gradient of biases. */
CUDA_WORKSPACE(classifier_workspace) {
    size_t numbers =
        shape->training ? weight_numbers(shape->Vp, shape->C) : slab_numbers(shape->Vp, shape->C);
    size_t sums = shape->training && shape->head_bias ? column_bytes(1, shape->Vp) : 0;
    return logits_bytes(shape->N, shape->Vp) + align_up(sizeof(elem) * numbers) + sums;
}

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
    size_t states = PLACE == ROW_OF_WARP ? 0 : sizeof(softmax_state) * WARPS;
    return states + (PLACE == ROW_IN_SHARED ? sizeof(elem) * (size_t)Vp : 0);
}

typedef struct classifier_args {
    float *losses; /* (n) = */
    elem *logits;  /* (n, Vp); with gradient they become that (ops.h has the formula), and 0 in
                               the padding */
    const int32_t *targets; /* (n) */
    const float *weights;   /* (n) or NULL */
    float scale, label_smoothing, z_loss;
    float cap;      /* 0: none */
    const float *b; /* (Vp) or NULL */
    int gradient, n, V, Vp;
} classifier_args;

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
static __global__ void __launch_bounds__(THREADS, 2) classifier_kernel(classifier_args a) {
    const int LANES = PLACE == ROW_OF_WARP ? (int)WARP : (int)THREADS, STRIDE = LANES * W;
    int thread = (int)threadIdx.x, lane = thread % LANES;
    int row = (int)blockIdx.x * (THREADS / LANES) + thread / LANES, V = a.V;
    if (row >= a.n) return;
    int target = a.targets[row];
    elem *out = a.logits + (int64_t)row * a.Vp;
    const elem *x = out;
    softmax_state *warps = shared_memory<softmax_state>(); /* (WARPS) */
    float hot = lane == 0 && target >= 0 ? to_float(x[target]) : 0;
    if (CHANGED && target >= 0) hot = changed(hot, a, target);
    if (PLACE == ROW_IN_SHARED) {
        elem *copy = (elem *)(warps + WARPS); /* (Vp), of which each thread reads what it wrote */
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
        s = merge_warp(thread % WARP < WARPS ? warps[thread % WARP] : none);
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
    int rows = PLACE == ROW_OF_WARP ? (int)WARPS : 1;
    bool is_changed = a.b || a.cap > 0;
    launch(ctx, is_changed ? classifier_kernel<true, W, PLACE> : classifier_kernel<false, W, PLACE>,
           dim3((unsigned)div_up(a.n, rows)), THREADS, classifier_shared_bytes<PLACE>(a.Vp), a);
}

static void losses_of_logits(gpt_ctx *ctx, const classifier_args &a) {
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

/* Without dx: the losses alone. */
static void classifier(gpt_ctx *ctx, const classifier_backward *op, int exact) {
    int N = op->N, C = op->C, V = op->V, Vp = op->Vp;
    const elem *x = (const elem *)op->x;
    elem *dx = (elem *)op->dx;
    elem *logits = (elem *)ctx->workspace;
    elem *room = (elem *)((char *)logits + logits_bytes(N, Vp));
    float *sums = (float *)((char *)room + align_up(sizeof(elem) * weight_numbers(Vp, C)));
    const void *wte = dx ? whole_weight(ctx, op->wte, room, Vp, C) : op->wte;
    int rows = chunk_rows(N, Vp);
    for (int row = 0; row < N; row += rows) {
        int n = least(rows, N - row);
        const elem *x_chunk = x + (int64_t)row * C;
        product head = {.kind = PRODUCT_NT,
                        .bf16 = IS_BF16,
                        .M = n,
                        .N = Vp,
                        .K = C,
                        .lda = C,
                        .ldb = C,
                        .ldo = Vp,
                        .out = logits,
                        .a = x_chunk,
                        .b = wte};
        if (dx)
            weight_product(ctx, &head, room, 1);
        else
            slab_product(ctx, &head, room, exact);
        const float *weights = op->weights ? op->weights + row : NULL;
        losses_of_logits(ctx,
                         {op->losses + row, logits, op->targets + row, weights, op->scale,
                          op->label_smoothing, op->z_loss, op->cap, op->b, dx != NULL, n, V, Vp});
        if (!dx) continue;
        product dinput = {.kind = PRODUCT_NN,
                          .bf16 = IS_BF16,
                          .M = n,
                          .N = C,
                          .K = Vp,
                          .lda = Vp,
                          .ldb = C,
                          .ldo = C,
                          .out = dx + (int64_t)row * C,
                          .a = logits,
                          .b = wte};
        cuda_product(ctx, &dinput);
        /* All Vp rows, whose padding receives zeros: with V the library chooses a slower product. */
        product dweight = {.kind = PRODUCT_TN,
                           .bf16 = IS_BF16,
                           .float_out = 1,
                           .add = op->add || row > 0,
                           .M = Vp,
                           .N = C,
                           .K = n,
                           .lda = Vp,
                           .ldb = C,
                           .ldo = C,
                           .out = op->dwte,
                           .a = logits,
                           .b = x_chunk};
        if (op->dwte) cuda_product(ctx, &dweight);
        if (op->db) sum_columns(ctx, op->db, sums, logits, n, Vp);
    }
}

CUDA_OP(classifier_forward) {
    classifier_backward losses = {};
    losses.losses = op->losses;
    losses.x = op->x;
    losses.wte = op->wte;
    losses.targets = op->targets;
    losses.cap = op->cap;
    losses.b = op->b;
    losses.N = op->N;
    losses.C = op->C;
    losses.V = op->V;
    losses.Vp = op->Vp;
    classifier(ctx, &losses, op->exact);
}

CUDA_OP(classifier_backward) {
    classifier(ctx, op, 1);
    launch(ctx, total_kernel, dim3(1), TOTAL_THREADS, sizeof(double) * TOTAL_THREADS, op->total,
           (const float *)op->losses, op->weights, op->scale, op->add, op->N);
}
