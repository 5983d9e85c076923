/* softmax.h: rows of scores in attention, shared by attention_fp32.c and attention_bf16.c. */
#ifndef CPU_SOFTMAX_H
#define CPU_SOFTMAX_H

#include "simd.h"

#include <math.h>
#include <stdint.h>

/* How far back a query sees. */
typedef struct sight {
    int window; /* so many keys; 0: no limit */
    const int32_t
        *positions; /* (T) of the sequence's rows in their documents, which end it; or NULL */
} sight;

static inline int first_seen(sight s, int query) {
    int first = s.positions ? query - s.positions[query] : 0, in_window = query + 1 - s.window;
    return s.window > 0 && in_window > first ? in_window : first;
}

/* That of sequence b of positions (B, T), or NULL. */
static inline sight sight_of(int window, const int32_t *positions, int b, int T) {
    return (sight){window, positions ? positions + (int64_t)b * T : NULL};
}

/* The first key that queries from position q0 on see, rounded down to a whole panel of 16, at which
 * packed keys can be entered. */
static inline int first_key(sight s, int q0) {
    return first_seen(s, q0) / 16 * 16;
}

/* The keys k0 + begin to k0 + end - 1 of nk that a query sees; none where they are equal. */
typedef struct seen_keys {
    int begin, end;
} seen_keys;

static inline seen_keys keys_seen(sight s, int query, int k0, int nk) {
    int end = query + 1 - k0, begin = first_seen(s, query) - k0;
    end = end < 0 ? 0 : end < nk ? end : nk;
    begin = begin < 0 ? 0 : begin < end ? begin : end;
    return (seen_keys){begin, end};
}

/* What is made of a product of a query and a key before its exponential. */
typedef struct scoring {
    float scale, cap; /* as in attention_forward */
} scoring;

static inline scoring scoring_of(float scale, float cap, int HS) {
    return (scoring){score_scale(scale, HS), cap};
}

/* The factor that makes powers of 2 of the exponentials of scores. */
#define LN2   0.693147181f
#define LOG2E 1.44269504f
static inline float exp2_scale(scoring how) {
    return (how.cap > 0 ? 1 : how.scale) * LOG2E;
}

/* 2^x within 3e-6 of it, for probabilities that are rounded to bf16: a minimax fit on [0, 1]. */
static inline vf vf_exp2(vf x) {
#if defined(__AVX512F__)
    vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf p = f * 1.34267006e-2f + 5.22424467e-2f;
    p = p * f + 2.41280213e-1f;
    p = p * f + 6.93044841e-1f;
    p = p * f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x); /* by 2^floor(x) */
#else
    return vf_exp(x * LN2);
#endif
}

/* Lanes begin to end - 1 of v; `other` in the rest. Any may be negative or more than there are. */
static inline vf vf_within(vf v, int begin, int end, float other) {
    if (begin <= 0 && end >= LANES) return v;
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return vf_select((lane >= begin) & (lane < end), v, vf_set(other));
}

/* s = cap tanh(scale s / cap), n numbers. */
static inline void cap_row(float *s, int n, scoring how) {
    float inner = how.scale / how.cap;
    FOR_LANES (j, k, n) vf_put(s + j, vf_tanh(vf_get(s + j, k) * inner) * how.cap, k);
}

/* z += b, n numbers. */
static inline void add_row(float *z, const float *b, int n) {
    FOR_LANES (j, k, n) vf_put(z + j, vf_get(z + j, k) + vf_get(b + j, k), k);
}

/* The first `valid` of nk scores become exponentials relative to the running maximum, the others 0.
 * Returns the factor by which what was summed before must shrink. */
static inline float softmax_row(float *s, int valid, int nk, scoring how, float *max, float *sum) {
    float scale = how.scale;
    if (how.cap > 0) cap_row(s, valid, how), scale = 1;
    vf biggest = vf_set(-INFINITY);
    FOR_LANES (j, k, valid) biggest = vf_max(biggest, vf_first(vf_get(s + j, k), k, -INFINITY));
    float m = vf_max_lane(biggest) * scale;
    m = m > *max ? m : *max;
    vf total = {0};
    FOR_LANES (j, k, valid) {
        vf e = vf_first(vf_exp(vf_get(s + j, k) * scale - m), k, 0);
        vf_put(s + j, e, k);
        total += e;
    }
    for (int j = valid; j < nk; j++) s[j] = 0;
    float shrink = expf(*max - m);
    *sum = *sum * shrink + vf_sum(total);
    *max = m;
    return shrink;
}

/* Of products s and gradients ds of probabilities: s = p, the probability by lse, and ds = p (ds - delta) times
 * the derivative of the score but for its scale. lse_2 is lse in base 2. */
static inline void softmax_gradient(vf *s, vf *ds, scoring how, vf lse_2, vf delta) {
    vf x = *s, slope = vf_set(1);
    if (how.cap > 0) {
        vf t = vf_tanh(x * (how.scale / how.cap));
        x = t * how.cap;
        slope = 1.0f - t * t;
    }
    *s = vf_exp2(x * exp2_scale(how) - lse_2);
    *ds = *s * (*ds - delta);
    if (how.cap > 0) *ds *= slope;
}

/* Of n products s and gradients ds of probabilities: s = p, the probability by lse, and
 * ds = p (ds - delta) times the derivative of the score. */
static inline void softmax_gradient_row(float *s, float *ds, int n, scoring how, float lse,
                                        float delta) {
    float scale = how.scale, inner = how.cap > 0 ? scale / how.cap : 0;
    if (how.cap > 0) {
        FOR_LANES (j, k, n) {
            vf t = vf_tanh(vf_get(s + j, k) * inner), p = vf_exp(t * how.cap - lse);
            vf_put(ds + j, p * (vf_get(ds + j, k) - delta) * (1.0f - t * t) * scale, k);
            vf_put(s + j, p, k);
        }
        return;
    }
    FOR_LANES (j, k, n) {
        vf p = vf_exp(vf_get(s + j, k) * scale - lse);
        vf_put(ds + j, p * (vf_get(ds + j, k) - delta) * scale, k);
        vf_put(s + j, p, k);
    }
}

#endif
