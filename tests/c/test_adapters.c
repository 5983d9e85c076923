/* Models with adapters through gpt.h: they compute what the merged weights do, forward and backward; what is
 * frozen costs no gradient, no optimizer state and no float32 copy; recomputing changes no bit. */
#include "testing.h"

#include "adapters.h"

static const gpt_lora none = {0};

/* Adds scale B A of each adapter to its matrix. */
static void merge(const gpt_config *c, const gpt_lora *lora, const adapters *set,
                  param_set *params) {
    int R = lora->rank;
    for (int i = 0; i < set->n; i += 2) {
        adapted at = matrix_of(c, lora, params, &set->info[i]);
        int64_t cols = params->info[at.matrix].shape[1], row = 0;
        const float *a = set->x[i], *b = set->x[i + 1];
        for (int p = 0; p < at.n_parts; row += at.parts[p++].rows)
            for (int o = 0; o < at.parts[p].rows; o++)
                for (int64_t k = 0; k < cols; k++) {
                    double sum = 0;
                    for (int j = 0; j < R; j++)
                        sum += (double)b[(row + o) * R + j] * a[(p * R + j) * cols + k];
                    params->x[at.matrix][(at.parts[p].first + o) * cols + k] +=
                        (float)(lora->scale * sum);
                }
    }
}

/* The gradient of an adapter from that of its matrix: dB = scale dW A^T, dA = scale B^T dW. */
static double *gradient_of(const gpt_config *c, const gpt_lora *lora, const adapters *set,
                           const param_set *params, const param_set *grads, int i) {
    int R = lora->rank, is_b = i % 2;
    adapted at = matrix_of(c, lora, params, &set->info[i]);
    int64_t cols = params->info[at.matrix].shape[1], row = 0;
    const float *a = set->x[i - is_b], *b = set->x[i - is_b + 1], *dw = grads->x[at.matrix];
    double *out = host_zeros(set->info[i].size);
    for (int p = 0; p < at.n_parts; row += at.parts[p++].rows)
        for (int o = 0; o < at.parts[p].rows; o++)
            for (int64_t k = 0; k < cols; k++)
                for (int j = 0; j < R; j++) {
                    double d = lora->scale * dw[(at.parts[p].first + o) * cols + k];
                    int64_t in_a = (p * R + j) * cols + k, in_b = (row + o) * R + j;
                    out[is_b ? in_b : in_a] += d * (is_b ? a[in_a] : b[in_b]);
                }
    return out;
}

static void check_merged(const family *f, int kind) {
    const gpt_config *c = &f->config;
    gpt_lora lora = lora_of(c, kind, 0);
    test_case("%s, targets %d", f->name, lora.targets);
    adapters set = random_adapters(c, &lora);
    param_set params = random_params(c), merged = random_params(c);
    for (int i = 0; i < params.n; i++)
        memcpy(merged.x[i], params.x[i], sizeof(float) * (size_t)params.info[i].size);
    merge(c, &lora, &set, &merged);
    gpt_model *adapted = adapted_model(c, lora, 1, 0, 0), *lean = adapted_model(c, lora, 0, 0, 0);
    gpt_options here = place.options; /* in bf16 the merged weights would be rounded, too */
    place.options.dtype = GPT_DTYPE_FP32;
    gpt_model *full = adapted_model(c, none, 1, 0, 0);
    place.options = here;
    for (int i = 0; i < 2; i++) {
        write_params(i ? lean : adapted, &params, GPT_TENSOR_VALUE);
        write_adapters(i ? lean : adapted, &set);
    }
    write_params(full, &merged, GPT_TENSOR_VALUE);

    int32_t *tokens = random_ints(N, c->vocab_size), *targets = random_targets(N, c->vocab_size);
    double *want = read_logits(full, c, tokens, B, T), *got = read_logits(adapted, c, tokens, B, T);
    EXPECT_CLOSE("logits", got, want, N, c->vocab_size, test_tols(2e-5, 0.1));
    EXPECT_SAME("logits without training", read_logits(lean, c, tokens, B, T), got,
                (int64_t)N * c->vocab_size);
    float loss, merged_loss;
    EXPECT_OK(gpt_model_backward(full, tokens, targets, B, T, 1, &merged_loss));
    EXPECT_OK(gpt_model_backward(adapted, tokens, targets, B, T, 1, &loss));
    EXPECT_NEAR("loss", loss, merged_loss, test_tols(1e-5, 0.1));
    param_set grads = read_params(full, c, GPT_TENSOR_GRAD);
    double error = 0, norm = 0;
    for (int i = 0; i < set.n; i++) {
        const gpt_param *p = &set.info[i];
        float *x = host_floats(p->size);
        double *wanted = gradient_of(c, &lora, &set, &params, &grads, i);
        EXPECT_OK(gpt_model_read(adapted, set.first + i, GPT_TENSOR_GRAD, x, p->size));
        for (int64_t k = 0; k < p->size; k++) {
            error += (x[k] - wanted[k]) * (x[k] - wanted[k]);
            norm += wanted[k] * wanted[k];
        }
        if (test.act_bytes == 4)
            EXPECT_CLOSE(p->name, doubles_of(x, p->size), wanted, p->shape[0], p->shape[1], 1e-4);
    }
    EXPECT_NEAR("all gradients", sqrt(error / norm), 0, test_tols(1e-5, 0.05));
    check_decoded(lean, c, tokens, got);
    gpt_model_free(adapted);
    gpt_model_free(lean);
    gpt_model_free(full);
}

