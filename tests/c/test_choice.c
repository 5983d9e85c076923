/* test_choice.c: ops of two levels: each call is one of them, while they are measured in turn, then the faster one.
 * Which is faster is made up here; where the CPU has AMX, or plain C in its place (GPTC_EMULATE_AMX), whole models
 * follow the same rules. */
#define _POSIX_C_SOURCE 200809L
#include "choice.h"

#include "models.h"

#include <time.h>

/* ---- two made-up tables: seconds of a call, and how often each was called ---- */

static double seconds[2][2]; /* of linear_forward and of attention_forward, on each level */
static int calls[2][2];
static double peaks[2] = {30, 20};
static int drops[2]; /* calls of an op that does not multiply */

static void spend(int op, int level) {
    double s = seconds[op][level];
    struct timespec t = {(time_t)s, (long)((s - (double)(time_t)s) * 1e9)};
    calls[op][level]++;
    if (s > 0) nanosleep(&t, NULL);
}

#define OPS(level)                                                                                 \
    static void linear_##level(gpt_ctx *ctx, const linear_forward *op) {                           \
        (void)ctx, (void)op;                                                                       \
        spend(0, level);                                                                           \
    }                                                                                              \
    static void attention_##level(gpt_ctx *ctx, const attention_forward *op) {                     \
        (void)ctx, (void)op;                                                                       \
        spend(1, level);                                                                           \
    }                                                                                              \
    static void drop_##level(gpt_ctx *ctx, const dropout_apply *op) {                              \
        (void)ctx, (void)op;                                                                       \
        drops[level]++;                                                                            \
    }                                                                                              \
    static size_t workspace_##level(const gpt_ctx *ctx, const gpt_shape *shape) {                  \
        (void)ctx;                                                                                 \
        return (size_t)(level ? 100 + shape->N : 140);                                             \
    }                                                                                              \
    static int peak_##level(gpt_ctx *ctx, double *flops, double *bytes) {                          \
        (void)ctx;                                                                                 \
        *flops = peaks[level];                                                                     \
        if (bytes) *bytes = 5;                                                                     \
        return 1;                                                                                  \
    }                                                                                              \
    static const gpt_ops table_##level = {.name = "level " #level,                                 \
                                          .peak = peak_##level,                                    \
                                          .linear_forward = linear_##level,                        \
                                          .attention_forward = attention_##level,                  \
                                          .dropout_apply = drop_##level,                           \
                                          .workspace_bytes = workspace_##level};
OPS(0)
OPS(1)

static const gpt_ops *chosen(int dtype) {
    return choice_ops(dtype, &table_0, &table_1);
}

static void run_linear(int dtype, int N, int IC, int times) {
    linear_forward op = {.N = N, .IC = IC, .OC = 8};
    memset(calls, 0, sizeof calls);
    for (int i = 0; i < times; i++) chosen(dtype)->linear_forward(NULL, &op);
}

#define EXPECT_CALLS(op, lower, upper) EXPECT(calls[op][0] == (lower) && calls[op][1] == (upper))

