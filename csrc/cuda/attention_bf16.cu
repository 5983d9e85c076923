/* attention_bf16.cu: causal attention on tensor cores, in the tiles of Dao 2023 (FlashAttention-2).
 *
 * A block has rows (queries, or for dk and dv keys) in shared memory and goes through the other
 * side tile by tile, the next one arriving while it works. Every product is one of two, with the rows
 * of a tile (scores, dp) or with its columns (out, dq, dk, dv), whose left side are scores that
 * stay in registers: tiles.h has both, for warps alone and for four warps as one. Kernels take which as
 * their parameter T.
 *
 * Backward makes dq in one kernel, and dk and dv in another, so that each number is summed by one
 * thread, in one order. */
#include "soft_cap.h"
#include "tiles.h"

static constexpr float LN2 = 0.6931471805599453f;

/* Rows of x times factor, to rows of HS numbers `stride` apart, `there` of them. */
template <int D>
static __device__ inline void store_rows(elem *to, int64_t stride, const float (&x)[D / 8][4],
                                         const float (&factor)[2], int there, int HS) {
#pragma unroll
    for (int d = 0; d < D / 8; d++)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
            if (row_of(e) < there && col_of(d, 0) < HS)
                *(uint32_t *)(to + row_of(e) * stride + col_of(d, 0)) =
                    pair_of(x[d][e] * factor[e / 2], x[d][e + 1] * factor[e / 2]);
}

/* Of 2 N numbers, lanes that differ in `bit` each keep the sums of one half: the upper has the second. */
template <int N> static __device__ inline void add_halves(float *x, int bit) {
    bool is_upper = threadIdx.x & (unsigned)bit;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float kept = is_upper ? x[N + i] : x[i], given = is_upper ? x[i] : x[N + i];
        x[i] = kept + __shfl_xor_sync(~0u, given, bit);
    }
}

/* to[col] = factor times the sum of x's columns over a block's rows. All threads are here, through WARPS D
 * floats of memory. */
template <int D>
static __device__ inline void sum_rows(float *to, float *memory, const float (&x)[D / 8][4],
                                       float factor, int HS) {
    enum { N = D / 4 };
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    float sums[N];
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] = x[i / 2][i % 2] + x[i / 2][i % 2 + 2];
    add_halves<N / 2>(sums, 16);
    add_halves<N / 4>(sums, 8);
    add_halves<N / 8>(sums, 4);
    int first = (lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2) * (N / 8);
#pragma unroll
    for (int i = 0; i < N / 8; i++) memory[warp * D + col_of((first + i) / 2, first + i)] = sums[i];
    __syncthreads();
    for (int col = (int)threadIdx.x; col < HS; col += THREADS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += memory[w * D + col];
        to[col] = factor * sum;
    }
}

/* Over the four lanes that share a row. */
static __device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
static __device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/* Where there is a soft cap, it is taken of a tile's products. */
template <int N> static __device__ inline void cap_products(float (&s)[N][4], const soft_cap *c) {
    if (!c || c->twice == 0) return;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = capped(*c, s[n][e]);
}

/* ---- forward ---- */

/* A tile of queries of one head, and the keys and values of which each query sees those up to its own
 * position that are within the window. Pointers are to first rows, strides from one row to the next. */
typedef struct forward_tile {
    elem *out;
    float *lse;        /* or NULL */
    head_rows q, k, v; /* of queries a block's at most, of the others from position 0 */
    int64_t out_stride;
    int first_q; /* the position of the first */
    sight see;
    int64_t row_0; /* the number of a query at position 0 among (B, NH, T), and */
    int T;         /* keys from one query to the next, for dropout */
    float scale;
} forward_tile;

/* The score of a key that a query does not see. It is finite: rows of a tile in which they see no key
 * at all have a maximum to subtract, and shrink to 0 what that adds as soon as they see one. */
static constexpr float UNSEEN = -1e30f;

/* A softmax of 16 rows under way, of which a lane has two: what was seen so far. */
struct softmax {
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {}, shrink[2];

