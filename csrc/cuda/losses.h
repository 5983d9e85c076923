/* losses.h: the losses of a chunk of logits, and the gradient that takes their place. */
#ifndef CUDA_LOSSES_H
#define CUDA_LOSSES_H

#include "cuda.h"

typedef struct classifier_args {
    float *losses; /* (n) = */
    elem *logits;  /* (n, Vp); with gradient they become that (ops.h has the formula), and 0 in
                               the padding */
    const int32_t *targets; /* (n) */
    const float *weights;   /* (n) or NULL */
    float scale, label_smoothing, z_loss;
    float cap;      /* 0: none */
    const float *b; /* (Vp) or NULL */
    int gradient, n, V, Vp;
} classifier_args;

#define cuda_losses       CUDA_ACTS_NAME(losses)
#define cuda_total_losses CUDA_ACTS_NAME(total_losses)
void cuda_losses(gpt_ctx *ctx, const classifier_args &a);
/* total = or += scale times the sum of N losses with their weights, or NULL. */
void cuda_total_losses(gpt_ctx *ctx, float *total, const float *losses, const float *weights,
                       float scale, int add, int N);

#endif
