/* soft_cap.h: cap tanh(x / cap) of scores x, for kernels that keep products of queries and keys before their scale. */
#ifndef CUDA_SOFT_CAP_H
#define CUDA_SOFT_CAP_H

#include "instructions.h"

/* Of products, in factors that take no division; zeros where there is none. It stays among a kernel's
 * parameters, since a copy takes registers. */
typedef struct soft_cap {
    float twice, rate; /* 2 cap / scale, and 2 LOG2E scale / cap */
    float inverse;     /* 1 / (cap LOG2E) */
} soft_cap;

static inline soft_cap cap_of(float cap, float scale) {
    if (cap == 0) return {0, 0, 0};
    return {2 * cap / scale, 2 * LOG2E * scale / cap, 1 / (cap * LOG2E)};
}
/* A product whose score has the cap: tanh(y) is 1 - 2 / (1 + exp(2 y)), also where that overflows. Scores are within
 * about 3e-7 of the cap's size, which is enough for bf16. */
static __device__ inline float capped(const soft_cap &c, float product) {
    return c.twice * (0.5f - inverse_of(1 + exp2_of(c.rate * product)));
}
/* The same of a score in powers of 2, for a kernel that has no room for more parameters. */
static __device__ inline float capped_score(float cap, float score) {
    return 2 * LOG2E * cap * (0.5f - inverse_of(1 + exp2_of(2 * inverse_of(cap) * score)));
}
/* The derivative 1 - tanh(y)^2, found from a probability and its row's lse, in powers of 2: there are no registers
 * to keep scores in. Where the probability is 0 it does not matter, and is 0 rather than no number. */
static __device__ inline float cap_slope(const soft_cap &c, float probability, float lse) {
    float tanh = (log2_of(probability) + lse) * c.inverse;
    return fmaxf(1 - tanh * tanh, 0);
}

#endif
