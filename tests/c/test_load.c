/* gpt_config_load and gpt_model_load: folders written here, whole, cut at every byte, with every byte
 * changed, and with headers that lie. tests/python/checkpoint/test_c_load.py loads what gptc saves. */
#include "testing.h"

#include "models.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- a folder ---- */

static char folder[64];

static const char *path_of(const char *name) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void write_file(const char *name, const void *content, size_t n) {
    FILE *f = fopen(path_of(name), "wb");
    EXPECT(f && fwrite(content, 1, n, f) == n);
    if (f) fclose(f);
}

static void write_text(const char *name, const char *text) {
    write_file(name, text, strlen(text));
}

/* The bytes of a safetensors file: its header, and `room` bytes of tensors. */
typedef struct content {
    char *bytes;
    size_t n, header; /* the header's end */
} content;

static content make_file(const char *header, const void *tensors, size_t n) {
    size_t length = strlen(header);
    content c = {test_alloc(&test.host, 8 + length + n), 8 + length + n, 8 + length};
    for (int i = 0; i < 8; i++) c.bytes[i] = (char)((uint64_t)length >> 8 * i);
    memcpy(c.bytes + 8, header, length);
    memcpy(c.bytes + 8 + length, tensors, n);
    return c;
}

static void write_weights(const char *header, const void *tensors, size_t n) {
    content c = make_file(header, tensors, n);
    write_file("model.safetensors", c.bytes, c.n);
}

/* A family of models.h that is stored under our own names, as hf.py writes its config. */
static void write_config(const gpt_config *c) {
    static const char *const pos[] = {"learned", "rope", "rope_wide"};
    static const char *const act[] = {"", "gelu", "swish", "swiglu"};
    char text[1024];
    snprintf(text, sizeof text,
             "{\"model_type\": \"gptc\", \"gptc_config_version\": 1, \"vocab_size\": %d,"
             "\"block_size\": %d, \"n_layer\": %d, \"n_head\": %d, \"n_kv_head\": %d,"
             "\"n_embd\": %d, \"n_ff\": %d, \"norm\": \"%s\", \"norm_weight\": %s, \"pos\": \"%s\","
             "\"activation\": \"%s\", \"bias\": %s, \"tied\": %s, \"norm_eps\": %.9g,"
             "\"rope_theta\": %.9g}",
             c->vocab_size, c->block_size, c->n_layer, c->n_head, c->n_kv_head, c->n_embd, c->n_ff,
             c->norm ? "rmsnorm" : "layernorm", c->norm_weight ? "true" : "false", pos[c->pos],
             act[c->activation], c->bias ? "true" : "false", c->tied ? "true" : "false",
             c->norm_eps, c->rope_theta);
    write_text("config.json", text);
}

/* The header of a model's parameters in float32, in the order of the parameters, and their values. */
static content model_content(gpt_model *model, const gpt_config *c) {
    param_set set = read_params(model, c, GPT_TENSOR_VALUE);
    char *header = test_alloc(&test.host, 1 << 16), *at = header;
    int64_t n = 0, most = 0;
    for (int i = 0; i < set.n; i++) most += set.info[i].size;
    float *values = host_floats(most);
    at += sprintf(at, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < set.n; i++) {
        const gpt_param *p = &set.info[i];
        at += sprintf(at, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%lld", p->name,
                      (long long)p->shape[0]);
        if (p->n_dim == 2) at += sprintf(at, ",%lld", (long long)p->shape[1]);
        at += sprintf(at, "],\"data_offsets\":[%lld,%lld]}", (long long)n * 4,
                      (long long)(n + p->size) * 4);
        memcpy(values + n, set.x[i], sizeof(float) * (size_t)p->size);
        n += p->size;
    }
    strcpy(at, "}");
    return make_file(header, values, sizeof(float) * (size_t)n);
}

static const gpt_options options = {.n_threads = 1, .max_batch = 1};

static int load(void) {
    gpt_model *model = NULL;
    int status = gpt_model_load(folder, &options, &model);
    EXPECT((model != NULL) == (status == GPT_OK));
    gpt_model_free(model);
    return status;
}

