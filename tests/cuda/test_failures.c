/* A device that fails is reported, in its words: not as a lack of memory, and not as a fast op. */
#include "models.h"

void emulate_fail(const char *call, int after);

static const char words[] = "unspecified launch failure";

static void expect_failure(int status) {
    EXPECT(status == GPT_ERR_DEVICE);
    EXPECT(strstr(gpt_last_error(), words) != NULL);
}

/* Of the library's workspace, then of the model's arena. */
static void test_model_memory(void) {
    EACH_PLACE {
        test_case("%s", places[place.at].name);
        gpt_options options = place.options;
        options.max_batch = 1;
        for (int after = 0; after < 2; after++) {
            gpt_model *model = NULL;
            emulate_fail("cudaMalloc", after);
            expect_failure(gpt_model_create(&families[0].config, &options, &model));
            EXPECT(model == NULL);
        }
    }
}

static void test_session_memory(void) {
    EACH_PLACE {
        test_case("%s", places[place.at].name);
        gpt_model *model = new_model(&families[0].config, 0, 1, 0, 0.0f);
        gpt_session *session = NULL;
        emulate_fail("cudaMalloc", 0);
        expect_failure(gpt_session_create(model, 1, 0, GPT_KV_ACTIVATIONS, &session));
        EXPECT(gpt_session_create(model, 100000, 0, GPT_KV_ACTIVATIONS, &session) ==
               GPT_ERR_MEMORY);
        EXPECT_OK(gpt_session_create(model, 1, 0, GPT_KV_ACTIVATIONS, &session));
        gpt_session_free(session);
        gpt_model_free(model);
    }
}

/* An op whose failure is seen while it is timed. It and those after it are not in the profile. */
static void test_timed(void) {
    EACH_PLACE {
        test_case("%s", places[place.at].name);
        const gpt_config *config = &families[0].config;
        gpt_model *model = new_model(config, 1, 1, 5, 0.0f);
        int32_t *tokens = random_ints(5, config->vocab_size);
        float loss;
        gpt_op_time op;
        EXPECT_OK(gpt_model_profile(model, 1));
        emulate_fail("cudaStreamSynchronize", 6);
        expect_failure(gpt_model_backward(model, tokens, tokens, 1, 5, 1.0f, &loss));
        int n = 0;
        while (gpt_model_profile_read(model, n, &op) == GPT_OK) n++;
        EXPECT(n > 0 && n < 4);
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, 1, 5, 1.0f, &loss));
        while (gpt_model_profile_read(model, n, &op) == GPT_OK) n++;
        EXPECT(n > 8);
        gpt_model_free(model);
    }
}

/* Products with weights of fewer bits do not find their expert. */
static void test_packed_experts(void) {
    gpt_options options = {.device = GPT_DEVICE_CUDA, .max_batch = 1, .max_seq = 8};
    gpt_config config;
    gpt_plan plan;
    EXPECT_OK(gpt_config_preset("llama-15m", &config));
    config.n_expert = 4, config.n_expert_used = 2;
    for (options.dtype = GPT_DTYPE_FP32; options.dtype <= GPT_DTYPE_INT4; options.dtype++) {
        test_case("dtype %d", (int)options.dtype);
        int packed = options.dtype == GPT_DTYPE_INT8 || options.dtype == GPT_DTYPE_INT4;
        int status = gpt_plan_memory(&config, &options, &plan);
        EXPECT(status == (packed ? GPT_ERR_ARGUMENT : GPT_OK));
        if (!packed) continue;
        EXPECT(strstr(gpt_last_error(), "computes experts in fp32 and bf16 alone") != NULL);
        EXPECT(!strchr(gpt_last_error(), '\n'));
    }
}

TEST_API_MAIN({"model memory", test_model_memory}, {"session memory", test_session_memory},
              {"timed", test_timed}, {"packed experts", test_packed_experts})
