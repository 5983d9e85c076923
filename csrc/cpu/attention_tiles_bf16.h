/* attention_tiles_bf16.h: what attention_bf16.c and attention_decode_bf16.c share: a tile of queries in bf16
 * with float32 scores and sums. Every product of a tile is a row-major operand times a packed one
 * (pack.h), so keys and values are packed once for all queries of a head. */
#ifndef CPU_ATTENTION_TILES_BF16_H
#define CPU_ATTENTION_TILES_BF16_H

#include "attention_int8.h"
#include "kernel.h"
#include "softmax.h"

/* Few rows, so that little is computed of what the causal mask hides: a tile of queries and keys has TILE rows
 * and SPAN columns. AMX multiplies two of its tiles at once, AVX2 widens rows for many columns. */
#if defined(CPU_AMX)
enum { TILE = 32, SPAN = 256 };
#else
enum { TILE = LANES == 8 ? 48 : 16, SPAN = 256 };
#endif

/* Sizes of one head, and what of them is rounded up to whole panels. */
typedef struct head_shape {
    int T, HS, T16, HS16;
} head_shape;

static inline head_shape shape_of(int T, int HS) {
    return (head_shape){T, HS, (int)cpu_round_up(T, PANEL), (int)cpu_round_up(HS, PANEL)};
}

/* The memory of a thread for one head. */
typedef struct buffers {
    bf16 *keys;       /* k as rows, transposed: (HS, T) in panels of 16 keys */
    bf16 *values;     /* v as columns: (T, HS) in panels of 16 channels */
    float *s;         /* (TILE, SPAN) scores */
    float *sum_out;   /* (TILE, HS16) out of a tile; twice, for decoding */
    float *max, *sum; /* (TILE) */
    bf16 *p;          /* (TILE, SPAN) probabilities */
    /* Backward: */
    float *dp;                      /* (TILE, SPAN) */
    bf16 *ds;                       /* (TILE, SPAN) */
    bf16 *ds_panels;                /* (SPAN keys, SPAN queries) in panels of 16 queries */
    bf16 *q_rows, *dout_rows;       /* as keys */
    bf16 *q_columns, *dout_columns; /* as values */
    bf16 *k_turned;                 /* (HS, T16), rows turned_stride apart */
    float *dq_turned;               /* (HS16, SPAN) */
    float *dk, *dv;                 /* (T, HS16) */
    float *lse, *delta;             /* (T16): lse in base 2 */
    int *ends; /* (T): the first query from the key's on that does not see it */
    wide_operands *wide;
} buffers;

/* Not a power of two, or the rows of a band would meet in a few lines of the first-level cache. */
static inline int64_t turned_stride(head_shape h) {
    return h.T16 + 2 * PANEL;
}

static inline void *take(char **at, size_t *used, int64_t bytes) {
    size_t size = (size_t)cpu_round_up(bytes, 64);
    void *place = *at ? *at + *used : NULL;
    *used += size;
    return place;
}

/* Lays the buffers out from `at`, or only counts where that is NULL. Returns the bytes. */
static inline size_t lay_out(buffers *b, char *at, head_shape h, int training) {
    size_t used = 0;
    int64_t f = sizeof(float), e = sizeof(bf16), tile = TILE * SPAN;
    int64_t rows = h.T16 * pack_pairs(h.HS) * PAIR, columns = h.HS16 * pack_pairs(h.T) * PAIR;
    b->keys = take(&at, &used, e * rows);
    b->values = take(&at, &used, e * columns);
    b->s = take(&at, &used, f * tile);
    b->sum_out = take(&at, &used, f * 2 * TILE * h.HS16);
    b->max = take(&at, &used, f * TILE);
    b->sum = take(&at, &used, f * TILE);
    b->p = take(&at, &used, e * tile);
    if (!training) return used;
    b->dp = take(&at, &used, f * tile);
    b->ds = take(&at, &used, e * tile);
    b->ds_panels = take(&at, &used, e * SPAN * SPAN);
    b->q_rows = take(&at, &used, e * rows);
    b->dout_rows = take(&at, &used, e * rows);
    b->q_columns = take(&at, &used, e * columns);
    b->dout_columns = take(&at, &used, e * columns);
    b->k_turned = take(&at, &used, e * h.HS * turned_stride(h));
    b->dq_turned = take(&at, &used, f * h.HS16 * SPAN);
    b->dk = take(&at, &used, f * h.T * h.HS16);
    b->dv = take(&at, &used, f * h.T * h.HS16);
    b->lse = take(&at, &used, f * h.T16);
    b->delta = take(&at, &used, f * h.T16);
    b->ends = take(&at, &used, (int64_t)sizeof(int) * h.T);
    return used;
}

_Static_assert(sizeof(wide_operands) <= CPU_SCRATCH, "scratch");

static inline buffers thread_buffers(const gpt_ctx *ctx, int thread, head_shape head,
                                     int training) {
    buffers b;
    size_t bytes = lay_out(&b, NULL, head, training);
    lay_out(&b, (char *)ctx->workspace + bytes * (size_t)thread, head, training);
    b.wide = cpu_scratch(ctx, thread);
    return b;
}

/* (n, HS) rows x, ldx apart, as columns: their transpose in panels. */
static inline void pack_keys(bf16 *out, const bf16 *x, int64_t ldx, int n, int HS) {
    for (int t = 0; t < n; t += PANEL)
        pack_transposed((pair *)(out + t / PANEL * pack_panel_size(HS)), x + t * ldx, ldx,
                        cpu_min(PANEL, n - t), HS);
}

