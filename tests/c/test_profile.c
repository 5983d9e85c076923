/* Measuring: a profiled model computes the same bits, and says where the time went. */
#define _POSIX_C_SOURCE 200809L
#include "adapters.h"

static void step(gpt_model *model, const int32_t *tokens, const int32_t *targets, float *loss) {
    gpt_adamw adamw = {1e-2f, 0.9f, 0.99f, 1e-8f, 0.1f, 1.0f};
    EXPECT_OK(gpt_model_backward(model, tokens, targets, 2, 7, 1.0f, loss));
    EXPECT_OK(update_adamw(model, &adamw, NULL, NULL));
}

/* An output that is not finite is named, with its layer; finite ones are not. */
static void test_checked(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            test_case("%s", families[f].name);
            int32_t *tokens = random_ints(14, c->vocab_size);
            int32_t *targets = random_ints(14, c->vocab_size);
            gpt_model *model = new_model(c, 1, 2, 0, 0.1f);
            EXPECT_OK(gpt_model_init(model, 5));
            gpt_not_finite bad;
            float loss;
            EXPECT(gpt_model_not_finite(model, &bad) == GPT_ERR_ARGUMENT);
            EXPECT(gpt_model_profile(model, GPT_PROFILE_CHECKED + 1) == GPT_ERR_ARGUMENT);
            EXPECT_OK(gpt_model_profile(model, GPT_PROFILE_CHECKED));
            step(model, tokens, targets, &loss);
            EXPECT(gpt_model_not_finite(model, &bad) == GPT_ERR_ARGUMENT);
            char name[64];
            int last = c->n_layer - 1;
            snprintf(name, sizeof name, "h.%d.attn.proj.weight", last);
            param_set set = read_params(model, c, GPT_TENSOR_VALUE);
            for (int i = 0; i < set.n; i++)
                if (strcmp(set.info[i].name, name) == 0) set.x[i][0] = NAN;
            write_params(model, &set, GPT_TENSOR_VALUE);
            EXPECT_OK(gpt_model_backward(model, tokens, targets, 2, 7, 1.0f, &loss));
            EXPECT_OK(gpt_model_not_finite(model, &bad));
            EXPECT(strcmp(bad.op, "linear_forward") == 0 && strcmp(bad.tensor, "out") == 0);
            EXPECT(bad.layer == last && bad.index == 0 && isnan(bad.value));
            gpt_model_free(model);
        }
    }
}

/* So is an adapter's, whether it has two ops or is in the products of its layer. */
static void test_checked_adapters(void) {
    EACH_PLACE {
        const gpt_config *c = &families[0].config;
        for (int joins = 0; joins < 2; joins++) {
            /* Dropout keeps an adapter out of the products; as little as this drops nothing. */
            gpt_lora lora = {.rank = 3, .targets = GPT_LORA_MLP_PROJ, .scale = 1};
            lora.dropout = joins ? 0 : 1e-12f;
            test_case("joins: %d", joins);
            int32_t *tokens = random_ints(N, c->vocab_size);
            gpt_model *model = adapted_model(c, lora, 1, GPT_RECOMPUTE_NONE, 0);
            EXPECT_OK(gpt_model_init(model, 5));
            EXPECT_OK(gpt_model_init_lora(model, 6));
            adapters set = random_adapters(c, &lora);
            for (int64_t i = 0; i < set.info[0].size; i++) set.x[0][i] = 30000;
            EXPECT_OK(
                gpt_model_write(model, set.first, GPT_TENSOR_VALUE, set.x[0], set.info[0].size));
            EXPECT_OK(gpt_model_profile(model, GPT_PROFILE_CHECKED));
            gpt_not_finite bad;
            EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1e36f, NULL));
            EXPECT_OK(gpt_model_not_finite(model, &bad));
            EXPECT(strcmp(bad.tensor, "db") == 0 || strcmp(bad.tensor, "lora db") == 0);
            EXPECT(bad.layer == 0 && strstr(bad.op, "_backward"));
            gpt_model_free(model);
        }
    }
}