static void test_merged(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++)
            for (int kind = 0; kind < 3; kind++)
                if (is_cpu() || kind == f % 3) check_merged(&families[f], kind);
    }
}

/* Frozen parameters have no gradient and keep their values; an update changes each adapter. */
static void test_frozen(void) {
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        gpt_lora lora = lora_of(c, 0, 0.2f);
        test_case("frozen");
        gpt_model *m = adapted_model(c, lora, 1, 0, 0);
        param_set params = random_params(c);
        write_params(m, &params, GPT_TENSOR_VALUE);
        EXPECT(gpt_model_init_lora(m, 5) == GPT_OK);
        int32_t *tokens = random_ints(N, c->vocab_size);
        float first = NAN, loss = NAN, one;
        for (int step = 0; step < 30; step++) {
            EXPECT_OK(gpt_model_backward(m, tokens, tokens, B, T, 1, NULL));
            EXPECT_OK(update_adamw(m, &adamw, &loss, NULL));
            if (step == 0) first = loss;
        }
        EXPECT(loss < 0.9f * first);
        int n = gpt_config_param_count(c);
        for (int i = 0; i < n; i++) {
            EXPECT(gpt_model_state_count(m, i) == 0);
            EXPECT(gpt_model_read(m, i, GPT_TENSOR_GRAD, &one, params.info[i].size) ==
                   GPT_ERR_ARGUMENT);
        }
        EXPECT(gpt_model_state_count(m, n) == 2);
        gpt_param norm;
        float *now = host_floats(c->n_embd);
        EXPECT_OK(gpt_config_param(c, 1, &norm));
        EXPECT_OK(gpt_model_read(m, 1, GPT_TENSOR_VALUE, now, norm.size));
        EXPECT(!memcmp(now, params.x[1], sizeof(float) * (size_t)norm.size));
        gpt_model_free(m);
    }
}