static void expect_bad_file(const char *word, int line) {
    gpt_config config;
    int status = load(), config_status = gpt_config_load(folder, &config);
    const char *message = gpt_last_error();
    test.n_checks++;
    if (status != GPT_ERR_FILE || config_status != GPT_ERR_FILE)
        test_fail(__FILE__, line, "status %d and %d ('%s')", status, config_status, message);
    else if (!strstr(message, word) || strchr(message, '\n'))
        test_fail(__FILE__, line, "'%s' does not say '%s'", message, word);
}
#define EXPECT_BAD_FILE(word) expect_bad_file(word, __LINE__)

static int open_files(void) {
    DIR *dir = opendir("/proc/self/fd");
    int n = 0;
    while (dir && readdir(dir)) n++;
    if (dir) closedir(dir);
    return n;
}

static void begin(void) {
    strcpy(folder, "/tmp/gptc-load-XXXXXX");
    EXPECT(mkdtemp(folder) != NULL);
}

static void end(void) {
    unlink(path_of("config.json"));
    rmdir(path_of("config.json"));
    unlink(path_of("model.safetensors"));
    EXPECT(rmdir(folder) == 0);
}

/* ---- whole folders ---- */

/* Every parameter has the bits that were stored, and the configuration is the same. */
static void test_round_trip(void) {
    begin();
    for (int f = 2; f < 5; f++) { /* byte and the crossed ones: those that have our names */
        const gpt_config *c = &families[f].config;
        gpt_model *model = NULL, *loaded = NULL;
        gpt_config found;
        test_case("%s", families[f].name);
        EXPECT_OK(gpt_model_create(c, &options, &model));
        write_random_params(model, c);
        content file = model_content(model, c);
        write_config(c);
        write_file("model.safetensors", file.bytes, file.n);
        EXPECT_OK(gpt_config_load(folder, &found));
        EXPECT(!memcmp(&found, c, sizeof found));
        EXPECT_OK(gpt_model_load(folder, &options, &loaded));
        if (!loaded) continue;
        param_set want = read_params(model, c, GPT_TENSOR_VALUE);
        param_set got = read_params(loaded, c, GPT_TENSOR_VALUE);
        EXPECT(same_params(&want, &got));
        gpt_model_free(model);
        gpt_model_free(loaded);
    }
    end();
}

/* Adapters of the options change nothing at first. */
static void test_adapters(void) {
    const gpt_config *c = &families[2].config;
    gpt_options with = options;
    begin();
    for (int dora = 0; dora < 2; dora++) {
        gpt_model *model = NULL, *loaded = NULL;
        test_case("dora %d", dora);
        with.lora =
            (gpt_lora){.rank = 2, .targets = GPT_LORA_QKV | GPT_LORA_FC, .scale = 1, .dora = dora};
        EXPECT_OK(gpt_model_create(c, &options, &model));
        write_random_params(model, c);
        content file = model_content(model, c);
        write_config(c);
        write_file("model.safetensors", file.bytes, file.n);
        EXPECT_OK(gpt_model_load(folder, &with, &loaded));
        if (!loaded) continue;
        int32_t tokens[] = {1, 2, 3, 4, 5, 6};
        double *want = read_logits(model, c, tokens, 1, 6);
        double *got = read_logits(loaded, c, tokens, 1, 6);
        EXPECT_CLOSE("logits", got, want, 6, c->vocab_size, 1e-5);
        gpt_model_free(model);
        gpt_model_free(loaded);
    }
    end();
}

