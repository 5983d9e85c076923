/* gpt_sample against the exact distribution. */
#include "testing.h"

#include "gpt.h"

enum { MAX_VOCAB = 300 };

/* The plain build sees whether they have the right distribution. */
static int64_t many_draws(void) {
    return test_is_short() ? 3000 : 30000;
}

/* With everything off: softmax of the logits. */
#define PLAIN .repetition_penalty = 1, .temperature = 1, .typical_p = 1, .top_p = 1, .seed = 1
static const gpt_sampling plain = {PLAIN};

static gpt_sampling filters(float temperature, int top_k, float top_p, float min_p, uint64_t seed) {
    return (gpt_sampling){.repetition_penalty = 1,
                          .temperature = temperature,
                          .top_k = top_k,
                          .typical_p = 1,
                          .top_p = top_p,
                          .min_p = min_p,
                          .seed = seed};
}

static int32_t draw(const float *logits, int V, const gpt_sampling *s, uint64_t position) {
    int32_t token = -1;
    int status = gpt_sample(logits, V, s, NULL, 0, position, &token);
    test.n_checks++;
    if (status != GPT_OK) test_fail(__FILE__, __LINE__, "status %d: %s", status, gpt_last_error());
    if (token >= 0 && token < V) return token;
    test_fail(__FILE__, __LINE__, "token %d of %d", token, V);
    return 0;
}

typedef struct weighed {
    double p;    /* relative to the most likely of all */
    double rank; /* tokens are kept in rising order of it */
    int token;
} weighed;

static int by_rank(const void *a, const void *b) {
    const weighed *x = a, *y = b;
    if (x->rank != y->rank) return x->rank < y->rank ? -1 : 1;
    return x->token - y->token;
}

static double sum_of(const weighed *w, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) sum += w[i].p;
    return sum;
}

/* The first of n, by rank, that have this share of the probability. */
static int keep_share(weighed *w, int n, double share) {
    double total = sum_of(w, n), reached = 0.0;
    qsort(w, (size_t)n, sizeof *w, by_rank);
    for (int i = 0; i < n; i++) {
        reached += w[i].p / total;
        if (reached >= share) return i + 1;
    }
    return n;
}

/* The distribution, by the definition of each filter in turn. */
static void exact(double *p, const float *logits, int V, const gpt_sampling *s) {
    weighed w[MAX_VOCAB];
    int n = V, kept = 0;
    double top = logits[0];
    for (int i = 1; i < V; i++) top = logits[i] > top ? logits[i] : top;
    for (int i = 0; i < V; i++)
        w[i] = (weighed){exp((logits[i] - top) / s->temperature), -logits[i], i};
    qsort(w, (size_t)n, sizeof *w, by_rank);
    if (s->top_k > 0 && s->top_k < n) n = s->top_k;
    if (s->typical_p < 1) {
        double total = sum_of(w, n), expected = 0.0;
        for (int i = 0; i < n; i++) expected -= w[i].p / total * log(w[i].p / total);
        for (int i = 0; i < n; i++) w[i].rank = fabs(-log(w[i].p / total) - expected);
        n = keep_share(w, n, s->typical_p);
        for (int i = 0; i < n; i++) w[i].rank = -logits[w[i].token];
    }
    if (s->top_p < 1) n = keep_share(w, n, s->top_p);
    qsort(w, (size_t)n, sizeof *w, by_rank);
    for (int i = 0; i < n; i++)
        if (w[i].p >= s->min_p * w[0].p) w[kept++] = w[i];
    for (int i = 0; i < V; i++) p[i] = 0.0;
    for (int i = 0; i < kept; i++) p[w[i].token] = w[i].p / sum_of(w, kept);
}

/* The value that chi-squared with df degrees of freedom exceeds with probability 3e-7, at five
 * standard deviations of a normal (Wilson and Hilferty 1931). */
static double chi_squared_bound(int df) {
    double a = 2.0 / (9.0 * df), root = 1.0 - a + 5.0 * sqrt(a);
    return df * root * root * root;
}