    /* Scores become exponentials, relative to the new maximum; shrink is what they make of earlier sums. */
    template <int N> __device__ void take(float (&s)[N][4], float scale) {
        float new_max[2] = {max[0], max[1]}, below[2];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) new_max[e / 2] = fmaxf(new_max[e / 2], s[n][e]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            new_max[r] = row_max(new_max[r]);
            shrink[r] = exp2_of((max[r] - new_max[r]) * scale);
            max[r] = new_max[r];
            /* Not UNSEEN itself: its product is rounded here, and below it may not be. */
            below[r] = fmaxf(new_max[r], UNSEEN / 2) * scale;
            sum[r] *= shrink[r];
        }
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = exp2_of(s[n][e] * scale - below[e / 2]);
                sum[e / 2] += s[n][e];
            }
    }
};

/* While the tensor cores multiply values with the probabilities of one tile, other units make those of
 * the next: values arrive, and are used, one tile later than keys. */
template <typename T, int KEYS>
static __device__ __forceinline__ void forward(const forward_tile &t, const soft_cap *cap,
                                               gpt_dropout dropout) {
    constexpr int D = T::D, N = KEYS / 8, SIZE = T::template SIZE<KEYS>;
    int row0 = (int)threadIdx.x / WARP * 16, query0 = t.first_q + row0; /* of this warp */
    int first_tile = first_key(t.see, t.first_q) / KEYS;
    int n_tiles = (int)div_up(t.k.there, KEYS);
    elem *q = shared_memory<elem>(), *k = q + T::template SIZE<ROWS>, *v = k + STAGES * SIZE;
    tile_arrivals<T> arrivals(v + STAGES * SIZE);
    tile_source<T, KEYS> keys(t.k.from(first_tile * KEYS), arrivals);
    tile_source<T, KEYS> values(t.v.from(first_tile * KEYS), arrivals);

    tile_source<T, ROWS>(t.q, arrivals).fetch(q);
    keys.fetch(k);
    arrivals.wait();
    keys.advance();
    if (first_tile + 1 < n_tiles) keys.fetch(k + SIZE);
    values.fetch(v, 1);
    const auto queries = T::keep(q);

    float out[D / 8][4] = {}, s[N][4], scale = t.scale * LOG2E; /* so that exp is exp2 */
    softmax soft;
    auto take = [&](int key0) {
        cap_products(s, cap);
        if (!all_see(t.see, query0, 16, key0, KEYS))
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (!sees(t.see, query0 + row_of(e), key0 + col_of(n, e))) s[n][e] = UNSEEN;
        soft.take(s, scale);
        if (dropout.p > 0)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int64_t i = t.row_0 + query0 + row_of(e);
                    s[n][e] *= dropout_factor(dropout, (uint64_t)(i * t.T + key0 + col_of(n, e)));
                }
    };
    T::product_rows(s, queries, k);
    T::template wait_products<0>(s);
    take(first_tile * KEYS);
    int tile = first_tile, stage = 0;
    for (; tile + 1 < n_tiles; tile++, stage ^= 1) {
        weights<N> p(s);
        arrivals.wait();
        keys.advance();
        values.advance();
        if (tile + 2 < n_tiles) keys.fetch(k + stage * SIZE);
        values.fetch(v + (stage ^ 1) * SIZE, 1);
        T::product_rows(s, queries, k + (stage ^ 1) * SIZE);
        T::product_columns(out, p, v + stage * SIZE);
        T::template wait_products<1>(s);
        take((tile + 1) * KEYS);
        T::template wait_products<0>(out);
#pragma unroll
        for (int d = 0; d < D / 8; d++)
#pragma unroll
            for (int e = 0; e < 4; e++) out[d][e] *= soft.shrink[e / 2];
    }
    weights<N> p(s);
    arrivals.wait();
    T::product_columns(out, p, v + stage * SIZE);
    T::template wait_products<0>(out);

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = row_sum(soft.sum[r]);
        inverse[r] = 1.0f / sum;
        int row = row0 + row_of(2 * r);
        if (t.lse && threadIdx.x % 4 == 0 && row < t.q.there)
            t.lse[row] = (soft.max[r] * scale + log2f(sum)) * LN2;
    }
    store_rows<D>(t.out + row0 * t.out_stride, t.out_stride, out, inverse, t.q.there - row0,
                  t.q.HS);
}

