#include "config_json.h"

#include "file.h"
#include "json.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Increased when an older gptc would misread a "gptc" config.json; the same as in hf.py. */
enum { VERSION = 1 };

/* An object, and the name of its file in errors. */
typedef struct source {
    json_value object;
    const char *where;
} source;

/* ---- fields: a missing one leaves *out as it is; *found says which ---- */

static int wrong(source s, const char *key, const char *what) {
    return fail(GPT_ERR_FILE, "%s: %s is not %s", s.where, key, what);
}

static int find(source s, const char *key, json_value *out, bool *found) {
    int n = json_find(s.object, key, out);
    *found = n > 0;
    return n < 2 ? GPT_OK : fail(GPT_ERR_FILE, "%s names %s twice", s.where, key);
}

static int get_int(source s, const char *key, int32_t *out) {
    json_value value;
    int64_t number;
    bool found;
    TRY(find(s, key, &value, &found));
    if (!found) return GPT_OK;
    if (!json_int(value, INT32_MIN, INT32_MAX, &number)) return wrong(s, key, "a whole number");
    *out = (int32_t)number;
    return GPT_OK;
}

static int get_float(source s, const char *key, float *out) {
    json_value value;
    bool found;
    TRY(find(s, key, &value, &found));
    return !found || json_float(value, out) ? GPT_OK : wrong(s, key, "a number of float32");
}

static int get_bool(source s, const char *key, int32_t *out) {
    json_value value;
    bool found;
    TRY(find(s, key, &value, &found));
    if (!found) return GPT_OK;
    if (value.kind != JSON_TRUE && value.kind != JSON_FALSE) return wrong(s, key, "true or false");
    *out = value.kind == JSON_TRUE;
    return GPT_OK;
}

/* A size that must be there. */
static int need(source s, const char *key, int32_t *out) {
    *out = 0;
    TRY(get_int(s, key, out));
    if (*out >= 1) return GPT_OK;
    return fail(GPT_ERR_FILE, "%s: %s is missing, or not a whole number above 0", s.where, key);
}

/* A size that may be missing or null, or 0, and then is `otherwise`. */
static int size_or(source s, const char *key, int32_t otherwise, int32_t *out) {
    json_value value;
    bool found;
    TRY(find(s, key, &value, &found));
    *out = 0;
    if (found && value.kind != JSON_NULL) TRY(get_int(s, key, out));
    if (*out == 0) *out = otherwise;
    return GPT_OK;
}

/* The index of a string among `choices` (n). */
static int get_choice(source s, const char *key, const char *const *choices, int n, int32_t *out) {
    json_value value;
    bool found;
    TRY(find(s, key, &value, &found));
    if (!found) return GPT_OK;
    for (int i = 0; i < n; i++) {
        if (!choices[i] || !json_is(value, choices[i])) continue;
        *out = i;
        return GPT_OK;
    }
    return wrong(s, key, "a choice of this gptc");
}

/* ---- "gptc" ---- */

static const char *const norms[] = {"layernorm", "rmsnorm"};
static const char *const positions[] = {"learned", "rope", "rope_wide"};
static const char *const activations[] = {NULL,       "gelu", "swish", "swiglu",
                                          "gelu_erf", "relu", "geglu"};
enum { N_ACTIVATIONS = sizeof activations / sizeof *activations };
static const char *const norm_places[] = {"before", "after", "both"};
static const char *const scalings[] = {"none", "linear", "llama3", "yarn", "dynamic"};
enum { N_SCALINGS = sizeof scalings / sizeof *scalings };

