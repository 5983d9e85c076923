/* embedding.cu: token and position embedding.
 *
 * The gradient of a token's row is a sum over all rows that hold the token, in their order, so that
 * it is always the same: rows are first sorted by token with a stable counting sort (ranks within
 * chunks, then places of chunks). Then each warp adds a piece of that order, in which a token's rows
 * are neighbours, and sums of tokens with rows in several pieces are added in the order of pieces. */
#include "cuda.h"

enum { THREADS = 256, WARPS = THREADS / WARP, SCAN_THREADS = 1024 };
#ifndef CHUNK
#define CHUNK 1024
#endif
enum { PIECE = WARP /* rows: one for each lane to find */ };

template <int W> static __global__ void embedding_forward_kernel(embedding_forward a) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W;
    if (i >= (int64_t)a.N * a.C) return;
    int n = (int)(i / a.C), c = (int)(i % a.C);
    float x[W], position[W];
    load(x, a.wte + (int64_t)a.tokens[n] * a.C + c);
    if (a.scale > 0)
#pragma unroll
        for (int k = 0; k < W; k++) x[k] *= a.scale;
    if (a.wpe) {
        int t = a.positions ? a.positions[n] : n % a.T;
        load(position, a.wpe + (int64_t)t * a.C + c);
#pragma unroll
        for (int k = 0; k < W; k++) x[k] += position[k];
    }
    store((elem *)a.out + i, x);
}

CUDA_OP(embedding_forward) {
    int W = op->C % PACK == 0 ? PACK : 1;
    dim3 grid((unsigned)div_up((int64_t)op->N * op->C, THREADS * W));
    launch(ctx, W == 1 ? embedding_forward_kernel<1> : embedding_forward_kernel<PACK>, grid,
           THREADS, 0, *op);
}

/* ---- backward ---- */

/* The results of the sort, and sums. Chunk k holds rows k CHUNK and on, piece p places p PIECE and on of
 * the order. */
typedef struct sorting {
    int32_t *counts; /* (n_chunks, V) rows of a token in a chunk; then in all chunks before it */
    int32_t *begins; /* (V + 1) where a token's rows start in order; the last is N */
    int32_t *ranks;  /* (N) rows of the same token earlier in the chunk */
    int32_t *order;  /* (N) rows by token, then by row */
    float *partial;  /* (n_pieces, 2, C) sums of a token that has rows before the piece too, or that
                        begins with it; and of one that begins later and has rows after it */
} sorting;

static size_t lay_out(sorting *s, char *base, int N, int V, int C) {
    size_t counts = align_up(sizeof(int32_t) * (size_t)div_up(N, CHUNK) * (size_t)V);
    size_t begins = align_up(sizeof(int32_t) * ((size_t)V + 1));
    size_t rows = align_up(sizeof(int32_t) * (size_t)N);
    s->counts = (int32_t *)base;
    s->begins = (int32_t *)(base + counts);
    s->ranks = (int32_t *)(base + counts + begins);
    s->order = (int32_t *)(base + counts + begins + rows);
    s->partial = (float *)(base + counts + begins + 2 * rows);
    size_t partial = align_up(sizeof(float) * 2 * (size_t)div_up(N, PIECE) * (size_t)C);
    return counts + begins + 2 * rows + partial;
}

CUDA_WORKSPACE(embedding_workspace) {
    sorting s;
    return shape->training ? lay_out(&s, NULL, shape->N, most(shape->V, shape->T), shape->C) : 0;
}

/* A block a chunk, a thread a row. The last row of a token knows how many there are. */
static __global__ void count_tokens_kernel(sorting s, const int32_t *tokens, int N, int V) {
    int32_t *chunk = shared_memory<int32_t>();
    int i = (int)threadIdx.x, n = (int)blockIdx.x * CHUNK + i;
    int token = n < N ? tokens[n] : -1, rank = 0, last = 1;
    chunk[i] = token;
    __syncthreads();
    for (int j = 0; j < CHUNK; j++) {
        int same = chunk[j] == token;
        rank += same && j < i;
        last &= !(same && j > i);
    }
    if (n >= N) return;
    s.ranks[n] = rank;
    if (last) s.counts[(int64_t)blockIdx.x * V + token] = rank + 1;
}

