/* weights_int4.cu: weight matrices rounded to Q4_K, in the layout of packed.h. Scales and minima are searched for as in
 * cpu/search_quant.c; the last block of a row may be of fewer than 256 terms. */
#include "packed.h"

#include <float.h>

extern "C" CUDA_ACTS_OP(weights_pack);

enum { BLOCK_GROUPS = QUANT_BLOCK / QUANT_GROUP, CANDIDATES = 3 };
static constexpr float LEVELS = 15, SIXTHS = 63;

/* A bias has no head. */
size_t cuda_weights_bytes(int rows, int cols, int parts, int training) {
    (void)training;
    if (parts == 0) return sizeof(elem) * (size_t)rows;
    packed_part p = packed_part_of(quant_forms[FORM_Q4_K], rows, cols, sizeof(packed_head));
    return (size_t)(p.at + p.rows * p.row_bytes);
}

/* A group of a row: n numbers, then zeros. */
typedef struct group {
    float x[QUANT_GROUP];
    int n;
    float mean, sum_w, sum_x, sum_xx; /* of the squares, its root; of w, w x, w x x */
} group;

/* What an error of number k costs. */
static __device__ inline float cost(const group &g, int k) {
    return k < g.n ? fabsf(g.x[k]) + g.mean : 0;
}

static __device__ inline void take_group(group &g, const float *x, int n) {
    float squares = 0;
    g.n = n, g.sum_w = g.sum_x = g.sum_xx = 0;
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++) {
        g.x[k] = k < n ? x[k] : 0;
        squares = fmaf(g.x[k], g.x[k], squares);
    }
    g.mean = n > 0 ? sqrtf(squares / (float)n) : 0;
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++) {
        float w = cost(g, k), wx = w * g.x[k];
        g.sum_w += w, g.sum_x += wx, g.sum_xx = fmaf(wx, g.x[k], g.sum_xx);
    }
}

static __device__ inline float inverse_of(float x) {
    return x >= FLT_MIN && x <= FLT_MAX ? 1 / x : 0;
}

static __device__ inline float steps_of(float x, float low, float per_step) {
    return fminf(fmaxf(rintf((x - low) * per_step), 0), LEVELS);
}

/* A scale, and a minimum of at most 0, with little error: each candidate's by least squares. */
static __device__ inline void search(const group &g, float &scale, float &least) {
    float high = 0, low = 0, best = INFINITY;
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++) high = fmaxf(high, g.x[k]), low = fminf(low, g.x[k]);
    scale = (high - low) / LEVELS, least = low;
    for (int c = 0; c < CANDIDATES; c++) {
        float per_step = (14.5f + 0.5f * (float)c) * inverse_of(high - least);
        float L = 0, LL = 0, XL = 0;
#pragma unroll
        for (int k = 0; k < QUANT_GROUP; k++) {
            float l = steps_of(g.x[k], least, per_step), wl = cost(g, k) * l;
            L += wl, LL = fmaf(wl, l, LL), XL = fmaf(wl, g.x[k], XL);
        }
        float determinant = g.sum_w * LL - L * L;
        if (!(determinant > 0)) continue; /* one number */
        float unit = (g.sum_w * XL - g.sum_x * L) / determinant;
        float min = (LL * g.sum_x - L * XL) / determinant;
        if (min > 0) min = 0, unit = XL / LL;
        float error = g.sum_xx + unit * (unit * LL - 2 * XL) +
                      min * (min * g.sum_w + 2 * unit * L - 2 * g.sum_x);
        if (error < best) best = error, scale = unit, least = min;
    }
}

/* The largest of the lanes that have a block. */
static __device__ inline float block_max(float x) {
#pragma unroll
    for (int offset = BLOCK_GROUPS / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

/* x becomes an integer of 6 bits; the result is the float16 that multiplies those of its block. */
static __device__ inline uint16_t six_bits(float &x) {
    float largest = block_max(x);
    x = rintf(x * (SIXTHS * inverse_of(largest)));
    return half_of(largest / SIXTHS);
}

static __device__ inline void write_integers(uint8_t *to, const group &g, float low,
                                             float per_step) {
    packed<uint32_t, 4> words = {};
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++)
        words.x[k % 16 / 4] |= (uint32_t)steps_of(g.x[k], low, per_step)
                               << (k % 4 * 8 + k / 16 * 4);
    *(packed<uint32_t, 4> *)to = words;
}

/* A thread a group, neighbours a block. A block with a number that is not finite, or from 2^20 on, whose scale a
 * float16 may be too small for, is not a number. */
static __global__ void weights_pack_kernel(packed_head *to,
                                           const __grid_constant__ packed_head head, const float *w,
                                           int K) {
    const packed_part &p = head.parts[0];
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x;
    int per_row = (int)div_up(K, QUANT_BLOCK) * BLOCK_GROUPS, g = (int)(i % per_row);
    int row = (int)(i / per_row), n = least<int>(QUANT_GROUP, K - g * QUANT_GROUP);
    if (row >= p.rows || n < 0) n = 0;
    if (i == 0) *to = head;
    group numbers;
    float scale, low, most_size = 0;
    take_group(numbers, w + (n ? (int64_t)row * K + g * QUANT_GROUP : 0), n);
    search(numbers, scale, low);
    low = -low;
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++) most_size = fabsf(numbers.x[k]) < 0x1p20f ? most_size : 1;
    bool bad = block_max(most_size) > 0;
    uint16_t d = six_bits(scale), d_least = six_bits(low);
    if (n == 0) return;
    uint8_t *out = (uint8_t *)to + p.at + row * p.row_bytes;
    write_integers(out + g * 16, numbers, -half_float(d_least) * low,
                   inverse_of(half_float(d) * scale));
    int8_t *scales = (int8_t *)out + p.scales + 2 * g;
    scales[0] = (int8_t)(bad ? 1 : scale), scales[1] = (int8_t)(bad ? 0 : low);
    if (g % BLOCK_GROUPS) return;
    uint16_t *halves = (uint16_t *)(out + p.blocks) + g / BLOCK_GROUPS * 2;
    halves[0] = bad ? 0x7e00 : d, halves[1] = d_least ^ 0x8000;
}

CUDA_OP(weights_pack) {
    const gpt_segment *s = op->segment;
    if (s->parts == 0) {
        CUDA_ACTS_NAME(weights_pack)(ctx, op);
        return;
    }
    packed_head head = {};
    head.bytes = (int64_t)cuda_weights_bytes(s->rows, s->cols, s->parts, op->training);
    head.n_parts = 1;
    head.parts[0] = packed_part_of(quant_forms[FORM_Q4_K], s->rows, s->cols, sizeof head);
    int64_t groups = s->rows * div_up(s->cols, QUANT_BLOCK) * BLOCK_GROUPS;
    launch(ctx, weights_pack_kernel, dim3((unsigned)div_up(groups, BLOCK_THREADS)), BLOCK_THREADS,
           0, (packed_head *)s->packed, head, op->w, s->cols);
}
