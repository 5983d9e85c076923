/* boxes.h: boxes, which are parts of a tensor in memory that one thread has copied to shared memory (TMA, on
 * Hopper). A map tells where the tensor is, instructions.h has the copy and the barrier that it moves. */
#ifndef CUDA_BOXES_H
#define CUDA_BOXES_H

#include "cuda.h"

/* Columns of a box of bfloat16. In shared memory a row is 128 bytes, and the 16-byte chunks of row r have the
 * order chunk ^ r % 8: at a multiple of 1,024 bytes, what matrix_of describes. */
enum { BOX_COLS = 64 };

/* The driver's CUtensorMap. */
struct alignas(64) box_map {
    uint64_t words[16];
};

/* The map of x (B, T, heads, HS), bfloat16, for boxes of `rows` rows of one head: zeros past its HS columns, a
 * multiple of 8, and past row T. An error is reported by sync. */
box_map cuda_box_map(gpt_ctx *ctx, const void *x, int B, int T, int heads, int HS, int rows);

#endif
