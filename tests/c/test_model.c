/* Models and sessions through gpt.h: gradients, training, decoding, plans. */
#include "testing.h"

#include "models.h"
#include "reference_model.h"

#include <pthread.h>
#include <stdbool.h>

static const gpt_adamw adamw = {3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};

static void name_case(const family *f, int B, int T) {
    test_case("%s B=%d T=%d", f->name, B, T);
}

static double *read_logits(gpt_model *model, const gpt_config *c, const int32_t *tokens, int B,
                           int T) {
    int64_t n = (int64_t)B * T * c->vocab_size;
    float *logits = host_floats(n);
    EXPECT_OK(gpt_model_logits(model, tokens, B, T, logits));
    return doubles_of(logits, n);
}

/* ---- the reference, and the engine against it ---- */

/* The float64 model itself, by finite differences of every parameter. */
static void test_reference(void) {
    place_begin();
    EXPECT(place_next());
    for (int f = 0; f < TEST_COUNT(families); f++) {
        enum { B = 2, T = 5 };
        const gpt_config *c = &families[f].config;
        name_case(&families[f], B, T);
        gpt_model *model = new_model(c, 0, 0, 0, 0.0f);
        write_random_params(model, c);
        int32_t *tokens = random_ints(B * T, c->vocab_size);
        int32_t *targets = random_targets(B * T, c->vocab_size);
        ref_model m = ref_model_of(model, c, tokens, targets, B, T);
        ref_model_forward(&m);
        ref_model_backward(&m, 1.0);
        for (int i = 0; i < m.n_params; i++) {
            EXPECT_GRADIENT(m.info[i].name, ref_model_forward, &m, m.value[i], m.grad[i],
                            m.info[i].size);
        }
        gpt_model_free(model);
    }
    while (place_next()) {
    }
}

static void check_against_reference(const family *f, gpt_model *model, int B, int T) {
    const gpt_config *c = &f->config;
    int N = B * T;
    name_case(f, B, T);
    write_random_params(model, c);
    int32_t *tokens = random_ints(N, c->vocab_size);
    int32_t *targets = random_targets(N, c->vocab_size);
    ref_model m = ref_model_of(model, c, tokens, targets, B, T);
    ref_model_forward(&m);
    ref_model_backward(&m, 0.5);

    double *logits = read_logits(model, c, tokens, B, T);
    EXPECT_CLOSE("logits", logits, m.logits, N, c->vocab_size, test_tols(2e-5, 0.1));
    float loss = NAN, backward_loss = NAN, *losses = host_floats(N);
    EXPECT_OK(gpt_model_loss(model, tokens, targets, B, T, &loss, losses));
    EXPECT_NEAR("loss", loss, m.loss, test_tols(1e-5, 0.1));
    EXPECT_CLOSE("losses", doubles_of(losses, N), m.losses, 1, N, test_tols(2e-5, 0.1));
    EXPECT_OK(gpt_model_loss(model, tokens, targets, B, T, &loss, NULL));
    EXPECT_NEAR("loss without losses", loss, m.loss, test_tols(1e-5, 0.1));

    EXPECT_OK(gpt_model_zero_grads(model));
    EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 0.5f, &backward_loss));
    EXPECT_NEAR("loss of backward", backward_loss, m.loss, test_tols(1e-5, 0.1));
    param_set grads = read_params(model, c, GPT_TENSOR_GRAD);
    for (int i = 0; i < grads.n; i++) {
        const gpt_param *p = &grads.info[i];
        int64_t rows = p->n_dim == 2 ? p->shape[0] : 1;
        EXPECT_CLOSE(p->name, doubles_of(grads.x[i], p->size), m.grad[i], rows, p->size / rows,
                     test_tols(1e-4, 0.2));
    }
}

static void test_against_reference(void) {
    EACH_PLACE {
        for (int f = 0; f < TEST_COUNT(families); f++) {
            gpt_model *model = new_model(&families[f].config, 1, 3, 0, 0.0f);
            check_against_reference(&families[f], model, 3, 24);
            check_against_reference(&families[f], model, 1, 1);
            check_against_reference(&families[f], model, 2, 7);
            gpt_model_free(model);
        }
    }
}

/* ---- finite differences of the engine itself ---- */

typedef struct problem {
    gpt_model *model;
    const gpt_config *c;
    int32_t *tokens, *targets;
    int B, T;
    float dropout;
} problem;

/* With dropout the loss is that of a backward, whose masks depend on the step and on the number of
 * calls since the gradients were cleared: they are the same each time. */
static double loss_of(problem *p) {
    int N = p->B * p->T;
    float loss = NAN;
    if (p->dropout > 0.0f) {
        EXPECT_OK(gpt_model_zero_grads(p->model));
        EXPECT_OK(gpt_model_backward(p->model, p->tokens, p->targets, p->B, p->T, 1.0f, &loss));
        return loss;
    }
    /* The mean again, in float64: its rounding to float32 would be a part of the difference. */
    float *losses = host_floats(N);
    EXPECT_OK(gpt_model_loss(p->model, p->tokens, p->targets, p->B, p->T, &loss, losses));
    double sum = 0.0;
    for (int n = 0; n < N; n++) sum += losses[n];
    return sum / count_targets(p->targets, N);
}