/* Gradients and optimizer state are those of the adapters alone; in bf16, matrices of layers have no float32. */
static void test_plan(void) {
    const gpt_config c = {50257,
                          256,
                          4,
                          4,
                          4,
                          256,
                          1024,
                          GPT_NORM_LAYERNORM,
                          1,
                          GPT_POS_LEARNED,
                          GPT_ACT_GELU,
                          GPT_BIAS_ALL,
                          1,
                          1e-5f,
                          0,
                          NO_SCALING};
    gpt_lora lora = lora_of(&c, 1, 0);
    int64_t n_lora = 0, n_matrices = 0;
    gpt_param p;
    for (int i = 0; i < gpt_lora_param_count(&c, &lora); i++) {
        EXPECT_OK(gpt_lora_param(&c, &lora, i, &p));
        n_lora += p.size;
    }
    for (int i = 0; i < gpt_config_param_count(&c); i++) {
        EXPECT_OK(gpt_config_param(&c, i, &p));
        if (p.n_dim == 2 && !strncmp(p.name, "h.", 2)) n_matrices += p.size;
    }
    for (int dtype = GPT_DTYPE_FP32; dtype <= GPT_DTYPE_BF16; dtype++) {
        test_case("plan, dtype %d", dtype);
        gpt_options options = {.dtype = dtype, .training = 1, .max_batch = 1, .max_seq = 16};
        gpt_plan full, plan;
        EXPECT_OK(gpt_plan_memory(&c, &options, &full));
        options.lora = lora;
        EXPECT_OK(gpt_plan_memory(&c, &options, &plan));
        EXPECT(plan.n_params == full.n_params + n_lora);
        uint64_t bytes = sizeof(float) * (uint64_t)n_lora, slack = 4096; /* to align buffers */
        EXPECT(plan.grad_bytes >= bytes && plan.grad_bytes < bytes + slack);
        EXPECT(plan.optimizer_bytes >= 2 * bytes && plan.optimizer_bytes < 2 * bytes + slack);
        uint64_t spared = dtype == GPT_DTYPE_BF16 ? sizeof(float) * (uint64_t)n_matrices : 0;
        EXPECT(plan.param_bytes <= full.param_bytes + bytes + slack - spared);
        EXPECT(plan.param_bytes + slack >= full.param_bytes + bytes - spared);
    }
}

/* ---- recomputing ---- */

static void check_recompute(const family *f, gpt_lora lora, float dropout) {
    const gpt_config *c = &f->config;
    test_case("%s, rank %d, dropout %g", f->name, lora.rank, dropout);
    param_set params = random_params(c);
    adapters set = lora.rank ? random_adapters(c, &lora) : (adapters){0};
    int32_t *tokens = random_ints(N, c->vocab_size), *targets = random_targets(N, c->vocab_size);
    static const struct {
        int recompute, layers;
    } ways[] = {{GPT_RECOMPUTE_NONE, 0},
                {GPT_RECOMPUTE_MLP, 0},
                {GPT_RECOMPUTE_BLOCK, 0},
                {GPT_RECOMPUTE_MLP, 1},
                {GPT_RECOMPUTE_BLOCK, 1}};
    float losses[TEST_COUNT(ways)], *grads[TEST_COUNT(ways)];
    int64_t n = 0;
    for (int i = 0; i < TEST_COUNT(ways); i++) {
        place.options.recompute_layers = ways[i].layers;
        gpt_model *m = adapted_model(c, lora, 1, ways[i].recompute, dropout);
        place.options.recompute_layers = 0;
        float *at;
        write_params(m, &params, GPT_TENSOR_VALUE);
        write_adapters(m, &set);
        EXPECT_OK(gpt_model_backward(m, tokens, targets, B, T, 0.5f, NULL));
        EXPECT_OK(gpt_model_backward(m, tokens, targets, B, T, 0.5f, &losses[i]));
        EXPECT_OK(gpt_model_grads(m, &at, &n));
        grads[i] = host_floats(n);
        memcpy(grads[i], at, sizeof(float) * (size_t)n);
        gpt_model_free(m);
    }
    for (int i = 1; i < TEST_COUNT(ways); i++) {
        EXPECT(losses[i] == losses[0]);
        EXPECT(!memcmp(grads[i], grads[0], sizeof(float) * (size_t)n));
    }
}

static void test_recompute(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            gpt_lora dropped = lora_of(c, 0, 0.3f), plain = lora_of(c, f % 3, 0);
            /* With short sizes a family has one of each pair. */
            if (!test_is_short() || f % 2) {
                check_recompute(&families[f], none, 0);
                check_recompute(&families[f], dropped, 0.2f);
            }
            if (!test_is_short() || f % 2 == 0) {
                check_recompute(&families[f], none, 0.2f);
                check_recompute(&families[f], plain, 0);
            }
        }
    }
}

