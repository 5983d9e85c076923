/* experts.h: tiles of a product in shared memory and registers, for products whose rows belong to experts. In
 * bf16 they are the tensor cores' (mma.sync), in fp32 a thread's own sums.
 *
 * A thread has V numbers of each of MI by NI pieces: number (m, n, e) is at row(m, e), col(n, e). PAIR of them
 * are neighbours in a row. Pieces n and n + 1 of a thread are GROUP columns apart, so that a gated product, whose
 * tile has GROUP gates and as many ups in turn, has both in one thread. */
#ifndef CUDA_EXPERTS_H
#define CUDA_EXPERTS_H

#include "instructions.h"

enum { TERMS = 4 * (int)PACK /* of a step */, STAGES = 2 };

/* Numbers from one row of a tile in shared memory to the next: eight are in different banks. */
static __host__ __device__ constexpr int padded(int width) {
    return width + (int)PACK;
}
/* Whether terms follow each other in memory, or their rows do. */
enum { TERMS_IN_ROWS, TERMS_IN_COLUMNS };

static __host__ __device__ constexpr int tile_numbers(int size) {
    int by_rows = size * padded(TERMS), by_columns = TERMS * padded(size);
    return by_rows > by_columns ? by_rows : by_columns;
}

#ifdef CUDA_BF16
/* 16 MI rows and 32 columns a warp; two warps down, ACROSS in a row. */
template <int MI_, int ACROSS> struct expert_tile {
    enum { MI = MI_, NI = 4, V = 4, PAIR = 2, GROUP = 8 };
    enum { ROWS = 32 * MI, COLUMNS = 32 * ACROSS, THREADS = 2 * ACROSS * (int)WARP };
    float sum[MI][NI][V] = {};

    static __device__ int row0() { return (int)threadIdx.x / WARP / ACROSS * (16 * MI); }
    static __device__ int col0() { return (int)threadIdx.x / WARP % ACROSS * 32; }
    static __device__ int row(int m, int e) {
        return row0() + 16 * m + (int)threadIdx.x % WARP / 4 + e / 2 * 8;
    }
    static __device__ int col(int n, int e) {
        return col0() + 8 * n + (int)threadIdx.x % 4 * 2 + e % 2;
    }

    template <int A, int B> __device__ void multiply(const elem *a, const elem *b) {
        int lane = (int)threadIdx.x % WARP, up = lane / 16 * 8, mid = lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < TERMS; k += 16) {
            uint32_t left[MI][4], right[NI / 2][4];
#pragma unroll
            for (int m = 0; m < MI; m++) {
                int at = row0() + 16 * m;
                if (A == TERMS_IN_ROWS)
                    load_matrices(left[m], a + (at + lane % 16) * padded(TERMS) + k + up);
                else
                    load_matrices_transposed(left[m],
                                             a + (k + up + lane % 8) * padded(ROWS) + at + mid);
            }
#pragma unroll
            for (int n = 0; n < NI / 2; n++) {
                int at = col0() + 16 * n;
                if (B == TERMS_IN_ROWS)
                    load_matrices(right[n], b + (at + up + lane % 8) * padded(TERMS) + k + mid);
                else
                    load_matrices_transposed(right[n],
                                             b + (k + lane % 16) * padded(COLUMNS) + at + up);
            }
#pragma unroll
            for (int m = 0; m < MI; m++)
#pragma unroll
                for (int n = 0; n < NI; n++)
                    multiply_add(sum[m][n], left[m], right[n / 2][n % 2 * 2],
                                 right[n / 2][n % 2 * 2 + 1]);
        }
    }
};
typedef expert_tile<2, 2> small_tile;
typedef expert_tile<4, 4> large_tile;
#else
struct small_tile {
    enum { MI = 4, NI = 4, V = 1, PAIR = 1, GROUP = 16 };
    enum { ROWS = 64, COLUMNS = 64, THREADS = 256 };
    float sum[MI][NI][V] = {};

    static __device__ int row(int m, int) { return (int)threadIdx.x / 16 + 16 * m; }
    static __device__ int col(int n, int) { return (int)threadIdx.x % 16 + 16 * n; }

    template <int A, int B> __device__ void multiply(const elem *a, const elem *b) {
#pragma unroll
        for (int k = 0; k < TERMS; k++) {
            float left[MI], right[NI];
#pragma unroll
            for (int m = 0; m < MI; m++)
                left[m] = A == TERMS_IN_ROWS ? a[row(m, 0) * padded(TERMS) + k]
                                             : a[k * padded(ROWS) + row(m, 0)];
#pragma unroll
            for (int n = 0; n < NI; n++)
                right[n] = B == TERMS_IN_ROWS ? b[col(n, 0) * padded(TERMS) + k]
                                              : b[k * padded(COLUMNS) + col(n, 0)];
#pragma unroll
            for (int m = 0; m < MI; m++)
#pragma unroll
                for (int n = 0; n < NI; n++) sum[m][n][0] = fmaf(left[m], right[n], sum[m][n][0]);
        }
    }
};
#endif

/* A tile (ROWS, COLS) of a product's step, by THREADS: of row r, `cols` numbers from row_at(r), or none where that
 * is NULL; zeros elsewhere. VEC: all of it is aligned, and arrives some time before the wait for copies. */
template <int ROWS, int COLS, int THREADS, bool VEC, typename F>
static __device__ inline void fetch_tile(elem *tile, int cols, F row_at) {
    constexpr int W = VEC ? (int)PACK : 1, PER_ROW = COLS / W, OWN = ROWS * PER_ROW / THREADS;
#pragma unroll(VEC ? OWN : 4) /* all of an unaligned tile are long to compile */
    for (int j = 0; j < OWN; j++) {
        int i = j * THREADS + (int)threadIdx.x, r = i / PER_ROW, c = i % PER_ROW * W;
        const elem *row = row_at(r);
        bool there = row && c < cols;
        elem *to = tile + r * padded(COLS) + c;
        if constexpr (VEC)
            copy_async(to, there ? row + c : row, there);
        else
            *to = there ? row[c] : from_float<elem>(0);
    }
}

#endif