static const char *const our_fields[] = {
    "model_type",
    "gptc_config_version",
    "vocab_size",
    "block_size",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "n_ff",
    "norm",
    "norm_weight",
    "pos",
    "activation",
    "bias",
    "tied",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_low_freq",
    "rope_high_freq",
    "rope_original",
    "rope_attention",
    "head_dim",
    "qk_norm",
    "window",
    "qkv_bias",
    "attn_proj_bias",
    "mlp_bias",
    "norm_bias",
    "wide_qk_norm",
    "rope_dim",
    "parallel",
    "norm_at",
    "score_scale",
    "score_by_layer",
    "embedding_scale",
    "score_cap",
    "logit_cap",
    "n_expert",
    "n_expert_used",
    "expert_norm",
    "router_loss",
    "one_norm",
    "head_bias",
};
enum { N_OUR_FIELDS = sizeof our_fields / sizeof *our_fields, N_REQUIRED = 17 };

/* Each field that changes the computation is known, and those without a default are there. */
static int check_our_fields(source s) {
    json_walk walk = json_inside(s.object);
    json_value key, value;
    while (json_next(&walk, &key, &value)) {
        int i = 0;
        while (i < N_OUR_FIELDS && !json_is(key, our_fields[i])) i++;
        if (json_is(key, "layers") || json_is(key, "rope_divisors"))
            return fail(GPT_ERR_FILE,
                        "%s: the C library reads no models with %s: load this one in Python",
                        s.where, json_is(key, "layers") ? "layers" : "rope_divisors");
        if (i == N_OUR_FIELDS)
            return fail(GPT_ERR_FILE, "%s: the model field %s is unknown to this gptc", s.where,
                        show(key.begin, (size_t)(key.end - key.begin)).text);
    }
    for (int i = 0; i < N_REQUIRED; i++)
        if (!json_find(s.object, our_fields[i], &value))
            return fail(GPT_ERR_FILE, "%s lacks %s", s.where, our_fields[i]);
    return GPT_OK;
}

static int32_t biases(bool qkv, bool att_proj, bool mlp) {
    return (qkv ? GPT_BIAS_QKV : 0) | (att_proj ? GPT_BIAS_ATT_PROJ : 0) |
           (mlp ? GPT_BIAS_FC | GPT_BIAS_MLP_PROJ : 0);
}

/* Fields that few models have. */
static int read_branches(source s, gpt_config *c) {
    int32_t wide = 0, norm_bias = 0;
    TRY(get_bool(s, "norm_bias", &norm_bias));
    TRY(get_bool(s, "wide_qk_norm", &wide));
    TRY(get_int(s, "rope_dim", &c->rope_dim));
    TRY(get_bool(s, "parallel", &c->parallel));
    TRY(get_choice(s, "norm_at", norm_places, 3, &c->norm_at));
    TRY(get_float(s, "score_scale", &c->score_scale));
    TRY(get_bool(s, "score_by_layer", &c->score_by_layer));
    TRY(get_float(s, "embedding_scale", &c->embedding_scale));
    TRY(get_float(s, "score_cap", &c->score_cap));
    TRY(get_float(s, "logit_cap", &c->logit_cap));
    TRY(get_int(s, "n_expert", &c->n_expert));
    TRY(get_int(s, "n_expert_used", &c->n_expert_used));
    TRY(get_bool(s, "expert_norm", &c->expert_norm));
    TRY(get_float(s, "router_loss", &c->router_loss));
    TRY(get_bool(s, "one_norm", &c->one_norm));
    TRY(get_bool(s, "head_bias", &c->head_bias));
    if (wide) c->qk_norm = GPT_QK_NORM_WIDTH;
    if (norm_bias) c->bias |= GPT_BIAS_NORM;
    return GPT_OK;
}

