/* reference.h: the layers in float64, written in the most naive way there is.
 *
 * Each is next to its backward, which the tests prove with finite differences before they
 * trust it. Nothing here is tiled, fused or kept for later: attention holds its T x T
 * probabilities, the classifier its logits. Gradients add, so that callers decide what they start
 * from. The letters of the shapes are those of ops.h. */
#ifndef GPTC_REFERENCE_H
#define GPTC_REFERENCE_H

#include "ops.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

/* ---- embedding ---- */

static inline void ref_embedding_forward(double *out /* (N, C) */, const int32_t *tokens,
                                         const int32_t *positions /* or NULL */, const double *wte,
                                         const double *wpe /* or NULL */, int N, int T, int C) {
    for (int n = 0; n < N; n++) {
        int t = positions ? positions[n] : n % T;
        for (int c = 0; c < C; c++) {
            out[n * C + c] = wte[tokens[n] * C + c] + (wpe ? wpe[t * C + c] : 0.0);
        }
    }
}

static inline void ref_embedding_backward(double *dwte, double *dwpe /* or NULL */,
                                          const double *dout, const int32_t *tokens,
                                          const int32_t *positions /* or NULL */, int N, int T,
                                          int C) {
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) {
            dwte[tokens[n] * C + c] += dout[n * C + c];
            int t = positions ? positions[n] : n % T;
            if (dwpe) dwpe[t * C + c] += dout[n * C + c];
        }
    }
}

/* ---- norm ---- */

/* (mean, 1/std) of one row; the mean is 0 for RMSNorm. */
static inline void ref_norm_stats(double *stats /* (2) */, const double *x /* (C) */, int norm,
                                  double eps, int C) {
    double mean = 0.0, square = 0.0;
    if (norm == GPT_NORM_LAYERNORM) {
        for (int c = 0; c < C; c++) mean += x[c] / C;
    }
    for (int c = 0; c < C; c++) square += (x[c] - mean) * (x[c] - mean) / C;
    stats[0] = mean;
    stats[1] = norm == NORM_NONE ? 1.0 : 1.0 / sqrt(square + eps);
}

static inline void ref_norm_forward(double *out /* (N, C) */, double *stats /* (N, 2) */,
                                    const double *x /* (N, C) */, const double *w /* or NULL */,
                                    const double *b /* or NULL */, int norm, double eps, int N,
                                    int C) {
    for (int n = 0; n < N; n++) {
        ref_norm_stats(stats + 2 * n, x + n * C, norm, eps, C);
        for (int c = 0; c < C; c++) {
            double unit = (x[n * C + c] - stats[2 * n]) * stats[2 * n + 1];
            out[n * C + c] = unit * (w ? w[c] : 1.0) + (b ? b[c] : 0.0);
        }
    }
}

/* With u = (x - mean) / std and g = dout w: dx = (g - mean(g) - u mean(g u)) / std, where RMSNorm
 * has no mean(g) because it subtracts no mean. */
static inline void ref_norm_backward(double *dx, double *dw /* or NULL */, double *db /* or NULL */,
                                     const double *dout, const double *x, const double *stats,
                                     const double *w, int norm, int N, int C) {
    for (int n = 0; n < N; n++) {
        double mean = stats[2 * n], rstd = stats[2 * n + 1], mean_g = 0.0, mean_gu = 0.0;
        for (int c = 0; c < C; c++) {
            double g = dout[n * C + c] * (w ? w[c] : 1.0), u = (x[n * C + c] - mean) * rstd;
            if (norm == GPT_NORM_LAYERNORM) mean_g += g / C;
            if (norm != NORM_NONE) mean_gu += g * u / C;
        }
        for (int c = 0; c < C; c++) {
            double g = dout[n * C + c] * (w ? w[c] : 1.0), u = (x[n * C + c] - mean) * rstd;
            dx[n * C + c] += (g - mean_g - u * mean_gu) * rstd;
            if (dw) dw[c] += dout[n * C + c] * u;
            if (db) db[c] += dout[n * C + c];
        }
    }
}