/* Kernels exist with and without dropout, soft cap, window and documents (MORE): what these need takes registers
 * even where it is skipped, and with them blocks that could run at the same time. */
template <bool MORE> static __device__ inline gpt_dropout dropout_of(gpt_dropout_site site) {
    return MORE ? dropout_at(site) : gpt_dropout{0, 0};
}
template <bool MORE, typename Op> static __device__ inline sight see_of(const Op &a, int b) {
    return MORE ? sight_of(a, b) : sight{0, NULL, a.T};
}
template <typename Op> static bool needs_more(const Op &a) {
    return a.dropout.p > 0 || a.cap > 0 || a.window > 0 || a.positions;
}
/* Blocks at a time on a multiprocessor. */
template <typename T, bool MORE> static constexpr int BLOCKS = T::blocks(MORE);

/* The head and tile of a block. Those of a head follow each other, so that they run at the same time and
 * find its keys and values in the second-level cache; the longest come first, so that none is left alone
 * at the end. */
static __device__ inline int head_of_block(int n_tiles) {
    return (int)blockIdx.x / n_tiles;
}
static __device__ inline int last_first(int n_tiles) {
    return n_tiles - 1 - (int)blockIdx.x % n_tiles;
}

typedef struct forward_args {
    attention_forward op;
    float scale;
    box_map qkv; /* where tiles arrive in boxes */
    soft_cap cap;
} forward_args;

template <typename T, bool MORE, int KEYS>
static __global__ void __launch_bounds__(THREADS, BLOCKS<T, MORE>)
    attention_forward_kernel(const __grid_constant__ forward_args args) {
    const attention_forward &a = args.op;
    int n_blocks = (int)div_up(a.T, ROWS), head = head_of_block(n_blocks);
    int b = head / a.NH, h = head % a.NH, first_q = last_first(n_blocks) * ROWS;
    int key_head = a.NH + h / (a.NH / a.NKV);
    int64_t row_0 = (int64_t)head * a.T;
    forward_tile t = {.out = (elem *)a.out + out_at(a, b, first_q, h),
                      .lse = a.lse ? a.lse + row_0 + first_q : NULL,
                      .q = rows_of_qkv(a, a.qkv, &args.qkv, b, first_q, h),
                      .k = rows_of_qkv(a, a.qkv, &args.qkv, b, 0, key_head),
                      .v = rows_of_qkv(a, a.qkv, &args.qkv, b, 0, key_head + a.NKV),
                      .out_stride = (int64_t)a.NH * a.HS,
                      .first_q = first_q,
                      .see = see_of<MORE>(a, b),
                      .row_0 = row_0,
                      .T = a.T,
                      .scale = args.scale};
    t.q.there = least<int>(ROWS, t.q.there);
    t.k.there = t.v.there = least<int>(first_q + ROWS, a.T);
    if constexpr (T::IS_HERE)
        forward<T, KEYS>(t, MORE ? &args.cap : NULL, dropout_of<MORE>(a.dropout));
}

/* A tile of rows of a decoding step, where all of them are of one sequence. Tiles do not arrive in boxes,
 * since past a sequence's rows the cache may hold anything. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    attention_prefill_kernel(attention_decode a, float scale,
                             const __grid_constant__ soft_cap cap) {
    int n_blocks = (int)div_up(a.N, ROWS), h = head_of_block(n_blocks);
    int first = last_first(n_blocks) * ROWS, n = least<int>(ROWS, a.N - first);
    if (!is_whole_tile(a, first)) return;
    int64_t cache = cache_at(a, a.seqs[first], h), stride = (int64_t)(a.NH + 2 * a.NKV) * a.HS;
    int n_k = a.positions[first] + n;
    forward_tile t = {
        .out = (elem *)a.out + ((int64_t)first * a.NH + h) * a.HS,
        .lse = NULL,
        .q = {(const elem *)a.qkv + first * stride + (int64_t)h * a.HS, stride, n, a.HS},
        .k = {(const elem *)a.cache_k + cache, a.HS, n_k, a.HS},
        .v = {(const elem *)a.cache_v + cache, a.HS, n_k, a.HS},
        .out_stride = (int64_t)a.NH * a.HS,
        .first_q = a.positions[first],
        .see = {a.window, NULL, 0},
        .row_0 = 0,
        .T = 0,
        .scale = scale};
    if constexpr (T::IS_HERE) forward<T, ATTENTION_TILE>(t, &cap, gpt_dropout{0, 0});
}

/* ---- backward ----
 *
 * Dao 2023 has one kernel with five products for each pair of tiles; the two here each compute scores
 * and their gradients, which makes seven. But in one kernel dq is a sum over blocks, read and written
 * in float32 for each pair. By counting, that is 32 KB through the second-level cache for 1 MFLOP
 * saved (heads of 64), which takes longer than the MFLOP. And to be deterministic, blocks would have to
 * wait for each other in turn, which no emulation shows to end, or keep a dq for each block of keys. */

