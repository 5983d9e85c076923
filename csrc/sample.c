/* sample.c: draws the next token. The draw is a function of (seed, position), so that a text can be
 * repeated whatever else was generated at the same time.
 *
 * Keys are not sorted as a whole: a filter counts them in coarse steps, finds the step in which it
 * ends, and sorts that step alone. */
#include "sample.h"

#include "error.h"

#include <float.h>
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

int sample_check(const gpt_sampling *s, int32_t V, const int32_t *history, int32_t n_history) {
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
    TRY(check_bias(s, V));
    return check_history(s, history, n_history);
}

static bool all_finite(const float *logits, int32_t V) {
    int finite = 1;
    for (int32_t i = 0; i < V; i++) finite &= isfinite(logits[i]) != 0;
    return finite;
}

static int check_logits(const float *logits, int32_t V) {
    if (V < 1) return fail(GPT_ERR_ARGUMENT, "vocab_size is %d; it must be at least 1", V);
    if (all_finite(logits, V)) return GPT_OK;
    int32_t i = 0;
    while (isfinite(logits[i])) i++;
    return fail(GPT_ERR_NUMERIC,
                "the logit of token %d is %g: the model's weights are damaged or its training "
                "diverged",
                i, logits[i]);
}

int sample_status(const sample_result *result) {
    switch (result->token) {
    case SAMPLE_NOT_FINITE:
        return fail(GPT_ERR_NUMERIC,
                    "a logit is not finite: the model's weights are damaged or its "
                    "training diverged");
    case SAMPLE_TOO_LARGE:
        return fail(GPT_ERR_ARGUMENT, "biases and penalties make a logit too large");
    case SAMPLE_NOTHING_LEFT:
        return fail(GPT_ERR_ARGUMENT, "biases and penalties leave no token to draw");
    default:
        return GPT_OK;
    }
}

/* ---- the settings of a row ---- */

int32_t sample_most_adjustments(const gpt_sampling *s, int32_t n_history, int32_t V) {
    int64_t n = (int64_t)s->n_bias + n_history;
    return (int32_t)(n < V ? n : V);
}

/* The adjustment of a token, perhaps a new one; marks has its number in the row's list, from 1 on. */
static sample_adjustment *adjustment_of(sample_adjustment *list, int32_t *n, int32_t *marks,
                                        int32_t token) {
    if (marks[token] == 0) {
        list[*n] = (sample_adjustment){.token = token};
        marks[token] = ++*n;
    }
    return &list[marks[token] - 1];
}

void sample_prepare(sample_row *out, sample_adjustment *list, int32_t *n, int32_t *marks,
                    const gpt_sampling *s, int32_t V, const int32_t *history, int32_t n_history,
                    uint64_t position) {
    uint64_t key = (uint64_t)counter_bits(s->seed, 1) << 32 | counter_bits(s->seed, 2);
    int32_t own = 0;
    sample_adjustment *first = list + *n;
    for (int32_t i = 0; i < s->n_bias; i++)
        adjustment_of(first, &own, marks, s->bias[i].token)->bias += s->bias[i].value;
    for (int32_t i = 0; i < n_history; i++)
        if (history[i] >= 0 && history[i] < V)
            adjustment_of(first, &own, marks, history[i])->count++;
    for (int32_t i = 0; i < own; i++) marks[first[i].token] = 0;
    float steepness = s->temperature > 0 ? 1.44269504f / s->temperature : 0;
    *out = (sample_row){.steepness = steepness < FLT_MAX ? steepness : FLT_MAX,
                        .typical_p = s->typical_p,
                        .top_p = s->top_p,
                        .min_p = s->min_p,
                        .repetition_penalty = s->repetition_penalty,
                        .presence_penalty = s->presence_penalty,
                        .frequency_penalty = s->frequency_penalty,
                        .top_k = s->top_k,
                        .vocab_size = V,
                        .adjustments = *n,
                        .n_adjustments = own,
                        .number = counter_bits(key, position),
                        .n_top = -1};
    *n += own;
}

/* ---- logits ---- */

static void adjust(float *z, const sample_row *s, sample_adjustment *list) {
    for (int32_t i = 0; i < s->n_adjustments; i++) {
        sample_adjustment *a = &list[i];
        float x = a->raw = z[a->token];
        x += a->bias;
        if (a->count > 0) {
            x = x > 0 ? x / s->repetition_penalty : x * s->repetition_penalty;
            x -= s->presence_penalty;
        }
        for (int32_t k = 0; k < a->count; k++) x -= s->frequency_penalty;
        z[a->token] = x;
    }
}