/* The heads of queries and keys, in place; in and stats are for backward. */
static inline void ref_qk_norm_forward(double *qkv /* (N, QKV) */, double *in /* (N, QKV) */,
                                       double *stats /* (N, NH + NKV, 2) */, const double *q_w,
                                       const double *k_w, double eps, int N, int NH, int NKV,
                                       int HS) {
    memcpy(in, qkv, sizeof *in * (size_t)(N * (NH + 2 * NKV) * HS));
    for (int n = 0; n < N; n++)
        for (int h = 0; h < NH + NKV; h++) {
            int at = (n * (NH + 2 * NKV) + h) * HS;
            ref_norm_forward(qkv + at, stats + 2 * (n * (NH + NKV) + h), in + at,
                             h < NH ? q_w : k_w, NULL, GPT_NORM_RMSNORM, eps, 1, HS);
        }
}

static inline void ref_qk_norm_backward(double *dqkv, double *dq_w, double *dk_w, const double *in,
                                        const double *stats, const double *q_w, const double *k_w,
                                        int N, int NH, int NKV, int HS) {
    double *dout = host_zeros(HS);
    for (int n = 0; n < N; n++)
        for (int h = 0; h < NH + NKV; h++) {
            int at = (n * (NH + 2 * NKV) + h) * HS;
            for (int c = 0; c < HS; c++) dout[c] = dqkv[at + c], dqkv[at + c] = 0.0;
            ref_norm_backward(dqkv + at, h < NH ? dq_w : dk_w, NULL, dout, in + at,
                              stats + 2 * (n * (NH + NKV) + h), h < NH ? q_w : k_w,
                              GPT_NORM_RMSNORM, 1, HS);
        }
}

/* ---- activation ---- */

static inline double ref_sigmoid(double x) {
    return 1.0 / (1.0 + exp(-x));
}

static inline double ref_gelu(double x) {
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

static inline double ref_gelu_slope(double x) {
    double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
    double inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x);
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner;
}

static inline double ref_swish_slope(double x) {
    double s = ref_sigmoid(x);
    return s + x * s * (1.0 - s);
}

static inline double ref_normal_cdf(double x) {
    return 0.5 * erfc(-x / sqrt(2.0));
}

/* The width of what an activation with F outputs reads. */
static inline int ref_activation_width(int activation, int F) {
    return activation == GPT_ACT_SWIGLU || activation == GPT_ACT_GEGLU ? 2 * F : F;
}

/* out (N, F) of y (N, F), or (N, 2 F) for SwiGLU and GeGLU: gates, then ups. */
static inline void ref_activation_forward(double *out, const double *y, int activation, int N,
                                          int F) {
    int width = ref_activation_width(activation, F);
    for (int n = 0; n < N; n++) {
        for (int f = 0; f < F; f++) {
            double x = y[n * width + f];
            double *o = &out[n * F + f];
            if (activation == GPT_ACT_NONE) *o = x;
            if (activation == GPT_ACT_GELU) *o = ref_gelu(x);
            if (activation == GPT_ACT_SWISH) *o = x * ref_sigmoid(x);
            if (activation == GPT_ACT_SWIGLU) *o = x * ref_sigmoid(x) * y[n * width + F + f];
            if (activation == GPT_ACT_GELU_ERF) *o = x * ref_normal_cdf(x);
            if (activation == GPT_ACT_RELU) *o = x > 0.0 ? x : 0.0;
            if (activation == GPT_ACT_GEGLU) *o = ref_gelu(x) * y[n * width + F + f];
        }
    }
}

static inline void ref_activation_backward(double *dy, const double *dout, const double *y,
                                           int activation, int N, int F) {
    int width = ref_activation_width(activation, F);
    for (int n = 0; n < N; n++) {
        for (int f = 0; f < F; f++) {
            double x = y[n * width + f], g = dout[n * F + f];
            double *d = &dy[n * width + f];
            if (activation == GPT_ACT_NONE) *d += g;
            if (activation == GPT_ACT_GELU) *d += g * ref_gelu_slope(x);
            if (activation == GPT_ACT_SWISH) *d += g * ref_swish_slope(x);
            if (activation == GPT_ACT_GELU_ERF)
                *d += g * (ref_normal_cdf(x) + x * exp(-x * x / 2) / sqrt(2 * acos(-1.0)));
            if (activation == GPT_ACT_RELU) *d += x > 0.0 ? g : 0.0;
            if (activation == GPT_ACT_GEGLU) {
                *d += g * ref_gelu_slope(x) * y[n * width + F + f];
                dy[n * width + F + f] += g * ref_gelu(x);
            }
            if (activation == GPT_ACT_SWIGLU) {
                *d += g * ref_swish_slope(x) * y[n * width + F + f];
                dy[n * width + F + f] += g * x * ref_sigmoid(x);
            }
        }
    }
}