/* From the gradient of a probability with its dropout (dp) to that of the score, before the scale; p
 * becomes the probability with its dropout. i is the query's number among (B, NH, T). */
static __device__ inline void score_gradient(float &p, float &dp, float delta, const soft_cap *cap,
                                             float lse, gpt_dropout dropout, int64_t i, int key,
                                             int T) {
    float factor = 1, probability = p;
    if (dropout.p > 0) factor = dropout_factor(dropout, (uint64_t)(i * T + key));
    p = probability * factor;
    dp = probability * (dp * factor - delta);
    if (cap && cap->twice > 0) dp *= cap_slope(*cap, probability, lse);
}

struct tile_backward_args : backward_args {
    box_map qkv, dout; /* where tiles arrive in boxes */
    soft_cap cap;
};

/* Where in args.partial the sums of a tile of rows of a head are. */
static __device__ inline int64_t sums_at(const attention_backward &a, int b, int tile, int head) {
    return ((b * div_up(a.T, ROWS) + tile) * (a.NH + 2 * a.NKV) + head) * a.HS;
}

/* delta[row] = <dout, out> of the block's rows, of which a pair of threads has one: what the softmax's
 * gradient takes from each dp. Also to memory, for the kernel of keys. */
static __device__ inline void make_deltas(float *delta, const backward_args &args, int b, int h,
                                          int first_q) {
    const attention_backward &a = args.op;
    int row = (int)threadIdx.x / 2, query = first_q + row;
    float sum = 0;
    if (query < a.T) {
        const elem *dout = (const elem *)a.dout + out_at(a, b, query, h);
        const elem *out = (const elem *)a.out + out_at(a, b, query, h);
        for (int col = (int)threadIdx.x % 2 * PACK; col < a.HS; col += 2 * PACK) {
            float x[PACK], y[PACK];
            load(x, dout + col);
            load(y, out + col);
#pragma unroll
            for (int k = 0; k < PACK; k++) sum += x[k] * y[k];
        }
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    if (threadIdx.x % 2) return;
    delta[row] = sum;
    if (query < a.T) args.delta[((int64_t)b * a.NH + h) * a.T + query] = sum;
}

/* dq: a block has queries, and goes through keys. */
template <typename T, bool MORE, int KEYS>
static __device__ __forceinline__ void backward_queries(const tile_backward_args &args) {
    constexpr int D = T::D, N = KEYS / 8, ROWS_SIZE = T::template SIZE<ROWS>;
    constexpr int SIZE = T::template SIZE<KEYS>;
    const attention_backward &a = args.op;
    gpt_dropout dropout = dropout_of<MORE>(a.dropout);
    const soft_cap *cap = MORE ? &args.cap : NULL;
    int n_blocks = (int)div_up(a.T, ROWS), head = head_of_block(n_blocks);
    int b = head / a.NH, h = head % a.NH, first_q = last_first(n_blocks) * ROWS;
    int warp_row = (int)threadIdx.x / WARP * 16, query0 = first_q + warp_row; /* of this warp */
    sight see = see_of<MORE>(a, b);
    int first_tile = first_key(see, first_q) / KEYS;
    int n_tiles = (int)div_up(least<int>(first_q + ROWS, a.T), KEYS), key = first_tile * KEYS;
    elem *q = shared_memory<elem>(), *dout = q + ROWS_SIZE, *k = dout + ROWS_SIZE;
    elem *v = k + STAGES * SIZE;
    float *lses = (float *)(v + STAGES * SIZE), *deltas = lses + ROWS; /* (ROWS), (ROWS) */
    tile_arrivals<T> arrivals(deltas + ROWS);
    int key_head = a.NH + h / (a.NH / a.NKV);
    tile_source<T, KEYS> keys(rows_of_qkv(a, a.qkv, &args.qkv, b, key, key_head), arrivals);

    tile_source<T, ROWS>(rows_of_qkv(a, a.qkv, &args.qkv, b, first_q, h), arrivals).fetch(q);
    tile_source<T, ROWS>(rows_of_out(a, a.dout, &args.dout, b, first_q, h), arrivals)
        .fetch(dout, 2);
    keys.fetch(k);
    keys.fetch(v, 1, a.NKV);
    keys.advance();
    make_deltas(deltas, args, b, h, first_q);
    if (int i = (int)threadIdx.x; i < ROWS) {
        int64_t at = (int64_t)head * a.T + first_q + i;
        lses[i] = first_q + i < a.T ? a.lse[at] * LOG2E : INFINITY;
        if (first_q + i < a.T) args.lse[at] = lses[i]; /* for the kernel of keys */
    }
    arrivals.wait();
    const auto queries = T::keep(q); /* there are no registers to keep dout too */

    float dq[D / 8][4] = {}, scale = args.scale * LOG2E;
    /* A lane's rows: read again for each tile, which costs less than the registers. */
    const float *lse = lses + warp_row + row_of(0), *delta = deltas + warp_row + row_of(0);
    for (int tile = first_tile, stage = 0; tile < n_tiles; tile++, stage ^= 1) {
        if (tile > first_tile) arrivals.wait();
        if (tile + 1 < n_tiles) {
            keys.fetch(k + (stage ^ 1) * SIZE);
            keys.fetch(v + (stage ^ 1) * SIZE, 1, a.NKV);
            keys.advance();
        }
        int key0 = tile * KEYS, at = stage * SIZE;
        float p[N][4], ds[N][4];
        T::product_rows(p, queries, k + at);
        T::product_rows(ds, dout, v + at);
        T::template wait_products<1>(p);
        cap_products(p, cap);
        if (!all_see(see, query0, 16, key0, KEYS))
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (!sees(see, query0 + row_of(e), key0 + col_of(n, e))) p[n][e] = -INFINITY;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) p[n][e] = exp2_of(p[n][e] * scale - lse[e / 2 * 8]);
        T::template wait_products<0>(ds);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                score_gradient(p[n][e], ds[n][e], delta[e / 2 * 8], cap, lse[e / 2 * 8], dropout,
                               (int64_t)head * a.T + query0 + row_of(e), key0 + col_of(n, e), a.T);
        weights<N> of_keys(ds);
        T::product_columns(dq, of_keys, k + at);
        T::template wait_products<0>(dq);
    }
    const float factor[2] = {args.scale, args.scale};
    store_rows<D>((elem *)a.dqkv + query_at(a, b, query0, h), row_stride(a), dq, factor,
                  a.T - query0, a.HS);
    if (args.partial) {
        int block = block_index_again(), n = (int)div_up(a.T, ROWS), head = block / n;
        __syncthreads(); /* no tile is read any more */
        sum_rows<D>(args.partial + sums_at(a, head / a.NH, n - 1 - block % n, head % a.NH),
                    shared_memory<float>(), dq, args.scale, a.HS);
    }
}

