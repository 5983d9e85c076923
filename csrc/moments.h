/* moments.h: numbers of 8 bits for AdamW's moments, for a CPU.
 *
 * Blockwise dynamic quantization: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization". A block of
 * MOMENT_BLOCK numbers has a scale, its largest magnitude. A number is its share x of that, 0 <= x <= 1: with B bits
 * a code j has its decade in its leading one, 2^e, and a place in that decade in the bits behind it,
 *     x = (9 (j + 1) - 8 2^e) / (2^e 10^(B - e))
 * so that 2^e codes are between 10^(e - B) and ten times that. A first moment has a sign and 7 bits, and its code 0
 * is 0. A second one has 8 bits, and its code 0 is 10^-8: a 0 would make the step of a number with a small gradient
 * as large as its denominator is small (Li et al. 2023, "Memory Efficient Optimizers with 4-bit States").
 *
 * An update rounds a number up with the probability of the part that it would lose, so that small changes count:
 * with beta2 near 1 a second moment would else stay where it is. The random bits are a function of the step and of
 * the place in the parameters. */
#ifndef GPT_MOMENTS_H
#define GPT_MOMENTS_H

#include "ops.h"

enum { M_BITS = 7, V_BITS = 8, MOST_BITS = 8, MOMENT_SIGN = 128 };

/* A smaller largest magnitude is taken as 0, so that its reciprocal is finite. */
#define MOMENT_LEAST 1e-37f

/* Each by e, and so that entries past the decades of fewer bits are not reached. */
typedef struct moment_code {
    float above[MOST_BITS]; /* x is in decade e, or in a higher one, where it is above this */
    float unit[MOST_BITS];  /* x = (9 (j + 1) - 8 2^e) unit */
    float slope[MOST_BITS]; /* j = slope x + shift, before rounding */
    float shift[MOST_BITS];
    float lowest; /* code 0 */
    float top;    /* the largest code: 1 */
} moment_code;

static inline moment_code moment_code_of(int bits) {
    moment_code c = {.lowest = bits == V_BITS ? 1e-8f : 0.0f, .top = (float)((1 << bits) - 1)};
    double power = 10; /* 10^(bits - e) */
    for (int e = MOST_BITS - 1; e >= 0; e--) {
        double n = 1 << e;
        c.above[e] = INFINITY;
        if (e >= bits) continue;
        c.above[e] = (float)(1 / power);
        c.unit[e] = (float)(1 / (n * power));
        c.slope[e] = (float)(n * power / 9);
        c.shift[e] = (float)(n * 8 / 9 - 1);
        power *= 10;
    }
    return c;
}

/* x of a code. */
static inline float moment_share(const moment_code *c, int j) {
    int e = 0;
    while (j >> (e + 1)) e++;
    return j == 0 ? c->lowest : (float)(9 * (j + 1) - (8 << e)) * c->unit[e];
}

/* The code of x, rounded up where what it would lose is above 1 - u. For 0.0004 < u < 0.9996 a number that has a code
 * gets it. */
static inline int moment_code_at(const moment_code *c, float x, float u) {
    int e = 0;
    for (int k = 1; k < MOST_BITS; k++) e += x > c->above[k];
    float j = x * c->slope[e] + c->shift[e] + u;
    return (int)(j < c->top ? j : c->top);
}

/* The u of 16 random bits as a float. */
#define MOMENT_U(x) ((x) * (0.999f / 65536) + 0.0005f)

/* The key of a step for the random bits of its numbers. */
static inline uint32_t moment_key(int64_t step) {
    return counter_bits(0, (uint64_t)step);
}

/* Random bits of a number: the lower half for the first moment, the upper one for the second. Wellons 2018, "Prospecting
 * for Hash Functions": lowbias32. */
#define MOMENT_MIX_1 0x7feb352du
#define MOMENT_MIX_2 0x846ca68bu
static inline uint32_t moment_bits(uint32_t key, uint32_t place) {
    uint32_t x = key ^ place;
    x = (x ^ (x >> 16)) * MOMENT_MIX_1;
    x = (x ^ (x >> 15)) * MOMENT_MIX_2;
    return x ^ (x >> 16);
}

/* A bfloat16, rounded up by 16 random bits in the same way. x is finite. */
static inline uint16_t moment_bf16(uint32_t float_bits, uint32_t random) {
    return (uint16_t)((float_bits + (random & 0xffff)) >> 16);
}

#endif
