/* attention_decode.cu: attention to a cache, for heads of whole vectors. The keys of a row are cut into
 * pieces, a block each, whose results are joined in order: Dao et al. 2023, flash-decoding. The size of
 * a piece follows from n_ctx alone, so that a row gets the same bits whatever is decoded with it, and
 * a recorded step stays right as texts grow. */
#include "attention.h"
#include "soft_cap.h"

enum {
    LANES = 8,             /* that share a key: 128 bytes at a time */
    GROUPS = WARP / LANES, /* keys of a warp at a time */
    HEADS = 8,             /* query heads of a block at most, which read the same keys */
    PIECE = 64,            /* the keys of a piece are a multiple of it, */
    MAX_PIECES = 32,       /* so that a row has no more pieces than these */
    SPLIT_ROWS = 32, /* with more rows there are blocks enough: each takes all of a row's pieces */
};

/* float32 needs tanhf, and registers for it that there are not. */
#ifdef CUDA_BF16
static constexpr bool HAS_CAPS = true;
#else
static constexpr bool HAS_CAPS = false;
#endif

typedef struct decode_args {
    attention_decode op;
    float *values; /* (N, NH, n_pieces, HS) sums of a piece; NULL: a block takes all of a row's */
    float *stats;  /* (N, NH, n_pieces, 2) maximum, and the sum of exponentials relative to it */
    float scale;   /* of scores, whose exponentials are powers of 2 */
    int piece;     /* keys */
    int n_pieces;  /* of a row at most */
    int has_tiles;
} decode_args;

/* The pieces that hold what a row sees. */
typedef struct piece_range {
    int first, end;
} piece_range;

static __device__ inline piece_range pieces_of(const decode_args &args, int position) {
    piece_range r = {first_key(sight{args.op.window, NULL, 0}, position) / args.piece,
                     position / args.piece + 1};
    return r;
}

static inline int piece_keys(int n_ctx) {
    return (int)div_up(n_ctx, (int64_t)MAX_PIECES * PIECE) * PIECE;
}

/* ---- joining ---- */

/* Two softmaxes become one: the maximum of both, and the factors of their sums. */
typedef struct joint {
    float max, first, second;
} joint;

static __device__ inline float shrink(float from, float to) {
    return from == to ? 1 : exp2f(from - to); /* both may be -INFINITY */
}
static __device__ inline joint join(float first, float second) {
    float max = fmaxf(first, second);
    joint j = {max, shrink(first, max), shrink(second, max)};
    return j;
}
/* Rounded alike wherever it is used. */
static __device__ inline float join_sums(joint j, float first, float second) {
    return fmaf(first, j.first, second * j.second);
}

/* ---- a piece ---- */

/* What the block has in shared memory, for each of its heads. */
typedef struct decode_memory {
    float *sums;      /* (WARPS, heads, HS) weighted sums of values */
    float *max, *sum; /* (WARPS, heads) */
    float *total;     /* (heads, HS) of the pieces so far */
    float *totals;    /* (2, heads, 2) their maximum and sum, before and after a piece in turn */
} decode_memory;

static __host__ __device__ inline int shared_floats(int heads, int HS) {
    return (WARPS + 1) * heads * HS + 2 * WARPS * heads + 4 * heads;
}

static __device__ inline decode_memory memory_of(int heads, int HS) {
    float *base = shared_memory<float>(), *max = base + WARPS * heads * HS;
    float *sum = max + WARPS * heads, *totals = sum + WARPS * heads;
    decode_memory m = {base, max, sum, totals + 4 * heads, totals};
    return m;
}

/* A block's row and heads: h to h + heads - 1 read key head kv. */
typedef struct decode_row {
    int n, seq, position, begin, h, heads, kv;
} decode_row;

/* The keys of one row of the cache, and its values; those of this step's own rows are where they came
 * from. */
typedef struct cached_row {
    const elem *k, *v;
} cached_row;

static __device__ inline cached_row row_of_key(const attention_decode &a, const decode_row &r,
                                               int64_t cache, int key) {
    int row = r.n - (r.position - key); /* if it is of this step and this sequence */
    const elem *qkv =
        (const elem *)a.qkv + (int64_t)row * row_stride(a) + (int64_t)(a.NH + r.kv) * a.HS;
    cached_row own = {qkv, qkv + (int64_t)a.NKV * a.HS};
    if (row == r.n || (row >= 0 && a.seqs[row] == r.seq)) return own;
    int64_t at = cache + (int64_t)key * a.HS;
    cached_row old = {(const elem *)a.cache_k + at, (const elem *)a.cache_v + at};
    return old;
}

/* Lane l of those that share a key has chunks l, l + LANES ... of it. */
template <int CHUNKS> struct chunks {
    chunk x[CHUNKS];
};

