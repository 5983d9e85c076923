/* dora.c: magnitudes of adapted rows. Products with A and B are small, and made once an update. */
#include "cpu.h"
#include "simd.h"

#include <math.h>
#include <string.h>

enum { COLS = 64 /* of a gradient that are summed at once */ };

CPU_OP(dora_inputs) {
    (void)ctx;
    FOR_LANES (i, k, op->n) vf_put((elem *)op->out + i, vf_get_f32(op->a + i, k), k);
}

/* ---- lengths of rows ---- */

typedef struct gain_task {
    const dora_gain *op;
    float *squares; /* (n_parts, R, R) A A^T */
} gain_task;

/* Rows begin to end - 1 of A, times A of their part. */
static void square_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const gain_task *t = p;
    int R = t->op->R, K = t->op->IC;
    for (int64_t i = begin; i < end; i++)
        for (int j = 0; j < R; j++) {
            const float *x = t->op->a + i * K, *y = t->op->a + (i / R * R + j) * K;
            vf sum = {0};
            FOR_LANES (c, k, K) sum += vf_get_f32(x + c, k) * vf_get_f32(y + c, k);
            t->squares[i * R + j] = vf_sum(sum);
        }
}

/* b (A A^T) b^T of one row of B. */
static double adapter_square(const float *b, const float *squares, int R) {
    double sum = 0;
    for (int i = 0; i < R; i++) {
        double along = 0;
        for (int j = 0; j < R; j++) along += (double)squares[i * R + j] * b[j];
        sum += b[i] * along;
    }
    return sum;
}

static void gain_rows(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const gain_task *t = p;
    const dora_gain *a = t->op;
    int64_t R = a->R, before = 0;
    for (int i = 0; i < a->n_parts; before += a->parts[i++].rows)
        for (int64_t row = begin; row < end; row++) {
            int64_t in_part = row - before;
            if (in_part < 0 || in_part >= a->parts[i].rows) continue;
            const float *b = a->b + row * R;
            const elem *aw = (const elem *)a->aw + i * R * a->OC + a->parts[i].first + in_part;
            double cross = 0, scale = a->scale;
            for (int64_t j = 0; j < R; j++) cross += (double)b[j] * to_float(aw[j * a->OC]);
            double square = a->squares[row] + 2 * scale * cross +
                            scale * scale * adapter_square(b, t->squares + i * R * R, a->R);
            a->per_norm[row] = square > 0 ? (float)(1 / sqrt(square)) : 0;
            a->gain[row] = a->m[row] * a->per_norm[row];
        }
}

static int part_rows(const lora_part *parts, int n_parts) {
    int rows = 0;
    for (int i = 0; i < n_parts; i++) rows += parts[i].rows;
    return rows;
}

CPU_OP(dora_gain) {
    gain_task t = {op, ctx->workspace};
    cpu_parallel(ctx, square_rows, &t, (int64_t)op->n_parts * op->R, 1);
    cpu_parallel(ctx, gain_rows, &t, part_rows(op->parts, op->n_parts), 64);
}

/* ---- backward ---- */

/* n columns of dv, which holds dout, and of dm; those of v begin at `at`. */
static void scale_columns(const dora_backward *a, int64_t col, int64_t at, int n, int64_t all) {
    float sums[COLS] = {0};
    for (int64_t row = 0; row < a->N; row++) {
        elem *d = (elem *)a->dv + row * a->OC + col;
        const elem *v = (const elem *)a->v + row * all + at;
        FOR_LANES (c, k, n) {
            vf x = vf_get(d + c, k);
            vf_put_f32(sums + c, vf_get_f32(sums + c, k) + x * vf_get(v + c, k), k);
            vf_put(d + c, x * vf_get_f32(a->gain + at + c, k), k);
        }
    }
    for (int c = 0; a->dm && c < n; c++) a->dm[at + c] += a->per_norm[at + c] * sums[c];
}

/* Of all parts, each divided by itself. */
static void backward_columns(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const dora_backward *a = p;
    int64_t first = 0, before = 0, all = part_rows(a->parts, a->n_parts);
    for (int i = 0; i < a->n_parts; i++) {
        int rows = a->parts[i].rows;
        for (int64_t piece = begin; piece < end; piece++) {
            int64_t col = (piece - first) * COLS;
            if (col < 0 || col >= rows) continue;
            int n = cpu_min(COLS, rows - (int)col);
            scale_columns(a, a->parts[i].first + col, before + col, n, all);
        }
        first += cpu_div_up(rows, COLS);
        before += rows;
    }
}

CPU_OP(dora_backward) {
    int64_t pieces = 0;
    memcpy(op->dv, op->dout, sizeof(elem) * (size_t)op->N * (size_t)op->OC);
    for (int i = 0; i < op->n_parts; i++) pieces += cpu_div_up(op->parts[i].rows, COLS);
    cpu_parallel(ctx, backward_columns, (void *)op, pieces, 1);
}
