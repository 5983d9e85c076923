/* norm.cu: residual add, dropout of the branch, and LayerNorm or RMSNorm. In forward a warp has a row,
 * in registers unless it is long; then what it reads a second time is still in the cache. A few rows
 * have a block each. All add a row's channels in the same order, so that its bits do not depend on how
 * many rows there are: a lane's W neighbours, its sums in turn, then the lanes. */
#include "columns.h"
#include "instructions.h"

enum { NORM_THREADS = 256, NORM_WARPS = NORM_THREADS / WARP };

static inline dim3 row_grid(int N) {
    return dim3((unsigned)div_up(N, NORM_WARPS));
}

/* resid_out = resid + dropout(branch), W channels of it, as they are stored. */
template <int W>
static __device__ inline void add_branch(float (&x)[W], float (&branch)[W],
                                         const residual_norm_forward &a, gpt_dropout dropout,
                                         int64_t at) {
    if (dropout.p > 0)
#pragma unroll
        for (int k = 0; k < W; k++) branch[k] *= dropout_factor(dropout, (uint64_t)(at + k));
#pragma unroll
    for (int k = 0; k < W; k++) x[k] = to_float(from_float<elem>(x[k] + branch[k]));
    store((elem *)a.resid_out + at, x);
}

/* The sums that a lane adds to what it has: of W channels, and of their squared distances from mean. */
template <int W> static __device__ inline float sum_of(const float (&x)[W]) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < W; k++) sum += x[k];
    return sum;
}
template <int W> static __device__ inline float square_of(const float (&x)[W], float mean) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < W; k++) sum = fmaf(x[k] - mean, x[k] - mean, sum);
    return sum;
}

/* Of the sums over a row. RMSNorm has no mean. */
static __device__ inline float mean_of(float sum, const residual_norm_forward &a) {
    return a.norm == GPT_NORM_LAYERNORM ? sum / (float)a.C : 0;
}
static __device__ inline float rstd_of(float square, const residual_norm_forward &a) {
    return a.norm == NORM_NONE ? 1 : 1.0f / sqrtf(square / (float)a.C + a.eps);
}

/* W channels of the weight and the bias, from c on. */
template <int W>
static __device__ inline void load_affine(float (&w)[W], float (&b)[W],
                                          const residual_norm_forward &a, int c) {
#pragma unroll
    for (int k = 0; k < W; k++) w[k] = 1, b[k] = 0;
    if (a.w) load(w, a.w + c);
    if (a.b) load(b, a.b + c);
}

/* out = norm(x), W channels. Rounded alike wherever it is used. */
template <int W>
static __device__ inline void store_norm(elem *out, const float (&x)[W], const float (&w)[W],
                                         const float (&b)[W], float mean, float rstd) {
    float y[W];
#pragma unroll
    for (int k = 0; k < W; k++) y[k] = fmaf(__fmul_rn(x[k] - mean, rstd), w[k], b[k]);
    store(out, y);
}

static __device__ inline void keep_stats(const residual_norm_forward &a, int row, float mean,
                                         float rstd) {
    a.stats[2 * row] = mean;
    a.stats[2 * row + 1] = rstd;
}

/* The most channels of a row that a lane has in registers. */
enum { LANE_CHANNELS = 32 };