static int read_gptc(source s, gpt_config *c) {
    int32_t version = 0, bias = 0, qkv = 0, att_proj = 0, mlp = 0;
    TRY(get_int(s, "gptc_config_version", &version));
    if (version != VERSION)
        return fail(GPT_ERR_FILE, "%s has version %d, this gptc reads %d: upgrade gptc", s.where,
                    version, VERSION);
    TRY(check_our_fields(s));
    TRY(get_int(s, "vocab_size", &c->vocab_size));
    TRY(get_int(s, "block_size", &c->block_size));
    TRY(get_int(s, "n_layer", &c->n_layer));
    TRY(get_int(s, "n_head", &c->n_head));
    TRY(get_int(s, "n_kv_head", &c->n_kv_head));
    TRY(get_int(s, "n_embd", &c->n_embd));
    TRY(get_int(s, "n_ff", &c->n_ff));
    TRY(get_choice(s, "norm", norms, 2, &c->norm));
    TRY(get_bool(s, "norm_weight", &c->norm_weight));
    TRY(get_choice(s, "pos", positions, 3, &c->pos));
    TRY(get_choice(s, "activation", activations, N_ACTIVATIONS, &c->activation));
    TRY(get_bool(s, "bias", &bias));
    TRY(get_bool(s, "tied", &c->tied));
    TRY(get_float(s, "norm_eps", &c->norm_eps));
    TRY(get_float(s, "rope_theta", &c->rope_theta));
    TRY(get_choice(s, "rope_scaling", scalings, N_SCALINGS, &c->rope_scaling));
    TRY(get_float(s, "rope_factor", &c->rope_factor));
    TRY(get_float(s, "rope_low_freq", &c->rope_low_freq));
    TRY(get_float(s, "rope_high_freq", &c->rope_high_freq));
    TRY(get_int(s, "rope_original", &c->rope_original));
    TRY(get_float(s, "rope_attention", &c->rope_attention));
    TRY(get_int(s, "head_dim", &c->head_size));
    TRY(get_bool(s, "qk_norm", &c->qk_norm));
    TRY(get_int(s, "window", &c->window));
    TRY(get_bool(s, "qkv_bias", &qkv));
    TRY(get_bool(s, "attn_proj_bias", &att_proj));
    TRY(get_bool(s, "mlp_bias", &mlp));
    c->bias = bias ? GPT_BIAS_ALL : biases(qkv, att_proj, mlp);
    return read_branches(s, c);
}

/* ---- Hugging Face's classes ---- */

static int unsupported(source s, const char *key, json_value value, const char *allowed) {
    return fail(GPT_ERR_FILE, "%s: %s %s is not supported, only %s", s.where, key,
                show(value.begin, (size_t)(value.end - value.begin)).text, allowed);
}

/* A field that is missing, or has one of two values: GPT_ERR_FILE for a model that gptc does not
 * compute. */
static int only_string(source s, const char *key, const char *one, const char *other) {
    json_value value;
    bool found;
    TRY(find(s, key, &value, &found));
    if (!found || json_is(value, one) || json_is(value, other)) return GPT_OK;
    return unsupported(s, key, value, one);
}

static int only_bool(source s, const char *key, bool allowed) {
    json_value value;
    bool found;
    TRY(find(s, key, &value, &found));
    if (!found || value.kind == (allowed ? JSON_TRUE : JSON_FALSE)) return GPT_OK;
    return unsupported(s, key, value, allowed ? "true" : "false");
}

/* Whether a value is this number (false: 0, or false), or null, or an empty array. */
static bool is_plain(json_value value, float number) {
    float found;
    json_value unused;
    if (value.kind == JSON_NULL || (value.kind == JSON_FALSE && number == 0)) return true;
    if (value.kind == JSON_ARRAY) {
        json_walk walk = json_inside(value);
        return !json_next(&walk, &unused, &unused);
    }
    return json_float(value, &found) && found == number;
}

static int only_number(source s, const char *key, float allowed, const char *name) {
    json_value value;
    bool found;
    TRY(find(s, key, &value, &found));
    return !found || is_plain(value, allowed) ? GPT_OK : unsupported(s, key, value, name);
}