/* Cells that expect fewer than 10 draws are counted as one. */
static void expect_distribution(const int64_t *counts, const double *p, int n_cells,
                                int64_t draws) {
    double statistic = 0.0, rest = 0.0, rest_count = 0.0;
    int cells = 0;
    for (int i = 0; i < n_cells; i++) {
        double expected = p[i] * (double)draws, count = (double)counts[i];
        if (p[i] == 0.0) EXPECT(counts[i] == 0);
        if (expected < 10.0) {
            rest += expected;
            rest_count += count;
            continue;
        }
        statistic += (count - expected) * (count - expected) / expected;
        cells++;
    }
    if (rest >= 10.0) {
        statistic += (rest_count - rest) * (rest_count - rest) / rest;
        cells++;
    }
    EXPECT(cells >= 1);
    if (cells < 2) return;
    test.n_checks++;
    if (statistic <= chi_squared_bound(cells - 1)) return;
    test_fail(__FILE__, __LINE__, "chi-squared is %.1f with %d cells; the bound is %.1f", statistic,
              cells, chi_squared_bound(cells - 1));
}

static void check_distribution(const float *logits, int V, gpt_sampling s, int64_t draws) {
    test_case("V=%d temperature=%g top_k=%d typical_p=%g top_p=%g min_p=%g seed=%llu", V,
              s.temperature, s.top_k, s.typical_p, s.top_p, s.min_p, (unsigned long long)s.seed);
    int64_t counts[MAX_VOCAB] = {0};
    double p[MAX_VOCAB];
    exact(p, logits, V, &s);
    for (int64_t i = 0; i < draws; i++) counts[draw(logits, V, &s, (uint64_t)i)]++;
    expect_distribution(counts, p, V, draws);
}

static void expect_always(const float *logits, int V, gpt_sampling s, int want) {
    for (uint64_t i = 0; i < 1000; i++) EXPECT(draw(logits, V, &s, i) == want);
}

static void expect_refused(const float *logits, int V, const gpt_sampling *s, int status,
                           const char *word) {
    int32_t token = 77;
    int got = gpt_sample(logits, V, s, NULL, 0, 0, &token);
    test.n_checks++;
    if (got != status) test_fail(__FILE__, __LINE__, "%s: status %d, want %d", word, got, status);
    if (!strstr(gpt_last_error(), word)) {
        test_fail(__FILE__, __LINE__, "'%s' does not say %s", gpt_last_error(), word);
    }
    EXPECT(token == 77);
}

static void test_distribution(void) {
    static const float logits[] = {0.3f, -1.2f, 2.1f, 1.4f, -0.5f, 0.9f, -3.0f};
    const gpt_sampling settings[] = {
        filters(1.0f, 0, 1.0f, 0.0f, 1),          filters(1.0f, 0, 1.0f, 0.0f, 2),
        filters(0.5f, 0, 1.0f, 0.0f, 3),          filters(2.0f, 0, 1.0f, 0.0f, 4),
        filters(1.0f, 3, 1.0f, 0.0f, 5),          filters(1.0f, 7, 1.0f, 0.0f, 6),
        filters(1.0f, 100, 1.0f, 0.0f, 7),        filters(1.0f, 0, 0.7f, 0.0f, 8),
        filters(1.0f, 0, 0.9f, 0.0f, 9),          filters(1.0f, 0, 1.0f, 0.1f, 10),
        filters(1.0f, 0, 1.0f, 0.5f, 11),         filters(1.0f, 4, 0.8f, 0.0f, 12),
        filters(0.8f, 5, 0.95f, 0.2f, 13),        filters(3.0f, 0, 0.6f, 0.4f, 14),
        filters(1.0f, 2, 0.75f, 0.0f, 15),        filters(1.0f, 0, 1.0f, 0.0f, 0),
        filters(1.0f, 0, 1.0f, 0.0f, UINT64_MAX),
    };
    for (int i = 0; i < TEST_COUNT(settings); i++)
        check_distribution(logits, 7, settings[i], many_draws());
}

