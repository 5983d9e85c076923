/* tiles.h: tiles of rows in shared memory, and the two products that attention makes of them, twice:
 * warp_tiles for warps that work alone (mma.sync, from compute capability 8.0 on), and group_tiles for
 * four warps that work as one (wgmma, on Hopper). Either way a block has four warps and 64 rows, a warp
 * has 16 of them, and a lane has the numbers of those that multiply_add gives it.
 *
 *     product_rows      s = a tile^T       a: rows of the block; column n is the product with row n
 *     product_columns   out += a tile      a: scores; row n of the tile has weight a[., n]
 *
 * A product's results may be read after wait_products. D is the size of a head, rounded up to what a
 * kernel exists for. */
#ifndef CUDA_TILES_H
#define CUDA_TILES_H

#include "attention.h"
#include "instructions.h"

#include <type_traits>

enum { ROWS = ATTENTION_TILE, STAGES = 2 };
static_assert(ROWS == 16 * WARPS);

/* 16 rows and columns of a tile, as the left side of products. */
struct operand {
    uint32_t r[4];
};

/* 16 rows, all of their columns, in registers. */
template <int D> struct operands {
    operand slices[D / 16];
    __device__ const operand &operator()(int k) const { return slices[k]; }
};

/* The row and column of number e in column group n of a lane's 16 rows. */
static __device__ inline int row_of(int e) {
    return (int)threadIdx.x % WARP / 4 + e / 2 * 8;
}
static __device__ inline int col_of(int n, int e) {
    return n * 8 + (int)threadIdx.x % 4 * 2 + e % 2;
}

/* Scores (16, 8 N) in bf16, as the left side of products. */
template <int N> struct weights {
    operand slices[N / 2];
    __device__ explicit weights(const float (&s)[N][4]) {
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            slices[i] = {{pair_of(s[2 * i][0], s[2 * i][1]), pair_of(s[2 * i][2], s[2 * i][3]),
                          pair_of(s[2 * i + 1][0], s[2 * i + 1][1]),
                          pair_of(s[2 * i + 1][2], s[2 * i + 1][3])}};
    }
};

template <int D_> struct warp_tiles {
    static constexpr bool BOXES = false;
    enum { D = D_, STRIDE = D + 8 /* so that eight rows are in different banks */ };
    static constexpr bool IS_HERE = true;

    /* Blocks at a time on a multiprocessor: three where their registers suffice. */
    static constexpr int blocks(bool more) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
        return D > 32 || more ? 2 : 3;
#else
        return D > 64 || more ? 2 : 3;
#endif
    }

    /* The place of a number, and of how many there is room, in a tile of N rows. */
    template <int N> static __device__ int at(int row, int col) { return row * STRIDE + col; }
    template <int N> static constexpr int SIZE = N * STRIDE;

    static __device__ void publish() {}
    template <int PENDING, int N> static __device__ void wait_products(float (&)[N][4]) {}

    /* Columns 16 k and on of this warp's rows. */
    static __device__ operand slice(const elem *rows, int k) {
        int lane = (int)threadIdx.x % WARP, row0 = (int)threadIdx.x / WARP * 16;
        operand a;
        load_matrices(a.r, rows + at<ROWS>(row0 + lane % 16, lane / 16 * 8 + 16 * k));
        return a;
    }
    /* The block's rows, for products: in registers. */
    static __device__ operands<D> keep(const elem *rows) {
        operands<D> a;
#pragma unroll
        for (int k = 0; k < D / 16; k++) a.slices[k] = slice(rows, k);
        return a;
    }

    template <int N, typename F>
    static __device__ void multiply_rows(float (&s)[N][4], F slice_of, const elem *tile) {
        int lane = (int)threadIdx.x % WARP;
        const elem *from = tile + at<8 * N>(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = 0;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const operand a = slice_of(k);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t b[4];
                load_matrices(b, from + at<8 * N>(n * 8, 16 * k));
                multiply_add(s[n], a.r, b[0], b[1]);
                multiply_add(s[n + 1], a.r, b[2], b[3]);
            }
        }
    }
    template <int N>
    static __device__ void product_rows(float (&s)[N][4], const operands<D> &a, const elem *tile) {
        multiply_rows(s, a, tile);
    }
    template <int N>
    static __device__ void product_rows(float (&s)[N][4], const elem *rows, const elem *tile) {
        multiply_rows(s, [=](int k) { return slice(rows, k); }, tile);
    }

    template <int N>
    static __device__ void product_columns(float (&out)[D / 8][4], const weights<N> &a,
                                           const elem *tile) {
        int lane = (int)threadIdx.x % WARP;
        const elem *from = tile + at<8 * N>(lane % 16, lane / 16 * 8);
#pragma unroll
        for (int i = 0; i < N / 2; i++)
#pragma unroll
            for (int d = 0; d < D / 8; d += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, from + at<8 * N>(16 * i, 8 * d));
                multiply_add(out[d], a.slices[i].r, b[0], b[1]);
                multiply_add(out[d + 1], a.slices[i].r, b[2], b[3]);
            }
    }
};