static void test_recompute_plan(void) {
    const gpt_config *c = &families[0].config;
    test_case("recompute, plan");
    gpt_options options = {.training = 1, .max_batch = 8};
    uint64_t before = UINT64_MAX;
    for (options.recompute = 0; options.recompute < 3; options.recompute++) {
        gpt_plan plan;
        EXPECT_OK(gpt_plan_memory(c, &options, &plan));
        EXPECT(plan.activation_bytes < before);
        before = plan.activation_bytes;
        options.recompute_layers = c->n_layer - 1; /* the last one keeps all */
        EXPECT_OK(gpt_plan_memory(c, &options, &plan));
        EXPECT(options.recompute ? plan.activation_bytes > before
                                 : plan.activation_bytes == before);
        options.recompute_layers = c->n_layer + 1;
        EXPECT(gpt_plan_memory(c, &options, &plan) == GPT_ERR_ARGUMENT);
        options.recompute_layers = 0;
    }
}

/* ---- quantized weights ---- */

static double distance(const float *a, const float *b, int64_t n) {
    double error = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        error += (a[i] - b[i]) * (double)(a[i] - b[i]);
        all += b[i] * (double)b[i];
    }
    return sqrt(error / all);
}

/* With rows of gates and ups that end within a panel, and a matrix that is not given as blocks. */
/* Its vocabulary has more than two slices of a classifier's gradient. */
static const gpt_config packed_config = {
    4300,           24, 2, 4,     2,     64,        72, GPT_NORM_RMSNORM, 1, GPT_POS_ROPE,
    GPT_ACT_SWIGLU, 0,  1, 1e-5f, 10000, NO_SCALING};

static int write_floats(gpt_model *m, int i, int tensor, float *x, int64_t n) {
    return gpt_model_write(m, i, tensor, x, n);
}

/* A step with packed weights is that of a bf16 model which has their numbers, bit for bit. */
static void check_packed(float dropout) {
    const gpt_config *c = &packed_config;
    EACH_PLACE {
        if (place.options.dtype != GPT_DTYPE_BF16) continue;
        test_case("packed, dropout %g", dropout);
        gpt_options here = place.options;
        gpt_block_rows rows[MAX_PARAMS];
        gpt_lora lora = lora_of(c, 0, dropout);
        place.options.dtype = GPT_DTYPE_PACKED;
        int n_rows = place.options.n_block_rows = block_rows(c, rows);
        place.options.block_rows = rows;
        gpt_model *packed = adapted_model(c, lora, 1, GPT_RECOMPUTE_MLP, 0);
        write_blocks(packed, c, rows, place.options.n_block_rows);
        place.options = here;
        gpt_model *plain = adapted_model(c, lora, 1, 0, 0);
        adapters set = random_adapters(c, &lora);
        float *grads, *wanted, loss, wanted_loss;
        int64_t n;
        param_set params = random_params(c);
        for (int i = 0; i < params.n; i++) {
            int is_blocks = 0;
            for (int k = 0; k < n_rows; k++) is_blocks |= rows[k].param == i;
            EXPECT_OK((is_blocks ? gpt_model_read : write_floats)(
                packed, i, GPT_TENSOR_VALUE, params.x[i], params.info[i].size));
        }
        write_params(plain, &params, GPT_TENSOR_VALUE);
        write_adapters(packed, &set);
        write_adapters(plain, &set);
        int32_t *tokens = random_ints(N, c->vocab_size),
                *targets = random_targets(N, c->vocab_size);
        EXPECT_OK(gpt_model_backward(packed, tokens, targets, B, T, 1, &loss));
        EXPECT_OK(gpt_model_backward(plain, tokens, targets, B, T, 1, &wanted_loss));
        EXPECT_OK(gpt_model_grads(packed, &grads, &n));
        EXPECT_OK(gpt_model_grads(plain, &wanted, &n));
        EXPECT(loss == wanted_loss);
        EXPECT(!memcmp(grads, wanted, sizeof(float) * (size_t)n));
        gpt_model_free(packed);
        gpt_model_free(plain);
    }
}

static void test_packed(void) {
    check_packed(0);
    check_packed(0.2f);
}

