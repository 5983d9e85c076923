/* Training through gpt.h: accumulation, updates, dropout, resuming, handles that are independent. */
#include "testing.h"

#include "models.h"
#include "reference.h"

#include <pthread.h>
#include <stdbool.h>

/* ---- training ---- */

static void expect_close_sets(const char *what, const param_set *got, const param_set *want,
                              double factor, double tol) {
    for (int i = 0; i < got->n; i++) {
        const gpt_param *p = &got->info[i];
        char name[120];
        snprintf(name, sizeof name, "%s of %s", what, p->name);
        double *expected = doubles_of(want->x[i], p->size);
        for (int64_t k = 0; k < p->size; k++) expected[k] *= factor;
        EXPECT_CLOSE(name, doubles_of(got->x[i], p->size), expected, p->shape[0], p->shape[1], tol);
    }
}

/* Four micro-batches of a quarter of the scale add up to one batch, and a second pass doubles. */
static void test_accumulation(void) {
    enum { B = 4, T = 9 };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            name_case(&families[f], B, T);
            gpt_model *model = new_model(c, 1, B, T, 0.0f);
            write_random_params(model, c);
            int32_t *tokens = random_ints(B * T, c->vocab_size);
            int32_t *targets = random_ints(B * T, c->vocab_size);
            float loss, mean = 0.0f, part;
            EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 1.0f, &loss));
            param_set whole = read_params(model, c, GPT_TENSOR_GRAD);
            EXPECT_OK(gpt_model_zero_grads(model));
            for (int b = 0; b < B; b++) {
                EXPECT_OK(gpt_model_backward(model, tokens + b * T, targets + b * T, 1, T, 1.0f / B,
                                             &part));
                mean += part / B;
            }
            param_set parts = read_params(model, c, GPT_TENSOR_GRAD);
            EXPECT_NEAR("loss", mean, loss, test_tols(1e-5, 1e-2));
            expect_close_sets("gradients", &parts, &whole, 1.0, test_tols(2e-5, 5e-2));
            EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 1.0f, &loss));
            param_set twice = read_params(model, c, GPT_TENSOR_GRAD);
            expect_close_sets("doubled gradients", &twice, &whole, 2.0, test_tols(2e-5, 5e-2));
            gpt_model_free(model);
        }
    }
}

/* One update of every tensor by the reference: matrices decay, vectors do not. */
static void check_update(const param_set *before, const param_set *grads, const param_set *after,
                         double norm) {
    for (int i = 0; i < before->n; i++) {
        const gpt_param *p = &before->info[i];
        double *w = doubles_of(before->x[i], p->size), *start = host_copy(w, p->size);
        double *m = host_zeros(p->size), *v = host_zeros(p->size);
        double *got = doubles_of(after->x[i], p->size);
        gpt_segment segment = {.size = p->size, .decay = p->n_dim == 2};
        EXPECT(p->decay == segment.decay);
        ref_adamw(w, m, v, doubles_of(grads->x[i], p->size), norm, adamw, 1, &segment, 1);
        for (int64_t k = 0; k < p->size; k++) w[k] -= start[k], got[k] -= start[k];
        EXPECT_CLOSE(p->name, got, w, p->shape[0], p->shape[1], 3e-4);
    }
}

static void test_update(void) {
    enum { B = 2, T = 9 };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            name_case(&families[f], B, T);
            gpt_model *model = new_model(c, 1, B, T, 0.0f);
            write_random_params(model, c);
            int32_t *tokens = random_ints(B * T, c->vocab_size);
            int32_t *targets = random_targets(B * T, c->vocab_size);
            float loss, grad_norm = NAN;
            EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 1.0f, &loss));
            param_set before = read_params(model, c, GPT_TENSOR_VALUE);
            param_set grads = read_params(model, c, GPT_TENSOR_GRAD);
            double square = 0.0;
            for (int i = 0; i < grads.n; i++) {
                double *g = doubles_of(grads.x[i], grads.info[i].size);
                square += test_dot(g, g, grads.info[i].size);
            }
            EXPECT(gpt_model_step(model) == 0);
            EXPECT_OK(update_adamw(model, &adamw, NULL, &grad_norm));
            EXPECT(gpt_model_step(model) == 1);
            EXPECT_NEAR("grad_norm", grad_norm, sqrt(square), 1e-5 * sqrt(square));
            param_set after = read_params(model, c, GPT_TENSOR_VALUE);
            check_update(&before, &grads, &after, sqrt(square));

            /* After an update the gradients start from zero: with the same parameters again, the
             * same batch gives the same gradients. */
            write_params(model, &before, GPT_TENSOR_VALUE);
            EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 1.0f, &loss));
            param_set again = read_params(model, c, GPT_TENSOR_GRAD);
            EXPECT(same_params(&grads, &again));
            gpt_model_free(model);
        }
    }
}