/* Numbers of 16 bits, and those that are special: subnormal, the largest, infinite. */
static void test_dtypes(void) {
    static const struct {
        const char *dtype;
        uint16_t bits[6];
        float want[6];
    } cases[] = {
        {"F16",
         {0x3c00, 0xc100, 0x0001, 0x83ff, 0x7bff, 0xfc00},
         {1.0f, -2.5f, 0x1p-24f, -1023 * 0x1p-24f, 65504.0f, -INFINITY}},
        {"BF16",
         {0x3f80, 0xc020, 0x0001, 0x8000, 0x7f7f, 0x7f80},
         {1.0f, -2.5f, 0x1p-133f, -0.0f, 0x1.fep127f, INFINITY}},
    };
    gpt_config c = {
        2, 1, 1,     1,     1,         2, 1, GPT_NORM_RMSNORM, 0, GPT_POS_ROPE_WIDE, GPT_ACT_SWISH,
        0, 1, 1e-6f, 10000, NO_SCALING};
    begin();
    write_config(&c);
    for (int i = 0; i < 2; i++) {
        gpt_model *model = NULL;
        char header[1024];
        uint16_t tensors[24] = {0};
        float got[12];
        test_case("%s", cases[i].dtype);
        snprintf(
            header, sizeof header,
            "{\"h.0.attn.qkv.weight\":{\"dtype\":\"%s\",\"shape\":[6,2],\"data_offsets\":[0,24]},"
            "\"wte.weight\":{\"dtype\":\"F16\",\"shape\":[2,2],\"data_offsets\":[24,32]},"
            "\"h.0.attn.proj.weight\":{\"dtype\":\"F16\",\"shape\":[2,2],\"data_offsets\":[32,40]},"
            "\"h.0.mlp.fc.weight\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[40,44]},"
            "\"h.0.mlp.proj.weight\":{\"dtype\":\"F16\",\"shape\":[2,1],\"data_offsets\":[44,48]}}",
            cases[i].dtype);
        memcpy(tensors, cases[i].bits, sizeof cases[i].bits);
        write_weights(header, tensors, sizeof tensors);
        EXPECT_OK(gpt_model_load(folder, &options, &model));
        if (!model) continue;
        EXPECT_OK(gpt_model_read(model, 1, GPT_TENSOR_VALUE, got, 12));
        EXPECT(!memcmp(got, cases[i].want, sizeof cases[i].want));
        gpt_model_free(model);
    }
    end();
}

/* ---- damage ---- */

/* The smallest model, so that each byte can be tried. */
static const gpt_config small = {
    3, 2, 1,     1,     1,         2, 1, GPT_NORM_RMSNORM, 0, GPT_POS_ROPE_WIDE, GPT_ACT_SWISH,
    0, 1, 1e-6f, 10000, NO_SCALING};

static content write_small(void) {
    gpt_model *model = NULL;
    EXPECT_OK(gpt_model_create(&small, &options, &model));
    EXPECT_OK(gpt_model_init(model, 1));
    content file = model_content(model, &small);
    gpt_model_free(model);
    write_config(&small);
    write_file("model.safetensors", file.bytes, file.n);
    return file;
}

static content read_back(const char *name) {
    FILE *f = fopen(path_of(name), "rb");
    content c = {test_alloc(&test.host, 1 << 16), 0, 0};
    EXPECT(f != NULL);
    if (f) c.n = fread(c.bytes, 1, 1 << 16, f), fclose(f);
    return c;
}

static void expect_cut(const char *name, size_t n) {
    test.n_checks++;
    if (load() != GPT_ERR_FILE || !strstr(gpt_last_error(), name))
        test_fail(__FILE__, __LINE__, "%s cut at %zu: '%s'", name, n, gpt_last_error());
}

static void test_cut_anywhere(void) {
    begin();
    content weights = write_small(), config = read_back("config.json");
    EXPECT(load() == GPT_OK);
    int before = open_files();
    for (size_t n = 0; n < weights.n; n++) {
        write_file("model.safetensors", weights.bytes, n);
        expect_cut("model.safetensors", n);
    }
    write_file("model.safetensors", weights.bytes, weights.n);
    for (size_t n = 0; n < config.n; n++) {
        write_file("config.json", config.bytes, n);
        expect_cut("config.json", n);
    }
    EXPECT(open_files() == before);
    end();
}

