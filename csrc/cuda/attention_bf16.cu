/* attention_bf16.cu: causal attention on tensor cores, in the tiles of Dao 2023 (FlashAttention-2).
 *
 * A block has TILE rows (queries, or for dk and dv keys) in shared memory and goes through the other
 * side tile by tile, the next one arriving while it works. A warp has 16 of the rows. Every product
 * is one of two: `product_rows` with the rows of a tile (scores, dp), or `product_columns` with its
 * columns (out, dq, dk, dv), whose left side are scores that stay in registers.
 *
 * Backward makes dq in one kernel, and dk and dv in another, so that each number is summed by one
 * thread, in one order. D is the size of a head, rounded up to what a kernel exists for. */
#include "attention.h"
#include "instructions.h"

#include <type_traits>

enum { TILE = ATTENTION_TILE, WARPS = TILE / 16, THREADS = WARPS * WARP, STAGES = 2 };

static constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

/* Rows of a tile are 16 bytes longer than D, so that eight of them are in different banks. */
template <int D> static constexpr int STRIDE = D + 8;

/* ---- tiles and operands ---- */

/* Rows of HS numbers, `stride` apart, into a tile (ROWS, STRIDE<D>): zeros past `there` rows and past
 * HS. Asynchronously where rows are aligned. A thread has one column of 8 in every STEP rows. */
template <int D, int ROWS>
static __device__ inline void load_tile(elem *tile, const elem *from, int64_t stride, int there,
                                        int HS) {
    enum { CHUNKS = D / 8, STEP = THREADS / CHUNKS };
    static_assert(ROWS % STEP == 0);
    int row0 = (int)threadIdx.x / CHUNKS, col = (int)threadIdx.x % CHUNKS * 8;
    elem *to = tile + row0 * STRIDE<D> + col;
    const elem *at = from + row0 * stride + col;
    if (HS % 8 == 0) {
#pragma unroll
        for (int row = 0; row < ROWS; row += STEP) {
            bool here = row0 + row < there && col < HS;
            copy_async(to + row * STRIDE<D>, here ? at + row * stride : from, here);
        }
    } else {
#pragma unroll 1
        for (int row = 0; row < ROWS; row += STEP)
            for (int k = 0; k < 8; k++)
                to[row * STRIDE<D> + k] = row0 + row < there && col + k < HS
                                              ? at[row * stride + k]
                                              : from_float<elem>(0.0f);
    }
}

/* 16 rows and columns of a tile, as the left side of products. */
struct operand {
    uint32_t r[4];
};

template <int D> static __device__ inline operand load_slice(const elem *rows, int k) {
    int lane = (int)threadIdx.x % WARP;
    operand a;
    load_matrices(a.r, rows + (lane % 16) * STRIDE<D> + lane / 16 * 8 + 16 * k);
    return a;
}

/* 16 rows, all of their columns, kept. */
template <int D> struct operands {
    operand slices[D / 16];
    __device__ void load(const elem *rows) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) slices[k] = load_slice<D>(rows, k);
    }
    __device__ const operand &operator()(int k) const { return slices[k]; }
};

/* s (16, 8 N) = a tile^T: column n is the product with row n. slice(k) gives columns 16 k and on of a. */
template <int D, int N, typename F>
static __device__ inline void product_rows(float (&s)[N][4], F slice, const elem *tile) {
    int lane = (int)threadIdx.x % WARP;
    const elem *at = tile + (lane / 16 * 8 + lane % 8) * STRIDE<D> + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const operand a = slice(k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            load_matrices(b, at + n * 8 * STRIDE<D> + 16 * k);
            multiply_add(s[n], a.r, b[0], b[1]);
            multiply_add(s[n + 1], a.r, b[2], b[3]);
        }
    }
}

/* out (16, D) += s tile, s (16, 8 N) in bf16: row n of the tile has weight s[., n]. */
template <int D, int N>
static __device__ inline void product_columns(float (&out)[D / 8][4], const float (&s)[N][4],
                                              const elem *tile) {
    int lane = (int)threadIdx.x % WARP;
    const elem *at = tile + lane % 16 * STRIDE<D> + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t a[4] = {pair_of(s[n][0], s[n][1]), pair_of(s[n][2], s[n][3]),
                         pair_of(s[n + 1][0], s[n + 1][1]), pair_of(s[n + 1][2], s[n + 1][3])};
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            uint32_t b[4];
            load_matrices_transposed(b, at + n * 8 * STRIDE<D> + 8 * d);
            multiply_add(out[d], a, b[0], b[1]);
            multiply_add(out[d + 1], a, b[2], b[3]);
        }
    }
}

