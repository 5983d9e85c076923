/* classifier.cu: the output head fused with softmax cross-entropy, over chunks of rows: a chunk's logits
 * become its gradient in place. */
#include "weights.h"

enum { THREADS = 512, WARPS = THREADS / WARP, MIN_CHUNK_ROWS = 128 };
/* Larger chunks read and write dwte less often; smaller ones need less workspace. */
#define CHUNK_BYTES ((size_t)512 << 20)

static int chunk_rows(int N, int Vp) {
    int rows = (int)least<size_t>(CHUNK_BYTES / (sizeof(elem) * (size_t)Vp), (size_t)1 << 30);
    return least(N, most(rows / MIN_CHUNK_ROWS, 1) * MIN_CHUNK_ROWS);
}

static size_t logits_bytes(int N, int Vp) {
    return align_up(sizeof(elem) * (size_t)chunk_rows(N, Vp) * (size_t)Vp);
}

/* Logits, and quantized weights as bf16 again. */
CUDA_WORKSPACE(classifier_workspace) {
    return logits_bytes(shape->N, shape->Vp) +
           align_up(sizeof(elem) * weight_numbers(shape->Vp, shape->C));
}

/* A running maximum, and the sum of exponentials relative to it. */
typedef struct softmax_state {
    float max, sum;
} softmax_state;

static __device__ inline softmax_state merge(softmax_state a, softmax_state b) {
    float max = fmaxf(a.max, b.max);
    softmax_state none = {-INFINITY, a.sum + b.sum}; /* nothing seen, or only NaN */
    if (max == -INFINITY) return none;
    softmax_state both = {max, a.sum * expf(a.max - max) + b.sum * expf(b.max - max)};
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

/* A block a row. gradient: logits become scale (softmax - onehot), and 0 in the padding. */
template <int W>
static __global__ void classifier_kernel(float *losses, elem *logits /* (n, Vp) */,
                                         const int32_t *targets, float scale, int gradient, int V,
                                         int Vp) {
    int row = (int)blockIdx.x, target = targets[row], thread = (int)threadIdx.x;
    elem *x = logits + (int64_t)row * Vp;
    softmax_state *warps = shared_memory<softmax_state>(); /* (WARPS) */
    softmax_state s = {-INFINITY, 0};
    for (int v = thread * W; v < V; v += THREADS * W) {
        float y[W], biggest = s.max;
        load(y, x + v);
#pragma unroll
        for (int k = 0; k < W; k++)
            if (v + k < V) biggest = fmaxf(biggest, y[k]);
        float sum = s.max == -INFINITY ? 0 : s.sum * expf(s.max - biggest);
#pragma unroll
        for (int k = 0; k < W; k++)
            if (v + k < V) sum += expf(y[k] - biggest);
        s.max = biggest;
        s.sum = sum;
    }
    s = merge_warp(s);
    if (thread % WARP == 0) warps[thread / WARP] = s;
    __syncthreads();
    s = warps[0];
    for (int w = 1; w < WARPS; w++) s = merge(s, warps[w]);
    if (thread == 0) losses[row] = target < 0 ? 0 : s.max + logf(s.sum) - to_float(x[target]);
    if (!gradient) return;
    __syncthreads(); /* thread 0 has read its logit */
    float factor = target < 0 ? 0 : scale / s.sum;
    for (int v = thread * W; v < Vp; v += THREADS * W) {
        float y[W];
        load(y, x + v);
#pragma unroll
        for (int k = 0; k < W; k++) {
            float p = v + k < V && target >= 0 ? expf(y[k] - s.max) * factor : 0;
            y[k] = v + k == target ? p - scale : p;
        }
        store(x + v, y);
    }
}

/* One block. */
static __global__ void total_kernel(float *total, const float *losses, float scale, int add,
                                    int N) {
    double sum = 0;
    for (int n = (int)threadIdx.x; n < N; n += THREADS) sum += losses[n];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) *total = (float)((add ? *total : 0) + scale * sum);
}

/* Without dx: the losses alone. */
static void classifier(gpt_ctx *ctx, const classifier_backward *op) {
    int N = op->N, C = op->C, V = op->V, Vp = op->Vp;
    const elem *x = (const elem *)op->x, *wte = (const elem *)op->wte;
    elem *dx = (elem *)op->dx;
    elem *logits = (elem *)ctx->workspace;
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
        weight_product(ctx, &head, (elem *)((char *)logits + logits_bytes(N, Vp)));
        launch(ctx, Vp % PACK == 0 ? classifier_kernel<PACK> : classifier_kernel<1>,
               dim3((unsigned)n), THREADS, sizeof(softmax_state) * WARPS, op->losses + row, logits,
               op->targets + row, op->scale, dx != NULL, V, Vp);
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
    }
}

CUDA_OP(classifier_forward) {
    classifier_backward losses = {};
    losses.losses = op->losses;
    losses.x = op->x;
    losses.wte = op->wte;
    losses.targets = op->targets;
    losses.N = op->N;
    losses.C = op->C;
    losses.V = op->V;
    losses.Vp = op->Vp;
    classifier(ctx, &losses);
}

CUDA_OP(classifier_backward) {
    classifier(ctx, op);
    launch(ctx, total_kernel, dim3(1), THREADS, sizeof(double) * THREADS, op->total,
           (const float *)op->losses, op->scale, op->add, op->N);
}