/* c (rows, n columns) = a (rows, K) b, or c += a b, over any number of panels of b. */
static inline void multiply(const buffers *w, float *c, int64_t ldc, const bf16 *a, int64_t lda,
                            const bf16 *b, int64_t panel, int rows, int n, int K, int add) {
    for (int col = 0; col < n; col += GROUP * PANEL) {
        kernel_operands o = {.a = a,
                             .b = b + col / PANEL * panel,
                             .c = c + col,
                             .lda = lda,
                             .panel = panel,
                             .ldc = ldc,
                             .K = K,
                             .wide = w->wide};
        kernel_product(o, rows, (int)pack_panels(cpu_min(GROUP * PANEL, n - col)), add);
    }
}

/* Asks for (n, HS) rows that are read soon, and may be far apart. */
static inline void ask_for_rows(const bf16 *x, int64_t ldx, int n, int HS) {
    for (int r = 0; r < n; r++, x += ldx)
        for (int c = 0; c < HS; c += 64 / (int)sizeof(bf16)) ask_for(x + c);
}

static inline void round_row(bf16 *out, const float *x, float factor, int n) {
    FOR_LANES (c, k, n) vf_put(out + c, vf_get(x + c, k) * factor, k);
}

/* Queries q0 to q0 + nq - 1 of one head, whose keys and values are packed in w. */
typedef struct query_tile {
    bf16 *out;  /* rows ldo apart */
    float *lse; /* (nq) or NULL */
    const bf16 *q;
    int64_t ldo, ldq;
    head_shape head;
    int q0, nq;
    sight sight;
    scoring scoring;
    const float *scale_k, *scale_v; /* (T) of the keys and values, or NULL: see attention_int8.h */
    gpt_dropout dropout;
    uint64_t index; /* of the probability (q0, key 0), for dropout */
} query_tile;

/* The scores s of query r of a tile and keys k0 to k0 + nk - 1 become probabilities p relative to the running
 * maximum, 0 where it does not see the key; up to whole vectors. Returns the factor by which what was summed
 * before must shrink. */
static inline float forward_row(const query_tile *t, buffers *w, int r, int k0, int nk) {
    float *s = w->s + r * SPAN, scale = exp2_scale(t->scoring), m = w->max[r];
    bf16 *p = w->p + r * SPAN;
    uint64_t index = t->index + (uint64_t)r * (uint64_t)t->head.T + (uint64_t)k0;
    seen_keys seen = keys_seen(t->sight, t->q0 + r, k0, nk);
    int begin = seen.begin / LANES * LANES;
    if (t->scale_k) scale_by(s, t->scale_k + k0, seen.end);
    if (t->scoring.cap > 0) cap_row(s + begin, seen.end - begin, t->scoring);
    vf biggest = vf_set(-INFINITY), total = {0};
    for (int j = begin; j < seen.end; j += LANES)
        biggest =
            vf_max(biggest, vf_within(vf_load(s + j), seen.begin - j, seen.end - j, -INFINITY));
    float most = vf_max_lane(biggest) * scale;
    m = most > m ? most : m;
    for (int j = 0; j < begin; j += LANES) vf_put(p + j, vf_set(0), LANES);
    for (int j = begin; j < nk; j += LANES) {
        vf e = vf_exp2(vf_load(s + j) * scale - m);
        e = vf_within(e, seen.begin - j, seen.end - j, 0);
        total += e;
        if (t->dropout.p > 0) e *= dropout_lanes(t->dropout, index + (uint64_t)j);
        if (t->scale_v) e *= vf_get(t->scale_v + k0 + j, cpu_min(LANES, nk - j));
        vf_put(p + j, e, LANES);
    }
    float shrink = w->sum[r] > 0 ? exp2f(w->max[r] - m) : 1;
    w->sum[r] = w->sum[r] * shrink + vf_sum(total);
    w->max[r] = m;
    return shrink;
}

static inline void forward_tile(const query_tile *t, buffers *w) {
    int HS = t->head.HS, HS16 = t->head.HS16, n_keys = t->q0 + t->nq;
    int first = first_key(t->sight, t->q0);
    for (int r = 0; r < t->nq; r++) {
        w->max[r] = -INFINITY;
        w->sum[r] = 0;
    }
    for (int k0 = first; k0 < n_keys; k0 += SPAN) {
        int nk = cpu_min(SPAN, n_keys - k0);
        multiply(w, w->s, SPAN, t->q, t->ldq, w->keys + k0 / PANEL * pack_panel_size(HS),
                 pack_panel_size(HS), t->nq, nk, HS, 0); /* s = q k^T */
        for (int r = 0; r < t->nq; r++) {
            float shrink = forward_row(t, w, r, k0, nk), *out = w->sum_out + (int64_t)r * HS16;
            if (k0 > first && shrink != 1)
                FOR_LANES (c, k, HS16) vf_put(out + c, vf_get(out + c, k) * shrink, k);
        }
        multiply(w, w->sum_out, HS16, w->p, SPAN, w->values + (int64_t)k0 * PANEL,
                 pack_panel_size(t->head.T), t->nq, HS, nk, k0 > first); /* out = p v */
    }
    for (int r = 0; r < t->nq; r++) {
        round_row(t->out + r * t->ldo, w->sum_out + (int64_t)r * HS16, 1 / w->sum[r], HS);
        if (t->lse) t->lse[r] = w->max[r] * LN2 + logf(w->sum[r]);
    }
}

#endif
