/* gpt_bench.c: measures libgpt.so, and compares its devices, through gpt.h alone: for machines that
 * have a compiler and no Python packages. One JSON object goes to standard output.
 *
 *     gpt_bench info
 *     gpt_bench train  --preset gpt2 --device cuda --dtype bf16 --batch 64 --seq 1024 --steps 20
 *     gpt_bench decode --preset gpt2 --device cuda --dtype bf16 --batch 64 --tokens 256 --prompt 512
 *     gpt_bench parity --text book.txt --steps 100
 *
 * train and decode work on random tokens; a time is the median of its steps. parity trains small
 * models of each family on the bytes of a text, on the CPU in fp32 and on the GPU, from the same
 * weights and batches, and fails where the losses part or a repeated run differs in a bit. */
#define _POSIX_C_SOURCE 200809L
#include "gpt.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct settings {
    const char *preset, *device, *dtype, *text;
    int batch, seq, steps, warmup, tokens, prompt, ops, layers, width, logits, top_p;
    double peak_tflops; /* of the datasheet: dense bf16 on an H100 or H200 */
} settings;

static settings set = {.preset = "gpt2",
                       .device = "cuda",
                       .dtype = "bf16",
                       .text = "README.md",
                       .batch = 8,
                       .seq = 256,
                       .steps = 20,
                       .warmup = 3,
                       .tokens = 128,
                       .prompt = 16,
                       .layers = 4,
                       .width = 128,
                       .peak_tflops = 989};

/* ---- small things ---- */

static void die(const char *what) {
    fprintf(stderr, "gpt_bench: %s\n", what);
    exit(1);
}

/* Ends the program with the library's own sentence. */
static void must(int status) {
    if (status != GPT_OK) die(gpt_last_error());
}

