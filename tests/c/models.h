/* models.h: what the tests of gpt.h share: tiny models of each family, the places where they run,
 * and reading and writing of whole parameter sets. */
#ifndef GPTC_MODELS_H
#define GPTC_MODELS_H

#include "testing.h"

typedef struct family {
    const char *name;
    gpt_config config;
} family;

#define NO_SCALING .rope_scaling = GPT_ROPE_NONE

/* Layers that differ in everything that they can. */
static const gpt_layer mixed_layers[] = {
    {GPT_NORM_RMSNORM, 1, 100.0f, 5},
    {GPT_NORM_LAYERNORM, 1, 1000.0f, 1},
    {GPT_NORM_RMSNORM, 0, 0.0f, 0},
};

/* Two rotary bases and windows, as in Gemma 3. */
static const gpt_layer around_layers[] = {
    {GPT_NORM_RMSNORM, 1, 100.0f, 5},
    {GPT_NORM_RMSNORM, 1, 1000.0f, 0},
    {GPT_NORM_RMSNORM, 1, 100.0f, 5},
};

/* Of heads of 4 channels, in short contexts and in long ones. */
static const float rope_divisors[] = {2.0f, 3.0f, 1.0f, 1.75f};

/* vocab, block, layers, heads, kv heads, width, ff, norm, its weight, positions, activation, bias,
 * tied, eps, theta, scaling, head size, layers. The last ones are no family's: they cross the options in
 * other ways. */