/* FEATURES of python/gptc/formats/families.py: what no family of ours has. NAN: null alone. */
static const struct {
    const char *key;
    float plain;
} features[] = {
    {"num_experts", 0},
    {"num_local_experts", 0},
    {"n_routed_experts", 0},
    {"kv_lora_rank", 0},
    {"partial_rotary_factor", 1},
    {"rotary_pct", 1},
    {"no_rope_layers", NAN},
    {"attention_chunk_size", 0},
    {"attn_logit_softcapping", NAN},
    {"final_logit_softcapping", NAN},
    {"query_pre_attn_scalar", NAN},
    {"attention_multiplier", NAN},
    {"embedding_multiplier", 1},
    {"residual_multiplier", 1},
    {"logits_scaling", 1},
    {"logit_scale", 1},
    {"clip_qkv", 0},
    {"alibi", 0},
    {"is_encoder_decoder", 0},
    {"vision_config", NAN},
};
enum { N_FEATURES = sizeof features / sizeof *features };

static int refuse_features(source s) {
    for (int i = 0; i < N_FEATURES; i++) {
        float plain = features[i].plain;
        const char *name = plain == 1 ? "1.0" : plain == 0 ? "0" : "null";
        TRY(only_number(s, features[i].key, plain, name));
    }
    return GPT_OK;
}

/* FAMILIES of python/gptc/formats/families.py that have rotary positions. An `_key` has the choice of
 * config.json's attention_bias or mlp_bias. */
typedef struct family {
    const char *model_type, *model_class;
    int32_t bias;
    bool attention_key, mlp_key, qk_norm, window, window_switch, divided;
    int32_t n_kv_head, head_size; /* of a config.json that names none; 0: n_head, n_embd / n_head */
} family;

static const family families[] = {
    {"llama", "LlamaForCausalLM", .attention_key = true, .mlp_key = true, .divided = true},
    {"mistral", "MistralForCausalLM", .window = true, .n_kv_head = 8},
    {"qwen2", "Qwen2ForCausalLM", GPT_BIAS_QKV, .window = true, .window_switch = true,
     .n_kv_head = 32},
    {"qwen3", "Qwen3ForCausalLM", .attention_key = true, .qk_norm = true, .window = true,
     .window_switch = true, .n_kv_head = 32, .head_size = 128},
};
enum { N_FAMILIES = sizeof families / sizeof *families, USUAL_WINDOW = 4096, USUAL_FIRST = 28 };

/* The row gpt2 of families.py. */
static int read_gpt2_activation(source s, gpt_config *c) {
    static const char *const names[] = {"gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu",
                                        "relu"};
    json_value value;
    bool found;
    c->activation = GPT_ACT_GELU;
    TRY(find(s, "activation_function", &value, &found));
    if (!found) return GPT_OK;
    int i = 0;
    while (i < 5 && !json_is(value, names[i])) i++;
    if (i == 5) return unsupported(s, "activation_function", value, names[0]);
    if (i > 2) c->activation = i == 3 ? GPT_ACT_GELU_ERF : GPT_ACT_RELU;
    return GPT_OK;
}

static int read_gpt2(source s, gpt_config *c) {
    json_value value;
    bool n_positions;
    TRY(only_bool(s, "scale_attn_weights", true));
    TRY(get_bool(s, "scale_attn_by_inverse_layer_idx", &c->score_by_layer));
    TRY(only_bool(s, "add_cross_attention", false));
    TRY(need(s, "n_embd", &c->n_embd));
    TRY(need(s, "n_head", &c->n_head));
    TRY(need(s, "vocab_size", &c->vocab_size));
    TRY(need(s, "n_layer", &c->n_layer));
    TRY(find(s, "n_positions", &value, &n_positions));
    TRY(need(s, n_positions ? "n_positions" : "n_ctx", &c->block_size));
    /* gpt_config_check refuses widths for which this product would overflow. */
    TRY(size_or(s, "n_inner", c->n_embd > INT32_MAX / 4 ? INT32_MAX : 4 * c->n_embd, &c->n_ff));
    c->n_kv_head = c->n_head;
    c->norm = GPT_NORM_LAYERNORM;
    c->pos = GPT_POS_LEARNED;
    TRY(read_gpt2_activation(s, c));
    c->bias = GPT_BIAS_ALL;
    c->tied = 1;
    c->norm_eps = 1e-5f;
    TRY(get_bool(s, "tie_word_embeddings", &c->tied));
    return get_float(s, "layer_norm_epsilon", &c->norm_eps);
}

