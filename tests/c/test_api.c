/* gpt.h refuses wrong arguments with a sentence about them, and a refusal changes nothing. */
#include "testing.h"

#include "models.h"

#include <limits.h>
#include <pthread.h>

/* A failed call: its status, and a sentence that contains word. */
static void expect_failure(int status, int want, const char *word, const char *file, int line) {
    const char *message = gpt_last_error();
    test.n_checks++;
    if (status != want) {
        test_fail(file, line, "status %d, want %d ('%s')", status, want, message);
    } else if (!strstr(message, word)) {
        test_fail(file, line, "'%s' does not say '%s'", message, word);
    } else if (!message[0] || strchr(message, '\n')) {
        test_fail(file, line, "'%s' is not one line", message);
    }
}
#define EXPECT_FAILURE(call, status, word) expect_failure(call, status, word, __FILE__, __LINE__)
#define EXPECT_REFUSED(call, word)         EXPECT_FAILURE(call, GPT_ERR_ARGUMENT, word)

/* ---- library ---- */

static void test_library(void) {
    EXPECT(gpt_abi_version() == GPT_ABI_VERSION);
    EXPECT(gpt_version() && gpt_version()[0]);
    EXPECT(gpt_cpu_count() >= 1);
    EXPECT(gpt_cpu_level() && gpt_cpu_level()[0]);
    setenv("GPTC_CPU_LEVEL", "portable", 1);
    EXPECT(!strcmp(gpt_cpu_level(), "portable"));
    unsetenv("GPTC_CPU_LEVEL");
    gpt_model_free(NULL);
    gpt_session_free(NULL);
}

static void *fail_elsewhere(void *unused) {
    gpt_config config;
    EXPECT(gpt_last_error()[0] == '\0');
    EXPECT_REFUSED(gpt_config_preset("elsewhere", &config), "elsewhere");
    return unused;
}

/* Each thread has its own last error, "" before the first. */
static void test_last_error(void) {
    gpt_config config;
    pthread_t thread;
    EXPECT_REFUSED(gpt_config_preset("here", &config), "here");
    EXPECT(pthread_create(&thread, NULL, fail_elsewhere, NULL) == 0);
    pthread_join(thread, NULL);
    EXPECT(strstr(gpt_last_error(), "'here'"));
}

/* ---- configuration ---- */

static void test_presets(void) {
    int n = 0;
    for (; gpt_preset_name(n); n++) {
        gpt_config config;
        test_case("%s", gpt_preset_name(n));
        EXPECT_OK(gpt_config_preset(gpt_preset_name(n), &config));
        EXPECT_OK(gpt_config_check(&config));
        EXPECT(gpt_config_param_count(&config) > 0);
    }
    EXPECT(n > 0);
    EXPECT(gpt_preset_name(-1) == NULL && gpt_preset_name(n + 1) == NULL);
    gpt_config config, before;
    memset(&config, 7, sizeof config);
    before = config;
    EXPECT_REFUSED(gpt_config_preset("gpt7", &config), "gpt7");
    EXPECT_REFUSED(gpt_config_preset("", &config), "preset");
    EXPECT_REFUSED(gpt_config_preset(NULL, &config), "NULL");
    EXPECT_REFUSED(gpt_config_preset("tiny", NULL), "NULL");
    EXPECT(memcmp(&config, &before, sizeof config) == 0);
}

typedef struct bad_int {
    const char *field;
    size_t offset;
    int32_t value;
} bad_int;

#define INT_FIELD(field, value) {#field, offsetof(gpt_config, field), value}

static const bad_int bad_ints[] = {
    INT_FIELD(vocab_size, 0),
    INT_FIELD(vocab_size, -1),
    INT_FIELD(vocab_size, INT_MAX),
    INT_FIELD(block_size, 0),
    INT_FIELD(block_size, -7),
    INT_FIELD(block_size, INT_MAX),
    INT_FIELD(n_layer, 0),
    INT_FIELD(n_layer, INT_MIN),
    INT_FIELD(n_layer, INT_MAX),
    INT_FIELD(n_head, 0),
    INT_FIELD(n_head, -4),
    INT_FIELD(n_head, 5),
    INT_FIELD(n_head, 1000),
    INT_FIELD(n_kv_head, 0),
    INT_FIELD(n_kv_head, 3),
    INT_FIELD(n_kv_head, 8),
    INT_FIELD(n_kv_head, -2),
    INT_FIELD(n_embd, 0),
    INT_FIELD(n_embd, 26),
    INT_FIELD(n_embd, -24),
    INT_FIELD(n_embd, INT_MAX),
    INT_FIELD(n_ff, 0),
    INT_FIELD(n_ff, INT_MAX),
    INT_FIELD(norm, 2),
    INT_FIELD(norm, -1),
    INT_FIELD(norm_weight, 2),
    INT_FIELD(pos, 3),
    INT_FIELD(pos, -1),
    INT_FIELD(activation, GPT_ACT_NONE),
    INT_FIELD(activation, GPT_ACT_GEGLU + 1),
    INT_FIELD(bias, GPT_BIAS_ALL + 1),
    INT_FIELD(bias, -1),
    INT_FIELD(head_size, -1),
    INT_FIELD(head_size, 7),
    INT_FIELD(head_size, INT_MAX),
    INT_FIELD(tied, -1),
    INT_FIELD(rope_scaling, GPT_ROPE_LONGROPE + 1),
    INT_FIELD(rope_scaling, -1),
    INT_FIELD(qk_norm, 3),
    INT_FIELD(qk_norm, -1),
    INT_FIELD(window, -1),
    INT_FIELD(rope_dim, -2),
    INT_FIELD(rope_dim, 3),
    INT_FIELD(rope_dim, 4096),
    INT_FIELD(parallel, 2),
    INT_FIELD(norm_at, 3),
    INT_FIELD(score_by_layer, 2),
};

