/* moments.c: the optimizers' state as it is kept, and as float32. */
#include "moments.h"

#include "error.h"
#include "model.h"

#include <string.h>

enum {
    UNIT = 16,       /* numbers of a cache line */
    PIECE = 1 << 14, /* numbers that are converted together, whole blocks */
};

int64_t state_unit(const params_layout *layout) {
    return layout->moments == GPT_MOMENTS_INT8 ? MOMENT_BLOCK : UNIT;
}

static size_t n_blocks(int64_t n) {
    return (size_t)(n + MOMENT_BLOCK - 1) / MOMENT_BLOCK;
}

size_t state_bytes(const params_layout *layout, int kind) {
    size_t n = (size_t)layout->n_states[kind], bytes = n * sizeof(float);
    if (kind == GPT_OPTIMIZER_ADAMW && layout->moments == GPT_MOMENTS_BF16)
        bytes = n * sizeof(uint16_t);
    if (kind == GPT_OPTIMIZER_ADAMW && layout->moments == GPT_MOMENTS_INT8)
        bytes = n + n_blocks((int64_t)n) * sizeof(float);
    return align_buffer(bytes);
}

float *moment_scales(const params_layout *layout, void *buffer) {
    if (layout->moments != GPT_MOMENTS_INT8 || !buffer) return NULL;
    return (float *)((char *)buffer + layout->n_states[GPT_OPTIMIZER_ADAMW]);
}

/* ---- bfloat16 ---- */

static int read_bf16(gpt_model *m, const uint16_t *from, int n, float *out) {
    uint16_t halves[PIECE];
    m->ops->download(m->ctx, halves, from, sizeof *halves * (size_t)n);
    TRY(m->ops->sync(m->ctx));
    for (int i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)halves[i] << 16;
        memcpy(&out[i], &bits, sizeof bits);
    }
    return GPT_OK;
}

static int write_bf16(gpt_model *m, uint16_t *to, int n, const float *values) {
    uint16_t halves[PIECE];
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        halves[i] = moment_bf16(bits, 0x7fff + (bits >> 16 & 1));
    }
    m->ops->upload(m->ctx, to, halves, sizeof *halves * (size_t)n);
    return m->ops->sync(m->ctx);
}

/* ---- 8 bits ---- */

/* Codes and scales of numbers of state slot k. */
typedef struct coded {
    uint8_t *codes;
    float *scales;
    moment_code code;
    int is_signed;
} coded;

static coded coded_at(gpt_model *m, int k, int64_t at) {
    uint8_t *buffer = m->optimizer_state[GPT_OPTIMIZER_ADAMW][k];
    return (coded){.codes = buffer + at,
                   .scales = moment_scales(&m->layout, buffer) + at / MOMENT_BLOCK,
                   .code = moment_code_of(k == 0 ? M_BITS : V_BITS),
                   .is_signed = k == 0};
}

static int read_int8(gpt_model *m, coded from, int n, float *out) {
    uint8_t codes[PIECE];
    float scales[PIECE / MOMENT_BLOCK], shares[MOMENT_SIGN * 2];
    m->ops->download(m->ctx, codes, from.codes, (size_t)n);
    m->ops->download(m->ctx, scales, from.scales, sizeof *scales * n_blocks(n));
    TRY(m->ops->sync(m->ctx));
    for (int j = 0; j < MOMENT_SIGN * 2; j++) {
        int is_minus = from.is_signed && j >= MOMENT_SIGN;
        float share = moment_share(&from.code, is_minus ? j - MOMENT_SIGN : j);
        shares[j] = is_minus ? -share : share;
    }
    for (int i = 0; i < n; i++) out[i] = shares[codes[i]] * scales[i / MOMENT_BLOCK];
    return GPT_OK;
}

/* The scale of a block of n numbers, whose codes are written. */
static float code_block(const coded *to, uint8_t *codes, const float *values, int n) {
    float scale = 0;
    for (int i = 0; i < n; i++) scale = fmaxf(scale, fabsf(values[i]));
    float per_scale = scale >= MOMENT_LEAST ? 1 / scale : 0;
    for (int i = 0; i < n; i++) {
        int j = moment_code_at(&to->code, fabsf(values[i]) * per_scale, 0.5f);
        codes[i] = (uint8_t)(to->is_signed && signbit(values[i]) ? j + MOMENT_SIGN : j);
    }
    return per_scale > 0 ? scale : 0;
}

static int write_int8(gpt_model *m, coded to, int n, const float *values) {
    uint8_t codes[PIECE];
    float scales[PIECE / MOMENT_BLOCK];
    for (int i = 0; i < n; i += MOMENT_BLOCK)
        scales[i / MOMENT_BLOCK] =
            code_block(&to, codes + i, values + i, n - i < MOMENT_BLOCK ? n - i : MOMENT_BLOCK);
    m->ops->upload(m->ctx, to.codes, codes, (size_t)n);
    m->ops->upload(m->ctx, to.scales, scales, sizeof *scales * n_blocks(n));
    return m->ops->sync(m->ctx);
}

/* ---- either ---- */

int state_read(gpt_model *m, int kind, int k, int64_t at, int64_t n, float *out) {
    void *buffer = m->optimizer_state[kind][k];
    int moments = kind == GPT_OPTIMIZER_ADAMW ? m->layout.moments : GPT_MOMENTS_FP32;
    if (moments == GPT_MOMENTS_FP32) {
        m->ops->download(m->ctx, out, (float *)buffer + at, sizeof *out * (size_t)n);
        return m->ops->sync(m->ctx);
    }
    for (int64_t i = 0; i < n; i += PIECE) {
        int size = (int)(n - i < PIECE ? n - i : PIECE);
        if (moments == GPT_MOMENTS_BF16)
            TRY(read_bf16(m, (uint16_t *)buffer + at + i, size, out + i));
        else
            TRY(read_int8(m, coded_at(m, k, at + i), size, out + i));
    }
    return GPT_OK;
}

int state_write(gpt_model *m, int kind, int k, int64_t at, int64_t n, const float *values) {
    void *buffer = m->optimizer_state[kind][k];
    int moments = kind == GPT_OPTIMIZER_ADAMW ? m->layout.moments : GPT_MOMENTS_FP32;
    if (moments == GPT_MOMENTS_FP32) {
        m->ops->upload(m->ctx, (float *)buffer + at, values, sizeof *values * (size_t)n);
        return m->ops->sync(m->ctx);
    }
    for (int64_t i = 0; i < n; i += PIECE) {
        int size = (int)(n - i < PIECE ? n - i : PIECE);
        if (moments == GPT_MOMENTS_BF16)
            TRY(write_bf16(m, (uint16_t *)buffer + at + i, size, values + i));
        else
            TRY(write_int8(m, coded_at(m, k, at + i), size, values + i));
    }
    return GPT_OK;
}