/* A number that the chosen scaling needs. */
static int need_float(source s, const char *key, float *out) {
    json_value value;
    if (!json_find(s.object, key, &value) || value.kind == JSON_NULL)
        return fail(GPT_ERR_FILE, "%s: rope_scaling lacks %s", s.where, key);
    return get_float(s, key, out);
}

/* A number that may be missing or null, or 0, and then is `otherwise`. */
static int float_or(source s, const char *key, float otherwise, float *out) {
    json_value value;
    bool found;
    TRY(find(s, key, &value, &found));
    *out = 0;
    if (found && value.kind != JSON_NULL) TRY(get_float(s, key, out));
    if (*out == 0) *out = otherwise;
    return GPT_OK;
}

/* c->rope_original, from the config itself or its scaling; else block_size. */
static int read_original(source config, source scaling, gpt_config *c) {
    json_value value;
    bool outside;
    TRY(find(config, "original_max_position_embeddings", &value, &outside));
    c->rope_original = c->block_size;
    bool inside = json_find(scaling.object, "original_max_position_embeddings", &value) > 0;
    if (inside) return need(scaling, "original_max_position_embeddings", &c->rope_original);
    return outside ? need(config, "original_max_position_embeddings", &c->rope_original) : GPT_OK;
}

/* Peng et al. 2023, with the names of transformers. */
static int read_yarn(source s, gpt_config *c) {
    float one, other;
    json_value value;
    bool has_factor;
    TRY(float_or(s, "beta_slow", 1, &c->rope_low_freq));
    TRY(float_or(s, "beta_fast", 32, &c->rope_high_freq));
    TRY(only_bool(s, "truncate", true));
    TRY(find(s, "attention_factor", &value, &has_factor));
    if (has_factor && value.kind != JSON_NULL) {
        TRY(get_float(s, "attention_factor", &c->rope_attention));
        return c->rope_attention > 0 ? GPT_OK : wrong(s, "attention_factor", "a number above 0");
    }
    TRY(float_or(s, "mscale", 0, &one));
    TRY(float_or(s, "mscale_all_dim", 0, &other));
    double scale = log(fmax(c->rope_factor, 1));
    if (one != 0 && other != 0)
        c->rope_attention = (float)((0.1 * one * scale + 1) / (0.1 * other * scale + 1));
    return GPT_OK;
}

/* `s` is rope_scaling, or rope_parameters of newer files, of the object config. */
static int read_scaling(source config, source s, gpt_config *c) {
    json_value kind, key, value;
    bool found, has_factor;
    json_walk walk = json_inside(s.object);
    while (json_next(&walk, &key, &value))
        if (value.kind == JSON_OBJECT)
            return fail(GPT_ERR_FILE,
                        "%s: rope_parameters for some layers alone are not supported, only for all",
                        s.where);
    TRY(find(s, "factor", &kind, &has_factor));
    TRY(find(s, "rope_type", &kind, &found));
    if (!found) TRY(find(s, "type", &kind, &found));
    if (!found && !has_factor) return GPT_OK;
    if (found && json_is(kind, "default")) return GPT_OK;
    int i = 0;
    while (i < N_SCALINGS && !(found && json_is(kind, scalings[i]))) i++;
    if (i == N_SCALINGS)
        return fail(GPT_ERR_FILE,
                    "%s: this rope_type of rope_scaling is not supported, only linear, dynamic, "
                    "llama3 and yarn",
                    s.where);
    c->rope_scaling = i;
    if (i == GPT_ROPE_NONE) return GPT_OK;
    TRY(need_float(s, "factor", &c->rope_factor));
    if (i == GPT_ROPE_LINEAR) return GPT_OK;
    if (i == GPT_ROPE_DYNAMIC) { /* applies from max_position_embeddings on */
        double longest = (double)c->block_size * c->rope_factor;
        if (!(c->rope_factor >= 1 && longest < INT32_MAX))
            return fail(GPT_ERR_FILE, "%s: rope_factor is %g; it must be at least 1", s.where,
                        c->rope_factor);
        c->rope_original = c->block_size;
        c->block_size = (int32_t)longest;
        return GPT_OK;
    }
    TRY(read_original(config, s, c));
    if (i == GPT_ROPE_YARN) return read_yarn(s, c);
    TRY(need_float(s, "low_freq_factor", &c->rope_low_freq));
    return need_float(s, "high_freq_factor", &c->rope_high_freq);
}