/* A config with one thing wrong: every function that takes a config names it, and says no more. */
static void check_bad_config(const gpt_config *config, const char *field) {
    gpt_options options = {.n_threads = 1};
    gpt_model *model = NULL;
    gpt_plan plan;
    gpt_param param;
    memset(&plan, 7, sizeof plan);
    gpt_plan before = plan;
    EXPECT_REFUSED(gpt_config_check(config), field);
    EXPECT_REFUSED(gpt_model_create(config, &options, &model), field);
    EXPECT_REFUSED(gpt_plan_memory(config, &options, &plan), field);
    EXPECT_REFUSED(gpt_config_param(config, 0, &param), field);
    EXPECT(model == NULL);
    EXPECT(memcmp(&plan, &before, sizeof plan) == 0);
}

static void test_config_ints(void) {
    for (int i = 0; i < TEST_COUNT(bad_ints); i++) {
        gpt_config config = families[1].config;
        test_case("%s = %d", bad_ints[i].field, bad_ints[i].value);
        memcpy((char *)&config + bad_ints[i].offset, &bad_ints[i].value, sizeof(int32_t));
        check_bad_config(&config, bad_ints[i].field);
    }
}

static void test_config_floats(void) {
    static const float eps[] = {-1e-5f, NAN, INFINITY}, theta[] = {0.0f, -10000.0f, NAN, INFINITY};
    for (int i = 0; i < TEST_COUNT(eps); i++) {
        gpt_config config = families[1].config;
        test_case("norm_eps = %g", eps[i]);
        config.norm_eps = eps[i];
        check_bad_config(&config, "norm_eps");
    }
    for (int i = 0; i < TEST_COUNT(theta); i++) {
        gpt_config config = families[1].config;
        test_case("rope_theta = %g", theta[i]);
        config.rope_theta = theta[i];
        check_bad_config(&config, "rope_theta");
        config.pos = GPT_POS_LEARNED; /* where it is not used, it is not looked at */
        EXPECT_OK(gpt_config_check(&config));
    }
}

static void test_config_rope_scaling(void) {
    static const float factors[] = {0.0f, 0.99f, -8.0f, NAN, INFINITY};
    static const float highs[] = {0.0f, 1.0f, -4.0f, NAN, INFINITY};
    static const int32_t originals[] = {0, -1, INT_MAX};
    gpt_config good = families[1].config, config;
    good.rope_scaling = GPT_ROPE_LLAMA3, good.rope_factor = 8, good.rope_original = 32;
    good.rope_low_freq = 1, good.rope_high_freq = 4;
    test_case("rope scaling");
    EXPECT_OK(gpt_config_check(&good));
    for (int i = 0; i < TEST_COUNT(factors); i++) {
        config = good, config.rope_factor = factors[i], check_bad_config(&config, "rope_factor");
        config = good, config.rope_high_freq = highs[i];
        check_bad_config(&config, "rope_high_freq");
    }
    config = good, config.rope_low_freq = 0, check_bad_config(&config, "rope_low_freq");
    for (int i = 0; i < TEST_COUNT(originals); i++) {
        config = good, config.rope_original = originals[i];
        check_bad_config(&config, "rope_original");
        config.rope_scaling = GPT_ROPE_DYNAMIC, check_bad_config(&config, "rope_original");
        config.rope_scaling = GPT_ROPE_LINEAR; /* where it is not used, it is not looked at */
        EXPECT_OK(gpt_config_check(&config));
    }
    good.rope_scaling = GPT_ROPE_YARN;
    for (int i = 1; i < TEST_COUNT(factors); i++) {
        if (factors[i] > 0 && factors[i] < INFINITY) continue;
        config = good, config.rope_attention = factors[i];
        check_bad_config(&config, "rope_attention");
    }
    config = good, config.n_head = 12, config.n_kv_head = 12, config.head_size = 2;
    EXPECT_OK(gpt_config_check(&config));
    config.rope_scaling = GPT_ROPE_DYNAMIC, check_bad_config(&config, "rope_scaling");
    config = good, config.pos = GPT_POS_LEARNED, check_bad_config(&config, "rope_scaling");
}

static void test_config_longrope(void) {
    static const float numbers[] = {0.0f, -8.0f, NAN, INFINITY};
    float divisors[2 * 12];
    gpt_config good = families[1].config, config;
    for (int i = 0; i < TEST_COUNT(divisors); i++) divisors[i] = 1.0f + (float)i;
    good.rope_scaling = GPT_ROPE_LONGROPE, good.rope_original = 32, good.rope_attention = 1.5f;
    good.rope_divisors = divisors;
    test_case("longrope");
    EXPECT_OK(gpt_config_check(&good));
    config = good, config.rope_divisors = NULL, check_bad_config(&config, "rope_divisors");
    config = good, config.rope_original = 0, check_bad_config(&config, "rope_original");
    config = good, config.pos = GPT_POS_LEARNED, check_bad_config(&config, "rope_scaling");
    for (int i = 0; i < TEST_COUNT(numbers); i++) {
        config = good, config.rope_attention = numbers[i];
        check_bad_config(&config, "rope_attention");
        divisors[5] = numbers[i], check_bad_config(&good, "number 5 of rope_divisors");
    }
}