/* A thread a token: counts become the number of rows in earlier chunks, begins the sum. */
static __global__ void sum_chunks_kernel(sorting s, int n_chunks, int V) {
    int token = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (token >= V) return;
    int32_t sum = 0;
    for (int k = 0; k < n_chunks; k++) {
        int32_t *count = &s.counts[(int64_t)k * V + token], before = sum;
        sum += *count;
        *count = before;
    }
    s.begins[token] = sum;
}

/* One block: begins become running sums. Each thread has a run of tokens. */
static __global__ void scan_tokens_kernel(sorting s, int V) {
    int32_t *sums = shared_memory<int32_t>();
    int i = (int)threadIdx.x, run = (int)div_up(V, SCAN_THREADS);
    int first = least(i * run, V), end = least(first + run, V);
    int32_t sum = 0;
    for (int v = first; v < end; v++) sum += s.begins[v];
    sums[i] = sum;
    __syncthreads();
    for (int step = 1; step < SCAN_THREADS; step *= 2) {
        int32_t before = i >= step ? sums[i - step] : 0;
        __syncthreads();
        sums[i] += before;
        __syncthreads();
    }
    int32_t at = sums[i] - sum;
    for (int v = first; v < end; v++) {
        int32_t count = s.begins[v];
        s.begins[v] = at;
        at += count;
    }
    if (i == SCAN_THREADS - 1) s.begins[V] = sums[i];
}

static __global__ void order_rows_kernel(sorting s, const int32_t *tokens, int N, int V) {
    int n = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (n >= N) return;
    int token = tokens[n];
    s.order[s.begins[token] + s.counts[(int64_t)(n / CHUNK) * V + token] + s.ranks[n]] = n;
}

static sorting sort_rows(gpt_ctx *ctx, const embedding_backward &a) {
    int N = a.N, V = a.V, n_chunks = (int)div_up(N, CHUNK);
    sorting s;
    lay_out(&s, (char *)ctx->workspace, N, V, a.C);
    cuda_zero(ctx, s.counts, sizeof(int32_t) * (size_t)n_chunks * (size_t)V);
    launch(ctx, count_tokens_kernel, dim3((unsigned)n_chunks), CHUNK, sizeof(int32_t) * CHUNK, s,
           a.tokens, N, V);
    launch(ctx, sum_chunks_kernel, dim3((unsigned)div_up(V, THREADS)), THREADS, 0, s, n_chunks, V);
    launch(ctx, scan_tokens_kernel, dim3(1), SCAN_THREADS, sizeof(int32_t) * SCAN_THREADS, s, V);
    launch(ctx, order_rows_kernel, dim3((unsigned)div_up(N, THREADS)), THREADS, 0, s, a.tokens, N,
           V);
    return s;
}

/* A warp for each piece and strip of WARP * W channels. */
template <int W> static __global__ void embedding_backward_kernel(embedding_backward a, sorting s) {
    int lane = (int)threadIdx.x % WARP, piece = (int)(blockIdx.x * WARPS + threadIdx.x / WARP);
    int c = (int)(blockIdx.y * WARP + lane) * W, C = a.C;
    int begin = piece * PIECE, n = least<int>(PIECE, a.N - begin);
    if (n <= 0) return;
    int my_row = lane < n ? s.order[begin + lane] : 0, my_token = lane < n ? a.tokens[my_row] : -1;
    float sum[W] = {}, x[W], scale = a.scale > 0 ? a.scale : 1;
    for (int i = 0; i < n; i++) {
        int row = __shfl_sync(~0u, my_row, i), token = __shfl_sync(~0u, my_token, i);
        int next = __shfl_sync(~0u, my_token, i + 1);
        if (c >= C) continue;
        load(x, (const elem *)a.dout + (int64_t)row * C + c);
#pragma unroll
        for (int k = 0; k < W; k++) sum[k] += x[k];
        if (token == next && i + 1 < n) continue;
        int first = s.begins[token], end = s.begins[token + 1];
        bool whole = first >= begin && end <= begin + PIECE;
        float *to = whole ? a.dwte + (int64_t)token * C + c
                          : s.partial + ((int64_t)piece * 2 + (first > begin)) * C + c;
        if (whole) load(x, to);
#pragma unroll
        for (int k = 0; k < W; k++) sum[k] *= scale;
#pragma unroll
        for (int k = 0; k < W; k++) x[k] = whole ? x[k] + sum[k] : sum[k], sum[k] = 0;
        store(to, x);
    }
}

