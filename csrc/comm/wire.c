/* wire.c: bf16, and 8 bits with a scale for each block. The scales of a message come first. */
#include "wire.h"

#include "gpt.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { MOST_INT8 = 127 };

/* Below it a scale would lose its digits: such a block is sent as zeros. */
static const float LEAST = 1e-30f;

static int64_t n_blocks(int64_t n) {
    return (n + WIRE_BLOCK - 1) / WIRE_BLOCK;
}

static int block_size(int64_t n, int64_t block) {
    int64_t left = n - block * WIRE_BLOCK;
    return left < WIRE_BLOCK ? (int)left : WIRE_BLOCK;
}

int64_t wire_bytes(int wire, int64_t n) {
    if (n <= 0) return 0;
    if (wire == GPT_WIRE_BF16) return 2 * n;
    if (wire == GPT_WIRE_INT8) return n + n_blocks(n) * (int64_t)sizeof(float);
    return n * (int64_t)sizeof(float);
}

/* To the nearest, ties to even. */
static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

static void encode_bf16(uint16_t *out, const float *x, float *residual, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float sum = x[i] + residual[i];
        out[i] = to_bf16(sum);
        float left = sum - from_bf16(out[i]);
        residual[i] = fabsf(left) <= FLT_MAX ? left : residual[i];
    }
}

/* The largest of some numbers; NaN where one is not finite. */
static float largest(const float *x, int n) {
    float most = 0;
    int bad = 0;
    for (int i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        bad |= !(size <= FLT_MAX);
        most = size > most ? size : most;
    }
    return bad ? NAN : most;
}

/* To the nearest, ties to even, for numbers below 2^22. */
static float nearest(float x) {
    const float big = 0x1.8p23f;
    return (x + big) - big;
}

static void encode_block(float *scale, int8_t *out, const float *x, float *residual, int n) {
    float sum[WIRE_BLOCK];
    for (int i = 0; i < n; i++) sum[i] = x[i] + residual[i];
    float most = largest(sum, n);
    *scale = most < LEAST ? 0 : most / MOST_INT8; /* NaN stays */
    float inverse = *scale > 0 ? MOST_INT8 / most : 0;
    for (int i = 0; i < n; i++) out[i] = (int8_t)nearest(isnan(most) ? 0 : sum[i] * inverse);
    if (isnan(most)) return;
    for (int i = 0; i < n; i++) residual[i] = sum[i] - *scale * (float)out[i];
}

void wire_encode(int wire, void *out, const float *x, float *residual, int64_t n) {
    if (wire == GPT_WIRE_BF16) {
        encode_bf16(out, x, residual, n);
        return;
    }
    float *scales = out;
    int8_t *numbers = (int8_t *)(scales + n_blocks(n));
    for (int64_t b = 0; b < n_blocks(n); b++) {
        int64_t at = b * WIRE_BLOCK;
        encode_block(&scales[b], numbers + at, x + at, residual + at, block_size(n, b));
    }
}

void wire_decode(int wire, float *out, const void *in, int64_t n, int64_t first, int64_t size) {
    if (wire == GPT_WIRE_BF16) {
        const uint16_t *numbers = (const uint16_t *)in + first;
        for (int64_t i = 0; i < size; i++) out[i] = from_bf16(numbers[i]);
        return;
    }
    const float *scales = in;
    const int8_t *numbers = (const int8_t *)(scales + n_blocks(n)) + first;
    for (int64_t i = 0; i < size; i++)
        out[i] = scales[(first + i) / WIRE_BLOCK] * (float)numbers[i];
}
