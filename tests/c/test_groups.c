/* Parameter groups: what is frozen costs nothing and never changes, and a group is trained as a model
 * would be that has its settings everywhere. */
#include "models.h"

enum { B = 2, T = 9, STEPS = 3 };

static gpt_model *grouped_model(const gpt_config *c, const gpt_group *groups, int n) {
    gpt_options options = place.options;
    options.training = 1, options.max_batch = B, options.max_seq = T;
    options.groups = groups, options.n_groups = n;
    gpt_model *model = NULL;
    EXPECT_OK(gpt_model_create(c, &options, &model));
    if (!model) exit(test_summary("no model"));
    test.counter = 1000; /* the same values in each */
    write_random_params(model, c);
    return model;
}

static int is_frozen(const char *name) {
    return strstr(name, ".mlp.") || strstr(name, "wte") || strstr(name, ".qkv.weight");
}

static const gpt_group frozen[] = {
    {.pattern = "h.*.mlp.*", .frozen = 1},
    {.pattern = "wte.weigh?", .frozen = 1},
    {.pattern = "*.qkv.weight", .frozen = 1},
};

/* Bytes of the float32 numbers that a group leaves: each tensor padded to 16 of them, and all to 256
 * bytes. */
static uint64_t trained_bytes(const gpt_config *c) {
    uint64_t bytes = 0;
    for (int i = 0; i < gpt_config_param_count(c); i++) {
        gpt_param p;
        EXPECT_OK(gpt_config_param(c, i, &p));
        int64_t rows = strstr(p.name, "lm_head") ? (p.shape[0] + 63) / 64 * 64 : p.shape[0];
        if (!is_frozen(p.name)) bytes += (uint64_t)((rows * p.shape[1] + 15) / 16 * 16) * 4;
    }
    return (bytes + 255) / 256 * 256;
}

static void check_plan(const gpt_config *c) {
    gpt_options options = place.options;
    gpt_plan plan, whole;
    options.training = 1, options.max_batch = B, options.max_seq = T;
    EXPECT_OK(gpt_plan_memory(c, &options, &whole));
    options.groups = frozen, options.n_groups = TEST_COUNT(frozen);
    EXPECT_OK(gpt_plan_memory(c, &options, &plan));
    EXPECT(plan.grad_bytes == trained_bytes(c));
    EXPECT(plan.optimizer_bytes == 2 * plan.grad_bytes);
    EXPECT(plan.grad_bytes < whole.grad_bytes && plan.param_bytes == whole.param_bytes);
    EXPECT(whole.total_bytes - plan.total_bytes == 3 * (whole.grad_bytes - plan.grad_bytes));
    options.optimizer = GPT_OPTIMIZER_SGD;
    EXPECT_OK(gpt_plan_memory(c, &options, &plan));
    EXPECT(plan.optimizer_bytes == plan.grad_bytes);
}

/* Gradients of what is not frozen are those of a model without groups, to the bit; the frozen have
 * neither gradients nor state, and keep their values. */
static void check_frozen(const gpt_config *c, const int32_t *tokens, const int32_t *targets) {
    const gpt_adamw adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};
    gpt_model *whole = grouped_model(c, NULL, 0);
    gpt_model *model = grouped_model(c, frozen, TEST_COUNT(frozen));
    param_set values = read_params(model, c, GPT_TENSOR_VALUE);
    for (int micro = 0; micro < 2; micro++) {
        float losses[2];
        EXPECT_OK(gpt_model_backward(whole, tokens, targets, B, T, 0.5f, &losses[0]));
        EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 0.5f, &losses[1]));
        EXPECT(losses[0] == losses[1]);
    }
    param_set grads = read_params(whole, c, GPT_TENSOR_GRAD);
    for (int i = 0; i < grads.n; i++) {
        int64_t n = grads.info[i].size;
        float *got = host_floats(n);
        if (is_frozen(grads.info[i].name)) {
            EXPECT(gpt_model_read(model, i, GPT_TENSOR_GRAD, got, n) == GPT_ERR_ARGUMENT);
            EXPECT(strstr(gpt_last_error(), "is frozen"));
            EXPECT(gpt_model_write(model, i, GPT_TENSOR_STATE0, got, n) == GPT_ERR_ARGUMENT);
            EXPECT(gpt_model_state_count(model, i) == 0);
            continue;
        }
        EXPECT_OK(gpt_model_read(model, i, GPT_TENSOR_GRAD, got, n));
        EXPECT(!memcmp(got, grads.x[i], (size_t)n * sizeof *got));
        EXPECT(gpt_model_state_count(model, i) == 2);
    }
    for (int step = 0; step < STEPS; step++) {
        EXPECT_OK(gpt_model_backward(model, tokens, targets, B, T, 1.0f, NULL));
        EXPECT_OK(update_adamw(model, &adamw, NULL, NULL));
    }
    param_set after = read_params(model, c, GPT_TENSOR_VALUE);
    for (int i = 0; i < after.n; i++) {
        size_t bytes = (size_t)after.info[i].size * sizeof(float);
        int same = !memcmp(after.x[i], values.x[i], bytes);
        EXPECT(same == !!is_frozen(after.info[i].name));
    }
    gpt_model_free(whole);
    gpt_model_free(model);
}

