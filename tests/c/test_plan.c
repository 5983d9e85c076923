/* Memory through gpt.h: plans are what is allocated, and inference keeps one form of a matrix. */
#include "testing.h"

#include "models.h"

#include "reference.h"
#include <unistd.h>

#include <stdbool.h>

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
                if (strstr(p.name, "router")) only_products = false;
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

/* A file with these numbers behind `offset` zero bytes. */
static FILE *file_of(const float *values, int64_t n, int offset) {
    FILE *f = tmpfile();
    for (int i = 0; i < offset; i++) EXPECT(fputc(0, f) == 0);
    EXPECT(fwrite(values, sizeof *values, (size_t)n, f) == (size_t)n && fflush(f) == 0);
    return f;
}

/* Calls that need a row behind the file's end fail and change nothing; others do not. */
static void check_shortened_file(gpt_model *model, const gpt_config *c, int descriptor) {
    int64_t V = c->vocab_size, C = c->n_embd;
    float *logits = host_floats(2 * V), *row = host_floats(V * C), loss;
    int32_t first[] = {0, 1}, last[] = {0, c->vocab_size - 1}, seqs[] = {0, 0};
    gpt_session *s;
    EXPECT_OK(gpt_session_create(model, 1, 8, GPT_KV_ACTIVATIONS, &s));
    EXPECT_OK(gpt_session_decode(s, last, seqs, NULL, 2, logits));
    EXPECT(ftruncate(descriptor, 12 + 4 * C * (V - 1)) == 0);
    EXPECT(gpt_session_decode(s, last, seqs, NULL, 2, logits) == GPT_ERR_FILE);
    EXPECT(strstr(gpt_last_error(), "token embedding") && gpt_session_length(s, 0) == 2);
    EXPECT_OK(gpt_session_decode(s, first, seqs, NULL, 2, logits));
    EXPECT(gpt_model_logits(model, last, 1, 2, logits) == GPT_ERR_FILE);
    EXPECT(gpt_model_loss(model, last, last, 1, 2, &loss, NULL) == GPT_ERR_FILE);
    EXPECT_OK(gpt_model_loss(model, first, last, 1, 2, &loss, NULL));
    EXPECT(gpt_model_read(model, 0, GPT_TENSOR_VALUE, row, V * C) == GPT_ERR_FILE);
    gpt_session_free(s);
}

/* The rows of an embedding that is lent are read from its file, until it is written; a model that cannot do
 * so copies it. Either way the model computes the same. A file that becomes shorter is an error. */
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
                FILE *f = file_of(lent, n, 12);
                EXPECT(gpt_model_lend(model, 0, n, -1, 12, 0, &kept) == GPT_ERR_ARGUMENT);
                EXPECT(gpt_model_lend(model, 0, n, fileno(f), -1, 0, &kept) == GPT_ERR_ARGUMENT);
                EXPECT(gpt_model_lend(model, 0, n, fileno(f), 12, 2, &kept) == GPT_ERR_ARGUMENT);
                EXPECT_OK(gpt_model_lend(model, 0, n, fileno(f), 12, 0, &kept));
                EXPECT(kept == may_keep);
                EXPECT_OK(gpt_model_read(model, 0, GPT_TENSOR_VALUE, back, n));
                EXPECT(memcmp(back, lent, sizeof(float) * (size_t)n) == 0);
                double *after = read_logits(model, c, tokens, 1, T);
                if (may_keep) check_shortened_file(model, c, fileno(f));
                fclose(f);
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

/* The numbers of a matrix (rows, cols), column after column. */
static float *columns_of(const float *values, int64_t rows, int64_t cols) {
    float *out = malloc(sizeof(float) * (size_t)(rows * cols));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) out[j * rows + i] = values[i * cols + j];
    return out;
}

