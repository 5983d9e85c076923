/* config.c: presets, and what makes a configuration possible. */
#include "error.h"
#include "model.h"

#include <math.h>
#include <string.h>

/* And heads of n_embd / n_head without norms, and layers that do not differ. */
#define NO_SCALING .rope_scaling = GPT_ROPE_NONE
#define GPT2(layers, heads, width)                                                                 \
    {50257,                                                                                        \
     1024,                                                                                         \
     layers,                                                                                       \
     heads,                                                                                        \
     heads,                                                                                        \
     width,                                                                                        \
     4 * width,                                                                                    \
     GPT_NORM_LAYERNORM,                                                                           \
     1,                                                                                            \
     GPT_POS_LEARNED,                                                                              \
     GPT_ACT_GELU,                                                                                 \
     GPT_BIAS_ALL,                                                                                 \
     1,                                                                                            \
     1e-5f,                                                                                        \
     0,                                                                                            \
     NO_SCALING}
#define LLAMA(vocab, block, layers, heads, width, ff)                                              \
    {vocab, block,        layers,         heads, heads, width, ff,    GPT_NORM_RMSNORM,            \
     1,     GPT_POS_ROPE, GPT_ACT_SWIGLU, 0,     1,     1e-5f, 10000, NO_SCALING}

/* A Llama with norms of the heads of queries and keys and its own head, which is a Qwen3. */
#define MODERN(vocab, block, layers, heads, width, ff)                                             \
    {vocab, block,        layers,         heads, heads, width, ff,    GPT_NORM_RMSNORM,            \
     1,     GPT_POS_ROPE, GPT_ACT_SWIGLU, 0,     0,     1e-5f, 10000, .qk_norm = 1}

/* vocab, block, layers, heads, kv heads, width, ff, norm, its weight, positions, activation, bias,
 * tied, eps, theta, scaling. The llama sizes are llama2.c's; byte is the published
 * markusheimerl/gpt. */
static const struct {
    const char *name;
    gpt_config config;
} presets[] = {
    {"tiny", LLAMA(2048, 160, 4, 3, 96, 256)},
    {"modern", MODERN(2048, 160, 4, 3, 96, 256)},
    {"byte",
     {256, 1024, 16, 8, 8, 512, 1024, GPT_NORM_RMSNORM, 0, GPT_POS_ROPE_WIDE, GPT_ACT_SWISH, 0, 1,
      1e-6f, 10000, NO_SCALING}},
    {"gpt2", GPT2(12, 12, 768)},
    {"gpt2-medium", GPT2(24, 16, 1024)},
    {"gpt2-large", GPT2(36, 20, 1280)},
    {"gpt2-xl", GPT2(48, 25, 1600)},
    {"llama-15m", LLAMA(32000, 256, 6, 6, 288, 768)},
    {"llama-42m", LLAMA(32000, 1024, 8, 8, 512, 1376)},
    {"llama-110m", LLAMA(32000, 1024, 12, 12, 768, 2048)},
};
enum { N_PRESETS = sizeof presets / sizeof *presets };

const char *gpt_preset_name(int i) {
    return i >= 0 && i < N_PRESETS ? presets[i].name : NULL;
}

int gpt_config_preset(const char *name, gpt_config *out) {
    if (!name || !out) return fail(GPT_ERR_ARGUMENT, "gpt_config_preset: NULL argument");
    for (int i = 0; i < N_PRESETS; i++) {
        if (strcmp(name, presets[i].name)) continue;
        *out = presets[i].config;
        return GPT_OK;
    }
    return fail(
        GPT_ERR_ARGUMENT,
        "unknown preset '%s'; the presets are tiny, modern, byte, gpt2, gpt2-medium, gpt2-large, "
        "gpt2-xl, llama-15m, llama-42m, llama-110m",
        name);
}

/* Bounds far above any small GPT, and low enough that no product of two of them overflows. */
enum { MAX_VOCAB = 1 << 24, MAX_BLOCK = 1 << 20, MAX_LAYERS = 1 << 12, MAX_WIDTH = 1 << 16 };

