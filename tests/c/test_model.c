/* Whole models through gpt.h: logits, losses and gradients against float64, and initial values. */
#include "testing.h"

#include "models.h"
#include "reference_model.h"

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
        if (T == 1 && (strstr(p->name, "q_norm") || strstr(p->name, "k_norm"))) {
            /* With one key the probability is 1 for any score, so the gradient is rounding errors alone. */
            for (int64_t k = 0; k < p->size; k++)
                EXPECT_NEAR(p->name, grads.x[i][k], 0, test_tols(1e-6, 1e-2));
            continue;
        }
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
        if (test.act_bytes == 2) continue; /* rounded, a token may choose other experts */
        family some = families[TEST_COUNT(families) - 1];
        some.name = "2 of 5 experts";
        some.config.n_expert = 5, some.config.n_expert_used = 2, some.config.expert_norm = 1;
        gpt_model *model = new_model(&some.config, 1, 3, 0, 0.0f);
        check_against_reference(&some, model, 3, 24);
        check_against_reference(&some, model, 1, 1);
        gpt_model_free(model);
    }
}

/* ---- documents ---- */

/* A call that is refused has taken its documents: the next one has whole sequences. */
static void check_refused_calls(const family *f, gpt_model *model, const int32_t *positions,
                                const int32_t *tokens, const int32_t *targets, int B, int T) {
    int32_t *none = host_ints(B * T), *unknown = host_ints(B * T);
    float whole, loss, *logits = host_floats((int64_t)B * T * f->config.vocab_size);
    for (int n = 0; n < B * T; n++) none[n] = -1, unknown[n] = f->config.vocab_size;
    EXPECT_OK(gpt_model_loss(model, tokens, targets, B, T, &whole, NULL));
    for (int call = 0; call < 4; call++) {
        EXPECT_OK(gpt_model_documents(model, positions, B, T));
        if (call == 0) EXPECT(gpt_model_loss(model, tokens, none, B, T, &loss, NULL) != GPT_OK);
        if (call == 1) EXPECT(gpt_model_backward(model, tokens, none, B, T, 1, NULL) != GPT_OK);
        if (call == 2) EXPECT(gpt_model_logits(model, unknown, B, T, logits) != GPT_OK);
        if (call == 3) EXPECT(gpt_model_documents(model, tokens, B, T) != GPT_OK);
        EXPECT_OK(gpt_model_loss(model, tokens, targets, B, T, &loss, NULL));
        EXPECT(loss == whole);
    }
}

/* Two documents in each sequence: their losses, and the gradient of all, are those of each alone. */
static void check_documents(const family *f, gpt_model *model) {
    enum { B = 2, T = 19, FIRST = 7, N = B * T };
    const gpt_config *c = &f->config;
    name_case(f, B, T);
    write_random_params(model, c);
    int32_t *tokens = random_ints(N, c->vocab_size), *targets = random_ints(N, c->vocab_size);
    int32_t *positions = host_ints(N);
    for (int n = 0; n < N; n++) positions[n] = n % T < FIRST ? n % T : n % T - FIRST;
    float loss, alone, *losses = host_floats(N), *losses_alone = host_floats(N);

    EXPECT_OK(gpt_model_zero_grads(model));
    for (int b = 0; b < B; b++)
        for (int k = 0; k < 2; k++) {
            int begin = b * T + (k ? FIRST : 0), n = k ? T - FIRST : FIRST;
            int32_t *x = tokens + begin, *y = targets + begin;
            EXPECT_OK(gpt_model_loss(model, x, y, 1, n, &alone, losses_alone + begin));
            EXPECT_OK(gpt_model_backward(model, x, y, 1, n, (float)n / N, NULL));
        }
    param_set want = read_params(model, c, GPT_TENSOR_GRAD);

    EXPECT_OK(gpt_model_documents(model, positions, B, T));
    EXPECT_OK(gpt_model_loss(model, tokens, targets, B, T, &loss, losses));
    EXPECT_CLOSE("losses", doubles_of(losses, N), doubles_of(losses_alone, N), 1, N,
                 test_tols(2e-5, 0.1));
    EXPECT_OK(gpt_model_zero_grads(model));
    EXPECT_OK(gpt_model_documents(model, positions, B, T));
    EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 1.0f, NULL));
    param_set got = read_params(model, c, GPT_TENSOR_GRAD);
    for (int i = 0; i < got.n; i++) {
        const gpt_param *p = &got.info[i];
        int64_t rows = p->n_dim == 2 ? p->shape[0] : 1;
        EXPECT_CLOSE(p->name, doubles_of(got.x[i], p->size), doubles_of(want.x[i], p->size), rows,
                     p->size / rows, test_tols(1e-4, 0.2));
    }

    /* They are those of one call: the next has whole sequences again. */
    EXPECT_OK(gpt_model_loss(model, tokens, targets, B, T, &alone, NULL));
    EXPECT(fabs(alone - loss) > 1e-3);
    EXPECT_OK(gpt_model_documents(model, positions, B, T));
    EXPECT(gpt_model_loss(model, tokens, targets, 1, T, &loss, NULL) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), "documents were given as 2 x 19") != NULL);
    EXPECT_OK(gpt_model_loss(model, tokens, targets, 1, T, &loss, NULL));
    check_refused_calls(f, model, positions, tokens, targets, B, T);
    positions[FIRST] = 1;
    EXPECT(gpt_model_documents(model, positions, B, T) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), "position 7 of sequence 0 is 1") != NULL);
}

static void test_documents(void) {
    /* Their frequencies depend on the longest document, not on the row: none is longer than this. */
    family lowered = families[1];
    lowered.name = "dynamic";
    lowered.config.rope_scaling = GPT_ROPE_DYNAMIC;
    lowered.config.rope_factor = 2;
    lowered.config.rope_original = 12;
    EACH_PLACE {
        gpt_model *dynamic = new_model(&lowered.config, 1, 3, 0, 0.0f);
        check_documents(&lowered, dynamic);
        gpt_model_free(dynamic);
        for (int f = 0; f < TEST_COUNT(families); f++) {
            gpt_model *model = new_model(&families[f].config, 1, 3, 0, 0.0f);
            check_documents(&families[f], model);
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

/* Along the gradient, where the difference is largest, and along a random direction; with short sizes in turn. */
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
        for (int k = i % test_step(2); k < 2; k += test_step(2))
            check_direction(p, &values, &grads, i, unit_vector(k ? r : g, n), norm);
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
            if (test_is_short() && k % 4 % 3) continue; /* each family with one of both */
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

TEST_API_MAIN({"reference", test_reference}, {"against the reference", test_against_reference},
              {"finite differences", test_finite_differences}, {"init", test_init},
              {"documents", test_documents}, {"first loss", test_first_loss})
