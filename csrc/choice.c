/* choice.c: see choice.h. A slow path is never taken on faith: tiles may be fast, or what a virtual machine makes
 * of them. While ops are measured, those of a shape run on both levels in turn, each call on one of them. */
#define _POSIX_C_SOURCE 200809L
#include "choice.h"

#include "error.h"

#include <pthread.h>
#include <string.h>
#include <time.h>

/* CALLS: of a shape that are timed on each level. LEAST_ROWS: with fewer both levels do the same. */
enum { MOST_SHAPES = 1024, CALLS = 4, LEAST_ROWS = 16 };

/* An op at one shape. */
typedef struct shape_times {
    gpt_level_times times;
    int calls[2];
} shape_times;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of what follows */
static shape_times shapes[MOST_SHAPES];
static int n_shapes, is_measuring;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int is_settled(const shape_times *s) {
    return s->calls[0] >= CALLS && s->calls[1] >= CALLS;
}

/* The op at this shape; where it is not there, it is added if that is wanted. NULL without it. */
static shape_times *find(const gpt_level_times *key, int add) {
    int i = 0;
    for (; i < n_shapes; i++) {
        const gpt_level_times *t = &shapes[i].times;
        if (t->dtype == key->dtype && t->a == key->a && t->b == key->b && t->rows == key->rows &&
            !strcmp(t->op, key->op))
            return &shapes[i];
    }
    if (!add || i == MOST_SHAPES) return NULL;
    shapes[i] = (shape_times){.times = *key};
    n_shapes++;
    return &shapes[i];
}

/* Whether the upper level is faster at the measured shapes of an op together; without any, of all ops. */
static int prefers_upper(const char *op) {
    double same[2] = {0}, all[2] = {0};
    for (const shape_times *s = shapes; s < shapes + n_shapes; s++) {
        if (!is_settled(s)) continue;
        for (int level = 0; level < 2; level++) {
            all[level] += s->times.seconds[level];
            if (!strcmp(s->times.op, op)) same[level] += s->times.seconds[level];
        }
    }
    return same[0] > 0 ? same[1] < same[0] : all[1] < all[0];
}

/* One call, on level `level`: 0 the lower, 1 the upper. */
typedef struct call {
    shape_times *timed; /* NULL: the call is not timed */
    int level;
    double begin;
} call;

static call call_begin(const char *op, int dtype, int a, int b, int rows) {
    call c = {0};
    if (rows < LEAST_ROWS) return c;
    gpt_level_times key = {.dtype = dtype, .a = a, .b = b, .rows = LEAST_ROWS};
    strncpy(key.op, op, sizeof key.op - 1);
    while (key.rows <= rows / 2) key.rows *= 2;
    pthread_mutex_lock(&lock);
    if (is_measuring || n_shapes > 0) {
        shape_times *s = find(&key, is_measuring);
        if (s && is_settled(s))
            c.level = s->times.seconds[1] < s->times.seconds[0];
        else if (s && is_measuring)
            c = (call){s, s->calls[1] < s->calls[0], now()};
        else
            c.level = prefers_upper(op);
    }
    pthread_mutex_unlock(&lock);
    return c;
}

static void call_end(const call *c) {
    if (!c->timed) return;
    double seconds = now() - c->begin, *least = &c->timed->times.seconds[c->level];
    pthread_mutex_lock(&lock);
    if (c->timed->calls[c->level]++ == 0 || seconds < *least) *least = seconds;
    pthread_mutex_unlock(&lock);
}

/* ---- the tables ---- */

static const gpt_ops *sources[GPT_DTYPE_PACKED + 1][2];
static gpt_ops tables[GPT_DTYPE_PACKED + 1];

/* Of a product, the columns that it has in truth. */
static int width_of(int activation, int columns) {
    return is_gated(activation) ? 2 * columns : columns;
}

/* A matrix that Muon updates. */
static const gpt_segment *muon_segment(const muon_update *op) {
    const gpt_segment *s = op->segments, *end = s + op->n_segments;
    while (s < end - 1 && s->optimizer != GPT_OPTIMIZER_MUON) s++;
    return s;
}

/* Ops that multiply, with the numbers that their time depends on. */
#define CHOSEN_PRODUCTS(X, dtype)                                                                  \
    X(linear_forward, dtype, op->IC, width_of(op->activation, op->OC), op->N)                      \
    X(linear_backward, dtype, op->IC, op->OC, op->N)                                               \
    X(head_forward, dtype, op->C, op->V, op->N)                                                    \
    X(classifier_forward, dtype, op->C, op->V, op->N)                                              \
    X(classifier_backward, dtype, op->C, op->V, op->N)                                             \
    X(expert_forward, dtype, op->IC, width_of(op->activation, op->OC), op->R)                      \
    X(expert_backward, dtype, op->IC, op->OC, op->R)
