/* epilogue.h: what our own products of a few rows do with each of their numbers. */
#ifndef CUDA_EPILOGUE_H
#define CUDA_EPILOGUE_H

#include "activation.h"
#include "product.h"

/* Asked for before the sums are made, so that nobody waits for it after them. */
static __device__ inline float bias_of(const product &p, int n) {
    return p.bias && n < p.N ? to_float(((const elem *)p.bias)[n]) : 0;
}

/* y, with its bias, becomes number (m, n) of the output, which holds T. */
template <typename T>
static __device__ inline void finish(const product &p, int m, int n, float y) {
    if (p.pre) ((elem *)p.pre)[(int64_t)m * p.N + n] = from_float<elem>(y);
    if (p.epilogue == EPILOGUE_GELU) y = activation_forward(GPT_ACT_GELU, y, 0);
    ((T *)p.out)[(int64_t)m * p.ldo + n] = from_float<T>(y);
}

#endif