/* Each parameter from a file, as rows and as columns, gives the model of the same values written. */
static void test_parameters_in_a_file(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            int T = c->block_size;
            for (int training = 0; training < 2; training++) {
                test_case("%s, %s", families[f].name, training ? "training" : "inference");
                gpt_model *model = new_model(c, training, 1, 0, 0.0f);
                gpt_model *read = new_model(c, training, 1, 0, 0.0f);
                gpt_model *cut = new_model(c, training, 1, 0, 0.0f);
                int32_t *tokens = random_ints(T, c->vocab_size);
                for (int i = 0; i < gpt_config_param_count(c); i++) {
                    gpt_param p;
                    EXPECT_OK(gpt_config_param(c, i, &p));
                    float *values = host_floats(p.size);
                    for (int64_t k = 0; k < p.size; k++)
                        values[k] = (float)round_act(0.3 * random_normal());
                    float *stored = columns_of(values, p.shape[0], p.shape[1]);
                    int transposed = i % 3 != 0;
                    FILE *file = file_of(transposed ? stored : values, p.size, 7);
                    int descriptor = fileno(file);
                    EXPECT_OK(gpt_model_write(model, i, GPT_TENSOR_VALUE, values, p.size));
                    EXPECT_OK(gpt_model_lend(read, i, p.size, descriptor, 7, transposed, NULL));
                    EXPECT(ftruncate(descriptor, 7 + 4 * p.size - 1) == 0);
                    EXPECT(gpt_model_lend(cut, i, p.size, descriptor, 7, transposed, NULL) ==
                           GPT_ERR_FILE);
                    EXPECT(strstr(gpt_last_error(), "became shorter"));
                    fclose(file);
                    free(stored);
                }
                EXPECT_SAME("logits", read_logits(read, c, tokens, 1, T),
                            read_logits(model, c, tokens, 1, T), (int64_t)T * c->vocab_size);
                gpt_model_free(model);
                gpt_model_free(read);
                gpt_model_free(cut);
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

static int head_size_of(const gpt_config *c) {
    return c->head_size ? c->head_size : c->n_embd / c->n_head;
}

/* Two operations for each weight of a product and each token, the head's included, and for
 * attention two products of T (T + 1) / 2 pairs of width NH HS; "about" since T + 1 may count as T. */
static double forward_flops(const gpt_config *c, int T) {
    int HS = head_size_of(c), C = c->n_embd;
    double qkv = (c->n_head + 2 * c->n_kv_head) * HS, A = c->n_head * HS, pairs = 0;
    double fc = ref_activation_width(c->activation, c->n_ff);
    double mlp = C * fc + (double)c->n_ff * C, E = c->n_expert;
    double weights = C * qkv + A * C + (E > 0 ? c->n_expert_used * mlp + E * C : mlp);
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
        bool embeds = strstr(p.name, "wte") || strstr(p.name, "wpe") || strstr(p.name, "router");
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
    /* Padding: of each tensor to a cache line, of its packed form to 256 bytes, and of the vocabulary
     * to 64 rows. */
    uint64_t least = 4 * (uint64_t)p.n_params;
    bool lean = !training && test.act_bytes == 2 && options.device == GPT_DEVICE_CPU;
    EXPECT(p.param_bytes >= (lean ? least / 2 : least));
    EXPECT(p.param_bytes <= (lean ? 4 * (uint64_t)kept_numbers(c) : least) +
                                2 * 64 * 4 * (uint64_t)c->n_embd + MAX_PARAMS * (64 + 256) +
                                (test.act_bytes == 2 ? packed_bytes_at_most(c, training) : 0));
    EXPECT(training ? p.grad_bytes >= least : p.grad_bytes == 0);
    EXPECT(training ? p.optimizer_bytes >= 2 * least : p.optimizer_bytes == 0);
    int T = max_seq ? max_seq : c->block_size;
    EXPECT_NEAR("flops", p.forward_flops_per_token, forward_flops(c, T),
                c->n_layer * 2.0 * c->n_head * head_size_of(c));
    EXPECT(p.train_flops_per_token == 3 * p.forward_flops_per_token);
}

/* A token reads the experts that it has, and everything else. A GPU has no experts
 * of int8. */
static void test_active_parameters(void) {
    EACH_PLACE {
        gpt_config c = families[TEST_COUNT(families) - 1].config;
        gpt_plan all, some;
        gpt_model *model = NULL;
        test_case("experts");
        if (place.options.device != GPT_DEVICE_CPU) {
            gpt_options fewer = place.options;
            fewer.dtype = GPT_DTYPE_INT8;
            EXPECT(gpt_plan_memory(&c, &fewer, &all) == GPT_ERR_ARGUMENT);
            EXPECT(gpt_model_create(&c, &fewer, &model) == GPT_ERR_ARGUMENT);
            EXPECT(strstr(gpt_last_error(), "(cuda int8): use --dtype bf16 or --device cpu"));
        }
        EXPECT_OK(gpt_plan_memory(&c, &place.options, &all));
        EXPECT(all.n_active_params == all.n_params);
        c.n_expert_used = 1;
        EXPECT_OK(gpt_plan_memory(&c, &place.options, &some));
        EXPECT(some.n_params == all.n_params);
        EXPECT(some.n_params - some.n_active_params ==
               (int64_t)c.n_layer * (c.n_expert - 1) * 3 * c.n_embd * c.n_ff);
    }
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
    enum { N_CTX = 16 }; /* with which buffers are whole numbers of 256 bytes */
    EACH_PLACE {
        const gpt_config *c = &families[1].config;
        test_case("%s", families[1].name);
        gpt_model *model = new_model(c, 0, 0, 0, 0.0f);
        uint64_t two = 0, four = 0, whole = 0, block = 0;
        EXPECT_OK(gpt_session_bytes(model, 2, N_CTX, GPT_KV_ACTIVATIONS, &two));
        EXPECT_OK(gpt_session_bytes(model, 4, N_CTX, GPT_KV_ACTIVATIONS, &four));
        EXPECT_OK(gpt_session_bytes(model, 4, 0, GPT_KV_ACTIVATIONS, &whole));
        EXPECT_OK(gpt_session_bytes(model, 4, c->block_size, GPT_KV_ACTIVATIONS, &block));
        uint64_t row =
            2 * test.act_bytes * (uint64_t)(c->n_layer * c->n_kv_head * (c->n_embd / c->n_head));
        EXPECT(two >= 2 * N_CTX * row);
        EXPECT(four >= two + 2 * N_CTX * row);
        EXPECT(whole == block && whole > four);
        gpt_model_free(model);
    }
}

/* Memory follows the sequences that are asked for, not the longest that a config allows. */
static void test_long_block(void) {
    enum { N_CTX = 16, T = 8 };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            gpt_config near = families[f].config, far = near;
            if (near.pos == GPT_POS_LEARNED) continue; /* a parameter has a row for each */
            test_case("%s", families[f].name);
            far.block_size = 1 << 20;
            gpt_plan plans[2];
            gpt_options options = place.options;
            options.max_batch = 1, options.max_seq = T;
            EXPECT_OK(gpt_plan_memory(&near, &options, &plans[0]));
            EXPECT_OK(gpt_plan_memory(&far, &options, &plans[1]));
            EXPECT(plans[0].total_bytes == plans[1].total_bytes);
            gpt_model *a = new_model(&near, 0, 1, T, 0.0f), *b = new_model(&far, 0, 1, T, 0.0f);
            EXPECT_OK(gpt_model_init(a, 1));
            EXPECT_OK(gpt_model_init(b, 1));
            gpt_session *sessions[2];
            uint64_t bytes[2];
            int32_t *tokens = random_ints(N_CTX, near.vocab_size), seqs[N_CTX] = {0};
            float *x = host_floats(near.vocab_size), *y = host_floats(near.vocab_size);
            EXPECT_OK(gpt_session_bytes(a, 1, N_CTX, GPT_KV_ACTIVATIONS, &bytes[0]));
            EXPECT_OK(gpt_session_bytes(b, 1, N_CTX, GPT_KV_ACTIVATIONS, &bytes[1]));
            EXPECT(bytes[0] == bytes[1]);
            EXPECT_OK(gpt_session_create(a, 1, N_CTX, GPT_KV_ACTIVATIONS, &sessions[0]));
            EXPECT_OK(gpt_session_create(b, 1, N_CTX, GPT_KV_ACTIVATIONS, &sessions[1]));
            for (int i = 0, n = 1; i < N_CTX; i += n, n = n < 5 ? n + 1 : N_CTX - i) {
                EXPECT_OK(gpt_session_decode(sessions[0], tokens + i, seqs, NULL, n, x));
                EXPECT_OK(gpt_session_decode(sessions[1], tokens + i, seqs, NULL, n, y));
                EXPECT(memcmp(x, y, sizeof *x * (size_t)near.vocab_size) == 0);
            }
            for (int i = 0; i < 2; i++) gpt_session_free(sessions[i]);
            gpt_model_free(a);
            gpt_model_free(b);
        }
    }
}

TEST_API_MAIN({"kept for inference", test_kept_for_inference},
              {"lent embedding", test_lent_embedding},
              {"parameters in a file", test_parameters_in_a_file}, {"plan", test_plan},
              {"active parameters", test_active_parameters}, {"preset sizes", test_preset_sizes},
              {"session bytes", test_session_bytes}, {"long block", test_long_block})