/* An update gives the losses of its backward calls, each times its scale, also of those that were
 * not waited for, and of none that came before. */
static void test_step_loss(void) {
    enum { B = 2, T = 9, STEPS = 3 };
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        name_case(&families[1], B, T);
        gpt_model *model = new_model(c, 1, B, T, 0.0f);
        write_random_params(model, c);
        for (int step = 0; step < STEPS; step++) {
            double want = 0;
            float loss, total;
            for (int micro = 0; micro < 2; micro++) {
                int32_t *tokens = random_ints(B * T, c->vocab_size);
                int32_t *targets = random_targets(B * T, c->vocab_size);
                float scale = micro ? 0.75f : 0.25f;
                EXPECT_OK(gpt_model_loss(model, tokens, targets, B, T, &loss, NULL));
                want += scale * loss;
                EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, scale,
                                             step == micro ? &loss : NULL));
            }
            EXPECT_OK(update_adamw(model, &adamw, &total, NULL));
            EXPECT_NEAR("loss of the step", total, want, 1e-5 * want);
            if (step == 0) continue;
            /* The next step starts after gradients that were thrown away. */
            int32_t *tokens = random_ints(B * T, c->vocab_size);
            EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
            EXPECT_OK(gpt_model_zero_grads(model));
        }
        gpt_model_free(model);
    }
}

/* A learning rate of 0 changes no weight, but counts as a step. */
static void test_zero_rate(void) {
    enum { B = 1, T = 5 };
    EACH_PLACE {
        const gpt_config *c = &families[0].config;
        name_case(&families[0], B, T);
        gpt_model *model = new_model(c, 1, B, T, 0.0f);
        EXPECT_OK(gpt_model_init(model, 3));
        int32_t *tokens = random_ints(B * T, c->vocab_size);
        param_set before = read_params(model, c, GPT_TENSOR_VALUE);
        gpt_adamw still = adamw;
        still.lr = 0.0f;
        float loss;
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, &loss));
        EXPECT_OK(update_adamw(model, &still, NULL, NULL));
        param_set after = read_params(model, c, GPT_TENSOR_VALUE);
        EXPECT(same_params(&before, &after));
        EXPECT(gpt_model_step(model) == 1);
        gpt_model_free(model);
    }
}

/* Trains n steps on a batch that depends on the step alone, in one micro-batch and with a high rate if it is
 * always the same one; returns the last loss. */
static float train(gpt_model *model, const gpt_config *c, int B, int T, int first, int n,
                   int repeated) {
    int n_micro = repeated ? 1 : 2;
    gpt_adamw rate = adamw;
    if (repeated) rate.lr *= 4;
    float loss = NAN;
    uint64_t counter = test.counter;
    for (int step = first; step < first + n; step++) {
        test.counter = 1000000 + (uint64_t)(repeated ? 0 : step) * 10000;
        int32_t *tokens = random_ints(B * T, c->vocab_size);
        int32_t *targets = random_targets(B * T, c->vocab_size);
        for (int micro = 0; micro < n_micro; micro++) {
            float scale = 1.0f / (float)n_micro;
            EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, scale, &loss));
        }
        EXPECT_OK(update_adamw(model, &rate, NULL, NULL));
    }
    test.counter = counter;
    return loss;
}

/* Twelve updates on one batch learn it. */
static void test_training(void) {
    enum { B = 2, T = 16, STEPS = 12 };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            name_case(&families[f], B, T);
            gpt_model *model = new_model(c, 1, B, T, 0.0f);
            EXPECT_OK(gpt_model_init(model, 7));
            float first = train(model, c, B, T, 0, 1, 1);
            float middle = train(model, c, B, T, 1, STEPS / 2, 1);
            float last = train(model, c, B, T, 1 + STEPS / 2, STEPS / 2, 1);
            EXPECT(middle < 0.95f * first);
            EXPECT(last < 0.9f * middle);
            EXPECT(gpt_model_step(model) == STEPS + 1);
            gpt_model_free(model);
        }
    }
}