/* ---- linear ---- */

TEST_REFERENCE static inline void ref_linear_forward(double *y /* (N, OC) */,
                                                     const double *in /* (N, IC) */,
                                                     const double *w /* (OC, IC) */,
                                                     const double *b /* or NULL */, int N, int IC,
                                                     int OC) {
    for (int n = 0; n < N; n++) {
        for (int o = 0; o < OC; o++) {
            double sum = b ? b[o] : 0.0;
            for (int i = 0; i < IC; i++) sum += in[n * IC + i] * w[o * IC + i];
            y[n * OC + o] = sum;
        }
    }
}

TEST_REFERENCE static inline void ref_linear_backward(double *din, double *dw,
                                                      double *db /* or NULL */, const double *dout,
                                                      const double *in, const double *w, int N,
                                                      int IC, int OC) {
    for (int n = 0; n < N; n++) {
        for (int o = 0; o < OC; o++) {
            double g = dout[n * OC + o];
            for (int i = 0; i < IC; i++) {
                din[n * IC + i] += g * w[o * IC + i];
                dw[o * IC + i] += g * in[n * IC + i];
            }
            if (db) db[o] += g;
        }
    }
}

/* ---- rope ---- */

/* The experts of one token: probabilities, gates and choices. */
static inline void ref_route(double *probs /* (E) */, double *gates /* (K) */,
                             int32_t *choices /* (K) */, const double *x /* (C) */,
                             const double *w /* (E, C) */, int norm, int C, int E, int K) {
    double sum = 0, chosen = 0;
    ref_linear_forward(probs, x, w, NULL, 1, C, E);
    for (int e = 0; e < E; e++) sum += exp(probs[e]);
    for (int e = 0; e < E; e++) probs[e] = exp(probs[e]) / sum;
    for (int e = 0; e < E; e++) {
        int rank = 0;
        for (int j = 0; j < E; j++) rank += probs[j] > probs[e] || (probs[j] == probs[e] && j < e);
        if (rank < K) choices[rank] = e;
    }
    for (int k = 0; k < K; k++) chosen += probs[choices[k]];
    for (int k = 0; k < K; k++) gates[k] = probs[choices[k]] / (norm ? chosen : 1);
}

/* dprobs has the gradient of probabilities from elsewhere, and is spoilt. dx += and dw +=. */
static inline void ref_route_backward(double *dx, double *dw, double *dprobs /* (E) */,
                                      const double *dgates /* (K) */, const double *probs,
                                      const int32_t *choices, const double *x, const double *w,
                                      int norm, int C, int E, int K) {
    double chosen = 0, dot = 0, dlogits;
    for (int k = 0; k < K; k++) chosen += probs[choices[k]];
    for (int k = 0; k < K; k++) dot += dgates[k] * probs[choices[k]] / chosen;
    for (int k = 0; k < K; k++) dprobs[choices[k]] += norm ? (dgates[k] - dot) / chosen : dgates[k];
    dot = 0;
    for (int e = 0; e < E; e++) dot += dprobs[e] * probs[e];
    for (int e = 0; e < E; e++) {
        dlogits = probs[e] * (dprobs[e] - dot);
        for (int c = 0; c < C; c++) dx[c] += dlogits * w[e * C + c];
        for (int c = 0; c < C; c++) dw[e * C + c] += dlogits * x[c];
    }
}

/* The angle by which pair i of head h turns at position t, with head size HS of C channels. */
static inline double ref_rope_angle(int pos, double theta, int t, int h, int i, int HS, int C) {
    if (pos == GPT_POS_ROPE_WIDE) return t * pow(theta, -2.0 * (h * HS / 2 + i) / C);
    return t * pow(theta, -2.0 * i / HS);
}

