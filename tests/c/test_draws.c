/* The op `sample` on every backend: the tokens of gpt_sample, which test_sample compares with the exact
 * distribution, and the log-probabilities of gpt_logprobs. */
#include "testing.h"

#include "error.h"
#include "reference.h"
#include "sample.h"

enum { MOST_ROWS = 20, MOST_HISTORY = 50, MOST_BIAS = 9 };

typedef enum kind { NORMAL, TIED, EQUAL, STEEP, N_KINDS } kind;

static float logit_of(kind kind) {
    switch (kind) {
    case NORMAL:
        return (float)(2.5 * random_normal() - 3);
    case TIED:
        return (float)random_below(7) * 0.5f;
    case STEEP:
        return (float)(60 * random_normal());
    default:
        return -0.25f;
    }
}

static float one_of(const float *values, int n) {
    return values[random_below(n)];
}
#define ONE_OF(...)                                                                                \
    one_of((const float[]){__VA_ARGS__}, (int)(sizeof(float[]){__VA_ARGS__} / sizeof(float)))

/* Any mixture of settings; with `plain` nothing but a temperature. */
static gpt_draw random_draw(int V, int plain) {
    gpt_draw d = {.sampling = {.repetition_penalty = 1,
                               .temperature = ONE_OF(0, 0.01f, 0.7f, 1, 3, 1e30f),
                               .typical_p = 1,
                               .top_p = 1,
                               .seed = random_bits()},
                  .position = random_bits(),
                  .vocab_size = random_below(3) ? V : 1 + random_below(V),
                  .n_top = random_below(2) ? -1 : random_below(GPT_MAX_TOP + 1)};
    if (d.n_top > d.vocab_size) d.n_top = d.vocab_size;
    if (plain) return d;
    if (random_below(2)) d.sampling.top_k = 1 + random_below(random_below(2) ? V : 20);
    if (!random_below(3)) d.sampling.typical_p = ONE_OF(0.05f, 0.5f, 0.95f);
    if (random_below(2)) d.sampling.top_p = ONE_OF(1e-6f, 0.3f, 0.9f, 0.999f);
    if (random_below(2)) d.sampling.min_p = ONE_OF(0.001f, 0.05f, 0.6f, 1);
    if (random_below(2)) {
        gpt_bias *bias = (gpt_bias *)host_ints(2 * MOST_BIAS);
        d.sampling.n_bias = random_below(MOST_BIAS + 1);
        for (int i = 0; i < d.sampling.n_bias; i++)
            bias[i] = (gpt_bias){random_below(d.vocab_size), ONE_OF(-1e9f, -2, 0.3f, 2)};
        d.sampling.bias = bias;
    }
    if (random_below(2)) {
        d.history = random_ints(MOST_HISTORY, V + 1); /* some of them do not exist */
        d.n_history = random_below(MOST_HISTORY + 1);
        d.sampling.repetition_penalty = ONE_OF(0.9f, 1, 1.3f);
        d.sampling.presence_penalty = ONE_OF(0, 0.2f);
        d.sampling.frequency_penalty = ONE_OF(0, 0.15f);
    }
    return d;
}

static void *upload(const void *host, size_t bytes) {
    void *device = test_device_alloc(bytes ? bytes : 1, TEST_GARBAGE);
    test.ops->upload(test.ctx, device, host, bytes);
    return device;
}

/* Draws of N rows; logits (N, stride). */
static void run(sample_result *results, const float *logits, const gpt_draw *draws, int N, int V,
                int stride) {
    sample_row rows[MOST_ROWS];
    sample_adjustment list[MOST_ROWS * (MOST_BIAS + MOST_HISTORY)];
    int32_t n = 0, *marks = host_ints(V);
    gpt_shape shape = {.N = N,
                       .T = 1,
                       .n_draws = N,
                       .C = 1,
                       .V = V,
                       .Vp = stride,
                       .NH = 1,
                       .NKV = 1,
                       .HS = 1,
                       .F = 1};
    for (int i = 0; i < N; i++) {
        const gpt_draw *d = draws + i;
        sample_prepare(&rows[i], list, &n, marks, &d->sampling, d->vocab_size, d->history,
                       d->n_history, d->position);
        rows[i].n_top = d->n_top;
    }
    sample op = {.results = test_device_alloc(sizeof *results * (size_t)N, TEST_GARBAGE),
                 .logits = upload(logits, sizeof *logits * (size_t)N * (size_t)stride),
                 .rows = upload(rows, sizeof *rows * (size_t)N),
                 .adjustments = upload(list, sizeof *list * (size_t)n),
                 .N = N,
                 .V = V,
                 .stride = stride};
    test_workspace(&shape);
    test.ops->sample(test.ctx, &op);
    EXPECT(test.ops->sync(test.ctx) == GPT_OK);
    test.ops->download(test.ctx, results, op.results, sizeof *results * (size_t)N);
}

