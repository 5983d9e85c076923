/* activation.h: the nonlinearities, one row at a time. They are not ops of their own: linear.c
 * applies them to a tile of its product while the tile is in cache. */
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

/* out = activation(pre) over one row; up is the second half of SwiGLU's input, else unused. */
static inline void activation_forward(float *out, const float *pre, const float *up, int activation,
                                      int size) {
    FOR_LANES (i, n, size) {
        vf x = vf_get(pre + i, n);
        if (activation == GPT_ACT_GELU)
            x = gelu(x);
        else if (activation == GPT_ACT_SWISH)
            x = swish(x);
        else if (activation == GPT_ACT_SWIGLU)
            x = swish(x) * vf_get(up + i, n);
        vf_put(out + i, x, n);
    }
}

/* dpre (and dup) = dout through the activation; dpre may be dout. */
static inline void activation_backward(float *dpre, float *dup, const float *dout, const float *pre,
                                       const float *up, int activation, int size) {
    FOR_LANES (i, n, size) {
        vf x = vf_get(pre + i, n);
        vf d = vf_get(dout + i, n);
        if (activation == GPT_ACT_GELU)
            d *= gelu_slope(x);
        else if (activation == GPT_ACT_SWISH)
            d *= swish_slope(x);
        else if (activation == GPT_ACT_SWIGLU) {
            vf_put(dup + i, d * swish(x), n);
            d *= vf_get(up + i, n) * swish_slope(x);
        }
        vf_put(dpre + i, d, n);
    }
}

#endif
