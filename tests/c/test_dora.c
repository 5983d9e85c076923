/* Models with DoRA through gpt.h: they compute what merged weights do, forward and backward, whatever products
 * read; recomputing changes no bit, and a model begins as its base. */
#include "testing.h"

#include "adapters.h"

static const gpt_lora none = {0};

static gpt_lora dora_of(const gpt_config *c, int kind) {
    gpt_lora lora = lora_of(c, kind, 0);
    lora.dora = 1;
    return lora;
}

/* A matrix with its adapter in float64: W + scale B A of each adapted row, its length, and its magnitude. */
typedef struct merged_matrix {
    adapted at;
    int64_t cols;
    double *w;       /* (rows of parts, cols) */
    double *lengths; /* (rows of parts) */
} merged_matrix;

/* Of the adapters i, i + 1 and i + 2 of the set. */
static merged_matrix measure(const gpt_config *c, const gpt_lora *lora, const adapters *set,
                             const param_set *params, int i) {
    merged_matrix out = {.at = matrix_of(c, lora, params, &set->info[i])};
    int R = lora->rank;
    int64_t K = out.cols = params->info[out.at.matrix].shape[1], row = 0;
    const float *a = set->x[i], *b = set->x[i + 1];
    out.w = host_zeros(set->info[i + 2].size * K);
    out.lengths = host_zeros(set->info[i + 2].size);
    for (int p = 0; p < out.at.n_parts; p++)
        for (int o = 0; o < out.at.parts[p].rows; o++, row++) {
            const float *w = params->x[out.at.matrix] + (out.at.parts[p].first + o) * K;
            for (int64_t k = 0; k < K; k++) {
                double sum = 0;
                for (int j = 0; j < R; j++) sum += (double)b[row * R + j] * a[(p * R + j) * K + k];
                out.w[row * K + k] = w[k] + lora->scale * sum;
                out.lengths[row] += out.w[row * K + k] * out.w[row * K + k];
            }
            out.lengths[row] = sqrt(out.lengths[row]);
        }
    return out;
}

static void merge(const gpt_config *c, const gpt_lora *lora, const adapters *set,
                  param_set *params) {
    for (int i = 0; i < set->n; i += 3) {
        merged_matrix m = measure(c, lora, set, params, i);
        for (int64_t p = 0, row = 0; p < m.at.n_parts; p++)
            for (int o = 0; o < m.at.parts[p].rows; o++, row++)
                for (int64_t k = 0; k < m.cols; k++)
                    params->x[m.at.matrix][(m.at.parts[p].first + o) * m.cols + k] =
                        (float)(set->x[i + 2][row] / m.lengths[row] * m.w[row * m.cols + k]);
    }
}

/* The gradients of adapters i to i + 2, from that of their merged matrix: lengths are constants. */
static void gradients_of(const gpt_config *c, const gpt_lora *lora, const adapters *set,
                         const param_set *params, const param_set *grads, int i, double **out) {
    merged_matrix m = measure(c, lora, set, params, i);
    int R = lora->rank;
    const float *a = set->x[i], *b = set->x[i + 1];
    for (int k = 0; k < 3; k++) out[k] = host_zeros(set->info[i + k].size);
    for (int64_t p = 0, row = 0; p < m.at.n_parts; p++)
        for (int o = 0; o < m.at.parts[p].rows; o++, row++) {
            const float *dw = grads->x[m.at.matrix] + (m.at.parts[p].first + o) * m.cols;
            double gain = set->x[i + 2][row] / m.lengths[row];
            for (int64_t k = 0; k < m.cols; k++) {
                out[2][row] += dw[k] * m.w[row * m.cols + k] / m.lengths[row];
                for (int j = 0; j < R; j++) {
                    int64_t in_a = (p * R + j) * m.cols + k;
                    out[0][in_a] += lora->scale * gain * dw[k] * b[row * R + j];
                    out[1][row * R + j] += lora->scale * gain * dw[k] * a[in_a];
                }
            }
        }
}