/* The same training twice, bit for bit, with dropout and micro-batches: the second time another model continues
 * after a pause in the middle. */
static void test_repeat_and_resume(void) {
    enum { B = 2, T = 11 };
    const int half = test_is_short() ? 2 : 3; /* steps before the pause, and after it */
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            name_case(&families[f], B, T);
            gpt_model *model = new_model(c, 1, B, T, 0.2f);
            EXPECT_OK(gpt_model_init(model, 7));
            train(model, c, B, T, 0, 2 * half, 0);
            param_set end = read_params(model, c, GPT_TENSOR_VALUE);
            gpt_model_free(model);
            gpt_model *before = new_model(c, 1, B, T, 0.2f), *after = new_model(c, 1, B, T, 0.2f);
            EXPECT_OK(gpt_model_init(before, 7));
            train(before, c, B, T, 0, half, 0);
            for (int tensor = 0; tensor < 4; tensor++) {
                if (tensor == GPT_TENSOR_GRAD) continue;
                param_set set = read_params(before, c, tensor);
                write_params(after, &set, tensor);
            }
            EXPECT_OK(gpt_model_set_step(after, gpt_model_step(before)));
            train(after, c, B, T, half, half, 0);
            param_set again = read_params(after, c, GPT_TENSOR_VALUE);
            EXPECT(same_params(&end, &again));
            gpt_model_free(before);
            gpt_model_free(after);
        }
    }
}

/* Dropout changes with the step, the micro-step and the seed, and stays out of loss and logits. */
static void test_dropout(void) {
    enum { B = 2, T = 11 };
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        name_case(&families[1], B, T);
        gpt_model *wet = new_model(c, 1, B, T, 0.3f), *dry = new_model(c, 1, B, T, 0.0f);
        write_random_params(wet, c);
        param_set values = read_params(wet, c, GPT_TENSOR_VALUE);
        write_params(dry, &values, GPT_TENSOR_VALUE);
        int32_t *tokens = random_ints(B * T, c->vocab_size);
        float loss[2], micro[2], step, repeated;
        EXPECT_OK(gpt_model_loss(wet, tokens, tokens, B, T, &loss[0], NULL));
        EXPECT_OK(gpt_model_loss(dry, tokens, tokens, B, T, &loss[1], NULL));
        EXPECT(loss[0] == loss[1]);
        double *wet_logits = read_logits(wet, c, tokens, B, T);
        EXPECT_SAME("logits", wet_logits, read_logits(dry, c, tokens, B, T), B * T * c->vocab_size);
        for (int i = 0; i < 2; i++) {
            EXPECT_OK(gpt_model_backward(wet, tokens, tokens, B, T, 1.0f, &micro[i]));
        }
        EXPECT_OK(gpt_model_set_step(wet, 5));
        EXPECT_OK(gpt_model_zero_grads(wet));
        EXPECT_OK(gpt_model_backward(wet, tokens, tokens, B, T, 1.0f, &step));
        EXPECT_OK(gpt_model_set_step(wet, 0));
        EXPECT_OK(gpt_model_zero_grads(wet));
        EXPECT_OK(gpt_model_backward(wet, tokens, tokens, B, T, 1.0f, &repeated));
        EXPECT(micro[0] != loss[0]);
        EXPECT(micro[0] != micro[1]);
        EXPECT(step != micro[0]);
        EXPECT(repeated == micro[0]);
        gpt_model_free(wet);
        gpt_model_free(dry);
    }
}

/* ---- independent handles ---- */

typedef struct runner {
    gpt_model *model;
    const gpt_config *c;
    int32_t *tokens;
    int B, T, status;
} runner;

static void *run_training(void *pointer) {
    runner *r = pointer;
    for (int step = 0; step < 8 && r->status == GPT_OK; step++) {
        float loss;
        r->status = gpt_model_backward(r->model, r->tokens, r->tokens, r->B, r->T, 1.0f, &loss);
        if (r->status == GPT_OK) r->status = update_adamw(r->model, &adamw, NULL, NULL);
    }
    return NULL;
}