static double loss_at(problem *p, int i, const float *x, const double *r, double h, int64_t n) {
    float *moved = host_floats(n);
    for (int64_t k = 0; k < n; k++) moved[k] = (float)(x[k] + h * r[k]);
    EXPECT_OK(gpt_model_write(p->model, i, GPT_TENSOR_VALUE, moved, n));
    return loss_of(p);
}

/* The derivative along a unit vector r. A loss near 4 is known to about 3e-7, so a step of length h
 * leaves 3e-7 / h of noise: with h = 0.01 that is 3e-5, where norms of gradients are 0.01 to 3.
 * What the differences leave out goes with h^2, and is at most 0.2 % of the norm here (0.6 % with
 * h = 0.02). Hence the margin. */
static void check_direction(problem *p, const param_set *values, const param_set *grads, int i,
                            const double *r, double norm) {
    const double h = 0.01;
    int64_t n = values->info[i].size;
    double want = test_dot(doubles_of(grads->x[i], n), r, n);
    double up = loss_at(p, i, values->x[i], r, h, n), down = loss_at(p, i, values->x[i], r, -h, n);
    EXPECT_NEAR(values->info[i].name, (up - down) / (2 * h), want, 5e-3 * norm + 1e-4);
    EXPECT_OK(gpt_model_write(p->model, i, GPT_TENSOR_VALUE, values->x[i], n));
}

static double *unit_vector(const double *x, int64_t n) {
    double *unit = host_copy(x, n), norm = sqrt(test_dot(x, x, n));
    for (int64_t i = 0; i < n; i++) unit[i] /= norm > 0.0 ? norm : 1.0;
    return unit;
}

/* Along the gradient, where the difference is largest, and along a random direction. */
static void check_differences(problem *p) {
    write_random_params(p->model, p->c);
    EXPECT_OK(gpt_model_zero_grads(p->model));
    float loss;
    EXPECT_OK(gpt_model_backward(p->model, p->tokens, p->targets, p->B, p->T, 1.0f, &loss));
    param_set values = read_params(p->model, p->c, GPT_TENSOR_VALUE);
    param_set grads = read_params(p->model, p->c, GPT_TENSOR_GRAD);
    for (int i = 0; i < values.n; i++) {
        int64_t n = values.info[i].size;
        double *g = doubles_of(grads.x[i], n), *r = random_f32(n, 1.0);
        double norm = sqrt(test_dot(g, g, n));
        check_direction(p, &values, &grads, i, unit_vector(g, n), norm);
        check_direction(p, &values, &grads, i, unit_vector(r, n), norm);
    }
}

static void test_finite_differences(void) {
    static const float dropouts[] = {0.0f, 0.25f};
    EACH_PLACE {
        /* bfloat16 has no digits left for differences, and more threads compute nothing else. */
        if (test.act_bytes != 4 || places[place.at].threads > 1) continue;
        for (int k = 0; k < TEST_COUNT(families) * TEST_COUNT(dropouts); k++) {
            const family *f = &families[k / TEST_COUNT(dropouts)];
            problem p = {.c = &f->config, .B = 2, .T = 11, .dropout = dropouts[k % 2]};
            test_case("%s dropout=%g", f->name, p.dropout);
            p.tokens = random_ints(p.B * p.T, f->config.vocab_size);
            p.targets = random_targets(p.B * p.T, f->config.vocab_size);
            p.model = new_model(p.c, 1, p.B, p.T, p.dropout);
            check_differences(&p);
            gpt_model_free(p.model);
        }
    }
}

/* ---- initial values ---- */

static int has_suffix(const char *name, const char *suffix) {
    size_t n = strlen(name), m = strlen(suffix);
    return n >= m && !strcmp(name + n - m, suffix);
}

/* The mean and deviation of what gpt.h promises, within six standard errors. */
static void check_initial(const gpt_param *p, const float *x, const gpt_config *c) {
    double mean = 0.0, square = 0.0, std = 0.02;
    if (p->n_dim == 1) {
        for (int64_t k = 0; k < p->size; k++)
            EXPECT(x[k] == (has_suffix(p->name, "weight") ? 1.0f : 0.0f));
        return;
    }
    if (has_suffix(p->name, "proj.weight")) std /= sqrt(2.0 * c->n_layer);
    for (int64_t k = 0; k < p->size; k++) mean += x[k] / (double)p->size;
    for (int64_t k = 0; k < p->size; k++) square += x[k] * (double)x[k] / (double)p->size;
    double n = (double)p->size;
    EXPECT_NEAR("mean", mean, 0.0, 6 * std / sqrt(n));
    EXPECT_NEAR("deviation", sqrt(square), std, 6 * std / sqrt(2 * n));
}