template <typename T, bool MORE, int KEYS>
static __global__ void __launch_bounds__(THREADS, BLOCKS<T, MORE>)
    attention_backward_queries_kernel(const __grid_constant__ tile_backward_args args) {
    if constexpr (T::IS_HERE) backward_queries<T, MORE, KEYS>(args);
}

/* dk and dv: a block has keys, and goes through the queries of every head that reads them. Scores
 * are transposed here: rows are keys. */
template <typename T, bool MORE, int QUERIES>
static __device__ __forceinline__ void backward_keys(const tile_backward_args &args) {
    constexpr int D = T::D, N = QUERIES / 8, ROWS_SIZE = T::template SIZE<ROWS>;
    constexpr int SIZE = T::template SIZE<QUERIES>;
    /* Whether the op is copied decides whether registers suffice: tools/gpu/check_spills.py. */
    const std::conditional_t<(D > 64), const attention_backward &, attention_backward> a = args.op;
    gpt_dropout dropout = dropout_of<MORE>(a.dropout);
    const soft_cap *cap = MORE ? &args.cap : NULL;
    int n_blocks = (int)div_up(a.T, ROWS), head = head_of_block(n_blocks), group = a.NH / a.NKV;
    int b = head / a.NKV, h0 = head % a.NKV * group;
    int first_k = (int)blockIdx.x % n_blocks * ROWS; /* the first keys have the most queries */
    int warp_row = (int)threadIdx.x / WARP * 16, key0 = first_k + warp_row; /* of this warp */
    sight see = see_of<MORE>(a, b);
    int first_query = first_k / QUERIES * QUERIES;
    int end = end_query(see, least<int>(first_k + ROWS, a.T) - 1);
    elem *k = shared_memory<elem>(), *v = k + ROWS_SIZE, *q = v + ROWS_SIZE;
    elem *dout = q + STAGES * SIZE;
    float *lse = (float *)(dout + STAGES * SIZE), *delta = lse + STAGES * QUERIES;
    tile_arrivals<T> arrivals(delta + STAGES * QUERIES);

    auto queries_of = [&](int h, int query) {
        return tile_source<T, QUERIES>(rows_of_qkv(a, a.qkv, &args.qkv, b, query, h), arrivals);
    };
    auto douts_of = [&](int h, int query) {
        return tile_source<T, QUERIES>(rows_of_out(a, a.dout, &args.dout, b, query, h), arrivals);
    };
    auto queries = queries_of(h0, first_query), douts = douts_of(h0, first_query);
    auto fetch = [&](int h, int query, int stage) {
        /* A box is as easily found from its numbers, which are in registers anyway. */
        if (T::BOXES || (h > h0 && query == first_query))
            queries = queries_of(h, query), douts = douts_of(h, query);
        queries.fetch(q + stage * SIZE);
        douts.fetch(dout + stage * SIZE, 1);
        queries.advance();
        douts.advance();
        if (int i = (int)threadIdx.x % QUERIES; (int)threadIdx.x < 2 * QUERIES) {
            const float *from = (int)threadIdx.x < QUERIES ? args.lse : args.delta;
            float *to = (int)threadIdx.x < QUERIES ? lse : delta;
            copy_async_4(to + stage * QUERIES + i, from + ((int64_t)b * a.NH + h) * a.T + query + i,
                         query + i < a.T);
        }
    };
    int key_head = a.NH + head % a.NKV;
    tile_source<T, ROWS>(rows_of_qkv(a, a.qkv, &args.qkv, b, first_k, key_head), arrivals).fetch(k);
    tile_source<T, ROWS>(rows_of_qkv(a, a.qkv, &args.qkv, b, first_k, key_head + a.NKV), arrivals)
        .fetch(v, 3);
    fetch(h0, first_query, 0);
    arrivals.wait();
    const auto keys = keep_if<T, (D <= 64)>(k); /* there are no registers to keep v too */
    float dk[D / 8][4] = {}, dv[D / 8][4] = {}, scale = args.scale * LOG2E;
    for (int stage = 0, h = h0, next_h, query = first_query, next_query; h < h0 + group;
         stage ^= 1, h = next_h, query = next_query) {
        bool is_last = query + QUERIES >= end; /* of this head */
        next_h = h + is_last, next_query = is_last ? first_query : query + QUERIES;
        if (h > h0 || query > first_query) arrivals.wait();
        if (next_h < h0 + group) fetch(next_h, next_query, stage ^ 1);
        int at = stage * SIZE;
        const float *lses = lse + stage * QUERIES, *deltas = delta + stage * QUERIES;
        float p[N][4], ds[N][4];
        T::product_rows(p, keys, q + at);
        T::product_rows(ds, v, dout + at);
        T::template wait_products<1>(p);
        cap_products(p, cap);
        if (!all_see(see, query, QUERIES, key0, 16))
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (!sees(see, query + col_of(n, e), key0 + row_of(e))) p[n][e] = -INFINITY;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) p[n][e] = exp2_of(p[n][e] * scale - lses[col_of(n, e)]);
        if constexpr (!MORE) {
            weights<N> of_douts(p);
            T::product_columns(dv, of_douts, dout + at);
        }
        T::template wait_products<MORE ? 0 : 1>(ds);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                score_gradient(p[n][e], ds[n][e], deltas[col_of(n, e)], cap, lses[col_of(n, e)],
                               dropout, ((int64_t)b * a.NH + h) * a.T + query + col_of(n, e),
                               key0 + row_of(e), a.T);
        if constexpr (MORE) {
            weights<N> of_douts(p);
            T::product_columns(dv, of_douts, dout + at);
        }
        weights<N> of_queries(ds);
        T::product_columns(dk, of_queries, q + at);
        T::template wait_products<0>(dv);
        T::template wait_products<0>(dk);
    }
    const float factor[2] = {args.scale, args.scale}, one[2] = {1, 1};
    elem *dqkv = (elem *)a.dqkv;
    int64_t stride = row_stride(a);
    store_rows<D>(dqkv + key_at(a, b, key0, h0), stride, dk, factor, a.T - key0, a.HS);
    store_rows<D>(dqkv + value_at(a, b, key0, h0), stride, dv, one, a.T - key0, a.HS);
    if (args.partial) {
        float *memory = shared_memory<float>();
        __syncthreads(); /* no tile is read any more */
        sum_rows<D>(args.partial + sums_at(a, b, first_k / ROWS, key_head), memory, dk, args.scale,
                    a.HS);
        sum_rows<D>(args.partial + sums_at(a, b, first_k / ROWS, key_head + a.NKV),
                    memory + WARPS * D, dv, 1, a.HS);
    }
}

