/* activation.h: the nonlinearities, a vector at a time. They are not ops: linear.c
 * applies them to a tile of its product while that is in cache. */
#ifndef CPU_ACTIVATION_H
#define CPU_ACTIVATION_H

#include "gpt.h"
#include "simd.h"

/* GELU's tanh form is x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks and
 * Gimpel 2016). */
#define GELU_SCALE 1.5957691216057308f /* 2 sqrt(2/pi) */
#define GELU_CUBIC 0.044715f

static inline vf gelu(vf x) {
    return x * vf_sigmoid(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
}

/* Slopes at x, with the function's value y. */
static inline vf gelu_slope(vf x, vf *y) {
    vf s = vf_sigmoid(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
    *y = x * s;
    return s + *y * (1.0f - s) * (GELU_SCALE * (1.0f + 3.0f * GELU_CUBIC * x * x));
}

/* The error function's complement is exp(-z^2) times a polynomial in 1 / (1 + 0.3275911 z), z >= 0, within 1.5e-7:
 * Abramowitz and Stegun 1964, 7.1.26. */
static inline vf half_erfc(vf z, vf exponential) {
    vf t = vf_reciprocal(1.0f + 0.3275911f * z);
    vf p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return 0.5f * (p * t) * exponential;
}

/* Phi(x) of the normal distribution, and its density. */
static inline vf normal_cdf(vf x, vf *density) {
    vf z = 0.7071067811865475f * vf_max(x, -x), exponential = vf_exp(-z * z);
    vf tail = half_erfc(z, exponential);
    *density = 0.3989422804014327f * exponential;
    return vf_select(x > 0.0f, 1.0f - tail, tail);
}

static inline vf gelu_erf(vf x) {
    vf density;
    return x * normal_cdf(x, &density);
}

static inline vf gelu_erf_slope(vf x, vf *y) {
    vf density, cdf = normal_cdf(x, &density);
    *y = x * cdf;
    return cdf + x * density;
}

static inline vf relu(vf x) {
    return vf_select(x < 0.0f, vf_set(0.0f), x); /* NaN stays NaN */
}

static inline vf swish(vf x) {
    return x * vf_sigmoid(x);
}

static inline vf swish_slope(vf x, vf *y) {
    vf s = vf_sigmoid(x);
    *y = x * s;
    return s + *y * (1.0f - s);
}

/* activation(x); up is the second half of a gated one's input, else unused. */
static inline vf activation_forward(int activation, vf x, vf up) {
    if (activation == GPT_ACT_GELU) return gelu(x);
    if (activation == GPT_ACT_SWISH) return swish(x);
    if (activation == GPT_ACT_SWIGLU) return swish(x) * up;
    if (activation == GPT_ACT_GELU_ERF) return gelu_erf(x);
    if (activation == GPT_ACT_RELU) return relu(x);
    if (activation == GPT_ACT_GEGLU) return gelu(x) * up;
    return x;
}

/* d times the activation's slope at x; made = the activation. Of a gated one dup = d times the slope in up. */
static inline vf activation_backward(int activation, vf d, vf x, vf up, vf *dup, vf *made) {
    vf slope;
    *made = x;
    if (activation == GPT_ACT_NONE) return d;
    if (activation == GPT_ACT_RELU) {
        *made = relu(x);
        return vf_select(x > 0.0f, d, vf_set(0.0f));
    }
    if (activation == GPT_ACT_GELU || activation == GPT_ACT_GEGLU)
        slope = gelu_slope(x, made);
    else if (activation == GPT_ACT_GELU_ERF)
        slope = gelu_erf_slope(x, made);
    else
        slope = swish_slope(x, made);
    if (!is_gated(activation)) return d * slope;
    *dup = d * *made;
    *made *= up;
    return d * up * slope;
}

#endif