/* The row and column of number e in column group n of a lane's 16 rows. */
static __device__ inline int row_of(int e) {
    return (int)threadIdx.x % WARP / 4 + e / 2 * 8;
}
static __device__ inline int col_of(int n, int e) {
    return n * 8 + (int)threadIdx.x % 4 * 2 + e % 2;
}

/* Rows of x times factor, to rows of HS numbers `stride` apart, `there` of them. */
template <int D>
static __device__ inline void store_rows(elem *to, int64_t stride, const float (&x)[D / 8][4],
                                         const float (&factor)[2], int there, int HS) {
#pragma unroll
    for (int d = 0; d < D / 8; d++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            int row = row_of(e), col = col_of(d, 0);
            if (row >= there) continue;
            elem *at = to + row * stride + col;
            float low = x[d][e] * factor[e / 2], high = x[d][e + 1] * factor[e / 2];
            if (HS % 2 == 0) {
                if (col < HS) *(uint32_t *)at = pair_of(low, high);
            } else {
                if (col < HS) at[0] = from_float<elem>(low);
                if (col + 1 < HS) at[1] = from_float<elem>(high);
            }
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

/* ---- forward ---- */

/* A tile of queries of one head, and the keys and values of which each query sees those up to its own
 * position that are within the window. Pointers are to first rows, strides from one row to the next. */
typedef struct forward_tile {
    elem *out;
    float *lse; /* or NULL */
    const elem *q, *k, *v;
    int64_t out_stride, q_stride, kv_stride;
    int n_q, n_k;  /* rows there are; TILE queries at most */
    int first_q;   /* the position of the first */
    int window;    /* 0: none */
    int64_t row_0; /* the number of a query at position 0 among (B, NH, T), and */
    int T;         /* keys from one query to the next, for dropout */
    int HS;
    float scale;
} forward_tile;

/* The score of a key that a query does not see. It is finite: rows of a tile in which they see no key
 * at all have a maximum to subtract, and shrink to 0 what that adds as soon as they see one. */
static constexpr float UNSEEN = -1e30f;

template <int D>
static __device__ __forceinline__ void forward(const forward_tile &t, gpt_dropout dropout) {
    enum { N = TILE / 8 };
    int warp = (int)threadIdx.x / WARP, row0 = warp * 16, n_tiles = (int)div_up(t.n_k, TILE);
    elem *q = shared_memory<elem>(), *k = q + TILE * STRIDE<D>, *v = k + STAGES * TILE * STRIDE<D>;

    auto fetch = [&](int tile, int stage) {
        int key = tile * TILE, at = stage * TILE * STRIDE<D>;
        load_tile<D, TILE>(k + at, t.k + key * t.kv_stride, t.kv_stride, t.n_k - key, t.HS);
        load_tile<D, TILE>(v + at, t.v + key * t.kv_stride, t.kv_stride, t.n_k - key, t.HS);
    };
    int first_tile = first_key(t.first_q, t.window) / TILE;
    load_tile<D, TILE>(q, t.q, t.q_stride, t.n_q, t.HS);
    copy_commit();
    fetch(first_tile, first_tile % STAGES);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    operands<D> queries;
    queries.load(q + row0 * STRIDE<D>);

    float out[D / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    float scale = t.scale * LOG2E; /* so that exp is exp2 */
    for (int tile = first_tile; tile < n_tiles; tile++) {
        if (tile + 1 < n_tiles) fetch(tile + 1, (tile + 1) % STAGES);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        int at = tile % STAGES * TILE * STRIDE<D>;
        bool all_seen =
            (tile + 1) * TILE <= t.first_q + 1 && sees(t.first_q + TILE - 1, tile * TILE, t.window);
        float s[N][4];
        product_rows<D>(s, queries, k + at);

        float new_max[2] = {max[0], max[1]}, below[2];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = tile * TILE + col_of(n, e), position = t.first_q + row0 + row_of(e);
                if (!all_seen && !sees(position, key, t.window)) s[n][e] = UNSEEN;
                new_max[e / 2] = fmaxf(new_max[e / 2], s[n][e]);
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            new_max[r] = row_max(new_max[r]);
            float shrink = exp2_of((max[r] - new_max[r]) * scale);
            max[r] = new_max[r];
            /* Not UNSEEN itself: its product is rounded here, and below it may not be. */
            below[r] = fmaxf(new_max[r], UNSEEN / 2) * scale;
            sum[r] *= shrink;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                out[d][2 * r] *= shrink;
                out[d][2 * r + 1] *= shrink;
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = exp2_of(s[n][e] * scale - below[e / 2]);
                sum[e / 2] += s[n][e];
                if (dropout.p > 0) {
                    int64_t i = t.row_0 + t.first_q + row0 + row_of(e);
                    s[n][e] *=
                        dropout_factor(dropout, (uint64_t)(i * t.T + tile * TILE + col_of(n, e)));
                }
            }
        product_columns<D>(out, s, v + at);
        __syncthreads(); /* before this stage is filled again */
    }

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] = row_sum(sum[r]);
        inverse[r] = 1.0f / sum[r];
        int row = row0 + row_of(2 * r);
        if (t.lse && threadIdx.x % 4 == 0 && row < t.n_q)
            t.lse[row] = (max[r] * scale + log2f(sum[r])) * LN2;
    }
    store_rows<D>(t.out + row0 * t.out_stride, t.out_stride, out, inverse, t.n_q - row0, t.HS);
}