static int check_range(const char *field, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "%s is %lld; it must be between %lld and %lld", field,
                (long long)value, (long long)least, (long long)most);
}

static int check_longrope(const gpt_config *c) {
    TRY(check_range("rope_original", c->rope_original, 1, MAX_BLOCK));
    if (!(c->rope_attention > 0 && isfinite(c->rope_attention)))
        return fail(GPT_ERR_ARGUMENT, "rope_attention is %g; it must be above 0",
                    c->rope_attention);
    if (!c->rope_divisors) return fail(GPT_ERR_ARGUMENT, "longrope needs rope_divisors");
    for (int64_t i = 0; i < 2 * rope_pairs(c); i++)
        if (!(c->rope_divisors[i] > 0 && isfinite(c->rope_divisors[i])))
            return fail(GPT_ERR_ARGUMENT, "number %d of rope_divisors is %g; it must be above 0",
                        (int)i, c->rope_divisors[i]);
    return GPT_OK;
}

static int check_rope_scaling(const gpt_config *c) {
    TRY(check_range("rope_scaling", c->rope_scaling, GPT_ROPE_NONE, GPT_ROPE_LONGROPE));
    if (c->rope_scaling == GPT_ROPE_NONE) return GPT_OK;
    if (c->pos != GPT_POS_ROPE)
        return fail(GPT_ERR_ARGUMENT, "rope_scaling needs rotary positions within heads");
    if (c->rope_scaling == GPT_ROPE_LONGROPE) return check_longrope(c);
    if (!(c->rope_factor >= 1 && isfinite(c->rope_factor)))
        return fail(GPT_ERR_ARGUMENT, "rope_factor is %g; it must be at least 1", c->rope_factor);
    if (c->rope_scaling == GPT_ROPE_LINEAR) return GPT_OK;
    TRY(check_range("rope_original", c->rope_original, 1, MAX_BLOCK));
    if (c->rope_scaling == GPT_ROPE_DYNAMIC) {
        if (rope_pairs(c) > 1) return GPT_OK;
        return fail(GPT_ERR_ARGUMENT, "dynamic rope_scaling needs more than 2 rotated channels");
    }
    if (!(c->rope_attention >= 0 && isfinite(c->rope_attention)))
        return fail(GPT_ERR_ARGUMENT, "rope_attention is %g; it must be 0 (of the factor) or above",
                    c->rope_attention);
    if (!(c->rope_low_freq > 0 && c->rope_high_freq > c->rope_low_freq &&
          isfinite(c->rope_high_freq)))
        return fail(GPT_ERR_ARGUMENT,
                    "rope_low_freq is %g and rope_high_freq %g; they must be above 0 and rise",
                    c->rope_low_freq, c->rope_high_freq);
    return GPT_OK;
}

static int check_layer(const gpt_config *c, int l) {
    const gpt_layer *layer = &c->layers[l];
    if (layer->norm != GPT_NORM_LAYERNORM && layer->norm != GPT_NORM_RMSNORM)
        return fail(GPT_ERR_ARGUMENT, "the norm of layer %d is %d; it must be an enum gpt_norm", l,
                    layer->norm);
    if (layer->rope != 0 && layer->rope != 1)
        return fail(GPT_ERR_ARGUMENT, "rope of layer %d is %d; it must be 0 or 1", l, layer->rope);
    if (layer->rope && c->pos == GPT_POS_LEARNED)
        return fail(GPT_ERR_ARGUMENT, "layer %d has rope; with learned positions it cannot", l);
    if (layer->rope && !(layer->rope_theta > 1 && isfinite(layer->rope_theta)))
        return fail(GPT_ERR_ARGUMENT, "rope_theta of layer %d is %g; it must be above 1", l,
                    layer->rope_theta);
    if (layer->window < 0)
        return fail(GPT_ERR_ARGUMENT, "the window of layer %d is %d; it must be 0 (all) or above",
                    l, layer->window);
    return GPT_OK;
}