/* Sums of what is allowed may still be too large for a number, or +inf and -inf at once. */
static int32_t adjusted_failure(const float *z, int32_t V) {
    int some = 0, sound = 1;
    for (int32_t i = 0; i < V; i++) {
        some |= z[i] > -INFINITY;
        sound &= z[i] < INFINITY; /* nor NaN */
    }
    return !sound ? SAMPLE_TOO_LARGE : !some ? SAMPLE_NOTHING_LEFT : 0;
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

/* What a filter looks at: chances, and the keys it keeps tokens by. */
typedef struct weighing {
    const float *z;
    float best, steepness;
    const uint32_t *p; /* (V) chances */
    uint32_t *key;     /* (V) for typical_p */
} weighing;

static bool before(const uint32_t *key, int32_t a, int32_t b) {
    return key[a] != key[b] ? key[a] > key[b] : a < b;
}

/* A heap has the first of its candidates on top. */
static void sift(int32_t *c, int32_t n, int32_t i, const uint32_t *key) {
    int32_t token = c[i];
    for (int32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(key, c[child + 1], c[child])) child++;
        if (!before(key, c[child], token)) break;
        c[i] = c[child];
    }
    c[i] = token;
}

static uint64_t sum_of(const int32_t *c, int32_t n, const uint32_t *p) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < n; i++) sum += p[c[i]];
    return sum;
}

/* Brings the first of n candidates to the front, in order: `most` of them, or as few as have the sum
 * of chances p. Returns how many. */