/* Kernels exist with and without dropout and window (MORE): what these need takes registers even where it
 * is skipped, and with them blocks that could run at the same time. */
template <bool MORE> static __device__ inline gpt_dropout dropout_of(gpt_dropout_site site) {
    return MORE ? dropout_at(site) : gpt_dropout{0, 0};
}
template <bool MORE> static __device__ inline int window_of(int window) {
    return MORE ? window : 0;
}
/* Blocks at a time on a multiprocessor: three where their registers suffice. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <int D, bool MORE> static constexpr int BLOCKS = D > 32 || MORE ? 2 : 3;
#else
template <int D, bool MORE> static constexpr int BLOCKS = D > 64 || MORE ? 2 : 3;
#endif

/* Blocks with more tiles to go through come first, so that none is left alone at the end. */
static __device__ inline int longest_first(int n_tiles, int n_heads) {
    return n_tiles - 1 - (int)blockIdx.x / n_heads;
}

template <int D, bool MORE>
static __global__ void __launch_bounds__(THREADS, BLOCKS<D, MORE>)
    attention_forward_kernel(attention_forward a, float scale) {
    int n_heads = a.B * a.NH, head = (int)blockIdx.x % n_heads, b = head / a.NH, h = head % a.NH;
    int first_q = longest_first((int)div_up(a.T, TILE), n_heads) * TILE;
    int64_t row_0 = (int64_t)head * a.T;
    const elem *qkv = (const elem *)a.qkv;
    forward_tile t = {.out = (elem *)a.out + out_at(a, b, first_q, h),
                      .lse = a.lse ? a.lse + row_0 + first_q : NULL,
                      .q = qkv + query_at(a, b, first_q, h),
                      .k = qkv + key_at(a, b, 0, h),
                      .v = qkv + value_at(a, b, 0, h),
                      .out_stride = (int64_t)a.NH * a.HS,
                      .q_stride = row_stride(a),
                      .kv_stride = row_stride(a),
                      .n_q = least<int>(TILE, a.T - first_q),
                      .n_k = least<int>(first_q + TILE, a.T),
                      .first_q = first_q,
                      .window = window_of<MORE>(a.window),
                      .row_0 = row_0,
                      .T = a.T,
                      .HS = a.HS,
                      .scale = scale};
    forward<D>(t, dropout_of<MORE>(a.dropout));
}

/* A tile of rows of a decoding step, where all of them are of one sequence. */
template <int D>
static __global__ void __launch_bounds__(THREADS)
    attention_prefill_kernel(attention_decode a, float scale) {
    int h = (int)blockIdx.x % a.NH;
    int first = longest_first((int)div_up(a.N, TILE), a.NH) * TILE,
        n = least<int>(TILE, a.N - first);
    if (!is_whole_tile(a, first)) return;
    int64_t cache = cache_at(a, a.seqs[first], h), stride = (int64_t)(a.NH + 2 * a.NKV) * a.HS;
    forward_tile t = {.out = (elem *)a.out + ((int64_t)first * a.NH + h) * a.HS,
                      .lse = NULL,
                      .q = (const elem *)a.qkv + first * stride + (int64_t)h * a.HS,
                      .k = (const elem *)a.cache_k + cache,
                      .v = (const elem *)a.cache_v + cache,
                      .out_stride = (int64_t)a.NH * a.HS,
                      .q_stride = stride,
                      .kv_stride = a.HS,
                      .n_q = n,
                      .n_k = a.positions[first] + n,
                      .first_q = a.positions[first],
                      .window = a.window,
                      .row_0 = 0,
                      .T = 0,
                      .HS = a.HS,
                      .scale = scale};
    forward<D>(t, gpt_dropout{0, 0});
}

