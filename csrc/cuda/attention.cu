/* attention.cu: causal attention without tensor cores, for float32 and for heads that
 * attention_bf16.cu has no tiles for; and decoding for those that attention_decode.cu does not take. A
 * warp has a query (or, for gradients of keys and values, a key), and its lanes share WARP keys (or
 * queries) at a time. */
#include "attention.h"
#include "columns.h"

#include <math.h>

/* The shared memory of a warp: two rows of HS numbers, two sums of as many, and one number
 * for each lane, twice. */
typedef struct warp_memory {
    float *row_1, *row_2, *sum_1, *sum_2, *lane_1, *lane_2;
} warp_memory;

static inline size_t shared_bytes(int HS) {
    return sizeof(float) * WARPS * (4 * (size_t)HS + 2 * WARP);
}

static __device__ inline warp_memory memory_of_warp(int HS) {
    float *base = shared_memory<float>() + (threadIdx.x / WARP) * (4 * HS + 2 * WARP);
    warp_memory m = {base,          base + HS,     base + 2 * HS,
                     base + 3 * HS, base + 4 * HS, base + 4 * HS + WARP};
    return m;
}

static __device__ inline void load_row(float *to, const elem *from, int HS) {
    for (int s = (int)threadIdx.x % WARP; s < HS; s += WARP) to[s] = to_float(from[s]);
}

/* Each lane has another row, so each reads as much at a time as it can. */
static __device__ inline float dot(const float *a, const elem *b, int HS) {
    float sum = 0;
    if (HS % PACK == 0) {
        for (int s = 0; s < HS; s += PACK) {
            float x[PACK], y[PACK];
            load(x, a + s);
            load(y, b + s);
#pragma unroll
            for (int k = 0; k < PACK; k++) sum += x[k] * y[k];
        }
    } else {
        for (int s = 0; s < HS; s++) sum += a[s] * to_float(b[s]);
    }
    return sum;
}

/* ---- forward ---- */

/* A softmax under way: the maximum so far, and the sum of exponentials relative to it. */
typedef struct online {
    float max, sum;
} online;

/* Takes in keys first to first + WARP - 1, those below end, whose rows are `stride` apart. q is in
 * row_1, the weighted sum of values in sum_1. factor multiplies this lane's probability. */
static __device__ inline online attend(warp_memory m, online o, const elem *k, const elem *v,
                                       int64_t stride, int first, int end, scoring how,
                                       float factor, int HS) {
    int lane = (int)threadIdx.x % WARP, key = first + lane, n = least<int>(WARP, end - first);
    float score = key < end ? score_of(how, dot(m.row_1, k + key * stride, HS)) : -INFINITY;
    float max = fmaxf(o.max, warp_max(score)), p = key < end ? expf(score - max) : 0;
    float shrink = o.sum > 0 ? expf(o.max - max) : 0;
    o.sum = o.sum * shrink + warp_sum(p);
    o.max = max;
    m.lane_1[lane] = p * factor;
    __syncwarp();
    for (int s = lane; s < HS; s += WARP) {
        float sum = m.sum_1[s] * shrink;
        for (int j = 0; j < n; j++) sum += m.lane_1[j] * to_float(v[(first + j) * stride + s]);
        m.sum_1[s] = sum;
    }
    __syncwarp();
    return o;
}

static __global__ void attention_forward_kernel(attention_forward a, scoring how) {
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP; /* of (B, NH, T) */
    if (row >= (int64_t)a.B * a.NH * a.T) return;
    int i = (int)(row % a.T), h = (int)(row / a.T % a.NH), b = (int)(row / a.T / a.NH);
    int lane = (int)threadIdx.x % WARP;
    warp_memory m = memory_of_warp(a.HS);
    const elem *qkv = (const elem *)a.qkv;
    load_row(m.row_1, qkv + query_at(a, b, i, h), a.HS);
    for (int s = lane; s < a.HS; s += WARP) m.sum_1[s] = 0;
    __syncwarp();
    online o = {-INFINITY, 0};
    gpt_dropout dropout = dropout_at(a.dropout);
    const elem *k = qkv + key_at(a, b, 0, h), *v = qkv + value_at(a, b, 0, h);
    for (int first = first_key(sight_of(a, b), i); first <= i; first += WARP) {
        float factor = 1;
        if (dropout.p > 0) factor = dropout_factor(dropout, (uint64_t)(row * a.T + first + lane));
        o = attend(m, o, k, v, row_stride(a), first, i + 1, how, factor, a.HS);
    }
    elem *to = (elem *)a.out + out_at(a, b, i, h);
    for (int s = lane; s < a.HS; s += WARP) to[s] = from_float<elem>(m.sum_1[s] / o.sum);
    if (a.lse && lane == 0) a.lse[row] = o.max + logf(o.sum);
}