float layer_score_scale(const gpt_config *c, int l) {
    float scale = score_scale(c->score_scale, head_size(c));
    return c->score_by_layer ? scale / (float)(l + 1) : scale;
}

/* The choices of a layer's branches, and factors. */
static int check_branches(const gpt_config *c) {
    TRY(check_range("qk_norm", c->qk_norm, GPT_QK_NORM_NONE, GPT_QK_NORM_WIDTH));
    if (c->qk_norm == GPT_QK_NORM_WIDTH && c->n_kv_head != c->n_head)
        return fail(GPT_ERR_ARGUMENT, "qk_norm over the width needs n_kv_head equal to n_head");
    TRY(check_range("parallel", c->parallel, 0, 1));
    TRY(check_range("one_norm", c->one_norm, 0, 1));
    if (c->one_norm && !c->parallel)
        return fail(GPT_ERR_ARGUMENT, "one_norm needs parallel branches");
    TRY(check_range("norm_at", c->norm_at, GPT_NORM_BEFORE, GPT_NORM_BOTH));
    if (c->parallel && c->norm_at != GPT_NORM_BEFORE)
        return fail(GPT_ERR_ARGUMENT, "norm_at must be 0 (before the branches): they are parallel");
    TRY(check_range("score_by_layer", c->score_by_layer, 0, 1));
    if (!(c->score_scale >= 0 && isfinite(c->score_scale)))
        return fail(GPT_ERR_ARGUMENT, "score_scale is %g; it must be 0 (of the head size) or above",
                    c->score_scale);
    if (!(c->embedding_scale >= 0 && isfinite(c->embedding_scale)))
        return fail(GPT_ERR_ARGUMENT, "embedding_scale is %g; it must be 0 (none) or above",
                    c->embedding_scale);
    if (!(c->score_cap >= 0 && isfinite(c->score_cap)))
        return fail(GPT_ERR_ARGUMENT, "score_cap is %g; it must be 0 (none) or above",
                    c->score_cap);
    if (!(c->logit_cap >= 0 && isfinite(c->logit_cap)))
        return fail(GPT_ERR_ARGUMENT, "logit_cap is %g; it must be 0 (none) or above",
                    c->logit_cap);
    TRY(check_range("rope_dim", c->rope_dim, 0, head_size(c)));
    if (c->rope_dim % 2)
        return fail(GPT_ERR_ARGUMENT, "rope_dim is %d; pairs of channels turn, so it must be even",
                    c->rope_dim);
    if (c->rope_dim && c->pos != GPT_POS_ROPE)
        return fail(GPT_ERR_ARGUMENT, "rope_dim needs rotary positions within heads");
    return GPT_OK;
}

static int check_experts(const gpt_config *c) {
    TRY(check_range("n_expert", c->n_expert, 0, GPT_MAX_EXPERTS));
    TRY(check_range("expert_norm", c->expert_norm, 0, 1));
    if (!(c->router_loss >= 0 && isfinite(c->router_loss)))
        return fail(GPT_ERR_ARGUMENT, "router_loss is %g; it must be 0 (none) or above",
                    c->router_loss);
    if (c->n_expert == 0) {
        if (c->n_expert_used == 0 && c->expert_norm == 0 && c->router_loss == 0) return GPT_OK;
        return fail(GPT_ERR_ARGUMENT,
                    "n_expert is 0; n_expert_used, expert_norm and router_loss need experts");
    }
    TRY(check_range("n_expert_used", c->n_expert_used, 1, c->n_expert));
    if (c->bias & (GPT_BIAS_FC | GPT_BIAS_MLP_PROJ))
        return fail(GPT_ERR_ARGUMENT, "experts have no biases, and the feed-forward layer has");
    return GPT_OK;
}

gpt_layer config_layer(const gpt_config *c, int l) {
    if (c->layers) return c->layers[l];
    int rope = c->pos != GPT_POS_LEARNED;
    return (gpt_layer){
        .norm = c->norm, .rope = rope, .rope_theta = c->rope_theta, .window = c->window};
}

