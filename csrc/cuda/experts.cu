/* experts.cu: the products of experts, each with the rows of its tokens. Which rows those are is known to the
 * device alone: a block finds its expert by `begins`, so that the host waits for nothing, and blocks without rows
 * end at once. A sum has one order, that of its terms. */
#include "activation.h"
#include "experts.h"
#include "few.h"

enum expert_kind {
    EXPERT_FORWARD, /* out (R, N) = activation(a w^T): a (R, K), w (N, K), or (2 N, K) for SwiGLU */
    EXPERT_INPUTS, /* out (R, N) = the gradient of pre from that of activation(pre), a w: w (K, N) */
    EXPERT_WEIGHTS, /* w (M, N), float32, = or += a^T b of an expert's rows: a (R, M), b (R, N) */
};

enum {
    FEW_EXPERT_ROWS = 16,   /* that each read their expert's weight, at most */
    LARGE_EXPERT_ROWS = 96, /* an expert's on average, from which on tiles are large */
};

typedef struct expert_product {
    elem *out, *pre; /* pre: (R, N or 2 N), written by forward, read by backward; or NULL */
    const elem *a, *b = NULL;
    const int32_t *begins; /* (E + 1) */
    int activation, add = 0;
    int E, M = 0, N, K; /* K is not read where the terms are rows */
    void *w[GPT_MAX_EXPERTS] = {};
} expert_product;

/* ---- a few rows: a warp, or all of a block, has an output of a row ---- */

/* How many experts end at this row or before: the number of the expert that has it. */
static __device__ inline int expert_of(const expert_product &p, int row) {
    float n = 0;
    for (int e = (int)threadIdx.x % WARP; e < p.E; e += WARP) n += p.begins[e + 1] <= row;
    return (int)warp_sum(n);
}

/* Number n of a row, from its y; of a gated activation `twin` is that of the up. */
static __device__ inline void finish_number(const expert_product &p, int64_t row, int n, float y,
                                            float twin) {
    bool gated = is_gated(p.activation);
    if (p.pre) {
        elem *pre = p.pre + row * (gated ? 2 * p.N : p.N) + n;
        pre[0] = from_float<elem>(y);
        if (gated) pre[p.N] = from_float<elem>(twin);
    }
    p.out[row * p.N + n] = from_float<elem>(activation_forward(p.activation, y, twin));
}

template <bool GATED>
static __global__ void __launch_bounds__(FEW_THREADS, FEW_BLOCKS)
    few_expert_kernel(const __grid_constant__ expert_product p, int log2_warps) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, n_warps = 1 << log2_warps;
    int n = (int)(blockIdx.x * FEW_WARPS + warp) >> log2_warps, row = (int)blockIdx.y;
    int part = warp & (n_warps - 1), step = n_warps * FEW_STEP, end = n < p.N ? p.K : 0;
    const elem *a = p.a + (int64_t)row * p.K;
    const elem *b = (const elem *)p.w[expert_of(p, row)] + (int64_t)n * p.K;
    const elem *twin = b + (int64_t)p.N * p.K;
    float sum = 0, up = 0;
    for (int first = part * FEW_STEP + lane * PACK; first < end; first += FEW_AHEAD * step) {
        chunk w[FEW_AHEAD], u[FEW_AHEAD];
#pragma unroll
        for (int i = 0, k = first; i < FEW_AHEAD; i++, k += step) {
            w[i] = load_chunk(b + k, k < end);
            u[i] = load_chunk(twin + k, GATED && k < end);
        }
#pragma unroll
        for (int i = 0, k = first; i < FEW_AHEAD; i++, k += step) {
            chunk x = load_chunk(a + k, k < end);
            add_dot(sum, x, w[i]);
            if (GATED) add_dot(up, x, u[i]);
        }
    }
    sum = warp_sum(sum);
    if (GATED) up = warp_sum(up);
    float mine = lane == 0 ? sum : up;
    if (n_warps > 1) mine = add_warps<2>(mine, n_warps);
    up = __shfl_sync(~0u, mine, 1);
    if (part == 0 && n < p.N && lane == 0) finish_number(p, row, n, mine, up);
}

/* ---- more of them: a block has a tile of an expert's ---- */

/* Where a block's tile is. */
typedef struct expert_place {
    int expert;      /* -1: nowhere */
    int begin, rows; /* of the expert */
    int row,
        col; /* of the tile: in the expert's rows, or its gradient's, and in columns of the result */
} expert_place;