static void test_frozen(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            test_case("%s", families[f].name);
            check_plan(c);
            check_frozen(c, random_ints(B * T, c->vocab_size),
                         random_targets(B * T, c->vocab_size));
        }
    }
}

/* Values after some steps by these optimizers. */
static param_set trained(const gpt_config *c, const gpt_group *groups, int n_groups,
                         const gpt_optimizer *optimizers, int n_optimizers, int64_t steps) {
    gpt_model *model = grouped_model(c, groups, n_groups);
    int32_t *tokens = random_ints(B * T, c->vocab_size);
    for (int64_t step = 0; step < steps; step++) {
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
        EXPECT_OK(gpt_model_update(model, optimizers, n_optimizers, NULL, NULL));
    }
    param_set values = read_params(model, c, GPT_TENSOR_VALUE);
    gpt_model_free(model);
    return values;
}

/* After one step, whose gradients are everyone's, parameters of a group are as in the first model, the
 * others as in the second. */
static void expect_mixture(const param_set *got, const param_set *group, const param_set *rest,
                           const char *in_group) {
    int n_different = 0;
    for (int i = 0; i < got->n; i++) {
        size_t bytes = (size_t)got->info[i].size * sizeof(float);
        const param_set *want = strstr(got->info[i].name, in_group) ? group : rest;
        EXPECT(!memcmp(got->x[i], want->x[i], bytes));
        n_different += memcmp(group->x[i], rest->x[i], bytes) != 0;
    }
    EXPECT(n_different > 0);
}

static void test_settings(void) {
    const gpt_optimizer adamw = {.kind = GPT_OPTIMIZER_ADAMW,
                                 .adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f}};
    const gpt_optimizer sgd = {.kind = GPT_OPTIMIZER_SGD, .sgd = {0.1f, 0.9f, 0.1f, 1.0f}};
    const gpt_group all_sgd = {.pattern = "*", .optimizer = GPT_OPTIMIZER_SGD};
    EACH_PLACE {
        const gpt_config *c = &families[0].config;
        test_case("%s", families[0].name);
        param_set plain = trained(c, NULL, 0, &adamw, 1, 1);

        gpt_group half = {.pattern = "h.*.attn.*", .lr_scale = 0.5f};
        gpt_optimizer halved = adamw;
        halved.adamw.lr *= 0.5f;
        param_set slow = trained(c, NULL, 0, &halved, 1, 1),
                  got = trained(c, &half, 1, &adamw, 1, 1);
        expect_mixture(&got, &slow, &plain, ".attn.");

        gpt_group kept = {.pattern = "h.*.attn.*", .decay = GPT_DECAY_OFF};
        gpt_optimizer undecayed = adamw;
        undecayed.adamw.weight_decay = 0;
        param_set whole = trained(c, NULL, 0, &undecayed, 1, 1);
        got = trained(c, &kept, 1, &adamw, 1, 1);
        expect_mixture(&got, &whole, &plain, ".attn.");

        gpt_group by_sgd = {.pattern = "h.*.attn.*", .optimizer = GPT_OPTIMIZER_SGD};
        const gpt_optimizer both[] = {sgd, adamw};
        param_set others = trained(c, &all_sgd, 1, &sgd, 1, 1);
        got = trained(c, &by_sgd, 1, both, 2, 1);
        expect_mixture(&got, &others, &plain, ".attn.");
    }
}