/* The gradients of the adapters that the merged model's give, together: (all numbers of the set). */
static double *adapter_gradients(const gpt_config *c, const gpt_lora *lora, const adapters *set,
                                 const param_set *params, gpt_model *merged) {
    param_set grads = read_params(merged, c, GPT_TENSOR_GRAD);
    int64_t size = 0, at = 0;
    for (int i = 0; i < set->n; i++) size += set->info[i].size;
    double *all = host_zeros(size), *some[3];
    for (int i = 0; i < set->n; at += set->info[i++].size) {
        if (i % 3 == 0) gradients_of(c, lora, set, params, &grads, i, some);
        memcpy(all + at, some[i % 3], sizeof *all * (size_t)set->info[i].size);
    }
    return all;
}

/* |x - y| / |y| */
static double distance(const double *x, const double *y, int64_t n) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) error += (x[i] - y[i]) * (x[i] - y[i]), norm += y[i] * y[i];
    return sqrt(error / norm);
}

/* In bf16 they may be as far away as the gradients of the merged model in bf16, twice: norms after a
 * branch enlarge what rounding does to it. */
static void check_gradients(const double *want, const adapters *set, gpt_model *m, double noise) {
    int64_t n = 0;
    for (int i = 0; i < set->n; i++) n += set->info[i].size;
    double *got = host_zeros(n);
    int exact = test.act_bytes != 2;
    for (int64_t i = 0, at = 0; i < set->n; at += set->info[i++].size) {
        const gpt_param *p = &set->info[i];
        float *x = host_floats(p->size);
        EXPECT_OK(gpt_model_read(m, set->first + (int)i, GPT_TENSOR_GRAD, x, p->size));
        for (int64_t k = 0; k < p->size; k++) got[at + k] = x[k];
        if (exact) EXPECT_CLOSE(p->name, got + at, want + at, p->shape[0], p->shape[1], 1e-4);
    }
    EXPECT_NEAR("all gradients", distance(got, want, n), 0, exact ? 1e-5 : fmax(0.03, 2 * noise));
}

static void check_merged(const family *f, int kind) {
    const gpt_config *c = &f->config;
    gpt_lora lora = dora_of(c, kind);
    test_case("%s, targets %d", f->name, lora.targets);
    adapters set = random_adapters(c, &lora);
    param_set params = random_params(c), merged = random_params(c);
    for (int i = 0; i < params.n; i++)
        memcpy(merged.x[i], params.x[i], sizeof(float) * (size_t)params.info[i].size);
    merge(c, &lora, &set, &merged);
    gpt_model *m = adapted_model(c, lora, 1, kind, 0), *lean = adapted_model(c, lora, 0, 0, 0);
    gpt_options here = place.options; /* in bf16 the merged weights would be rounded, too */
    place.options.dtype = GPT_DTYPE_FP32;
    gpt_model *full = adapted_model(c, none, 1, 0, 0);
    place.options = here;
    gpt_model *rounded = test.act_bytes == 2 ? adapted_model(c, none, 1, 0, 0) : NULL;
    for (int i = 0; i < 2; i++) {
        write_params(i ? lean : m, &params, GPT_TENSOR_VALUE);
        write_adapters(i ? lean : m, &set);
    }
    write_params(full, &merged, GPT_TENSOR_VALUE);
    int32_t *tokens = random_ints(N, c->vocab_size), *targets = random_targets(N, c->vocab_size);
    double *want = read_logits(full, c, tokens, B, T), *got = read_logits(m, c, tokens, B, T);
    int64_t n = (int64_t)N * c->vocab_size;
    EXPECT_CLOSE("logits", got, want, N, c->vocab_size, test_tols(2e-5, 0.1));
    EXPECT_SAME("logits without training", read_logits(lean, c, tokens, B, T), got, n);
    float loss, merged_loss;
    EXPECT_OK(gpt_model_backward(full, tokens, targets, B, T, 1, &merged_loss));
    EXPECT_OK(gpt_model_backward(m, tokens, targets, B, T, 1, &loss));
    EXPECT_NEAR("loss", loss, merged_loss, test_tols(1e-5, 0.1));
    double *exact = adapter_gradients(c, &lora, &set, &params, full), noise = 0;
    if (rounded) {
        int64_t n_gradients = 0;
        for (int i = 0; i < set.n; i++) n_gradients += set.info[i].size;
        write_params(rounded, &merged, GPT_TENSOR_VALUE);
        for (int batch = 0; batch < 4; batch++) { /* the noise of one varies much */
            const int32_t *x = batch ? random_ints(N, c->vocab_size) : tokens;
            gpt_model *both[] = {full, rounded};
            for (int i = 0; i < 2; i++) {
                EXPECT_OK(gpt_model_zero_grads(both[i]));
                EXPECT_OK(gpt_model_backward(both[i], x, targets, B, T, 1, NULL));
            }
            double *want = adapter_gradients(c, &lora, &set, &params, full);
            double *got = adapter_gradients(c, &lora, &set, &params, rounded);
            noise = fmax(noise, distance(got, want, n_gradients));
        }
    }
    check_gradients(exact, &set, m, noise);
    check_decoded(lean, c, tokens, got);
    gpt_model_free(m);
    gpt_model_free(lean);
    gpt_model_free(full);
    gpt_model_free(rounded);
}

