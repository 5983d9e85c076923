/* adamw.c: clipping and AdamW in one pass over memory. */
#include "moments.h"
#include "simd.h"
#include "update.h"

#include <math.h>

typedef struct adamw_rule {
    const adamw_update *op;
    float lr, beta1, beta2, eps, decay, grad_scale, correction1, correction2;
    uint32_t key;
    moment_code m_code, v_code;
} adamw_rule;

/* Numbers of a segment that are updated together. */
typedef struct adamw_piece {
    const adamw_rule *rule;
    float *w;
    const float *grads;
    float keep, rate, root;
    uint32_t place; /* of the first, for its random bits */
} adamw_piece;

static adamw_piece piece_at(const adamw_rule *a, const gpt_segment *s, int64_t first) {
    float lr = a->lr * s->lr_scale;
    return (adamw_piece){.rule = a,
                         .w = a->op->w + s->offset + first,
                         .grads = a->op->grads + s->grad + first,
                         .keep = 1.0f - lr * (s->decay ? a->decay : 0),
                         .rate = lr / a->correction1,
                         .root = 1.0f / sqrtf(a->correction2),
                         .place = (uint32_t)(s->offset + first)};
}

typedef struct two_moments {
    vf m, v;
} two_moments;

/* m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
 * w -= lr decay w;  w -= lr (m / correction1) / (sqrt(v / correction2) + eps)
 * for k numbers from i on. Returns the new moments. */
static inline two_moments adamw_lanes(const adamw_piece *p, int i, int k, two_moments old) {
    const adamw_rule *a = p->rule;
    vf g = vf_get(p->grads + i, k) * a->grad_scale;
    vf m1 = old.m * a->beta1 + g * (1.0f - a->beta1);
    vf v1 = old.v * a->beta2 + g * g * (1.0f - a->beta2);
    vf w1 = vf_get(p->w + i, k) * p->keep - p->rate * (m1 / (vf_sqrt(v1) * p->root + a->eps));
    vf_put(p->w + i, w1, k);
    return (two_moments){m1, v1};
}

static void adamw_run(const void *rule, const gpt_segment *s, int64_t first, int size) {
    const adamw_rule *a = rule;
    adamw_piece p = piece_at(a, s, first);
    float *m = (float *)a->op->m + s->state + first, *v = (float *)a->op->v + s->state + first;
    FOR_LANES (i, k, size) {
        two_moments new = adamw_lanes(&p, i, k, (two_moments){vf_get(m + i, k), vf_get(v + i, k)});
        vf_put(m + i, new.m, k);
        vf_put(v + i, new.v, k);
    }
}

/* ---- fewer bits ---- */

/* moment_bits of the numbers from i on. */
static inline vu random_lanes(const adamw_piece *p, int i) {
    vu x;
    for (int lane = 0; lane < LANES; lane++) x[lane] = (uint32_t)lane;
    x = (x + (p->place + (uint32_t)i)) ^ p->rule->key;
    x = (x ^ (x >> 16)) * MOMENT_MIX_1;
    x = (x ^ (x >> 15)) * MOMENT_MIX_2;
    return x ^ (x >> 16);
}

/* moment_bf16. */
static inline void put_bf16(bf16 *to, vf x, vu random, int k) {
    vh halves = __builtin_convertvector(((vu)x + (random & 0xffff)) >> 16, vh);
    if (k == LANES)
        memcpy(to, &halves, sizeof halves);
    else
        vh_store_n(to, halves, k);
}

static void adamw_run_bf16(const void *rule, const gpt_segment *s, int64_t first, int size) {
    const adamw_rule *a = rule;
    adamw_piece p = piece_at(a, s, first);
    bf16 *m = (bf16 *)a->op->m + s->state + first, *v = (bf16 *)a->op->v + s->state + first;
    FOR_LANES (i, k, size) {
        two_moments new = adamw_lanes(&p, i, k, (two_moments){vf_get(m + i, k), vf_get(v + i, k)});
        vu random = random_lanes(&p, i);
        put_bf16(m + i, new.m, random, k);
        put_bf16(v + i, new.v, random >> 16, k);
    }
}

/* LANES bytes as integers from 0 to 255. */
static inline vi codes_at(const uint8_t *p) {
    return vi_from_bytes((const int8_t *)p) & 255;
}

static inline void put_codes(uint8_t *to, vi codes) {
    vc bytes = __builtin_convertvector(codes, vc);
    memcpy(to, &bytes, sizeof bytes);
}

/* moment_share. */
static inline vf share_lanes(const moment_code *c, vi j) {
    vf x = __builtin_convertvector(j, vf);
    vi exponent = (vi)x & 0x7f800000,
       e = ((exponent >> 23) - 127) & (MOST_BITS - 1); /* of 0: any */
    vf n = (vf)exponent, share = (9.0f * x + 9.0f - 8.0f * n) * vf_pick(c->unit, e);
    return vf_select(j == 0, vf_set(c->lowest), share);
}