template <typename T, bool MORE, int QUERIES>
static __global__ void __launch_bounds__(THREADS, BLOCKS<T, MORE>)
    attention_backward_keys_kernel(const __grid_constant__ tile_backward_args args) {
    if constexpr (T::IS_HERE) backward_keys<T, MORE, QUERIES>(args);
}

/* ---- starting them: with tiles of the other side as large as registers allow ---- */

/* Of `fixed` tiles that stay, of two that come in stages, with OTHER rows each, and of their arrivals. */
template <typename T, int OTHER> static constexpr size_t tile_bytes(int fixed) {
    return ARRIVAL_BYTES + sizeof(elem) * (size_t)(fixed * T::template SIZE<ROWS> +
                                                   2 * STAGES * T::template SIZE<OTHER>);
}

/* The map of x (B, T, heads, HS) where tiles arrive in boxes. */
template <typename T, typename Op>
static box_map map_of(gpt_ctx *ctx, const void *x, const Op &a, int heads) {
    if constexpr (T::BOXES) return cuda_box_map(ctx, x, a.B, a.T, heads, a.HS, (int)T::BOX_ROWS);
    return {};
}

template <typename T, bool MORE, int KEYS>
static void start_forward(gpt_ctx *ctx, const attention_forward &a) {
    dim3 grid((unsigned)(div_up(a.T, ROWS) * a.B * a.NH));
    launch(ctx, attention_forward_kernel<T, MORE, KEYS>, grid, THREADS, tile_bytes<T, KEYS>(1),
           forward_args{a, score_scale(a.scale, a.HS), map_of<T>(ctx, a.qkv, a, a.NH + 2 * a.NKV),
                        cap_of(a.cap, score_scale(a.scale, a.HS))});
}

