/* Models whose matrices are given as blocks, through gpt.h: what they compute, what they keep, and what
 * they refuse. */
#include "testing.h"

#include "models.h"

enum { V = 70, C = 64, T = 12, HEADS = 4, HS = C / HEADS, F = 96, QKV = 2 * C, L = 2 };

static const gpt_config config = {
    V, 24, L,     HEADS, 2,         C, F, GPT_NORM_RMSNORM, 1, GPT_POS_ROPE, GPT_ACT_SWIGLU,
    0, 1,  1e-5f, 10000, NO_SCALING};

/* Every matrix in blocks: the layers' queries, keys and values of three types, gates and ups of two. */
static int block_rows(gpt_block_rows *out) {
    int n = 0, n_params = gpt_config_param_count(&config);
    for (int i = 0; i < n_params; i++) {
        gpt_param p;
        EXPECT_OK(gpt_config_param(&config, i, &p));
        if (p.n_dim != 2) continue;
        if (strstr(p.name, "qkv")) {
            out[n++] = (gpt_block_rows){i, C, GPT_BLOCK_Q4_0};
            out[n++] = (gpt_block_rows){i, 2 * HS, GPT_BLOCK_Q5_1};
            out[n++] = (gpt_block_rows){i, 2 * HS, GPT_BLOCK_Q8_0};
        } else if (strstr(p.name, "fc")) {
            out[n++] = (gpt_block_rows){i, F, GPT_BLOCK_Q4_1};
            out[n++] = (gpt_block_rows){i, F, GPT_BLOCK_Q5_0};
        } else {
            out[n++] = (gpt_block_rows){i, (int32_t)p.shape[0], GPT_BLOCK_Q8_0};
        }
    }
    return n;
}

/* Bytes of a block of 32. */
static int bytes_of(int block) {
    switch (block) {
    case GPT_BLOCK_Q4_0:
        return 18;
    case GPT_BLOCK_Q4_1:
        return 20;
    case GPT_BLOCK_Q5_0:
        return 22;
    case GPT_BLOCK_Q5_1:
        return 24;
    default:
        return 34;
    }
}

static gpt_options packed_options(const gpt_block_rows *rows, int n) {
    return (gpt_options){.dtype = GPT_DTYPE_PACKED,
                         .n_threads = 2,
                         .max_batch = 1,
                         .max_seq = T,
                         .n_block_rows = n,
                         .block_rows = rows};
}

/* Random blocks, with scales (and minima) of 2^-7 to 2^-5 in bytes 0 and 1 (2 and 3). */
static void write_blocks(gpt_model *m, const gpt_block_rows *rows, int n) {
    for (int k = 0, part = 0; k < n; k++) {
        gpt_param p;
        part = k > 0 && rows[k - 1].param == rows[k].param ? part + 1 : 0;
        EXPECT_OK(gpt_config_param(&config, rows[k].param, &p));
        int bytes = bytes_of(rows[k].block), least = bytes == 20 || bytes == 24;
        size_t n_blocks = (size_t)(rows[k].rows * (p.shape[1] / 32));
        uint8_t *blocks = test_alloc(&test.host, n_blocks * (size_t)bytes);
        for (size_t b = 0; b < n_blocks; b++) {
            uint8_t *block = blocks + b * (size_t)bytes;
            for (int i = 0; i < bytes; i++) block[i] = (uint8_t)random_below(256);
            int narrow = bytes == 34 ? 3 : 0;                     /* 8 bits have larger integers */
            int digits = random_below(8), sign = random_below(2); /* of the float16 scale */
            block[1] = (uint8_t)((8 - narrow) << 2 | digits | sign << 7);
            if (least) block[3] = (uint8_t)(10 << 2 | (~block[1] & 128));
        }
        EXPECT_OK(gpt_model_write_blocks(m, rows[k].param, part, blocks, n_blocks * (size_t)bytes));
    }
    for (int i = 0; i < gpt_config_param_count(&config); i++) {
        gpt_param p;
        float ones[C];
        EXPECT_OK(gpt_config_param(&config, i, &p));
        for (int j = 0; j < C; j++) ones[j] = 1 + 0.1f * (float)random_normal();
        if (p.n_dim == 1) EXPECT_OK(gpt_model_write(m, i, GPT_TENSOR_VALUE, ones, p.size));
    }
}

static double distance(const float *a, const float *b, int64_t n) {
    double error = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        error += (a[i] - b[i]) * (double)(a[i] - b[i]);
        all += b[i] * (double)b[i];
    }
    return sqrt(error / all);
}