/* Two models trained at once in two threads end where they end when trained one after the other. */
static void test_independent_handles(void) {
    EACH_PLACE {
        test_case("two threads");
        runner runners[4];
        for (int i = 0; i < 4; i++) {
            const gpt_config *c = &families[i % 2].config;
            runners[i] = (runner){.c = c, .B = 2, .T = 13};
            runners[i].model = new_model(c, 1, 2, 13, 0.1f);
            EXPECT_OK(gpt_model_init(runners[i].model, 5));
            test.counter = 0;
            runners[i].tokens = random_ints(26, c->vocab_size);
        }
        run_training(&runners[0]);
        run_training(&runners[1]);
        pthread_t threads[2];
        for (int i = 0; i < 2; i++) {
            EXPECT(pthread_create(&threads[i], NULL, run_training, &runners[2 + i]) == 0);
        }
        for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
        param_set ends[4];
        for (int i = 0; i < 4; i++) {
            EXPECT(runners[i].status == GPT_OK);
            ends[i] = read_params(runners[i].model, runners[i].c, GPT_TENSOR_VALUE);
            gpt_model_free(runners[i].model);
        }
        EXPECT(same_params(&ends[0], &ends[2]));
        EXPECT(same_params(&ends[1], &ends[3]));
    }
}

/* ---- sizes ---- */

/* A model for larger batches gives what a model of just this size gives. */
static void test_smaller_calls(void) {
    static const int sizes[][2] = {{1, 1}, {1, 24}, {5, 1}, {2, 13}, {5, 24}};
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            gpt_model *large = new_model(c, 1, 5, 0, 0.0f);
            for (int k = f % test_step(2); k < TEST_COUNT(sizes); k += test_step(2)) {
                int B = sizes[k][0], T = sizes[k][1], N = B * T;
                name_case(&families[f], B, T);
                write_random_params(large, c);
                param_set values = read_params(large, c, GPT_TENSOR_VALUE);
                gpt_model *small = new_model(c, 0, B, T, 0.0f);
                write_params(small, &values, GPT_TENSOR_VALUE);
                int32_t *tokens = random_ints(N, c->vocab_size);
                double *want = read_logits(small, c, tokens, B, T);
                EXPECT_CLOSE("logits", read_logits(large, c, tokens, B, T), want, N, c->vocab_size,
                             test_tols(1e-5, 5e-2));
                float losses[2];
                EXPECT_OK(gpt_model_loss(small, tokens, tokens, B, T, &losses[0], NULL));
                EXPECT_OK(gpt_model_loss(large, tokens, tokens, B, T, &losses[1], NULL));
                EXPECT_NEAR("loss", losses[1], losses[0], test_tols(1e-5, 5e-2));
                gpt_model_free(small);
            }
            gpt_model_free(large);
        }
    }
}

/* In two calls: with equal weights the gradient of the mean loss; with others that of a sum over rows, which
 * is the sum of the rows' own. Losses are those of the training pass. */
static void test_weighted(void) {
    enum { B = 3, T = 9, N = B * T };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            name_case(&families[f], B, T);
            gpt_model *model = new_model(c, 1, B, T, 0.0f);
            write_random_params(model, c);
            param_set params = read_params(model, c, GPT_TENSOR_VALUE);
            int32_t *tokens = random_ints(N, c->vocab_size);
            int32_t *targets = random_targets(N, c->vocab_size);
            float loss, losses[N], weights[N], rows[B] = {0.5f, -2.0f, 0.0f};
            int n_valid = 0;
            for (int i = 0; i < N; i++) n_valid += targets[i] >= 0;
            EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 1.0f, &loss));
            param_set whole = read_params(model, c, GPT_TENSOR_GRAD);
            EXPECT_OK(gpt_model_zero_grads(model));
            double sum = 0;
            EXPECT_OK(gpt_model_forward(model, tokens, targets, B, T, losses));
            for (int i = 0; i < N; i++) sum += losses[i], weights[i] = 1.0f / (float)n_valid;
            EXPECT_NEAR("loss", sum / n_valid, loss, 1e-5);
            EXPECT_OK(gpt_model_backward_weighted(model, weights, B, T));
            param_set same = read_params(model, c, GPT_TENSOR_GRAD);
            expect_close_sets("gradients", &same, &whole, 1.0, test_tols(1e-6, 1e-2));

            EXPECT_OK(gpt_model_zero_grads(model));
            for (int b = 0; b < B; b++) {
                int n = 0;
                for (int t = 0; t < T; t++) n += targets[b * T + t] >= 0;
                if (n)
                    EXPECT_OK(gpt_model_backward(model, tokens + b * T, targets + b * T, 1, T,
                                                 rows[b] * (float)n, NULL));
            }
            param_set parts = read_params(model, c, GPT_TENSOR_GRAD);
            EXPECT_OK(gpt_model_zero_grads(model));
            EXPECT_OK(gpt_model_forward(model, tokens, targets, B, T, losses));
            for (int i = 0; i < N; i++) weights[i] = rows[i / T];
            EXPECT_OK(gpt_model_backward_weighted(model, weights, B, T));
            param_set got = read_params(model, c, GPT_TENSOR_GRAD);
            expect_close_sets("weighted gradients", &got, &parts, 1.0, test_tols(2e-5, 5e-2));
            gpt_model_free(model);

            gpt_options options = place.options; /* which a mean loss would have */
            options.training = 1, options.max_batch = B, options.max_seq = T;
            options.label_smoothing = 0.3f, options.z_loss = 2;
            EXPECT_OK(gpt_model_create(c, &options, &model));
            write_params(model, &params, GPT_TENSOR_VALUE);
            EXPECT_OK(gpt_model_forward(model, tokens, targets, B, T, losses));
            EXPECT_OK(gpt_model_backward_weighted(model, weights, B, T));
            param_set plain = read_params(model, c, GPT_TENSOR_GRAD);
            expect_close_sets("gradients without z-loss", &plain, &got, 1.0, 0);
            gpt_model_free(model);
        }
    }
}