static void test_rules(void) {
    gpt_level_times found;
    test_case("not measured");
    run_linear(GPT_DTYPE_BF16, 64, 10, 5);
    EXPECT_CALLS(0, 5, 0);
    EXPECT(!choice_times(0, &found));

    test_case("measured in turn");
    seconds[0][0] = 4e-3;
    seconds[0][1] = 0;
    choice_measure(1);
    run_linear(GPT_DTYPE_BF16, 64, 10, 7);
    EXPECT_CALLS(0, 4, 3);
    EXPECT(!choice_times(0, &found));
    run_linear(GPT_DTYPE_BF16, 64, 10, 3);
    EXPECT_CALLS(0, 0, 3);
    run_linear(GPT_DTYPE_BF16, 15, 10, 3);
    EXPECT_CALLS(0, 3, 0); /* few rows: both levels do the same */
    EXPECT(choice_times(0, &found) && !strcmp(found.op, "linear_forward") && found.a == 10);
    EXPECT(found.b == 8 && found.rows == 64 && found.dtype == GPT_DTYPE_BF16);
    EXPECT(found.seconds[0] >= 4e-3 && found.seconds[1] < 4e-3);
    EXPECT(!choice_times(1, &found));
    choice_measure(0);

    test_case("the faster one, for up to twice the rows");
    run_linear(GPT_DTYPE_BF16, 127, 10, 3);
    EXPECT_CALLS(0, 0, 3);

    test_case("another shape is as those of its op, or as all");
    run_linear(GPT_DTYPE_BF16, 128, 10, 3);
    EXPECT_CALLS(0, 0, 3);
    run_linear(GPT_DTYPE_INT8, 63, 11, 3);
    EXPECT_CALLS(0, 0, 3);
    gpt_level_times slow = {"linear_forward", GPT_DTYPE_BF16, 99, 8, 64, {1, 3}};
    EXPECT(choice_set_times(&slow) == GPT_OK);
    run_linear(GPT_DTYPE_BF16, 128, 10, 3);
    EXPECT_CALLS(0, 3, 0);
    run_linear(GPT_DTYPE_BF16, 127, 10, 3);
    EXPECT_CALLS(0, 0, 3);
    attention_forward op = {.T = 33, .NH = 3, .HS = 7};
    chosen(GPT_DTYPE_BF16)->attention_forward(NULL, &op);
    EXPECT_CALLS(1, 1, 0);
    slow.seconds[1] = 0.5;
    EXPECT(choice_set_times(&slow) == GPT_OK);
    chosen(GPT_DTYPE_BF16)->attention_forward(NULL, &op);
    EXPECT_CALLS(1, 1, 1);

    test_case("the lower one is faster");
    seconds[1][1] = 4e-3;
    choice_measure(1);
    memset(calls, 0, sizeof calls);
    for (int i = 0; i < 8; i++) chosen(GPT_DTYPE_INT8)->attention_forward(NULL, &op);
    choice_measure(0);
    EXPECT_CALLS(1, 4, 4);
    for (int i = 0; i < 3; i++) chosen(GPT_DTYPE_BF16)->attention_forward(NULL, &op);
    EXPECT_CALLS(1, 7, 4); /* attention is bf16's in every dtype */

    test_case("kept times");
    gpt_level_times kept = {"linear_forward", GPT_DTYPE_INT8, 10, 8, 64, {2, 1}};
    EXPECT(choice_set_times(&kept) == GPT_OK);
    run_linear(GPT_DTYPE_INT8, 64, 10, 2);
    EXPECT_CALLS(0, 0, 2);
    kept.seconds[0] = 0.5;
    EXPECT(choice_set_times(&kept) == GPT_OK);
    run_linear(GPT_DTYPE_INT8, 64, 10, 2);
    EXPECT_CALLS(0, 2, 0);

    test_case("what does not multiply, and slots");
    chosen(GPT_DTYPE_BF16)->dropout_apply(NULL, NULL);
    EXPECT(drops[0] == 1 && drops[1] == 0);
    EXPECT(!chosen(GPT_DTYPE_BF16)->lora_forward);
    gpt_shape shape = {.N = 30};
    EXPECT(chosen(GPT_DTYPE_BF16)->workspace_bytes(NULL, &shape) == 140);
    shape.N = 50;
    EXPECT(chosen(GPT_DTYPE_BF16)->workspace_bytes(NULL, &shape) == 150);
    double flops, bytes;
    EXPECT(chosen(GPT_DTYPE_BF16)->peak(NULL, &flops, &bytes) && flops == 30 && bytes == 5);
    peaks[1] = 40;
    EXPECT(chosen(GPT_DTYPE_BF16)->peak(NULL, &flops, NULL) && flops == 40);
}

static void test_arguments(void) {
    gpt_level_times times = {"linear_forward", GPT_DTYPE_BF16, 1, 1, 16, {1, 1}};
    test_case("arguments");
    EXPECT(gpt_cpu_measure(2) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_cpu_times(-1, &times) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_cpu_times(0, NULL) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_cpu_set_times(NULL) == GPT_ERR_ARGUMENT);
    times.seconds[1] = 0;
    EXPECT(gpt_cpu_set_times(&times) == GPT_ERR_ARGUMENT);
    times.seconds[1] = NAN;
    EXPECT(gpt_cpu_set_times(&times) == GPT_ERR_ARGUMENT);
    memset(times.op, 'x', sizeof times.op);
    times.seconds[1] = 1;
    EXPECT(gpt_cpu_set_times(&times) == GPT_ERR_ARGUMENT);
}

/* ---- whole models ---- */