/* moment_code_at. */
static inline vi code_lanes(const moment_code *c, int bits, vf x, vf u) {
    vi e = {0};
    UNROLL
    for (int k = 1; k < bits; k++) e -= (vi)(x > c->above[k]);
    vf j = x * vf_pick(c->slope, e) + vf_pick(c->shift, e) + u;
    return __builtin_convertvector(vf_select(j < c->top, j, vf_set(c->top)), vi);
}

static inline vf uniform_lanes(vu bits) {
    return MOMENT_U(__builtin_convertvector((vi)(bits & 0xffff), vf));
}

/* The scale and its reciprocal of numbers of which `most` has the largest magnitudes. */
typedef struct scales {
    float scale, per_scale;
} scales;

static scales scales_of(vf most) {
    float scale = vf_max_lane(most);
    return scale >= MOMENT_LEAST ? (scales){scale, 1 / scale} : (scales){0, 0};
}

/* One block, of up to MOMENT_BLOCK numbers from i on. Codes behind the last number are padding. */
static void adamw_block(const adamw_piece *p, int i, int size, uint8_t *m, uint8_t *v,
                        float *m_scale, float *v_scale) {
    const moment_code *m_code = &p->rule->m_code, *v_code = &p->rule->v_code;
    vf ms[MOMENT_BLOCK / LANES], vs[MOMENT_BLOCK / LANES], m_most = {0}, v_most = {0};
    FOR_LANES (at, k, size) {
        vi code = codes_at(m + at), minus = code >= MOMENT_SIGN;
        vf share = share_lanes(m_code, code & (MOMENT_SIGN - 1));
        two_moments old = {vf_select(minus, -share, share) * *m_scale,
                           share_lanes(v_code, codes_at(v + at)) * *v_scale};
        two_moments new = adamw_lanes(p, i + at, k, old);
        ms[at / LANES] = vf_first(new.m, k, 0), vs[at / LANES] = vf_first(new.v, k, 0);
        m_most = vf_max(m_most, vf_max(ms[at / LANES], -ms[at / LANES]));
        v_most = vf_max(v_most, vs[at / LANES]);
    }
    scales of_m = scales_of(m_most), of_v = scales_of(v_most);
    *m_scale = of_m.scale, *v_scale = of_v.scale;
    for (int at = 0; at < size; at += LANES) {
        vu random = random_lanes(p, i + at);
        vf x = ms[at / LANES];
        vi minus = (vi)(x < 0.0f) & MOMENT_SIGN;
        vf share = vf_max(x, -x) * of_m.per_scale;
        put_codes(m + at, code_lanes(m_code, M_BITS, share, uniform_lanes(random)) | minus);
        share = vs[at / LANES] * of_v.per_scale;
        put_codes(v + at, code_lanes(v_code, V_BITS, share, uniform_lanes(random >> 16)));
    }
}

static void adamw_run_int8(const void *rule, const gpt_segment *s, int64_t first, int size) {
    const adamw_rule *a = rule;
    adamw_piece p = piece_at(a, s, first);
    int64_t state = s->state + first, block = state / MOMENT_BLOCK;
    uint8_t *m = (uint8_t *)a->op->m + state, *v = (uint8_t *)a->op->v + state;
    for (int i = 0; i < size; i += MOMENT_BLOCK, block++)
        adamw_block(&p, i, size - i < MOMENT_BLOCK ? size - i : MOMENT_BLOCK, m + i, v + i,
                    a->op->m_scales + block, a->op->v_scales + block);
}

CPU_OP(adamw_update) {
    gpt_adamw adamw = op->step->adamw;
    update_run_fn *const runs[] = {adamw_run, adamw_run_bf16, adamw_run_int8};
    adamw_rule rule = {.op = op,
                       .lr = adamw.lr,
                       .beta1 = adamw.beta1,
                       .beta2 = adamw.beta2,
                       .eps = adamw.eps,
                       .decay = adamw.weight_decay,
                       .grad_scale = update_clip(*op->norm, adamw.grad_clip),
                       .correction1 = op->step->correction1,
                       .correction2 = op->step->correction2,
                       .key = op->step->key,
                       .m_code = moment_code_of(M_BITS),
                       .v_code = moment_code_of(V_BITS)};
    update_task task = {.kind = GPT_OPTIMIZER_ADAMW,
                        .run = runs[op->moments],
                        .rule = &rule,
                        .w = op->w,
                        .segments = op->segments,
                        .n_segments = op->n_segments,
                        .unit = op->moments == GPT_MOMENTS_INT8 ? MOMENT_BLOCK : 1};
    if (isfinite(*op->norm)) update_segments(ctx, task);
}
