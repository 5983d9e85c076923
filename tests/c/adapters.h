/* adapters.h: models with adapters, for the tests of what they compute. */
#ifndef GPTC_ADAPTERS_H
#define GPTC_ADAPTERS_H

#include "models.h"

enum { B = 2, T = 12, N = B * T };

/* All matrices, each as parts where it has them; then fewer. */
static inline gpt_lora lora_of(const gpt_config *c, int kind, float dropout) {
    int gated = is_gated(c->activation);
    int all = GPT_LORA_Q | GPT_LORA_K | GPT_LORA_V | GPT_LORA_ATT_PROJ | GPT_LORA_MLP_PROJ |
              (gated ? GPT_LORA_GATE | GPT_LORA_UP : GPT_LORA_FC);
    int whole = GPT_LORA_QKV | GPT_LORA_FC | GPT_LORA_MLP_PROJ;
    int few = GPT_LORA_Q | GPT_LORA_V | (gated ? GPT_LORA_UP : 0);
    int targets[] = {all, whole, few};
    const int mlp = GPT_LORA_MLP_PROJ | GPT_LORA_FC | GPT_LORA_GATE | GPT_LORA_UP;
    for (int i = 0; c->n_expert && i < 3; i++) targets[i] &= ~mlp;
    return (gpt_lora){.rank = 3, .targets = targets[kind], .scale = 1.5f, .dropout = dropout};
}

static inline gpt_model *adapted_model(const gpt_config *c, gpt_lora lora, int training,
                                       int recompute, float dropout) {
    gpt_options options = place.options;
    options.training = training;
    options.max_batch = B;
    options.max_seq = T;
    options.dropout = dropout;
    options.seed = 77;
    options.lora = lora;
    options.recompute = recompute;
    gpt_model *m = NULL;
    EXPECT_OK(gpt_model_create(c, &options, &m));
    if (!m) exit(test_summary("no model"));
    return m;
}

static inline int is_cpu(void) {
    return place.options.device == GPT_DEVICE_CPU;
}

/* Adapters with numbers that matter. */
typedef struct adapters {
    int first, n;
    gpt_param info[MAX_PARAMS];
    float *x[MAX_PARAMS];
} adapters;

static inline adapters random_adapters(const gpt_config *c, const gpt_lora *lora) {
    adapters set = {.first = gpt_config_param_count(c), .n = gpt_lora_param_count(c, lora)};
    EXPECT(set.n > 0 && set.n <= MAX_PARAMS);
    for (int i = 0; i < set.n; i++) {
        EXPECT_OK(gpt_lora_param(c, lora, i, &set.info[i]));
        int64_t n = set.info[i].size;
        set.x[i] = host_floats(n);
        for (int64_t k = 0; k < n; k++)
            set.x[i][k] = (float)(0.6 * random_normal() / sqrt((double)set.info[i].shape[1]));
    }
    return set;
}

static inline void write_adapters(gpt_model *m, const adapters *set) {
    for (int i = 0; i < set->n; i++)
        EXPECT_OK(
            gpt_model_write(m, set->first + i, GPT_TENSOR_VALUE, set->x[i], set->info[i].size));
}

static inline param_set random_params(const gpt_config *c) {
    param_set set = {.n = gpt_config_param_count(c)};
    for (int i = 0; i < set.n; i++) {
        gpt_param *p = &set.info[i];
        EXPECT_OK(gpt_config_param(c, i, p));
        set.x[i] = host_floats(p->size);
        int is_scale = p->n_dim == 1 && strstr(p->name, "norm") && strstr(p->name, "weight");
        double spread = p->n_dim == 1 ? 0.3 : 0.8 / sqrt((double)p->shape[1]);
        for (int64_t k = 0; k < p->size; k++)
            set.x[i][k] = (float)round_act(is_scale + spread * random_normal());
    }
    return set;
}

/* The matrix "h.1.attn.qkv" of an adapter "h.1.attn.qkv.lora_a", and its parts' rows in it. */
typedef struct adapted {
    int matrix, n_parts;
    lora_part parts[3];
} adapted;