/* Fields that are right one by one and contradict each other. */
static void test_config_contradictions(void) {
    gpt_config config = families[1].config;
    test_case("odd head size");
    config.n_embd = 20; /* four heads of 5 */
    check_bad_config(&config, "head");
    config.pos = GPT_POS_LEARNED;
    EXPECT_OK(gpt_config_check(&config));
    config = families[1].config;
    test_case("rope_wide with grouped queries");
    config.pos = GPT_POS_ROPE_WIDE;
    check_bad_config(&config, "n_kv_head");
    test_case("NULL");
    check_bad_config(NULL, "NULL");
}

static void test_param_table(void) {
    for (int f = 0; f < TEST_COUNT(families); f++) {
        const gpt_config *c = &families[f].config;
        int n = gpt_config_param_count(c);
        gpt_param p, other;
        test_case("%s", families[f].name);
        for (int i = 0; i < n; i++) {
            EXPECT_OK(gpt_config_param(c, i, &p));
            EXPECT(p.name[0] && strlen(p.name) < sizeof p.name);
            EXPECT(p.n_dim == 2 || (p.n_dim == 1 && p.shape[1] == 1));
            EXPECT(p.size == p.shape[0] * p.shape[1] && p.size > 0);
            EXPECT(p.decay == (p.n_dim == 2));
            for (int k = 0; k < i; k++) {
                EXPECT_OK(gpt_config_param(c, k, &other));
                EXPECT(strcmp(p.name, other.name) != 0);
            }
        }
        EXPECT_REFUSED(gpt_config_param(c, -1, &p), "-1");
        EXPECT_REFUSED(gpt_config_param(c, n, &p), "parameter");
        EXPECT_REFUSED(gpt_config_param(c, 0, NULL), "NULL");
    }
}

/* ---- options ---- */

static void check_bad_options(gpt_options options, int status, const char *word) {
    const gpt_config *c = &families[0].config;
    gpt_model *model = NULL;
    gpt_plan plan;
    EXPECT_FAILURE(gpt_model_create(c, &options, &model), status, word);
    EXPECT_FAILURE(gpt_plan_memory(c, &options, &plan), status, word);
    EXPECT(model == NULL);
}

static void test_options(void) {
    const gpt_options good = {.n_threads = 1, .max_batch = 2, .max_seq = 8};
    static const float dropouts[] = {-0.1f, 1.0f, NAN, INFINITY};
    gpt_options o = good;
    test_case("bad options");
    o.max_seq = families[0].config.block_size + 1,
    check_bad_options(o, GPT_ERR_ARGUMENT, "max_seq");
    o.max_seq = -1, check_bad_options(o, GPT_ERR_ARGUMENT, "max_seq");
    o = good, o.max_batch = -1, check_bad_options(o, GPT_ERR_ARGUMENT, "max_batch");
    o.max_batch = INT_MAX, check_bad_options(o, GPT_ERR_ARGUMENT, "max_batch");
    o = good, o.n_threads = -1, check_bad_options(o, GPT_ERR_ARGUMENT, "n_threads");
    o.n_threads = 1000000, check_bad_options(o, GPT_ERR_ARGUMENT, "n_threads");
    o = good, o.device = 7, check_bad_options(o, GPT_ERR_ARGUMENT, "device");
    o = good, o.dtype = 9, check_bad_options(o, GPT_ERR_ARGUMENT, "dtype");
    for (int i = 0; i < TEST_COUNT(dropouts); i++) {
        o = good, o.dropout = dropouts[i], check_bad_options(o, GPT_ERR_ARGUMENT, "dropout");
    }
    gpt_model *model = NULL;
    EXPECT_REFUSED(gpt_model_create(&families[0].config, NULL, &model), "NULL");
    EXPECT_REFUSED(gpt_model_create(&families[0].config, &good, NULL), "NULL");
    EXPECT_REFUSED(gpt_plan_memory(&families[0].config, &good, NULL), "NULL");
}

/* Where there is no GPU, asking for one fails with a sentence about it. */
static void test_cuda(void) {
    gpt_options options = {.device = GPT_DEVICE_CUDA, .max_batch = 1};
    gpt_model *model = NULL;
    int status = gpt_model_create(&families[0].config, &options, &model);
    if (status == GPT_OK) {
        gpt_model_free(model);
        return;
    }
    EXPECT_FAILURE(status, GPT_ERR_DEVICE, "CUDA");
    EXPECT(model == NULL);
}

static void test_threads(void) {
    for (int n = 0; n <= 3; n++) {
        gpt_options options = {.n_threads = n};
        gpt_model *model = NULL;
        EXPECT_OK(gpt_model_create(&families[0].config, &options, &model));
        EXPECT(gpt_model_threads(model) == (n ? n : gpt_cpu_count()));
        gpt_model_free(model);
    }
}