/* ---- backward ----
 *
 * Dao 2023 has one kernel with five products for each pair of tiles; the two here each compute scores
 * and their gradients, which makes seven. But in one kernel dq is a sum over blocks, read and written
 * in float32 for each pair. By counting, that is 32 KB through the second-level cache for 1 MFLOP
 * saved (heads of 64), which takes longer than the MFLOP. And to be deterministic, blocks would have to
 * wait for each other in turn, which no emulation shows to end, or keep a dq for each block of keys. */

/* From scores to probabilities with their dropout (p), and from the gradients of those (dp) to the
 * gradients of scores, before the scale. lse is in powers of two. i is the query's number among
 * (B, NH, T). */
static __device__ inline void score_gradient(float &p, float &dp, bool seen, float scale, float lse,
                                             float delta, gpt_dropout dropout, int64_t i, int key,
                                             int T) {
    float probability = seen ? exp2_of(p * scale - lse) : 0, factor = 1;
    if (dropout.p > 0) factor = dropout_factor(dropout, (uint64_t)(i * T + key));
    p = probability * factor;
    dp = probability * (dp * factor - delta);
}

/* dq: a block has queries, and goes through keys. */
template <int D, bool MORE, int KEYS>
static __global__ void __launch_bounds__(THREADS, BLOCKS<D, MORE>)
    attention_backward_queries_kernel(const __grid_constant__ backward_args args) {
    enum { N = KEYS / 8 };
    const attention_backward &a = args.op;
    gpt_dropout dropout = dropout_of<MORE>(a.dropout);
    int n_heads = a.B * a.NH, head = (int)blockIdx.x % n_heads, b = head / a.NH, h = head % a.NH;
    int first_q = longest_first((int)div_up(a.T, TILE), n_heads) * TILE;
    int warp = (int)threadIdx.x / WARP, row0 = first_q + warp * 16;
    int n_tiles = (int)div_up(least(first_q + TILE, a.T), KEYS), window = window_of<MORE>(a.window);
    int first_tile = first_key(first_q, window) / KEYS;
    elem *q = shared_memory<elem>(), *dout = q + TILE * STRIDE<D>, *k = dout + TILE * STRIDE<D>;
    elem *v = k + STAGES * KEYS * STRIDE<D>;
    int64_t stride = row_stride(a), out_stride = (int64_t)a.NH * a.HS;

    auto fetch = [&](int tile, int stage) {
        int key = tile * KEYS, at = stage * KEYS * STRIDE<D>;
        load_tile<D, KEYS>(k + at, (const elem *)a.qkv + key_at(a, b, key, h), stride, a.T - key,
                           a.HS);
        load_tile<D, KEYS>(v + at, (const elem *)a.qkv + value_at(a, b, key, h), stride, a.T - key,
                           a.HS);
    };
    load_tile<D, TILE>(q, (const elem *)a.qkv + query_at(a, b, first_q, h), stride, a.T - first_q,
                       a.HS);
    load_tile<D, TILE>(dout, (const elem *)a.dout + out_at(a, b, first_q, h), out_stride,
                       a.T - first_q, a.HS);
    copy_commit();
    fetch(first_tile, first_tile % STAGES);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    operands<D> queries;
    queries.load(q + warp * 16 * STRIDE<D>);
    /* There are no registers to keep both. */
    auto douts = [&](int slice) { return load_slice<D>(dout + warp * 16 * STRIDE<D>, slice); };

    float dq[D / 8][4] = {}, lse[2], delta[2], scale = args.scale * LOG2E;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = row0 + row_of(2 * r);
        lse[r] = row < a.T ? a.lse[(int64_t)head * a.T + row] * LOG2E : INFINITY;
        delta[r] = row < a.T ? args.delta[(int64_t)head * a.T + row] : 0;
    }
    for (int tile = first_tile; tile < n_tiles; tile++) {
        if (tile + 1 < n_tiles) fetch(tile + 1, (tile + 1) % STAGES);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        int at = tile % STAGES * KEYS * STRIDE<D>;
        float p[N][4], ds[N][4];
        product_rows<D>(p, queries, k + at);
        product_rows<D>(ds, douts, v + at);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = tile * KEYS + col_of(n, e), row = row0 + row_of(e);
                score_gradient(p[n][e], ds[n][e], sees(row, key, window), scale, lse[e / 2],
                               delta[e / 2], dropout, (int64_t)head * a.T + row, key, a.T);
            }
        product_columns<D>(dq, ds, k + at);
        __syncthreads();
    }
    const float factor[2] = {args.scale, args.scale};
    store_rows<D>((elem *)a.dqkv + query_at(a, b, row0, h), stride, dq, factor, a.T - row0, a.HS);
}