/* Those without weights in the products' form are the same for all dtypes. */
#define CHOSEN_ACTS(X, dtype)                                                                      \
    X(attention_forward, dtype, op->NH, op->HS, op->T)                                             \
    X(attention_backward, dtype, op->NH, op->HS, op->T)                                            \
    X(attention_decode, dtype, op->NH, op->HS, op->N)                                              \
    X(lora_forward, dtype, op->IC, op->OC, op->N)                                                  \
    X(lora_backward, dtype, op->IC, op->OC, op->N)                                                 \
    X(muon_update, dtype, muon_segment(op)->rows, muon_segment(op)->cols, muon_segment(op)->rows)

#define DEFINE(name, dtype, a, b, rows)                                                            \
    static void dtype##_##name(gpt_ctx *ctx, const struct name *op) {                              \
        call c = call_begin(#name, dtype, a, b, rows);                                             \
        sources[dtype][c.level]->name(ctx, op);                                                    \
        call_end(&c);                                                                              \
    }
CHOSEN_ACTS(DEFINE, GPT_DTYPE_BF16)
CHOSEN_PRODUCTS(DEFINE, GPT_DTYPE_BF16)
CHOSEN_PRODUCTS(DEFINE, GPT_DTYPE_INT8)
CHOSEN_PRODUCTS(DEFINE, GPT_DTYPE_INT4)
CHOSEN_PRODUCTS(DEFINE, GPT_DTYPE_PACKED)
#undef DEFINE

#define WORKSPACE(dtype)                                                                           \
    static size_t dtype##_workspace(const gpt_ctx *ctx, const gpt_shape *shape) {                  \
        size_t lower = sources[dtype][0]->workspace_bytes(ctx, shape);                             \
        size_t upper = sources[dtype][1]->workspace_bytes(ctx, shape);                             \
        return lower > upper ? lower : upper;                                                      \
    }
WORKSPACE(GPT_DTYPE_BF16)
WORKSPACE(GPT_DTYPE_INT8)
WORKSPACE(GPT_DTYPE_INT4)
WORKSPACE(GPT_DTYPE_PACKED)
#undef WORKSPACE

/* Of the faster level. */
#define PEAK(dtype)                                                                                \
    static int dtype##_peak(gpt_ctx *ctx, double *flops, double *bytes) {                          \
        double lower;                                                                              \
        int measured = sources[dtype][1]->peak(ctx, flops, bytes);                                 \
        measured = sources[dtype][0]->peak(ctx, &lower, NULL) && measured;                         \
        if (lower > *flops) *flops = lower;                                                        \
        return measured;                                                                           \
    }
PEAK(GPT_DTYPE_BF16)
PEAK(GPT_DTYPE_INT8)
PEAK(GPT_DTYPE_INT4)
PEAK(GPT_DTYPE_PACKED)
#undef PEAK

const gpt_ops *choice_ops(int dtype, const gpt_ops *lower, const gpt_ops *upper) {
#define FILL(name, dtype, a, b, rows)                                                              \
    if (table.name) table.name = dtype##_##name;
#define MAKE(dtype)                                                                                \
    case dtype:                                                                                    \
        CHOSEN_PRODUCTS(FILL, dtype)                                                               \
        table.workspace_bytes = dtype##_workspace;                                                 \
        table.peak = dtype##_peak;                                                                 \
        break;
    pthread_mutex_lock(&lock);
    if (sources[dtype][0] != lower || sources[dtype][1] != upper) {
        gpt_ops table = *lower;
        table.name = upper->name;
        CHOSEN_ACTS(FILL, GPT_DTYPE_BF16)
        switch (dtype) {
            MAKE(GPT_DTYPE_BF16)
            MAKE(GPT_DTYPE_INT8)
            MAKE(GPT_DTYPE_INT4)
            MAKE(GPT_DTYPE_PACKED)
        }
        tables[dtype] = table;
        sources[dtype][0] = lower;
        sources[dtype][1] = upper;
    }
    pthread_mutex_unlock(&lock);
    return &tables[dtype];
#undef MAKE
#undef FILL
}

/* ---- times ---- */

void choice_measure(int on) {
    pthread_mutex_lock(&lock);
    is_measuring = on;
    pthread_mutex_unlock(&lock);
}

int choice_times(int i, gpt_level_times *out) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (int k = 0; k < n_shapes && !found; k++) {
        if (!is_settled(&shapes[k]) || i-- > 0) continue;
        *out = shapes[k].times;
        found = 1;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

int choice_set_times(const gpt_level_times *times) {
    pthread_mutex_lock(&lock);
    shape_times *s = find(times, 1);
    if (s) *s = (shape_times){*times, {CALLS, CALLS}};
    pthread_mutex_unlock(&lock);
    if (!s) return fail(GPT_ERR_MEMORY, "times of more than %d shapes of ops", MOST_SHAPES);
    return GPT_OK;
}