/* The largest model that a configuration can describe is larger than any address space. */
static void test_too_large(void) {
    gpt_config c = {1 << 24,
                    1,
                    4096,
                    1,
                    1,
                    65536,
                    524288,
                    GPT_NORM_LAYERNORM,
                    1,
                    GPT_POS_LEARNED,
                    GPT_ACT_GELU,
                    1,
                    0,
                    1e-5f,
                    0.0f,
                    NO_SCALING};
    gpt_options options = {.n_threads = 1, .training = 1, .max_batch = 1};
    gpt_model *model = NULL;
    gpt_plan plan = {0};
    EXPECT_OK(gpt_plan_memory(&c, &options, &plan));
    EXPECT(plan.total_bytes > 1ull << 47);
    EXPECT(plan.total_bytes >= 16 * (uint64_t)plan.n_params);
    EXPECT_FAILURE(gpt_model_create(&c, &options, &model), GPT_ERR_MEMORY, "memory");
    EXPECT(model == NULL);
}

/* Layers that contradict their model, or themselves, are named. */
static void test_layers(void) {
    static const struct {
        gpt_layer layer;
        int pos;
        const char *field;
    } wrong[] = {
        {{2, 1, 100.0f, 0}, GPT_POS_ROPE, "norm of layer 1"},
        {{-1, 1, 100.0f, 0}, GPT_POS_ROPE, "norm of layer 1"},
        {{0, 2, 100.0f, 0}, GPT_POS_ROPE, "rope of layer 1"},
        {{0, 1, 100.0f, 0}, GPT_POS_LEARNED, "layer 1 has rope"},
        {{0, 1, 1.0f, 0}, GPT_POS_ROPE, "rope_theta of layer 1"},
        {{0, 1, NAN, 0}, GPT_POS_ROPE, "rope_theta of layer 1"},
        {{0, 0, 0.0f, -1}, GPT_POS_ROPE, "window of layer 1"},
    };
    for (int i = 0; i < TEST_COUNT(wrong); i++) {
        test_case("case %d", i);
        gpt_config c = families[1].config;
        gpt_layer layers[2] = {{GPT_NORM_RMSNORM, 0, 0.0f, 0}, wrong[i].layer};
        c.pos = wrong[i].pos;
        c.layers = layers;
        check_bad_config(&c, wrong[i].field);
    }
    gpt_layer layer = {0};
    EXPECT_OK(gpt_config_layer(&families[1].config, 1, &layer));
    EXPECT(layer.norm == GPT_NORM_RMSNORM && layer.rope == 1 && layer.rope_theta == 10000.0f);
    EXPECT(layer.window == 0);
    EXPECT_REFUSED(gpt_config_layer(&families[1].config, 2, &layer), "layer 2");
    EXPECT_REFUSED(gpt_config_layer(&families[1].config, -1, &layer), "layer -1");
}

/* ---- a model that must survive ---- */

enum { B = 2, T = 6, N_SEQ = 3, N_CTX = 8 };

/* A model in the middle of training, with a session in the middle of a text, and what they held
 * when they were made. */
typedef struct fixture {
    const gpt_config *c;
    gpt_model *model;
    gpt_session *session;
    int32_t *tokens, *targets;
    param_set params[4];
    double *logits;
    float grad_norm;
} fixture;

static double *logits_of(const fixture *f) {
    int64_t n = (int64_t)B * T * f->c->vocab_size;
    float *logits = host_floats(n);
    EXPECT_OK(gpt_model_logits(f->model, f->tokens, B, T, logits));
    return doubles_of(logits, n);
}

static fixture new_fixture(const char *what) {
    test_case("%s", what);
    fixture f = {.c = &families[1].config};
    gpt_options options = {.n_threads = 2, .training = 1, .max_batch = B, .max_seq = T};
    EXPECT_OK(gpt_model_create(f.c, &options, &f.model));
    EXPECT_OK(gpt_model_init(f.model, 1));
    f.tokens = random_ints(B * T, f.c->vocab_size);
    f.targets = random_ints(B * T, f.c->vocab_size);
    float loss, *logits = host_floats((int64_t)N_SEQ * f.c->vocab_size);
    for (int i = 0; i < 2; i++) {
        EXPECT_OK(gpt_model_backward(f.model, f.tokens, f.targets, B, T, 1.0f, &loss));
        EXPECT_OK(update_adamw(f.model, &adamw, NULL, &f.grad_norm));
    }
    EXPECT_OK(gpt_model_backward(f.model, f.tokens, f.targets, B, T, 1.0f, &loss));
    EXPECT_OK(gpt_session_create(f.model, N_SEQ, N_CTX, GPT_KV_ACTIVATIONS, &f.session));
    static const int32_t seqs[] = {2, 2, 2, 0};
    EXPECT_OK(gpt_session_decode(f.session, f.tokens, seqs, NULL, 4, logits));
    for (int i = 0; i < 4; i++) f.params[i] = read_params(f.model, f.c, i);
    f.logits = logits_of(&f);
    return f;
}

/* Everything that can be read is what it was. */
static void expect_unchanged(const fixture *f) {
    for (int i = 0; i < 4; i++) {
        param_set now = read_params(f->model, f->c, i);
        EXPECT(same_params(&now, &f->params[i]));
    }
    EXPECT(gpt_model_step(f->model) == 2);
    EXPECT(gpt_session_length(f->session, 0) == 1);
    EXPECT(gpt_session_length(f->session, 1) == 0);
    EXPECT(gpt_session_length(f->session, 2) == 3);
    EXPECT_SAME("logits", logits_of(f), f->logits, (int64_t)B * T * f->c->vocab_size);
}