/* The (cos, sin) table that the ops read: (T, HS/2, 2), or (T, C/2, 2) for the wide kind. */
static inline void ref_rope_table(double *table, int pos, double theta, int T, int HS, int C) {
    int pairs = pos == GPT_POS_ROPE_WIDE ? C / 2 : HS / 2;
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < pairs; i++) {
            int h = i / (HS / 2);
            double angle = ref_rope_angle(pos, theta, t, h, i % (HS / 2), HS, C);
            table[(t * pairs + i) * 2] = cos(angle);
            table[(t * pairs + i) * 2 + 1] = sin(angle);
        }
    }
}

/* YaRN (Peng et al. 2023) as its authors' program computes it: each pair's frequency is a mixture of itself
 * and of what interpolation makes of it, by a ramp over the pairs between those that turn `fast` and `slow` times within
 * the original length; then attention is scaled. */
static inline void ref_yarn_table(double *table, double theta, double factor, double slow,
                                  double fast, double original, double attention, int T, int HS) {
    double low = floor(HS * log(original / (fast * 2 * acos(-1.0))) / (2 * log(theta)));
    double high = ceil(HS * log(original / (slow * 2 * acos(-1.0))) / (2 * log(theta)));
    low = low > 0 ? low : 0, high = high < HS - 1 ? high : HS - 1;
    if (low == high) high += 0.001;
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < HS / 2; i++) {
            double ramp = (i - low) / (high - low), frequency = 1 / pow(theta, 2.0 * i / HS);
            ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
            frequency = frequency / factor * ramp + frequency * (1 - ramp);
            table[(t * (HS / 2) + i) * 2] = attention * cos(t * frequency);
            table[(t * (HS / 2) + i) * 2 + 1] = attention * sin(t * frequency);
        }
    }
}

/* The same with frequencies divided by their own numbers: Ding et al. 2024, equation 3. */
static inline void ref_divided_table(double *table, double theta, const float *divisors,
                                     double attention, int T, int HS) {
    for (int t = 0; t < T; t++)
        for (int i = 0; i < HS / 2; i++) {
            double angle = t / (divisors[i] * pow(theta, 2.0 * i / HS));
            table[(t * (HS / 2) + i) * 2] = attention * cos(angle);
            table[(t * (HS / 2) + i) * 2 + 1] = attention * sin(angle);
        }
}

/* In place; sign 1 rotates forward, -1 back. Within heads, only the first `turned` channels. */
static inline void ref_rope(double *qkv /* (N, QKV) */, const double *table,
                            const int32_t *positions /* or NULL */, int pos, int sign, int N, int T,
                            int NH, int NKV, int HS, int turned) {
    int wide = pos == GPT_POS_ROPE_WIDE, pairs = wide ? NH * HS / 2 : turned / 2;
    for (int n = 0; n < N; n++) {
        int t = positions ? positions[n] : n % T;
        for (int h = 0; h < NH + NKV; h++) { /* queries, then keys */
            double *x = qkv + (n * (NH + 2 * NKV) + h) * HS;
            int head = h < NH ? h : h - NH;
            for (int i = 0; i < (wide ? HS : turned) / 2; i++) {
                const double *turn = table + (t * pairs + (wide ? head * HS / 2 + i : i)) * 2;
                double *a = wide ? &x[2 * i] : &x[i],
                       *b = wide ? &x[2 * i + 1] : &x[i + turned / 2];
                double u = *a, v = *b, s = sign * turn[1];
                *a = u * turn[0] - v * s;
                *b = v * turn[0] + u * s;
            }
        }
    }
}

/* ---- attention ---- */

/* The start of query, key or value head h of row n in qkv (N, (NH + 2 NKV) HS). */
static inline int ref_query_at(int n, int h, int NH, int NKV, int HS) {
    return (n * (NH + 2 * NKV) + h) * HS;
}
static inline int ref_key_at(int n, int h, int NH, int NKV, int HS) {
    return (n * (NH + 2 * NKV) + NH + h / (NH / NKV)) * HS;
}
static inline int ref_value_at(int n, int h, int NH, int NKV, int HS) {
    return (n * (NH + 2 * NKV) + NH + NKV + h / (NH / NKV)) * HS;
}