static void expect_draw(const sample_result *r, const float *logits, const gpt_draw *d, int V) {
    int32_t token = -7, tops[GPT_MAX_TOP];
    float logprob, top_logprobs[GPT_MAX_TOP];
    int status = gpt_sample(logits, d->vocab_size, &d->sampling, d->history, d->n_history,
                            d->position, &token);
    if (status != GPT_OK) token = SAMPLE_NOTHING_LEFT; /* all of a few tokens are banned */
    test.n_checks++;
    if (r->token != token)
        test_fail(__FILE__, __LINE__,
                  "token %d, want %d: of %d, temperature %g top_k %d typical_p %g top_p %g min_p "
                  "%g, %d biases, %d in the history",
                  r->token, token, d->vocab_size, d->sampling.temperature, d->sampling.top_k,
                  d->sampling.typical_p, d->sampling.top_p, d->sampling.min_p, d->sampling.n_bias,
                  d->n_history);
    if (d->n_top < 0 || token < 0) return;
    EXPECT(gpt_logprobs(logits, V, token, &logprob, 0, NULL, NULL) == GPT_OK);
    EXPECT_NEAR("log-probability", r->logprob, logprob, 1e-5 * (1 + fabs(logprob)));
    EXPECT(gpt_logprobs(logits, d->vocab_size, 0, NULL, d->n_top, tops, top_logprobs) == GPT_OK);
    for (int k = 0; k < d->n_top; k++) {
        EXPECT(r->top_tokens[k] == tops[k]);
        EXPECT(gpt_logprobs(logits, V, tops[k], &logprob, 0, NULL, NULL) == GPT_OK);
        EXPECT_NEAR("of the likeliest", r->top_logprobs[k], logprob, 1e-5 * (1 + fabs(logprob)));
    }
}

/* Odd sizes, and logits of every kind; the rows of a table that pads them hold garbage behind V. A row is
 * the same alone. */
static void test_draws(void) {
    static const int sizes[] = {1, 2, 31, 65, 257, 5003, 33001};
    for (int k = 0; k < N_KINDS; k++)
        for (int i = 0; i < TEST_COUNT(sizes); i++) {
            int V = sizes[i], N = V > 10000 ? 2 : V > 1000 ? 8 : MOST_ROWS, Vp = (V + 63) / 64 * 64;
            test_case("kind %d V=%d", k, V);
            gpt_draw draws[MOST_ROWS];
            float *logits = host_floats((int64_t)N * V), *padded = host_floats((int64_t)N * Vp);
            for (int64_t n = 0; n < (int64_t)N * V; n++) logits[n] = logit_of((kind)k);
            for (int n = 0; n < N; n++) draws[n] = random_draw(V, n % 4 == 0);
            memset(padded, TEST_GARBAGE, sizeof *padded * (size_t)N * (size_t)Vp);
            for (int n = 0; n < N; n++)
                memcpy(padded + (int64_t)n * Vp, logits + (int64_t)n * V,
                       sizeof *logits * (size_t)V);
            EACH_BACKEND {
                sample_result results[MOST_ROWS];
                int pads = test.ops->pads_logits;
                run(results, pads ? padded : logits, draws, N, V, pads ? Vp : V);
                for (int n = 0; n < N; n++)
                    expect_draw(results + n, logits + (int64_t)n * V, draws + n, V);
                sample_result alone;
                run(&alone, pads ? padded : logits, draws, 1, V, pads ? Vp : V);
                EXPECT(alone.token == results[0].token);
                if (draws[0].n_top >= 0 && alone.token >= 0)
                    EXPECT(alone.logprob == results[0].logprob);
            }
        }
}

/* What could not be drawn is said, and leaves the other rows alone. */
static void test_failures(void) {
    enum { V = 64, N = 5 };
    float logits[N * V];
    gpt_bias large[] = {{3, 3e38f}, {3, 3e38f}}, banned[V];
    gpt_draw draws[N];
    test_case("failures");
    for (int i = 0; i < V; i++) banned[i] = (gpt_bias){i, -INFINITY};
    for (int i = 0; i < N * V; i++) logits[i] = (float)random_normal();
    for (int n = 0; n < N; n++) {
        draws[n] = random_draw(V, 1);
        draws[n].vocab_size = V;
    }
    logits[1 * V + 17] = NAN;
    logits[2 * V + 63] = -INFINITY;
    draws[3].sampling.bias = large, draws[3].sampling.n_bias = 2;
    draws[4].sampling.bias = banned, draws[4].sampling.n_bias = V;
    EACH_BACKEND {
        sample_result results[N];
        run(results, logits, draws, N, V, V);
        expect_draw(results, logits, draws, V);
        EXPECT(results[1].token == SAMPLE_NOT_FINITE);
        EXPECT(results[2].token == SAMPLE_NOT_FINITE);
        EXPECT(results[3].token == SAMPLE_TOO_LARGE);
        EXPECT(results[4].token == SAMPLE_NOTHING_LEFT);
        EXPECT(sample_status(&results[1]) == GPT_ERR_NUMERIC);
        EXPECT(sample_status(&results[4]) == GPT_ERR_ARGUMENT);
    }
}

TEST_OPS_MAIN({"draws", test_draws}, {"failures", test_failures})