/* Training by SGD alone lowers the loss; its buffer can be read and written, and is all its state. */
static void test_sgd(void) {
    const gpt_optimizer sgd = {.kind = GPT_OPTIMIZER_SGD, .sgd = {0.1f, 0.9f, 0.0f, 1.0f}};
    const gpt_adamw adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        test_case("%s", families[1].name);
        gpt_options options = place.options;
        options.training = 1, options.max_batch = B, options.max_seq = T;
        options.optimizer = GPT_OPTIMIZER_SGD;
        gpt_model *model = NULL;
        EXPECT_OK(gpt_model_create(c, &options, &model));
        EXPECT_OK(gpt_model_init(model, 3));
        int32_t *tokens = random_ints(B * T, c->vocab_size);
        float losses[20];
        for (int step = 0; step < TEST_COUNT(losses); step++) {
            EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
            EXPECT_OK(gpt_model_update(model, &sgd, 1, &losses[step], NULL));
        }
        EXPECT(losses[19] < 0.8f * losses[0]);
        float buffer[24] = {0};
        EXPECT(gpt_model_state_count(model, 1) == 1);
        EXPECT_OK(gpt_model_read(model, 1, GPT_TENSOR_STATE0, buffer, TEST_COUNT(buffer)));
        EXPECT(buffer[0] != 0);
        EXPECT(gpt_model_read(model, 1, GPT_TENSOR_STATE0 + 1, buffer, TEST_COUNT(buffer)) ==
               GPT_ERR_ARGUMENT);
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
        EXPECT(update_adamw(model, &adamw, NULL, NULL) == GPT_ERR_ARGUMENT);
        EXPECT(strstr(gpt_last_error(), "SGD"));
        const gpt_optimizer twice[] = {sgd, sgd};
        EXPECT(gpt_model_update(model, twice, 2, NULL, NULL) == GPT_ERR_ARGUMENT);
        EXPECT(gpt_model_step(model) == 20);
        gpt_model_free(model);
    }
}

/* Muon lowers the loss, and has the matrices of layers; other parameters have AdamW. */
static void test_muon(void) {
    const gpt_optimizer both[] = {
        {.kind = GPT_OPTIMIZER_MUON,
         .muon = {.lr = 2e-2f, .momentum = 0.9f, .weight_decay = 0.0f, .grad_clip = 1.0f}},
        {.kind = GPT_OPTIMIZER_ADAMW, .adamw = {2e-2f, 0.9f, 0.95f, 1e-8f, 0.0f, 1.0f}}};
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        test_case("%s", families[1].name);
        gpt_options options = place.options;
        options.training = 1, options.max_batch = B, options.max_seq = T;
        options.optimizer = GPT_OPTIMIZER_MUON;
        gpt_model *model = NULL;
        EXPECT_OK(gpt_model_create(c, &options, &model));
        EXPECT_OK(gpt_model_init(model, 3));
        int32_t *tokens = random_ints(B * T, c->vocab_size);
        float losses[12];
        for (int step = 0; step < TEST_COUNT(losses); step++) {
            EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
            EXPECT_OK(gpt_model_update(model, both, 2, &losses[step], NULL));
        }
        EXPECT(losses[11] < 0.8f * losses[0]);
        for (int i = 0; i < gpt_config_param_count(c); i++) {
            gpt_param p;
            EXPECT_OK(gpt_config_param(c, i, &p));
            int is_hidden = p.n_dim == 2 && !strncmp(p.name, "h.", 2);
            EXPECT(gpt_model_state_count(model, i) == (is_hidden ? 1 : 2));
        }
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
        EXPECT(gpt_model_update(model, both + 1, 1, NULL, NULL) == GPT_ERR_ARGUMENT);
        EXPECT(strstr(gpt_last_error(), "no settings of Muon"));
        gpt_model_free(model);
    }
}