/* Weights of 8 and 4 bits: gradients near those of the float32 model, as near as the weights are. */
static void check_rounded(int device) {
    static const struct {
        int dtype;
        double most;
    } cases[] = {
        {GPT_DTYPE_FP32, 0}, {GPT_DTYPE_BF16, 0.03}, {GPT_DTYPE_INT8, 0.03}, {GPT_DTYPE_INT4, 0.4}};
    gpt_config config = packed_config, *c = &config;
    config.vocab_size = 200;
    gpt_lora lora = lora_of(c, 0, 0);
    test_case("rounded, device %d", device);
    param_set params = random_params(c);
    adapters set = random_adapters(c, &lora);
    int32_t *tokens = random_ints(N, c->vocab_size), *targets = random_targets(N, c->vocab_size);
    float *wanted = NULL;
    for (int k = 0; k < TEST_COUNT(cases); k++) {
        place.options = (gpt_options){.n_threads = 2, .dtype = cases[k].dtype, .device = device};
        gpt_model *m = adapted_model(c, lora, 1, 0, 0);
        float *grads, loss;
        int64_t n;
        write_params(m, &params, GPT_TENSOR_VALUE);
        write_adapters(m, &set);
        EXPECT_OK(gpt_model_backward(m, tokens, targets, B, T, 1, &loss));
        EXPECT_OK(gpt_model_grads(m, &grads, &n));
        if (k == 0) {
            wanted = host_floats(n);
            memcpy(wanted, grads, sizeof(float) * (size_t)n);
        }
        EXPECT_NEAR("gradients", distance(grads, wanted, n), 0, cases[k].most);
        gpt_model_free(m);
    }
}

static void test_rounded(void) {
    const char *only = getenv("GPTC_TEST_TABLES");
    gpt_device_info gpu;
    if (!only || !strcmp(only, "cpu")) check_rounded(GPT_DEVICE_CPU);
    if (gpt_cuda_info(&gpu) == GPT_OK) check_rounded(GPT_DEVICE_CUDA);
}

/* ---- what is refused ---- */

static void expect_refused(const gpt_config *c, const gpt_options *options, const char *word) {
    gpt_plan plan;
    EXPECT(gpt_plan_memory(c, options, &plan) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), word));
}

static void test_refused(void) {
    const gpt_config *gpt2 = &families[0].config, *llama = &families[1].config;
    test_case("refused");
    gpt_options good = {.training = 1, .max_batch = 1}, o = good;
    good.lora = (gpt_lora){.rank = 2, .targets = GPT_LORA_Q, .scale = 1};
    o = good, o.lora.rank = -1;
    expect_refused(gpt2, &o, "rank");
    o = good, o.lora.targets = 0;
    expect_refused(gpt2, &o, "targets");
    o = good, o.lora.targets = 1 << 20;
    expect_refused(gpt2, &o, "targets");
    o = good, o.lora.targets = GPT_LORA_GATE;
    expect_refused(gpt2, &o, "SwiGLU");
    o = good, o.lora.targets = GPT_LORA_QKV | GPT_LORA_V;
    expect_refused(gpt2, &o, "both");
    o = good, o.lora.targets = GPT_LORA_FC | GPT_LORA_UP;
    expect_refused(llama, &o, "both");
    o = good, o.lora.scale = NAN;
    expect_refused(gpt2, &o, "scale");
    o = good, o.lora.dropout = 1;
    expect_refused(gpt2, &o, "dropout");
    o = good, o.recompute = 3;
    expect_refused(gpt2, &o, "recompute");
    o = good, o.dtype = GPT_DTYPE_INT8, o.lora.rank = 0;
    expect_refused(gpt2, &o, "adapters");
    gpt_param p;
    EXPECT(gpt_lora_param(gpt2, &good.lora, 99, &p) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_lora_param_count(gpt2, &good.lora) == 2 * gpt2->n_layer);
    o = good, o.lora.rank = 0;
    EXPECT(gpt_lora_param_count(gpt2, &o.lora) == 0);
    gpt_model *m = NULL;
    EXPECT_OK(gpt_model_create(gpt2, &o, &m));
    EXPECT(gpt_model_init_lora(m, 1) == GPT_ERR_ARGUMENT);
    gpt_model_free(m);
}

TEST_API_MAIN({"merged", test_merged}, {"frozen", test_frozen}, {"plan", test_plan},
              {"recompute", test_recompute}, {"recompute plan", test_recompute_plan},
              {"packed", test_packed}, {"rounded", test_rounded}, {"refused", test_refused})