/* ---- backward ---- */

/* delta of a row is <dout, out>: what the softmax's gradient takes from each dp. */
static __global__ void attention_delta_kernel(float *delta /* (B, NH, T) */, attention_backward a) {
    const elem *dout = (const elem *)a.dout, *out = (const elem *)a.out;
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= (int64_t)a.B * a.NH * a.T) return;
    int i = (int)(row % a.T), h = (int)(row / a.T % a.NH), b = (int)(row / a.T / a.NH);
    int64_t at = out_at(a, b, i, h);
    float sum = 0;
    for (int s = (int)threadIdx.x % WARP; s < a.HS; s += WARP)
        sum += to_float(dout[at + s]) * to_float(out[at + s]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) delta[row] = sum;
}

/* The probability of a pair from the product of its query and key, and the gradient of that. p is with its
 * dropout. */
static __device__ inline float product_gradient(const backward_args &a, gpt_dropout dropout,
                                                int64_t row, int j, float product, float dp,
                                                float *p) {
    scoring how = {a.scale, a.op.cap};
    float score = score_of(how, product);
    float probability = expf(score - a.op.lse[row]), factor = 1;
    if (dropout.p > 0) factor = dropout_factor(dropout, (uint64_t)(row * a.op.T + j));
    *p = probability * factor;
    return probability * (dp * factor - a.delta[row]) * slope_of(how, score);
}

/* A warp a query: dq. */
static __global__ void attention_backward_queries_kernel(backward_args args) {
    const attention_backward &a = args.op;
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP, stride = row_stride(a);
    if (row >= (int64_t)a.B * a.NH * a.T) return;
    int i = (int)(row % a.T), h = (int)(row / a.T % a.NH), b = (int)(row / a.T / a.NH);
    int lane = (int)threadIdx.x % WARP;
    const elem *qkv = (const elem *)a.qkv, *all_dout = (const elem *)a.dout;
    warp_memory m = memory_of_warp(a.HS);
    gpt_dropout dropout = dropout_at(a.dropout);
    load_row(m.row_1, qkv + query_at(a, b, i, h), a.HS);
    load_row(m.row_2, all_dout + out_at(a, b, i, h), a.HS);
    for (int s = lane; s < a.HS; s += WARP) m.sum_1[s] = 0;
    __syncwarp();
    const elem *k = qkv + key_at(a, b, 0, h), *v = qkv + value_at(a, b, 0, h);
    for (int first = first_key(sight_of(a, b), i); first <= i; first += WARP) {
        int j = first + lane, n = least<int>(WARP, i + 1 - first);
        float ds = 0, p;
        if (j <= i)
            ds = product_gradient(args, dropout, row, j, dot(m.row_1, k + j * stride, a.HS),
                                  dot(m.row_2, v + j * stride, a.HS), &p);
        m.lane_1[lane] = ds;
        __syncwarp();
        for (int s = lane; s < a.HS; s += WARP) {
            float sum = m.sum_1[s];
            for (int t = 0; t < n; t++) sum += m.lane_1[t] * to_float(k[(first + t) * stride + s]);
            m.sum_1[s] = sum;
        }
        __syncwarp();
    }
    elem *dq = (elem *)a.dqkv + query_at(a, b, i, h);
    for (int s = lane; s < a.HS; s += WARP) dq[s] = from_float<elem>(m.sum_1[s]);
}