/* And it still works: the text continues as the first sequence of the batch does, and the gradients
 * that were waiting are applied. */
static void free_fixture(fixture *f) {
    int V = f->c->vocab_size;
    expect_unchanged(f);
    float *logits = host_floats(V), norm = NAN, loss = NAN;
    static const int32_t seqs[] = {2, 2};
    EXPECT_OK(gpt_session_decode(f->session, f->tokens + 3, seqs, NULL, 2, logits));
    EXPECT_CLOSE("logits after refusals", doubles_of(logits, V), f->logits + 4 * V, 1, V, 2e-5);
    EXPECT_OK(update_adamw(f->model, &adamw, NULL, &norm));
    EXPECT(isfinite(norm) && norm > 0.0f);
    EXPECT(gpt_model_step(f->model) == 3);
    EXPECT_OK(gpt_model_backward(f->model, f->tokens, f->targets, B, T, 1.0f, &loss));
    EXPECT(isfinite(loss));
    gpt_session_free(f->session);
    gpt_model_free(f->model);
}

/* The three calls that take a batch refuse the same ones, and write no result. */
static void refuse_batch(const fixture *f, const int32_t *tokens, const int32_t *targets, int b,
                         int t, int only_targets, const char *word) {
    float loss = 77.0f, losses[B * T], *logits = host_floats((int64_t)B * T * f->c->vocab_size);
    losses[0] = logits[0] = 77.0f;
    if (!only_targets) EXPECT_REFUSED(gpt_model_logits(f->model, tokens, b, t, logits), word);
    EXPECT_REFUSED(gpt_model_loss(f->model, tokens, targets, b, t, &loss, losses), word);
    EXPECT_REFUSED(gpt_model_backward(f->model, tokens, targets, b, t, 1.0f, &loss), word);
    EXPECT(loss == 77.0f && losses[0] == 77.0f && logits[0] == 77.0f);
}

/* Tokens and targets outside of the vocabulary, at each position; the message names it. */
static void test_tokens(void) {
    fixture f = new_fixture("tokens out of range");
    const int32_t V = f.c->vocab_size, bad[] = {-1, V, V + 60, INT_MAX, INT_MIN, -2};
    for (int i = 0; i < B * T; i++) {
        int32_t tokens[B * T], value = bad[i % TEST_COUNT(bad)];
        char token_name[32], target_name[32], value_name[32];
        memcpy(tokens, f.tokens, sizeof tokens);
        tokens[i] = value;
        snprintf(token_name, sizeof token_name, "token %d", i);
        snprintf(target_name, sizeof target_name, "target %d", i);
        snprintf(value_name, sizeof value_name, "%d", value);
        refuse_batch(&f, tokens, f.targets, B, T, 0, token_name);
        refuse_batch(&f, tokens, f.targets, B, T, 0, value_name);
        if (value == -1) continue; /* as a target: to be ignored */
        refuse_batch(&f, f.tokens, tokens, B, T, 1, target_name);
        refuse_batch(&f, f.tokens, tokens, B, T, 1, value_name);
    }
    free_fixture(&f);
}

static void test_batch_sizes(void) {
    static const int sizes[][2] = {{0, T}, {-1, T}, {B + 1, T}, {INT_MAX, T}};
    fixture f = new_fixture("batch sizes");
    for (int i = 0; i < TEST_COUNT(sizes); i++) {
        refuse_batch(&f, f.tokens, f.targets, sizes[i][0], sizes[i][1], 0, "batch");
    }
    static const int lengths[] = {0, -1, T + 1, INT_MAX};
    for (int i = 0; i < TEST_COUNT(lengths); i++) {
        refuse_batch(&f, f.tokens, f.targets, B, lengths[i], 0, "length");
    }
    refuse_batch(&f, NULL, f.targets, B, T, 0, "NULL");
    refuse_batch(&f, f.tokens, NULL, B, T, 1, "NULL");
    EXPECT_REFUSED(gpt_model_logits(f.model, f.tokens, B, T, NULL), "NULL");
    free_fixture(&f);
}

/* Without a single target there is no mean to take. */
static void test_no_targets(void) {
    fixture f = new_fixture("all targets ignored");
    int32_t none[B * T];
    for (int i = 0; i < B * T; i++) none[i] = -1;
    refuse_batch(&f, f.tokens, none, B, T, 1, "target");
    free_fixture(&f);
}