/* The levels of a CPU, and a GPU, where GPTC_TEST_TABLES names it or is not set. False where it is missing. */
static const char *const targets[] = {"cpu portable",   "cpu avx2", "cpu avx512", "cpu avx512vnni",
                                      "cpu avx512bf16", "cpu amx",  "cuda"};

static int is_gpu(int target) {
    return !strcmp(targets[target], "cuda");
}

static int take_target(int target) {
    const char *only = getenv("GPTC_TEST_TABLES"), *name = targets[target];
    gpt_device_info gpu;
    test_case("%s", name);
    unsetenv("GPTC_CPU_LEVEL");
    if (only && !strstr(name, only)) return 0;
    if (is_gpu(target)) return gpt_cuda_info(&gpu) == GPT_OK;
    setenv("GPTC_CPU_LEVEL", name + strlen("cpu "), 1);
    return !strcmp(gpt_cpu_level(), name + strlen("cpu "));
}

/* Logits are those of the fp32 model with the numbers that can be read, but for activations, which are
 * rounded to bf16 and to 8 bits in groups of 32: each product has an error of about 0.6 %, and there are
 * nine, of which some are in a row: in all 2.1 to 3.6 % for 26 draws of blocks. Decoding by sessions sees
 * the same. A GPU rounds to bf16 alone. */
static double most_rounding(int target) {
    return is_gpu(target) ? 0.02 : 0.04;
}

static void test_computes(void) {
    gpt_block_rows rows[32];
    int n = block_rows(rows), n_params = gpt_config_param_count(&config);
    for (int target = 0; target < TEST_COUNT(targets); target++) {
        if (!take_target(target)) continue;
        gpt_options options = packed_options(rows, n), plain = {.max_batch = 1, .max_seq = T};
        if (is_gpu(target)) options.device = GPT_DEVICE_CUDA;
        gpt_model *packed = NULL, *wide = NULL;
        EXPECT_OK(gpt_model_create(&config, &options, &packed));
        EXPECT_OK(gpt_model_create(&config, &plain, &wide));
        if (!packed || !wide) exit(test_summary("no model"));
        write_blocks(packed, rows, n);
        for (int i = 0; i < n_params; i++) {
            gpt_param p;
            EXPECT_OK(gpt_config_param(&config, i, &p));
            float *x = host_floats(p.size);
            EXPECT_OK(gpt_model_read(packed, i, GPT_TENSOR_VALUE, x, p.size));
            EXPECT_OK(gpt_model_write(wide, i, GPT_TENSOR_VALUE, x, p.size));
        }
        int32_t *tokens = random_ints(T, V), seqs[T] = {0};
        float *got = host_floats(T * V), *want = host_floats(T * V), *stepped = host_floats(T * V);
        EXPECT_OK(gpt_model_logits(packed, tokens, 1, T, got));
        EXPECT_OK(gpt_model_logits(wide, tokens, 1, T, want));
        EXPECT(distance(got, want, T * V) < most_rounding(target));
        gpt_session *session = NULL;
        EXPECT_OK(gpt_session_create(packed, 1, T, GPT_KV_ACTIVATIONS, &session));
        for (int t = 0; t < T; t++)
            EXPECT_OK(gpt_session_decode(session, tokens + t, seqs, NULL, 1, stepped + t * V));
        EXPECT(distance(stepped, want, T * V) < most_rounding(target));
        gpt_session_free(session);
        gpt_model_free(packed);
        gpt_model_free(wide);
    }
    unsetenv("GPTC_CPU_LEVEL");
}

/* The plan has the blocks, rounded up to panels, and no copy of them. A GPU's rows are rounded up to 16 bytes. */
static void check_plan(int target) {
    gpt_block_rows rows[32];
    int n = block_rows(rows), gpu = is_gpu(target);
    gpt_options options = packed_options(rows, n), bf16 = {.dtype = GPT_DTYPE_BF16};
    gpt_plan plan, wide;
    uint64_t given = 0;
    options.device = bf16.device = gpu ? GPT_DEVICE_CUDA : GPT_DEVICE_CPU;
    for (int k = 0; k < n; k++) {
        gpt_param p;
        EXPECT_OK(gpt_config_param(&config, rows[k].param, &p));
        given += (uint64_t)(rows[k].rows * p.shape[1] / 32 * bytes_of(rows[k].block));
    }
    EXPECT_OK(gpt_plan_memory(&config, &options, &plan));
    EXPECT_OK(gpt_plan_memory(&config, &bf16, &wide));
    EXPECT(plan.param_bytes >= given && plan.param_bytes < given + given / (gpu ? 2 : 4));
    EXPECT(plan.param_bytes < wide.param_bytes / 2);
}