static __device__ inline int chunk_at(int c) {
    return (c * LANES + (int)threadIdx.x % LANES) * PACK;
}

template <int CHUNKS>
static __device__ inline chunks<CHUNKS> load_chunks(const elem *row, int HS, bool there) {
    chunks<CHUNKS> r = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        if (there && chunk_at(c) < HS) r.x[c] = *(const chunk *)(row + chunk_at(c));
    return r;
}

/* Asks for the cache's keys and values of a piece that this block will read, so that memory works while it
 * computes or waits: a thread a row. */
static __device__ inline void bring_piece_near(const decode_args &args, const decode_row &r,
                                               int first) {
    const attention_decode &a = args.op;
    int end = least(first + args.piece, r.position), bytes = a.HS * (int)sizeof(elem);
    int64_t cache = ((int64_t)r.seq * a.NKV + r.kv) * a.n_ctx * a.HS;
    for (int i = 2 * first + (int)threadIdx.x; i < 2 * end; i += THREADS) {
        const elem *of = (const elem *)(i % 2 ? a.cache_v : a.cache_k);
        for (int at = 0; at < bytes; at += 128)
            bring_near((const char *)(of + cache + (int64_t)(i / 2) * a.HS) + at);
    }
}

/* Nothing that is made of these may be kept for the next turn of a loop: it would be twice as much. */
template <int CHUNKS> static __device__ inline void reread(chunks<CHUNKS> &r) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(r.x[c].words[i]));
}

template <int CHUNKS>
static __device__ inline float dot(const chunks<CHUNKS> &a, const chunks<CHUNKS> &b) {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < PACK; i++) sum += number(a.x[c], i) * number(b.x[c], i);
    return sum;
}

/* Of 2 HALF numbers, the lane keeps one half, and adds the same half of the lane across. */
template <int HALF, int W> static __device__ inline int exchange(float (&x)[W], int offset) {
    bool upper = (int)threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        float given = upper ? x[i] : x[i + HALF], kept = upper ? x[i + HALF] : x[i];
        x[i] = kept + __shfl_xor_sync(~0u, given, offset);
    }
    return upper ? HALF : 0;
}

/* Adds up W numbers of the lanes that have the same columns of different keys, each of which then has W
 * / GROUPS sums, from x[0] on. Returns the first one's place among the W. */
template <int W> static __device__ inline int share_out(float (&x)[W]) {
    int first = exchange<W / 2>(x, 2 * LANES);
    return first + exchange<W / 4>(x, LANES);
}

/* One warp's share of the keys first to end - 1, into its part of the memory. */
template <int CHUNKS>
static __device__ inline void attend(const decode_args &args, const decode_row &r,
                                     const decode_memory &m, int first, int end) {
    const attention_decode &a = args.op;
    constexpr int W = CHUNKS * PACK, KEYS = CHUNKS > 2 ? 2 : 4; /* of a lane at a time */
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, HS = a.HS;
    int64_t cache = ((int64_t)r.seq * a.NKV + r.kv) * a.n_ctx * HS;
    const elem *q = (const elem *)a.qkv + (int64_t)r.n * row_stride(a) + (int64_t)r.h * HS;
    float *sums = m.sums + warp * r.heads * HS;
    float max = -INFINITY, sum = 0; /* lane i has those of head i */
#pragma unroll 1
    for (int tile = first; tile < end; tile += WARPS * GROUPS * KEYS) {
        chunks<CHUNKS> k[KEYS], v[KEYS];
        bool seen[KEYS];
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            int key = tile + (i * WARPS + warp) * GROUPS + lane / LANES;
            seen[i] = key >= r.begin && key < end;
            cached_row row = {};
            if (seen[i]) row = row_of_key(a, r, cache, key);
            k[i] = load_chunks<CHUNKS>(row.k, HS, seen[i]);
            v[i] = load_chunks<CHUNKS>(row.v, HS, seen[i]);
        }
#pragma unroll 1
        for (int h = 0; h < r.heads; h++) {
            chunks<CHUNKS> query = load_chunks<CHUNKS>(q + (int64_t)h * HS, HS, true);
            float score[KEYS], top = -INFINITY, exponentials = 0, x[W] = {};
#pragma unroll
            for (int i = 0; i < KEYS; i++) {
                reread(k[i]);
                reread(v[i]);
                float s = lanes_sum<LANES / 2, 1>(dot(query, k[i])) * args.scale;
                if (HAS_CAPS && a.cap > 0) s = capped_score(a.cap, s);
                score[i] = seen[i] ? s : -INFINITY;
                top = fmaxf(top, score[i]);
            }
            joint j = join(__shfl_sync(~0u, max, h), lanes_max<WARP / 2, LANES>(top));
#pragma unroll
            for (int i = 0; i < KEYS; i++) {
                float p = seen[i] ? exp2f(score[i] - j.max) : 0;
                exponentials += p;
#pragma unroll
                for (int e = 0; e < W; e++) x[e] += p * number(v[i].x[e / PACK], e % PACK);
            }
            exponentials = lanes_sum<WARP / 2, LANES>(exponentials);
            if (lane == h) max = j.max, sum = sum * j.first + exponentials;
            int e = share_out(x), s = chunk_at(e / PACK) + e % PACK;
#pragma unroll
            for (int i = 0; i < W / GROUPS; i++)
                if (s < HS) {
                    float *to = sums + h * HS + s + i;
                    *to = tile == first ? x[i] : *to * j.first + x[i];
                }
        }
    }
    if (lane < r.heads) {
        m.max[warp * r.heads + lane] = max;
        m.sum[warp * r.heads + lane] = sum;
    }
}