/* A warp a key: dk and dv, over all query heads that read it. */
static __global__ void attention_backward_keys_kernel(backward_args args) {
    const attention_backward &a = args.op;
    int64_t task = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP, stride = row_stride(a);
    if (task >= (int64_t)a.B * a.NKV * a.T) return;
    int j = (int)(task % a.T), group = a.NH / a.NKV, lane = (int)threadIdx.x % WARP;
    int h0 = (int)(task / a.T % a.NKV) * group, b = (int)(task / a.T / a.NKV);
    int end = end_query(sight_of(a, b), j);
    const elem *qkv = (const elem *)a.qkv, *all_dout = (const elem *)a.dout;
    warp_memory m = memory_of_warp(a.HS);
    gpt_dropout dropout = dropout_at(a.dropout);
    load_row(m.row_1, qkv + key_at(a, b, j, h0), a.HS);
    load_row(m.row_2, qkv + value_at(a, b, j, h0), a.HS);
    for (int s = lane; s < a.HS; s += WARP) m.sum_1[s] = m.sum_2[s] = 0;
    __syncwarp();
    for (int h = h0; h < h0 + group; h++) {
        const elem *q = qkv + query_at(a, b, 0, h), *dout = all_dout + out_at(a, b, 0, h);
        int64_t out_stride = (int64_t)a.NH * a.HS, row0 = ((int64_t)b * a.NH + h) * a.T;
        for (int first = j; first < end; first += WARP) {
            int i = first + lane, n = least<int>(WARP, end - first);
            float ds = 0, p = 0;
            if (i < end)
                ds =
                    product_gradient(args, dropout, row0 + i, j, dot(m.row_1, q + i * stride, a.HS),
                                     dot(m.row_2, dout + i * out_stride, a.HS), &p);
            m.lane_1[lane] = ds;
            m.lane_2[lane] = p;
            __syncwarp();
            for (int s = lane; s < a.HS; s += WARP) {
                float sum_1 = m.sum_1[s], sum_2 = m.sum_2[s];
                for (int t = 0; t < n; t++) {
                    sum_1 += m.lane_1[t] * to_float(q[(first + t) * stride + s]);
                    sum_2 += m.lane_2[t] * to_float(dout[(first + t) * out_stride + s]);
                }
                m.sum_1[s] = sum_1, m.sum_2[s] = sum_2;
            }
            __syncwarp();
        }
    }
    elem *dk = (elem *)a.dqkv + key_at(a, b, j, h0), *dv = (elem *)a.dqkv + value_at(a, b, j, h0);
    for (int s = lane; s < a.HS; s += WARP) {
        dk[s] = from_float<elem>(m.sum_1[s]);
        dv[s] = from_float<elem>(m.sum_2[s]);
    }
}

/* ---- the ops ---- */

/* The workspace of backward: delta and lse, and sums for a bias, of tiles of rows or of chunks of them. */
typedef struct backward_memory {
    float *delta, *lse; /* (N, NH) */
    float *partial;
    int64_t max_tiles; /* of partial: as many as sequences of a quarter of a tile make */
} backward_memory;

static size_t lay_out(backward_memory *m, char *base, int N, int NH, int QKV) {
    size_t rows = align_up(sizeof(float) * (size_t)N * (size_t)NH);
    m->delta = (float *)base;
    m->lse = (float *)(base + rows);
    m->partial = (float *)(base + 2 * rows);
    m->max_tiles = div_up(N, ATTENTION_TILE / 4);
    size_t sums = align_up(sizeof(float) * (size_t)m->max_tiles * (size_t)QKV);
    return 2 * rows + most(sums, column_bytes(1, QKV));
}

CUDA_WORKSPACE(attention_workspace) {
    const gpt_shape *s = shape;
    backward_memory m;
    if (s->training) return lay_out(&m, NULL, s->N, s->NH, (s->NH + 2 * s->NKV) * s->HS);
    return s->n_ctx > 0 && !s->kv_int8 ? attention_decode_bytes(s) : 0;
}

/* A warp for each of so many rows. */
static inline dim3 warp_grid(int64_t rows) {
    return dim3((unsigned)div_up(rows, WARPS));
}

CUDA_OP(attention_forward) {
#ifdef CUDA_BF16
    if (attention_tiles_forward(ctx, *op)) return;
#endif
    launch(ctx, attention_forward_kernel, warp_grid((int64_t)op->B * op->NH * op->T), THREADS,
           shared_bytes(op->HS), *op, scoring_of(*op));
}

CUDA_OP(attention_backward) {
    int N = op->B * op->T, QKV = (op->NH + 2 * op->NKV) * op->HS;
    int64_t queries = (int64_t)N * op->NH, keys = (int64_t)N * op->NKV;
    backward_memory m;
    lay_out(&m, (char *)ctx->workspace, N, op->NH, QKV);
    backward_args args = {*op, m.delta, score_scale(op->scale, op->HS), m.lse, NULL};
#ifdef CUDA_BF16
    int64_t tiles = attention_tiles(op->B, op->T);
    if (op->db && tiles <= m.max_tiles) args.partial = m.partial;
    if (attention_tiles_backward(ctx, args)) {
        if (args.partial)
            add_chunks<1>(ctx, {{op->db}}, m.partial, (int)tiles, QKV);
        else if (op->db)
            cuda_sum_columns(ctx, op->db, m.partial, (const elem *)op->dqkv, N, QKV);
        return;
    }
#endif
    launch(ctx, attention_delta_kernel, warp_grid(queries), THREADS, 0, m.delta, *op);
    launch(ctx, attention_backward_queries_kernel, warp_grid(queries), THREADS,
           shared_bytes(op->HS), args);
    launch(ctx, attention_backward_keys_kernel, warp_grid(keys), THREADS, shared_bytes(op->HS),
           args);
    if (op->db) cuda_sum_columns(ctx, op->db, m.partial, (const elem *)op->dqkv, N, QKV);
}