static bool is_empty(json_value value) {
    json_value unused;
    if (value.kind != JSON_OBJECT) return value.kind == JSON_NULL;
    json_walk walk = json_inside(value);
    return !json_next(&walk, &unused, &unused);
}

static int read_rope(source s, gpt_config *c) {
    source parameters = {.where = s.where}, scaling = parameters;
    bool has_parameters, has_scaling;
    c->rope_theta = 10000;
    TRY(get_float(s, "rope_theta", &c->rope_theta));
    TRY(find(s, "rope_parameters", &parameters.object, &has_parameters));
    TRY(find(s, "rope_scaling", &scaling.object, &has_scaling));
    if (has_parameters && parameters.object.kind == JSON_OBJECT) {
        TRY(only_number(parameters, "partial_rotary_factor", 1, "1.0"));
        TRY(get_float(parameters, "rope_theta", &c->rope_theta));
    } else {
        has_parameters = false;
    }
    if (has_scaling && !is_empty(scaling.object)) {
        if (scaling.object.kind == JSON_OBJECT) {
            TRY(get_float(scaling, "rope_theta", &c->rope_theta));
            return read_scaling(s, scaling, c);
        }
        return unsupported(s, "rope_scaling", scaling.object, "an object");
    }
    return has_parameters ? read_scaling(s, parameters, c) : GPT_OK;
}

/* How many items of layer_types are of either sort. */
static void count_layers(json_value kinds, int *full, int *sliding) {
    json_value unused, kind;
    json_walk walk = json_inside(kinds);
    *full = *sliding = 0;
    while (json_next(&walk, &unused, &kind)) {
        *full += json_is(kind, "full_attention");
        *sliding += json_is(kind, "sliding_attention");
    }
}

/* The window of every layer. GPT_ERR_FILE where layers differ. */
static int read_window(source s, const family *f, gpt_config *c) {
    int32_t used = f->window && !f->window_switch, first = 0, window = 0;
    int full = c->n_layer, sliding = 0;
    json_value value;
    bool found;
    if (f->window_switch) TRY(get_bool(s, "use_sliding_window", &used));
    TRY(find(s, "sliding_window", &value, &found));
    if (used && !found) window = USUAL_WINDOW;
    if (used && found && value.kind != JSON_NULL) TRY(need(s, "sliding_window", &window));
    TRY(find(s, "layer_types", &value, &found));
    if (found && value.kind == JSON_ARRAY) {
        count_layers(value, &full, &sliding);
    } else {
        if (f->window_switch) first = USUAL_FIRST;
        if (f->window_switch) TRY(get_int(s, "max_window_layers", &first));
        if (window && first < full) full = first > 0 ? first : 0;
        sliding = c->n_layer - full;
    }
    if (full == c->n_layer && sliding == 0) return GPT_OK;
    c->window = window;
    if (window && sliding == c->n_layer && full == 0) return GPT_OK;
    return fail(
        GPT_ERR_FILE,
        "%s: %s with layers of several kinds is not supported, only layers that all have the "
        "same attention window, or none",
        s.where, found ? "layer_types" : "max_window_layers");
}