static void test_init(void) {
    EACH_PLACE {
        for (int f = 0; f < TEST_COUNT(families); f++) {
            const gpt_config *c = &families[f].config;
            test_case("%s", families[f].name);
            gpt_model *model = new_model(c, 1, 1, 0, 0.0f);
            EXPECT_OK(gpt_model_init(model, 42));
            param_set one = read_params(model, c, GPT_TENSOR_VALUE);
            EXPECT_OK(gpt_model_init(model, 43));
            param_set other = read_params(model, c, GPT_TENSOR_VALUE);
            EXPECT_OK(gpt_model_init(model, 42));
            param_set again = read_params(model, c, GPT_TENSOR_VALUE);
            EXPECT(same_params(&one, &again));
            EXPECT(!same_params(&one, &other));
            for (int i = 0; i < one.n; i++) {
                check_initial(&one.info[i], one.x[i], c);
                for (int k = 0; k < i; k++) { /* no two matrices are the same numbers */
                    int64_t n =
                        one.info[i].size < one.info[k].size ? one.info[i].size : one.info[k].size;
                    if (one.info[i].n_dim == 1 || one.info[k].n_dim == 1) continue;
                    EXPECT(memcmp(one.x[i], one.x[k], (size_t)n * sizeof(float)) != 0);
                }
            }
            gpt_model_free(model);
        }
    }
}

/* A model that knows nothing gives every token the same probability. */
static void test_first_loss(void) {
    enum { B = 3, T = 24 };
    EACH_PLACE {
        for (int f = 0; f < TEST_COUNT(families); f++) {
            const gpt_config *c = &families[f].config;
            name_case(&families[f], B, T);
            gpt_model *model = new_model(c, 0, B, T, 0.0f);
            EXPECT_OK(gpt_model_init(model, 1));
            int32_t *tokens = random_ints(B * T, c->vocab_size);
            int32_t *targets = random_ints(B * T, c->vocab_size);
            float loss = NAN;
            EXPECT_OK(gpt_model_loss(model, tokens, targets, B, T, &loss, NULL));
            EXPECT_NEAR("loss", loss, log(c->vocab_size), 0.02 * log(c->vocab_size));
            gpt_model_free(model);
        }
    }
}

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

/* Trains n steps on a batch that depends on the step alone; returns the last loss. */
static float train(gpt_model *model, const gpt_config *c, int B, int T, int first, int n,
                   int repeated) {
    float loss = NAN;
    uint64_t counter = test.counter;
    for (int step = first; step < first + n; step++) {
        test.counter = 1000000 + (uint64_t)(repeated ? 0 : step) * 10000;
        int32_t *tokens = random_ints(B * T, c->vocab_size);
        int32_t *targets = random_targets(B * T, c->vocab_size);
        for (int micro = 0; micro < 2; micro++) {
            EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 0.5f, &loss));
        }
        EXPECT_OK(update_adamw(model, &adamw, NULL, NULL));
    }
    test.counter = counter;
    return loss;
}

