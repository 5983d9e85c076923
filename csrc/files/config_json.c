#include "config_json.h"

#include "file.h"
#include "json.h"

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
static const char *const activations[] = {NULL, "gelu", "swish", "swiglu"};
static const char *const scalings[] = {"none", "linear", "llama3"};

static const char *const our_fields[] = {
    "model_type",     "gptc_config_version",
    "vocab_size",     "block_size",
    "n_layer",        "n_head",
    "n_kv_head",      "n_embd",
    "n_ff",           "norm",
    "norm_weight",    "pos",
    "activation",     "bias",
    "tied",           "norm_eps",
    "rope_theta",     "rope_scaling",
    "rope_factor",    "rope_low_freq",
    "rope_high_freq", "rope_original",
    "head_dim",
};
enum { N_OUR_FIELDS = sizeof our_fields / sizeof *our_fields, N_REQUIRED = 17 };

/* Each field that changes the computation is known, and those without a default are there. */
static int check_our_fields(source s) {
    json_walk walk = json_inside(s.object);
    json_value key, value;
    while (json_next(&walk, &key, &value)) {
        int i = 0;
        while (i < N_OUR_FIELDS && !json_is(key, our_fields[i])) i++;
        if (i == N_OUR_FIELDS)
            return fail(GPT_ERR_FILE, "%s: the model field %s is unknown to this gptc", s.where,
                        show(key.begin, (size_t)(key.end - key.begin)).text);
    }
    for (int i = 0; i < N_REQUIRED; i++)
        if (!json_find(s.object, our_fields[i], &value))
            return fail(GPT_ERR_FILE, "%s lacks %s", s.where, our_fields[i]);
    return GPT_OK;
}

static int read_gptc(source s, gpt_config *c) {
    int32_t version = 0, bias = 0;
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
    TRY(get_choice(s, "activation", activations, 4, &c->activation));
    TRY(get_bool(s, "bias", &bias));
    TRY(get_bool(s, "tied", &c->tied));
    TRY(get_float(s, "norm_eps", &c->norm_eps));
    TRY(get_float(s, "rope_theta", &c->rope_theta));
    TRY(get_choice(s, "rope_scaling", scalings, 3, &c->rope_scaling));
    TRY(get_float(s, "rope_factor", &c->rope_factor));
    TRY(get_float(s, "rope_low_freq", &c->rope_low_freq));
    TRY(get_float(s, "rope_high_freq", &c->rope_high_freq));
    TRY(get_int(s, "rope_original", &c->rope_original));
    TRY(get_int(s, "head_dim", &c->head_size));
    c->bias = bias ? GPT_BIAS_ALL : 0;
    return GPT_OK;
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

/* Or null. */
static int only_number(source s, const char *key, float allowed, const char *name) {
    json_value value;
    float number;
    bool found;
    TRY(find(s, key, &value, &found));
    if (!found || value.kind == JSON_NULL) return GPT_OK;
    if (json_float(value, &number) && number == allowed) return GPT_OK;
    return unsupported(s, key, value, name);
}

static int read_gpt2(source s, gpt_config *c) {
    json_value value;
    bool n_positions;
    TRY(only_string(s, "activation_function", "gelu_new", "gelu_pytorch_tanh"));
    TRY(only_bool(s, "scale_attn_weights", true));
    TRY(only_bool(s, "scale_attn_by_inverse_layer_idx", false));
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
    c->activation = GPT_ACT_GELU;
    c->bias = GPT_BIAS_ALL;
    c->tied = 1;
    c->norm_eps = 1e-5f;
    TRY(get_bool(s, "tie_word_embeddings", &c->tied));
    return get_float(s, "layer_norm_epsilon", &c->norm_eps);
}

/* A number that the chosen scaling needs. */
static int need_float(source s, const char *key, float *out) {
    json_value value;
    if (!json_find(s.object, key, &value))
        return fail(GPT_ERR_FILE, "%s: rope_scaling lacks %s", s.where, key);
    return get_float(s, key, out);
}

/* `s` is rope_scaling, or rope_parameters of newer files. */
static int read_scaling(source s, gpt_config *c) {
    json_value kind;
    bool found, has_factor;
    TRY(find(s, "factor", &kind, &has_factor));
    TRY(find(s, "rope_type", &kind, &found));
    if (!found) TRY(find(s, "type", &kind, &found));
    if (!found && !has_factor) return GPT_OK;
    if (found && (json_is(kind, "default") || json_is(kind, "none"))) return GPT_OK;
    if (found && json_is(kind, "linear"))
        c->rope_scaling = GPT_ROPE_LINEAR;
    else if (found && json_is(kind, "llama3"))
        c->rope_scaling = GPT_ROPE_LLAMA3;
    else
        return fail(GPT_ERR_FILE,
                    "%s: this rope_type of rope_scaling is not supported, only linear and llama3",
                    s.where);
    TRY(need_float(s, "factor", &c->rope_factor));
    if (c->rope_scaling == GPT_ROPE_LINEAR) return GPT_OK;
    TRY(need_float(s, "low_freq_factor", &c->rope_low_freq));
    TRY(need_float(s, "high_freq_factor", &c->rope_high_freq));
    return need(s, "original_max_position_embeddings", &c->rope_original);
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
        if (scaling.object.kind == JSON_OBJECT) return read_scaling(scaling, c);
        return unsupported(s, "rope_scaling", scaling.object, "an object");
    }
    return has_parameters ? read_scaling(parameters, c) : GPT_OK;
}