/* A changed byte may leave a whole file, which then loads; it is never worse than refused. */
static void test_change_anywhere(void) {
    static const char bytes[] = {0,   '"', '0', '9',  '-', '{',       '}',
                                 '[', ']', ',', '\\', 'e', (char)0xff};
    begin();
    content weights = write_small(), config = read_back("config.json");
    for (int file = 0; file < 2; file++) {
        content c = file ? config : weights;
        size_t n = file ? config.n : weights.header;
        for (size_t i = 0; i < n; i++) {
            char before = c.bytes[i];
            for (int k = 0; k < TEST_COUNT(bytes); k++) {
                c.bytes[i] = bytes[k];
                write_file(file ? "config.json" : "model.safetensors", c.bytes, c.n);
                int status = load();
                EXPECT(status == GPT_OK || status == GPT_ERR_FILE);
            }
            c.bytes[i] = before;
        }
        write_file(file ? "config.json" : "model.safetensors", c.bytes, c.n);
    }
    end();
}

/* One tensor instead of a model's: its header is refused before its name is. */
static void test_headers_that_lie(void) {
    static const struct {
        const char *entry, *word;
    } cases[] = {
        {"1", "the entry of wte"},
        {"{\"shape\":[1],\"data_offsets\":[0,4]}", "the dtype"},
        {"{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}", "the dtype"},
        {"{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}", "the dtype"},
        {"{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}", "the dtype"},
        {"{\"dtype\":\"F32\",\"data_offsets\":[0,4]}", "the shape"},
        {"{\"dtype\":\"F32\",\"shape\":1,\"data_offsets\":[0,4]}", "the shape"},
        {"{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}", "the shape"},
        {"{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}", "the shape"},
        {"{\"dtype\":\"F32\",\"shape\":[9223372036854775808],\"data_offsets\":[0,4]}", "the shape"},
        {"{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}", "the shape"},
        /* 2^63 x 2 x 2 numbers wrap around to few bytes, where that is not looked at. */
        {"{\"dtype\":\"F32\",\"shape\":[4611686018427387905,1],\"data_offsets\":[0,4]}",
         "do not fit"},
        {"{\"dtype\":\"F32\",\"shape\":[9223372036854775807,9223372036854775807],"
         "\"data_offsets\":[0,4]}",
         "do not fit"},
        {"{\"dtype\":\"F32\",\"shape\":[9223372036854775807,0],\"data_offsets\":[0,4]}",
         "do not fit"},
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}", "do not fit"},
        {"{\"dtype\":\"F32\",\"shape\":[1]}", "data_offsets"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}", "data_offsets"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,4]}", "data_offsets"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}", "data_offsets"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}", "data_offsets"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,9223372036854775807]}", "truncated"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}", "truncated"},
        {"{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}",
         "4 bytes after its last tensor"},
        {"{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[2,2]}", "gap or overlap"},
        {"{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[0,2]},"
         "\"b\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[1,3]}",
         "gap or overlap"},
        {"{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[0,2]},"
         "\"wte\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[2,4]}",
         "two entries"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4,4]}",
         "the name"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4,4]}",
         "the name"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}", "lacks the tensor wte.weight"},
        {"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]", "not JSON"},
    };
    begin();
    write_config(&small);
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        char header[512];
        snprintf(header, sizeof header, "{\"wte\":%s}", cases[i].entry);
        test_case("%s", cases[i].entry);
        write_weights(header, "abcd", 4);
        EXPECT_BAD_FILE(cases[i].word);
    }
    write_weights("[]", "", 0);
    EXPECT_BAD_FILE("not an object");
    static const uint64_t lengths[] = {0, 1, 9, 100000001, UINT64_MAX, UINT64_MAX - 7, 1ull << 63};
    for (int i = 0; i < TEST_COUNT(lengths); i++) {
        content c = make_file("{\"a\": 1}", "", 0);
        memcpy(c.bytes, &lengths[i], 8);
        write_file("model.safetensors", c.bytes, c.n);
        EXPECT_BAD_FILE("not a whole safetensors file");
    }
    end();
}

/* Brackets of a header and of a config that never end. */
static void test_nesting(void) {
    enum { N = 1 << 20 };
    static char text[N + 1];
    begin();
    write_small();
    memset(text, '[', N);
    memcpy(text, "{\"a\":", 5);
    write_weights(text, "", 0);
    EXPECT_BAD_FILE("nested too deep");
    write_text("config.json", text);
    EXPECT_BAD_FILE("nested too deep");
    end();
}

/* ---- models that do not fit their files ---- */

