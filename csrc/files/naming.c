#include "naming.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Without layer and leaf: ours, GPT-2's, and Llama's one to three. */
static const struct {
    const char *ours, *gpt2, *llama[MAX_PARTS];
} stems[] = {
    {"norm_1", "ln_1", {"input_layernorm"}},
    {"norm_2", "ln_2", {"post_attention_layernorm"}},
    {"attn.qkv", "attn.c_attn", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}},
    {"attn.q_norm", NULL, {"self_attn.q_norm"}},
    {"attn.k_norm", NULL, {"self_attn.k_norm"}},
    {"attn.proj", "attn.c_proj", {"self_attn.o_proj"}},
    {"mlp.fc", "mlp.c_fc", {"mlp.gate_proj", "mlp.up_proj"}},
    {"mlp.proj", "mlp.c_proj", {"mlp.down_proj"}},
    {"wte", "transformer.wte", {"model.embed_tokens"}},
    {"wpe", "transformer.wpe", {0}},
    {"norm_f", "transformer.ln_f", {"model.norm"}},
    {"lm_head", "lm_head", {"lm_head"}},
};
enum { N_STEMS = sizeof stems / sizeof *stems };

const char *naming_embedding(enum naming names) {
    static const char *const embeddings[] = {
        [NAMES_OURS] = "wte.weight",
        [NAMES_GPT2] = "transformer.wte.weight",
        [NAMES_LLAMA] = "model.embed_tokens.weight",
    };
    return embeddings[names];
}

const char *naming_without_prefix(const char *name) {
    static const char *const prefixes[] = {"transformer.", "model."};
    for (int i = 0; i < 2; i++) {
        size_t n = strlen(prefixes[i]);
        if (!strncmp(name, prefixes[i], n)) return name + n;
    }
    return NULL;
}

static bool ends_with(const char *name, const char *end) {
    size_t n = strlen(name), k = strlen(end);
    return n >= k && !strcmp(name + n - k, end);
}

bool naming_ignores(const char *name) {
    return ends_with(name, ".attn.bias") || ends_with(name, ".attn.masked_bias") ||
           ends_with(name, "rotary_emb.inv_freq");
}

/* The rows of the k-th part of several: queries, keys and values, or gates and ups. */
static int64_t rows_of(const gpt_config *c, const gpt_param *param, int n, int k) {
    if (n == 2) return c->n_ff;
    int64_t head = c->head_size ? c->head_size : c->n_embd / c->n_head;
    int64_t kv = c->n_kv_head * head;
    return k > 0 ? kv : param->shape[0] - 2 * kv;
}

/* Ours is "h.LAYER.STEM.LEAF" or "STEM.LEAF". */
static int their_parts(const gpt_config *c, bool llama, const gpt_param *param, part *out) {
    const char *stem = param->name, *leaf = strrchr(param->name, '.');
    char layer[48] = "";
    if (!strncmp(stem, "h.", 2)) {
        char *end;
        long l = strtol(stem + 2, &end, 10);
        stem = end + 1;
        snprintf(layer, sizeof layer, llama ? "model.layers.%ld." : "transformer.h.%ld.", l);
    }
    size_t length = (size_t)(leaf - stem);
    int s = 0, n = 0;
    while (strncmp(stem, stems[s].ours, length) || stems[s].ours[length]) s++;
    const char *const *names = llama ? stems[s].llama : &stems[s].gpt2;
    while (llama && n < MAX_PARTS && names[n]) n++;
    if (!llama) n = 1;
    for (int k = 0; k < n; k++) {
        out[k] = (part){.first_row = k ? out[k - 1].first_row + out[k - 1].n_rows : 0,
                        .n_rows = n == 1 ? param->shape[0] : rows_of(c, param, n, k),
                        .transposed = !llama && *layer && param->n_dim == 2};
        snprintf(out[k].name, sizeof out[k].name, "%s%s%s", layer, names[k], leaf);
    }
    return n;
}

int naming_parts(enum naming names, const gpt_config *c, const gpt_param *param,
                 part out[MAX_PARTS]) {
    if (names != NAMES_OURS) return their_parts(c, names == NAMES_LLAMA, param, out);
    out[0] = (part){.n_rows = param->shape[0]};
    snprintf(out[0].name, sizeof out[0].name, "%s", param->name);
    return 1;
}
