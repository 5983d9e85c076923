/* Steps and decoding that are recorded and replayed give what they give without, and the host waits
 * for the device once a step. */
#include "model/model.h"
#include "models.h"

long emulate_graph_launches(void);
long emulate_waits(void);
void cuda_products_forget(gpt_ctx *ctx);

enum { B = 2, T = 9, STEPS = 5, NEVER = -1 };

typedef struct run {
    float losses[STEPS], last[64 * B];
} run;

/* A few updates of two micro-batches each, then a few tokens of two sequences. Nothing is recorded
 * while ops are timed. In step `forget`, no product of the first micro-batch has a plan. */
static run run_of(const gpt_config *config, float dropout, int timed, int forget) {
    run r = {0};
    const gpt_adamw adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};
    gpt_model *model = new_model(config, 1, B, T, dropout);
    write_random_params(model, config);
    EXPECT_OK(gpt_model_profile(model, timed));
    int32_t *tokens = random_ints(B * T, config->vocab_size);
    for (int step = 0; step < STEPS; step++) {
        long before = emulate_waits();
        if (step == forget) cuda_products_forget(model->ctx);
        for (int micro = 0; micro < 2; micro++)
            EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 0.5f, NULL));
        EXPECT_OK(update_adamw(model, &adamw, &r.losses[step], NULL));
        /* The second asks about a device that has nothing left to do. */
        if (!timed) EXPECT(emulate_waits() - before == 2);
    }
    gpt_session *session = NULL;
    EXPECT_OK(gpt_session_create(model, B, 0, GPT_KV_ACTIVATIONS, &session));
    for (int t = 0; t < STEPS; t++) {
        const int32_t next[B] = {tokens[t], tokens[T + t]}, seqs[B] = {0, 1};
        long before = emulate_waits();
        EXPECT_OK(gpt_session_decode(session, next, seqs, NULL, B, r.last));
        if (!timed) EXPECT(emulate_waits() - before == 2);
    }
    gpt_session_free(session);
    gpt_model_free(model);
    return r;
}

static void check_replay(float dropout) {
    test_case("%s, dropout %g", places[place.at].name, dropout);
    const gpt_config *config = &families[4].config;
    long before = emulate_graph_launches();
    run recorded = run_of(config, dropout, 0, NEVER);
    /* All but the first of each kind: backward that starts from zero, which the very first does not,
     * backward that adds, update, decoding. */
    EXPECT(emulate_graph_launches() - before == STEPS - 2 + STEPS + STEPS - 1 + STEPS - 1);
    test.counter = 0;
    before = emulate_graph_launches();
    run plain = run_of(config, dropout, 1, NEVER);
    EXPECT(emulate_graph_launches() == before);
    EXPECT(!memcmp(recorded.losses, plain.losses, sizeof plain.losses));
    EXPECT(!memcmp(recorded.last, plain.last, sizeof plain.last));
    EXPECT(recorded.losses[STEPS - 1] < recorded.losses[0]);
}

static void test_replay(void) {
    EACH_PLACE {
        check_replay(0.0f);
        check_replay(0.2f);
    }
}

/* Where a product cannot be recorded, for want of a plan, the micro-batch runs instead, and is not
 * recorded again. Step 2 is the first that records one that starts from zero. */
static void test_missing_plan(void) {
    const gpt_config *config = &families[4].config;
    EACH_PLACE {
        test_case("%s", places[place.at].name);
        test.counter = 0;
        run recorded = run_of(config, 0.0f, 0, NEVER);
        test.counter = 0;
        long before = emulate_graph_launches();
        run forgetful = run_of(config, 0.0f, 0, 2);
        EXPECT(emulate_graph_launches() - before == STEPS + STEPS - 1 + STEPS - 1);
        EXPECT(!memcmp(recorded.losses, forgetful.losses, sizeof recorded.losses));
    }
}

/* An update that is replayed refuses gradients that are not finite, changes nothing, and continues. */
static void test_not_finite(void) {
    const gpt_config *config = &families[1].config;
    const gpt_adamw adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};
    EACH_PLACE {
        test_case("%s", places[place.at].name);
        gpt_model *model = new_model(config, 1, B, T, 0.0f);
        write_random_params(model, config);
        int32_t *tokens = random_ints(B * T, config->vocab_size);
        float loss = NAN, norm = 0, spoiled[24] = {NAN};
        for (int step = 0; step < 3; step++) {
            EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
            EXPECT_OK(update_adamw(model, &adamw, NULL, NULL));
        }
        param_set before[] = {read_params(model, config, GPT_TENSOR_VALUE),
                              read_params(model, config, GPT_TENSOR_STATE0),
                              read_params(model, config, GPT_TENSOR_STATE0 + 1)};
        EXPECT(before[0].info[1].size == TEST_COUNT(spoiled));
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
        EXPECT_OK(gpt_model_write(model, 1, GPT_TENSOR_GRAD, spoiled, TEST_COUNT(spoiled)));
        long launches = emulate_graph_launches();
        EXPECT(update_adamw(model, &adamw, &loss, &norm) == GPT_ERR_NUMERIC);
        EXPECT(emulate_graph_launches() == launches + 1);
        EXPECT(isfinite(loss) && !isfinite(norm) && gpt_model_step(model) == 3);
        param_set after[] = {read_params(model, config, GPT_TENSOR_VALUE),
                             read_params(model, config, GPT_TENSOR_STATE0),
                             read_params(model, config, GPT_TENSOR_STATE0 + 1)};
        for (int i = 0; i < 3; i++) EXPECT(same_params(&before[i], &after[i]));
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
        EXPECT_OK(update_adamw(model, &adamw, &loss, &norm));
        EXPECT(isfinite(loss) && isfinite(norm) && gpt_model_step(model) == 4);
        gpt_model_free(model);
    }
}

TEST_API_MAIN({"replay", test_replay}, {"missing plan", test_missing_plan},
              {"not finite", test_not_finite})