static int32_t sort_first(int32_t *c, int32_t n, const uint32_t *key, int32_t most,
                          const uint32_t *p, uint64_t enough) {
    int32_t left = n, kept;
    uint64_t sum = 0;
    for (int32_t i = n / 2 - 1; i >= 0; i--) sift(c, n, i, key);
    while (left > 0 && n - left < most && (left == n || sum < enough)) {
        int32_t first = c[0];
        sum += p[first];
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

/* The same as sort_first, in no order: all of the steps above the one in which it ends, and the first
 * of that one. */
static int32_t keep_first(int32_t *c, int32_t n, const uint32_t *key, int32_t most,
                          const uint32_t *p, uint64_t enough) {
    int32_t counts[KEY_STEPS] = {0}, kept = 0, front = 0, last = 0;
    uint64_t sums[KEY_STEPS] = {0}, sum = 0;
    for (int32_t i = 0; i < n; i++) counts[key_step(key[c[i]])]++;
    for (int32_t i = 0; i < n && enough < UINT64_MAX; i++) sums[key_step(key[c[i]])] += p[c[i]];
    int step = KEY_STEPS - 1;
    for (; step > 0 && kept + counts[step] < most && sum + sums[step] < enough; step--)
        kept += counts[step], sum += sums[step];
    uint64_t low = first_key_of(step), high = first_key_of(step + 1);
    for (int32_t i = 0; i < n; i++) { /* the step's own go behind those above it */
        int32_t token = c[i];
        if (key[token] < low) continue;
        if (key[token] >= high) {
            c[front + last] = c[front];
            c[front++] = token;
        } else {
            c[front + last++] = token;
        }
    }
    if (front > 0 && (front == most || sum >= enough)) return front;
    return front + sort_first(c + front, last, key, most - front, p,
                              enough == UINT64_MAX ? enough : enough - sum);
}

/* The typical tokens are those whose surprise, -log p, is nearest to what is expected of it. */
static void typicality(const weighing *w, const int32_t *c, int32_t n) {
    uint64_t total = sum_of(c, n, w->p), sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum +=
            (uint64_t)w->p[c[i]] * (halvings(w->z[c[i]], w->best, w->steepness) >> TYPICAL_SHIFT);
    uint32_t mean = (uint32_t)(sum / total);
    for (int32_t i = 0; i < n; i++)
        w->key[c[i]] = typical_key(halvings(w->z[c[i]], w->best, w->steepness), mean);
}

static int32_t at_least(int32_t *c, int32_t n, const uint32_t *p, uint32_t least) {
    int32_t kept = 0;
    for (int32_t i = 0; i < n; i++)
        if (p[c[i]] >= least) c[kept++] = c[i];
    return kept;
}

enum { BLOCK = 64 }; /* tokens whose largest chance is found by vectors */

static uint32_t larger(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

static uint32_t most_of(const uint32_t *p, int32_t n) {
    uint32_t most = 0;
    for (int32_t i = 0; i < n; i++) most = larger(most, p[i]);
    return most;
}

/* A chance that at least `most` of V tokens have: so many blocks have one that is as large. */
static uint32_t chance_of_many(const uint32_t *p, int32_t V, int32_t most) {
    int32_t counts[KEY_STEPS] = {0}, n = 0, step = KEY_STEPS;
    for (int32_t i = 0; i < V; i += BLOCK)
        counts[key_step(most_of(p + i, V - i < BLOCK ? V - i : BLOCK))]++;
    while (step > 0 && n < most) n += counts[--step];
    return n < most ? 0 : (uint32_t)first_key_of(step);
}

/* Lists the tokens of V with a chance of at least `least`. */
static int32_t list_likely(int32_t *c, const uint32_t *p, int32_t V, uint32_t least) {
    int32_t n = 0;
    for (int32_t i = 0; i < V; i += BLOCK) {
        int32_t end = V - i < BLOCK ? V : i + BLOCK;
        if (most_of(p + i, end - i) < least) continue;
        for (int32_t k = i; k < end; k++) c[n] = k, n += p[k] >= least;
    }
    return n;
}

static uint64_t sum_of_all(const uint32_t *p, int32_t V) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < V; i++) sum += p[i];
    return sum;
}

/* Lists the tokens that remain of V in c, and returns their number. Those without a chance are never
 * drawn, and are left out at the start. */
static int32_t filter(int32_t *c, const weighing *w, int32_t V, const sample_row *s) {
    const uint32_t *p = w->p;
    bool by_number = s->top_k > 0 && s->top_k < V, typical = s->typical_p < 1;
    uint64_t enough = 0;
    uint32_t least = 1, bound = by_number ? chance_of_many(p, V, s->top_k) : 0;
    if (!by_number && !typical) {
        least = larger(least, (uint32_t)share_of(most_of(p, V), s->min_p));
        enough = share_of(sum_of_all(p, V), s->top_p);
        /* Together, tokens below this have less than what top_p leaves out: none of them is in. */
        bound = (uint32_t)((1 - (double)s->top_p) * (double)enough / V);
    }
    int32_t n = list_likely(c, p, V, larger(least, bound));
    if (by_number && s->top_k < n) n = keep_first(c, n, p, s->top_k, p, UINT64_MAX);
    if (typical) {
        typicality(w, c, n);
        n = keep_first(c, n, w->key, n, p, share_of(sum_of(c, n, p), s->typical_p));
    }
    if (s->top_p < 1) {
        if (by_number || typical) enough = share_of(sum_of(c, n, p), s->top_p);
        n = keep_first(c, n, p, n, p, enough);
    }
    if (s->min_p > 0 && (by_number || typical)) {
        uint32_t top = 0;
        for (int32_t i = 0; i < n; i++) top = larger(top, p[c[i]]);
        n = at_least(c, n, p, (uint32_t)share_of(top, s->min_p));
    }
    return n;
}

/* ---- the draw ---- */

/* Of n candidates of V, in the order of tokens. in: (V / 8 + 1) */
static int32_t draw(const int32_t *c, int32_t n, const uint32_t *p, int32_t V, uint8_t *in,
                    uint32_t number) {
    uint64_t place = place_in(sum_of(c, n, p), number);
    memset(in, 0, (size_t)V / 8 + 1);
    for (int32_t i = 0; i < n; i++) in[c[i] / 8] |= (uint8_t)(1 << c[i] % 8);
    for (int32_t i = 0;; i++) {
        if (i % 8 == 0)
            while (!in[i / 8]) i += 8;
        if (!(in[i / 8] >> i % 8 & 1)) continue;
        if (place < p[i]) return i;
        place -= p[i];
    }
}

/* Of all V, as where no filter is set. */
static int32_t draw_from_all(const uint32_t *p, int32_t V, uint32_t number) {
    enum { TOGETHER = 64 };
    uint64_t place = place_in(sum_of_all(p, V), number);
    int32_t first = 0;
    for (; first + TOGETHER <= V; first += TOGETHER) {
        uint64_t some = 0;
        for (int32_t k = 0; k < TOGETHER; k++) some += p[first + k];
        if (place < some) break;
        place -= some;
    }
    while (place >= p[first]) place -= p[first++];
    return first;
}

static bool is_filtered(const sample_row *s) {
    return (s->top_k > 0 && s->top_k < s->vocab_size) || s->typical_p < 1 || s->top_p < 1 ||
           s->min_p > 0;
}

/* ---- log-probabilities ---- */

static double log_normalizer(const float *logits, int32_t V) {
    float top = logits[most_likely(logits, V)];
    double sum = 0;
    for (int32_t i = 0; i < V; i++) sum += expf(logits[i] - top);
    return top + log(sum);
}

/* The n_top most likely of V, in order: below the least of those so far, a logit is out. */
static void list_top(const float *logits, int32_t V, double normalizer, int32_t n_top,
                     int32_t *tokens, float *logprobs) {
    int32_t n = 0;
    for (int32_t i = 0; i < V && n_top > 0; i++) {
        if (n == n_top && logits[i] <= logprobs[n - 1]) continue;
        int32_t k = n < n_top ? n++ : n - 1;
        for (; k > 0 && logprobs[k - 1] < logits[i]; k--)
            logprobs[k] = logprobs[k - 1], tokens[k] = tokens[k - 1];
        logprobs[k] = logits[i], tokens[k] = i;
    }
    for (int32_t k = 0; k < n; k++) logprobs[k] = (float)(logprobs[k] - normalizer);
}

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
    double normalizer = log_normalizer(logits, vocab_size);
    list_top(logits, vocab_size, normalizer, n_top, top_tokens, top_logprobs);
    if (logprob) *logprob = (float)(logits[token] - normalizer);
    return GPT_OK;
}

