/* sample.c: draws the next token. The draw is a function of (seed, position), so that a text can be
 * repeated whatever else was generated at the same time.
 *
 * Keys are not sorted as a whole: a filter counts them in coarse steps, finds the step in which it
 * ends, and sorts that step alone. */
#include "error.h"
#include "ops.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* ---- arguments ---- */

static int check_history(const gpt_sampling *s, const int32_t *history, int32_t n_history) {
    if (n_history < 0 || (n_history > 0 && !history))
        return fail(GPT_ERR_ARGUMENT, "gpt_sample: a history of %d tokens", n_history);
    if (!(s->repetition_penalty > 0 && isfinite(s->repetition_penalty)))
        return fail(GPT_ERR_ARGUMENT, "repetition_penalty is %g; it must be above 0 (1: none)",
                    s->repetition_penalty);
    if (!isfinite(s->presence_penalty) || !isfinite(s->frequency_penalty))
        return fail(GPT_ERR_ARGUMENT, "a presence or frequency penalty is not finite");
    return GPT_OK;
}

static int check_bias(const gpt_sampling *s, int32_t V) {
    if (s->n_bias < 0 || (s->n_bias > 0 && !s->bias))
        return fail(GPT_ERR_ARGUMENT, "gpt_sample: %d biases at NULL", s->n_bias);
    for (int32_t i = 0; i < s->n_bias; i++) {
        if (s->bias[i].token < 0 || s->bias[i].token >= V)
            return fail(GPT_ERR_ARGUMENT, "a bias is for token %d; the vocabulary has %d",
                        s->bias[i].token, V);
        if (!(s->bias[i].value < INFINITY))
            return fail(GPT_ERR_ARGUMENT,
                        "the bias of token %d is %g; it must be finite, or -inf to ban the token",
                        s->bias[i].token, s->bias[i].value);
    }
    return GPT_OK;
}

static int check_sampling(const gpt_sampling *s, int32_t V) {
    if (!(s->temperature >= 0 && isfinite(s->temperature)))
        return fail(GPT_ERR_ARGUMENT, "temperature is %g; it must be 0 (greedy) or above",
                    s->temperature);
    if (s->top_k < 0) return fail(GPT_ERR_ARGUMENT, "top_k is %d; it must be 0 or above", s->top_k);
    if (!(s->typical_p > 0 && s->typical_p <= 1))
        return fail(GPT_ERR_ARGUMENT, "typical_p is %g; it must be above 0 and at most 1",
                    s->typical_p);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return fail(GPT_ERR_ARGUMENT, "top_p is %g; it must be above 0 and at most 1", s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return fail(GPT_ERR_ARGUMENT, "min_p is %g; it must be between 0 and 1", s->min_p);
    return check_bias(s, V);
}

static int check_logits(const float *logits, int32_t V) {
    if (V < 1) return fail(GPT_ERR_ARGUMENT, "vocab_size is %d; it must be at least 1", V);
    int finite = 1;
    for (int32_t i = 0; i < V; i++) finite &= isfinite(logits[i]) != 0;
    for (int32_t i = 0; i < V && !finite; i++)
        if (!isfinite(logits[i]))
            return fail(GPT_ERR_NUMERIC,
                        "the logit of token %d is %g: the model's weights are damaged or its "
                        "training diverged",
                        i, logits[i]);
    return GPT_OK;
}

/* ---- logits ---- */

/* Copies the logits, with biases and penalties. seen (V / 8 bytes) is zero. */
static void adjust(float *z, uint8_t *seen, const float *logits, int32_t V, const gpt_sampling *s,
                   const int32_t *history, int32_t n_history) {
    memcpy(z, logits, sizeof *z * (size_t)V);
    for (int32_t i = 0; i < s->n_bias; i++) z[s->bias[i].token] += s->bias[i].value;
    for (int32_t i = 0; i < n_history; i++) {
        int32_t token = history[i];
        if (token < 0 || token >= V) continue;
        if (!(seen[token / 8] >> token % 8 & 1)) {
            z[token] =
                z[token] > 0 ? z[token] / s->repetition_penalty : z[token] * s->repetition_penalty;
            z[token] -= s->presence_penalty;
            seen[token / 8] |= (uint8_t)(1 << token % 8);
        }
        z[token] -= s->frequency_penalty;
    }
}

/* Sums of what is allowed may still be too large for a number, or +inf and -inf at once. */
static int check_adjusted(const float *z, int32_t V) {
    int some = 0, sound = 1;
    for (int32_t i = 0; i < V; i++) {
        some |= z[i] > -INFINITY;
        sound &= z[i] < INFINITY; /* nor NaN */
    }
    if (!sound) return fail(GPT_ERR_ARGUMENT, "biases and penalties make a logit too large");
    if (!some) return fail(GPT_ERR_ARGUMENT, "biases and penalties leave no token to draw");
    return GPT_OK;
}

/* Several maxima side by side, since one would wait for itself. */
static int32_t most_likely(const float *z, int32_t V) {
    enum { LANES = 8 };
    float top[LANES];
    int32_t i = 0, best = 0;
    for (int k = 0; k < LANES; k++) top[k] = z[0];
    for (; i + LANES <= V; i += LANES)
        for (int k = 0; k < LANES; k++) top[k] = z[i + k] > top[k] ? z[i + k] : top[k];
    for (; i < V; i++) top[0] = z[i] > top[0] ? z[i] : top[0];
    for (int k = 1; k < LANES; k++) top[0] = top[k] > top[0] ? top[k] : top[0];
    while (z[best] != top[0]) best++;
    return best;
}

/* ---- candidates: tokens that are still in, the most likely at least ---- */

static bool before(const float *key, int32_t a, int32_t b) {
    return key[a] != key[b] ? key[a] > key[b] : a < b;
}

/* A heap has the first of its candidates on top. */
static void sift(int32_t *c, int32_t n, int32_t i, const float *key) {
    int32_t token = c[i];
    for (int32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(key, c[child + 1], c[child])) child++;
        if (!before(key, c[child], token)) break;
        c[i] = c[child];
    }
    c[i] = token;
}

