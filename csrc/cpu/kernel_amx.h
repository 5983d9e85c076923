/* kernel_amx.h: the same product as kernel_bf16.h on AMX tiles: 32 x 32 sums in four tiles, two
 * tiles of a, two of b. Rows and terms that fill no tile are left to kernel_vectors. */
#ifndef CPU_KERNEL_AMX_H
#define CPU_KERNEL_AMX_H

#include "kernel_bf16.h"
#include "tiles.h"

enum { TILE_ROWS = 16, TILE_TERMS = 32 };

/* Tiles 0 to 3 are the sums (row block, panel), 4 and 5 are of a, 6 and 7 of b. */
#define TILES_LOAD_SUMS(rows, panels)                                                              \
    do {                                                                                           \
        tile_load(0, c, ldc);                                                                      \
        if (panels == 2) tile_load(1, c + PANEL, ldc);                                             \
        if (rows == 32) tile_load(2, c + 16 * o->ldc, ldc);                                        \
        if (rows == 32 && panels == 2) tile_load(3, c + 16 * o->ldc + PANEL, ldc);                 \
    } while (0)

/* rows is 16 or 32, panels 1 or 2: constants where this is inlined. K is a multiple of 32. */
SPECIALIZED void kernel_tiles_block(const kernel_operands *o, int rows, int panels, int add) {
    int64_t lda = o->lda * (int64_t)sizeof(bf16), ldb = PANEL * PAIR * (int64_t)sizeof(bf16);
    int64_t ldc = o->ldc * (int64_t)sizeof(float);
    float *c = o->c;
    tiles_sync();
    if (add) {
        TILES_LOAD_SUMS(rows, panels);
    } else {
        tile_zero(0);
        if (panels == 2) tile_zero(1);
        if (rows == 32) tile_zero(2);
        if (rows == 32 && panels == 2) tile_zero(3);
    }
    const bf16 *a = o->a, *b = o->b;
    for (int k = 0; k < o->K; k += TILE_TERMS, a += TILE_TERMS, b += TILE_TERMS * PANEL) {
        tile_load(6, b, ldb);
        if (panels == 2) tile_load(7, b + o->panel, ldb);
        tile_load(4, a, lda);
        tile_dot(0, 4, 6);
        if (panels == 2) tile_dot(1, 4, 7);
        if (rows == 32) {
            tile_load(5, a + 16 * o->lda, lda);
            tile_dot(2, 5, 6);
            if (panels == 2) tile_dot(3, 5, 7);
        }
    }
    tile_store(0, c, ldc);
    if (panels == 2) tile_store(1, c + PANEL, ldc);
    if (rows == 32) {
        tile_store(2, c + 16 * o->ldc, ldc);
        if (panels == 2) tile_store(3, c + 16 * o->ldc + PANEL, ldc);
    }
}

SPECIALIZED void kernel_tiles_rows(kernel_operands o, int rows, int panels, int add) {
    for (int done; rows >= TILE_ROWS; rows -= done) {
        if (rows >= 2 * TILE_ROWS)
            kernel_tiles_block(&o, done = 2 * TILE_ROWS, panels, add);
        else
            kernel_tiles_block(&o, done = TILE_ROWS, panels, add);
        o.a += done * o.lda;
        o.c += done * o.ldc;
    }
}

/* As kernel_vectors, between tiles_begin and tiles_end. */
static inline void kernel_tiles(kernel_operands o, int rows, int panels, int add) {
    kernel_operands tiled = o, rest = o;
    int tiled_rows = rows / TILE_ROWS * TILE_ROWS;
    tiled.K = o.K / TILE_TERMS * TILE_TERMS;
    if (tiled.K == 0) tiled_rows = 0;
    if (tiled_rows) {
        if (panels == 2)
            kernel_tiles_rows(tiled, tiled_rows, 2, add);
        else
            kernel_tiles_rows(tiled, tiled_rows, 1, add);
    }
    if (tiled_rows && tiled.K < o.K) { /* the terms left over */
        rest.a += tiled.K;
        rest.b += (int64_t)tiled.K * PANEL;
        rest.K -= tiled.K;
        kernel_vectors(rest, tiled_rows, panels, 1);
    }
    if (tiled_rows < rows) { /* the rows left over, all terms */
        o.a += tiled_rows * o.lda;
        o.c += tiled_rows * o.ldc;
        kernel_vectors(o, rows - tiled_rows, panels, add);
    }
}

#endif