/* dk and dv: a block has keys, and goes through the queries of every head that reads them. Scores
 * are transposed here: rows are keys. */
template <int D, bool MORE, int QUERIES>
static __global__ void __launch_bounds__(THREADS, BLOCKS<D, MORE>)
    attention_backward_keys_kernel(const __grid_constant__ backward_args args) {
    enum { N = QUERIES / 8 };
    /* Whether the op is copied decides whether registers suffice: tools/gpu/check_spills.py. */
    const std::conditional_t<(D > 64), const attention_backward &, attention_backward> a = args.op;
    gpt_dropout dropout = dropout_of<MORE>(a.dropout);
    int n_heads = a.B * a.NKV, b = (int)blockIdx.x % n_heads / a.NKV, group = a.NH / a.NKV;
    int h0 = (int)blockIdx.x % a.NKV * group, warp = (int)threadIdx.x / WARP;
    int key_0 = (int)blockIdx.x / n_heads * TILE, row0 = key_0 + warp * 16;
    int first_query = key_0 / QUERIES * QUERIES, window = window_of<MORE>(a.window);
    int end = end_query(least(key_0 + TILE, a.T) - 1, window, a.T);
    elem *k = shared_memory<elem>(), *v = k + TILE * STRIDE<D>, *q = v + TILE * STRIDE<D>;
    elem *dout = q + STAGES * QUERIES * STRIDE<D>;
    float *lse = (float *)(dout + STAGES * QUERIES * STRIDE<D>), *delta = lse + STAGES * QUERIES;
    int64_t stride = row_stride(a), out_stride = (int64_t)a.NH * a.HS;

    auto fetch = [&](int h, int query, int stage) {
        int at = stage * QUERIES * STRIDE<D>, there = a.T - query;
        load_tile<D, QUERIES>(q + at, (const elem *)a.qkv + query_at(a, b, query, h), stride, there,
                              a.HS);
        load_tile<D, QUERIES>(dout + at, (const elem *)a.dout + out_at(a, b, query, h), out_stride,
                              there, a.HS);
        if (int i = (int)threadIdx.x; i < QUERIES) {
            int64_t row = ((int64_t)b * a.NH + h) * a.T + query + i;
            lse[stage * QUERIES + i] = i < there ? a.lse[row] * LOG2E : INFINITY;
            delta[stage * QUERIES + i] = i < there ? args.delta[row] : 0;
        }
    };
    load_tile<D, TILE>(k, (const elem *)a.qkv + key_at(a, b, key_0, h0), stride, a.T - key_0, a.HS);
    load_tile<D, TILE>(v, (const elem *)a.qkv + value_at(a, b, key_0, h0), stride, a.T - key_0,
                       a.HS);
    copy_commit();
    fetch(h0, first_query, 0);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    operands<D> kept;
    if (D <= 64) kept.load(k + warp * 16 * STRIDE<D>);
    /* There are no registers to keep both, and in large heads neither. */
    auto keys = [&](int slice) {
        return D <= 64 ? kept.slices[slice] : load_slice<D>(k + warp * 16 * STRIDE<D>, slice);
    };
    auto values = [&](int slice) { return load_slice<D>(v + warp * 16 * STRIDE<D>, slice); };
    float dk[D / 8][4] = {}, dv[D / 8][4] = {}, scale = args.scale * LOG2E;
    for (int stage = 0, h = h0, query0 = first_query; h < h0 + group; stage = 1 - stage) {
        bool is_last = query0 + QUERIES >= end; /* of this head */
        int next_h = h + is_last, next_query = is_last ? first_query : query0 + QUERIES;
        if (next_h < h0 + group) fetch(next_h, next_query, 1 - stage);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        int at = stage * QUERIES * STRIDE<D>;
        float p[N][4], ds[N][4];
        product_rows<D>(p, keys, q + at);
        product_rows<D>(ds, values, dout + at);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int col = col_of(n, e), query = query0 + col, key = row0 + row_of(e);
                score_gradient(p[n][e], ds[n][e], sees(query, key, window), scale,
                               lse[stage * QUERIES + col], delta[stage * QUERIES + col], dropout,
                               ((int64_t)b * a.NH + h) * a.T + query, key, a.T);
            }
        product_columns<D>(dv, p, dout + at);
        product_columns<D>(dk, ds, q + at);
        __syncthreads();
        h = next_h, query0 = next_query;
    }
    const float factor[2] = {args.scale, args.scale}, one[2] = {1, 1};
    store_rows<D>((elem *)a.dqkv + key_at(a, b, row0, h0), stride, dk, factor, a.T - row0, a.HS);
    store_rows<D>((elem *)a.dqkv + value_at(a, b, row0, h0), stride, dv, one, a.T - row0, a.HS);
}