static void test_read_write(void) {
    fixture f = new_fixture("read and write");
    int n_params = gpt_config_param_count(f.c);
    for (int i = 0; i < n_params; i++) {
        int64_t size = f.params[0].info[i].size;
        const int64_t wrong[] = {size - 1, size + 1, 0, -size};
        float *x = host_floats(size + 1);
        for (int k = 0; k < TEST_COUNT(wrong); k++) {
            const char *name = f.params[0].info[i].name;
            EXPECT_REFUSED(gpt_model_read(f.model, i, GPT_TENSOR_VALUE, x, wrong[k]), name);
            EXPECT_REFUSED(gpt_model_write(f.model, i, GPT_TENSOR_STATE0, x, wrong[k]), name);
        }
        EXPECT_REFUSED(gpt_model_read(f.model, i, 4, x, size), "tensor");
        EXPECT_REFUSED(gpt_model_write(f.model, i, -1, x, size), "tensor");
        EXPECT_REFUSED(gpt_model_read(f.model, i, 0, NULL, size), "NULL");
        EXPECT_REFUSED(gpt_model_write(f.model, i, 0, NULL, size), "NULL");
    }
    float x[1];
    EXPECT_REFUSED(gpt_model_read(f.model, n_params, 0, x, 1), "parameter");
    EXPECT_REFUSED(gpt_model_write(f.model, -1, 0, x, 1), "parameter");
    free_fixture(&f);
}

/* Every tensor of a parameter reads back as it was written, bit for bit. */
static void test_round_trip(void) {
    fixture f = new_fixture("round trip");
    for (int tensor = 0; tensor < 4; tensor++) {
        param_set set = read_params(f.model, f.c, tensor);
        for (int i = 0; i < set.n; i++) {
            for (int64_t k = 0; k < set.info[i].size; k++) set.x[i][k] = (float)random_normal();
        }
        write_params(f.model, &set, tensor);
        param_set back = read_params(f.model, f.c, tensor);
        EXPECT(same_params(&set, &back));
        write_params(f.model, &f.params[tensor], tensor);
    }
    free_fixture(&f);
}

static void test_null_model(void) {
    float x[4] = {0};
    int32_t tokens[4] = {0};
    gpt_session *session = NULL;
    uint64_t bytes;
    test_case("NULL handles");
    EXPECT_REFUSED(gpt_model_init(NULL, 1), "NULL");
    EXPECT_REFUSED(gpt_model_read(NULL, 0, 0, x, 1), "NULL");
    EXPECT_REFUSED(gpt_model_write(NULL, 0, 0, x, 1), "NULL");
    EXPECT_REFUSED(gpt_model_logits(NULL, tokens, 1, 1, x), "NULL");
    EXPECT_REFUSED(gpt_model_loss(NULL, tokens, tokens, 1, 1, x, NULL), "NULL");
    EXPECT_REFUSED(gpt_model_backward(NULL, tokens, tokens, 1, 1, 1.0f, x), "NULL");
    EXPECT_REFUSED(gpt_model_zero_grads(NULL), "NULL");
    EXPECT_REFUSED(update_adamw(NULL, &adamw, x, x), "NULL");
    EXPECT_REFUSED(gpt_model_set_step(NULL, 1), "NULL");
    EXPECT_REFUSED(gpt_session_create(NULL, 1, 1, GPT_KV_ACTIVATIONS, &session), "NULL");
    EXPECT_REFUSED(gpt_session_bytes(NULL, 1, 1, GPT_KV_ACTIVATIONS, &bytes), "NULL");
    EXPECT_REFUSED(gpt_session_decode(NULL, tokens, tokens, NULL, 1, x), "NULL");
    EXPECT_REFUSED(gpt_session_rewind(NULL, 0, 0), "NULL");
    EXPECT(gpt_session_length(NULL, 0) == -1);
    EXPECT(session == NULL);
}

/* ---- updates ---- */

static void test_adamw_fields(void) {
    fixture f = new_fixture("bad optimizer settings");
    static const struct {
        const char *field;
        gpt_adamw adamw;
    } bad[] = {
        {"lr", {-1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f}},
        {"lr", {NAN, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f}},
        {"beta1", {1e-3f, 1.0f, 0.95f, 1e-8f, 0.1f, 1.0f}},
        {"beta1", {1e-3f, -0.1f, 0.95f, 1e-8f, 0.1f, 1.0f}},
        {"beta2", {1e-3f, 0.9f, 1.5f, 1e-8f, 0.1f, 1.0f}},
        {"beta2", {1e-3f, 0.9f, NAN, 1e-8f, 0.1f, 1.0f}},
        {"eps", {1e-3f, 0.9f, 0.95f, -1e-8f, 0.1f, 1.0f}},
        {"weight_decay", {1e-3f, 0.9f, 0.95f, 1e-8f, -0.1f, 1.0f}},
        {"weight_decay", {1e-3f, 0.9f, 0.95f, 1e-8f, INFINITY, 1.0f}},
        {"grad_clip", {1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, -1.0f}},
        {"grad_clip", {1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, NAN}},
    };
    for (int i = 0; i < TEST_COUNT(bad); i++) {
        float norm = 77.0f;
        EXPECT_REFUSED(update_adamw(f.model, &bad[i].adamw, NULL, &norm), bad[i].field);
        EXPECT(norm == 77.0f);
    }
    EXPECT_REFUSED(update_adamw(f.model, NULL, NULL, NULL), "NULL");
    EXPECT_REFUSED(gpt_model_set_step(f.model, -1), "step");
    free_fixture(&f);
}

static void test_update_without_backward(void) {
    fixture f = new_fixture("update without backward");
    float norm;
    EXPECT_OK(update_adamw(f.model, &adamw, NULL, &norm));
    EXPECT_REFUSED(update_adamw(f.model, &adamw, NULL, &norm), "backward");
    EXPECT(gpt_model_step(f.model) == 3);
    gpt_session_free(f.session);
    gpt_model_free(f.model);
}

