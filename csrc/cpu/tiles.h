/* tiles.h: the tile registers of AMX, as the few operations that kernels need. A tile is 16 rows of
 * 64 bytes: 16 x 32 bf16 numbers, or 16 x 16 float32 sums. For products of bytes in short groups,
 * TILE_A has fewer bytes in a row, TILE_B as many rows as those are quads, TILE_SUMS int32 sums.
 *
 * With GPTC_EMULATE_AMX the same operations are plain C, so that tests run the kernel on any CPU. */
#ifndef CPU_TILES_H
#define CPU_TILES_H

#include <stdint.h>
#include <string.h>

/* Names for the assembler, which wants digits. */
#define TILE_SUMS 0
#define TILE_A    4
#define TILE_B    6

#ifdef GPTC_EMULATE_AMX

static _Thread_local unsigned char emulated_tiles[8][16][64];
static _Thread_local int emulated_quads; /* of TILE_A's rows and TILE_B's columns; 0: whole tiles */

#define tiles_begin()             emulated_begin(0)
#define tiles_begin_groups(quads) emulated_begin(quads)
static inline void emulated_begin(int quads) {
    memset(emulated_tiles, 0, sizeof emulated_tiles);
    emulated_quads = quads;
}
#define tiles_end()  ((void)0)
#define tiles_sync() ((void)0)
#define tile_zero(t) memset(emulated_tiles[t], 0, sizeof emulated_tiles[t])

static inline void tile_load(int t, const void *p, int64_t stride_bytes) {
    int rows = emulated_quads && t == TILE_B ? emulated_quads : 16;
    size_t bytes = emulated_quads && t == TILE_A ? 4 * (size_t)emulated_quads : 64;
    for (int r = 0; r < rows; r++)
        memcpy(emulated_tiles[t][r], (const char *)p + r * stride_bytes, bytes);
}

static inline void tile_store(int t, void *p, int64_t stride_bytes) {
    for (int r = 0; r < 16; r++) memcpy((char *)p + r * stride_bytes, emulated_tiles[t][r], 64);
}

static inline float emulated_bf16(const unsigned char *p) {
    uint32_t bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* sum[m][n] += a[m][2 k] b[k][2 n] + a[m][2 k + 1] b[k][2 n + 1]. */
static inline void tile_dot(int sum, int a, int b) {
    for (int m = 0; m < 16; m++) {
        float row[16];
        memcpy(row, emulated_tiles[sum][m], sizeof row);
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++)
                for (int half = 0; half < 4; half += 2)
                    row[n] += emulated_bf16(&emulated_tiles[a][m][4 * k + half]) *
                              emulated_bf16(&emulated_tiles[b][k][4 * n + half]);
        memcpy(emulated_tiles[sum][m], row, sizeof row);
    }
}

/* sum[m][n] += the four products of a[m][4 k …], signed, and b[k][4 n …], unsigned. */
static inline void tile_dot_bytes(int sum, int a, int b) {
    for (int m = 0; m < 16; m++) {
        int32_t row[16];
        memcpy(row, emulated_tiles[sum][m], sizeof row);
        for (int k = 0; k < emulated_quads; k++)
            for (int n = 0; n < 16; n++)
                for (int h = 0; h < 4; h++)
                    row[n] += (int8_t)emulated_tiles[a][m][4 * k + h] *
                              (int32_t)emulated_tiles[b][k][4 * n + h];
        memcpy(emulated_tiles[sum][m], row, sizeof row);
    }
}

#else

#include <immintrin.h>

/* The compiler does not know that tile instructions read memory: stores to what they will read must
 * come before this. */
#define tiles_sync() __asm__ volatile("" ::: "memory")

/* Eight tiles, but for the two of short groups of full size: palette 1 of the "TILECFG" layout, Intel
 * SDM volume 1, chapter 18. */
static inline void tiles_configure(int quads) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = 16;
    }
    config.row_bytes[TILE_A] = (uint16_t)(4 * quads);
    config.rows[TILE_B] = (uint8_t)quads;
    tiles_sync();
    _tile_loadconfig(&config);
}

#define tiles_begin()             tiles_configure(16)
#define tiles_begin_groups(quads) tiles_configure(quads)
#define tiles_end()               _tile_release()
#define tile_zero(t)              _tile_zero(t)
#define tile_load(t, p, stride)   _tile_loadd(t, p, (size_t)(stride))
#define tile_store(t, p, stride)  _tile_stored(t, p, (size_t)(stride))
#define tile_dot(sum, a, b)       _tile_dpbf16ps(sum, a, b)
#define tile_dot_bytes(sum, a, b) _tile_dpbsud(sum, a, b)

#endif
#endif
