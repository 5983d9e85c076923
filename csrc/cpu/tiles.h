/* tiles.h: the tile registers of AMX, as the few operations that kernel_amx.h needs. A tile is 16
 * rows of 64 bytes: 16 x 32 bf16 numbers, or 16 x 16 float32 sums.
 *
 * With GPTC_EMULATE_AMX the same operations are plain C, so that tests run the kernel on any CPU. */
#ifndef CPU_TILES_H
#define CPU_TILES_H

#include <stdint.h>
#include <string.h>

#ifdef GPTC_EMULATE_AMX

static _Thread_local unsigned char emulated_tiles[8][16][64];

#define tiles_begin() memset(emulated_tiles, 0, sizeof emulated_tiles)
#define tiles_end()   ((void)0)
#define tiles_sync()  ((void)0)
#define tile_zero(t)  memset(emulated_tiles[t], 0, sizeof emulated_tiles[t])

static inline void tile_load(int t, const void *p, int64_t stride_bytes) {
    for (int r = 0; r < 16; r++)
        memcpy(emulated_tiles[t][r], (const char *)p + r * stride_bytes, 64);
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

#else

#include <immintrin.h>

/* The compiler does not know that tile instructions read memory: stores to what they will read must
 * come before this. */
#define tiles_sync() __asm__ volatile("" ::: "memory")

/* Eight tiles of full size: palette 1 of the "TILECFG" layout, Intel SDM volume 1, chapter 18. */
static inline void tiles_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = 16;
    }
    tiles_sync();
    _tile_loadconfig(&config);
}

#define tiles_end()              _tile_release()
#define tile_zero(t)             _tile_zero(t)
#define tile_load(t, p, stride)  _tile_loadd(t, p, (size_t)(stride))
#define tile_store(t, p, stride) _tile_stored(t, p, (size_t)(stride))
#define tile_dot(sum, a, b)      _tile_dpbf16ps(sum, a, b)

#endif
#endif
