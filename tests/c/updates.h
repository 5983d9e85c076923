/* updates.h: what the tests of optimizers share. */
#ifndef TESTS_UPDATES_H
#define TESTS_UPDATES_H

#include "testing.h"

/* The shape of a model of n parameters, without activations. */
static inline gpt_shape shape_of(int64_t n) {
    return (gpt_shape){.N = 1,
                       .T = 1,
                       .C = 1,
                       .V = 2,
                       .Vp = 2,
                       .NH = 1,
                       .NKV = 1,
                       .HS = 1,
                       .F = 1,
                       .activation = GPT_ACT_GELU,
                       .training = 1,
                       .n_params = n};
}

#endif