/* ---- the whole ---- */

/* Chances and candidates; keys of typical_p; marks. */
size_t sample_scratch_bytes(int V) {
    return (3 * sizeof(uint32_t) * (size_t)V + (size_t)V / 8 + 64) / 64 * 64;
}

static int32_t draw_adjusted(const float *z, const sample_row *s, void *scratch,
                             sample_weigh *weigh) {
    int32_t V = s->vocab_size, *c = scratch;
    int32_t failure = s->n_adjustments > 0 ? adjusted_failure(z, V) : 0;
    uint32_t *p = (uint32_t *)(c + V), *key = p + V;
    if (failure) return failure;
    int32_t best = most_likely(z, V);
    if (s->steepness == 0) return best;
    weigh(p, z, V, z[best], s->steepness);
    if (!is_filtered(s)) return draw_from_all(p, V, s->number);
    weighing w = {z, z[best], s->steepness, p, key};
    int32_t n = filter(c, &w, V, s);
    return draw(c, n, p, V, (uint8_t *)(key + V), s->number);
}

void sample_one(const sample *op, int n, void *scratch, sample_weigh *weigh) {
    const sample_row *s = op->rows + n;
    float *z = op->logits + (int64_t)n * op->stride;
    sample_adjustment *list = op->adjustments + s->adjustments;
    sample_result *r = op->results + n;
    double normalizer = 0;
    r->token = SAMPLE_NOT_FINITE;
    if (!all_finite(z, op->V)) return;
    if (s->n_top >= 0) {
        normalizer = log_normalizer(z, op->V);
        list_top(z, s->vocab_size, normalizer, s->n_top, r->top_tokens, r->top_logprobs);
    }
    adjust(z, s, list);
    r->token = draw_adjusted(z, s, scratch, weigh);
    if (s->n_top < 0 || r->token < 0) return;
    float raw = z[r->token];
    for (int32_t i = 0; i < s->n_adjustments; i++)
        if (list[i].token == r->token) raw = list[i].raw;
    r->logprob = (float)(raw - normalizer);
}

int gpt_sample(const float *logits, int32_t vocab_size, const gpt_sampling *sampling,
               const int32_t *history, int32_t n_history, uint64_t position, int32_t *token) {
    if (!logits || !sampling || !token) return fail(GPT_ERR_ARGUMENT, "gpt_sample: NULL argument");
    TRY(check_logits(logits, vocab_size));
    TRY(sample_check(sampling, vocab_size, history, n_history));
    size_t V = (size_t)vocab_size, scratch = sample_scratch_bytes(vocab_size);
    int32_t n = sample_most_adjustments(sampling, n_history, vocab_size);
    float *z = malloc(sizeof *z * V + sizeof(sample_adjustment) * (size_t)n);
    int32_t *marks = calloc(1, n > 0 ? scratch + sizeof *marks * V : scratch);
    sample_adjustment *list = (sample_adjustment *)(z + V);
    sample_row row;
    sample_result result = {.token = 0};
    int status = GPT_OK;
    if (!z || !marks) status = fail(GPT_ERR_MEMORY, "no memory to weigh %d logits", vocab_size);
    if (status == GPT_OK) {
        memcpy(z, logits, sizeof *z * V);
        n = 0;
        sample_prepare(&row, list, &n, marks, sampling, vocab_size, history, n_history, position);
        sample op = {.results = &result,
                     .logits = z,
                     .rows = &row,
                     .adjustments = list,
                     .N = 1,
                     .V = vocab_size,
                     .stride = vocab_size};
        sample_one(&op, 0, marks, sample_chances);
        status = sample_status(&result);
    }
    if (status == GPT_OK) *token = result.token;
    free(z);
    free(marks);
    return status;
}