static void test_typical(void) {
    static const float logits[] = {0.3f, -1.2f, 2.1f, 1.4f, -0.5f, 0.9f, -3.0f};
    static const float shares[] = {0.05f, 0.3f, 0.5f, 0.8f, 0.95f, 0.999f};
    for (int i = 0; i < TEST_COUNT(shares); i++) {
        gpt_sampling s = filters(1, 0, 1, 0, (uint64_t)i);
        s.typical_p = shares[i];
        check_distribution(logits, 7, s, many_draws());
        s.temperature = 1.7f, s.top_k = 5, s.top_p = 0.8f, s.min_p = 0.3f;
        check_distribution(logits, 7, s, many_draws());
    }
    /* Where one token is nearly certain, it is the typical one. */
    static const float sure[] = {0, 9, 0, 0};
    gpt_sampling s = plain;
    s.typical_p = 0.5f;
    expect_always(sure, 4, s, 1);
}

/* Biases and penalties are what they say of the logits: a draw with them is one from other logits. */
static void test_bias_and_penalties(void) {
    enum { V = 7 };
    static const float logits[V] = {0.3f, -1.2f, 2.1f, 1.4f, -0.5f, 0.9f, -3.0f};
    static const gpt_bias bias[] = {{3, -INFINITY}, {6, 4.5f}, {0, -0.25f}, {0, -0.25f}};
    static const int32_t history[] = {2, 5, 2, -7, 2, 1, 300};
    static const int times[V] = {0, 1, 3, 0, 0, 1, 0};
    gpt_sampling s = filters(0.9f, 0, 0.95f, 0, 7), like = s;
    s.bias = bias, s.n_bias = TEST_COUNT(bias);
    s.repetition_penalty = 1.3f, s.presence_penalty = 0.2f, s.frequency_penalty = 0.15f;
    float changed[V] = {-0.2f, -1.2f, 2.1f, -1e30f, -0.5f, 0.9f, 1.5f};
    for (int i = 0; i < V; i++) {
        if (times[i] == 0) continue;
        changed[i] = changed[i] > 0 ? changed[i] / 1.3f : changed[i] * 1.3f;
        changed[i] -= 0.2f + 0.15f * (float)times[i];
    }
    test_case("bias and penalties");
    int64_t counts[V] = {0};
    double p[V];
    exact(p, changed, V, &like);
    for (uint64_t i = 0; i < (uint64_t)many_draws(); i++) {
        int32_t token = -1;
        EXPECT(gpt_sample(logits, V, &s, history, TEST_COUNT(history), i, &token) == GPT_OK);
        if (token >= 0 && token < V) counts[token]++;
    }
    expect_distribution(counts, p, V, many_draws());

    int32_t token = 77;
    s.temperature = 0, s.frequency_penalty = 5;
    EXPECT(gpt_sample(logits, V, &s, history, TEST_COUNT(history), 0, &token) == GPT_OK);
    EXPECT(token == 6);
    gpt_bias none[V];
    for (int i = 0; i < V; i++) none[i] = (gpt_bias){i, -INFINITY};
    s = plain, s.bias = none, s.n_bias = V;
    expect_refused(logits, V, &s, GPT_ERR_ARGUMENT, "no token");
    s.n_bias = V - 1;
    expect_always(logits, V, s, V - 1);
    /* Values that overflow, and NaN. */
    static const gpt_bias large[] = {{0, 3e38f}, {0, 3e38f}, {0, -INFINITY}};
    s = plain, s.bias = large, s.n_bias = 2;
    expect_refused(logits, V, &s, GPT_ERR_ARGUMENT, "too large");
    s.n_bias = 3;
    expect_refused(logits, V, &s, GPT_ERR_ARGUMENT, "too large");
}