/* Thirty updates on one batch learn it. */
static void test_training(void) {
    enum { B = 2, T = 16, STEPS = 30 };
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

/* The same training twice, bit for bit, with dropout and micro-batches; and once more with a pause
 * in the middle, from which another model continues. */
static void test_repeat_and_resume(void) {
    enum { B = 2, T = 11 };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            name_case(&families[f], B, T);
            param_set ends[3];
            for (int run = 0; run < 2; run++) {
                gpt_model *model = new_model(c, 1, B, T, 0.2f);
                EXPECT_OK(gpt_model_init(model, 7));
                train(model, c, B, T, 0, 6, 0);
                ends[run] = read_params(model, c, GPT_TENSOR_VALUE);
                gpt_model_free(model);
            }
            gpt_model *before = new_model(c, 1, B, T, 0.2f), *after = new_model(c, 1, B, T, 0.2f);
            EXPECT_OK(gpt_model_init(before, 7));
            train(before, c, B, T, 0, 3, 0);
            for (int tensor = 0; tensor < 4; tensor++) {
                if (tensor == GPT_TENSOR_GRAD) continue;
                param_set set = read_params(before, c, tensor);
                write_params(after, &set, tensor);
            }
            EXPECT_OK(gpt_model_set_step(after, gpt_model_step(before)));
            train(after, c, B, T, 3, 3, 0);
            ends[2] = read_params(after, c, GPT_TENSOR_VALUE);
            EXPECT(same_params(&ends[0], &ends[1]));
            EXPECT(same_params(&ends[0], &ends[2]));
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
            for (int k = 0; k < TEST_COUNT(sizes); k++) {
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

/* ---- sessions ---- */

/* Sequences of one session, what they hold, and the logits they must give. */
typedef struct texts {
    const gpt_config *c;
    gpt_model *model;
    gpt_session *session;
    int n_seq, n_ctx;
    int32_t *tokens; /* (n_seq, n_ctx) */
    double *want;    /* (n_seq, n_ctx, V) */
    int *lengths;    /* (n_seq) */
} texts;

static texts new_texts(gpt_model *model, const gpt_config *c, int n_seq, int n_ctx) {
    texts t = {.c = c, .model = model, .n_seq = n_seq, .n_ctx = n_ctx};
    t.tokens = random_ints(n_seq * n_ctx, c->vocab_size);
    int *lengths = host_ints(n_seq);
    t.lengths = lengths;
    t.want = read_logits(model, c, t.tokens, n_seq, n_ctx);
    EXPECT_OK(gpt_session_create(model, n_seq, n_ctx, &t.session));
    return t;
}

/* Appends the next counts[s] tokens of each sequence s, in the order given, and compares the logits
 * with those of the whole text: after the last of each, or after every third, all, or none of them. */
static void decode(texts *t, const int *order, const int *counts, int n_order) {
    int n = 0, n_logits = 0, V = t->c->vocab_size, which = random_below(4);
    int32_t *tokens = host_ints(t->n_seq * t->n_ctx), *seqs = host_ints(t->n_seq * t->n_ctx);
    uint8_t *wanted = (uint8_t *)host_ints(t->n_seq * t->n_ctx);
    double *want = host_zeros((int64_t)t->n_seq * t->n_ctx * V);
    for (int k = 0; k < n_order; k++) {
        int s = order[k];
        for (int i = 0; i < counts[k]; i++, n++) {
            const double *row = t->want + ((int64_t)s * t->n_ctx + t->lengths[s]) * V;
            seqs[n] = s;
            tokens[n] = t->tokens[s * t->n_ctx + t->lengths[s]++];
            wanted[n] = which == 1 ? n % 3 == 0 : which == 2 ? 255 : 0;
            if (which == 0 ? i + 1 == counts[k] : wanted[n])
                memcpy(want + (int64_t)n_logits++ * V, row, (size_t)V * sizeof *row);
        }
    }
    if (n == 0) return;
    float *logits = n_logits ? host_floats((int64_t)n_logits * V) : NULL;
    EXPECT_OK(gpt_session_decode(t->session, tokens, seqs, which ? wanted : NULL, n, logits));
    if (n_logits > 0)
        EXPECT_CLOSE("logits", doubles_of(logits, (int64_t)n_logits * V), want, n_logits, V,
                     test_tols(2e-5, 0.1));
    for (int s = 0; s < t->n_seq; s++) EXPECT(gpt_session_length(t->session, s) == t->lengths[s]);
}

/* Pieces of random length of some sequences in a random order, until all are full. */
static void decode_ragged(texts *t, int most) {
    int order[8], counts[8];
    for (;;) {
        int left = 0, first = random_below(t->n_seq), n = 1 + random_below(t->n_seq);
        for (int k = 0; k < n; k++) {
            order[k] = (first + k) % t->n_seq;
            counts[k] = random_below(most + 1);
            int room = t->n_ctx - t->lengths[order[k]];
            if (counts[k] > room) counts[k] = room;
        }
        decode(t, order, counts, n);
        for (int s = 0; s < t->n_seq; s++) left += t->n_ctx - t->lengths[s];
        if (left == 0) return;
    }
}

static void rewind_to(texts *t, int s, int length) {
    EXPECT_OK(gpt_session_rewind(t->session, s, length));
    t->lengths[s] = length;
    EXPECT(gpt_session_length(t->session, s) == length);
}

/* Other tokens after a rewind: what was there must be forgotten. */
static void check_rewind(texts *t) {
    for (int s = 0; s < t->n_seq; s++) {
        int length = s == 0 ? 0 : t->n_ctx / (s + 1);
        rewind_to(t, s, length);
        for (int i = length; i < t->n_ctx; i++) {
            t->tokens[s * t->n_ctx + i] = random_below(t->c->vocab_size);
        }
    }
    t->want = read_logits(t->model, t->c, t->tokens, t->n_seq, t->n_ctx);
    decode_ragged(t, 6);
    rewind_to(t, 0, t->n_ctx);
}

/* A copy of any length continues as its original does, and then differently, and so does the
 * original. */
static void check_fork(texts *t) {
    int n_ctx = t->n_ctx, V = t->c->vocab_size;
    static const int lengths[] = {0, 1, 7, 20};
    for (int k = 0; k < TEST_COUNT(lengths); k++) {
        int length = lengths[k], from = k % t->n_seq, to = (k + 1) % t->n_seq;
        EXPECT_OK(gpt_session_fork(t->session, from, to, length));
        EXPECT_OK(gpt_session_fork(t->session, from, from, length));
        t->lengths[from] = t->lengths[to] = length;
        memcpy(t->tokens + to * n_ctx, t->tokens + from * n_ctx, sizeof(int32_t) * (size_t)length);
        for (int i = length; i < n_ctx; i++) t->tokens[to * n_ctx + i] = random_below(V);
        t->want = read_logits(t->model, t->c, t->tokens, t->n_seq, n_ctx);
        decode_ragged(t, 4);
    }
}

static void test_sessions(void) {
    enum { N_SEQ = 3, N_CTX = 21 };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            static const int pieces[] = {1, 4, N_CTX};
            const gpt_config *c = &families[f].config;
            for (int k = 0; k < TEST_COUNT(pieces); k++) {
                test_case("%s, up to %d tokens at once", families[f].name, pieces[k]);
                gpt_model *model = new_model(c, 0, N_SEQ, N_CTX, 0.0f);
                write_random_params(model, c);
                texts t = new_texts(model, c, N_SEQ, N_CTX);
                decode_ragged(&t, pieces[k]);
                check_rewind(&t);
                check_fork(&t);
                gpt_session_free(t.session);
                gpt_model_free(model);
            }
        }
    }
}

/* Prompts longer than the pieces in which a session takes them, with sequences that end just
 * before, at and after a border of 256 rows, in one call. */
static void test_long_prompts(void) {
    static const int counts[][4] = {{300, 300, 300, 300}, {255, 1, 256, 1},   {256, 256, 0, 300},
                                    {257, 300, 1, 2},     {1, 255, 299, 300}, {254, 1, 1, 1}};
    enum { N_SEQ = 4, N_CTX = 300 };
    static const int order[] = {2, 0, 3, 1};
    gpt_config c = families[1].config;
    c.block_size = N_CTX;
    c.n_layer = 1;
    EACH_PLACE {
        gpt_model *model = new_model(&c, 0, N_SEQ, 0, 0.0f);
        test_case("prompts of up to %d tokens", N_CTX);
        write_random_params(model, &c);
        texts t = new_texts(model, &c, N_SEQ, 0 + N_CTX);
        for (int k = 0; k < TEST_COUNT(counts); k++) {
            decode(&t, order, counts[k], N_SEQ);
            for (int s = 0; s < N_SEQ; s++) rewind_to(&t, s, 0);
        }
        gpt_session_free(t.session);
        gpt_model_free(model);
    }
}

/* A prompt that does not fit into a piece with another begins the next one: in bf16 it gets the bits
 * that it would get alone. (In fp32 a product of few rows may be summed in another order.) */
static void test_several_prompts(void) {
    enum { N_SEQ = 2, N_CTX = 300, OTHERS = 100, OWN = 200 };
    gpt_config c = families[1].config;
    c.block_size = N_CTX;
    EACH_PLACE {
        test_case("%d tokens after %d", OWN, OTHERS);
        gpt_model *model = new_model(&c, 0, 0, 0, 0.0f);
        gpt_session *session;
        write_random_params(model, &c);
        EXPECT_OK(gpt_session_create(model, N_SEQ, N_CTX, &session));
        int32_t *tokens = random_ints(OTHERS + OWN, c.vocab_size);
        int32_t *seqs = host_ints(OTHERS + OWN);
        for (int i = 0; i < OTHERS + OWN; i++) seqs[i] = i < OTHERS ? 1 : 0;
        float *alone = host_floats(c.vocab_size), *both = host_floats(N_SEQ * c.vocab_size);
        EXPECT_OK(gpt_session_decode(session, tokens + OTHERS, seqs + OTHERS, NULL, OWN, alone));
        EXPECT_OK(gpt_session_rewind(session, 0, 0));
        EXPECT_OK(gpt_session_decode(session, tokens, seqs, NULL, OTHERS + OWN, both));
        if (test.act_bytes == 2)
            EXPECT_SAME("logits", doubles_of(both + c.vocab_size, c.vocab_size),
                        doubles_of(alone, c.vocab_size), c.vocab_size);
        else
            EXPECT_CLOSE("logits", doubles_of(both + c.vocab_size, c.vocab_size),
                         doubles_of(alone, c.vocab_size), 1, c.vocab_size, 2e-5);
        gpt_session_free(session);
        gpt_model_free(model);
    }
}

/* The logits of a text do not depend on the other texts of the batch: to the bit, where vectors multiply
 * (on a CPU, but for AMX). */
static void test_several_texts(void) {
    enum { N_SEQ = 5, STEPS = 4, N_CTX = N_SEQ + STEPS };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            int V = c->vocab_size, exact = place.options.device == GPT_DEVICE_CPU;
            if (test.act_bytes == 2 && strcmp(gpt_cpu_level(), "amx") == 0) exact = 0;
            test_case("%s", families[f].name);
            gpt_model *model = new_model(c, 0, 0, 0, 0.0f);
            write_random_params(model, c);
            gpt_session *session;
            EXPECT_OK(gpt_session_create(model, N_SEQ, N_CTX, &session));
            int32_t *tokens = random_ints(N_SEQ * N_CTX, V), *step = host_ints(N_SEQ * N_SEQ);
            int32_t *seqs = host_ints(N_SEQ * N_SEQ);
            float *together = host_floats(STEPS * N_SEQ * V), *alone = host_floats(V);
            for (int t = 0; t < STEPS; t++) { /* prompts of 1 to N_SEQ tokens, then one each */
                int n = 0;
                for (int q = 0; q < N_SEQ; q++) {
                    int at = gpt_session_length(session, q), count = t == 0 ? q + 1 : 1;
                    for (int i = 0; i < count; i++, n++)
                        seqs[n] = q, step[n] = tokens[q * N_CTX + at + i];
                }
                EXPECT_OK(
                    gpt_session_decode(session, step, seqs, NULL, n, together + t * N_SEQ * V));
            }
            for (int q = 0; q < N_SEQ; q++) {
                EXPECT_OK(gpt_session_rewind(session, q, 0));
                for (int i = 0; i < N_SEQ; i++) seqs[i] = q;
                for (int t = 0, at = 0, count; t < STEPS; t++, at += count) {
                    count = t == 0 ? q + 1 : 1;
                    EXPECT_OK(gpt_session_decode(session, tokens + q * N_CTX + at, seqs, NULL,
                                                 count, alone));
                    double *got = doubles_of(alone, V);
                    double *want = doubles_of(together + (t * N_SEQ + q) * V, V);
                    if (exact)
                        EXPECT_SAME("logits", got, want, V);
                    else
                        EXPECT_CLOSE("logits", got, want, 1, V, test_tols(2e-5, 0.1));
                }
            }
            gpt_session_free(session);
            gpt_model_free(model);
        }
    }
}