/* What one step of a model makes, or its logits alone. */
typedef struct outcome {
    double *logits;
    param_set grads; /* without training: none */
} outcome;

static const gpt_config *const shape = &families[1].config;
enum { B = 2, T = 17 }; /* enough rows for attention too */

static outcome run_model(int dtype, const char *level, const int32_t *tokens) {
    if (level)
        setenv("GPTC_CPU_LEVEL", level, 1);
    else
        unsetenv("GPTC_CPU_LEVEL");
    outcome out = {0};
    int training = dtype == GPT_DTYPE_BF16;
    place.options = (gpt_options){.device = GPT_DEVICE_CPU, .dtype = dtype, .n_threads = 2};
    gpt_model *model = new_model(shape, training, B, T, 0);
    EXPECT_OK(gpt_model_init(model, 7));
    out.logits = read_logits(model, shape, tokens, B, T);
    if (training) {
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
        out.grads = read_params(model, shape, GPT_TENSOR_GRAD);
    }
    gpt_model_free(model);
    return out;
}

static int is_same(const outcome *a, const outcome *b) {
    int64_t n = (int64_t)B * T * shape->vocab_size;
    return !memcmp(a->logits, b->logits, (size_t)n * sizeof *a->logits) &&
           same_params(&a->grads, &b->grads);
}

static void prefer(int level) {
    gpt_level_times times;
    for (int i = 0; gpt_cpu_times(i, &times) == GPT_OK; i++) {
        times.seconds[level] = 1;
        times.seconds[!level] = 2;
        EXPECT_OK(gpt_cpu_set_times(&times));
    }
}

static int has_times(const char *op, int dtype) {
    gpt_level_times times;
    for (int i = 0; gpt_cpu_times(i, &times) == GPT_OK; i++)
        if (!strcmp(times.op, op) && times.dtype == dtype && times.seconds[0] > 0) return 1;
    return 0;
}

/* Ops of logits, then those of training. */
static const char *const ops[] = {"linear_forward",  "head_forward",        "attention_forward",
                                  "linear_backward", "classifier_backward", "attention_backward"};
enum { N_FORWARD = 3 };

static void test_models(void) {
    static const int dtypes[] = {GPT_DTYPE_BF16, GPT_DTYPE_INT8, GPT_DTYPE_INT4};
    unsetenv("GPTC_CPU_LEVEL");
    if (strcmp(gpt_cpu_level(), "amx")) {
        printf("models: skipped, there is not a level amx here\n");
        return;
    }
    gpt_level_times times;
    prefer(0); /* what is measured so far, which speaks for all others */
    for (int i = 0; i < TEST_COUNT(dtypes); i++) {
        int dtype = dtypes[i], n_ops = dtype == GPT_DTYPE_BF16 ? TEST_COUNT(ops) : N_FORWARD;
        test_case("dtype %d", dtype);
        int32_t *tokens = random_ints(B * T, shape->vocab_size);
        outcome lower = run_model(dtype, "avx512bf16", tokens);
        outcome upper = run_model(dtype, "amx", tokens);
        if (dtype == GPT_DTYPE_BF16) EXPECT(!is_same(&lower, &upper)); /* others sum integers */
        outcome unmeasured = run_model(dtype, NULL, tokens);
        EXPECT(is_same(&unmeasured, &lower));
        EXPECT_OK(gpt_cpu_measure(1));
        for (int k = 0; k < 8; k++) run_model(dtype, NULL, tokens);
        EXPECT_OK(gpt_cpu_measure(0));
        for (int k = 0; k < n_ops; k++)
            EXPECT(has_times(ops[k], strncmp(ops[k], "attention", 9) ? dtype : GPT_DTYPE_BF16));
        prefer(1);
        outcome measured = run_model(dtype, NULL, tokens);
        EXPECT(is_same(&measured, &upper));
        prefer(0);
        measured = run_model(dtype, NULL, tokens);
        EXPECT(is_same(&measured, &lower));
    }
    setenv("GPTC_CPU_LEVEL", "avx512bf16", 1);
    EXPECT(gpt_cpu_times(0, &times) == GPT_ERR_ARGUMENT);
    unsetenv("GPTC_CPU_LEVEL");
}

TEST_API_MAIN({"rules", test_rules}, {"arguments", test_arguments}, {"models", test_models})
