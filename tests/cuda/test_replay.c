/* Steps and decoding that are recorded and replayed give what they give without. */
#include "models.h"

long emulate_graph_launches(void);

enum { B = 2, T = 9, STEPS = 5 };

typedef struct run {
    float losses[STEPS], last[64 * B];
} run;

/* A few updates, then a few tokens of two sequences. More dropout than none, so little that it drops
 * nothing, is the same arithmetic without recordings. */
static run run_of(const gpt_config *config, float dropout) {
    run r = {0};
    const gpt_adamw adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};
    gpt_model *model = new_model(config, 1, B, T, dropout);
    write_random_params(model, config);
    int32_t *tokens = random_ints(B * T, config->vocab_size);
    for (int step = 0; step < STEPS; step++) {
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, &r.losses[step]));
        EXPECT_OK(gpt_model_update(model, &adamw, NULL));
    }
    gpt_session *session = NULL;
    EXPECT_OK(gpt_session_create(model, B, 0, &session));
    for (int t = 0; t < STEPS; t++) {
        const int32_t next[B] = {tokens[t], tokens[T + t]}, seqs[B] = {0, 1};
        EXPECT_OK(gpt_session_decode(session, next, seqs, NULL, B, r.last));
    }
    gpt_session_free(session);
    gpt_model_free(model);
    return r;
}

static void test_replay(void) {
    EACH_PLACE {
        test_case("%s", places[place.at].name);
        const gpt_config *config = &families[4].config;
        long before = emulate_graph_launches();
        run recorded = run_of(config, 0);
        /* All but the first of each kind. Backward's very first step adds to gradients of zero, and
         * is of a kind of its own. */
        EXPECT(emulate_graph_launches() - before == STEPS - 2 + STEPS - 1);
        test.counter = 0;
        before = emulate_graph_launches();
        run plain = run_of(config, 1e-30f);
        EXPECT(emulate_graph_launches() - before == STEPS - 1);
        EXPECT(!memcmp(recorded.losses, plain.losses, sizeof plain.losses));
        EXPECT(!memcmp(recorded.last, plain.last, sizeof plain.last));
        EXPECT(recorded.losses[STEPS - 1] < recorded.losses[0]);
    }
}

TEST_API_MAIN({"replay", test_replay})
