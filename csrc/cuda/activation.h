/* activation.h: the activations and their derivatives, in float32; the formulas of ops.h's cited
 * papers. */
#ifndef CUDA_ACTIVATION_H
#define CUDA_ACTIVATION_H

#include "cuda.h"

#define GELU_SCALE 0.7978845608028654f /* sqrt(2 / pi) */
#define GELU_CUBIC 0.044715f

static __device__ inline float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

/* activation(x); for SwiGLU, x is the gate. */
static __device__ inline float activation_forward(int activation, float x, float up) {
    switch (activation) {
    case GPT_ACT_GELU:
        return 0.5f * x * (1.0f + tanhf(GELU_SCALE * (x + GELU_CUBIC * x * x * x)));
    case GPT_ACT_SWISH:
        return x * sigmoid(x);
    case GPT_ACT_SWIGLU:
        return x * sigmoid(x) * up;
    default:
        return x;
    }
}

/* The gradient of x; for SwiGLU also of up, in *dup. */
static __device__ inline float activation_backward(int activation, float dout, float x, float up,
                                                   float *dup) {
    if (activation == GPT_ACT_GELU) {
        float t = tanhf(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
        float inner = GELU_SCALE * (1.0f + 3.0f * GELU_CUBIC * x * x);
        return dout * (0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner);
    }
    if (activation == GPT_ACT_NONE) return dout;
    float s = sigmoid(x), slope = s + x * s * (1.0f - s);
    if (activation == GPT_ACT_SWISH) return dout * slope;
    *dup = dout * x * s;
    return dout * slope * up;
}

#endif