static void replace_in_config(const char *old, const char *new) {
    content c = read_back("config.json");
    c.bytes[c.n] = 0;
    char *at = strstr(c.bytes, old), text[2048];
    EXPECT(at != NULL);
    if (!at) return;
    snprintf(text, sizeof text, "%.*s%s%s", (int)(at - c.bytes), c.bytes, new, at + strlen(old));
    write_text("config.json", text);
}

static void test_configs(void) {
    static const struct {
        const char *old, *new, *word;
    } cases[] = {
        {"\"gptc\"", "\"mamba\"", "model_type \"mamba\" is not one of"},
        {"\"model_type\": \"gptc\",", "", "lacks model_type"},
        {"\"gptc_config_version\": 1", "\"gptc_config_version\": 2", "version 2"},
        {"\"n_ff\": 1,", "", "lacks n_ff"},
        {"\"n_ff\": 1,", "\"n_ff\": 1.0,", "n_ff is not a whole number"},
        {"\"n_ff\": 1,", "\"n_ff\": 4294967297,", "n_ff is not a whole number"},
        {"\"n_ff\": 1,", "\"n_ff\": 1, \"n_ff\": 2,", "names n_ff twice"},
        {"\"n_ff\": 1,", "\"n_ff\": 1, \"layers\": [],", "no models with layers: load"},
        {"\"n_ff\": 1,", "\"n_ff\": 1, \"head_size\": 4,", "field \"head_size\" is unknown"},
        {"\"n_ff\": 1,", "\"n_ff\": 0,", "config.json: n_ff is 0"},
        {"\"n_ff\": 1,", "\"n_ff\": 2,", "h.0.mlp.fc.weight does not have the shape (2, 2)"},
        {"\"n_layer\": 1", "\"n_layer\": 2", "lacks the tensor h.1."},
        {"\"n_layer\": 1", "\"n_layer\": 0", "n_layer is 0"},
        {"\"rmsnorm\"", "\"batchnorm\"", "norm is not a choice"},
        {"\"swish\"", "\"\"", "activation is not a choice"},
        {"\"tied\": true", "\"tied\": 1", "tied is not true or false"},
        {"\"tied\": true", "\"tied\": false", "lacks the tensor lm_head.weight"},
        {"\"norm_weight\": false", "\"norm_weight\": true", "lacks the tensor h.0.norm_1.weight"},
        {"\"norm_eps\": ", "\"norm_eps\": 1e99, \"x\": ", "unknown"},
        {"1}", "1", "is not JSON"},
    };
    begin();
    for (int i = 0; i < TEST_COUNT(cases) - 1; i++) {
        test_case("%s", cases[i].new);
        write_small();
        replace_in_config(cases[i].old, cases[i].new);
        EXPECT_BAD_FILE(cases[i].word);
    }
    write_text("config.json", "[1, 2]");
    EXPECT_BAD_FILE("not a JSON object");
    end();
}

/* A tensor without a parameter, unless it is a table that is computed, or the tied head. */
static void test_other_tensors(void) {
    static const struct {
        const char *name;
        int fine;
    } cases[] = {
        {"h.1.mlp.fc.weight", 0}, {"x\\ny", 0}, {"h.0.attn.bias", 1}, {"lm_head.weight", 1}};
    begin();
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        test_case("%s", cases[i].name);
        content file = write_small();
        size_t n = file.n - file.header;
        char *header = test_alloc(&test.host, file.header + 200);
        /* The embedding is first, so that its bytes are there for a tied head too. */
        char *tensors = test_alloc(&test.host, n + 24);
        memcpy(tensors, file.bytes + file.header, n);
        memcpy(tensors + n, tensors, 24);
        sprintf(header,
                "%.*s,\"%s\":{\"dtype\":\"F32\",\"shape\":[3,2],\"data_offsets\":[%zu,%zu]}}",
                (int)file.header - 9, file.bytes + 8, cases[i].name, n, n + 24);
        write_weights(header, tensors, n + 24);
        if (cases[i].fine)
            EXPECT_OK(load());
        else
            EXPECT_BAD_FILE("which its model lacks");
    }
    /* The last one with other numbers: then the head is not tied. */
    content file = read_back("model.safetensors");
    gpt_config config;
    file.bytes[file.n - 1] ^= 1;
    write_file("model.safetensors", file.bytes, file.n);
    EXPECT_OK(gpt_config_load(folder, &config));
    EXPECT(config.tied == 0);
    EXPECT_OK(load());
    end();
}

