/* Sequences of several adapters in one step of a session: each has the bits that it has where all sequences have
 * its adapter, whatever its neighbours have. */
#include "testing.h"

#include "adapters.h"

enum { N_SEQ = 5, N_SETS = 3, N_STEPS = 5, MOST = 12, NONE = N_SETS };

/* Which numbers each sequence has: sets 0 and 1 are copies, set 2 is in the model's own parameters. */
static const int set_of[N_SEQ] = {0, 2, 1, NONE, 0};
/* A first step of several tokens, whose rows of an adapter are at odd places; then one each. */
static const int counts[N_STEPS][N_SEQ] = {
    {3, 2, 1, 5, 1}, {1, 1, 1, 1, 1}, {1, 1, 1, 1, 1}, {1, 1, 1, 1, 1}, {0, 1, 2, 0, 3}};

typedef struct run {
    int n;
    float *logits; /* (n, V) */
} run;

/* The logits after each token of all steps. */
static run run_steps(gpt_model *m, const gpt_config *c, const gpt_adapter *const *adapters,
                     const int32_t *tokens) {
    gpt_session *s;
    run out = {0, host_floats((int64_t)N_STEPS * MOST * c->vocab_size)};
    uint8_t all[MOST];
    memset(all, 1, sizeof all);
    EXPECT_OK(gpt_session_create(m, N_SEQ, 0, GPT_KV_ACTIVATIONS, &s));
    for (int seq = 0; adapters && seq < N_SEQ; seq++)
        EXPECT_OK(gpt_session_adapt(s, seq, adapters[seq]));
    for (int step = 0; step < N_STEPS; step++) {
        int32_t seqs[MOST], n = 0;
        for (int seq = 0; seq < N_SEQ; seq++)
            for (int k = 0; k < counts[step][seq]; k++) seqs[n++] = seq;
        float *to = out.logits + (int64_t)out.n * c->vocab_size;
        EXPECT_OK(gpt_session_decode(s, tokens + out.n, seqs, all, n, to));
        out.n += n;
    }
    gpt_session_free(s);
    return out;
}

/* The logits of the sequences that have set `set` are the same bits. */
static void expect_same_rows(const gpt_config *c, const run *got, const run *want, int set) {
    size_t bytes = sizeof(float) * (size_t)c->vocab_size;
    for (int step = 0, row = 0; step < N_STEPS; step++)
        for (int seq = 0; seq < N_SEQ; row += counts[step][seq++])
            for (int k = 0; set_of[seq] == set && k < counts[step][seq]; k++) {
                int64_t at = (int64_t)(row + k) * c->vocab_size;
                EXPECT(!memcmp(got->logits + at, want->logits + at, bytes));
            }
}

static void check_mixed(const family *f, gpt_lora lora) {
    const gpt_config *c = &f->config;
    test_case("%s, targets %d%s", f->name, lora.targets, lora.dora ? ", DoRA" : "");
    param_set params = random_params(c);
    int32_t *tokens = random_ints((int64_t)N_STEPS * MOST, c->vocab_size);
    adapters sets[N_SETS];
    gpt_model *m = adapted_model(c, lora, 0, 0, 0);
    gpt_model *plain = adapted_model(c, (gpt_lora){0}, 0, 0, 0);
    gpt_adapter *copies[N_SETS + 1] = {NULL};
    write_params(m, &params, GPT_TENSOR_VALUE);
    write_params(plain, &params, GPT_TENSOR_VALUE);
    run want[N_SETS + 1];
    for (int k = 0; k < N_SETS; k++) {
        sets[k] = random_adapters(c, &lora);
        write_adapters(m, &sets[k]);
        want[k] = run_steps(m, c, NULL, tokens);
        if (k < N_SETS - 1) EXPECT_OK(gpt_adapter_create(m, 0, &copies[k]));
    }
    EXPECT_OK(gpt_adapter_create(m, 1, &copies[NONE]));
    want[NONE] = run_steps(plain, c, NULL, tokens);

    const gpt_adapter *given[N_SEQ], *alike[N_SEQ];
    for (int seq = 0; seq < N_SEQ; seq++) given[seq] = copies[set_of[seq]];
    run mixed = run_steps(m, c, given, tokens);
    for (int k = 0; k < N_SETS; k++) expect_same_rows(c, &mixed, &want[k], k);
    for (int k = 0; k <= N_SETS; k++) {
        for (int seq = 0; seq < N_SEQ; seq++) alike[seq] = copies[k];
        run one = run_steps(m, c, alike, tokens);
        if (k < N_SETS)
            EXPECT(!memcmp(one.logits, want[k].logits,
                           sizeof(float) * (size_t)(one.n * c->vocab_size)));
        else
            expect_same_rows(c, &mixed, &one, NONE);
    }
    int64_t n = (int64_t)mixed.n * c->vocab_size;
    run bare = run_steps(m, c, alike, tokens);
    EXPECT_CLOSE("none", doubles_of(bare.logits, n), doubles_of(want[NONE].logits, n), mixed.n,
                 c->vocab_size, test_tols(1e-6, 0.02));
    for (int k = 0; k <= N_SETS; k++) gpt_adapter_free(copies[k]);
    gpt_model_free(m);
    gpt_model_free(plain);
}