/* A gradient that is not finite: the norm says so, nothing is applied, and training continues with
 * the next batch. */
static void test_update_not_finite(void) {
    static const float spoilers[] = {NAN, INFINITY};
    for (int k = 0; k < 2; k++) {
        fixture f = new_fixture("gradient not finite");
        const param_set *grads = &f.params[GPT_TENSOR_GRAD];
        int last = grads->n - 1;
        float norm = 0.0f, loss;
        grads->x[last][3] = spoilers[k];
        EXPECT_OK(gpt_model_write(f.model, last, GPT_TENSOR_GRAD, grads->x[last],
                                  grads->info[last].size));
        EXPECT_FAILURE(update_adamw(f.model, &adamw, NULL, &norm), GPT_ERR_NUMERIC, "norm");
        EXPECT(!isfinite(norm));
        EXPECT(gpt_model_step(f.model) == 2);
        for (int i = 0; i < 4; i++) {
            if (i == GPT_TENSOR_GRAD) continue;
            param_set now = read_params(f.model, f.c, i);
            EXPECT(same_params(&now, &f.params[i]));
        }
        EXPECT_OK(gpt_model_zero_grads(f.model));
        EXPECT_OK(gpt_model_backward(f.model, f.tokens, f.targets, B, T, 1.0f, &loss));
        EXPECT_OK(update_adamw(f.model, &adamw, NULL, &norm));
        EXPECT(isfinite(norm) && gpt_model_step(f.model) == 3);
        gpt_session_free(f.session);
        gpt_model_free(f.model);
    }
}

/* ---- models without gradients, or without batches ---- */

static void test_without_training(void) {
    const gpt_config *c = &families[0].config;
    gpt_options options = {.n_threads = 1, .max_batch = 1};
    gpt_model *model = NULL;
    gpt_param p;
    int32_t tokens[] = {1, 2, 3};
    float loss, x[1];
    test_case("a model without training");
    EXPECT_OK(gpt_model_create(c, &options, &model));
    EXPECT_OK(gpt_model_init(model, 1));
    EXPECT_OK(gpt_config_param(c, 0, &p));
    EXPECT_REFUSED(gpt_model_backward(model, tokens, tokens, 1, 3, 1.0f, &loss), "training");
    EXPECT_REFUSED(gpt_model_zero_grads(model), "training");
    EXPECT_REFUSED(update_adamw(model, &adamw, NULL, x), "training");
    for (int tensor = 1; tensor < 4; tensor++) {
        float *values = host_floats(p.size);
        EXPECT_REFUSED(gpt_model_read(model, 0, tensor, values, p.size), "training");
        EXPECT_REFUSED(gpt_model_write(model, 0, tensor, values, p.size), "training");
    }
    EXPECT_OK(gpt_model_loss(model, tokens, tokens, 1, 3, &loss, NULL));
    EXPECT_NEAR("loss", loss, log(c->vocab_size), 1.0);
    gpt_model_free(model);
}

static void test_without_batches(void) {
    const gpt_config *c = &families[0].config;
    gpt_options options = {.n_threads = 1};
    gpt_model *model = NULL;
    int32_t tokens[] = {1, 2, 3};
    float loss, *logits = host_floats(3 * c->vocab_size);
    EXPECT_OK(gpt_model_create(c, &options, &model));
    EXPECT_REFUSED(gpt_model_logits(model, tokens, 1, 3, logits), "max_batch");
    EXPECT_REFUSED(gpt_model_loss(model, tokens, tokens, 1, 3, &loss, NULL), "max_batch");
    gpt_model_free(model);
    options.training = 1;
    model = NULL;
    EXPECT_REFUSED(gpt_model_create(c, &options, &model), "max_batch");
    EXPECT(model == NULL);
}

/* ---- sessions ---- */

static void test_session_sizes(void) {
    fixture f = new_fixture("session sizes");
    static const int counts[] = {0, -1, INT_MAX};
    const int lengths[] = {-1, f.c->block_size + 1, INT_MAX};
    gpt_session *session = NULL;
    uint64_t bytes = 77;
    for (int i = 0; i < 3; i++) {
        EXPECT_REFUSED(gpt_session_create(f.model, counts[i], 4, GPT_KV_ACTIVATIONS, &session),
                       "n_seq");
        EXPECT_REFUSED(gpt_session_bytes(f.model, counts[i], 4, GPT_KV_ACTIVATIONS, &bytes),
                       "n_seq");
        EXPECT_REFUSED(gpt_session_create(f.model, 1, lengths[i], GPT_KV_ACTIVATIONS, &session),
                       "n_ctx");
        EXPECT_REFUSED(gpt_session_bytes(f.model, 1, lengths[i], GPT_KV_ACTIVATIONS, &bytes),
                       "n_ctx");
    }
    EXPECT_REFUSED(gpt_session_create(f.model, 1, 4, GPT_KV_ACTIVATIONS, NULL), "NULL");
    EXPECT_REFUSED(gpt_session_bytes(f.model, 1, 4, GPT_KV_ACTIVATIONS, NULL), "NULL");
    EXPECT(session == NULL && bytes == 77);
    free_fixture(&f);
}