static void test_dtype_of_weights(void) {
    begin();
    content file = write_small();
    for (char *at = file.bytes + 8; at < file.bytes + file.header - 3; at++)
        if (!memcmp(at, "F32", 3)) memcpy(at, "I32", 3);
    write_file("model.safetensors", file.bytes, file.n);
    EXPECT_BAD_FILE("is stored as I32");
    end();
}

static void test_missing_files(void) {
    gpt_model *model = NULL;
    gpt_config config;
    begin();
    EXPECT_BAD_FILE("cannot read");
    EXPECT_BAD_FILE("config.json");
    write_config(&small);
    EXPECT_BAD_FILE("model.safetensors");
    unlink(path_of("config.json"));
    EXPECT(mkdir(path_of("config.json"), 0700) == 0);
    EXPECT_BAD_FILE("is not a file");
    rmdir(path_of("config.json"));
    EXPECT(mkfifo(path_of("config.json"), 0600) == 0);
    EXPECT_BAD_FILE("is not a file");
    EXPECT(gpt_model_load(NULL, &options, &model) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_model_load(folder, NULL, &model) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_model_load(folder, &options, NULL) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_config_load(NULL, &config) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_config_load(folder, NULL) == GPT_ERR_ARGUMENT);
    char *name = test_alloc(&test.host, 1 << 16);
    memset(name, '\n', (1 << 16) - 1);
    name[(1 << 16) - 1] = 0;
    EXPECT(gpt_model_load(name, &options, &model) == GPT_ERR_FILE);
    EXPECT(!strchr(gpt_last_error(), '\n') && strlen(gpt_last_error()) < 400);
    end();
}

/* Weights that are not in the one file: the error names them, and what to do. */
static void test_weights_elsewhere(void) {
    static const char *const others[] = {"model.safetensors.index.json", "pytorch_model.bin",
                                         "pytorch_model.bin.index.json", "model.gguf"};
    static const char pointer[] = "version https://git-lfs.github.com/spec/v1\n"
                                  "oid sha256:0123\nsize 548105171\n";
    begin();
    write_config(&small);
    for (int i = 0; i < 4; i++) {
        test_case("%s", others[i]);
        write_text(others[i], "{}");
        EXPECT_BAD_FILE(others[i]);
        EXPECT_BAD_FILE("gptc export -m FOLDER --to hf --out CKPT");
        unlink(path_of(others[i]));
    }
    test_case("Git LFS");
    write_text("model.safetensors", pointer);
    EXPECT_BAD_FILE("model.safetensors is a pointer of Git LFS");
    EXPECT_BAD_FILE("git lfs pull");
    write_small();
    write_text("config.json", pointer);
    EXPECT_BAD_FILE("config.json is a pointer of Git LFS");
    end();
}

/* A refusal of the options leaves nothing open. */
static void test_options(void) {
    gpt_model *model = NULL;
    begin();
    write_small();
    int before = open_files();
    EXPECT(gpt_model_load(folder, &(gpt_options){.max_seq = 3}, &model) == GPT_ERR_ARGUMENT);
    EXPECT(model == NULL && strstr(gpt_last_error(), "max_seq"));
    EXPECT(open_files() == before);
    end();
}

TEST_API_MAIN({"round trip", test_round_trip}, {"adapters", test_adapters}, {"dtypes", test_dtypes},
              {"cut anywhere", test_cut_anywhere}, {"change anywhere", test_change_anywhere},
              {"headers that lie", test_headers_that_lie}, {"nesting", test_nesting},
              {"configs", test_configs}, {"other tensors", test_other_tensors},
              {"dtype of weights", test_dtype_of_weights}, {"missing files", test_missing_files},
              {"weights elsewhere", test_weights_elsewhere}, {"options", test_options})