/* Sessions share the model's weights and nothing else: two of them, and training and evaluation in
 * between, do not disturb each other. */
static void test_several_sessions(void) {
    enum { N_SEQ = 2, N_CTX = 9 };
    EACH_PLACE {
        const gpt_config *c = &families[2].config;
        test_case("%s", families[2].name);
        gpt_model *model = new_model(c, 1, N_SEQ, N_CTX, 0.0f);
        write_random_params(model, c);
        texts one = new_texts(model, c, N_SEQ, N_CTX), two = new_texts(model, c, N_SEQ, N_CTX);
        static const int order[] = {0, 1}, counts[] = {2, 1};
        for (int k = 0; k < 4; k++) {
            float loss;
            decode(&one, order, counts, 2);
            EXPECT_OK(gpt_model_backward(model, one.tokens, two.tokens, N_SEQ, N_CTX, 1.0f, &loss));
            decode(&two, order, counts, 2);
            EXPECT_OK(gpt_model_loss(model, one.tokens, two.tokens, 1, N_CTX, &loss, NULL));
        }
        gpt_session_free(one.session);
        gpt_session_free(two.session);
        gpt_session_free(NULL);
        gpt_model_free(model);
    }
}

/* A model that only generates needs no batch buffers, and a session may be shorter than it. */
static void test_session_only(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            int n_ctx = c->block_size;
            test_case("%s", families[f].name);
            gpt_model *model = new_model(c, 0, 0, 0, 0.0f), *full = new_model(c, 1, 1, 0, 0.0f);
            write_random_params(full, c);
            param_set values = read_params(full, c, GPT_TENSOR_VALUE);
            write_params(model, &values, GPT_TENSOR_VALUE);
            texts t = {.c = c, .model = model, .n_seq = 1, .n_ctx = n_ctx};
            t.tokens = random_ints(n_ctx, c->vocab_size);
            t.want = read_logits(full, c, t.tokens, 1, n_ctx);
            t.lengths = host_ints(1);
            EXPECT_OK(gpt_session_create(model, 1, 0, &t.session));
            decode_ragged(&t, 5);
            gpt_session_free(t.session);
            gpt_model_free(model);
            gpt_model_free(full);
        }
    }
}