static __global__ void residual_norm_forward_kernel(residual_norm_forward a) {
    const int W = PACK, STEPS = LANE_CHANNELS / W, STRIDE = WARP * W;
    int row = (int)(blockIdx.x * NORM_WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    if (row >= a.N) return;
    int64_t start = (int64_t)row * a.C;
    const elem *resid = (const elem *)a.resid + start, *branch = (const elem *)a.branch + start;
    packed<elem, W> sum[STEPS], add[STEPS] = {};
    float x[W], y[W], w[W], b[W], mean = 0, square = 0;
    gpt_dropout dropout = dropout_at(a.dropout);
#pragma unroll
    for (int i = 0, c = lane * W; i < STEPS; i++, c += STRIDE) {
        if (c >= a.C) continue;
        sum[i] = *(const packed<elem, W> *)(resid + c);
        if (a.branch) add[i] = *(const packed<elem, W> *)(branch + c);
    }
#pragma unroll
    for (int i = 0, c = lane * W; i < STEPS; i++, c += STRIDE) {
        if (c >= a.C) continue;
        load(x, sum[i].x);
        load(y, add[i].x);
        if (a.branch) add_branch(x, y, a, dropout, start + c);
        mean += sum_of(x);
        store(sum[i].x, x);
    }
    mean = mean_of(warp_sum(mean), a);
#pragma unroll
    for (int i = 0, c = lane * W; i < STEPS; i++, c += STRIDE) {
        if (c >= a.C) continue;
        load(x, sum[i].x);
        square += square_of(x, mean);
    }
    float rstd = rstd_of(warp_sum(square), a);
#pragma unroll
    for (int i = 0, c = lane * W; i < STEPS; i++, c += STRIDE) {
        if (c >= a.C) continue;
        load(x, sum[i].x);
        load_affine(w, b, a, c);
        store_norm((elem *)a.out + start + c, x, w, b, mean, rstd);
    }
    if (a.stats && lane == 0) keep_stats(a, row, mean, rstd);
}

template <int W> static __global__ void long_norm_forward_kernel(residual_norm_forward a) {
    int row = (int)(blockIdx.x * NORM_WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    if (row >= a.N) return;
    int64_t start = (int64_t)row * a.C;
    const elem *resid = (const elem *)a.resid;
    const elem *sum = a.branch ? (const elem *)a.resid_out : resid;
    float x[W], branch[W], w[W], b[W], mean = 0, square = 0;
    gpt_dropout dropout = dropout_at(a.dropout);
    for (int c = lane * W; c < a.C; c += WARP * W) {
        load(x, resid + start + c);
        if (a.branch) {
            load(branch, (const elem *)a.branch + start + c);
            add_branch(x, branch, a, dropout, start + c);
        }
        mean += sum_of(x);
    }
    mean = mean_of(warp_sum(mean), a);
    for (int c = lane * W; c < a.C; c += WARP * W) {
        load(x, sum + start + c);
        square += square_of(x, mean);
    }
    float rstd = rstd_of(warp_sum(square), a);
    for (int c = lane * W; c < a.C; c += WARP * W) {
        load(x, sum + start + c);
        load_affine(w, b, a, c);
        store_norm((elem *)a.out + start + c, x, w, b, mean, rstd);
    }
    if (a.stats && lane == 0) keep_stats(a, row, mean, rstd);
}

/* ---- forward of a few rows ---- */

/* Rows of up to so many warps, each of whose lanes has PACK channels, have a block each where there are
 * so few that a large GPU runs all blocks at once. */
enum { MOST_BLOCK_WARPS = 16 };
#ifndef FEW_NORM_ROWS
#define FEW_NORM_ROWS 512
#endif

/* The sum over a block in each of its threads, in the order of a warp that has the row alone; room is
 * for as many floats. */
static __device__ inline float row_sum(float x, float *room) {
    float sum = 0;
    room[threadIdx.x] = x;
    __syncthreads();
    for (int i = (int)threadIdx.x % WARP; i < (int)blockDim.x; i += WARP) sum += room[i];
    return warp_sum(sum);
}

/* A block a row. Whatever it reads is on its way at once. */
static __global__ void __launch_bounds__(MOST_BLOCK_WARPS *WARP)
    few_norm_forward_kernel(residual_norm_forward a) {
    const int W = PACK;
    float *room = shared_memory<float>(); /* (2, threads) */
    int row = (int)blockIdx.x, c = (int)threadIdx.x * W;
    int64_t at = (int64_t)row * a.C + c;
    bool there = c < a.C;
    packed<elem, W> resid = {}, add = {};
    float x[W], branch[W], w[W] = {}, b[W] = {};
    gpt_dropout dropout = dropout_at(a.dropout);
    if (there) load_affine(w, b, a, c);
    take_turn();
    if (there) {
        resid = *(const packed<elem, W> *)((const elem *)a.resid + at);
        if (a.branch) add = *(const packed<elem, W> *)((const elem *)a.branch + at);
    }
    load(x, resid.x);
    load(branch, add.x);
    if (there && a.branch) add_branch(x, branch, a, dropout, at);
    float mean = mean_of(row_sum(sum_of(x), room), a);
    float square = there ? square_of(x, mean) : 0;
    float rstd = rstd_of(row_sum(square, room + blockDim.x), a);
    if (there) store_norm((elem *)a.out + at, x, w, b, mean, rstd);
    if (a.stats && threadIdx.x == 0) keep_stats(a, row, mean, rstd);
}

CUDA_OP(residual_norm_forward) {
    int n_warps = (int)div_up(op->C, WARP * (int)PACK);
    bool is_long = op->C > LANE_CHANNELS * (int)WARP;
    if (op->C % PACK == 0 && n_warps <= MOST_BLOCK_WARPS && op->N <= FEW_NORM_ROWS)
        launch_early(ctx, few_norm_forward_kernel, dim3((unsigned)op->N), n_warps * WARP,
                     2 * sizeof(float) * (size_t)(n_warps * WARP), *op);
    else
        launch(ctx,
               op->C % PACK ? long_norm_forward_kernel<1>
               : is_long    ? long_norm_forward_kernel<PACK>
                            : residual_norm_forward_kernel,
               row_grid(op->N), NORM_THREADS, 0, *op);
}

/* ---- backward ---- */

/* A block has a chunk of rows, and its threads sum their channels over all of them, so that everything
 * is read and written once. A warp has a row if that is up to MOST_STEPS packs for each lane. The
 * whole block has a longer one of up to a pack for each of MOST_ROW_WARPS warps' lanes. Yet longer
 * rows are read again. */
enum { ROW_WARPS = 4, ROW_THREADS = ROW_WARPS * WARP, MOST_STEPS = 4, MOST_ROW_WARPS = 16 };
enum { MOST_SUMS = 3 /* dw, db, dbias */ };

/* Chunks are as many as blocks fit on a large GPU, and the same on any other: so are then the sums. */
enum { WIDE_BLOCKS = 6 /* for each: of five warps in bf16, three at a time */, MIN_NORM_ROWS = 8 };

/* The same for rows of warps: the more sums a lane has in its registers, the fewer blocks fit, but
 * the more bytes each warp waits for: in bf16 30 KB or more on a multiprocessor. Dropout takes some
 * registers too. */
static constexpr int row_blocks(int steps, bool has_branch) {
    return steps < MOST_STEPS ? MOST_STEPS + 2 - steps - has_branch : 2;
}

/* The warps that a row takes at a pack for each lane, or the packs of each lane if one warp has it. */
static inline int row_warps(int C) {
    return (int)div_up(C, WARP * (int)PACK);
}
static inline int row_chunks(int N, int C, bool has_branch) {
    int n = row_warps(C), blocks = n <= MOST_STEPS ? row_blocks(n, has_branch) : WIDE_BLOCKS;
    return (int)least<int64_t>(div_up(N, MIN_NORM_ROWS), blocks * MULTIPROCESSORS);
}

CUDA_WORKSPACE(norm_workspace) {
    size_t C = (size_t)shape->C, sums = 0;
    if (!shape->training) return 0;
    if (row_warps(shape->C) <= MOST_ROW_WARPS)
        sums = MOST_SUMS * C * (size_t)row_chunks(shape->N, shape->C, false);
    return most(column_bytes(MOST_SUMS, shape->C), align_up(sizeof(float) * sums));
}

/* g = dout w and h = (x - mean) rstd of W channels, of which g holds dout and h holds x. g is rounded
 * before anything is subtracted from it: in a row of one channel g - mean(g) is to be 0. */
template <int W>
static __device__ inline void gradient_terms(float (&g)[W], float (&h)[W], const float (&w)[W],
                                             float mean, float rstd) {
#pragma unroll
    for (int k = 0; k < W; k++) {
        g[k] = __fmul_rn(g[k], w[k]);
        h[k] = (h[k] - mean) * rstd;
    }
}

/* The weights of W channels from c on, and zeros beyond the row. */
template <int W>
static __device__ inline void load_weights(float (&w)[W], const residual_norm_backward &a, int c) {
#pragma unroll
    for (int k = 0; k < W; k++) w[k] = c < a.C;
    if (a.w && c < a.C) load(w, a.w + c);
}

/* Stores W numbers, which then are what was stored: rounded in pairs, one instruction for two. */
template <int W> static __device__ inline void store_rounded(elem *to, float (&x)[W]) {
    packed<elem, W> p;
#pragma unroll
    for (int k = 0; k < W; k++) p.x[k] = from_float<elem>(x[k]);
#ifdef CUDA_BF16
#pragma unroll
    for (int k = 0; k + 1 < W; k += 2) {
        uint32_t pair = pair_of(x[k], x[k + 1]);
        memcpy(&p.x[k], &pair, sizeof pair);
    }
#endif
    *(packed<elem, W> *)to = p;
    load(x, p.x);
}

/* Stores dx of W channels, which is then the branch's, if there is another. */
template <int W>
static __device__ inline void store_gradient(float (&dx)[W], const residual_norm_backward &a,
                                             bool has_branch, gpt_dropout dropout, int64_t at) {
    store_rounded((elem *)a.dresid + at, dx);
    if (!has_branch) return;
#pragma unroll
    for (int k = 0; k < W; k++) dx[k] *= dropout_factor(dropout, (uint64_t)(at + k));
    store_rounded((elem *)a.dbranch + at, dx);
}

/* dx = dresid + rstd (g - mean(g) - h mean(g h)). RMSNorm has no mean(g) term. */
template <int W>
static __device__ inline void add_gradient(float (&dx)[W], const float (&g)[W], const float (&h)[W],
                                           float rstd, float mean_g, float mean_gh) {
#pragma unroll
    for (int k = 0; k < W; k++) dx[k] += rstd * (g[k] - mean_g - h[k] * mean_gh);
}

/* What a thread reads of a row. Threads beyond the row's end read its start, and have weights of 0. */
typedef struct row_piece {
    packed<elem, PACK> dout, resid, dresid;
    float mean, rstd;
} row_piece;

static __device__ inline row_piece load_piece(const residual_norm_backward &a, int row,
                                              int64_t at) {
    return {*(const packed<elem, PACK> *)((const elem *)a.dout + at),
            *(const packed<elem, PACK> *)((const elem *)a.resid + at),
            *(const packed<elem, PACK> *)((const elem *)a.dresid + at), a.stats[2 * row],
            a.stats[2 * row + 1]};
}

/* Adds a thread's channels of a row to the row's sums of g and of g h, and to the columns' sums. */
static __device__ inline void add_terms(float2 &sum, float (&dw)[PACK], float (&db)[PACK],
                                        const packed<elem, PACK> &dout, const float (&g)[PACK],
                                        const float (&h)[PACK]) {
    float d[PACK];
    load(d, dout.x);
#pragma unroll
    for (int k = 0; k < PACK; k++) {
        sum.x += g[k];
        sum.y += g[k] * h[k];
        dw[k] += d[k] * h[k];
        db[k] += d[k];
    }
}

/* Two of warp_sum, step by step. */
static __device__ inline float2 warp_sums(float2 x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        float2 other = {__shfl_xor_sync(~0u, x.x, offset), __shfl_xor_sync(~0u, x.y, offset)};
        x.x += other.x;
        x.y += other.y;
    }
    return x;
}

/* partial (n_chunks, S, C): the columns' sums of dout h, of dout and, with S = 3, of the branch's
 * gradient. All loads of a row are on their way at once, and other warps work meanwhile. */
template <int S, int STEPS, bool BRANCH>
static __global__ void __launch_bounds__(ROW_THREADS, row_blocks(STEPS, BRANCH))
    residual_norm_backward_kernel(float *partial, residual_norm_backward a) {
    const int W = PACK, STRIDE = WARP * W, WIDTH = STEPS * STRIDE;
    float *room = shared_memory<float>(); /* (ROW_WARPS, WIDTH); before that w (WIDTH) */
    int warp = (int)threadIdx.x / WARP, lane_c = (int)threadIdx.x % WARP * W;
    int rows = (int)div_up(a.N, gridDim.x), first = (int)blockIdx.x * rows;
    int end = least(first + rows, a.N);
    gpt_dropout dropout = dropout_at(a.dropout);
    float sums[STEPS][S][W] = {};
    for (int c = (int)threadIdx.x; c < WIDTH; c += ROW_THREADS)
        room[c] = c >= a.C ? 0 : a.w ? a.w[c] : 1;
    __syncthreads();
    float per_channel = a.norm == NORM_NONE ? 0 : 1.0f / (float)a.C; /* without, no means */
    bool layernorm = a.norm == GPT_NORM_LAYERNORM;
    int last = lane_c + (STEPS - 1) * STRIDE < a.C ? (STEPS - 1) * STRIDE : -lane_c;
    for (int row = first + warp; row < end; row += ROW_WARPS) {
        int64_t start = (int64_t)row * a.C + lane_c;
        row_piece p[STEPS];
        float w[W], g[W], h[STEPS][W], dx[STEPS][W];
        float2 sum = {};
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            p[i] = load_piece(a, row, start + (i < STEPS - 1 ? i * STRIDE : last));
        __syncwarp(); /* for the compiler: no load moves down, and no w up, to before the loop */
#pragma unroll
        for (int i = 0, c = lane_c; i < STEPS; i++, c += STRIDE) {
            load(w, room + c);
            load(g, p[i].dout.x);
            load(h[i], p[i].resid.x);
            load(dx[i], p[i].dresid.x);
            gradient_terms(g, h[i], w, p[0].mean, p[0].rstd);
            add_terms(sum, sums[i][0], sums[i][1], p[i].dout, g, h[i]);
#pragma unroll
            for (int k = 0; k < W; k++) dx[i][k] += p[0].rstd * g[k];
        }
        sum = warp_sums(sum);
        float scale = p[0].rstd * per_channel, mean_gh = sum.y * scale;
        float mean_g = layernorm ? sum.x * scale : 0; /* both times rstd, as is g in dx */
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (i == STEPS - 1 && last < 0) continue;
#pragma unroll
            for (int k = 0; k < W; k++) dx[i][k] -= h[i][k] * mean_gh + mean_g;
            store_gradient(dx[i], a, BRANCH, dropout, start + i * STRIDE);
            if (S == 3)
#pragma unroll
                for (int k = 0; k < W; k++) sums[i][S - 1][k] += dx[i][k];
        }
    }
#pragma unroll
    for (int s = 0; s < S; s++) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            store(room + warp * WIDTH + i * STRIDE + lane_c, sums[i][s]);
        __syncthreads();
        for (int c = (int)threadIdx.x; c < a.C; c += ROW_THREADS) {
            float total = 0;
            for (int k = 0; k < ROW_WARPS; k++) total += room[k * WIDTH + c];
            partial[((int64_t)blockIdx.x * S + s) * a.C + c] = total;
        }
    }
}