/* Panels of 64 columns, whose rows are 128 bytes in the order that matrix_of describes. BLOCKS: at a time
 * on a multiprocessor. BOXES_: tiles arrive in boxes. */
template <int D_, int BLOCKS, bool BOXES_ = true> struct group_tiles {
    static constexpr bool BOXES = BOXES_;
    enum { D = D_, PANEL = 64, BOX_ROWS = D_ > 64 ? 32 : 64 /* the least that a tile has */ };
    static constexpr bool IS_HERE = HAS_WGMMA;
    static constexpr int blocks(bool) { return BLOCKS; }

    template <int N> static __device__ int at(int row, int col) {
        return col / PANEL * N * PANEL + row * PANEL + ((col / 8 % 8 ^ row % 8) * 8 | col % 8);
    }
    template <int N> static constexpr int SIZE = N * D;

    static __device__ void publish() { group_publish(); }
    template <int PENDING, int N> static __device__ void wait_products(float (&x)[N][4]) {
        group_wait<PENDING>(x);
    }

    /* Columns 16 k and on of a tile of N rows. */
    template <int N> static __device__ uint64_t slice(const elem *tile, int k) {
        return matrix_of(tile + k / 4 * N * PANEL + k % 4 * 16, 0);
    }
    /* In shared memory: of registers that a loop's products only read, nvcc 13.0 loses the values after
     * the first turn. */
    static __device__ const elem *keep(const elem *rows) { return rows; }

    template <int N>
    static __device__ void product_rows(float (&s)[N][4], const elem *rows, const elem *tile) {
        group_begin();
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            group_multiply(s, slice<ROWS>(rows, k), slice<8 * N>(tile, k), k > 0);
        group_commit();
    }

    template <int N>
    static __device__ void product_columns(float (&out)[D / 8][4], weights<N> &a,
                                           const elem *tile) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) group_pin(a.slices[i].r);
        group_begin();
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            group_multiply_transposed(
                out, a.slices[i].r,
                matrix_of(tile + i * 16 * PANEL, 8 * N * PANEL * (int)sizeof(elem)));
        group_commit();
    }
};

template <typename T, bool KEEP> static __device__ inline auto keep_if(const elem *rows) {
    if constexpr (KEEP)
        return T::keep(rows);
    else
        return rows;
}

/* Where rows of one head are in memory. */
struct head_rows {
    const elem *first;
    int64_t stride; /* numbers from one row to the next */
    int there, HS;  /* rows there are, of HS numbers */
    /* The same, for boxes: a map of (B, T, heads, HS). */
    const box_map *map = NULL;
    int b = 0, row = 0, head = 0;

    __device__ head_rows from(int n) const {
        return {first + n * stride, stride, there - n, HS, map, b, row + n, head};
    }
};

/* Rows of x, which is like qkv. */
template <typename Op>
static __device__ inline head_rows rows_of_qkv(const Op &a, const void *x, const box_map *map,
                                               int b, int row, int head) {
    return {(const elem *)x + query_at(a, b, row, head),
            row_stride(a),
            a.T - row,
            a.HS,
            map,
            b,
            row,
            head};
}