static void test_profile(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            test_case("%s", families[f].name);
            int32_t *tokens = random_ints(14, c->vocab_size);
            int32_t *targets = random_ints(14, c->vocab_size);
            gpt_model *model = new_model(c, 1, 2, 0, 0.1f), *plain = new_model(c, 1, 2, 0, 0.1f);
            EXPECT_OK(gpt_model_init(model, 5));
            EXPECT_OK(gpt_model_init(plain, 5));
            gpt_op_time op;
            gpt_product_time product;
            double busy = -1, total = 0;
            EXPECT(gpt_model_profile_read(model, 0, &op) == GPT_ERR_ARGUMENT);
            EXPECT(gpt_model_profile_busy(model, 0, &busy) == GPT_ERR_ARGUMENT);
            for (int round = 0; round < 2; round++) {
                float loss[2];
                EXPECT_OK(gpt_model_profile(model, 1));
                step(model, tokens, targets, &loss[0]);
                step(plain, tokens, targets, &loss[1]);
                EXPECT(loss[0] == loss[1]);
            }
            int n = 0, n_linear = 0, found = 0;
            for (; gpt_model_profile_read(model, n, &op) == GPT_OK; n++) {
                EXPECT(op.calls > 0 && op.seconds >= 0 && op.flops >= 0 && op.bytes > 0);
                total += op.seconds;
                if (strncmp(op.name, "linear_", 7) == 0) n_linear += (int)op.calls;
                found |= strncmp(op.name, "classifier_backward", 19) == 0 && op.calls == 1;
            }
            EXPECT(n > 8 && found);
            /* The CPU's products are not a library's that has plans. */
            EXPECT(gpt_model_profile_product(model, 0, &product) ==
                   (place.options.device == GPT_DEVICE_CPU ? GPT_ERR_ARGUMENT : GPT_OK));
            EXPECT(gpt_model_profile_product(model, 1 << 20, &product) == GPT_ERR_ARGUMENT);
            /* Of the second round alone. Experts' products are in expert_forward and expert_backward. */
            EXPECT(n_linear == (c->n_expert ? 4 : 8) * c->n_layer);
            double sum = 0;
            for (int thread = 0; thread < gpt_model_threads(model); thread++) {
                EXPECT_OK(gpt_model_profile_busy(model, thread, &busy));
                EXPECT(busy >= 0);
                sum += busy;
            }
            EXPECT(sum > 0);
            EXPECT(total > 0);
            EXPECT(gpt_model_profile_busy(model, gpt_model_threads(model), &busy) ==
                   GPT_ERR_ARGUMENT);
            EXPECT_OK(gpt_model_profile(model, 0));
            EXPECT(gpt_model_profile_read(model, 0, &op) == GPT_ERR_ARGUMENT);
            EXPECT_OK(gpt_model_profile(model, 1)); /* freed while it is on */
            gpt_model_free(model);
            gpt_model_free(plain);
        }
    }
}

static void test_peak(void) {
    EACH_PLACE {
        gpt_model *model = new_model(&families[0].config, 0, 1, 0, 0.0f);
        double flops = 0, bytes = 0;
        EXPECT_OK(gpt_model_peak(model, &flops, NULL));
        EXPECT(flops > 1e8 && flops < 1e16);
        EXPECT_OK(gpt_model_peak(model, &flops, &bytes));
        EXPECT(bytes > 1e7 && bytes < 1e14);
        EXPECT(gpt_model_peak(model, NULL, &bytes) == GPT_ERR_ARGUMENT);
        gpt_model_free(model);
    }
}

TEST_API_MAIN({"profile", test_profile}, {"checked", test_checked},
              {"checked adapters", test_checked_adapters}, {"peak", test_peak})
