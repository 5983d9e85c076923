/* sample.h: the sampler's arithmetic, the same on every backend.
 *
 * How likely a token is, is an integer, so that sums do not depend on the order of addition and every
 * device draws the same token from the same logits. */
#ifndef GPT_SAMPLE_H
#define GPT_SAMPLE_H

#include "ops.h"

/* ---- chances ---- */

/* The chance of the most likely token; and 2^26 to the distance in logits that halves one. */
#define CHANCE_ONE ((uint32_t)1 << 31)
enum { HALVING_BITS = 26, MOST_HALVINGS = 31 };

/* How many times a chance is halved, in units of 2^-26; UINT32_MAX where nothing is left of it. */
GPT_EVERYWHERE static inline uint32_t halvings(float z, float best, float steepness) {
    float n = (best - z) * steepness;
    return n <= (float)MOST_HALVINGS ? (uint32_t)(n * (float)(1 << HALVING_BITS)) : UINT32_MAX;
}

/* 2^31 2^-n, rounded, for n halvings: a polynomial of degree 5, within 7e-8 of the largest. */
GPT_EVERYWHERE static inline uint32_t chance_after(uint32_t n) {
    if (n == UINT32_MAX) return 0;
    uint32_t whole = n >> HALVING_BITS, f = n << (32 - HALVING_BITS), x = 0x003e27ee;
    x = 0x025bfad2 - (uint32_t)((uint64_t)f * x >> 32);
    x = 0x0e28a02d - (uint32_t)((uint64_t)f * x >> 32);
    x = 0x3d7cb2f8 - (uint32_t)((uint64_t)f * x >> 32);
    x = 0xb171e5b0 - (uint32_t)((uint64_t)f * x >> 32);
    x = CHANCE_ONE - (uint32_t)((uint64_t)f * x >> 33);
    return (x + (((uint32_t)1 << whole) >> 1)) >> whole;
}

/* Chances p (V) of logits z (V). The same as of halvings, in a form that a compiler makes vectors of. */
static inline void sample_chances(uint32_t *p, const float *z, int32_t V, float best,
                                  float steepness) {
    for (int32_t i = 0; i < V; i++) {
        float n = (best - z[i]) * steepness, within = n < (float)MOST_HALVINGS ? n : MOST_HALVINGS;
        uint32_t chance = chance_after((uint32_t)(int32_t)(within * (float)(1 << HALVING_BITS)));
        p[i] = n <= (float)MOST_HALVINGS ? chance : 0;
    }
}
typedef void sample_weigh(uint32_t *p, const float *z, int32_t V, float best, float steepness);

/* ---- keys: tokens are kept in falling order of a key, those of one key in rising order ---- */

/* What typical_p orders tokens by: how near n is to the mean of halvings, in units of 2^-14, so that
 * the sum of chances times halvings fits 64 bits for a million tokens. */
enum { TYPICAL_BITS = 14, TYPICAL_SHIFT = HALVING_BITS - TYPICAL_BITS };
GPT_EVERYWHERE static inline uint32_t typical_key(uint32_t n, uint32_t mean) {
    uint32_t one = (uint32_t)(MOST_HALVINGS + 1) << TYPICAL_BITS;
    n >>= TYPICAL_SHIFT;
    return one - (n > mean ? n - mean : mean - n);
}

/* A key's step: 64 for each doubling, so that steps rise as keys do. */
enum { KEY_STEPS = 1728 };
GPT_EVERYWHERE static inline int key_step(uint32_t key) {
#ifdef __CUDA_ARCH__
    int zeros = __clz((int)key);
#else
    int zeros = key ? __builtin_clz(key) : 32;
#endif
    int bits = zeros < 25 ? 25 - zeros : 0;
    return (int)(key >> bits) + 64 * bits;
}

/* The least key of a step. */
GPT_EVERYWHERE static inline uint64_t first_key_of(int step) {
    return step < 128 ? (uint64_t)step : (uint64_t)(64 + step % 64) << (step / 64 - 1);
}

/* The least sum that is at least a share of all. */
GPT_EVERYWHERE static inline uint64_t share_of(uint64_t sum, float share) {
    double exact = (double)share * (double)sum;
    uint64_t below = (uint64_t)exact;
    return below + ((double)below < exact);
}

/* The place of a 32-bit random number in a sum below 2^63: sum number / 2^32. */
GPT_EVERYWHERE static inline uint64_t place_in(uint64_t sum, uint32_t number) {
    return (sum >> 32) * number + ((sum & 0xffffffffu) * number >> 32);
}

/* ---- sample.c: what the host does for an op, and the whole of it on a CPU ---- */

/* GPT_ERR_ARGUMENT, and why, where a setting is outside its range. */
int sample_check(const gpt_sampling *s, int32_t vocab_size, const int32_t *history,
                 int32_t n_history);
/* How many adjustments sample_prepare may make. */
int32_t sample_most_adjustments(const gpt_sampling *s, int32_t n_history, int32_t vocab_size);
/* A row's settings, and its adjustments behind those of other rows (list[0 .. *n)). marks
 * (vocab_size) are 0, and are so again afterwards. */
void sample_prepare(sample_row *out, sample_adjustment *list, int32_t *n, int32_t *marks,
                    const gpt_sampling *s, int32_t vocab_size, const int32_t *history,
                    int32_t n_history, uint64_t position);
/* GPT_OK, or an error for what a result's token says instead of a token. */
int sample_status(const sample_result *result);

size_t sample_scratch_bytes(int V);
/* Row n of the op; `weigh` is sample_chances as the caller's instruction set has it. */
void sample_one(const sample *op, int n, void *scratch, sample_weigh *weigh);

#endif
