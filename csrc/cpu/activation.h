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

static inline vf gelu_slope(vf x) {
    vf s = vf_sigmoid(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
    return s + x * s * (1.0f - s) * (GELU_SCALE * (1.0f + 3.0f * GELU_CUBIC * x * x));
}

static inline vf swish(vf x) {
    return x * vf_sigmoid(x);
}

static inline vf swish_slope(vf x) {
    vf s = vf_sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

/* activation(x); up is the second half of SwiGLU's input, else unused. */
static inline vf activation_forward(int activation, vf x, vf up) {
    if (activation == GPT_ACT_GELU) return gelu(x);
    if (activation == GPT_ACT_SWISH) return swish(x);
    if (activation == GPT_ACT_SWIGLU) return swish(x) * up;
    return x;
}

/* d times the activation's slope at x; for SwiGLU dup = d times the slope in up. */
static inline vf activation_backward(int activation, vf d, vf x, vf up, vf *dup) {
    if (activation == GPT_ACT_GELU) return d * gelu_slope(x);
    if (activation == GPT_ACT_SWISH) return d * swish_slope(x);
    if (activation != GPT_ACT_SWIGLU) return d;
    vf s = vf_sigmoid(x);
    *dup = d * x * s;
    return d * up * (s * (1.0f + x * (1.0f - s)));
}

#endif