/* ---- backward of rows that a block has ---- */

/* The sum over a block in each of its threads; room (n_warps) is written before one barrier and read
 * after it, so that two in turn are enough. */
static __device__ inline float2 block_sums(float2 x, float2 *room, int n_warps) {
    float2 mine = warp_sums(x), sum = {};
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = mine;
    __syncthreads();
    for (int w = 0; w < n_warps; w++) {
        sum.x += room[w].x;
        sum.y += room[w].y;
    }
    return sum;
}

/* partial (n_chunks, S, C): as above. */
template <int S>
static __global__ void __launch_bounds__(MOST_ROW_WARPS *WARP)
    wide_norm_backward_kernel(float *partial, residual_norm_backward a) {
    enum { W = PACK };
    float2 *room = shared_memory<float2>(); /* (2, n_warps) */
    int n_warps = (int)blockDim.x / WARP, c = (int)threadIdx.x * W;
    int rows = (int)div_up(a.N, gridDim.x), first = (int)blockIdx.x * rows;
    int end = least(first + rows, a.N);
    gpt_dropout dropout = dropout_at(a.dropout);
    float w[W], sums[S][W] = {};
    load_weights(w, a, c);
    auto piece = [&](int row) {
        row = least(row, end - 1);
        return load_piece(a, row, (int64_t)row * a.C + (c < a.C ? c : 0));
    };
    row_piece next = piece(first);
    for (int row = first; row < end; row++) {
        row_piece p = next;
        next = piece(row + 1); /* on its way while this one is worked on */
        float g[W], h[W], dx[W];
        float2 sum = {};
        load(g, p.dout.x);
        load(h, p.resid.x);
        gradient_terms(g, h, w, p.mean, p.rstd);
        add_terms(sum, sums[0], sums[1], p.dout, g, h);
        sum = block_sums(sum, room + row % 2 * n_warps, n_warps);
        if (c >= a.C) continue;
        float mean_g = a.norm == GPT_NORM_LAYERNORM ? sum.x / (float)a.C : 0;
        load(dx, p.dresid.x);
        float mean_gh = a.norm == NORM_NONE ? 0 : sum.y / (float)a.C;
        add_gradient(dx, g, h, p.rstd, mean_g, mean_gh);
        store_gradient(dx, a, a.dbranch, dropout, (int64_t)row * a.C + c);
        if (S == 3)
#pragma unroll
            for (int k = 0; k < W; k++) sums[S - 1][k] += dx[k];
    }
    if (c >= a.C) return;
#pragma unroll
    for (int s = 0; s < S; s++) store(partial + ((int64_t)blockIdx.x * S + s) * a.C + c, sums[s]);
}

