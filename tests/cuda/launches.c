/* launches.c: what the device is asked in one step, in bf16, line by line, for tools/gpu/model.py:
 *
 *     launches PRESET [FIELD=VALUE ...]
 *
 * FIELD: batch, seq, context (0: a training step, else a step of decoding after so many tokens), and fields of
 * the preset, such as n_layer. The step is one that is recorded and replayed: its graphs are marked. */
#include "gpt.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void emulate_trace(FILE *to);

#define TRY(call)                                                                                  \
    if (call) {                                                                                    \
        fprintf(stderr, "%s\n", gpt_last_error());                                                 \
        exit(1);                                                                                   \
    }
enum { BEFORE = 3 /* steps of a kind until it is replayed */ };

static int batch = 1, seq = 8, context;

static int set(gpt_config *c, const char *field, int value) {
    const struct {
        const char *name;
        int32_t *at;
    } fields[] = {{"n_layer", &c->n_layer},
                  {"n_embd", &c->n_embd},
                  {"n_head", &c->n_head},
                  {"n_kv_head", &c->n_kv_head},
                  {"n_ff", &c->n_ff},
                  {"vocab_size", &c->vocab_size},
                  {"block_size", &c->block_size},
                  {"qk_norm", &c->qk_norm},
                  {"n_expert", &c->n_expert},
                  {"n_expert_used", &c->n_expert_used},
                  {"batch", &batch},
                  {"seq", &seq},
                  {"context", &context}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (!strcmp(fields[i].name, field)) return *fields[i].at = value, 1;
    return 0;
}

static void train(gpt_model *model) {
    size_t n = (size_t)(batch * seq);
    int32_t *tokens = calloc(n, sizeof *tokens);
    const gpt_optimizer adamw = {.kind = GPT_OPTIMIZER_ADAMW,
                                 .adamw = {1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f}};
    for (int step = 0; step <= BEFORE; step++) {
        if (step == BEFORE) emulate_trace(stdout);
        TRY(gpt_model_backward(model, tokens, tokens, batch, seq, 1.0f, NULL));
        TRY(gpt_model_update(model, &adamw, 1, NULL, NULL));
    }
    free(tokens);
}

static void decode(gpt_model *model, const gpt_config *c) {
    gpt_session *session;
    size_t n = (size_t)(batch * context);
    int32_t *tokens = calloc(n, sizeof *tokens), *seqs = calloc(n, sizeof *seqs);
    float *logits = calloc((size_t)(batch * c->vocab_size), sizeof *logits);
    TRY(gpt_session_create(model, batch, 0, GPT_KV_ACTIVATIONS, &session));
    for (int i = 0; i < batch * context; i++) seqs[i] = i / context;
    TRY(gpt_session_decode(session, tokens, seqs, NULL, (int)n, logits));
    for (int i = 0; i < batch; i++) seqs[i] = i;
    for (int step = 0; step < BEFORE; step++) {
        if (step == BEFORE - 1) emulate_trace(stdout);
        TRY(gpt_session_decode(session, tokens, seqs, NULL, batch, logits));
    }
    gpt_session_free(session);
    free(tokens);
    free(seqs);
    free(logits);
}

int main(int argc, char **argv) {
    gpt_config config;
    gpt_model *model;
    if (argc < 2) return 2;
    TRY(gpt_config_preset(argv[1], &config));
    for (int i = 2; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (!value) return 2;
        *value = 0;
        if (!set(&config, argv[i], atoi(value + 1))) {
            fprintf(stderr, "there is not a field %s\n", argv[i]);
            return 2;
        }
    }
    gpt_options options = {.device = GPT_DEVICE_CUDA,
                           .dtype = GPT_DTYPE_BF16,
                           .training = !context,
                           .max_batch = context ? 1 : batch,
                           .max_seq = seq};
    TRY(gpt_model_create(&config, &options, &model));
    TRY(gpt_model_init(model, 1));
    context ? decode(model, &config) : train(model);
    emulate_trace(NULL);
    gpt_model_free(model);
    return 0;
}