static void test_logprobs(void) {
    enum { TOP = 5 };
    float logits[MAX_VOCAB], logprob, top[TOP];
    int32_t tokens[TOP];
    double p[MAX_VOCAB];
    test_case("log-probabilities");
    for (int i = 0; i < MAX_VOCAB; i++) logits[i] = (float)(3.0 * random_normal() - 50.0);
    logits[17] = logits[23] = 10.0f;
    exact(p, logits, MAX_VOCAB, &plain);
    for (int i = 0; i < MAX_VOCAB; i++) {
        EXPECT(gpt_logprobs(logits, MAX_VOCAB, i, &logprob, TOP, tokens, top) == GPT_OK);
        EXPECT_NEAR("log-probability", logprob, log(p[i]), 1e-5 * (1 + fabs(log(p[i]))));
    }
    EXPECT(tokens[0] == 17 && tokens[1] == 23 && top[0] == top[1]);
    for (int k = 0; k < TOP; k++) {
        int larger = 0;
        for (int i = 0; i < MAX_VOCAB; i++) larger += logits[i] > logits[tokens[k]];
        EXPECT(larger == (k == 1 ? 0 : k));
        EXPECT_NEAR("of the first", top[k], log(p[tokens[k]]), 1e-4);
    }
    EXPECT(gpt_logprobs(logits, 3, 0, NULL, 3, tokens, top) == GPT_OK);
    EXPECT(gpt_logprobs(logits, 3, 3, &logprob, 0, NULL, NULL) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_logprobs(logits, 3, -1, &logprob, 0, NULL, NULL) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_logprobs(logits, 3, 0, NULL, 4, tokens, top) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_logprobs(NULL, 3, 0, &logprob, 0, NULL, NULL) == GPT_ERR_ARGUMENT);
    logits[1] = NAN;
    EXPECT(gpt_logprobs(logits, 3, 0, &logprob, 0, NULL, NULL) == GPT_ERR_NUMERIC);
}

/* Filters that keep many of equal and nearly equal tokens. */
static void test_flat(void) {
    float logits[MAX_VOCAB];
    for (int i = 0; i < MAX_VOCAB; i++) logits[i] = (float)(i % 7) * 1e-3f - 0.003f;
    check_distribution(logits, MAX_VOCAB, filters(1, 0, 0.6f, 0, 31), many_draws() / 5);
    check_distribution(logits, MAX_VOCAB, filters(1, 211, 1, 0, 32), many_draws() / 5);
    check_distribution(logits, MAX_VOCAB, filters(1, 250, 0.9f, 0.999f, 33), many_draws() / 5);
    gpt_sampling s = filters(1, 0, 1, 0, 34);
    s.typical_p = 0.6f;
    logits[0] = 0.5f; /* so that distances from what is expected are no ties */
    check_distribution(logits, MAX_VOCAB, s, many_draws() / 5);
}

/* Wide vocabularies, unsorted, with a long tail. */
static void test_wide(void) {
    float logits[MAX_VOCAB];
    test_case("%s", "");
    for (int i = 0; i < MAX_VOCAB; i++) logits[i] = (float)(2.0 * random_normal());
    check_distribution(logits, MAX_VOCAB, plain, many_draws() / 5);
    check_distribution(logits, MAX_VOCAB, filters(0.7f, 40, 0.9f, 0.02f, 21), many_draws() / 5);
    check_distribution(logits, 257, filters(1.3f, 0, 0.95f, 0.0f, 22), many_draws() / 5);
}

/* top_k and min_p keep exactly the likely tokens, which are far from each other in a large vocabulary. */
static void test_scattered(void) {
    enum { V = 5003, LIKELY = 40, APART = 123 };
    const gpt_sampling settings[] = {filters(1, LIKELY, 1, 0, 23), filters(1, 0, 1, 0.5f, 24),
                                     filters(1, 0, 0.999f, 0.5f, 25)};
    static float logits[V];
    for (int i = 0; i < V; i++) logits[i] = -(float)random_below(3000) * 0.001f;
    for (int i = 0; i < LIKELY; i++) logits[7 + i * APART] = 1 + 0.001f * (float)i;
    for (int k = 0; k < TEST_COUNT(settings); k++) {
        int seen[LIKELY] = {0}, n = 0;
        test_case("top_k %d, min_p %g", settings[k].top_k, settings[k].min_p);
        for (uint64_t i = 0; i < 40 * LIKELY; i++) {
            int token = draw(logits, V, &settings[k], i) - 7;
            int likely = token >= 0 && token % APART == 0 && token / APART < LIKELY;
            EXPECT(likely);
            if (likely) seen[token / APART] = 1;
        }
        for (int i = 0; i < LIKELY; i++) n += seen[i];
        EXPECT(n == LIKELY);
    }
}

