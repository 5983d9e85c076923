/* product_rows_bf16.cu: products of up to 64 rows with a weight in bf16, as decoding has them: on the
 * tensor cores, and straight from memory into registers.
 *
 * A block has a tile of the output, and its warps share the terms: each takes TERM_STEP of them at a time, of
 * all rows and columns of the tile, so that a block reads a number once. Which term is which does not
 * matter to a sum: a lane has eight neighbours of a row where the instruction would have it hold four
 * pairs, in a as in b. A row's bits do not depend on how many there are. */
#include "epilogue.h"
#include "instructions.h"
#include "weights.h"

enum {
    TERM_WARPS = 8,
    TERM_THREADS = TERM_WARPS * WARP,
    TERM_LANES = 4, /* that share a row's terms */
    TERM_STEP = TERM_LANES * (int)PACK,
    MOST_TILE_ROWS = 64,
};

/* A lane's share of TERM_STEP terms: of rows 16 m + lane / 4 and 8 more of a, and 8 n + lane / 4 of b. */
template <int M, int N> struct terms {
    chunk a[M][2], b[N];
};

/* Where a lane reads them: past the last row or column those of the last, of which nothing is kept. */
template <int M, int N> struct terms_source {
    const elem *a[2 * M], *b[N];
    int left; /* terms from there on */

    __device__ terms_source(const product &p, int row, int column) {
        int first = (int)threadIdx.x % WARP / TERM_LANES;
        int k = (int)threadIdx.x / WARP * TERM_STEP + (int)threadIdx.x % TERM_LANES * (int)PACK;
#pragma unroll
        for (int m = 0; m < 2 * M; m++)
            a[m] = (const elem *)p.a + (int64_t)least(row + 8 * m + first, p.M - 1) * p.lda + k;
#pragma unroll
        for (int n = 0; n < N; n++)
            b[n] = (const elem *)p.b + (int64_t)least(column + 8 * n + first, p.N - 1) * p.ldb + k;
        left = p.K - k;
    }
    /* Zeros behind the last. */
    __device__ chunk load(const elem *from, int k) const {
        chunk c = {};
        if (k < left) c = *(const chunk *)(from + k);
        return c;
    }
    __device__ void fetch_a(terms<M, N> &t, int k) const {
#pragma unroll
        for (int m = 0; m < 2 * M; m++) t.a[m / 2][m % 2] = load(a[m], k);
    }
    __device__ void fetch_b(terms<M, N> &t, int k) const {
#pragma unroll
        for (int n = 0; n < N; n++) t.b[n] = load(b[n], k);
    }
    __device__ void advance(int k) {
#pragma unroll
        for (int n = 0; n < N; n++) b[n] += k;
#pragma unroll
        for (int m = 0; m < 2 * M; m++) a[m] += k;
        left -= k;
    }
};

/* sum (16 M, 8 N) += */
template <int M, int N>
static __device__ inline void multiply_terms(float (&sum)[M][N][4], const terms<M, N> &t) {
#pragma unroll
    for (int half = 0; half < 4; half += 2)
#pragma unroll
        for (int m = 0; m < M; m++) {
            const uint32_t *upper = t.a[m][0].words, *lower = t.a[m][1].words;
            uint32_t a[4] = {upper[half], lower[half], upper[half + 1], lower[half + 1]};
#pragma unroll
            for (int n = 0; n < N; n++)
                multiply_add(sum[m][n], a, t.b[n].words[half], t.b[n].words[half + 1]);
        }
}

/* Of a tile of 16 M rows and 8 N columns. */
template <int M, int N> struct tile_of {
    /* Eight rows of pairs are in different banks. */
    enum { ROWS = 16 * M, COLUMNS = 8 * N, STRIDE = COLUMNS + (N % 2 ? 0 : 8) };
    static constexpr size_t shared_bytes = sizeof(float) * TERM_WARPS * ROWS * STRIDE;
    static int64_t blocks(const product &p) { return div_up(p.M, ROWS) * div_up(p.N, COLUMNS); }
};

/* AHEAD: steps that a warp has on their way at a time. */
template <int M, int N, int AHEAD>
static __global__ void __launch_bounds__(TERM_THREADS, 1) rows_product_kernel(product p) {
    using tile = tile_of<M, N>;
    constexpr int OWN = (tile::ROWS * tile::COLUMNS + TERM_THREADS - 1) / TERM_THREADS,
                  TURN = TERM_WARPS * TERM_STEP;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int row0 = (int)blockIdx.x * tile::ROWS, column0 = (int)blockIdx.y * tile::COLUMNS;
    float bias[OWN], sum[M][N][4] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++)
        bias[i] = bias_of(p, column0 + (int)(threadIdx.x + i * TERM_THREADS) % tile::COLUMNS);
    terms_source<M, N> source(p, row0, column0);
    terms<M, N> t[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) source.fetch_b(t[i], i * TURN);
    take_turn();
#pragma unroll
    for (int i = 0; i < AHEAD; i++) source.fetch_a(t[i], i * TURN);
    for (int first = warp * TERM_STEP; first < p.K; first += AHEAD * TURN) {
        source.advance(AHEAD * TURN);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            multiply_terms(sum, t[i]);
            source.fetch_b(t[i], i * TURN);
            source.fetch_a(t[i], i * TURN);
        }
    }
    /* The warps' sums, in their order. */
    float *room = shared_memory<float>(); /* (TERM_WARPS, ROWS, STRIDE) */
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                int row = 16 * m + lane / 4 + e * 4, column = 8 * n + lane % 4 * 2;
                *(float2 *)(room + (warp * tile::ROWS + row) * tile::STRIDE +
                            column) = {sum[m][n][e], sum[m][n][e + 1]};
            }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int at = (int)threadIdx.x + i * TERM_THREADS, m = at / tile::COLUMNS,
            n = at % tile::COLUMNS;
        if (m >= tile::ROWS || row0 + m >= p.M || column0 + n >= p.N) continue;
        float y = bias[i];
#pragma unroll
        for (int w = 0; w < TERM_WARPS; w++) y += room[(w * tile::ROWS + m) * tile::STRIDE + n];
        finish<elem>(p, row0 + m, column0 + n, y);
    }
}

template <int M, int N, int AHEAD>
static void start_rows(gpt_ctx *ctx, const product *p, bool early) {
    using tile = tile_of<M, N>;
    dim3 grid((unsigned)div_up(p->M, tile::ROWS), (unsigned)div_up(p->N, tile::COLUMNS));
    if (early)
        launch_early(ctx, rows_product_kernel<M, N, AHEAD>, grid, TERM_THREADS, tile::shared_bytes,
                     *p);
    else
        launch(ctx, rows_product_kernel<M, N, AHEAD>, grid, TERM_THREADS, tile::shared_bytes, *p);
}

/* With large tiles, blocks read less in sum; small ones give more multiprocessors something to read. */
int cuda_rows_product(gpt_ctx *ctx, const product *p, bool early) {
    if (p->M > MOST_TILE_ROWS || p->kind != PRODUCT_NT || p->add || p->float_out) return 0;
    bool aligned = ((uintptr_t)p->a | (uintptr_t)p->b) % sizeof(chunk) == 0;
    if (!aligned || p->K % PACK || p->lda % PACK || p->ldb % PACK) return 0;
    if (tile_of<2, 6>::blocks(*p) * 3 >= MULTIPROCESSORS * 2)
        start_rows<2, 6, 3>(ctx, p, early);
    else
        start_rows<1, 3, 6>(ctx, p, early);
    return 1;
}
