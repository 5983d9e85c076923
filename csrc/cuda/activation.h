/* activation.h: the activations and their derivatives, in float32; the formulas of ops.h's cited
 * papers. */
#ifndef CUDA_ACTIVATION_H
#define CUDA_ACTIVATION_H

#include "cuda.h"

#define GELU_SCALE     0.7978845608028654f /* sqrt(2 / pi) */
#define GELU_CUBIC     0.044715f
#define SQRT_HALF      0.7071067811865475f
#define NORMAL_DENSITY 0.3989422804014327f /* of 0 */

static __device__ inline float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

static __device__ inline float gelu(float x) {
    return 0.5f * x * (1.0f + tanhf(GELU_SCALE * (x + GELU_CUBIC * x * x * x)));
}

static __device__ inline float gelu_slope(float x) {
    float t = tanhf(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
    float inner = GELU_SCALE * (1.0f + 3.0f * GELU_CUBIC * x * x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
}

/* activation(x); of a gated one, x is the gate. */
static __device__ inline float activation_forward(int activation, float x, float up) {
    switch (activation) {
    case GPT_ACT_GELU:
        return gelu(x);
    case GPT_ACT_SWISH:
        return x * sigmoid(x);
    case GPT_ACT_SWIGLU:
        return x * sigmoid(x) * up;
    case GPT_ACT_GELU_ERF:
        return 0.5f * x * erfcf(-SQRT_HALF * x);
    case GPT_ACT_RELU:
        return x < 0 ? 0 : x; /* NaN stays NaN */
    case GPT_ACT_GEGLU:
        return gelu(x) * up;
    default:
        return x;
    }
}

/* The gradient of x; of a gated one also of up, in *dup. */
static __device__ inline float activation_backward(int activation, float dout, float x, float up,
                                                   float *dup) {
    if (activation == GPT_ACT_NONE) return dout;
    if (activation == GPT_ACT_GELU) return dout * gelu_slope(x);
    if (activation == GPT_ACT_RELU) return x > 0 ? dout : 0;
    if (activation == GPT_ACT_GELU_ERF)
        return dout * (0.5f * erfcf(-SQRT_HALF * x) + x * NORMAL_DENSITY * expf(-0.5f * x * x));
    if (activation == GPT_ACT_GEGLU) {
        *dup = dout * gelu(x);
        return dout * gelu_slope(x) * up;
    }
    float s = sigmoid(x), slope = s + x * s * (1.0f - s);
    if (activation == GPT_ACT_SWISH) return dout * slope;
    *dup = dout * x * s;
    return dout * slope * up;
}

/* ---- activation.cu: of all numbers of a layer ---- */

typedef struct activation_args {
    elem *out;     /* (N, F) */
    elem *pre;     /* (N, F or 2 F): y with its bias; NULL where it is not kept */
    const elem *y; /* the same shape */
    const elem *b; /* NULL where y has it already */
    int activation, N, F;
} activation_args;

typedef struct activation_backward_args {
    elem *din;        /* (N, F or 2 F) */
    const elem *dout; /* (N, F); may be din */
    const elem *pre;  /* (N, F or 2 F) */
    int activation, N, F;
} activation_backward_args;

#define cuda_activation_forward  CUDA_ACTS_NAME(activation_forward)
#define cuda_activation_backward CUDA_ACTS_NAME(activation_backward)
void cuda_activation_forward(gpt_ctx *ctx, const activation_args &a);
void cuda_activation_backward(gpt_ctx *ctx, const activation_backward_args &a);

#endif