static void test_mixed(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            gpt_lora lora = lora_of(&families[f].config, f % 3, 0);
            check_mixed(&families[f], lora);
            lora.dora = 1;
            if (f % 3 == 1) check_mixed(&families[f], lora);
        }
    }
}

/* A sequence may get another adapter: its cache stays, and its next tokens are computed with that. */
static void test_changed(void) {
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        test_case("changed");
        gpt_lora lora = lora_of(c, 0, 0);
        param_set params = random_params(c);
        int32_t *tokens = random_ints(T, c->vocab_size), seqs[T] = {0};
        float *logits[2] = {host_floats(c->vocab_size), host_floats(c->vocab_size)};
        gpt_model *m = adapted_model(c, lora, 0, 0, 0);
        adapters set = random_adapters(c, &lora);
        gpt_adapter *none, *copy;
        gpt_session *s;
        write_params(m, &params, GPT_TENSOR_VALUE);
        write_adapters(m, &set);
        EXPECT_OK(gpt_adapter_create(m, 0, &copy));
        EXPECT_OK(gpt_adapter_create(m, 1, &none));
        EXPECT_OK(gpt_session_create(m, 1, 0, GPT_KV_ACTIVATIONS, &s));
        for (int k = 0; k < 2; k++) {
            EXPECT_OK(gpt_session_adapt(s, 0, none));
            EXPECT_OK(gpt_session_rewind(s, 0, 0));
            EXPECT_OK(gpt_session_decode(s, tokens, seqs, NULL, T - 1, logits[k]));
            EXPECT_OK(gpt_session_adapt(s, 0, k ? copy : NULL));
            EXPECT_OK(gpt_session_decode(s, tokens + T - 1, seqs, NULL, 1, logits[k]));
        }
        EXPECT(!memcmp(logits[0], logits[1], sizeof(float) * (size_t)c->vocab_size));
        EXPECT_OK(gpt_session_rewind(s, 0, T - 1));
        EXPECT_OK(gpt_session_adapt(s, 0, none));
        EXPECT_OK(gpt_session_decode(s, tokens + T - 1, seqs, NULL, 1, logits[1]));
        EXPECT(memcmp(logits[0], logits[1], sizeof(float) * (size_t)c->vocab_size));
        gpt_session_free(s);
        gpt_adapter_free(none);
        gpt_adapter_free(copy);
        gpt_model_free(m);
    }
}

static void expect_refused(int status, const char *word) {
    EXPECT(status == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), word));
}

static void test_refused(void) {
    test_case("refused");
    const gpt_config *c = &families[0].config;
    gpt_lora lora = lora_of(c, 0, 0);
    place.options = (gpt_options){.n_threads = 1};
    gpt_model *m = adapted_model(c, lora, 0, 0, 0), *other = adapted_model(c, lora, 0, 0, 0);
    gpt_model *plain = adapted_model(c, (gpt_lora){0}, 0, 0, 0);
    gpt_adapter *a = NULL;
    gpt_session *s;
    EXPECT_OK(gpt_session_create(m, 2, 4, GPT_KV_ACTIVATIONS, &s));
    expect_refused(gpt_adapter_create(NULL, 0, &a), "NULL");
    expect_refused(gpt_adapter_create(m, 0, NULL), "NULL");
    expect_refused(gpt_adapter_create(m, 2, &a), "none is 2");
    expect_refused(gpt_adapter_create(plain, 0, &a), "has no adapters");
    EXPECT_OK(gpt_adapter_create(other, 0, &a));
    expect_refused(gpt_session_adapt(s, 0, a), "another model");
    expect_refused(gpt_session_adapt(NULL, 0, a), "NULL");
    expect_refused(gpt_session_adapt(s, 2, NULL), "sequence 2");
    expect_refused(gpt_session_adapt(s, -1, NULL), "sequence -1");
    gpt_adapter_free(NULL);
    gpt_adapter_free(a);
    gpt_session_free(s);
    gpt_model_free(plain);
    gpt_model_free(other);
    gpt_model_free(m);
}

TEST_API_MAIN({"mixed", test_mixed}, {"changed", test_changed}, {"refused", test_refused})
