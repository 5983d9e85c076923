/* rope.c: rotary position embedding, in place on the packed queries and keys. */
#include "cpu.h"

#include "simd.h"

typedef struct rope_task {
    const rope_forward *op;
    float sign; /* 1 rotates forward, -1 back */
} rope_task;

/* Channels (i, i + half) of each head, the same angles for every head. */
static void rotate_heads(elem *x, const float *table, float sign, int n_heads, int half, int HS) {
    FOR_LANES (i, k, half) {
        float cosines[LANES] = {0}, sines[LANES] = {0};
        for (int j = 0; j < k; j++) {
            cosines[j] = table[2 * (i + j)];
            sines[j] = sign * table[2 * (i + j) + 1];
        }
        vf c = vf_load(cosines), s = vf_load(sines);
        for (int h = 0; h < n_heads; h++) {
            elem *low = x + h * HS + i, *high = low + half;
            vf a = vf_get(low, k), b = vf_get(high, k);
            vf_put(low, a * c - b * s, k);
            vf_put(high, a * s + b * c, k);
        }
    }
}

/* Channels (2i, 2i + 1) over the whole width. */
static void rotate_wide(elem *x, const float *table, float sign, int width) {
    for (int i = 0; i < width; i += 2) {
        float c = table[i], s = sign * table[i + 1];
        float a = to_float(x[i]), b = to_float(x[i + 1]);
        x[i] = to_elem(a * c - b * s);
        x[i + 1] = to_elem(a * s + b * c);
    }
}

static void rope_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const rope_task *task = p;
    const rope_forward *a = task->op;
    elem *qkv = a->qkv;
    int width = a->NH * a->HS, stride = (a->NH + 2 * a->NKV) * a->HS;
    int half = (a->turned ? a->turned : a->HS) / 2;
    int64_t pairs = a->pos == GPT_POS_ROPE ? half : width / 2;
    for (int64_t n = begin; n < end; n++) {
        elem *q = qkv + n * stride, *k = q + width;
        int64_t t = a->positions ? a->positions[n] : n % a->T;
        const float *table = a->table + t * pairs * 2;
        if (a->pos == GPT_POS_ROPE) {
            /* Keys follow the queries. */
            rotate_heads(q, table, task->sign, a->NH + a->NKV, half, a->HS);
        } else {
            rotate_wide(q, table, task->sign, width);
            rotate_wide(k, table, task->sign, width);
        }
    }
}

CPU_OP(rope_forward) {
    rope_task task = {op, 1};
    cpu_parallel(ctx, rope_rows, &task, op->N, cpu_grain(ctx, op->N, 4));
}

CPU_OP(rope_backward) {
    rope_forward same = {.qkv = op->dqkv,
                         .table = op->table,
                         .positions = op->positions,
                         .pos = op->pos,
                         .turned = op->turned,
                         .N = op->N,
                         .T = op->T,
                         .NH = op->NH,
                         .NKV = op->NKV,
                         .HS = op->HS};
    rope_task task = {&same, -1};
    cpu_parallel(ctx, rope_rows, &task, op->N, cpu_grain(ctx, op->N, 4));
}