static inline adapted matrix_of(const gpt_config *c, const gpt_lora *lora, const param_set *params,
                                const gpt_param *adapter) {
    char name[64];
    adapted out = {.matrix = -1};
    int HS = c->head_size ? c->head_size : c->n_embd / c->n_head, Q = c->n_head * HS;
    int KV = c->n_kv_head * HS, F = c->n_ff, targets = lora->targets;
    snprintf(name, sizeof name, "%.*s.weight",
             (int)(strstr(adapter->name, ".lora") - adapter->name), adapter->name);
    for (int i = 0; i < params->n; i++)
        if (!strcmp(params->info[i].name, name)) out.matrix = i;
    int bits[] = {GPT_LORA_Q, GPT_LORA_K, GPT_LORA_V, GPT_LORA_GATE, GPT_LORA_UP};
    lora_part rows[] = {{0, Q}, {Q, KV}, {Q + KV, KV}, {0, F}, {F, F}};
    int is_qkv = strstr(name, "qkv") != NULL, is_fc = strstr(name, "fc") != NULL;
    for (int k = is_qkv ? 0 : 3; (is_qkv || is_fc) && k < (is_qkv ? 3 : 5); k++)
        if (targets & bits[k]) out.parts[out.n_parts++] = rows[k];
    if (!out.n_parts)
        out.parts[out.n_parts++] = (lora_part){0, (int)params->info[out.matrix].shape[0]};
    return out;
}

/* All matrices as blocks of 32: a scale of 2^-6, and 32 integers of 8 bits. */
static inline int block_rows(const gpt_config *c, gpt_block_rows *out) {
    int n = 0;
    for (int i = 0; i < gpt_config_param_count(c); i++) {
        gpt_param p;
        EXPECT_OK(gpt_config_param(c, i, &p));
        if (p.n_dim != 2 || p.shape[1] % 32) continue;
        int two = strstr(p.name, "fc") && c->activation == GPT_ACT_SWIGLU;
        for (int k = 0; k < 1 + two; k++)
            out[n++] = (gpt_block_rows){i, (int32_t)p.shape[0] / (1 + two), GPT_BLOCK_Q8_0};
    }
    return n;
}

static inline void write_blocks(gpt_model *m, const gpt_config *c, const gpt_block_rows *rows,
                                int n) {
    for (int k = 0, part = 0; k < n; k++) {
        gpt_param p;
        part = k > 0 && rows[k - 1].param == rows[k].param ? part + 1 : 0;
        EXPECT_OK(gpt_config_param(c, rows[k].param, &p));
        size_t n_blocks = (size_t)(rows[k].rows * (p.shape[1] / 32));
        uint8_t *blocks = test_alloc(&test.host, n_blocks * 34);
        for (size_t b = 0; b < n_blocks; b++) {
            for (int i = 2; i < 34; i++) blocks[b * 34 + (size_t)i] = (uint8_t)random_below(256);
            blocks[b * 34] = (uint8_t)random_below(256), blocks[b * 34 + 1] = 5 << 2;
        }
        EXPECT_OK(gpt_model_write_blocks(m, rows[k].param, part, blocks, n_blocks * 34));
    }
}

/* Sessions decode with adapters: to the logits `want` (T, V) of the first sequence of `tokens`. */
static inline void check_decoded(gpt_model *m, const gpt_config *c, const int32_t *tokens,
                                 const double *want) {
    gpt_session *s;
    int32_t seqs[T] = {0};
    uint8_t all[T];
    int64_t n = (int64_t)T * c->vocab_size;
    memset(all, 1, sizeof all);
    float *logits = host_floats(n);
    EXPECT_OK(gpt_session_create(m, 1, T, GPT_KV_ACTIVATIONS, &s));
    EXPECT_OK(gpt_session_decode(s, tokens, seqs, all, T, logits));
    EXPECT_CLOSE("decoded", doubles_of(logits, n), want, T, c->vocab_size, test_tols(2e-5, 0.1));
    gpt_session_free(s);
}

#endif