static const family families[] = {
    {"gpt2",
     {61, 24, 2, 2, 2, 20, 33, GPT_NORM_LAYERNORM, 1, GPT_POS_LEARNED, GPT_ACT_GELU, GPT_BIAS_ALL,
      1, 1e-5f, 0, NO_SCALING}},
    {"llama",
     {67, 24, 2, 4, 2, 24, 21, GPT_NORM_RMSNORM, 1, GPT_POS_ROPE, GPT_ACT_SWIGLU, 0, 0, 1e-5f,
      10000, NO_SCALING}},
    {"byte",
     {53, 24, 2, 3, 3, 18, 29, GPT_NORM_RMSNORM, 0, GPT_POS_ROPE_WIDE, GPT_ACT_SWISH, 0, 1, 1e-6f,
      10000, NO_SCALING}},
    {"crossed",
     {65, 24, 1, 3, 1, 15, 7, GPT_NORM_LAYERNORM, 0, GPT_POS_LEARNED, GPT_ACT_SWIGLU, GPT_BIAS_ALL,
      0, 1e-5f, 0, NO_SCALING}},
    {"crossed again",
     {64, 24, 3, 2, 1, 8, 11, GPT_NORM_RMSNORM, 1, GPT_POS_ROPE, GPT_ACT_GELU, GPT_BIAS_ALL, 1,
      1e-3f, 100, NO_SCALING}},
    {"mixed layers",
     {59, 24, 3, 3, 1, 14, 13, GPT_NORM_LAYERNORM, 1, GPT_POS_ROPE, GPT_ACT_GELU,
      GPT_BIAS_QKV | GPT_BIAS_MLP_PROJ | GPT_BIAS_NORM, 1, 1e-5f, 10, .head_size = 6,
      .layers = mixed_layers}},
    {"normed heads", /* as in Qwen3, with the biases of Qwen2 and a window */
     {71,
      24,
      2,
      4,
      2,
      18,
      13,
      GPT_NORM_RMSNORM,
      1,
      GPT_POS_ROPE,
      GPT_ACT_SWIGLU,
      GPT_BIAS_QKV,
      1,
      1e-5f,
      10000,
      .rope_scaling = GPT_ROPE_YARN,
      .rope_factor = 4,
      .rope_low_freq = 0.1f,
      .rope_high_freq = 1.5f,
      .rope_original = 12,
      .head_size = 10,
      .qk_norm = GPT_QK_NORM_HEADS,
      .window = 7}},
    {"parallel", /* as GPT-NeoX */
     {63, 24, 2, 3, 3, 24, 19, GPT_NORM_LAYERNORM, 1, GPT_POS_ROPE, GPT_ACT_GELU_ERF, GPT_BIAS_ALL,
      0, 1e-5f, 10000, .rope_dim = 2, .parallel = 1}},
    {"one norm", /* as GPT-J, with the biases of Phi-1.5 */
     {63, 24, 2, 3, 3, 24, 19, GPT_NORM_LAYERNORM, 1, GPT_POS_ROPE, GPT_ACT_GELU, GPT_BIAS_ALL, 0,
      1e-5f, 10000, .rope_dim = 4, .parallel = 1, .one_norm = 1, .head_bias = 1}},
    {"norms after", /* as OLMo 2, with the scores of a Cerebras-GPT and longrope */
     {57,
      24,
      3,
      3,
      3,
      20,
      17,
      GPT_NORM_RMSNORM,
      1,
      GPT_POS_ROPE,
      GPT_ACT_SWIGLU,
      GPT_BIAS_ATT_PROJ,
      0,
      1e-6f,
      500,
      .rope_scaling = GPT_ROPE_LONGROPE,
      .rope_original = 1,
      .rope_attention = 0.8f,
      .rope_divisors = rope_divisors,
      .head_size = 4,
      .qk_norm = GPT_QK_NORM_WIDTH,
      .norm_at = GPT_NORM_AFTER,
      .score_by_layer = 1}},
    {"norms around", /* as Gemma 3 */
     {66,
      24,
      2,
      4,
      2,
      24,
      21,
      GPT_NORM_RMSNORM,
      1,
      GPT_POS_ROPE,
      GPT_ACT_GEGLU,
      0,
      1,
      1e-6f,
      100,
      .head_size = 8,
      .qk_norm = GPT_QK_NORM_HEADS,
      .layers = around_layers,
      .norm_at = GPT_NORM_BOTH,
      .score_scale = 0.21f,
      .embedding_scale = 1.3f,
      .score_cap = 20.0f,
      .logit_cap = 30.0f}},
    /* Each token has all of its experts: rounded to bf16, it may choose others. */
    {"experts",
     {63, 24, 2, 2, 1, 20, 19, GPT_NORM_RMSNORM, 1, GPT_POS_ROPE, GPT_ACT_SWIGLU, 0, 0, 1e-5f, 100,
      NO_SCALING, .n_expert = 3, .n_expert_used = 3}},
};

/* ---- where models run ---- */

static const struct place {
    const char *name;
    int device, dtype, threads;
    const char *level; /* of the CPU */
} places[] = {
    {"cpu fp32 portable, 1 thread", GPT_DEVICE_CPU, GPT_DTYPE_FP32, 1, "portable"},
    {"cpu fp32 portable, 2 threads", GPT_DEVICE_CPU, GPT_DTYPE_FP32, 2, "portable"},
    {"cpu fp32 avx2, 1 thread", GPT_DEVICE_CPU, GPT_DTYPE_FP32, 1, "avx2"},
    {"cpu fp32 avx2, 2 threads", GPT_DEVICE_CPU, GPT_DTYPE_FP32, 2, "avx2"},
    {"cpu fp32 avx512, 1 thread", GPT_DEVICE_CPU, GPT_DTYPE_FP32, 1, "avx512"},
    {"cpu fp32 avx512, 2 threads", GPT_DEVICE_CPU, GPT_DTYPE_FP32, 2, "avx512"},
    {"cpu bf16 portable, 2 threads", GPT_DEVICE_CPU, GPT_DTYPE_BF16, 2, "portable"},
    {"cpu bf16 avx2, 1 thread", GPT_DEVICE_CPU, GPT_DTYPE_BF16, 1, "avx2"},
    {"cpu bf16 avx512, 2 threads", GPT_DEVICE_CPU, GPT_DTYPE_BF16, 2, "avx512"},
    {"cpu bf16 avx512bf16, 1 thread", GPT_DEVICE_CPU, GPT_DTYPE_BF16, 1, "avx512bf16"},
    {"cpu bf16 avx512bf16, 2 threads", GPT_DEVICE_CPU, GPT_DTYPE_BF16, 2, "avx512bf16"},
    {"cpu bf16 amx, 1 thread", GPT_DEVICE_CPU, GPT_DTYPE_BF16, 1, "amx"},
    {"cpu bf16 amx, 2 threads", GPT_DEVICE_CPU, GPT_DTYPE_BF16, 2, "amx"},
    {"cuda fp32", GPT_DEVICE_CUDA, GPT_DTYPE_FP32, 1, NULL},
    {"cuda bf16", GPT_DEVICE_CUDA, GPT_DTYPE_BF16, 1, NULL},
};