static void test_merged(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) check_merged(&families[f], f % 3);
    }
}

/* A model begins as its base; updates change magnitudes, and what reads the gains sees each of them. */
static void test_training(void) {
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        gpt_lora lora = dora_of(c, 0);
        test_case("training");
        gpt_model *m = adapted_model(c, lora, 1, 0, 0), *base = adapted_model(c, none, 0, 0, 0);
        gpt_model *again = adapted_model(c, lora, 0, 0, 0);
        param_set params = random_params(c);
        write_params(m, &params, GPT_TENSOR_VALUE);
        write_params(base, &params, GPT_TENSOR_VALUE);
        EXPECT_OK(gpt_model_init_lora(m, 5));
        int32_t *tokens = random_ints(N, c->vocab_size);
        int64_t n = (int64_t)N * c->vocab_size;
        EXPECT_CLOSE("at first", read_logits(m, c, tokens, B, T),
                     read_logits(base, c, tokens, B, T), N, c->vocab_size, test_tols(1e-5, 0.1));
        float first = NAN, loss = NAN;
        for (int step = 0; step < 15; step++) {
            EXPECT_OK(gpt_model_backward(m, tokens, tokens, B, T, 1, NULL));
            EXPECT_OK(update_adamw(m, &adamw, &loss, NULL));
            if (step == 0) first = loss;
        }
        EXPECT(loss < 0.9f * first);
        write_params(again, &params, GPT_TENSOR_VALUE);
        for (int i = 0; i < gpt_lora_param_count(c, &lora); i++) {
            gpt_param p;
            EXPECT_OK(gpt_lora_param(c, &lora, i, &p));
            float *x = host_floats(p.size);
            EXPECT_OK(gpt_model_read(m, params.n + i, GPT_TENSOR_VALUE, x, p.size));
            EXPECT_OK(gpt_model_write(again, params.n + i, GPT_TENSOR_VALUE, x, p.size));
            EXPECT(p.decay == (p.n_dim == 2) && p.n_dim == (i % 3 == 2 ? 1 : 2));
        }
        EXPECT_SAME("after updates", read_logits(again, c, tokens, B, T),
                    read_logits(m, c, tokens, B, T), n);
        gpt_model_free(m);
        gpt_model_free(base);
        gpt_model_free(again);
    }
}