static void test_equal_logits(void) {
    static const float logits[] = {0.5f, 0.5f, 0.5f, 0.5f, 0.5f};
    check_distribution(logits, 5, plain, many_draws());
    /* Of equal tokens top_k keeps as many as it says, whichever they are. */
    gpt_sampling s = plain;
    s.top_k = 2;
    int seen[5] = {0}, n = 0;
    for (uint64_t i = 0; i < 1000; i++) seen[draw(logits, 5, &s, i)] = 1;
    for (int i = 0; i < 5; i++) n += seen[i];
    EXPECT(n == 2);
}

/* Every way to leave only the most likely token. */
static void test_most_likely(void) {
    static const float logits[] = {0.3f, -1.2f, 2.0f, 2.1f, -0.5f};
    test_case("the most likely");
    expect_always(logits, 5, filters(0.0f, 0, 1.0f, 0.0f, 1), 3);
    expect_always(logits, 5, filters(0.0f, 3, 0.9f, 0.1f, 1), 3);
    expect_always(logits, 5, filters(1.0f, 1, 1.0f, 0.0f, 1), 3);
    expect_always(logits, 5, filters(1.0f, 0, 1e-6f, 0.0f, 1), 3);
    expect_always(logits, 5, filters(1.0f, 0, 1.0f, 1.0f, 1), 3);
    expect_always(logits, 5, filters(1e-30f, 0, 1.0f, 0.0f, 1), 3);
    expect_always(logits, 1, filters(1.0f, 0, 1.0f, 0.0f, 1), 0);
    static const float far[] = {-3e38f, 1e4f, -1e4f, 3e38f, 0.0f};
    expect_always(far, 5, plain, 3);
    static const float last[] = {-3.0f, -2.0f, -1.0f};
    expect_always(last, 3, filters(0.0f, 0, 1.0f, 0.0f, 1), 2);
}

/* A temperature without bound leaves no difference between tokens. */
static void test_hot(void) {
    static const float logits[] = {-50.0f, 3.0f, 80.0f};
    check_distribution(logits, 3, filters(1e30f, 0, 1.0f, 0.0f, 5), many_draws());
}

/* A draw depends on the seed and the position and on nothing that was drawn before. */
static void test_repeatable(void) {
    enum { N = 2000 };
    static const float logits[] = {0.0f, 0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f, 0.7f};
    static const uint64_t bases[] = {0, 1ull << 32, UINT64_MAX - N};
    for (int k = 0; k < TEST_COUNT(bases); k++) {
        test_case("positions from %llu", (unsigned long long)bases[k]);
        int32_t first[N];
        int other_seed = 0, neighbours = 0, far = 0;
        gpt_sampling s = plain, t = plain;
        t.seed = 2;
        for (int i = 0; i < N; i++) first[i] = draw(logits, 8, &s, bases[k] + (uint64_t)i);
        for (int i = N - 1; i >= 0; i--) {
            EXPECT(draw(logits, 8, &s, bases[k] + (uint64_t)i) == first[i]);
            other_seed += draw(logits, 8, &t, bases[k] + (uint64_t)i) == first[i];
            neighbours += i > 0 && first[i] == first[i - 1];
            far += draw(logits, 8, &s, bases[k] + (uint64_t)i + (3ull << 32)) == first[i];
        }
        /* Chance agreement is near 0.13 with a deviation of 0.0075 over so many draws. */
        EXPECT_NEAR("agreement of two seeds", other_seed / (double)N, 0.13, 0.05);
        EXPECT_NEAR("agreement of neighbours", neighbours / (double)N, 0.13, 0.05);
        EXPECT_NEAR("agreement of far positions", far / (double)N, 0.13, 0.05);
    }
}

/* Pairs of draws at neighbouring positions, and of neighbouring seeds at one position, fill their
 * table evenly. */
static void test_independent(void) {
    static const float logits[] = {1.0f, 1.0f, 1.0f, 1.0f};
    double p[16];
    for (int i = 0; i < 16; i++) p[i] = 1.0 / 16.0;
    int64_t by_position[16] = {0}, by_seed[16] = {0};
    gpt_sampling s = plain, next = plain;
    next.seed = s.seed + 1;
    test_case("pairs");
    for (int64_t i = 0; i < many_draws(); i++) {
        uint64_t position = 2 * (uint64_t)i;
        int a = draw(logits, 4, &s, position);
        by_position[4 * a + draw(logits, 4, &s, position + 1)]++;
        by_seed[4 * a + draw(logits, 4, &next, position)]++;
    }
    expect_distribution(by_position, p, 16, many_draws());
    expect_distribution(by_seed, p, 16, many_draws());
}