template <int S> static void backward(gpt_ctx *ctx, residual_norm_backward a) {
#define KERNELS(STEPS)                                                                             \
    {                                                                                              \
        residual_norm_backward_kernel<S, STEPS, false>,                                            \
            residual_norm_backward_kernel<S, STEPS, true>                                          \
    }
    void (*const kernels[MOST_STEPS][2])(float *, residual_norm_backward) = {
        KERNELS(1), KERNELS(2), KERNELS(3), KERNELS(4)};
#undef KERNELS
    float *partial = (float *)ctx->workspace;
    int n_warps = row_warps(a.C), n_chunks = row_chunks(a.N, a.C, a.dbranch);
    dim3 grid((unsigned)n_chunks);
    if (n_warps <= MOST_STEPS)
        launch(ctx, kernels[n_warps - 1][a.dbranch != NULL], grid, ROW_THREADS,
               sizeof(float) * ROW_THREADS * PACK * (size_t)n_warps, partial, a);
    else
        launch(ctx, wide_norm_backward_kernel<S>, grid, n_warps * WARP,
               2 * sizeof(float2) * (size_t)n_warps, partial, a);
    column_outputs<S> to = {{a.dw, a.db}};
    if (S == 3) to.out[S - 1] = a.dbias;
    if (a.dw || a.db || a.dbias) add_chunks<S>(ctx, to, partial, n_chunks, a.C);
}

