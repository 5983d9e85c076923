/* route.c: the experts of each token, and the ways of its rows to them and back. */
#include "cpu.h"

#include "simd.h"

#include <math.h>

static const elem *row_of(const act *x, int64_t row, int C) {
    return (const elem *)x + row * C;
}

/* ---- forward ---- */

/* p = softmax of E logits, in place. */
static void softmax(float *p, int E) {
    float most = p[0], sum = 0;
    for (int e = 1; e < E; e++) most = p[e] > most ? p[e] : most;
    for (int e = 0; e < E; e++) sum += p[e] = expf(p[e] - most);
    for (int e = 0; e < E; e++) p[e] /= sum;
}

/* The K largest of E, the first of equal ones first. */
static void choose(const float *p, int E, int K, int32_t *out) {
    for (int k = 0; k < K; k++) {
        int best = -1;
        for (int e = 0; e < E; e++) {
            int taken = 0;
            for (int j = 0; j < k; j++) taken |= out[j] == e;
            if (!taken && (best < 0 || p[e] > p[best])) best = e;
        }
        out[k] = best;
    }
}

static void route_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const route_forward *a = args;
    for (int64_t n = begin; n < end; n++) {
        const elem *x = row_of(a->in, n, a->C);
        float *p = a->probs + n * a->E, *gates = a->gates + n * a->K, sum = 0;
        int32_t *choices = a->choices + n * a->K;
        for (int e = 0; e < a->E; e++) {
            const float *w = a->w + (int64_t)e * a->C;
            vf dot = {0};
            FOR_LANES (c, k, a->C) dot += vf_get(x + c, k) * vf_get(w + c, k);
            p[e] = vf_sum(dot);
        }
        softmax(p, a->E);
        choose(p, a->E, a->K, choices);
        for (int k = 0; k < a->K; k++) sum += gates[k] = p[choices[k]];
        for (int k = 0; a->norm && k < a->K; k++) gates[k] /= sum;
    }
}

/* Rows by counting: those of expert e begin behind those of the experts before. */
static void place_rows(const route_forward *a) {
    int64_t R = (int64_t)a->N * a->K;
    int32_t next[GPT_MAX_EXPERTS];
    memset(a->begins, 0, sizeof *a->begins * (size_t)(a->E + 1));
    for (int64_t i = 0; i < R; i++) a->begins[a->choices[i] + 1]++;
    for (int e = 0; e < a->E; e++) a->begins[e + 1] += next[e] = a->begins[e];
    for (int64_t i = 0; i < R; i++) a->places[i] = next[a->choices[i]]++;
}

CPU_OP(route_forward) {
    cpu_parallel(ctx, route_rows, (void *)op, op->N, cpu_grain(ctx, op->N, 4));
    place_rows(op);
}

static void spread_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const expert_spread *a = args;
    for (int64_t i = begin; i < end; i++) {
        const elem *in = row_of(a->in, i / a->K, a->C), *values = NULL;
        elem *out = (elem *)row_of(a->out, a->places[i], a->C);
        vf gate = vf_set(a->gates ? a->gates[i] : 1), dot = {0};
        if (a->dgates) values = row_of(a->values, a->places[i], a->C);
        FOR_LANES (c, k, a->C) {
            vf x = vf_get(in + c, k);
            if (values) dot += x * vf_get(values + c, k);
            vf_put(out + c, gate * x, k);
        }
        if (a->dgates) a->dgates[i] = vf_sum(dot);
    }
}

CPU_OP(expert_spread) {
    int64_t R = (int64_t)op->N * op->K;
    cpu_parallel(ctx, spread_rows, (void *)op, R, cpu_grain(ctx, R, 8));
}

static void combine_rows(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const expert_combine *a = args;
    for (int64_t n = begin; n < end; n++) {
        elem *out = (elem *)row_of(a->out, n, a->C);
        const int32_t *places = a->places + n * a->K;
        const float *gates = a->gates ? a->gates + n * a->K : NULL;
        FOR_LANES (c, i, a->C) {
            vf sum = {0};
            for (int k = 0; k < a->K; k++)
                sum += (gates ? gates[k] : 1) * vf_get(row_of(a->in, places[k], a->C) + c, i);
            vf_put(out + c, sum, i);
        }
    }
}

