/* Eight threads on models that they share, a lock for each as gpt.h asks, and on models of their own: every
 * result has the bits of the same call alone. The argument is the number of calls. */
#include "gpt.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 8, CALLS = 400, T = 9, V = 61, KINDS = 6, DTYPES = 4 };

typedef struct shared_model {
    pthread_mutex_t lock;
    gpt_model *model;
    gpt_session *session;
    int training;
} shared_model;

static const gpt_config config = {.vocab_size = V,
                                  .block_size = 24,
                                  .n_layer = 2,
                                  .n_head = 4,
                                  .n_kv_head = 2,
                                  .n_embd = 32,
                                  .n_ff = 40,
                                  .norm = GPT_NORM_RMSNORM,
                                  .norm_weight = 1,
                                  .pos = GPT_POS_ROPE,
                                  .activation = GPT_ACT_SWIGLU,
                                  .tied = 1,
                                  .norm_eps = 1e-5f,
                                  .rope_theta = 10000};

static shared_model models[DTYPES];
static int n_calls = CALLS;
static uint64_t *wanted;
static atomic_int next_call, n_wrong, n_failed;

static void check(int status) {
    if (status == GPT_OK) return;
    if (atomic_fetch_add(&n_failed, 1) == 0) fprintf(stderr, "%s\n", gpt_last_error());
}

/* FNV-1a. */
static uint64_t hash(uint64_t h, const void *data, size_t n) {
    const unsigned char *at = data;
    for (size_t i = 0; i < n; i++) h = (h ^ at[i]) * 0x100000001b3ull;
    return h;
}

static void make_model(int dtype, shared_model *out) {
    int training = dtype == GPT_DTYPE_FP32 || dtype == GPT_DTYPE_BF16;
    gpt_options options = {
        .dtype = dtype, .n_threads = 2, .training = training, .max_batch = 2, .max_seq = T};
    out->training = training;
    check(gpt_model_create(&config, &options, &out->model));
    check(gpt_model_init(out->model, 7));
    check(gpt_session_create(out->model, 2, 24, GPT_KV_ACTIVATIONS, &out->session));
}

static void free_model(shared_model *m) {
    gpt_session_free(m->session);
    gpt_model_free(m->model);
}

/* ---- the calls: a function of their number ---- */

static uint64_t batch(shared_model *m, const int32_t *tokens, uint64_t h) {
    float logits[2 * T * V], loss;
    check(gpt_model_logits(m->model, tokens, 2, T, logits));
    check(gpt_model_loss(m->model, tokens, tokens, 2, T, &loss, NULL));
    return hash(hash(h, logits, sizeof logits), &loss, sizeof loss);
}

static uint64_t decode(shared_model *m, const int32_t *tokens, uint64_t h) {
    float logits[V];
    int32_t seqs[T] = {0};
    check(gpt_session_rewind(m->session, 0, 0));
    for (int i = 0, n = 1; i < T; i += n, n = n < 3 ? n + 1 : T - i) {
        check(gpt_session_decode(m->session, tokens + i, seqs, NULL, n, logits));
        h = hash(h, logits, sizeof logits);
    }
    return h;
}

static uint64_t draw(shared_model *m, const int32_t *tokens, uint64_t h) {
    gpt_draw d = {.sampling = {.repetition_penalty = 1.1f,
                               .temperature = 1,
                               .top_k = 20,
                               .typical_p = 1,
                               .top_p = 0.9f,
                               .seed = 5},
                  .history = tokens,
                  .n_history = T,
                  .position = (uint64_t)tokens[0]};
    int32_t seqs[T];
    for (int i = 0; i < T; i++) seqs[i] = 1;
    check(gpt_session_rewind(m->session, 1, 0));
    check(gpt_session_sample(m->session, tokens, seqs, NULL, T, &d));
    return hash(h, &d.token, sizeof d.token);
}

/* With a learning rate of 0, so that the next call finds the same parameters. */
static uint64_t step(shared_model *m, const int32_t *tokens, uint64_t h) {
    gpt_optimizer still = {.kind = GPT_OPTIMIZER_ADAMW,
                           .adamw = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f}};
    float loss, norm;
    if (!m->training) return batch(m, tokens, h);
    check(gpt_model_backward(m->model, tokens, tokens, 2, T, 1, &loss));
    check(gpt_model_update(m->model, &still, 1, NULL, &norm));
    return hash(hash(h, &loss, sizeof loss), &norm, sizeof norm);
}

static uint64_t errors(shared_model *m, const int32_t *tokens, uint64_t h) {
    gpt_config bad = config;
    bad.n_head = tokens[0] + 1000;
    if (gpt_config_check(&bad) == GPT_OK || gpt_model_write(m->model, 99, 0, NULL, 1) == GPT_OK)
        atomic_fetch_add(&n_failed, 1);
    return hash(h, gpt_last_error(), strlen(gpt_last_error()));
}

static uint64_t own_model(int dtype, const int32_t *tokens, uint64_t h) {
    shared_model own;
    make_model(dtype, &own);
    h = decode(&own, tokens, batch(&own, tokens, h));
    free_model(&own);
    return h;
}

static uint64_t run(int call) {
    int32_t tokens[2 * T];
    uint64_t h = 0xcbf29ce484222325ull;
    for (int i = 0; i < 2 * T; i++) tokens[i] = (call * 31 + i * i * 7) % V;
    int dtype = call / KINDS % DTYPES, kind = call % KINDS;
    shared_model *m = &models[dtype];
    if (kind == KINDS - 1) return own_model(dtype, tokens, h);
    static uint64_t (*const kinds[])(shared_model *, const int32_t *,
                                     uint64_t) = {batch, decode, draw, step, errors};
    pthread_mutex_lock(&m->lock);
    h = kinds[kind](m, tokens, h);
    pthread_mutex_unlock(&m->lock);
    return h;
}

static void *work(void *unused) {
    for (int call; (call = atomic_fetch_add(&next_call, 1)) < n_calls;)
        if (run(call) != wanted[call]) atomic_fetch_add(&n_wrong, 1);
    return unused;
}

int main(int argc, char **argv) {
    pthread_t threads[THREADS];
    if (argc > 1) n_calls = atoi(argv[1]);
    wanted = malloc(sizeof *wanted * (size_t)n_calls);
    for (int i = 0; i < DTYPES; i++) {
        pthread_mutex_init(&models[i].lock, NULL);
        make_model(i, &models[i]);
    }
    for (int i = 0; i < n_calls; i++) wanted[i] = run(i);
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, work, NULL);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < DTYPES; i++) free_model(&models[i]);
    free(wanted);
    printf("%d calls by %d threads: %d differ, %d failed\n", n_calls, THREADS,
           atomic_load(&n_wrong), atomic_load(&n_failed));
    return n_calls < 1 || n_wrong || n_failed;
}