/* Recomputing gives the same bits, with dropouts. */
static void test_recompute(void) {
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        gpt_lora lora = dora_of(c, 0);
        lora.dropout = 0.3f;
        test_case("recompute");
        param_set params = random_params(c);
        adapters set = random_adapters(c, &lora);
        int32_t *tokens = random_ints(N, c->vocab_size);
        float *grads[3];
        int64_t n = 0;
        for (int recompute = 0; recompute < 3; recompute++) {
            gpt_model *m = adapted_model(c, lora, 1, recompute, 0.2f);
            float *at;
            write_params(m, &params, GPT_TENSOR_VALUE);
            write_adapters(m, &set);
            EXPECT_OK(gpt_model_backward(m, tokens, tokens, B, T, 1, NULL));
            EXPECT_OK(gpt_model_grads(m, &at, &n));
            grads[recompute] = host_floats(n);
            memcpy(grads[recompute], at, sizeof(float) * (size_t)n);
            gpt_model_free(m);
        }
        for (int recompute = 1; recompute < 3; recompute++)
            EXPECT(!memcmp(grads[recompute], grads[0], sizeof(float) * (size_t)n));
    }
}

/* Packed matrices: a step is that of a bf16 model with their numbers. */
static void check_packed(void) {
    const gpt_config config = {
        300, 24, 2,     4,     2,         64, 72, GPT_NORM_RMSNORM, 1, GPT_POS_ROPE, GPT_ACT_SWIGLU,
        0,   1,  1e-5f, 10000, NO_SCALING};
    const gpt_config *c = &config;
    gpt_block_rows rows[MAX_PARAMS];
    gpt_lora lora = dora_of(c, 0);
    gpt_options here = place.options;
    test_case("packed");
    place.options.dtype = GPT_DTYPE_PACKED;
    int n_rows = place.options.n_block_rows = block_rows(c, rows);
    place.options.block_rows = rows;
    gpt_model *packed = adapted_model(c, lora, 1, GPT_RECOMPUTE_MLP, 0);
    write_blocks(packed, c, rows, n_rows);
    place.options = here;
    gpt_model *plain = adapted_model(c, lora, 1, 0, 0);
    param_set params = random_params(c);
    adapters set = random_adapters(c, &lora);
    for (int i = 0; i < params.n; i++) {
        int is_blocks = 0;
        for (int k = 0; k < n_rows; k++) is_blocks |= rows[k].param == i;
        if (is_blocks)
            EXPECT_OK(
                gpt_model_read(packed, i, GPT_TENSOR_VALUE, params.x[i], params.info[i].size));
        else
            EXPECT_OK(
                gpt_model_write(packed, i, GPT_TENSOR_VALUE, params.x[i], params.info[i].size));
    }
    write_params(plain, &params, GPT_TENSOR_VALUE);
    write_adapters(packed, &set);
    write_adapters(plain, &set);
    int32_t *tokens = random_ints(N, c->vocab_size);
    float *grads, *wanted, loss, wanted_loss;
    int64_t n;
    EXPECT_OK(gpt_model_backward(packed, tokens, tokens, B, T, 1, &loss));
    EXPECT_OK(gpt_model_backward(plain, tokens, tokens, B, T, 1, &wanted_loss));
    EXPECT_OK(gpt_model_grads(packed, &grads, &n));
    EXPECT_OK(gpt_model_grads(plain, &wanted, &n));
    EXPECT(loss == wanted_loss);
    EXPECT(!memcmp(grads, wanted, sizeof(float) * (size_t)n));
    gpt_model_free(packed);
    gpt_model_free(plain);
}

static void test_packed(void) {
    EACH_PLACE {
        if (place.options.dtype == GPT_DTYPE_BF16) check_packed();
    }
}

static void test_refused(void) {
    const gpt_config *c = &families[0].config;
    test_case("refused");
    gpt_options o = {.max_batch = 1, .lora = dora_of(c, 0)};
    gpt_plan plan;
    gpt_param p;
    EXPECT_OK(gpt_lora_param(c, &o.lora, 2, &p));
    EXPECT(!strcmp(p.name, "h.0.attn.qkv.lora_m"));
    EXPECT(gpt_lora_param_count(c, &o.lora) == 3 * 4 * c->n_layer);
    o.lora.dora = 2;
    EXPECT(gpt_plan_memory(c, &o, &plan) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), "dora"));
}

TEST_API_MAIN({"merged", test_merged}, {"training", test_training}, {"recompute", test_recompute},
              {"packed", test_packed}, {"refused", test_refused})