CPU_OP(expert_combine) {
    cpu_parallel(ctx, combine_rows, (void *)op, op->N, cpu_grain(ctx, op->N, 8));
}

/* ---- backward ---- */

enum { COLUMNS = 256 };

typedef struct route_task {
    const route_backward *op;
    float *dlogits;                /* (N, E) */
    float slopes[GPT_MAX_EXPERTS]; /* of the load-balance loss, with respect to a probability */
} route_task;

CPU_WORKSPACE(route_workspace) {
    (void)n_threads;
    return shape->training ? sizeof(float) * (size_t)shape->N * (size_t)shape->E : 0;
}

/* The chosen gates are a softmax over their logits with `norm`, and else probabilities of that over all. */
static void logits_backward(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const route_task *t = args;
    const route_backward *a = t->op;
    for (int64_t n = begin; n < end; n++) {
        const float *p = a->probs + n * a->E, *gates = a->gates + n * a->K;
        const float *dgates = a->dgates + n * a->K;
        const int32_t *choices = a->choices + n * a->K;
        float *d = t->dlogits + n * a->E, over_all = 0, over_chosen = 0;
        for (int k = 0; k < a->K; k++) over_chosen += gates[k] * dgates[k];
        for (int e = 0; e < a->E; e++) over_all += p[e] * t->slopes[e];
        if (!a->norm) over_all += over_chosen;
        for (int e = 0; e < a->E; e++) d[e] = p[e] * (t->slopes[e] - over_all);
        for (int k = 0; k < a->K; k++)
            d[choices[k]] += gates[k] * (a->norm ? dgates[k] - over_chosen : dgates[k]);
    }
}

static void route_inputs(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const route_task *t = args;
    const route_backward *a = t->op;
    for (int64_t n = begin; n < end; n++) {
        elem *din = (elem *)row_of(a->din, n, a->C);
        const float *d = t->dlogits + n * a->E;
        FOR_LANES (c, k, a->C) {
            vf sum = {0};
            for (int e = 0; e < a->E; e++) sum += d[e] * vf_get(a->w + (int64_t)e * a->C + c, k);
            vf_put(din + c, vf_get(din + c, k) + sum, k);
        }
    }
}

/* Item i: some columns of an expert's row. */
static void route_weights(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const route_task *t = args;
    const route_backward *a = t->op;
    int pieces = (int)cpu_div_up(a->C, COLUMNS);
    for (int64_t i = begin; i < end; i++) {
        int64_t e = i / pieces;
        int first = (int)(i % pieces) * COLUMNS, cols = cpu_min(COLUMNS, a->C - first);
        float *dw = a->dw + e * a->C + first, sums[COLUMNS] = {0};
        for (int64_t n = 0; n < a->N; n++) {
            const elem *x = row_of(a->in, n, a->C) + first;
            float d = t->dlogits[n * a->E + e];
            FOR_LANES (c, k, cols) vf_put(sums + c, vf_get(sums + c, k) + d * vf_get(x + c, k), k);
        }
        FOR_LANES (c, k, cols) vf_put(dw + c, vf_get(dw + c, k) + vf_get(sums + c, k), k);
    }
}

CPU_OP(route_backward) {
    route_task t = {.op = op, .dlogits = ctx->workspace};
    double rows = (double)op->N * op->L;
    for (int e = 0; e < op->E; e++) {
        double tokens = 0;
        for (int l = 0; l < op->L; l++) {
            const int32_t *begins = op->begins + (int64_t)l * (op->E + 1);
            tokens += begins[e + 1] - begins[e];
        }
        t.slopes[e] = (float)(op->balance * op->E * tokens / (rows * rows));
    }
    cpu_parallel(ctx, logits_backward, &t, op->N, cpu_grain(ctx, op->N, 16));
    cpu_parallel(ctx, route_inputs, &t, op->N, cpu_grain(ctx, op->N, 8));
    if (op->dw) cpu_parallel(ctx, route_weights, &t, op->E * cpu_div_up(op->C, COLUMNS), 1);
}
