/* sample.c: draws the next token. The draw is a function of (seed, position), so a text can be had
 * again whatever else was generated beside it. */
#include "error.h"
#include "ops.h"

#include <math.h>
#include <stdlib.h>

typedef struct candidate {
    float logit;
    int32_t token;
} candidate;

/* Most likely first; ties in the order of tokens, so that the result is one. */
static int by_logit(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return x->token < y->token ? -1 : 1;
}

static int check_sampling(const float *logits, int32_t V, const gpt_sampling *s, int32_t *token) {
    if (!logits || !s || !token) return fail(GPT_ERR_ARGUMENT, "gpt_sample: NULL argument");
    if (V < 1) return fail(GPT_ERR_ARGUMENT, "vocab_size is %d; it must be at least 1", V);
    if (!(s->temperature >= 0 && isfinite(s->temperature)))
        return fail(GPT_ERR_ARGUMENT, "temperature is %g; it must be 0 (greedy) or above",
                    s->temperature);
    if (s->top_k < 0) return fail(GPT_ERR_ARGUMENT, "top_k is %d; it must be 0 or above", s->top_k);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return fail(GPT_ERR_ARGUMENT, "top_p is %g; it must be above 0 and at most 1", s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return fail(GPT_ERR_ARGUMENT, "min_p is %g; it must lie between 0 and 1", s->min_p);
    for (int32_t i = 0; i < V; i++)
        if (!isfinite(logits[i]))
            return fail(GPT_ERR_NUMERIC,
                        "the logit of token %d is %g: the model's weights are damaged or its "
                        "training diverged",
                        i, logits[i]);
    return GPT_OK;
}

static int32_t most_likely(const float *logits, int32_t V) {
    int32_t best = 0;
    for (int32_t i = 1; i < V; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

static double chance(const candidate *c, float top, float temperature) {
    return exp(((double)c->logit - top) / temperature);
}

/* How many of the n sorted candidates remain; *total is the sum of their chances. */
static int32_t filter(const candidate *c, int32_t n, const gpt_sampling *s, double *total) {
    float top = c[0].logit;
    if (s->top_k > 0 && s->top_k < n) n = s->top_k;
    double all = 0, kept = 0;
    for (int32_t i = 0; i < n; i++) all += chance(&c[i], top, s->temperature);
    int32_t i = 0;
    for (; i < n; i++) {
        double p = chance(&c[i], top, s->temperature);
        if (i > 0 && s->top_p < 1 && kept >= s->top_p * all) break;
        if (i > 0 && p < s->min_p) break; /* the most likely has chance 1 */
        kept += p;
    }
    *total = kept;
    return i;
}

int gpt_sample(const float *logits, int32_t vocab_size, const gpt_sampling *sampling,
               uint64_t position, int32_t *token) {
    TRY(check_sampling(logits, vocab_size, sampling, token));
    if (sampling->temperature == 0) {
        *token = most_likely(logits, vocab_size);
        return GPT_OK;
    }
    candidate *c = malloc(sizeof *c * (size_t)vocab_size);
    if (!c) return fail(GPT_ERR_MEMORY, "no memory to sort %d logits", vocab_size);
    for (int32_t i = 0; i < vocab_size; i++) c[i] = (candidate){logits[i], i};
    qsort(c, (size_t)vocab_size, sizeof *c, by_logit);

    double total;
    int32_t n = filter(c, vocab_size, sampling, &total);
    uint64_t key =
        (uint64_t)dropout_bits(sampling->seed, 1) << 32 | dropout_bits(sampling->seed, 2);
    double u = ((double)dropout_bits(key, position) + 0.5) * 0x1p-32 * total;
    int32_t i = 0;
    for (; i < n - 1; i++) {
        u -= chance(&c[i], c[0].logit, sampling->temperature);
        if (u < 0) break;
    }
    *token = c[i].token;
    free(c);
    return GPT_OK;
}