/* Rows of x, which is like out. */
template <typename Op>
static __device__ inline head_rows rows_of_out(const Op &a, const void *x, const box_map *map,
                                               int b, int row, int head) {
    return {(const elem *)x + out_at(a, b, row, head),
            (int64_t)a.NH * a.HS,
            a.T - row,
            a.HS,
            map,
            b,
            row,
            head};
}

/* Tells a block's threads when the tiles are there that were fetched before. With boxes it needs
 * ARRIVAL_BYTES of shared memory. */
enum { ARRIVAL_BYTES = 16 };

template <typename T> struct tile_arrivals {
    uint64_t *barrier;
    uint32_t parity = 0;

    __device__ explicit tile_arrivals(void *memory) : barrier((uint64_t *)memory) {
        if constexpr (T::BOXES) {
            if (threadIdx.x == 0) {
                barrier_init(barrier, WARPS);
                group_publish();
            }
            __syncthreads();
        }
    }
    /* Waits for them, and for the block's threads to be done with those before. */
    __device__ void wait() {
        copy_wait();
        if constexpr (T::BOXES) {
            if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
            barrier_wait(barrier, parity);
            parity ^= 1;
        } else
            T::publish();
        __syncthreads();
    }
};

/* The next tiles of N rows, as they follow each other in memory: zeros past those that are there and past HS, a
 * multiple of 8. A thread copies one column of 8 in every STEP rows. */
template <typename T, int N> struct copy_source {
    enum { CHUNKS = T::D / 8, STEP = THREADS / CHUNKS };
    static_assert(N % STEP == 0 && STEP % 8 == 0);
    const elem *from;
    int step, left, place, HS;

    __device__ copy_source(const head_rows &rows, const tile_arrivals<T> &) : HS(rows.HS) {
        int row = (int)threadIdx.x / CHUNKS, col = (int)threadIdx.x % CHUNKS * 8;
        from = rows.first + row * rows.stride + col;
        step = (int)(STEP * rows.stride);
        left = col < HS ? rows.there - row : 0;
        place = T::template at<N>(row, col);
    }
    /* Some time before the wait for arrivals: a tile, or the one of so many heads later. */
    __device__ void fetch(elem *tile, int warp = 0, int later = 0) {
        (void)warp;
#pragma unroll
        for (int i = 0; i < N / STEP; i++)
            copy_async(tile + place + T::template at<N>(i * STEP, 0), from + later * HS + i * step,
                       i * STEP < left);
    }
    __device__ void advance() {
        from += N / STEP * (int64_t)step;
        left -= N;
    }
};

/* The same in boxes, each copied by one thread of another warp, of which the first is `warp`. */
template <typename T, int N> struct box_source {
    enum { DOWN = N / (int)T::BOX_ROWS, BOXES = DOWN * (int)T::D / BOX_COLS };
    static_assert(N % (int)T::BOX_ROWS == 0 && (int)T::PANEL == BOX_COLS && (int)BOXES <= WARPS);
    const box_map *map;
    uint64_t *barrier;
    int b, row, head;

    __device__ box_source(const head_rows &rows, const tile_arrivals<T> &arrivals)
        : map(rows.map), barrier(arrivals.barrier), b(rows.b), row(rows.row), head(rows.head) {}
    __device__ void fetch(elem *tile, int warp = 0, int later = 0) {
        int i = ((int)threadIdx.x / WARP + WARPS - warp) % WARPS;
        if (i >= BOXES || threadIdx.x % WARP) return;
        const int SIZE = (int)T::BOX_ROWS * BOX_COLS;
        barrier_expect(barrier, SIZE * (int)sizeof(elem));
        copy_box(tile + i * SIZE, map, i / DOWN * BOX_COLS, head + later,
                 row + i % DOWN * (int)T::BOX_ROWS, b, barrier);
    }
    __device__ void advance() { row += N; }
};

template <typename T, int N>
using tile_source = std::conditional_t<T::BOXES, box_source<T, N>, copy_source<T, N>>;

#endif