/* The row's own key and value enter the cache; who reads them in this step does so elsewhere. */
static __device__ inline void store_row(const attention_decode &a, const decode_row &r) {
    int64_t at = (((int64_t)r.seq * a.NKV + r.kv) * a.n_ctx + r.position) * a.HS;
    const elem *k =
        (const elem *)a.qkv + (int64_t)r.n * row_stride(a) + (int64_t)(a.NH + r.kv) * a.HS;
    const elem *v = k + (int64_t)a.NKV * a.HS;
    for (int i = (int)threadIdx.x; i < a.HS / PACK; i += THREADS) {
        int s = i * PACK;
        *(chunk *)((elem *)a.cache_k + at + s) = *(const chunk *)(k + s);
        *(chunk *)((elem *)a.cache_v + at + s) = *(const chunk *)(v + s);
    }
}

/* Joins the warps' results for each column of each head: into the piece's own place, or with those of
 * the pieces before it. */
static __device__ inline void finish_piece(const decode_args &args, const decode_row &r,
                                           const decode_memory &m, int at, bool split) {
    const attention_decode &a = args.op;
    for (int i = (int)threadIdx.x; i < r.heads * a.HS; i += THREADS) {
        int h = i / a.HS, s = i % a.HS;
        float max = -INFINITY, sum = 0, x = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) max = fmaxf(max, m.max[w * r.heads + h]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float factor = shrink(m.max[w * r.heads + h], max);
            sum += factor * m.sum[w * r.heads + h];
            x += factor * m.sums[w * r.heads * a.HS + i];
        }
        if (split) {
            int64_t piece = ((int64_t)r.n * a.NH + r.h + h) * args.n_pieces + at;
            args.values[piece * a.HS + s] = x;
            if (s == 0) args.stats[2 * piece] = max, args.stats[2 * piece + 1] = sum;
        } else {
            const float *before = m.totals + (at % 2 * r.heads + h) * 2;
            float *after = m.totals + ((at + 1) % 2 * r.heads + h) * 2;
            joint j = join(at ? before[0] : -INFINITY, max);
            m.total[i] = join_sums(j, at ? m.total[i] : 0, x);
            if (s == 0) after[0] = j.max, after[1] = join_sums(j, at ? before[1] : 0, sum);
        }
    }
}

/* Blocks of a multiprocessor at least, as far as no register is spilled for them. */
template <int CHUNKS> constexpr int LEAST_BLOCKS = CHUNKS > 1 ? 3 : 6;

/* A block for each row, group of query heads and piece, or for all pieces. */
template <int CHUNKS>
static __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS<CHUNKS>)
    attention_decode_kernel(decode_args args) {
    const attention_decode &a = args.op;
    int group = a.NH / a.NKV, parts = (int)div_up(group, HEADS), block = (int)blockIdx.x, own = 0;
    if (args.values) own = block % args.n_pieces, block /= args.n_pieces;
    int part = block % parts, kv = block / parts % a.NKV, n = block / parts / a.NKV;
    bool is_done = args.has_tiles && is_whole_tile(a, n / ATTENTION_TILE * ATTENTION_TILE);
    int position = a.positions[n];
    decode_row r = {n,
                    a.seqs[n],
                    position,
                    first_key(sight{a.window, NULL, 0}, position),
                    kv * group + part * HEADS,
                    least<int>(HEADS, group - part * HEADS),
                    kv};
    piece_range all = pieces_of(args, position);
    int at = own, n_pieces = all.end - all.first;
    bool split = args.values && n_pieces > 1;
    if (!is_done) bring_piece_near(args, r, (all.first + at) * args.piece);
    take_turn();
    if (is_done || at >= n_pieces) return;
    decode_memory m = memory_of(r.heads, a.HS);
    do {
        int first = (all.first + at) * args.piece, tile = r.begin / PIECE * PIECE;
        if (!args.values) bring_piece_near(args, r, first + args.piece);
        attend<CHUNKS>(args, r, m, most(first, tile), least(first + args.piece, position + 1));
        __syncthreads();
        finish_piece(args, r, m, at++, split);
        __syncthreads();
    } while (!args.values && at < n_pieces);
    if (part == 0 && at == n_pieces) store_row(a, r);
    if (split) return;
    elem *out = (elem *)a.out + ((int64_t)n * a.NH + r.h) * a.HS;
    for (int i = (int)threadIdx.x; i < r.heads * a.HS; i += THREADS)
        out[i] = from_float<elem>(m.total[i] / m.totals[(at % 2 * r.heads + i / a.HS) * 2 + 1]);
}