static void *allocate(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    if (!p) die("out of memory");
    return p;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Steele, Lea and Flood 2014: splitmix64. */
static uint64_t random_bits(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int32_t *random_tokens(int n, int below) {
    uint64_t state = 1;
    int32_t *tokens = allocate((size_t)n, sizeof *tokens);
    for (int i = 0; i < n; i++) tokens[i] = (int32_t)(random_bits(&state) % (uint64_t)below);
    return tokens;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, by_size);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

static gpt_options options_for(const char *device, const char *dtype) {
    static const char *const dtypes[] = {[GPT_DTYPE_FP32] = "fp32",
                                         [GPT_DTYPE_BF16] = "bf16",
                                         [GPT_DTYPE_INT8] = "int8",
                                         [GPT_DTYPE_INT4] = "int4"};
    int n = sizeof dtypes / sizeof *dtypes, i = 0;
    if (strcmp(device, "cpu") && strcmp(device, "cuda")) die("--device is cpu or cuda");
    while (i < n && strcmp(dtype, dtypes[i])) i++;
    if (i == n) die("--dtype is fp32 or bf16, or to decode int8 or int4");
    return (gpt_options){.device = strcmp(device, "cuda") ? GPT_DEVICE_CPU : GPT_DEVICE_CUDA,
                         .dtype = i};
}

static gpt_config preset_config(void) {
    gpt_config config;
    must(gpt_config_preset(set.preset, &config));
    return config;
}

static void print_what(const char *mode) {
    printf("{\"mode\": \"%s\", \"preset\": \"%s\", \"device\": \"%s\", \"dtype\": \"%s\", "
           "\"batch\": %d",
           mode, set.preset, set.device, set.dtype, set.batch);
}

/* ---- info ---- */

static int run_info(void) {
    gpt_device_info d;
    int status = gpt_cuda_info(&d);
    printf("{\"mode\": \"info\", \"version\": \"%s\", \"cpu_level\": \"%s\", \"cores\": %d, "
           "\"gpu\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d, "
           "\"driver_cuda\": %d, \"runtime_cuda\": %d, \"products\": \"%s\", "
           "\"memory_bytes\": %llu, \"problem\": \"%s\"}\n",
           gpt_version(), gpt_cpu_level(), gpt_cpu_count(), d.name, d.major, d.minor,
           d.multiprocessors, d.driver, d.runtime, d.products, (unsigned long long)d.memory_bytes,
           status == GPT_OK ? "" : gpt_last_error());
    return status == GPT_OK ? 0 : 1;
}

/* ---- train ---- */

static const gpt_adamw adamw = {6e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};

static void update(gpt_model *model, const gpt_adamw *settings, float *loss) {
    gpt_optimizer optimizer = {.kind = GPT_OPTIMIZER_ADAMW, .adamw = *settings};
    must(gpt_model_update(model, &optimizer, 1, loss, NULL));
}

/* One step on (B, T) tokens, each followed by the next; its loss. */
static float train_step(gpt_model *model, const int32_t *tokens, int B, int T) {
    float loss;
    must(gpt_model_backward(model, tokens, tokens + 1, B, T, 1.0f, NULL));
    update(model, &adamw, &loss);
    return loss;
}

/* The time of every kind of op in a step. Each is waited for, so together they take longer than a
 * step does. */
/* The library's products, and how many of them have a problem. */
static void print_products(gpt_model *model, int steps) {
    gpt_product_time p;
    int fallbacks = 0;
    printf(", \"products\": [");
    for (int i = 0; gpt_model_profile_product(model, i, &p) == GPT_OK; i++) {
        printf("%s\n  {\"product\": \"%s\", \"epilogue\": \"%s\", \"plan\": \"%s\", \"calls\": "
               "%.0f, \"ms\": %.4f, \"tflops\": %.1f, \"fallback\": \"%s\"}",
               i ? "," : "", p.name, p.epilogue, p.plan, (double)p.calls / steps,
               p.seconds / steps * 1e3, p.seconds > 0 ? p.flops / p.seconds * 1e-12 : 0, p.problem);
        fallbacks += p.problem[0] != 0;
    }
    printf("], \"fallbacks\": %d", fallbacks);
}

static void print_ops(gpt_model *model, const int32_t *tokens) {
    enum { STEPS = 3 };
    gpt_op_time op;
    must(gpt_model_profile(model, 1));
    for (int i = 0; i < STEPS; i++) train_step(model, tokens, set.batch, set.seq);
    printf(", \"ops\": [");
    for (int i = 0; gpt_model_profile_read(model, i, &op) == GPT_OK; i++)
        printf("%s\n  {\"name\": \"%s\", \"calls\": %.0f, \"ms\": %.4f, \"tflops\": %.1f, "
               "\"gb_per_s\": %.0f}",
               i ? "," : "", op.name, (double)op.calls / STEPS, op.seconds / STEPS * 1e3,
               op.flops / op.seconds * 1e-12, op.bytes / op.seconds * 1e-9);
    printf("]");
    print_products(model, STEPS);
}

static int run_train(void) {
    gpt_config config = preset_config();
    gpt_options options = options_for(set.device, set.dtype);
    options.training = 1;
    options.max_batch = set.batch;
    options.max_seq = config.block_size = set.seq;
    gpt_plan plan;
    gpt_model *model;
    must(gpt_plan_memory(&config, &options, &plan));
    must(gpt_model_create(&config, &options, &model));
    must(gpt_model_init(model, 1));
    int32_t *tokens = random_tokens(set.batch * set.seq + 1, config.vocab_size);
    double *times = allocate((size_t)set.steps, sizeof *times), peak_flops, peak_bytes;
    float first = train_step(model, tokens, set.batch, set.seq), last = first;
    for (int i = 1; i < set.warmup; i++) train_step(model, tokens, set.batch, set.seq);
    for (int i = 0; i < set.steps; i++) {
        double begin = seconds();
        last = train_step(model, tokens, set.batch, set.seq);
        times[i] = seconds() - begin;
    }
    double step_s = median(times, set.steps), rate = set.batch * set.seq / step_s;
    double flops = rate * plan.train_flops_per_token;
    must(gpt_model_peak(model, &peak_flops, &peak_bytes));
    print_what("train");
    printf(", \"seq\": %d, \"steps\": %d, \"n_params\": %lld, \"step_ms\": %.3f, "
           "\"fastest_ms\": %.3f, \"slowest_ms\": %.3f, \"tokens_per_s\": %.0f, "
           "\"tflops\": %.1f, \"mfu\": %.4f, \"of_peak\": %.4f, \"peak_tflops\": %.1f, "
           "\"copy_gb_per_s\": %.0f, \"memory_bytes\": %llu, \"first_loss\": %.5f, "
           "\"last_loss\": %.5f",
           set.seq, set.steps, (long long)plan.n_params, step_s * 1e3, times[0] * 1e3,
           times[set.steps - 1] * 1e3, rate, flops * 1e-12, flops / (set.peak_tflops * 1e12),
           flops / peak_flops, peak_flops * 1e-12, peak_bytes * 1e-9,
           (unsigned long long)(plan.total_bytes + plan.library_bytes), first, last);
    if (set.ops) print_ops(model, tokens);
    puts("}");
    gpt_model_free(model);
    free(tokens);
    free(times);
    /* The same tokens every time: a model that learns anything knows them better now. */
    return isfinite(last) && last < first ? 0 : 1;
}

/* ---- decode ---- */

/* The next token of each sequence: the library's draw, by the settings of `gptc infer`, or
 * with --logits all logits, which the caller draws from. */
static void decode_step(gpt_session *session, int32_t *tokens, const int32_t *seqs, int n,
                        gpt_draw *draws, float *logits) {
    if (set.logits) {
        must(gpt_session_decode(session, tokens, seqs, NULL, n, logits));
        return;
    }
    must(gpt_session_sample(session, tokens, seqs, NULL, n, draws));
    for (int i = 0; i < n; i++) {
        tokens[i] = draws[i].token;
        draws[i].position++;
    }
}

static int run_decode(void) {
    gpt_config config = preset_config();
    gpt_options options = options_for(set.device, set.dtype);
    gpt_model *model;
    gpt_session *session;
    int n = set.batch, n_prompt = n * set.prompt, n_ctx = set.prompt + set.warmup + set.tokens;
    if (n_ctx > config.block_size) die("--prompt and --tokens are more than the model's context");
    must(gpt_model_create(&config, &options, &model));
    must(gpt_model_init(model, 1));
    must(gpt_session_create(model, n, n_ctx, GPT_KV_ACTIVATIONS, &session));
    int32_t *tokens = random_tokens(n_prompt, config.vocab_size);
    int32_t *seqs = allocate((size_t)n_prompt, sizeof *seqs);
    float *logits = allocate((size_t)n * (size_t)config.vocab_size, sizeof *logits);
    gpt_draw *draws = allocate((size_t)n, sizeof *draws);
    for (int i = 0; i < n_prompt; i++) seqs[i] = i / set.prompt;
    for (int i = 0; i < n; i++) {
        draws[i].sampling = (gpt_sampling){.repetition_penalty = 1,
                                           .temperature = 0.7f,
                                           .typical_p = 1,
                                           .top_p = set.top_p ? (float)set.top_p / 100 : 1,
                                           .seed = (uint64_t)i};
        draws[i].n_top = -1;
    }
    double prompt_s = 0;
    for (int turn = 0; turn < 3; turn++) { /* the last counts */
        for (int i = 0; i < n; i++) must(gpt_session_rewind(session, i, 0));
        double begin = seconds();
        must(gpt_session_decode(session, tokens, seqs, NULL, n_prompt, logits));
        prompt_s = seconds() - begin;
    }
    for (int i = 0; i < n; i++) seqs[i] = i;
    double *times = allocate((size_t)set.tokens, sizeof *times);
    for (int i = -set.warmup; i < set.tokens; i++) {
        double begin = seconds();
        decode_step(session, tokens, seqs, n, draws, logits);
        if (i >= 0) times[i] = seconds() - begin;
    }
    double step_s = median(times, set.tokens);
    int finite = 1;
    for (int i = 0; i < n * config.vocab_size; i++) finite &= isfinite(logits[i]) != 0;
    print_what("decode");
    printf(", \"draws\": %s, \"tokens\": %d, \"step_ms\": %.4f, \"tokens_per_s\": %.1f, "
           "\"prompt\": %d, \"prompt_ms\": %.3f, \"prompt_tokens_per_s\": %.0f}\n",
           set.logits ? "false" : "true", set.tokens, step_s * 1e3, n / step_s, set.prompt,
           prompt_s * 1e3, n_prompt / prompt_s);
    gpt_session_free(session);
    gpt_model_free(model);
    free(tokens), free(seqs), free(logits), free(draws), free(times);
    return finite ? 0 : 1;
}

/* ---- parity ---- */

typedef struct text {
    int32_t *tokens;
    long n;
} text;

static text read_text(void) {
    FILE *file = fopen(set.text, "rb");
    if (!file) die("--text names no file that can be read");
    text t = {.tokens = NULL};
    long room = 0;
    for (int c; (c = fgetc(file)) != EOF; t.tokens[t.n++] = c)
        if (t.n == room) {
            room = room ? 2 * room : 1 << 16;
            t.tokens = realloc(t.tokens, sizeof *t.tokens * (size_t)room);
            if (!t.tokens) die("out of memory");
        }
    fclose(file);
    if (t.n < 4L * set.seq) die("--text is too short");
    return t;
}

/* A small member of a family, with bytes as its vocabulary. */
static gpt_config small_config(const char *family) {
    gpt_config c;
    must(gpt_config_preset(family, &c));
    c.vocab_size = 256;
    c.block_size = set.seq;
    c.n_layer = set.layers;
    c.n_head = 4;
    c.n_kv_head = c.n_kv_head < c.n_head && c.activation == GPT_ACT_SWIGLU ? 2 : 4;
    c.n_embd = set.width;
    c.n_ff = c.activation == GPT_ACT_SWIGLU ? set.width * 8 / 3 / 8 * 8 : 4 * set.width;
    return c;
}

typedef struct outcome {
    float *losses; /* of every step */
    float *params; /* after the last */
    int64_t n_params;
} outcome;

static outcome train_on(const text *t, const gpt_config *config, const char *device,
                        const char *dtype) {
    gpt_options options = options_for(device, dtype);
    options.training = 1;
    options.max_batch = set.batch;
    gpt_model *model;
    must(gpt_model_create(config, &options, &model));
    must(gpt_model_init(model, 42));
    outcome out = {.losses = allocate((size_t)set.steps, sizeof(float))};
    int32_t *x = allocate((size_t)(set.batch * set.seq), sizeof *x);
    int32_t *y = allocate((size_t)(set.batch * set.seq), sizeof *y);
    gpt_adamw gently = adamw; /* at full rate from the start, training doubles every rounding */
    uint64_t state = 7;
    for (int step = 0; step < set.steps; step++) {
        for (int b = 0; b < set.batch; b++) {
            long at = (long)(random_bits(&state) % (uint64_t)(t->n - set.seq - 1));
            size_t bytes = sizeof *x * (size_t)set.seq;
            memcpy(x + b * set.seq, t->tokens + at, bytes);
            memcpy(y + b * set.seq, t->tokens + at + 1, bytes);
        }
        gently.lr = 3e-4f * fminf(1, (float)(step + 1) / 20);
        must(gpt_model_backward(model, x, y, set.batch, set.seq, 1.0f, NULL));
        update(model, &gently, &out.losses[step]);
    }
    free(x), free(y);
    for (int i = 0; i < gpt_config_param_count(config); i++) {
        gpt_param info;
        must(gpt_config_param(config, i, &info));
        out.params = realloc(out.params, sizeof(float) * (size_t)(out.n_params + info.size));
        if (!out.params) die("out of memory");
        must(gpt_model_read(model, i, GPT_TENSOR_VALUE, out.params + out.n_params, info.size));
        out.n_params += info.size;
    }
    gpt_model_free(model);
    return out;
}

static void forget(outcome *o) {
    free(o->losses), free(o->params);
}

static int same_bits(const outcome *a, const outcome *b) {
    return !memcmp(a->losses, b->losses, sizeof(float) * (size_t)set.steps) &&
           a->n_params == b->n_params &&
           !memcmp(a->params, b->params, sizeof(float) * (size_t)a->n_params);
}

/* How far two curves are apart: the mean over the steps. */
static double distance(const outcome *a, const outcome *b) {
    double sum = 0;
    for (int i = 0; i < set.steps; i++) sum += fabs((double)a->losses[i] - b->losses[i]);
    return sum / set.steps;
}

/* One family in one dtype, against the CPU in fp32. In fp32 only the order of sums differs; in bf16
 * the CPU's own bf16 says how far rounding takes a curve, and the GPU may go twice as far. */
static int compare(const text *t, const char *family, const char *dtype, const outcome *reference,
                   int is_first) {
    const double SMALL = 1e-4;
    gpt_config config = small_config(family);
    outcome got = train_on(t, &config, set.device, dtype);
    outcome again = train_on(t, &config, set.device, dtype);
    double allowed = SMALL;
    if (!strcmp(dtype, "bf16")) {
        outcome rounded = train_on(t, &config, "cpu", "bf16");
        allowed = 3 * SMALL + 2 * distance(&rounded, reference); /* few steps vary by chance */
        forget(&rounded);
    }
    double apart = distance(&got, reference);
    int repeats = same_bits(&got, &again), ok = repeats && apart <= allowed;
    printf("%s\n  {\"family\": \"%s\", \"dtype\": \"%s\", \"mean_difference\": %.6f, "
           "\"allowed\": %.6f, \"first_loss\": %.5f, \"last_loss\": %.5f, \"cpu_last_loss\": %.5f, "
           "\"repeats_bit_for_bit\": %s, \"ok\": %s}",
           is_first ? "" : ",", family, dtype, apart, allowed, got.losses[0],
           got.losses[set.steps - 1], reference->losses[set.steps - 1], repeats ? "true" : "false",
           ok ? "true" : "false");
    fflush(stdout);
    forget(&got), forget(&again);
    return ok;
}

static int run_parity(void) {
    static const char *const families[] = {"gpt2", "llama-15m", "byte"};
    text t = read_text();
    int ok = 1;
    printf("{\"mode\": \"parity\", \"device\": \"%s\", \"batch\": %d, \"seq\": %d, \"steps\": %d, "
           "\"runs\": [",
           set.device, set.batch, set.seq, set.steps);
    for (int f = 0; f < 3; f++) {
        gpt_config config = small_config(families[f]);
        outcome reference = train_on(&t, &config, "cpu", "fp32");
        ok &= compare(&t, families[f], "fp32", &reference, f == 0);
        ok &= compare(&t, families[f], "bf16", &reference, 0);
        forget(&reference);
    }
    printf("], \"ok\": %s}\n", ok ? "true" : "false");
    free(t.tokens);
    return !ok;
}

/* ---- the command line ---- */

static void read_option(const char *name, const char *value) {
    const struct {
        const char *name;
        const char **text;
        int *number;
    } options[] = {{"--preset", &set.preset, NULL}, {"--device", &set.device, NULL},
                   {"--dtype", &set.dtype, NULL},   {"--text", &set.text, NULL},
                   {"--batch", NULL, &set.batch},   {"--seq", NULL, &set.seq},
                   {"--steps", NULL, &set.steps},   {"--warmup", NULL, &set.warmup},
                   {"--tokens", NULL, &set.tokens}, {"--prompt", NULL, &set.prompt},
                   {"--ops", NULL, &set.ops},       {"--layers", NULL, &set.layers},
                   {"--width", NULL, &set.width},   {"--logits", NULL, &set.logits},
                   {"--top-p", NULL, &set.top_p} /* percent */};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        if (strcmp(name, options[i].name)) continue;
        if (options[i].text)
            *options[i].text = value;
        else
            *options[i].number = atoi(value);
        return;
    }
    if (strcmp(name, "--peak-tflops")) die("unknown option; see the top of gpt_bench.c");
    set.peak_tflops = atof(value);
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "";
    if (argc % 2) die("options are pairs: --name value");
    for (int i = 2; i + 1 < argc; i += 2) read_option(argv[i], argv[i + 1]);
    if (set.batch < 1 || set.seq < 1 || set.steps < 1 || set.warmup < 1 || set.tokens < 1 ||
        set.prompt < 1)
        die("sizes and steps are 1 or more");
    if (!strcmp(mode, "info")) return run_info();
    if (!strcmp(mode, "train")) return run_train();
    if (!strcmp(mode, "decode")) return run_decode();
    if (!strcmp(mode, "parity")) return run_parity();
    fprintf(stderr, "usage: gpt_bench info|train|decode|parity [--name value]...\n");
    return 2;
}