static struct {
    int at;
    gpt_options options; /* for gpt_model_create at this place, with the sizes to be filled in */
} place;

/* True where this machine has such a place, and GPTC_TEST_TABLES, where set, is part of its name. */
static inline int place_exists(int i) {
    const char *only = getenv("GPTC_TEST_TABLES");
    if (only && !strstr(places[i].name, only)) return 0;
    if (places[i].level) {
        setenv("GPTC_CPU_LEVEL", places[i].level, 1);
        return strcmp(gpt_cpu_level(), places[i].level) == 0;
    }
    unsetenv("GPTC_CPU_LEVEL");
    gpt_options options = {.device = places[i].device, .dtype = places[i].dtype};
    gpt_model *model = NULL;
    int status = gpt_model_create(&families[0].config, &options, &model);
    gpt_model_free(model);
    return status == GPT_OK;
}

static inline void place_begin(void) {
    place.at = -1;
}

static inline int place_next(void) {
    while (++place.at < TEST_COUNT(places)) {
        if (!place_exists(place.at)) continue;
        place.options = (gpt_options){.device = places[place.at].device,
                                      .dtype = places[place.at].dtype,
                                      .n_threads = places[place.at].threads};
        test.target = places[place.at].name;
        test.act_bytes = places[place.at].dtype == GPT_DTYPE_BF16 ? 2 : 4;
        return 1;
    }
    unsetenv("GPTC_CPU_LEVEL");
    test.target = NULL;
    test.act_bytes = 4;
    return 0;
}
/* Runs what follows for each device, dtype and level of this machine. Do not leave it by break. */
#define EACH_PLACE for (place_begin(); place_next();)

/* How many families to run here. More threads change how the ops share their work, not what a model
 * makes of them, and where there are fewer cores than threads they are slow. */
static inline int families_here(void) {
    return places[place.at].threads > 1 ? 2 : TEST_COUNT(families);
}

/* ---- models ---- */

static inline void expect_ok(int status, const char *file, int line) {
    test.n_checks++;
    if (status != GPT_OK) test_fail(file, line, "failed with %d: %s", status, gpt_last_error());
}
#define EXPECT_OK(call) expect_ok(call, __FILE__, __LINE__)

/* A model for max_batch sequences of max_seq tokens at the current place; ends the program where it
 * cannot be had, since nothing could be tested. */
static inline gpt_model *new_model(const gpt_config *config, int training, int max_batch,
                                   int max_seq, float dropout) {
    gpt_options options = place.options;
    options.training = training;
    options.max_batch = max_batch;
    options.max_seq = max_seq;
    options.dropout = dropout;
    options.seed = 12345;
    gpt_model *model = NULL;
    EXPECT_OK(gpt_model_create(config, &options, &model));
    if (!model) exit(test_summary("no model"));
    return model;
}

/* Numbers of the parameters. */
static inline int64_t n_params(const gpt_config *c) {
    int64_t n = 0;
    for (int i = 0; i < gpt_config_param_count(c); i++) {
        gpt_param info;
        EXPECT_OK(gpt_config_param(c, i, &info));
        n += info.size;
    }
    return n;
}