static void test_plan(void) {
    for (int target = 0; target < TEST_COUNT(targets); target++)
        if (take_target(target)) check_plan(target);
    unsetenv("GPTC_CPU_LEVEL");
}

static void expect_refused(gpt_options options, const char *why) {
    gpt_model *model = NULL;
    gpt_plan plan;
    EXPECT(gpt_model_create(&config, &options, &model) == GPT_ERR_ARGUMENT);
    EXPECT(model == NULL && strstr(gpt_last_error(), why));
    EXPECT(gpt_plan_memory(&config, &options, &plan) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), why));
}

static void test_refused_entries(void) {
    gpt_block_rows rows[32];
    int n = block_rows(rows), embedding = 0, norm = 1, qkv = 2, fc = 5;
    test_case("entries");
    gpt_options options = packed_options(rows, n);
    options.dtype = GPT_DTYPE_BF16;
    expect_refused(options, "GPT_DTYPE_PACKED");
    options = packed_options(rows, n), options.training = 1;
    expect_refused(options, "cannot be trained");
    expect_refused(packed_options(NULL, 1), "n_block_rows");
    expect_refused(packed_options(rows, -1), "n_block_rows");
#define REFUSED(why, ...)                                                                          \
    do {                                                                                           \
        const gpt_block_rows given[] = {__VA_ARGS__};                                              \
        expect_refused(packed_options(given, TEST_COUNT(given)), why);                             \
    } while (0)
    REFUSED("parameter 99", {99, V, GPT_BLOCK_Q8_0});
    REFUSED("parameter -1", {-1, V, GPT_BLOCK_Q8_0});
    REFUSED("type 9 ", {embedding, V, 9});
    REFUSED("do not fill the 64 columns of wte.weight", {embedding, V, GPT_BLOCK_Q6_K});
    REFUSED("have 69 rows, not 70", {embedding, V - 1, GPT_BLOCK_Q8_0});
    REFUSED("has 0 rows", {embedding, 0, GPT_BLOCK_Q8_0});
    REFUSED("cannot be given as blocks", {norm, C, GPT_BLOCK_Q8_0});
    REFUSED("more than 3", {qkv, 1, GPT_BLOCK_Q8_0}, {qkv, 1, GPT_BLOCK_Q8_0},
            {qkv, 1, GPT_BLOCK_Q8_0}, {qkv, QKV - 3, GPT_BLOCK_Q8_0});
    REFUSED("two entries", {fc, 2 * F, GPT_BLOCK_Q8_0});
    REFUSED("two entries", {fc, F + 1, GPT_BLOCK_Q8_0}, {fc, F - 1, GPT_BLOCK_Q8_0});
}

static void test_refused_calls(void) {
    gpt_block_rows rows[32];
    int n = block_rows(rows), kept = 0;
    test_case("calls");
    gpt_options options = packed_options(rows, n);
    gpt_model *model = NULL;
    EXPECT_OK(gpt_model_create(&config, &options, &model));
    float *x = host_floats(V * C);
    uint8_t *blocks = test_alloc(&test.host, V * C / 32 * 34);
    memset(blocks, 0, V * C / 32 * 34);
    EXPECT(gpt_model_init(model, 1) == GPT_ERR_ARGUMENT && strstr(gpt_last_error(), "blocks"));
    EXPECT(gpt_model_write(model, 0, GPT_TENSOR_VALUE, x, V * C) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), "wte.weight is kept as blocks"));
    EXPECT(gpt_model_lend(model, 0, V * C, 0, 0, 0, &kept) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_model_write_blocks(model, 0, 0, blocks, V * C / 32 * 34 - 1) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), "has 4760 bytes of blocks, not 4759"));
    EXPECT(gpt_model_write_blocks(model, 0, 1, blocks, V * C / 32 * 34) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_model_write_blocks(model, 1, 0, blocks, V * C / 32 * 34) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_model_write_blocks(model, -1, 0, blocks, V * C / 32 * 34) == GPT_ERR_ARGUMENT);
    EXPECT_OK(gpt_model_write_blocks(model, 0, 0, blocks, V * C / 32 * 34));
    gpt_model_free(model);
}

TEST_API_MAIN({"computes", test_computes}, {"plan", test_plan},
              {"refused entries", test_refused_entries}, {"refused calls", test_refused_calls})