/* A router with more rows than another matrix has: Muon's workspace has room for it. */
static void test_router(void) {
    EACH_PLACE {
        if (place.options.device != GPT_DEVICE_CPU) continue;
        test_case("Muon and 100 experts");
        gpt_config c = families[0].config;
        c.n_embd = 256, c.n_head = c.n_kv_head = 2, c.head_size = 8, c.n_ff = 12;
        c.norm = GPT_NORM_RMSNORM, c.norm_weight = 1, c.activation = GPT_ACT_SWIGLU;
        c.bias = 0, c.n_expert = 100, c.n_expert_used = 1;
        const gpt_optimizer both[] = {
            {.kind = GPT_OPTIMIZER_MUON, .muon = {.lr = 2e-2f, .momentum = 0.9f}},
            {.kind = GPT_OPTIMIZER_ADAMW, .adamw = {2e-2f, 0.9f, 0.95f, 1e-8f, 0.0f, 1.0f}}};
        gpt_options options = place.options;
        options.training = 1, options.max_batch = B, options.max_seq = T;
        options.optimizer = GPT_OPTIMIZER_MUON;
        gpt_model *model = NULL;
        EXPECT_OK(gpt_model_create(&c, &options, &model));
        EXPECT_OK(gpt_model_init(model, 3));
        int32_t *tokens = random_ints(B * T, c.vocab_size);
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
        EXPECT_OK(gpt_model_update(model, both, 2, NULL, NULL));
        gpt_model_free(model);
    }
}

/* A matrix that products read, in GPT-2. */
static int is_product(const gpt_param *p) {
    return p->n_dim == 2 && strcmp(p->name, "wpe.weight") != 0;
}

/* The flat view holds every gradient, those of products first, and zeros between. On a GPU it is the
 * device's. */
static void test_grads(void) {
    EACH_PLACE {
        if (place.options.device != GPT_DEVICE_CPU) continue;
        const gpt_config *c = &families[0].config;
        gpt_model *model = grouped_model(c, frozen, TEST_COUNT(frozen));
        int32_t *tokens = random_ints(B * T, c->vocab_size);
        float *flat = NULL;
        int64_t n = 0, at = 0;
        EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, NULL));
        EXPECT_OK(gpt_model_grads(model, &flat, &n));
        EXPECT((uint64_t)n * 4 == trained_bytes(c));
        double sum = 0, want = 0;
        int n_params = gpt_config_param_count(c);
        for (int k = 0; k < 2 * n_params; k++) {
            gpt_param p;
            int i = k % n_params;
            EXPECT_OK(gpt_config_param(c, i, &p));
            if (is_frozen(p.name) || is_product(&p) != (k < n_params)) continue;
            float *grad = host_floats(p.size);
            EXPECT_OK(gpt_model_read(model, i, GPT_TENSOR_GRAD, grad, p.size));
            EXPECT(!memcmp(flat + at, grad, (size_t)p.size * sizeof *grad));
            for (int64_t j = 0; j < p.size; j++) want += fabs((double)grad[j]);
            at += (p.size + 15) / 16 * 16;
        }
        EXPECT(at == n);
        for (int64_t k = 0; k < n; k++) sum += fabs((double)flat[k]);
        EXPECT_NEAR("all there is", sum, want, 1e-9 * want);
        gpt_model_free(model);
        model = new_model(c, 0, B, T, 0.0f);
        EXPECT(gpt_model_grads(model, &flat, &n) == GPT_ERR_ARGUMENT);
        gpt_model_free(model);
    }
}

static gpt_model *model_with_moments(const gpt_config *c, int moments) {
    gpt_options options = place.options;
    gpt_model *model = NULL;
    options.training = 1, options.max_batch = B, options.max_seq = T, options.moments = moments;
    EXPECT_OK(gpt_model_create(c, &options, &model));
    EXPECT_OK(gpt_model_init(model, 3));
    return model;
}

/* Values and moments, and the step. */
static void copy_model(const gpt_config *c, gpt_model *from, gpt_model *to) {
    for (int i = 0; i < gpt_config_param_count(c); i++) {
        gpt_param p;
        EXPECT_OK(gpt_config_param(c, i, &p));
        float *x = host_floats(p.size);
        for (int tensor = GPT_TENSOR_VALUE; tensor < GPT_TENSOR_STATE0 + 2; tensor++) {
            if (tensor == GPT_TENSOR_GRAD) continue;
            EXPECT_OK(gpt_model_read(from, i, tensor, x, p.size));
            EXPECT_OK(gpt_model_write(to, i, tensor, x, p.size));
        }
    }
    EXPECT_OK(gpt_model_set_step(to, gpt_model_step(from)));
}