/* ---- what is kept ---- */

/* Without training, matrices are kept as products read them alone. Whether they are initialised or
 * written, once or again, the model computes what one for training does. */
static void test_kept_for_inference(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            int T = c->block_size;
            test_case("%s", families[f].name);
            gpt_model *lean = new_model(c, 0, 1, 0, 0.0f), *full = new_model(c, 1, 1, 0, 0.0f);
            int32_t *tokens = random_ints(T, c->vocab_size);
            for (int turn = 0; turn < 3; turn++) {
                if (turn == 0) {
                    EXPECT_OK(gpt_model_init(lean, 7));
                    EXPECT_OK(gpt_model_init(full, 7));
                } else {
                    write_random_params(full, c);
                    param_set values = read_params(full, c, GPT_TENSOR_VALUE);
                    write_params(lean, &values, GPT_TENSOR_VALUE);
                }
                double *want = read_logits(full, c, tokens, 1, T);
                EXPECT_SAME("logits", read_logits(lean, c, tokens, 1, T), want,
                            (int64_t)T * c->vocab_size);
            }
            bool is_cpu = place.options.device == GPT_DEVICE_CPU;
            for (int i = 0; i < gpt_config_param_count(c); i++) {
                gpt_param p;
                EXPECT_OK(gpt_config_param(c, i, &p));
                float *x = host_floats(p.size);
                bool only_products =
                    strstr(p.name, "attn.") || strstr(p.name, "mlp.") || strstr(p.name, "lm_head");
                bool refused = is_cpu && test.act_bytes == 2 && p.n_dim == 2 && only_products;
                EXPECT(gpt_model_read(lean, i, GPT_TENSOR_VALUE, x, p.size) ==
                       (refused ? GPT_ERR_ARGUMENT : GPT_OK));
                EXPECT(!refused || strstr(gpt_last_error(), p.name));
            }
            gpt_model_free(lean);
            gpt_model_free(full);
        }
    }
}