/* ---- starting them: with tiles of the other side as large as registers allow ---- */

/* Of `fixed` tiles that stay, and of two that come in stages, with `other` rows each. */
template <int D> static inline size_t tile_bytes(int fixed, int other) {
    return sizeof(elem) * STRIDE<D> * (size_t)(fixed * TILE + 2 * STAGES * other);
}

template <int D> static void start_forward(gpt_ctx *ctx, const attention_forward &a) {
    dim3 grid((unsigned)(div_up(a.T, TILE) * a.B * a.NH));
    launch(ctx,
           a.dropout.p > 0 || a.window > 0 ? attention_forward_kernel<D, true>
                                           : attention_forward_kernel<D, false>,
           grid, THREADS, tile_bytes<D>(1, TILE), a, attention_scale(a.HS));
}

template <int D> static void start_prefill(gpt_ctx *ctx, const attention_decode &a) {
    dim3 grid((unsigned)(div_up(a.N, TILE) * a.NH));
    launch(ctx, attention_prefill_kernel<D>, grid, THREADS, tile_bytes<D>(1, TILE), a,
           attention_scale(a.HS));
}

template <int D, bool MORE, int KEYS, int QUERIES>
static void start_backward_of(gpt_ctx *ctx, const backward_args &args) {
    const attention_backward &a = args.op;
    unsigned n_tiles = (unsigned)div_up(a.T, TILE);
    launch(ctx, attention_backward_queries_kernel<D, MORE, KEYS>, dim3(n_tiles * a.B * a.NH),
           THREADS, tile_bytes<D>(2, KEYS), args);
    launch(ctx, attention_backward_keys_kernel<D, MORE, QUERIES>, dim3(n_tiles * a.B * a.NKV),
           THREADS, tile_bytes<D>(2, QUERIES) + sizeof(float) * 2 * STAGES * QUERIES, args);
}

template <int D, int KEYS, int QUERIES>
static void start_backward(gpt_ctx *ctx, const backward_args &args) {
    if (args.op.dropout.p > 0 || args.op.window > 0)
        start_backward_of<D, true, KEYS, QUERIES>(ctx, args);
    else
        start_backward_of<D, false, KEYS, QUERIES>(ctx, args);
}

int attention_tiles_forward(gpt_ctx *ctx, const attention_forward &op) {
    if (op.HS > 128) return 0;
    if (op.HS > 64)
        start_forward<128>(ctx, op);
    else if (op.HS > 32)
        start_forward<64>(ctx, op);
    else
        start_forward<32>(ctx, op);
    return 1;
}

int attention_tiles_prefill(gpt_ctx *ctx, const attention_decode &op) {
    if (op.HS > 128) return 0;
    if (op.HS > 64)
        start_prefill<128>(ctx, op);
    else if (op.HS > 32)
        start_prefill<64>(ctx, op);
    else
        start_prefill<32>(ctx, op);
    return 1;
}

int attention_tiles_backward(gpt_ctx *ctx, const backward_args &args) {
    if (args.op.HS > 128) return 0;
    if (args.op.HS > 64)
        start_backward<128, 32, 32>(ctx, args);
    else if (args.op.HS > 32)
        start_backward<64, 64, 32>(ctx, args);
    else
        start_backward<32, 64, 32>(ctx, args);
    return 1;
}