/* Tile number i of all experts' rows, with so many rows each. */
static __device__ inline expert_place find_rows(const expert_product &p, int i, int tile_rows) {
    expert_place at = {-1, 0, 0, 0, 0};
#pragma unroll 4
    for (int e = 0; e < p.E; e++) {
        int begin = p.begins[e], rows = p.begins[e + 1] - begin;
        int tiles = (rows + tile_rows - 1) / tile_rows;
        if (i >= 0 && i < tiles) at = {e, begin, rows, i * tile_rows, 0};
        i -= tiles;
    }
    return at;
}

template <int KIND, typename T>
static __device__ inline expert_place find_tile(const expert_product &p) {
    expert_place at;
    if constexpr (KIND == EXPERT_WEIGHTS) {
        int e = (int)blockIdx.z, begin = p.begins[e];
        at = {e, begin, p.begins[e + 1] - begin, (int)blockIdx.y * (int)T::ROWS, 0};
        if (!p.w[e] || (at.rows == 0 && p.add)) at.expert = -1;
    } else
        at = find_rows(p, (int)blockIdx.y, T::ROWS);
    bool halves = KIND == EXPERT_FORWARD && is_gated(p.activation);
    at.col = (int)blockIdx.x * (halves ? (int)T::COLUMNS / 2 : (int)T::COLUMNS);
    return at;
}

/* Both sides of the step from term k on. */
template <int KIND, typename T, bool VEC>
static __device__ inline void fetch_step(const expert_product &p, const expert_place &at, int k,
                                         elem *a, elem *b) {
    const elem *w = (const elem *)p.w[at.expert];
    if constexpr (KIND == EXPERT_WEIGHTS) {
        fetch_tile<TERMS, T::ROWS, T::THREADS, VEC>(a, p.M - at.row, [&](int r) {
            return k + r < at.rows ? p.a + (int64_t)(at.begin + k + r) * p.M + at.row : NULL;
        });
        fetch_tile<TERMS, T::COLUMNS, T::THREADS, VEC>(b, p.N - at.col, [&](int r) {
            return k + r < at.rows ? p.b + (int64_t)(at.begin + k + r) * p.N + at.col : NULL;
        });
        return;
    }
    fetch_tile<T::ROWS, TERMS, T::THREADS, VEC>(a, p.K - k, [&](int r) {
        int row = at.row + r;
        return row < at.rows ? p.a + (int64_t)(at.begin + row) * p.K + k : NULL;
    });
    if constexpr (KIND == EXPERT_INPUTS)
        fetch_tile<TERMS, T::COLUMNS, T::THREADS, VEC>(b, p.N - at.col, [&](int r) {
            return k + r < p.K ? w + (int64_t)(k + r) * p.N + at.col : NULL;
        });
    if constexpr (KIND == EXPERT_FORWARD) {
        bool gated = is_gated(p.activation);
        fetch_tile<T::COLUMNS, TERMS, T::THREADS, VEC>(b, p.K - k, [&](int r) {
            constexpr int GROUP = T::GROUP;
            int n = at.col + (gated ? r / (2 * GROUP) * GROUP + r % GROUP : r);
            int row = gated && r / GROUP % 2 ? n + p.N : n;
            return n < p.N ? w + (int64_t)row * p.K + k : NULL;
        });
    }
}

/* PAIR neighbours of a row of n, from column c on, to or from memory. */
template <int PAIR, bool VEC, typename N>
static __device__ inline void put(N *row, int c, int n, const float (&x)[PAIR]) {
    if constexpr (VEC) {
        if (c < n) store(row + c, x);
    } else {
#pragma unroll
        for (int i = 0; i < PAIR; i++)
            if (c + i < n) row[c + i] = from_float<N>(x[i]);
    }
}
template <int PAIR, bool VEC, typename N>
static __device__ inline void get(float (&x)[PAIR], const N *row, int c, int n) {
    if constexpr (VEC) {
        if (c < n) load(x, row + c);
    } else {
#pragma unroll
        for (int i = 0; i < PAIR; i++) x[i] = c + i < n ? to_float(row[c + i]) : 0;
    }
}

/* PAIR neighbours of a tile's results become those of the outputs, in a row of the result, from column c on;
 * `ups`: of a gated product. */