/* An embedding that is lent is read where it is, until it is written; a model that cannot do so copies
 * it. Either way the model computes the same. */
static void test_lent_embedding(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            int T = c->block_size, is_cpu = place.options.device == GPT_DEVICE_CPU;
            int64_t n = (int64_t)c->vocab_size * c->n_embd;
            for (int training = 0; training < 2; training++) {
                test_case("%s, %s", families[f].name, training ? "training" : "inference");
                gpt_model *model = new_model(c, training, 1, 0, 0.0f);
                int32_t *tokens = random_ints(T, c->vocab_size);
                write_random_params(model, c);
                double *before = read_logits(model, c, tokens, 1, T);
                float *old = host_floats(n), *lent = malloc(sizeof(float) * (size_t)n);
                float *back = host_floats(n);
                EXPECT_OK(gpt_model_read(model, 0, GPT_TENSOR_VALUE, old, n));
                for (int64_t k = 0; k < n; k++) lent[k] = (float)round_act(-0.5f * old[k]);

                int kept = -1, may_keep = is_cpu && !training && (test.act_bytes == 2 || !c->tied);
                EXPECT_OK(gpt_model_lend(model, 0, lent, n, &kept));
                EXPECT(kept == may_keep);
                EXPECT_OK(gpt_model_read(model, 0, GPT_TENSOR_VALUE, back, n));
                EXPECT(memcmp(back, lent, sizeof(float) * (size_t)n) == 0);
                double *after = read_logits(model, c, tokens, 1, T);
                EXPECT_OK(gpt_model_write(model, 0, GPT_TENSOR_VALUE, lent, n));
                EXPECT_SAME("written", read_logits(model, c, tokens, 1, T), after,
                            (int64_t)T * c->vocab_size);
                free(lent); /* nobody reads it any more */
                EXPECT_OK(gpt_model_write(model, 0, GPT_TENSOR_VALUE, old, n));
                EXPECT_SAME("back", read_logits(model, c, tokens, 1, T), before,
                            (int64_t)T * c->vocab_size);
                EXPECT(memcmp(before, after, sizeof(double) * (size_t)T) != 0);
                gpt_model_free(model);
            }
        }
    }
}

/* ---- plans ---- */

static int64_t count_params(const gpt_config *c) {
    int64_t sum = 0;
    for (int i = 0; i < gpt_config_param_count(c); i++) {
        gpt_param p;
        EXPECT_OK(gpt_config_param(c, i, &p));
        EXPECT(p.size == p.shape[0] * p.shape[1]);
        sum += p.size;
    }
    return sum;
}

/* Two operations for each weight of a product and each token, the head's included, and for
 * attention two products of T (T + 1) / 2 pairs of width C; "about" since T + 1 may count as T. */
static double forward_flops(const gpt_config *c, int T) {
    int HS = c->head_size ? c->head_size : c->n_embd / c->n_head, C = c->n_embd;
    double qkv = (c->n_head + 2 * c->n_kv_head) * HS, A = c->n_head * HS, pairs = 0;
    double fc = ref_activation_width(c->activation, c->n_ff);
    double weights = C * qkv + A * C + C * fc + (double)c->n_ff * C;
    for (int l = 0; l < c->n_layer; l++) {
        gpt_layer layer;
        EXPECT_OK(gpt_config_layer(c, l, &layer));
        for (int t = 0; t < T; t++)
            pairs += layer.window > 0 && layer.window <= t ? layer.window : t + 1;
    }
    return 2.0 * (c->n_layer * weights + (double)c->vocab_size * C) + 4 * A * pairs / T;
}

/* In bf16 each matrix once more, for training twice; sides are rounded up to panels of 16. */
static uint64_t packed_bytes_at_most(const gpt_config *c, int training) {
    uint64_t bytes = 0;
    for (int i = 0; i < gpt_config_param_count(c); i++) {
        gpt_param p;
        EXPECT_OK(gpt_config_param(c, i, &p));
        if (p.n_dim == 2)
            bytes += (training ? 4u : 2u) * (uint64_t)((p.shape[0] + 80) * (p.shape[1] + 32));
    }
    return bytes;
}

/* Numbers that something but products reads. */
static int64_t kept_numbers(const gpt_config *c) {
    int64_t n = 0;
    for (int i = 0; i < gpt_config_param_count(c); i++) {
        gpt_param p;
        EXPECT_OK(gpt_config_param(c, i, &p));
        bool embeds = strstr(p.name, "wte") || strstr(p.name, "wpe");
        if (p.n_dim == 1 || embeds) n += p.size;
    }
    return n;
}