/* ---- decoding ---- */

template <int W> static __global__ void store_cache_kernel(attention_decode a) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W; /* of (N, NKV, HS) */
    if (i >= (int64_t)a.N * a.NKV * a.HS) return;
    int s = (int)(i % a.HS), h = (int)(i / a.HS % a.NKV), n = (int)(i / a.HS / a.NKV);
    const elem *row = (const elem *)a.qkv + (int64_t)n * (a.NH + 2 * a.NKV) * a.HS +
                      (int64_t)(a.NH + h) * a.HS + s;
    int64_t at = (((int64_t)a.seqs[n] * a.NKV + h) * a.n_ctx + a.positions[n]) * a.HS + s;
    *(packed<elem, W> *)((elem *)a.cache_k + at) = *(const packed<elem, W> *)row;
    *(packed<elem, W> *)((elem *)a.cache_v + at) =
        *(const packed<elem, W> *)(row + (int64_t)a.NKV * a.HS);
}

/* A block for each row and query head: its warps take turns at the keys and then join. */
static __global__ void attention_plain_decode_kernel(attention_decode a, scoring how) {
    int h = (int)(blockIdx.x % a.NH), n = (int)(blockIdx.x / a.NH), end = a.positions[n] + 1;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, HS = a.HS;
    int64_t start = cache_at(a, a.seqs[n], h);
    const elem *k = (const elem *)a.cache_k + start, *v = (const elem *)a.cache_v + start;
    warp_memory m = memory_of_warp(HS);
    load_row(m.row_1, (const elem *)a.qkv + (int64_t)n * (a.NH + 2 * a.NKV) * HS + h * HS, HS);
    for (int s = lane; s < HS; s += WARP) m.sum_1[s] = 0;
    __syncwarp();
    online o = {-INFINITY, 0};
    int begin = first_key(sight{a.window, NULL, 0}, end - 1);
    for (int first = begin + warp * WARP; first < end; first += THREADS)
        o = attend(m, o, k, v, HS, first, end, how, 1, HS);
    if (lane == 0) {
        m.lane_1[0] = o.max;
        m.lane_2[0] = o.sum;
    }
    __syncthreads();
    const float *base = shared_memory<float>();
    int64_t stride = 4 * HS + 2 * WARP; /* between the warps' memories */
    float max = -INFINITY, sum = 0, weights[WARPS];
    for (int w = 0; w < WARPS; w++) max = fmaxf(max, base[w * stride + 4 * HS]);
    for (int w = 0; w < WARPS; w++) {
        weights[w] = expf(base[w * stride + 4 * HS] - max);
        sum += weights[w] * base[w * stride + 4 * HS + WARP];
    }
    for (int s = (int)threadIdx.x; s < HS; s += THREADS) {
        float x = 0;
        for (int w = 0; w < WARPS; w++) x += weights[w] * base[w * stride + 2 * HS + s];
        ((elem *)a.out)[((int64_t)n * a.NH + h) * HS + s] = from_float<elem>(x / sum);
    }
}

static void store_cache(gpt_ctx *ctx, const attention_decode *op) {
    int W = op->HS % PACK == 0 ? PACK : 1;
    launch(ctx, W == 1 ? store_cache_kernel<1> : store_cache_kernel<PACK>,
           dim3((unsigned)div_up((int64_t)op->N * op->NKV * op->HS, THREADS * W)), THREADS, 0, *op);
}

CUDA_OP(attention_decode) {
    int is_stored = 0, has_tiles = 0;
    if (op->scale_k) {
        attention_decode_int8(ctx, *op);
        return;
    }
#ifdef CUDA_BF16
    /* Single rows of many sequences, or a short prompt, are not worth the launch. */
    if (op->N > ATTENTION_TILE) {
        store_cache(ctx, op);
        is_stored = 1;
        has_tiles = attention_tiles_prefill(ctx, *op);
    }
#endif
    if (attention_decode_pieces(ctx, *op, has_tiles)) return;
    if (!is_stored) store_cache(ctx, op);
    launch(ctx, attention_plain_decode_kernel, dim3((unsigned)(op->N * op->NH)), THREADS,
           shared_bytes(op->HS), *op, scoring_of(*op));
}