static double sum_of(const int32_t *c, int32_t n, const float *p) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += p[c[i]];
    return sum;
}

/* Brings the first of n candidates to the front, in order: `most` of them, or as few as have the mass
 * of the chances p (NULL: not asked). Returns how many. */
static int32_t sort_first(int32_t *c, int32_t n, const float *key, int32_t most, const float *p,
                          double mass) {
    int32_t left = n, kept;
    double sum = 0;
    for (int32_t i = n / 2 - 1; i >= 0; i--) sift(c, n, i, key);
    while (left > 0 && n - left < most && (left == n || sum < mass)) {
        int32_t first = c[0];
        if (p) sum += p[first];
        c[0] = c[--left];
        sift(c, left, 0, key);
        c[left] = first; /* from the end on, in falling order */
    }
    kept = n - left;
    for (int32_t i = 0, j = n - 1; i < j; i++, j--) {
        int32_t swap = c[i];
        c[i] = c[j];
        c[j] = swap;
    }
    return kept;
}

/* Steps of a key: its sign, exponent and first bits, so that they rise as keys do. */
enum { STEPS = 1 << 12 };

static int step_of(float key) {
    uint32_t bits;
    key += 0.0f; /* -0 is 0 */
    memcpy(&bits, &key, sizeof bits);
    return (int)((bits >> 31 ? ~bits : bits | 0x80000000u) >> 20);
}

/* The same as sort_first, in no order: all of the steps above the one in which it ends, and the first
 * of that one. */
static int32_t keep_first(int32_t *c, int32_t n, const float *key, int32_t most, const float *p,
                          double mass) {
    int32_t counts[STEPS] = {0}, kept = 0, last = 0;
    double sums[STEPS] = {0}, sum = 0;
    for (int32_t i = 0; i < n; i++) {
        int step = step_of(key[c[i]]);
        counts[step]++;
        if (p) sums[step] += p[c[i]];
    }
    int step = STEPS - 1;
    for (; step > 0 && kept + counts[step] < most && sum + sums[step] < mass; step--)
        kept += counts[step], sum += sums[step];
    int32_t front = 0;
    for (int32_t i = 0; i < n; i++) { /* the step's own go behind those above it */
        int own = step_of(key[c[i]]);
        if (own < step) continue;
        int32_t token = c[i];
        if (own > step) {
            c[front + last] = c[front];
            c[front++] = token;
        } else {
            c[front + last++] = token;
        }
    }
    if (front > 0 && (front == most || sum >= mass)) return front;
    return front + sort_first(c + front, last, key, most - front, p, mass - sum);
}

/* Minus the distance of each candidate's surprise, -log p, from what is expected of it. */
static void typicality(float *key, const int32_t *c, int32_t n, const float *p) {
    double total = sum_of(c, n, p), entropy = 0;
    for (int32_t i = 0; i < n; i++) {
        double q = p[c[i]] / total;
        if (q > 0) entropy -= q * log(q);
    }
    for (int32_t i = 0; i < n; i++) {
        double q = p[c[i]] / total;
        key[c[i]] = q > 0 ? (float)-fabs(-log(q) - entropy) : -INFINITY;
    }
}

static int32_t at_least(int32_t *c, int32_t n, const float *p, float least) {
    float top = 0;
    int32_t kept = 0;
    for (int32_t i = 0; i < n; i++) top = p[c[i]] > top ? p[c[i]] : top;
    for (int32_t i = 0; i < n; i++)
        if (p[c[i]] >= least * top) c[kept++] = c[i];
    return kept;
}

/* Lists the tokens that remain of V in c, by their chances p relative to the most likely, and
 * returns their number. */