static void test_not_finite(void) {
    static const float spoilers[] = {NAN, INFINITY, -INFINITY};
    for (int k = 0; k < 9; k++) {
        float logits[] = {0.5f, 0.25f, 0.125f};
        gpt_sampling s = plain;
        s.temperature = k < 3 ? 0.0f : 1.0f;
        s.top_k = k < 6 ? 0 : 2;
        logits[k % 3] = spoilers[k / 3 % 3];
        test_case("%g at %d", spoilers[k / 3 % 3], k % 3);
        expect_refused(logits, 3, &s, GPT_ERR_NUMERIC, "logit");
    }
}

static void test_refusals(void) {
    static const float logits[] = {0.5f, 0.25f, 0.125f};
    const struct {
        gpt_sampling s;
        const char *word;
    } bad[] = {
        {filters(-1.0f, 0, 1.0f, 0.0f, 1), "temperature"},
        {filters(NAN, 0, 1.0f, 0.0f, 1), "temperature"},
        {filters(INFINITY, 0, 1.0f, 0.0f, 1), "temperature"},
        {filters(1.0f, -1, 1.0f, 0.0f, 1), "top_k"},
        {filters(1.0f, 0, -0.1f, 0.0f, 1), "top_p"},
        {filters(1.0f, 0, 1.1f, 0.0f, 1), "top_p"},
        {filters(1.0f, 0, NAN, 0.0f, 1), "top_p"},
        {filters(1.0f, 0, 1.0f, -0.1f, 1), "min_p"},
        {filters(1.0f, 0, 1.0f, 1.1f, 1), "min_p"},
        {filters(1.0f, 0, 1.0f, NAN, 1), "min_p"},
    };
    for (int i = 0; i < TEST_COUNT(bad); i++) {
        test_case("bad setting %d", i);
        expect_refused(logits, 3, &bad[i].s, GPT_ERR_ARGUMENT, bad[i].word);
    }
    gpt_sampling s = plain;
    test_case("bad penalties and biases");
    s.typical_p = 0, expect_refused(logits, 3, &s, GPT_ERR_ARGUMENT, "typical_p");
    s = plain, s.repetition_penalty = 0;
    expect_refused(logits, 3, &s, GPT_ERR_ARGUMENT, "repetition_penalty");
    s = plain, s.presence_penalty = NAN;
    expect_refused(logits, 3, &s, GPT_ERR_ARGUMENT, "penalty");
    static const gpt_bias outside[] = {{3, 1}}, endless[] = {{2, INFINITY}};
    s = plain, s.n_bias = 1;
    expect_refused(logits, 3, &s, GPT_ERR_ARGUMENT, "NULL");
    s.bias = outside, expect_refused(logits, 3, &s, GPT_ERR_ARGUMENT, "token 3");
    s.bias = endless, expect_refused(logits, 3, &s, GPT_ERR_ARGUMENT, "token 2");
    test_case("bad arguments");
    expect_refused(logits, 0, &plain, GPT_ERR_ARGUMENT, "vocab_size");
    expect_refused(logits, -5, &plain, GPT_ERR_ARGUMENT, "vocab_size");
    expect_refused(NULL, 3, &plain, GPT_ERR_ARGUMENT, "NULL");
    expect_refused(logits, 3, NULL, GPT_ERR_ARGUMENT, "NULL");
    EXPECT(gpt_sample(logits, 3, &plain, NULL, 0, 0, NULL) == GPT_ERR_ARGUMENT);
}

TEST_API_MAIN({"distribution", test_distribution}, {"typical", test_typical}, {"flat", test_flat},
              {"bias and penalties", test_bias_and_penalties}, {"log-probabilities", test_logprobs},
              {"wide", test_wide}, {"scattered", test_scattered},
              {"equal logits", test_equal_logits}, {"most likely", test_most_likely},
              {"hot", test_hot}, {"repeatable", test_repeatable}, {"independent", test_independent},
              {"not finite", test_not_finite}, {"refusals", test_refusals})