int gpt_config_check(const gpt_config *c) {
    if (!c) return fail(GPT_ERR_ARGUMENT, "gpt_config_check: config is NULL");
    TRY(check_range("vocab_size", c->vocab_size, 1, MAX_VOCAB));
    TRY(check_range("block_size", c->block_size, 1, MAX_BLOCK));
    TRY(check_range("n_layer", c->n_layer, 1, MAX_LAYERS));
    TRY(check_range("n_embd", c->n_embd, 1, MAX_WIDTH));
    TRY(check_range("n_head", c->n_head, 1, c->n_embd));
    TRY(check_range("n_kv_head", c->n_kv_head, 1, c->n_head));
    TRY(check_range("n_ff", c->n_ff, 1, 8 * MAX_WIDTH));
    TRY(check_range("norm", c->norm, GPT_NORM_LAYERNORM, GPT_NORM_RMSNORM));
    TRY(check_range("norm_weight", c->norm_weight, 0, 1));
    TRY(check_range("pos", c->pos, GPT_POS_LEARNED, GPT_POS_ROPE_WIDE));
    TRY(check_range("activation", c->activation, GPT_ACT_GELU, GPT_ACT_GEGLU));
    TRY(check_range("bias", c->bias, 0, GPT_BIAS_ALL));
    TRY(check_range("tied", c->tied, 0, 1));
    TRY(check_range("head_bias", c->head_bias, 0, 1));
    TRY(check_range("head_size", c->head_size, 0, MAX_WIDTH));
    TRY(check_range("window", c->window, 0, INT32_MAX));
    if (c->head_size == 0 && c->n_embd % c->n_head)
        return fail(GPT_ERR_ARGUMENT, "n_head %d does not divide n_embd %d", c->n_head, c->n_embd);
    if (c->n_head % c->n_kv_head)
        return fail(GPT_ERR_ARGUMENT, "n_kv_head %d does not divide n_head %d", c->n_kv_head,
                    c->n_head);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1))
        return fail(GPT_ERR_ARGUMENT, "norm_eps is %g; it must be between 0 and 1", c->norm_eps);
    TRY(check_range("n_head times head_size", (int64_t)c->n_head * head_size(c), 1, MAX_WIDTH));
    TRY(check_branches(c));
    TRY(check_experts(c));
    TRY(check_rope_scaling(c));
    for (int l = 0; c->layers && l < c->n_layer; l++) TRY(check_layer(c, l));
    if (c->pos == GPT_POS_LEARNED) return GPT_OK;
    if (!(c->rope_theta > 1 && isfinite(c->rope_theta)))
        return fail(GPT_ERR_ARGUMENT, "rope_theta is %g; it must be above 1", c->rope_theta);
    if (head_size(c) % 2)
        return fail(GPT_ERR_ARGUMENT,
                    "head_size is %d; rotary positions turn pairs of channels, so it must be even",
                    head_size(c));
    if (c->pos == GPT_POS_ROPE_WIDE && c->n_kv_head != c->n_head)
        return fail(GPT_ERR_ARGUMENT,
                    "rotary positions over the whole width need n_kv_head equal to n_head");
    return GPT_OK;
}

double forward_flops_per_token(const gpt_config *c, int T) {
    double C = c->n_embd, A = att_size(c), keys = 0;
    double fc = C * fc_size(c) + C * c->n_ff, used = c->n_expert ? c->n_expert_used : 1;
    double layer = C * qkv_size(c) + A * C + used * fc + C * c->n_expert;
    /* The keys that a query sees, on average: causality spares half of T, a window more. */
    for (int l = 0; l < c->n_layer; l++) {
        double window = config_layer(c, l).window;
        keys += window > 0 && window < T ? window - window * window / (2.0 * T) : 0.5 * T;
    }
    /* A query-key and a probability-value product with each of them. */
    return 2 * (c->n_layer * layer + C * c->vocab_size) + 4 * keys * A;
}