template <int KIND, int PAIR, bool VEC>
static __device__ inline void finish_pair(const expert_product &p, const expert_place &at,
                                          int64_t row, int c, float (&x)[PAIR],
                                          float (&ups)[PAIR]) {
    int N = p.N, gated = is_gated(p.activation), width = gated ? 2 * N : N;
    if constexpr (KIND == EXPERT_WEIGHTS) {
        float *dw = (float *)p.w[at.expert] + row * N, before[PAIR] = {};
        if (p.add) get<PAIR, VEC>(before, dw, c, N);
#pragma unroll
        for (int i = 0; i < PAIR; i++) x[i] += before[i];
        put<PAIR, VEC>(dw, c, N, x);
    } else if constexpr (KIND == EXPERT_FORWARD) {
        elem *pre = p.pre + row * width;
        if (p.pre) put<PAIR, VEC>(pre, c, N, x);
        if (p.pre && gated) put<PAIR, VEC>(pre + N, c, N, ups);
#pragma unroll
        for (int i = 0; i < PAIR; i++) x[i] = activation_forward(p.activation, x[i], ups[i]);
        put<PAIR, VEC>(p.out + row * N, c, N, x);
    } else {
        float pre[PAIR] = {}, dups[PAIR] = {};
        if (p.pre) get<PAIR, VEC>(pre, p.pre + row * width, c, N);
        if (gated) get<PAIR, VEC>(ups, p.pre + row * width + N, c, N);
#pragma unroll
        for (int i = 0; i < PAIR; i++)
            x[i] = activation_backward(p.activation, x[i], pre[i], ups[i], &dups[i]);
        put<PAIR, VEC>(p.out + row * width, c, N, x);
        if (gated) put<PAIR, VEC>(p.out + row * width + N, c, N, dups);
    }
}

/* The sums of a piece's rows are used up: those of the next one move to its place, so that one piece's code does
 * for all, and registers have numbers that are known. */
template <int KIND, typename T, bool VEC>
static __device__ inline void finish_tile(const expert_product &p, const expert_place &at, T &t) {
    constexpr int PAIR = T::PAIR, GROUP = T::GROUP;
    bool gated = KIND == EXPERT_FORWARD && is_gated(p.activation);
    int end = KIND == EXPERT_WEIGHTS ? p.M : at.rows, first = KIND == EXPERT_WEIGHTS ? 0 : at.begin;
#pragma unroll 1
    for (int m = 0; m < T::MI; m++) {
#pragma unroll
        for (int e = 0; e < T::V; e += PAIR) {
            int row = at.row + T::row(m, e);
            if (row >= end) continue;
#pragma unroll
            for (int n = 0; n < T::NI; n += 2) {
                float x[PAIR], y[PAIR], ups[PAIR];
                int c = T::col(n, e), d = T::col(n + 1, e);
#pragma unroll
                for (int i = 0; i < PAIR; i++) {
                    x[i] = t.sum[0][n][e + i], y[i] = t.sum[0][n + 1][e + i];
                    ups[i] = gated ? y[i] : 0;
                }
                if (gated) c = c / (2 * GROUP) * GROUP + c % GROUP;
                finish_pair<KIND, PAIR, VEC>(p, at, first + row, at.col + c, x, ups);
                if (!gated) finish_pair<KIND, PAIR, VEC>(p, at, first + row, at.col + d, y, ups);
            }
        }
#pragma unroll
        for (int i = 0; i < T::MI - 1; i++)
#pragma unroll
            for (int n = 0; n < T::NI; n++)
#pragma unroll
                for (int e = 0; e < T::V; e++) t.sum[i][n][e] = t.sum[i + 1][n][e];
    }
}

template <typename T> static __host__ __device__ constexpr int stage_numbers() {
    return tile_numbers(T::ROWS) + tile_numbers(T::COLUMNS);
}

template <int KIND, typename T, bool VEC>
static __global__ void __launch_bounds__(T::THREADS)
    expert_product_kernel(const __grid_constant__ expert_product p) {
    constexpr int A = KIND == EXPERT_WEIGHTS ? TERMS_IN_COLUMNS : TERMS_IN_ROWS;
    constexpr int B = KIND == EXPERT_FORWARD ? TERMS_IN_ROWS : TERMS_IN_COLUMNS;
    constexpr int STAGE = stage_numbers<T>(), SIDE = tile_numbers(T::ROWS);
    elem *tiles = shared_memory<elem>(); /* (STAGES, STAGE) */
    expert_place at = find_tile<KIND, T>(p);
    if (at.expert < 0) return;
    T t;
    int terms = KIND == EXPERT_WEIGHTS ? at.rows : p.K, stage = 0;
    if (terms > 0) fetch_step<KIND, T, VEC>(p, at, 0, tiles, tiles + SIDE);
    for (int k = 0; k < terms; k += TERMS) {
        elem *here = tiles + stage * STAGE, *next = tiles + (stage ^= 1) * STAGE;
        copy_wait();
        __syncthreads();
        if (k + TERMS < terms) fetch_step<KIND, T, VEC>(p, at, k + TERMS, next, next + SIDE);
        t.template multiply<A, B>(here, here + SIDE);
    }
    finish_tile<KIND, T, VEC>(p, at, t);
}

