/* finite.c: which buffers an op has written, and a search in them. */
#include "finite.h"

#include <string.h>

#define OUTPUTS(name, ...)                                                                         \
    void outputs_of_##name(const struct name *op, output *out) {                                   \
        const output list[] = {__VA_ARGS__, NONE};                                                 \
        _Static_assert(sizeof list <= MAX_OUTPUTS * sizeof *list, "MAX_OUTPUTS is too small");     \
        (void)op;                                                                                  \
        memcpy(out, list, sizeof list);                                                            \
    }
#define ACTS(field, count)   {.name = #field, .data = op->field, .n = (int64_t)(count), .is_act = 1}
#define FLOATS(field, count) {.name = #field, .data = op->field, .n = (int64_t)(count)}
#define NONE                 {.name = NULL}

#define N          ((int64_t)op->N)
#define QKV        (((int64_t)op->NH + 2 * op->NKV) * op->HS)
#define GATED(OUT) ((is_gated(op->activation) ? 2 : 1) * (int64_t)op->OUT)

static int64_t rows_of(const lora_part *parts, int n) {
    int64_t rows = 0;
    for (int i = 0; i < n; i++) rows += parts[i].rows;
    return rows;
}
#define ROWS rows_of(op->parts, op->n_parts)

OUTPUTS(embedding_forward, ACTS(out, N * op->C))
OUTPUTS(embedding_backward, FLOATS(dwte, (int64_t)op->V * op->C))
OUTPUTS(dropout_apply, ACTS(x, op->dropout.p > 0 ? op->n : 0))
OUTPUTS(residual_norm_forward, ACTS(resid_out, op->branch ? N * op->C : 0), FLOATS(stats, 2 * N),
        ACTS(out, N * op->C))
OUTPUTS(residual_norm_backward, ACTS(dresid, N * op->C), FLOATS(dw, op->C), FLOATS(db, op->C),
        ACTS(dbranch, N * op->C))
/* Of a norm over whole rows of queries and keys, whose width is not known here, the first numbers. */
OUTPUTS(qk_norm_forward, FLOATS(stats, N *(op->NH + op->NKV)),
        ACTS(qkv, N *((int64_t)op->NH + op->NKV) * op->HS))
OUTPUTS(qk_norm_backward, FLOATS(dq_w, op->HS), FLOATS(dk_w, op->HS),
        ACTS(dqkv, N *((int64_t)op->NH + op->NKV) * op->HS))
OUTPUTS(rope_forward, ACTS(qkv, N *QKV))
OUTPUTS(rope_backward, ACTS(dqkv, N *QKV))
OUTPUTS(attention_forward, FLOATS(lse, (int64_t)op->B * op->NH * op->T),
        ACTS(out, (int64_t)op->B * op->T * op->NH * op->HS))
OUTPUTS(attention_backward, ACTS(dqkv, (int64_t)op->B * op->T * QKV), FLOATS(db, QKV))
OUTPUTS(attention_decode, ACTS(out, N * op->NH * op->HS))
OUTPUTS(sample, NONE)
OUTPUTS(grad_norm, FLOATS(norm, 1))
OUTPUTS(adamw_update, NONE)
OUTPUTS(sgd_update, NONE)
OUTPUTS(muon_update, NONE)
OUTPUTS(lora_forward, FLOATS(u, N * op->n_parts * op->R), ACTS(pre, N *GATED(OC)),
        ACTS(out, N * op->OC))
OUTPUTS(lora_backward, FLOATS(da, (int64_t)op->n_parts * op->R * op->IC), FLOATS(db, ROWS * op->R),
        ACTS(din, N *GATED(IC)))
OUTPUTS(dora_inputs, ACTS(out, op->n))
OUTPUTS(dora_gain, FLOATS(gain, ROWS), FLOATS(per_norm, ROWS))
OUTPUTS(dora_backward, FLOATS(dm, ROWS), ACTS(dv, N * op->OC))
/* And those of an adapter in the same products. */
#define LORA_FLOATS(field, count)                                                                  \
    {.name = "lora " #field,                                                                       \
     .data = op->lora ? op->lora->field : NULL,                                                    \
     .n = op->lora ? (int64_t)(count) : 0}
OUTPUTS(linear_forward, LORA_FLOATS(u, N * op->lora->n_parts * op->lora->R),
        ACTS(pre, N *GATED(OC)), ACTS(out, N * op->OC))
OUTPUTS(linear_backward, FLOATS(dw, (int64_t)op->OC * op->IC), FLOATS(db, op->OC),
        LORA_FLOATS(da, (int64_t)op->lora->n_parts * op->lora->R * op->IC),
        LORA_FLOATS(db, rows_of(op->lora->parts, op->lora->n_parts) * op->lora->R),
        ACTS(din, N *GATED(IC)))
OUTPUTS(route_forward, FLOATS(probs, N * op->E), FLOATS(gates, N * op->K))
OUTPUTS(route_backward, FLOATS(dw, (int64_t)op->E * op->C), ACTS(din, N * op->C))
OUTPUTS(expert_spread, FLOATS(dgates, N * op->K), ACTS(out, N * op->K * op->C))
OUTPUTS(expert_combine, ACTS(out, N * op->C))
OUTPUTS(expert_forward, ACTS(out, (int64_t)op->R * op->OC))
OUTPUTS(expert_backward, ACTS(din, (int64_t)op->R *GATED(IC)))
OUTPUTS(head_forward, FLOATS(logits, op->V)) /* the first row: others may be padded */
OUTPUTS(classifier_forward, FLOATS(losses, N))
OUTPUTS(classifier_backward, FLOATS(losses, N), FLOATS(total, 1), ACTS(dx, N * op->C),
        FLOATS(dwte, (int64_t)op->V * op->C), FLOATS(db, op->V))
OUTPUTS(weights_pack, NONE)

enum { SOME = 4096 }; /* bytes that are looked at together */

/* A number as float32; those of two bytes are bfloat16. */
static float number_at(const unsigned char *bytes, size_t size) {
    uint32_t bits = 0;
    uint16_t half;
    float value;
    if (size == sizeof half) {
        memcpy(&half, bytes, sizeof half);
        bits = (uint32_t)half << 16;
    } else {
        memcpy(&bits, bytes, sizeof bits);
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

int finite_find(const gpt_ops *ops, gpt_ctx *ctx, const output *out, int64_t *index, float *value) {
    unsigned char bytes[SOME];
    size_t size = out->is_act ? ops->act_bytes : sizeof(float);
    if (!out->data) return 0;
    for (int64_t begin = 0, n; begin < out->n; begin += n) {
        n = out->n - begin < (int64_t)(SOME / size) ? out->n - begin : (int64_t)(SOME / size);
        ops->download(ctx, bytes, (const unsigned char *)out->data + (size_t)begin * size,
                      (size_t)n * size);
        if (ops->sync(ctx)) return 0;
        for (int64_t i = 0; i < n; i++) {
            *value = number_at(bytes + (size_t)i * size, size);
            *index = begin + i;
            if (!isfinite(*value)) return 1;
        }
    }
    return 0;
}