static int read_llama(source s, gpt_config *c) {
    TRY(only_string(s, "hidden_act", "silu", "silu"));
    TRY(only_bool(s, "attention_bias", false));
    TRY(only_bool(s, "mlp_bias", false));
    TRY(only_number(s, "partial_rotary_factor", 1, "1.0"));
    TRY(need(s, "hidden_size", &c->n_embd));
    TRY(need(s, "num_attention_heads", &c->n_head));
    TRY(size_or(s, "head_dim", 0, &c->head_size));
    if ((int64_t)c->head_size * c->n_head == c->n_embd) c->head_size = 0;
    TRY(need(s, "vocab_size", &c->vocab_size));
    TRY(need(s, "max_position_embeddings", &c->block_size));
    TRY(need(s, "num_hidden_layers", &c->n_layer));
    TRY(size_or(s, "num_key_value_heads", c->n_head, &c->n_kv_head));
    TRY(need(s, "intermediate_size", &c->n_ff));
    c->norm = GPT_NORM_RMSNORM;
    c->pos = GPT_POS_ROPE;
    c->activation = GPT_ACT_SWIGLU;
    c->norm_eps = 1e-6f;
    TRY(get_bool(s, "tie_word_embeddings", &c->tied));
    TRY(get_float(s, "rms_norm_eps", &c->norm_eps));
    return read_rope(s, c);
}

int config_from_json(const char *text, size_t n, const char *where, gpt_config *out) {
    source s = {.where = where};
    json_value kind, value;
    bool found;
    gpt_config c = {.norm_weight = 1};
    TRY(json_parse(text, n, where, &s.object));
    if (s.object.kind != JSON_OBJECT) return fail(GPT_ERR_FILE, "%s is not a JSON object", where);
    TRY(find(s, "model_type", &kind, &found));
    if (!found) return fail(GPT_ERR_FILE, "%s lacks model_type", where);
    if (!json_is(kind, "gptc")) {
        TRY(find(s, "quantization_config", &value, &found));
        if (found && value.kind == JSON_OBJECT)
            return fail(GPT_ERR_FILE, "%s: the weights are quantized by another program", where);
    }
    if (json_is(kind, "gptc"))
        TRY(read_gptc(s, &c));
    else if (json_is(kind, "gpt2"))
        TRY(read_gpt2(s, &c));
    else if (json_is(kind, "llama"))
        TRY(read_llama(s, &c));
    else
        return unsupported(s, "model_type", kind, "gpt2, llama and gptc");
    *out = c;
    return GPT_OK;
}