/* The factor of probability (b, h, i, j). */
/* Soft caps of scores and logits, 0: none. */
static double ref_score_cap, ref_logit_cap;
/* The bias of logits and its gradient, NULL: none. */
static double *ref_head_bias, *ref_head_db;

TEST_REFERENCE static inline double ref_capped(double x, double cap) {
    return cap > 0 ? cap * tanh(x / cap) : x;
}
/* Its derivative, from what it gave. */
TEST_REFERENCE static inline double ref_cap_slope(double capped, double cap) {
    return cap > 0 ? 1 - capped / cap * (capped / cap) : 1;
}

/* The score of query i and key j. */
TEST_REFERENCE static inline double ref_score(const double *qkv, int b, int h, int i, int j, int T,
                                              int NH, int NKV, int HS) {
    double sum = 0;
    for (int s = 0; s < HS; s++)
        sum += qkv[ref_query_at(b * T + i, h, NH, NKV, HS) + s] *
               qkv[ref_key_at(b * T + j, h, NH, NKV, HS) + s] / sqrt(HS);
    return ref_capped(sum, ref_score_cap);
}

TEST_REFERENCE static inline double ref_attention_factor(gpt_dropout dropout, int b, int h, int i,
                                                         int j, int NH, int T) {
    return dropout_factor(dropout, (((uint64_t)b * NH + h) * T + i) * T + j);
}

/* One row of probabilities, before dropout; returns its log of the sum of exponentials. With a window,
 * keys further back are not seen, and with positions keys of another document. */
TEST_REFERENCE static inline double ref_attention_row(double *p /* (T) */, const double *qkv, int b,
                                                      int h, int i, int window,
                                                      const int32_t *positions, int T, int NH,
                                                      int NKV, int HS) {
    double max = -INFINITY, sum = 0.0;
    for (int j = 0; j <= i; j++) {
        p[j] = ref_score(qkv, b, h, i, j, T, NH, NKV, HS);
        if (window > 0 && i - j >= window) p[j] = -INFINITY;
        if (positions && i - j > positions[b * T + i]) p[j] = -INFINITY;
        max = fmax(max, p[j]);
    }
    for (int j = 0; j <= i; j++) sum += exp(p[j] - max);
    for (int j = 0; j <= i; j++) p[j] = exp(p[j] - max) / sum;
    return max + log(sum);
}

TEST_REFERENCE static inline void ref_attention_forward(double *out /* (B, T, NH HS) */,
                                                        double *lse /* (B, NH, T) */,
                                                        double *p /* (B, NH, T, T) */,
                                                        const double *qkv, gpt_dropout dropout,
                                                        int window, const int32_t *positions, int B,
                                                        int T, int NH, int NKV, int HS) {
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < NH; h++) {
            for (int i = 0; i < T; i++) {
                int row = (b * NH + h) * T + i;
                double *o = out + ((b * T + i) * NH + h) * HS;
                lse[row] = ref_attention_row(p + (int64_t)row * T, qkv, b, h, i, window, positions,
                                             T, NH, NKV, HS);
                for (int s = 0; s < HS; s++) o[s] = 0.0;
                for (int j = 0; j <= i; j++) {
                    double kept =
                        p[(int64_t)row * T + j] * ref_attention_factor(dropout, b, h, i, j, NH, T);
                    const double *v = qkv + ref_value_at(b * T + j, h, NH, NKV, HS);
                    for (int s = 0; s < HS; s++) o[s] += kept * v[s];
                }
            }
        }
    }
}

/* One row's share of dqkv. dp is the gradient of the probabilities before dropout. */
TEST_REFERENCE static inline void ref_attention_backward_row(
    double *dqkv, double *dp /* (T) */, const double *dout /* (HS) */, const double *p,
    const double *qkv, gpt_dropout dropout, int b, int h, int i, int T, int NH, int NKV, int HS) {
    double mean = 0.0;
    for (int j = 0; j <= i; j++) {
        int v = ref_value_at(b * T + j, h, NH, NKV, HS);
        double factor = ref_attention_factor(dropout, b, h, i, j, NH, T);
        dp[j] = 0.0;
        for (int s = 0; s < HS; s++) {
            dp[j] += factor * dout[s] * qkv[v + s];
            dqkv[v + s] += factor * p[j] * dout[s];
        }
        mean += p[j] * dp[j];
    }
    int q = ref_query_at(b * T + i, h, NH, NKV, HS);
    for (int j = 0; j <= i; j++) {
        int k = ref_key_at(b * T + j, h, NH, NKV, HS);
        double dscore = p[j] * (dp[j] - mean) / sqrt(HS);
        if (ref_score_cap > 0)
            dscore *= ref_cap_slope(ref_score(qkv, b, h, i, j, T, NH, NKV, HS), ref_score_cap);
        for (int s = 0; s < HS; s++) {
            dqkv[q + s] += dscore * qkv[k + s];
            dqkv[k + s] += dscore * qkv[q + s];
        }
    }
}

