/* Plans of products: their figures, and their file. A shape is measured once for a card, a driver and a
 * version of cuBLASLt; a file that is damaged, or of another version, is not used. */
#define _GNU_SOURCE
#include "models.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

long emulate_cublas_heuristics(void);
void emulate_cublas_version(size_t number);
void emulate_cublas_fastest(int i);
void emulate_capability(int major);

enum { B = 2, T = 12, VERSION = 130100 };
enum { RENAME, FLIP, TRUNCATE, EMPTY }; /* what happens to a file */

static char folder[64];

/* One training step of a new model, and what it asked the library. */
static long questions(const gpt_config *config, float *loss) {
    long before = emulate_cublas_heuristics();
    const gpt_adamw adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};
    test.counter = 0;
    gpt_model *model = new_model(config, 1, B, T, 0.0f);
    write_random_params(model, config);
    int32_t *tokens = random_ints(B * T, config->vocab_size);
    EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, loss));
    EXPECT_OK(update_adamw(model, &adamw, NULL, NULL));
    gpt_model_free(model);
    return emulate_cublas_heuristics() - before;
}

static void begin(void) {
    snprintf(folder, sizeof folder, "/tmp/gptc_plans_XXXXXX");
    EXPECT(mkdtemp(folder) != NULL);
    EXPECT(setenv("GPTC_PLANS", folder, 1) == 0);
    EXPECT(setenv("GPTC_TUNE", "1", 1) == 0);
}

/* The folder's files; the path of the last. */
static int files(char *path, size_t size) {
    int n = 0;
    DIR *all = opendir(folder);
    for (struct dirent *entry; all && (entry = readdir(all));) {
        if (entry->d_name[0] == '.') continue;
        snprintf(path, size, "%s/%s", folder, entry->d_name);
        n++;
    }
    closedir(all);
    return n;
}

static void end(void) {
    char path[512];
    while (files(path, sizeof path)) EXPECT(remove(path) == 0);
    EXPECT(rmdir(folder) == 0);
    unsetenv("GPTC_PLANS");
    unsetenv("GPTC_TUNE");
    emulate_cublas_version(VERSION);
    emulate_cublas_fastest(1);
    emulate_capability(8);
}

static int says(const char *words) {
    gpt_device_info info;
    EXPECT_OK(gpt_cuda_info(&info));
    return strstr(info.products, words) != NULL;
}

static void damage(const char *path, int how) {
    struct stat file;
    char other[600];
    EXPECT(stat(path, &file) == 0);
    if (how == RENAME) { /* the file of another version under this one's name */
        emulate_cublas_version(VERSION + 100);
        snprintf(other, sizeof other, "%s", path);
        char *number = strstr(other, "130100");
        EXPECT(number != NULL);
        if (number) memcpy(number, "130200", 6);
        EXPECT(rename(path, other) == 0);
    } else if (how == FLIP) {
        FILE *f = fopen(path, "r+b");
        fseek(f, file.st_size / 2, SEEK_SET);
        int c = fgetc(f);
        fseek(f, file.st_size / 2, SEEK_SET);
        fputc(c == '1' ? '2' : '1', f);
        fclose(f);
    } else {
        EXPECT(truncate(path, how == EMPTY ? 0 : file.st_size - 30) == 0);
    }
}

/* GPT-2 with rows that are aligned, so that the library has all of its products that it is asked. */
static gpt_config aligned_config(void) {
    gpt_config config = families[0].config;
    config.n_embd = 24;
    config.n_ff = 40;
    return config;
}