/* An update of a model that has AdamW alone. */
static inline int update_adamw(gpt_model *model, const gpt_adamw *adamw, float *loss, float *norm) {
    gpt_optimizer optimizer = {.kind = GPT_OPTIMIZER_ADAMW};
    if (adamw) optimizer.adamw = *adamw;
    return gpt_model_update(model, adamw ? &optimizer : NULL, 1, loss, norm);
}

enum { MAX_PARAMS = 64 };

/* Numbers of every parameter of a model: values, gradients or a state slot. */
typedef struct param_set {
    int n;
    gpt_param info[MAX_PARAMS];
    float *x[MAX_PARAMS];
} param_set;

static inline param_set read_params(gpt_model *model, const gpt_config *config, int tensor) {
    param_set set = {.n = gpt_config_param_count(config)};
    EXPECT(set.n > 0 && set.n <= MAX_PARAMS);
    for (int i = 0; i < set.n; i++) {
        EXPECT_OK(gpt_config_param(config, i, &set.info[i]));
        set.x[i] = host_floats(set.info[i].size);
        EXPECT_OK(gpt_model_read(model, i, tensor, set.x[i], set.info[i].size));
    }
    return set;
}

static inline void write_params(gpt_model *model, const param_set *set, int tensor) {
    for (int i = 0; i < set->n; i++) {
        EXPECT_OK(gpt_model_write(model, i, tensor, set->x[i], set->info[i].size));
    }
}

static inline double *doubles_of(const float *x, int64_t n) {
    double *copy = host_zeros(n);
    for (int64_t i = 0; i < n; i++) copy[i] = x[i];
    return copy;
}

/* The same bits in each parameter. */
static inline int same_params(const param_set *a, const param_set *b) {
    for (int i = 0; i < a->n; i++) {
        if (memcmp(a->x[i], b->x[i], (size_t)a->info[i].size * sizeof(float))) return 0;
    }
    return a->n == b->n;
}

/* Values large enough that every path through the model matters: vectors around 1 or 0, matrices
 * of about 1/sqrt(columns). */
static inline void write_random_params(gpt_model *model, const gpt_config *config) {
    for (int i = 0; i < gpt_config_param_count(config); i++) {
        gpt_param info;
        EXPECT_OK(gpt_config_param(config, i, &info));
        float *x = host_floats(info.size);
        int is_scale = info.n_dim == 1 && strstr(info.name, "norm") && strstr(info.name, "weight");
        double spread = info.n_dim == 1 ? 0.3 : 0.8 / sqrt((double)info.shape[1]);
        for (int64_t k = 0; k < info.size; k++) {
            x[k] = (float)round_act(is_scale + spread * random_normal());
        }
        EXPECT_OK(gpt_model_write(model, i, GPT_TENSOR_VALUE, x, info.size));
    }
}

/* Targets with one row in five ignored, but never the first. */
static inline int32_t *random_targets(int n, int below) {
    int32_t *targets = random_ints(n, below);
    for (int i = 1; i < n; i++) {
        if (i % 5 == 2) targets[i] = -1;
    }
    return targets;
}

static inline int count_targets(const int32_t *targets, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) count += targets[i] != -1;
    return count;
}

/* ---- steps and cases ---- */

static const gpt_adamw adamw = {3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};

static inline void name_case(const family *f, int B, int T) {
    test_case("%s B=%d T=%d", f->name, B, T);
}

static inline double *read_logits(gpt_model *model, const gpt_config *c, const int32_t *tokens,
                                  int B, int T) {
    int64_t n = (int64_t)B * T * c->vocab_size;
    float *logits = host_floats(n);
    EXPECT_OK(gpt_model_logits(model, tokens, B, T, logits));
    return doubles_of(logits, n);
}

#endif