/* Pieces that are on their way at a time. */
#ifndef JOINED_PIECES
#define JOINED_PIECES 16
#endif

/* A block for each row and head that has several pieces, a thread a column. It asks for many pieces at
 * once, and joins them in order. */
static __global__ void attention_decode_join_kernel(decode_args args) {
    take_turn();
    const attention_decode &a = args.op;
    int at = (int)blockIdx.x, s = (int)threadIdx.x; /* at of (N, NH) */
    piece_range all = pieces_of(args, a.positions[at / a.NH]);
    int n_pieces = all.end - all.first;
    if (n_pieces < 2 || s >= a.HS) return;
    const float *values = args.values + (int64_t)at * args.n_pieces * a.HS + s;
    const float2 *stats = (const float2 *)args.stats + (int64_t)at * args.n_pieces;
    float max = -INFINITY, sum = 0, x = 0;
    for (int first = 0; first < n_pieces; first += JOINED_PIECES) {
        float value[JOINED_PIECES];
        float2 stat[JOINED_PIECES];
#pragma unroll
        for (int i = 0; i < JOINED_PIECES; i++) {
            if (first + i >= n_pieces) continue;
            value[i] = values[(int64_t)(first + i) * a.HS];
            stat[i] = stats[first + i];
        }
#pragma unroll
        for (int i = 0; i < JOINED_PIECES; i++) {
            if (first + i >= n_pieces) break;
            joint j = join(max, stat[i].x);
            max = j.max;
            sum = join_sums(j, sum, stat[i].y);
            x = join_sums(j, x, value[i]);
        }
    }
    ((elem *)a.out)[(int64_t)at * a.HS + s] = from_float<elem>(x / sum);
}

/* ---- the op ---- */

/* The most pieces of a row: those of the context, or those that a window can touch. */
static int most_pieces(int n_ctx, int window) {
    int piece = piece_keys(n_ctx), all = (int)div_up(n_ctx, piece);
    return window > 0 ? least(all, (window - 1) / piece + 2) : all;
}

static size_t values_bytes(int rows, int NH, int n_pieces, int HS) {
    return align_up(sizeof(float) * (size_t)rows * (size_t)NH * (size_t)n_pieces * (size_t)HS);
}

size_t attention_decode_bytes(const gpt_shape *s) {
    int rows = least<int>(s->N, SPLIT_ROWS), n_pieces = most_pieces(s->n_ctx, 0);
    /* Shorter caches may have more pieces. */
    if (s->window_rows) n_pieces = most(n_pieces, most_pieces(s->window_rows, 0));
    if (n_pieces < 2) return 0;
    return values_bytes(rows, s->NH, n_pieces, s->HS) + values_bytes(rows, s->NH, n_pieces, 2);
}

int attention_decode_pieces(gpt_ctx *ctx, const attention_decode &op, int has_tiles) {
    int HS = op.HS, group = op.NH / op.NKV, n_chunks = (int)div_up(HS, (int)PACK * LANES);
    if (HS % PACK || n_chunks > 4 || (op.cap > 0 && !HAS_CAPS)) return 0;
    decode_args args = {op,
                        NULL,
                        NULL,
                        score_scale(op.scale, HS) * LOG2E,
                        piece_keys(op.n_ctx),
                        most_pieces(op.n_ctx, op.window),
                        has_tiles};
    int64_t blocks = op.N * op.NKV * div_up(group, HEADS);
    if (op.N <= SPLIT_ROWS && args.n_pieces > 1) {
        args.values = (float *)ctx->workspace;
        args.stats =
            (float *)((char *)ctx->workspace + values_bytes(op.N, op.NH, args.n_pieces, HS));
        blocks *= args.n_pieces;
    }
    auto kernel = n_chunks == 1   ? attention_decode_kernel<1>
                  : n_chunks == 2 ? attention_decode_kernel<2>
                                  : attention_decode_kernel<4>;
    launch_early(ctx, kernel, dim3((unsigned)blocks), THREADS,
                 sizeof(float) * (size_t)shared_floats(least<int>(group, HEADS), HS), args);
    if (args.values)
        launch_early(ctx, attention_decode_join_kernel, dim3((unsigned)(op.N * op.NH)),
                     (int)div_up(HS, WARP) * WARP, 0, args);
    return 1;
}
