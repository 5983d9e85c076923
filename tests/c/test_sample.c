/* gpt_sample against the exact distribution. */
#include "testing.h"

#include "gpt.h"

enum { DRAWS = 100000, MAX_VOCAB = 300 };

/* With everything off: softmax of the logits. */
static const gpt_sampling plain = {1.0f, 0, 1.0f, 0.0f, 1};

static int32_t draw(const float *logits, int V, const gpt_sampling *s, uint64_t position) {
    int32_t token = -1;
    int status = gpt_sample(logits, V, s, position, &token);
    test.n_checks++;
    if (status != GPT_OK) test_fail(__FILE__, __LINE__, "status %d: %s", status, gpt_last_error());
    if (token >= 0 && token < V) return token;
    test_fail(__FILE__, __LINE__, "token %d of %d", token, V);
    return 0;
}

/* The distribution, by the definition of each filter: tokens in falling order of probability, cut
 * at top_k, renormalised, cut where top_p is reached, cut below min_p of the first, and
 * renormalised. */
static void exact(double *p, const float *logits, int V, const gpt_sampling *s) {
    int order[MAX_VOCAB], n = V;
    double weight[MAX_VOCAB], sum = 0.0, reached = 0.0;
    for (int i = 0; i < V; i++) {
        int k = i;
        for (; k > 0 && logits[order[k - 1]] < logits[i]; k--) order[k] = order[k - 1];
        order[k] = i;
    }
    if (s->top_k > 0 && s->top_k < n) n = s->top_k;
    for (int k = 0; k < n; k++) {
        weight[k] = exp(((double)logits[order[k]] - logits[order[0]]) / s->temperature);
        sum += weight[k];
    }
    for (int k = 0; k < n; k++) {
        reached += weight[k] / sum;
        if (reached >= s->top_p) n = k + 1;
    }
    while (n > 1 && weight[n - 1] < s->min_p * weight[0]) n--;
    sum = 0.0;
    for (int k = 0; k < n; k++) sum += weight[k];
    for (int i = 0; i < V; i++) p[i] = 0.0;
    for (int k = 0; k < n; k++) p[order[k]] = weight[k] / sum;
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
    test_case("V=%d temperature=%g top_k=%d top_p=%g min_p=%g seed=%llu", V, s.temperature, s.top_k,
              s.top_p, s.min_p, (unsigned long long)s.seed);
    int64_t counts[MAX_VOCAB] = {0};
    double p[MAX_VOCAB];
    exact(p, logits, V, &s);
    for (int64_t i = 0; i < draws; i++) counts[draw(logits, V, &s, (uint64_t)i)]++;
    expect_distribution(counts, p, V, draws);
}

static void test_distribution(void) {
    static const float logits[] = {0.3f, -1.2f, 2.1f, 1.4f, -0.5f, 0.9f, -3.0f};
    static const gpt_sampling settings[] = {
        {1.0f, 0, 1.0f, 0.0f, 1},   {1.0f, 0, 1.0f, 0.0f, 2},          {0.5f, 0, 1.0f, 0.0f, 3},
        {2.0f, 0, 1.0f, 0.0f, 4},   {1.0f, 3, 1.0f, 0.0f, 5},          {1.0f, 7, 1.0f, 0.0f, 6},
        {1.0f, 100, 1.0f, 0.0f, 7}, {1.0f, 0, 0.7f, 0.0f, 8},          {1.0f, 0, 0.9f, 0.0f, 9},
        {1.0f, 0, 1.0f, 0.1f, 10},  {1.0f, 0, 1.0f, 0.5f, 11},         {1.0f, 4, 0.8f, 0.0f, 12},
        {0.8f, 5, 0.95f, 0.2f, 13}, {3.0f, 0, 0.6f, 0.4f, 14},         {1.0f, 2, 0.75f, 0.0f, 15},
        {1.0f, 0, 1.0f, 0.0f, 0},   {1.0f, 0, 1.0f, 0.0f, UINT64_MAX},
    };
    for (int i = 0; i < TEST_COUNT(settings); i++)
        check_distribution(logits, 7, settings[i], DRAWS);
}

/* Wide vocabularies, unsorted, with a long tail. */
static void test_wide(void) {
    float logits[MAX_VOCAB];
    test_case("%s", "");
    for (int i = 0; i < MAX_VOCAB; i++) logits[i] = (float)(2.0 * random_normal());
    check_distribution(logits, MAX_VOCAB, plain, DRAWS / 5);
    check_distribution(logits, MAX_VOCAB, (gpt_sampling){0.7f, 40, 0.9f, 0.02f, 21}, DRAWS / 5);
    check_distribution(logits, 257, (gpt_sampling){1.3f, 0, 0.95f, 0.0f, 22}, DRAWS / 5);
}

static void test_equal_logits(void) {
    static const float logits[] = {0.5f, 0.5f, 0.5f, 0.5f, 0.5f};
    check_distribution(logits, 5, plain, DRAWS);
    /* Of equal tokens top_k keeps as many as it says, whichever they are. */
    gpt_sampling s = plain;
    s.top_k = 2;
    int seen[5] = {0}, n = 0;
    for (uint64_t i = 0; i < 1000; i++) seen[draw(logits, 5, &s, i)] = 1;
    for (int i = 0; i < 5; i++) n += seen[i];
    EXPECT(n == 2);
}