TEST_REFERENCE static inline void ref_attention_backward(double *dqkv, const double *dout,
                                                         const double *p, const double *qkv,
                                                         gpt_dropout dropout, int B, int T, int NH,
                                                         int NKV, int HS) {
    double *dp = malloc((size_t)T * sizeof *dp);
    if (!dp) abort();
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < NH; h++) {
            for (int i = 0; i < T; i++) {
                ref_attention_backward_row(dqkv, dp, dout + ((b * T + i) * NH + h) * HS,
                                           p + ((int64_t)(b * NH + h) * T + i) * T, qkv, dropout, b,
                                           h, i, T, NH, NKV, HS);
            }
        }
    }
    free(dp);
}

/* ---- classifier ---- */

/* losses =, and where dx is not NULL the gradient of scale * sum(losses): dx +=, dwte +=, ref_head_db +=. */
static inline void ref_classifier(double *losses /* (N) */, double *dx /* (N, C) or NULL */,
                                  double *dwte /* (Vp, C) or NULL */, const double *x,
                                  const double *wte, const int32_t *targets, double scale, int N,
                                  int C, int V) {
    double *p = malloc((size_t)V * sizeof *p);
    if (!p) abort();
    for (int n = 0; n < N; n++) {
        double max = -INFINITY, sum = 0.0;
        losses[n] = 0.0;
        if (targets[n] == -1) continue;
        ref_linear_forward(p, x + n * C, wte, ref_head_bias, 1, C, V);
        for (int v = 0; v < V; v++) p[v] = ref_capped(p[v], ref_logit_cap);
        for (int v = 0; v < V; v++) max = fmax(max, p[v]);
        for (int v = 0; v < V; v++) sum += exp(p[v] - max);
        losses[n] = max + log(sum) - p[targets[n]];
        if (!dx) continue;
        for (int v = 0; v < V; v++) {
            double slope = ref_cap_slope(p[v], ref_logit_cap);
            p[v] = slope * scale * (exp(p[v] - max) / sum - (v == targets[n]));
        }
        ref_linear_backward(dx + n * C, dwte, ref_head_db, p, x + n * C, wte, 1, C, V);
    }
    free(p);
}

/* ---- AdamW ---- */

static inline double ref_grad_norm(const double *grads, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += grads[i] * grads[i];
    return sqrt(sum);
}

/* Algorithm 2 of Loshchilov and Hutter 2019; the clip is that of PyTorch's clip_grad_norm_. */
static inline void ref_adamw(double *w, double *m, double *v, const double *grads, double norm,
                             gpt_adamw adamw, int64_t step, const gpt_segment *segments,
                             int n_segments) {
    double clip = 1.0;
    if (adamw.grad_clip > 0.0f) clip = fmin(1.0, adamw.grad_clip / (norm + 1e-6));
    double correct1 = 1.0 - pow(adamw.beta1, step), correct2 = 1.0 - pow(adamw.beta2, step);
    for (int s = 0; s < n_segments; s++) {
        double decay = segments[s].decay ? adamw.weight_decay : 0.0;
        for (int64_t i = segments[s].offset; i < segments[s].offset + segments[s].size; i++) {
            double g = clip * grads[i];
            m[i] = adamw.beta1 * m[i] + (1.0 - adamw.beta1) * g;
            v[i] = adamw.beta2 * v[i] + (1.0 - adamw.beta2) * g * g;
            double direction = m[i] / correct1 / (sqrt(v[i] / correct2) + adamw.eps);
            w[i] -= adamw.lr * (direction + decay * w[i]);
        }
    }
}

#endif