/* A block for each piece and strip: the token that begins in it and has rows in others, if there is one.
 * Its warps take turns at the pieces. */
template <int W> static __global__ void add_pieces_kernel(embedding_backward a, sorting s) {
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, C = a.C;
    int c = (int)(blockIdx.y * WARP + lane) * W;
    int piece = (int)blockIdx.x, begin = piece * PIECE;
    int token = a.tokens[s.order[least(begin + (int)PIECE, a.N) - 1]];
    int first = s.begins[token], end = s.begins[token + 1];
    if (first < begin || end <= begin + PIECE) return;
    float *sums = shared_memory<float>() + (warp * WARP + lane) * W; /* (WARPS, WARP W) */
    float sum[W] = {}, x[W];
    if (c < C)
        for (int p = piece + warp; p * PIECE < end; p += WARPS) {
            load(x, s.partial + ((int64_t)p * 2 + (first > p * PIECE)) * C + c);
#pragma unroll
            for (int k = 0; k < W; k++) sum[k] += x[k];
        }
#pragma unroll
    for (int k = 0; k < W; k++) sums[k] = sum[k];
    __syncthreads();
    if (warp > 0 || c >= C) return;
    float *dw = a.dwte + (int64_t)token * C + c;
    load(x, dw);
    for (int other = 0; other < WARPS; other++)
#pragma unroll
        for (int k = 0; k < W; k++) x[k] += sums[other * WARP * W + k];
    store(dw, x);
}

template <int W> static __global__ void position_backward_kernel(embedding_backward a) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W, size = (int64_t)a.T * a.C;
    if (i >= size) return;
    const elem *dout = (const elem *)a.dout;
    float sum[W], x[W];
    load(sum, a.dwpe + i);
    for (int64_t at = i; at < (int64_t)a.N * a.C; at += size) {
        load(x, dout + at);
#pragma unroll
        for (int k = 0; k < W; k++) sum[k] += x[k];
    }
    store(a.dwpe + i, sum);
}

/* Adds the rows of dout to rows of dwte, of which there are V. */
template <int W> static void add_by_token(gpt_ctx *ctx, const embedding_backward &a) {
    unsigned pieces = (unsigned)div_up(a.N, PIECE), strips = (unsigned)div_up(a.C, WARP * W);
    sorting s = sort_rows(ctx, a);
    launch(ctx, embedding_backward_kernel<W>, dim3((unsigned)div_up(pieces, WARPS), strips),
           THREADS, 0, a, s);
    launch(ctx, add_pieces_kernel<W>, dim3(pieces, strips), THREADS, sizeof(float) * THREADS * W, a,
           s);
}

template <int W> static void backward(gpt_ctx *ctx, const embedding_backward &a) {
    if (a.dwte) add_by_token<W>(ctx, a);
    if (a.dwpe && a.positions) {
        embedding_backward positions = a; /* found as tokens are */
        positions.dwte = a.dwpe, positions.scale = 1, positions.tokens = a.positions,
        positions.V = a.T;
        add_by_token<W>(ctx, positions);
    } else if (a.dwpe) {
        launch(ctx, position_backward_kernel<W>,
               dim3((unsigned)div_up((int64_t)a.T * a.C, THREADS * W)), THREADS, 0, a);
    }
}

CUDA_OP(embedding_backward) {
    op->C % PACK == 0 ? backward<PACK>(ctx, *op) : backward<1>(ctx, *op);
}