/* The second call needs the first one just before, of the same sizes, and weights that are numbers. */
static void test_weighted_refused(void) {
    enum { B = 2, T = 5, N = B * T };
    EACH_PLACE {
        const gpt_config *c = &families[0].config;
        name_case(&families[0], B, T);
        gpt_model *model = new_model(c, 1, B, T, 0.0f);
        write_random_params(model, c);
        int32_t *tokens = random_ints(N, c->vocab_size);
        float losses[N], weights[N] = {0};
        EXPECT(gpt_model_backward_weighted(model, weights, B, T) == GPT_ERR_ARGUMENT);
        EXPECT_OK(gpt_model_forward(model, tokens, tokens, B, T, losses));
        EXPECT(gpt_model_backward_weighted(model, weights, 1, T) == GPT_ERR_ARGUMENT);
        EXPECT_OK(gpt_model_loss(model, tokens, tokens, B, T, losses, NULL));
        EXPECT(gpt_model_backward_weighted(model, weights, B, T) == GPT_ERR_ARGUMENT);
        EXPECT_OK(gpt_model_forward(model, tokens, tokens, B, T, losses));
        /* A call that is refused has taken the documents of the pass away. */
        EXPECT(gpt_model_loss(model, NULL, tokens, B, T, losses, NULL) == GPT_ERR_ARGUMENT);
        EXPECT(gpt_model_backward_weighted(model, weights, B, T) == GPT_ERR_ARGUMENT);
        EXPECT_OK(gpt_model_forward(model, tokens, tokens, B, T, losses));
        /* So has a parameter that was written. */
        param_set params = read_params(model, c, GPT_TENSOR_VALUE);
        write_params(model, &params, GPT_TENSOR_VALUE);
        EXPECT(gpt_model_backward_weighted(model, weights, B, T) == GPT_ERR_ARGUMENT);
        EXPECT_OK(gpt_model_forward(model, tokens, tokens, B, T, losses));
        weights[N - 1] = NAN;
        EXPECT(gpt_model_backward_weighted(model, weights, B, T) == GPT_ERR_ARGUMENT);
        weights[N - 1] = 0;
        EXPECT_OK(gpt_model_backward_weighted(model, weights, B, T));
        EXPECT(gpt_model_backward_weighted(model, weights, B, T) == GPT_ERR_ARGUMENT);
        gpt_model_free(model);
    }
}

TEST_API_MAIN({"accumulation", test_accumulation}, {"update", test_update},
              {"loss of a step", test_step_loss}, {"weighted losses", test_weighted},
              {"weighted losses, refused", test_weighted_refused}, {"zero rate", test_zero_rate},
              {"training", test_training}, {"repeat and resume", test_repeat_and_resume},
              {"dropout", test_dropout}, {"independent handles", test_independent_handles},
              {"smaller calls", test_smaller_calls})