static int read_llama(source s, const family *f, gpt_config *c) {
    int32_t attention_bias = 0, mlp_bias = 0;
    json_value value;
    bool found;
    TRY(only_string(s, "hidden_act", "silu", "silu"));
    TRY(need(s, "hidden_size", &c->n_embd));
    TRY(need(s, "num_attention_heads", &c->n_head));
    if (f->divided && c->n_embd % c->n_head)
        return fail(GPT_ERR_FILE, "%s: n_head %d does not divide n_embd %d", s.where, c->n_head,
                    c->n_embd);
    TRY(find(s, "head_dim", &value, &found));
    c->head_size = found ? 0 : f->head_size;
    if (found) TRY(size_or(s, "head_dim", 0, &c->head_size));
    if ((int64_t)c->head_size * c->n_head == c->n_embd) c->head_size = 0;
    TRY(need(s, "vocab_size", &c->vocab_size));
    TRY(need(s, "max_position_embeddings", &c->block_size));
    TRY(need(s, "num_hidden_layers", &c->n_layer));
    TRY(find(s, "num_key_value_heads", &value, &found));
    c->n_kv_head = f->n_kv_head ? f->n_kv_head : c->n_head;
    if (found) TRY(size_or(s, "num_key_value_heads", c->n_head, &c->n_kv_head));
    TRY(need(s, "intermediate_size", &c->n_ff));
    c->norm = GPT_NORM_RMSNORM;
    c->pos = GPT_POS_ROPE;
    c->activation = GPT_ACT_SWIGLU;
    c->norm_eps = 1e-6f;
    c->qk_norm = f->qk_norm;
    if (f->attention_key) TRY(get_bool(s, "attention_bias", &attention_bias));
    if (f->mlp_key) TRY(get_bool(s, "mlp_bias", &mlp_bias));
    c->bias = f->bias | biases(attention_bias, attention_bias, mlp_bias);
    TRY(get_bool(s, "tie_word_embeddings", &c->tied));
    TRY(get_float(s, "rms_norm_eps", &c->norm_eps));
    TRY(read_window(s, f, c));
    return read_rope(s, c);
}

/* The family of model_type, or without one of architectures. */
static const family *find_family(source s, json_value kind, bool has_kind) {
    json_value list, unused, name;
    if (!has_kind) {
        if (!json_find(s.object, "architectures", &list) || list.kind != JSON_ARRAY) return NULL;
        json_walk walk = json_inside(list);
        if (!json_next(&walk, &unused, &name)) return NULL;
    }
    for (const family *f = families; f < families + N_FAMILIES; f++)
        if (has_kind ? json_is(kind, f->model_type) : json_is(name, f->model_class)) return f;
    return NULL;
}

int config_from_json(const char *text, size_t n, const char *where, gpt_config *out,
                     enum naming *names) {
    source s = {.where = where};
    json_value kind, value;
    bool found;
    gpt_config c = {.norm_weight = 1};
    TRY(json_parse(text, n, where, &s.object));
    if (s.object.kind != JSON_OBJECT) return fail(GPT_ERR_FILE, "%s is not a JSON object", where);
    TRY(find(s, "model_type", &kind, &found));
    const family *f = find_family(s, kind, found);
    if (!found && !f) return fail(GPT_ERR_FILE, "%s lacks model_type", where);
    *names = f ? NAMES_LLAMA : json_is(kind, "gpt2") ? NAMES_GPT2 : NAMES_OURS;
    if (*names == NAMES_OURS && !json_is(kind, "gptc"))
        return fail(GPT_ERR_FILE,
                    "%s: model_type %s is not one of gpt2, llama, mistral, qwen2, qwen3 and gptc, "
                    "which the C library reads: load the model in Python",
                    where, show(kind.begin, (size_t)(kind.end - kind.begin)).text);
    if (*names != NAMES_OURS) {
        TRY(find(s, "quantization_config", &value, &found));
        if (found && value.kind == JSON_OBJECT)
            return fail(GPT_ERR_FILE, "%s: the weights are quantized by another program", where);
        TRY(refuse_features(s));
    }
    if (f)
        TRY(read_llama(s, f, &c));
    else if (*names == NAMES_GPT2)
        TRY(read_gpt2(s, &c));
    else
        TRY(read_gptc(s, &c));
    *out = c;
    return GPT_OK;
}