static void test_reuse(void) {
    const gpt_config aligned = aligned_config(), *config = &aligned;
    EACH_PLACE {
        char path[512];
        float loss[3];
        test_case("%s", places[place.at].name);
        begin();
        EXPECT(questions(config, &loss[0]) > 8);
        EXPECT(files(path, sizeof path) == 1);
        EXPECT(says("tuned (GPTC_TUNE), ") && says(" plans in "));
        EXPECT(questions(config, &loss[1]) == 0);
        EXPECT(loss[0] == loss[1]);
        emulate_cublas_version(VERSION + 1);
        EXPECT(questions(config, &loss[2]) > 8);
        EXPECT(files(path, sizeof path) == 2);
        emulate_cublas_version(VERSION);
        EXPECT(questions(config, &loss[2]) == 0);
        unsetenv("GPTC_TUNE");
        EXPECT(questions(config, &loss[2]) > 4); /* the first choice of each shape, as always */
        EXPECT(!says("tuned"));
        setenv("GPTC_TUNE", "1", 1);
        setenv("GPTC_PLANS", "/proc/none", 1); /* cannot be written */
        EXPECT(questions(config, &loss[2]) > 8);
        setenv("GPTC_PLANS", folder, 1);
        end();
    }
}

static void test_damage(void) {
    const gpt_config aligned = aligned_config(), *config = &aligned;
    EACH_PLACE {
        for (int how = RENAME; how <= EMPTY; how++) {
            char path[512];
            float loss[2];
            test_case("%s, damage %d", places[place.at].name, how);
            begin();
            EXPECT(questions(config, &loss[0]) > 8);
            EXPECT(files(path, sizeof path) == 1);
            damage(path, how);
            EXPECT(says(how == RENAME ? "is of another version and was ignored"
                                      : "is damaged and was ignored"));
            EXPECT(questions(config, &loss[1]) > 8);
            EXPECT(loss[0] == loss[1]);
            EXPECT(files(path, sizeof path) == 1);
            EXPECT(questions(config, &loss[1]) == 0);
            end();
        }
    }
}

/* Products of a step with a plan that has these words, or a problem that is these. */
static int count(const gpt_config *config, const char *plan, const char *problem, int *n) {
    gpt_model *model = new_model(config, 1, B, T, 0.0f);
    gpt_product_time p;
    float loss;
    int found = 0;
    int32_t *tokens = random_ints(B * T, config->vocab_size);
    EXPECT(gpt_model_profile_product(model, 0, &p) == GPT_ERR_ARGUMENT);
    EXPECT_OK(gpt_model_profile(model, 1));
    EXPECT_OK(gpt_model_backward(model, tokens, tokens, B, T, 1.0f, &loss));
    for (*n = 0; gpt_model_profile_product(model, *n, &p) == GPT_OK; ++*n) {
        EXPECT(p.calls > 0 && strlen(p.name) > 8);
        found += (!plan || strstr(p.plan, plan)) && (!problem || !strcmp(p.problem, problem));
        if (!strcmp(p.problem, "the epilogue is not fused"))
            EXPECT(p.seconds == 0 && p.flops == 0);
        else if (p.plan[0])
            EXPECT(p.seconds > 0 && p.flops > 0 && p.bytes > 0);
    }
    gpt_model_free(model);
    return found;
}

static void test_figures(void) {
    gpt_config config = aligned_config();
    EACH_PLACE {
        int n;
        test_case("%s", places[place.at].name);
        EXPECT(count(&config, "algorithm 66, tile 128x128, stages 36, cluster 3, split-K 1, 0.0 MB",
                     "", &n) == n);
        EXPECT(n > 8);
        begin();
        EXPECT(count(&config, "tile 256x128, stages 36, cluster 5, split-K 2, 1.0 MB", "", &n) ==
               n);
        end();
        begin();
        emulate_cublas_fastest(2);
        emulate_capability(9);
        EXPECT(count(&config, "tile 64x64", "an algorithm of an earlier architecture", &n) == n);
        end();
        config.n_ff = 33; /* in fp32 for the bias, in bf16 for the backward of GELU */
        EXPECT(count(&config, NULL, "the epilogue is not fused", &n) == 1);
        config.n_ff = 40;
    }
}

TEST_API_MAIN({"reuse", test_reuse}, {"damage", test_damage}, {"figures", test_figures})
