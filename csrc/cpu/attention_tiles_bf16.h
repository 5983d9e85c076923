/* attention_tiles_bf16.h: what attention_bf16.c and attention_decode_bf16.c share: a tile of queries in bf16
 * with float32 scores and sums. Every product of a tile is a row-major operand times a packed one
 * (pack.h), so keys and values are packed once for all queries of a head. */
#ifndef CPU_ATTENTION_TILES_BF16_H
#define CPU_ATTENTION_TILES_BF16_H

#include "attention_int8.h"
#include "kernel.h"
#include "softmax.h"

/* Few queries, so that little is computed of what the causal mask hides: two tiles of AMX. */
enum { TILE_Q = LANES == 8 ? 48 : 32, TILE_K = 256 };

/* Sizes of one head, and what of them is rounded up to whole panels. */
typedef struct head_shape {
    int T, HS, T16, HS16;
} head_shape;

static inline head_shape shape_of(int T, int HS) {
    return (head_shape){T, HS, (int)cpu_round_up(T, PANEL), (int)cpu_round_up(HS, PANEL)};
}

/* The memory of a thread for one head. */
typedef struct buffers {
    bf16 *keys;         /* k as rows, transposed: (HS, T) in panels of 16 keys */
    bf16 *values;       /* v as columns: (T, HS) in panels of 16 channels */
    float *s;           /* (TILE_Q, TILE_K) scores, then probabilities */
    float *sum_q;       /* (TILE_Q, HS16) out of a tile, or dq */
    float *max, *sum;   /* (TILE_Q) */
    bf16 *p;            /* (TILE_Q, TILE_K) probabilities, or ds */
    bf16 *values_rows;  /* backward: v as rows, transposed: (HS, T) in panels of 16 keys */
    bf16 *keys_columns; /* k as columns: (T, HS) in panels of 16 channels */
    float *ds;          /* (TILE_Q, TILE_K) */
    bf16 *p_panels;     /* (TILE_Q, TILE_K) in panels of 16 keys */
    bf16 *ds_panels;    /* the same */
    bf16 *q_turned;     /* (HS, TILE_Q) */
    bf16 *dout_turned;  /* (HS, TILE_Q) */
    float *dk_turned;   /* (HS, T16) */
    float *dv_turned;   /* (HS, T16) */
    wide_operands *wide;
} buffers;

static inline void *take(char **at, size_t *used, int64_t bytes) {
    size_t size = (size_t)cpu_round_up(bytes, 64);
    void *place = *at ? *at + *used : NULL;
    *used += size;
    return place;
}

/* Lays the buffers out from `at`, or only counts where that is NULL. Returns the bytes. */
static inline size_t lay_out(buffers *b, char *at, head_shape h, int training) {
    size_t used = 0;
    int64_t f = sizeof(float), e = sizeof(bf16), tile = TILE_Q * TILE_K;
    int64_t rows = h.T16 * pack_pairs(h.HS) * PAIR, columns = h.HS16 * pack_pairs(h.T) * PAIR;
    b->keys = take(&at, &used, e * rows);
    b->values = take(&at, &used, e * columns);
    b->s = take(&at, &used, f * tile);
    b->sum_q = take(&at, &used, f * TILE_Q * h.HS16);
    b->max = take(&at, &used, f * TILE_Q);
    b->sum = take(&at, &used, f * TILE_Q);
    b->p = take(&at, &used, e * tile);
    if (!training) return used;
    b->values_rows = take(&at, &used, e * rows);
    b->keys_columns = take(&at, &used, e * columns);
    b->ds = take(&at, &used, f * tile);
    b->p_panels = take(&at, &used, e * tile);
    b->ds_panels = take(&at, &used, e * tile);
    b->q_turned = take(&at, &used, e * h.HS * TILE_Q);
    b->dout_turned = take(&at, &used, e * h.HS * TILE_Q);
    b->dk_turned = take(&at, &used, f * h.HS * h.T16);
    b->dv_turned = take(&at, &used, f * h.HS * h.T16);
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

/* Dropout of nq x nk numbers, whose first element has this index and whose rows are T apart. */
static inline void drop_tile(float *s, int nq, int nk, gpt_dropout dropout, uint64_t index, int T) {
    if (dropout.p <= 0) return;
    for (int r = 0; r < nq; r++, s += TILE_K, index += (uint64_t)T)
        FOR_LANES (j, k, nk)
            vf_put(s + j, vf_get(s + j, k) * dropout_lanes(dropout, index + (uint64_t)j), k);
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

static inline void forward_tile(const query_tile *t, buffers *w) {
    int HS = t->head.HS, HS16 = t->head.HS16, n_keys = t->q0 + t->nq;
    int first = first_key(t->sight, t->q0);
    for (int r = 0; r < t->nq; r++) {
        w->max[r] = -INFINITY;
        w->sum[r] = 0;
    }
    for (int k0 = first; k0 < n_keys; k0 += TILE_K) {
        int nk = cpu_min(TILE_K, n_keys - k0);
        multiply(w, w->s, TILE_K, t->q, t->ldq, w->keys + k0 / PANEL * pack_panel_size(HS),
                 pack_panel_size(HS), t->nq, nk, HS, 0);
        for (int r = 0; r < t->nq; r++) {
            seen_keys seen = keys_seen(t->sight, t->q0 + r, k0, nk);
            float *s = w->s + r * TILE_K, *sum = w->sum_q + (int64_t)r * HS16;
            if (seen.begin == seen.end) { /* a block of keys that this query does not see */
                memset(s, 0, sizeof(float) * (size_t)nk);
                continue;
            }
            for (int j = 0; j < seen.begin; j++) s[j] = 0;
            if (t->scale_k) scale_by(s, t->scale_k + k0, seen.end);
            float shrink = softmax_row(s + seen.begin, seen.end - seen.begin, nk - seen.begin,
                                       t->scoring, &w->max[r], &w->sum[r]);
            if (k0 > first && shrink != 1)
                FOR_LANES (c, k, HS16) vf_put(sum + c, vf_get(sum + c, k) * shrink, k);
        }
        drop_tile(w->s, t->nq, nk, t->dropout, t->index + (uint64_t)k0, t->head.T);
        for (int r = 0; r < t->nq; r++) {
            if (t->scale_v) scale_by(w->s + r * TILE_K, t->scale_v + k0, nk);
            round_row(w->p + r * TILE_K, w->s + r * TILE_K, 1, nk);
        }
        multiply(w, w->sum_q, HS16, w->p, TILE_K, w->values + (int64_t)k0 * PANEL,
                 pack_panel_size(t->head.T), t->nq, HS, nk, k0 > first);
    }
    for (int r = 0; r < t->nq; r++) {
        round_row(t->out + r * t->ldo, w->sum_q + (int64_t)r * HS16, 1 / w->sum[r], HS);
        if (t->lse) t->lse[r] = w->max[r] + logf(w->sum[r]);
    }
}

#endif