/* A moment that was read and is written is read with the same bits, a negative one that was rounded to 0, too. */
static void check_read_again(const gpt_config *c, gpt_model *model) {
    gpt_param p;
    EXPECT_OK(gpt_config_param(c, 0, &p));
    float *x = host_floats(p.size), *again = host_floats(p.size);
    for (int64_t i = 0; i < p.size; i++) again[i] = i % 7 ? -1e-9f * (float)(i % 5) : 1;
    for (int k = 0; k < 2; k++) {
        memcpy(x, again, sizeof *x * (size_t)p.size);
        EXPECT_OK(gpt_model_write(model, 0, GPT_TENSOR_STATE0, x, p.size));
        EXPECT_OK(gpt_model_read(model, 0, GPT_TENSOR_STATE0, again, p.size));
    }
    EXPECT(!memcmp(x, again, sizeof *x * (size_t)p.size));
}

/* One that is given another's values and moments takes the same steps, whatever the form of the moments. */
static void test_moments(void) {
    const gpt_adamw adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};
    for (int moments = GPT_MOMENTS_FP32; moments <= GPT_MOMENTS_INT8; moments++) {
        EACH_PLACE {
            if (place.options.device != GPT_DEVICE_CPU) continue;
            const gpt_config *c = &families[1].config;
            test_case("moments %d", moments);
            gpt_model *one = model_with_moments(c, moments),
                      *other = model_with_moments(c, moments);
            check_read_again(c, other);
            int32_t *tokens = random_ints(B * T, c->vocab_size);
            float loss[5], again = 0;
            for (int step = 0; step < TEST_COUNT(loss); step++) {
                EXPECT_OK(gpt_model_backward(one, tokens, tokens, B, T, 1.0f, NULL));
                EXPECT_OK(update_adamw(one, &adamw, &loss[step], NULL));
                if (step == 2) copy_model(c, one, other);
                if (step < 3) continue;
                EXPECT_OK(gpt_model_backward(other, tokens, tokens, B, T, 1.0f, NULL));
                EXPECT_OK(update_adamw(other, &adamw, &again, NULL));
                EXPECT(again == loss[step]);
            }
            EXPECT(loss[4] < loss[0] - 0.1f);
            gpt_model_free(one);
            gpt_model_free(other);
        }
    }
}

static void expect_refused(const gpt_group *groups, int n, const char *why) {
    gpt_options options = {
        .training = 1, .max_batch = 1, .n_threads = 1, .groups = groups, .n_groups = n};
    gpt_model *model = NULL;
    gpt_plan plan;
    EXPECT(gpt_model_create(&families[0].config, &options, &model) == GPT_ERR_ARGUMENT);
    EXPECT(model == NULL && strstr(gpt_last_error(), why));
    EXPECT(gpt_plan_memory(&families[0].config, &options, &plan) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), why));
}

static void test_refusals(void) {
    gpt_options options = {.training = 1, .max_batch = 1, .n_threads = 1, .moments = 3};
    gpt_plan plan;
    EXPECT(gpt_plan_memory(&families[0].config, &options, &plan) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), "moments is 3"));
    options.moments = GPT_MOMENTS_INT8, options.device = GPT_DEVICE_CUDA;
    EXPECT(gpt_plan_memory(&families[0].config, &options, &plan) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), "on a CPU only"));
    expect_refused(&(gpt_group){.pattern = "h.*.mpl.*"}, 1, "'h.*.mpl.*'");
    expect_refused(&(gpt_group){.pattern = "wte"}, 1, "'wte'");
    expect_refused(&(gpt_group){.pattern = ""}, 1, "''");
    expect_refused(&(gpt_group){.pattern = NULL}, 1, "no pattern");
    expect_refused(&(gpt_group){.pattern = "*", .frozen = 1}, 1, "nothing to train");
    expect_refused(&(gpt_group){.pattern = "*", .frozen = 2}, 1, "frozen");
    expect_refused(&(gpt_group){.pattern = "*", .optimizer = GPT_OPTIMIZER_MUON + 1}, 1,
                   "optimizer");
    expect_refused(&(gpt_group){.pattern = "*", .decay = -1}, 1, "decay");
    expect_refused(&(gpt_group){.pattern = "*", .lr_scale = -1}, 1, "lr_scale");
    expect_refused(&(gpt_group){.pattern = "*", .lr_scale = NAN}, 1, "lr_scale");
    expect_refused(NULL, 1, "n_groups");
    expect_refused(NULL, -1, "n_groups");
}

TEST_API_MAIN({"frozen", test_frozen}, {"settings", test_settings}, {"sgd", test_sgd},
              {"muon", test_muon}, {"moments", test_moments}, {"router", test_router},
              {"grads", test_grads}, {"refusals", test_refusals})