/* ---- backward of long rows ---- */

template <int W> static __global__ void long_norm_backward_kernel(residual_norm_backward a) {
    int row = (int)(blockIdx.x * NORM_WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    if (row >= a.N) return;
    int64_t start = (int64_t)row * a.C;
    const elem *dout = (const elem *)a.dout + start, *resid = (const elem *)a.resid + start;
    float mean = a.stats[2 * row], rstd = a.stats[2 * row + 1];
    float w[W], g[W], h[W], dx[W], sum_g = 0, sum_gh = 0;
    gpt_dropout dropout = dropout_at(a.dropout);
    for (int c = lane * W; c < a.C; c += WARP * W) {
        load_weights(w, a, c);
        load(g, dout + c);
        load(h, resid + c);
        gradient_terms(g, h, w, mean, rstd);
#pragma unroll
        for (int k = 0; k < W; k++) {
            sum_g += g[k];
            sum_gh += g[k] * h[k];
        }
    }
    float mean_g = a.norm == GPT_NORM_LAYERNORM ? warp_sum(sum_g) / (float)a.C : 0;
    float mean_gh = a.norm == NORM_NONE ? 0 : warp_sum(sum_gh) / (float)a.C;
    for (int c = lane * W; c < a.C; c += WARP * W) {
        load_weights(w, a, c);
        load(g, dout + c);
        load(h, resid + c);
        load(dx, (const elem *)a.dresid + start + c);
        gradient_terms(g, h, w, mean, rstd);
        add_gradient(dx, g, h, rstd, mean_g, mean_gh);
        store_gradient(dx, a, a.dbranch, dropout, start + c);
    }
}

template <int W>
static __global__ void norm_weights_backward_kernel(float *partial, residual_norm_backward a) {
    const elem *branch = (const elem *)(a.dbranch ? a.dbranch : a.dresid);
    sum_chunk<3, W>(partial, a.N, a.C, [=](int row, int c, float(&sum)[3][W]) {
        float d[W], x[W], dx[W] = {}, mean = a.stats[2 * row], rstd = a.stats[2 * row + 1];
        load(d, (const elem *)a.dout + (int64_t)row * a.C + c);
        load(x, (const elem *)a.resid + (int64_t)row * a.C + c);
        if (a.dbias) load(dx, branch + (int64_t)row * a.C + c);
#pragma unroll
        for (int k = 0; k < W; k++) {
            sum[0][k] += d[k] * (x[k] - mean) * rstd;
            sum[1][k] += d[k];
            sum[2][k] += dx[k];
        }
    });
}

template <int W> static void backward_long(gpt_ctx *ctx, const residual_norm_backward &a) {
    launch(ctx, long_norm_backward_kernel<W>, row_grid(a.N), NORM_THREADS, 0, a);
    if (!a.dw && !a.db && !a.dbias) return;
    float *partial = (float *)ctx->workspace;
    launch(ctx, norm_weights_backward_kernel<W>, column_grid<W>(a.N, a.C), COLUMN_THREADS,
           column_shared_bytes<3, W>(), partial, a);
    add_chunks<3>(ctx, {{a.dw, a.db, a.dbias}}, partial, column_chunks(a.N), a.C);
}

CUDA_OP(residual_norm_backward) {
    if (op->C % PACK)
        backward_long<1>(ctx, *op);
    else if (row_warps(op->C) > MOST_ROW_WARPS)
        backward_long<PACK>(ctx, *op);
    else if (op->dbias)
        backward<3>(ctx, *op);
    else
        backward<2>(ctx, *op);
}