static void refuse_decode(const fixture *f, const int32_t *tokens, const int32_t *seqs, int n,
                          const char *word) {
    float *logits = host_floats((int64_t)N_SEQ * f->c->vocab_size);
    logits[0] = 77.0f;
    EXPECT_REFUSED(gpt_session_decode(f->session, tokens, seqs, NULL, n, logits), word);
    EXPECT(logits[0] == 77.0f);
    expect_unchanged(f);
}

static void test_session_decode(void) {
    fixture f = new_fixture("decode");
    const int32_t V = f.c->vocab_size;
    int32_t tokens[20] = {0}, zeros[20] = {0}, twos[6] = {2, 2, 2, 2, 2, 2};
    refuse_decode(&f, tokens, zeros, 0, "token");
    refuse_decode(&f, tokens, zeros, -3, "token");
    refuse_decode(&f, NULL, zeros, 1, "NULL");
    refuse_decode(&f, tokens, NULL, 1, "NULL");
    EXPECT_REFUSED(gpt_session_decode(f.session, tokens, zeros, NULL, 1, NULL), "NULL");
    EXPECT_REFUSED(gpt_session_decode(f.session, tokens, zeros, (uint8_t[]){0, 1}, 2, NULL),
                   "NULL");

    /* Sequence 0 holds one token of eight, sequence 2 three. */
    refuse_decode(&f, tokens, zeros, N_CTX, "sequence 0");
    refuse_decode(&f, tokens, zeros, 20, "sequence 0");
    refuse_decode(&f, tokens, twos, 6, "sequence 2");
    refuse_decode(&f, tokens, (int32_t[]){0, 1, 2, 2, 2, 2, 2, 2}, 8, "sequence 2");
    refuse_decode(&f, tokens, (int32_t[]){0, 1, 3}, 3, "sequence 3");
    refuse_decode(&f, tokens, (int32_t[]){0, -1}, 2, "sequence -1");
    refuse_decode(&f, tokens, (int32_t[]){INT_MAX, 0}, 2, "sequence");
    refuse_decode(&f, tokens, (int32_t[]){0, 1, 0}, 3, "neighbours");
    refuse_decode(&f, tokens, (int32_t[]){1, 1, 0, 2, 1}, 5, "neighbours");
    tokens[4] = V;
    refuse_decode(&f, tokens, (int32_t[]){0, 1, 1, 1, 1}, 5, "token 4");
    tokens[4] = 0, tokens[0] = -1;
    refuse_decode(&f, tokens, zeros, 1, "token 0");
    free_fixture(&f);
}

static void test_session_rewind(void) {
    fixture f = new_fixture("rewind");
    EXPECT_REFUSED(gpt_session_rewind(f.session, -1, 0), "sequence -1");
    EXPECT_REFUSED(gpt_session_rewind(f.session, N_SEQ, 0), "sequence 3");
    EXPECT_REFUSED(gpt_session_rewind(f.session, 2, 4), "sequence 2");
    EXPECT_REFUSED(gpt_session_rewind(f.session, 2, -1), "sequence 2");
    EXPECT_REFUSED(gpt_session_rewind(f.session, 1, 1), "sequence 1");
    EXPECT_OK(gpt_session_rewind(f.session, 1, 0));
    EXPECT_OK(gpt_session_rewind(f.session, 2, 3));
    EXPECT(gpt_session_length(f.session, -1) == -1);
    EXPECT(gpt_session_length(f.session, N_SEQ) == -1);
    free_fixture(&f);
}

static void test_session_fork(void) {
    fixture f = new_fixture("fork");
    EXPECT_REFUSED(gpt_session_fork(NULL, 2, 1, 0), "NULL");
    EXPECT_REFUSED(gpt_session_fork(f.session, -1, 1, 0), "sequence -1");
    EXPECT_REFUSED(gpt_session_fork(f.session, 2, N_SEQ, 0), "sequence 3");
    EXPECT_REFUSED(gpt_session_fork(f.session, 2, 1, 4), "sequence 2 holds 3 tokens");
    EXPECT_REFUSED(gpt_session_fork(f.session, 2, 1, -1), "sequence 2");
    EXPECT_OK(gpt_session_fork(f.session, 2, 1, 3));
    EXPECT(gpt_session_length(f.session, 1) == 3);
    EXPECT_OK(gpt_session_fork(f.session, 2, 1, 0));
    free_fixture(&f);
}

TEST_API_MAIN({"layers", test_layers}, {"library", test_library}, {"last error", test_last_error},
              {"presets", test_presets}, {"config, integers", test_config_ints},
              {"config, floats", test_config_floats},
              {"config, rope scaling", test_config_rope_scaling},
              {"config, longrope", test_config_longrope},
              {"config, contradictions", test_config_contradictions},
              {"parameter table", test_param_table}, {"options", test_options}, {"cuda", test_cuda},
              {"threads", test_threads}, {"too large", test_too_large}, {"tokens", test_tokens},
              {"batch sizes", test_batch_sizes}, {"no targets", test_no_targets},
              {"read and write", test_read_write}, {"round trip", test_round_trip},
              {"NULL handles", test_null_model}, {"optimizer settings", test_adamw_fields},
              {"update without backward", test_update_without_backward},
              {"update, not finite", test_update_not_finite},
              {"without training", test_without_training},
              {"without batches", test_without_batches}, {"session sizes", test_session_sizes},
              {"decode", test_session_decode}, {"rewind", test_session_rewind},
              {"fork", test_session_fork})
