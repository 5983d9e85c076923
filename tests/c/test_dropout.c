/* dropout_apply, and the bits that every dropout shares. */
#include "testing.h"

#include "reference.h"

static gpt_shape shape_of(int64_t n) {
    return (gpt_shape){.N = (int32_t)n,
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
                       .n_params = 1};
}

static void check_values(int64_t n, gpt_dropout_site site) {
    gpt_dropout dropout = dropout_at(site);
    test_case("n=%lld p=%g", (long long)n, dropout.p);
    double *x = random_act(n, 1.0), *want = host_copy(x, n);
    for (int64_t i = 0; i < n; i++) want[i] *= dropout_factor(dropout, (uint64_t)i);
    gpt_shape shape = shape_of(n);
    EACH_BACKEND {
        void *device = device_act(x, n);
        test_workspace(&shape);
        test.ops->dropout_apply(
            test.ctx, &(dropout_apply){.x = device, .dropout = device_dropout(site), .n = n});
        double *got = read_act(device, n);
        EXPECT_CLOSE("x", got, want, 1, n, test_tol(2e-7));
        for (int64_t k = 0; k < n; k++) {
            if ((got[k] == 0.0) == (want[k] == 0.0)) continue;
            EXPECT(!"an element was dropped that should not be, or the reverse");
            break;
        }
        if (dropout.p == 0.0f) EXPECT_SAME("p = 0", got, x, n);
    }
}

static void test_values(void) {
    static const int64_t sizes[] = {1, 3, 65, 127, 1000, 70001};
    static const float probabilities[] = {0.0f, 0.1f, 0.5f, 0.9f};
    for (int i = 0; i < TEST_COUNT(sizes); i++) {
        for (int k = 0; k < TEST_COUNT(probabilities); k++) {
            check_values(sizes[i], host_dropout(probabilities[k], (uint64_t)i));
        }
    }
}

/* n times a frequency that should be p; six standard deviations happen once in 5e8. */
static void check_frequency(const char *what, double count, double n, double p) {
    EXPECT_NEAR(what, count / n, p, 6.0 * sqrt(p * (1.0 - p) / n));
}

static void test_frequency(void) {
    enum { n = 200000 };
    static const float probabilities[] = {0.01f, 0.1f, 0.5f, 0.9f};
    static const uint64_t keys[] = {0, 1, 2, 0x9e3779b97f4a7c15ull, 0xffffffffffffffffull};
    for (int k = 0; k < TEST_COUNT(probabilities) * TEST_COUNT(keys); k++) {
        gpt_dropout dropout = {probabilities[k / TEST_COUNT(keys)], keys[k % TEST_COUNT(keys)]};
        test_case("p=%g key=%llx", dropout.p, (unsigned long long)dropout.key);
        double dropped = 0, sum = 0;
        for (uint64_t i = 0; i < n; i++) {
            float factor = dropout_factor(dropout, i);
            dropped += factor == 0.0f;
            sum += factor;
        }
        check_frequency("dropped", dropped, n, dropout.p);
        double spread = sqrt(dropout.p / (1.0 - dropout.p) / n);
        EXPECT_NEAR("mean factor", sum / n, 1.0, 6.0 * spread);
    }
}

/* How often elements i and i + lag are both dropped, and i under two keys. */
static void test_independence(void) {
    enum { n = 200000 };
    static const uint64_t lags[] = {1, 2, 64, 128, 1024, 1ull << 32};
    gpt_dropout one = {0.3f, 77}, two = {0.3f, 78};
    for (int k = 0; k < TEST_COUNT(lags); k++) {
        test_case("lag=%llu", (unsigned long long)lags[k]);
        double both = 0;
        for (uint64_t i = 0; i < n; i++) {
            both += dropout_factor(one, i) == 0.0f && dropout_factor(one, i + lags[k]) == 0.0f;
        }
        check_frequency("both dropped", both, n, 0.09);
    }
    test_case("two keys");
    double both = 0;
    for (uint64_t i = 0; i < n; i++) {
        both += dropout_factor(one, i) == 0.0f && dropout_factor(two, i) == 0.0f;
    }
    check_frequency("both dropped", both, n, 0.09);
}

/* Sites of a step share no decisions, and the same site has others in the next step. */
static void test_sites(void) {
    enum { n = 200000 };
    static const uint64_t steps[] = {5, 6};
    gpt_dropout one = dropout_at((gpt_dropout_site){.p = 0.3f, .site = 1, .key = &steps[0]});
    gpt_dropout others[] = {dropout_at((gpt_dropout_site){.p = 0.3f, .site = 2, .key = &steps[0]}),
                            dropout_at((gpt_dropout_site){.p = 0.3f, .site = 1, .key = &steps[1]})};
    for (int k = 0; k < 2; k++) {
        test_case(k ? "two steps" : "two sites");
        double both = 0;
        for (uint64_t i = 0; i < n; i++) {
            both += dropout_factor(one, i) == 0.0f && dropout_factor(others[k], i) == 0.0f;
        }
        check_frequency("both dropped", both, n, 0.09);
    }
}

static void test_no_dropout(void) {
    for (uint64_t i = 0; i < 10000; i++) EXPECT(dropout_factor((gpt_dropout){0.0f, 5}, i) == 1.0f);
}

TEST_OPS_MAIN({"values", test_values}, {"frequency", test_frequency},
              {"independence", test_independence}, {"sites", test_sites},
              {"no dropout", test_no_dropout})