template <typename T> static void start_prefill(gpt_ctx *ctx, const attention_decode &a) {
    dim3 grid((unsigned)(div_up(a.N, ROWS) * a.NH));
    launch(ctx, attention_prefill_kernel<T>, grid, THREADS, tile_bytes<T, ATTENTION_TILE>(1), a,
           score_scale(a.scale, a.HS), cap_of(a.cap, score_scale(a.scale, a.HS)));
}

template <typename T, bool MORE, int KEYS>
static void start_backward_queries(gpt_ctx *ctx, const backward_args &all) {
    const attention_backward &a = all.op;
    dim3 grid((unsigned)(div_up(a.T, ROWS) * a.B * a.NH));
    launch(ctx, attention_backward_queries_kernel<T, MORE, KEYS>, grid, THREADS,
           tile_bytes<T, KEYS>(2) + sizeof(float) * 2 * ROWS,
           tile_backward_args{all, map_of<T>(ctx, a.qkv, a, a.NH + 2 * a.NKV),
                              map_of<T>(ctx, a.dout, a, a.NH), cap_of(a.cap, all.scale)});
}

template <typename T, bool MORE, int QUERIES>
static void start_backward_keys(gpt_ctx *ctx, const backward_args &all) {
    const attention_backward &a = all.op;
    dim3 grid((unsigned)(div_up(a.T, ROWS) * a.B * a.NKV));
    launch(ctx, attention_backward_keys_kernel<T, MORE, QUERIES>, grid, THREADS,
           tile_bytes<T, QUERIES>(2) + sizeof(float) * 2 * STAGES * QUERIES,
           tile_backward_args{all, map_of<T>(ctx, a.qkv, a, a.NH + 2 * a.NKV),
                              map_of<T>(ctx, a.dout, a, a.NH), cap_of(a.cap, all.scale)});
}

