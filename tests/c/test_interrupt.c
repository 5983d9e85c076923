/* Computations end between any two layers when the caller asks, and leave the model as it was. */
#include "testing.h"

#include "models.h"

#include <stdbool.h>

enum { B = 2, T = 12, N = B * T };

static int asked, answer_at; /* questions so far; the one that is answered with yes, from 1 */

static int answer(void) {
    return ++asked == answer_at;
}

/* Interrupts at question k from now on. */
static void interrupt_at(int k) {
    asked = 0, answer_at = k;
    gpt_set_interrupt(answer, 0);
}

static int count_questions(void) {
    int n = asked;
    gpt_set_interrupt(NULL, 0);
    return n;
}

static void test_training(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            name_case(&families[f], B, T);
            gpt_model *model = new_model(c, 1, B, T, 0.1f);
            write_random_params(model, c);
            int32_t *tokens = random_ints(N, c->vocab_size);
            float loss, again;
            interrupt_at(0);
            EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1, &loss));
            int n = count_questions();
            EXPECT(n >= 2 * c->n_layer);
            param_set want = read_params(model, c, GPT_TENSOR_GRAD);
            for (int k = 1; k <= n; k++) {
                /* A first micro-batch is dropped with the one that is interrupted. */
                EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1, NULL));
                interrupt_at(k);
                EXPECT(gpt_model_backward(model, tokens, tokens, B, T, 1, &again) ==
                       GPT_ERR_INTERRUPTED);
                EXPECT(count_questions() == k);
                EXPECT(update_adamw(model, &adamw, NULL, NULL) == GPT_ERR_ARGUMENT);
                EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1, &again));
                EXPECT(again == loss);
                param_set got = read_params(model, c, GPT_TENSOR_GRAD);
                EXPECT(same_params(&got, &want));
            }
            interrupt_at(1);
            EXPECT(gpt_model_loss(model, tokens, tokens, B, T, &loss, NULL) == GPT_ERR_INTERRUPTED);
            EXPECT(strcmp(gpt_last_error(), "interrupted") == 0);
            count_questions();
            gpt_model_free(model);
        }
    }
}

static void test_decoding(void) {
    EACH_PLACE {
        const gpt_config *c = &families[0].config;
        name_case(&families[0], 1, T);
        gpt_model *model = new_model(c, 0, 0, 0, 0);
        write_random_params(model, c);
        gpt_session *session;
        EXPECT_OK(gpt_session_create(model, 2, T, GPT_KV_ACTIVATIONS, &session));
        int32_t *tokens = random_ints(T, c->vocab_size), seqs[T] = {0};
        for (int i = T / 2; i < T; i++) seqs[i] = 1;
        float *want = host_floats(2 * c->vocab_size), *got = host_floats(2 * c->vocab_size);
        EXPECT_OK(gpt_session_decode(session, tokens, seqs, NULL, T, want));
        for (int k = 1; k <= c->n_layer; k++) {
            for (int seq = 0; seq < 2; seq++) EXPECT_OK(gpt_session_rewind(session, seq, 1));
            interrupt_at(k);
            EXPECT(gpt_session_decode(session, tokens + 1, seqs + 1, NULL, 3, got) ==
                   GPT_ERR_INTERRUPTED);
            count_questions();
            EXPECT(gpt_session_length(session, 0) == 1);
            for (int seq = 0; seq < 2; seq++) EXPECT_OK(gpt_session_rewind(session, seq, 0));
            EXPECT_OK(gpt_session_decode(session, tokens, seqs, NULL, T, got));
            EXPECT(memcmp(got, want, sizeof(float) * 2 * (size_t)c->vocab_size) == 0);
        }
        gpt_session_free(session);
        gpt_model_free(model);
    }
}

TEST_API_MAIN({"training", test_training}, {"decoding", test_decoding})