static void check_plan(const gpt_config *c, int training, int max_batch, int max_seq) {
    gpt_options options = place.options;
    options.training = training, options.max_batch = max_batch, options.max_seq = max_seq;
    gpt_plan p;
    EXPECT_OK(gpt_plan_memory(c, &options, &p));
    EXPECT(p.total_bytes == p.param_bytes + p.grad_bytes + p.optimizer_bytes + p.activation_bytes +
                                p.workspace_bytes);
    EXPECT(p.n_params == count_params(c));
    /* Padding: of each tensor to a cache line, and of the vocabulary to 64 rows. */
    uint64_t least = 4 * (uint64_t)p.n_params;
    bool lean = !training && test.act_bytes == 2 && options.device == GPT_DEVICE_CPU;
    EXPECT(p.param_bytes >= (lean ? least / 2 : least));
    EXPECT(p.param_bytes <= (lean ? 4 * (uint64_t)kept_numbers(c) : least) +
                                2 * 64 * 4 * (uint64_t)c->n_embd + MAX_PARAMS * 64 +
                                (test.act_bytes == 2 ? packed_bytes_at_most(c, training) : 0));
    EXPECT(training ? p.grad_bytes >= least : p.grad_bytes == 0);
    EXPECT(training ? p.optimizer_bytes >= 2 * least : p.optimizer_bytes == 0);
    int T = max_seq ? max_seq : c->block_size;
    EXPECT_NEAR("flops", p.forward_flops_per_token, forward_flops(c, T),
                c->n_layer * 2.0 * c->n_embd);
    EXPECT(p.train_flops_per_token == 3 * p.forward_flops_per_token);
}

static void test_plan(void) {
    EACH_PLACE {
        for (int f = 0; f < TEST_COUNT(families); f++) {
            test_case("%s", families[f].name);
            check_plan(&families[f].config, 0, 0, 0);
            check_plan(&families[f].config, 0, 3, 7);
            check_plan(&families[f].config, 1, 3, 0);
        }
    }
}

/* Tied heads count once, untied ones twice; the presets have the sizes they are known by. */
static void test_preset_sizes(void) {
    static const struct {
        const char *name;
        double millions;
    } known[] = {{"gpt2", 124.44},      {"gpt2-medium", 354.82}, {"gpt2-large", 774.03},
                 {"gpt2-xl", 1557.61},  {"llama-15m", 15.19},    {"llama-42m", 41.69},
                 {"llama-110m", 109.53}};
    for (int i = 0; i < TEST_COUNT(known); i++) {
        gpt_config c;
        test_case("%s", known[i].name);
        EXPECT_OK(gpt_config_preset(known[i].name, &c));
        EXPECT_NEAR("millions", count_params(&c) * 1e-6, known[i].millions, 0.005);
    }
}

static void test_session_bytes(void) {
    enum { N_CTX = 16 }; /* with which buffers are whole numbers of 64 bytes */
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        test_case("%s", families[1].name);
        gpt_model *model = new_model(c, 0, 0, 0, 0.0f);
        uint64_t one = 0, two = 0, whole = 0, block = 0;
        EXPECT_OK(gpt_session_bytes(model, 1, N_CTX, &one));
        EXPECT_OK(gpt_session_bytes(model, 2, N_CTX, &two));
        EXPECT_OK(gpt_session_bytes(model, 2, 0, &whole));
        EXPECT_OK(gpt_session_bytes(model, 2, c->block_size, &block));
        uint64_t row =
            2 * test.act_bytes * (uint64_t)(c->n_layer * c->n_kv_head * (c->n_embd / c->n_head));
        EXPECT(one >= N_CTX * row);
        EXPECT(two >= one + N_CTX * row);
        EXPECT(whole == block && whole > two);
        gpt_model_free(model);
    }
}

TEST_API_MAIN({"reference", test_reference}, {"against the reference", test_against_reference},
              {"finite differences", test_finite_differences}, {"init", test_init},
              {"first loss", test_first_loss}, {"accumulation", test_accumulation},
              {"update", test_update}, {"loss of a step", test_step_loss},
              {"zero rate", test_zero_rate}, {"training", test_training},
              {"repeat and resume", test_repeat_and_resume}, {"dropout", test_dropout},
              {"independent handles", test_independent_handles},
              {"smaller calls", test_smaller_calls}, {"sessions", test_sessions},
              {"long prompts", test_long_prompts}, {"several sessions", test_several_sessions},
              {"several texts", test_several_texts}, {"several prompts", test_several_prompts},
              {"session only", test_session_only}, {"kept for inference", test_kept_for_inference},
              {"lent embedding", test_lent_embedding}, {"plan", test_plan},
              {"preset sizes", test_preset_sizes}, {"session bytes", test_session_bytes})