template <typename Op> static bool has_tiles(const Op &a) {
    return a.HS <= 128 && a.HS % 8 == 0;
}

template <bool MORE> static void forward_of(gpt_ctx *ctx, const attention_forward &op) {
    if (op.HS <= 32)
        start_forward<warp_tiles<32>, MORE, 64>(ctx, op);
    else if (op.HS <= 64 && ctx->has_groups)
        start_forward<group_tiles<64, MORE ? 2 : 4>, MORE, 64>(ctx, op);
    else if (op.HS <= 64)
        start_forward<warp_tiles<64>, MORE, 64>(ctx, op);
    else if (ctx->has_groups)
        start_forward<group_tiles<128, 2>, MORE, 64>(ctx, op);
    else
        start_forward<warp_tiles<128>, MORE, 64>(ctx, op);
}

template <bool MORE> static void backward_of(gpt_ctx *ctx, const backward_args &args) {
    int HS = args.op.HS;
    if (HS <= 32) {
        start_backward_queries<warp_tiles<32>, MORE, 64>(ctx, args);
        start_backward_keys<warp_tiles<32>, MORE, 32>(ctx, args);
    } else if (HS <= 64 && ctx->has_groups) {
        start_backward_queries<group_tiles<64, MORE ? 2 : 4>, MORE, 64>(ctx, args);
        start_backward_keys<group_tiles<64, 2>, MORE, 64>(ctx, args);
    } else if (HS <= 64) {
        start_backward_queries<warp_tiles<64>, MORE, 64>(ctx, args);
        start_backward_keys<warp_tiles<64>, MORE, 32>(ctx, args);
    } else if (ctx->has_groups) {
        start_backward_queries<group_tiles<128, 2>, MORE, 32>(ctx, args);
        start_backward_keys<group_tiles<128, 2>, MORE, 32>(ctx, args);
    } else {
        start_backward_queries<warp_tiles<128>, MORE, 32>(ctx, args);
        start_backward_keys<warp_tiles<128>, MORE, MORE ? 16 : 32>(ctx, args);
    }
}

int attention_tiles_forward(gpt_ctx *ctx, const attention_forward &op) {
    if (!has_tiles(op)) return 0;
    needs_more(op) ? forward_of<true>(ctx, op) : forward_of<false>(ctx, op);
    return 1;
}

int attention_tiles_backward(gpt_ctx *ctx, const backward_args &args) {
    if (!has_tiles(args.op)) return 0;
    needs_more(args.op) ? backward_of<true>(ctx, args) : backward_of<false>(ctx, args);
    return 1;
}

int attention_tiles_prefill(gpt_ctx *ctx, const attention_decode &op) {
    if (!has_tiles(op)) return 0;
    if (op.HS <= 32)
        start_prefill<warp_tiles<32>>(ctx, op);
    else if (op.HS <= 64)
        ctx->has_groups ? start_prefill<group_tiles<64, 1, false>>(ctx, op)
                        : start_prefill<warp_tiles<64>>(ctx, op);
    else
        ctx->has_groups ? start_prefill<group_tiles<128, 1, false>>(ctx, op)
                        : start_prefill<warp_tiles<128>>(ctx, op);
    return 1;
}