/* Whether rows of the products, and weights, begin where vectors may. */
static inline bool is_aligned(const expert_product *p, int IC, int OC) {
    uintptr_t all = (uintptr_t)p->a | (uintptr_t)p->b | (uintptr_t)p->out | (uintptr_t)p->pre;
    for (int e = 0; e < p->E; e++) all |= (uintptr_t)p->w[e];
    return all % sizeof(chunk) == 0 && IC % PACK == 0 && OC % PACK == 0;
}

template <int KIND, typename T, bool VEC>
static inline void start_tiles(gpt_ctx *ctx, const expert_product *p, int R) {
    bool halves = KIND == EXPERT_FORWARD && is_gated(p->activation);
    unsigned columns = (unsigned)div_up(p->N, halves ? T::COLUMNS / 2 : T::COLUMNS);
    dim3 grid(columns, (unsigned)(R / T::ROWS + least(p->E, R)));
    if (KIND == EXPERT_WEIGHTS)
        grid = dim3(columns, (unsigned)div_up(p->M, T::ROWS), (unsigned)p->E);
    launch(ctx, expert_product_kernel<KIND, T, VEC>, grid, T::THREADS,
           sizeof(elem) * STAGES * (size_t)stage_numbers<T>(), *p);
}

template <int KIND>
static inline void start_product(gpt_ctx *ctx, const expert_product *p, int R, bool aligned) {
    if (!aligned) return start_tiles<KIND, small_tile, false>(ctx, p, R);
#ifdef CUDA_BF16
    if (R / p->E >= LARGE_EXPERT_ROWS) return start_tiles<KIND, large_tile, true>(ctx, p, R);
#endif
    start_tiles<KIND, small_tile, true>(ctx, p, R);
}

CUDA_OP(expert_forward) {
    int R = op->R, gated = is_gated(op->activation);
    expert_product p = {.out = (elem *)op->out,
                        .pre = op->activation == GPT_ACT_NONE ? NULL : (elem *)op->pre,
                        .a = (const elem *)op->in,
                        .begins = op->begins,
                        .activation = op->activation,
                        .E = op->E,
                        .N = op->OC,
                        .K = op->IC};
    for (int e = 0; e < op->E; e++) p.w[e] = op->w[e];
    bool aligned = is_aligned(&p, op->IC, op->OC);
    if (R > FEW_EXPERT_ROWS || !aligned) return start_product<EXPERT_FORWARD>(ctx, &p, R, aligned);
    int log2_warps = log2_column_warps(op->IC);
    launch(ctx, gated ? few_expert_kernel<true> : few_expert_kernel<false>,
           dim3((unsigned)div_up(op->OC, FEW_WARPS >> log2_warps), (unsigned)R), FEW_THREADS,
           sizeof(float) * 2 * FEW_WARPS, p, log2_warps);
}

CUDA_OP(expert_backward) {
    bool has_pre = op->activation != GPT_ACT_NONE, trains = false;
    expert_product p = {.out = (elem *)op->din,
                        .pre = has_pre ? (elem *)op->pre : NULL,
                        .a = (const elem *)op->dout,
                        .begins = op->begins,
                        .activation = op->activation,
                        .add = op->add,
                        .E = op->E,
                        .N = op->IC,
                        .K = op->OC};
    for (int e = 0; e < op->E; e++) p.w[e] = op->w[e], trains |= op->dw[e] != NULL;
    start_product<EXPERT_INPUTS>(ctx, &p, op->R, is_aligned(&p, op->IC, op->OC));
    if (!trains) return;
    p.b = (const elem *)op->in, p.M = op->OC;
    for (int e = 0; e < op->E; e++) p.w[e] = op->dw[e];
    start_product<EXPERT_WEIGHTS>(ctx, &p, op->R, is_aligned(&p, op->IC, op->OC));
}