static int32_t filter(int32_t *c, float *key, const float *z, const float *p, int32_t V,
                      const gpt_sampling *s) {
    int32_t n = V;
    for (int32_t i = 0; i < V; i++) c[i] = i;
    if (s->top_k > 0 && s->top_k < n) n = keep_first(c, n, z, s->top_k, NULL, INFINITY);
    if (s->typical_p < 1) {
        typicality(key, c, n, p);
        n = keep_first(c, n, key, n, p, s->typical_p * sum_of(c, n, p));
    }
    if (s->top_p < 1) {
        double mass = s->top_p * sum_of(c, n, p);
        /* Together, tokens below this have less than what top_p leaves out: none of them is in. */
        if (n == V) n = at_least(c, n, p, (float)((1 - s->top_p) * mass / V));
        n = keep_first(c, n, z, n, p, mass);
    }
    if (s->min_p > 0) n = at_least(c, n, p, s->min_p);
    return n;
}

/* ---- the draw ---- */

static int32_t draw(const int32_t *c, int32_t n, const float *p, uint64_t seed, uint64_t position) {
    uint64_t key = (uint64_t)counter_bits(seed, 1) << 32 | counter_bits(seed, 2);
    double u = ((double)counter_bits(key, position) + 0.5) * 0x1p-32 * sum_of(c, n, p);
    int32_t last = c[0];
    for (int32_t i = 0; i < n && u >= 0; i++) {
        if (p[c[i]] > 0) last = c[i];
        u -= p[c[i]];
    }
    return last;
}

int gpt_sample(const float *logits, int32_t vocab_size, const gpt_sampling *sampling,
               const int32_t *history, int32_t n_history, uint64_t position, int32_t *token) {
    if (!logits || !sampling || !token) return fail(GPT_ERR_ARGUMENT, "gpt_sample: NULL argument");
    TRY(check_logits(logits, vocab_size));
    TRY(check_sampling(sampling, vocab_size));
    TRY(check_history(sampling, history, n_history));
    size_t V = (size_t)vocab_size;
    float *z = calloc(1, 3 * sizeof *z * V + sizeof(int32_t) * V + V / 8 + 1);
    if (!z) return fail(GPT_ERR_MEMORY, "no memory to weigh %d logits", vocab_size);
    float *p = z + V, *key = p + V;
    int32_t *c = (int32_t *)(key + V);
    adjust(z, (uint8_t *)(c + V), logits, vocab_size, sampling, history, n_history);
    int status = check_adjusted(z, vocab_size);
    int32_t best = status == GPT_OK ? most_likely(z, vocab_size) : 0;
    if (status == GPT_OK && sampling->temperature == 0) *token = best;
    if (status == GPT_OK && sampling->temperature > 0) {
        for (size_t i = 0; i < V; i++) p[i] = expf((z[i] - z[best]) / sampling->temperature);
        int32_t n = filter(c, key, z, p, vocab_size, sampling);
        *token = draw(c, n, p, sampling->seed, position);
    }
    free(z);
    return status;
}

/* ---- log-probabilities ---- */

int gpt_logprobs(const float *logits, int32_t vocab_size, int32_t token, float *logprob,
                 int32_t n_top, int32_t *top_tokens, float *top_logprobs) {
    if (!logits || (n_top > 0 && (!top_tokens || !top_logprobs)))
        return fail(GPT_ERR_ARGUMENT, "gpt_logprobs: NULL argument");
    TRY(check_logits(logits, vocab_size));
    if (logprob && (token < 0 || token >= vocab_size))
        return fail(GPT_ERR_ARGUMENT, "token %d does not exist; the vocabulary has %d", token,
                    vocab_size);
    if (n_top < 0 || n_top > vocab_size)
        return fail(GPT_ERR_ARGUMENT, "n_top is %d; it must be between 0 and %d", n_top,
                    vocab_size);
    float top = logits[most_likely(logits, vocab_size)];
    double sum = 0;
    for (int32_t i = 0; i < vocab_size; i++) sum += expf(logits[i] - top);
    double normalizer = top + log(sum);
    if (n_top > 0) {
        int32_t *c = malloc(sizeof *c * (size_t)vocab_size);
        if (!c) return fail(GPT_ERR_MEMORY, "no memory to sort %d logits", vocab_size);
        for (int32_t i = 0; i < vocab_size; i++) c[i] = i;
        keep_first(c, vocab_size, logits, n_top, NULL, INFINITY);
        sort_first(c, n_top, logits, n_top, NULL, INFINITY);
        for (int32_t i = 0; i < n_top; i++) {
            top_tokens[i] = c[i];
            top_logprobs[i] = (float)(logits[c[i]] - normalizer);
        }
        free(c);
    }
    if (logprob) *logprob = (float)(logits[token] - normalizer);
    return GPT_OK;
}