static void expect_always(const float *logits, int V, gpt_sampling s, int want) {
    for (uint64_t i = 0; i < 1000; i++) EXPECT(draw(logits, V, &s, i) == want);
}

/* Every way to leave only the most likely token. */
static void test_most_likely(void) {
    static const float logits[] = {0.3f, -1.2f, 2.0f, 2.1f, -0.5f};
    test_case("the most likely");
    expect_always(logits, 5, (gpt_sampling){0.0f, 0, 1.0f, 0.0f, 1}, 3);
    expect_always(logits, 5, (gpt_sampling){0.0f, 3, 0.9f, 0.1f, 1}, 3);
    expect_always(logits, 5, (gpt_sampling){1.0f, 1, 1.0f, 0.0f, 1}, 3);
    expect_always(logits, 5, (gpt_sampling){1.0f, 0, 1e-6f, 0.0f, 1}, 3);
    expect_always(logits, 5, (gpt_sampling){1.0f, 0, 1.0f, 1.0f, 1}, 3);
    expect_always(logits, 5, (gpt_sampling){1e-30f, 0, 1.0f, 0.0f, 1}, 3);
    expect_always(logits, 1, (gpt_sampling){1.0f, 0, 1.0f, 0.0f, 1}, 0);
    static const float far[] = {-3e38f, 1e4f, -1e4f, 3e38f, 0.0f};
    expect_always(far, 5, plain, 3);
    static const float last[] = {-3.0f, -2.0f, -1.0f};
    expect_always(last, 3, (gpt_sampling){0.0f, 0, 1.0f, 0.0f, 1}, 2);
}

/* A temperature without bound leaves no difference between tokens. */
static void test_hot(void) {
    static const float logits[] = {-50.0f, 3.0f, 80.0f};
    check_distribution(logits, 3, (gpt_sampling){1e30f, 0, 1.0f, 0.0f, 5}, DRAWS);
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
    for (int64_t i = 0; i < DRAWS; i++) {
        uint64_t position = 2 * (uint64_t)i;
        int a = draw(logits, 4, &s, position);
        by_position[4 * a + draw(logits, 4, &s, position + 1)]++;
        by_seed[4 * a + draw(logits, 4, &next, position)]++;
    }
    expect_distribution(by_position, p, 16, DRAWS);
    expect_distribution(by_seed, p, 16, DRAWS);
}

static void expect_refused(const float *logits, int V, const gpt_sampling *s, int status,
                           const char *word) {
    int32_t token = 77;
    int got = gpt_sample(logits, V, s, 0, &token);
    test.n_checks++;
    if (got != status) test_fail(__FILE__, __LINE__, "%s: status %d, want %d", word, got, status);
    if (!strstr(gpt_last_error(), word)) {
        test_fail(__FILE__, __LINE__, "'%s' does not say %s", gpt_last_error(), word);
    }
    EXPECT(token == 77);
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
    static const struct {
        gpt_sampling s;
        const char *word;
    } bad[] = {
        {{-1.0f, 0, 1.0f, 0.0f, 1}, "temperature"},
        {{NAN, 0, 1.0f, 0.0f, 1}, "temperature"},
        {{INFINITY, 0, 1.0f, 0.0f, 1}, "temperature"},
        {{1.0f, -1, 1.0f, 0.0f, 1}, "top_k"},
        {{1.0f, 0, -0.1f, 0.0f, 1}, "top_p"},
        {{1.0f, 0, 1.1f, 0.0f, 1}, "top_p"},
        {{1.0f, 0, NAN, 0.0f, 1}, "top_p"},
        {{1.0f, 0, 1.0f, -0.1f, 1}, "min_p"},
        {{1.0f, 0, 1.0f, 1.1f, 1}, "min_p"},
        {{1.0f, 0, 1.0f, NAN, 1}, "min_p"},
    };
    for (int i = 0; i < TEST_COUNT(bad); i++) {
        test_case("bad setting %d", i);
        expect_refused(logits, 3, &bad[i].s, GPT_ERR_ARGUMENT, bad[i].word);
    }
    test_case("bad arguments");
    expect_refused(logits, 0, &plain, GPT_ERR_ARGUMENT, "vocab_size");
    expect_refused(logits, -5, &plain, GPT_ERR_ARGUMENT, "vocab_size");
    expect_refused(NULL, 3, &plain, GPT_ERR_ARGUMENT, "NULL");
    expect_refused(logits, 3, NULL, GPT_ERR_ARGUMENT, "NULL");
    EXPECT(gpt_sample(logits, 3, &plain, 0, NULL) == GPT_ERR_ARGUMENT);
}

TEST_API_MAIN({"distribution", test_distribution}, {"wide", test_wide},
              {"equal logits", test_equal_logits}, {"most likely", test_most_likely},
              {"hot", test_hot}, {"repeatable", test_repeatable}, {"independent", test_independent},
              {"not finite", test_not_finite}, {"refusals", test_refusals})
