/* generate.c: loads a checkpoint folder and continues tokens, the most likely one each time.
 *
 *     generate FOLDER N TOKEN...
 *
 * prints N tokens. It needs libgpt.so only: see the top of gpt.h for the line that compiles it. */
#include "gpt.h"

#include <stdio.h>
#include <stdlib.h>

static int failed(void) {
    fprintf(stderr, "%s\n", gpt_last_error());
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s FOLDER N TOKEN...\n", argv[0]);
        return 2;
    }
    gpt_options options = {0}; /* for inference, on the CPU, in fp32 */
    gpt_sampling greedy = {.repetition_penalty = 1, .typical_p = 1, .top_p = 1};
    gpt_config config;
    gpt_model *model = NULL;
    gpt_session *session = NULL;
    int n_prompt = argc - 3, n_new = atoi(argv[2]);
    if (gpt_config_load(argv[1], &config)) return failed();
    int32_t *tokens = calloc((size_t)n_prompt, sizeof *tokens);
    int32_t *sequences = calloc((size_t)n_prompt, sizeof *sequences); /* all of sequence 0 */
    float *logits = calloc((size_t)config.vocab_size, sizeof *logits);
    if (!tokens || !sequences || !logits) return 1;
    for (int i = 0; i < n_prompt; i++) tokens[i] = atoi(argv[3 + i]);

    if (gpt_model_load(argv[1], &options, &model)) return failed();
    if (gpt_session_create(model, 1, 0, GPT_KV_ACTIVATIONS, &session)) return failed();
    for (int i = 0; i < n_new; i++) {
        int n = i == 0 ? n_prompt : 1; /* the prompt, then one token at a time */
        if (gpt_session_decode(session, tokens, sequences, NULL, n, logits)) return failed();
        if (gpt_sample(logits, config.vocab_size, &greedy, NULL, 0, (uint64_t)i, tokens))
            return failed();
        printf("%d\n", tokens[0]);
    }
    gpt_session_free(session);
    gpt_model_free(model);
    free(tokens);
    free(sequences);
    free(logits);
}
