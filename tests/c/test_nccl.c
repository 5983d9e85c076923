/* Sums by NCCL, of which a stand-in is opened, among threads that stand in for ranks. */
#include "testing.h"

#include "comm/nccl.h"
#include "models.h"
#include "thread_ranks.h"

#include <dlfcn.h>
#include <stdatomic.h>

enum { T = 9, STEPS = 2 };

static int is_never_busy(void *given) {
    (void)given;
    return 0;
}

static int join(gpt_comm *comm) {
    TRY(gpt_comm_open_nccl(comm, NCCL_STAND_IN));
    return gpt_comm_join_gpus(comm);
}

/* ---- numbers ---- */

/* A sum of all by NCCL, then a second one by messages, next to it. */
static void add_both(job *j, gpt_comm *comm, int rank) {
    device_queue queue = {NULL, is_never_busy, NULL};
    int64_t n = j->n / 2;
    float *x = j->x[rank];
    memcpy(x + n, x, sizeof *x * (size_t)n);
    int status = join(comm);
    if (status == GPT_OK && !nccl_is_there(comm)) status = GPT_ERR_ARGUMENT;
    if (status == GPT_OK) status = nccl_all_reduce(comm, x, n, queue);
    if (status == GPT_OK) status = gpt_comm_all_reduce(comm, x + n, n);
    j->status[rank] = status;
}

static void test_sums(void) {
    static const int64_t sizes[] = {1, 999, 1000, 4097};
    for (int size = 2; size <= 3; size++)
        for (int k = 0; k < TEST_COUNT(sizes); k++) {
            int64_t n = sizes[k];
            test_case("%d ranks, n=%lld", size, (long long)n);
            job j = new_job(add_both, size, 2 * n);
            run_job(&j);
            for (int rank = 0; rank < size; rank++) {
                EXPECT(j.status[rank] == GPT_OK);
                EXPECT(!memcmp(j.x[rank], j.x[0] + n, sizeof(float) * (size_t)n));
            }
        }
}

/* ---- faults ---- */

static void add_once(job *j, gpt_comm *comm, int rank) {
    device_queue queue = {NULL, is_never_busy, NULL};
    j->status[rank] = join(comm);
    if (j->status[rank] != GPT_OK || (j->given && rank == 1)) return;
    j->again[rank] = nccl_all_reduce(comm, j->x[rank], j->n, queue);
    EXPECT(!nccl_is_there(comm));
}

static int n_aborts(void) {
    void *library = dlopen(NCCL_STAND_IN, RTLD_NOW);
    _Atomic int *aborts = library ? dlsym(library, "stand_in_aborts") : NULL;
    EXPECT(aborts != NULL);
    return aborts ? *aborts : 0;
}

static void test_faults(void) {
    int before = n_aborts();
    test_case("a rank that does not come");
    job j = new_job(add_once, 2, 5);
    j.given = &j, j.timeout_s = 0.2;
    run_job(&j);
    EXPECT(j.status[0] == GPT_OK && j.again[0] == GPT_ERR_COMM);
    EXPECT(!strcmp(j.sentence[0], "no answer from the GPUs of other ranks for 0.2 s"));
    EXPECT(n_aborts() == before + 1);
    test_case("a sum that fails");
    job unlucky = new_job(add_once, 2, 13);
    run_job(&unlucky);
    for (int rank = 0; rank < 2; rank++) {
        EXPECT(unlucky.again[rank] == GPT_ERR_COMM);
        EXPECT(!strcmp(unlucky.sentence[rank], "NCCL's sum failed: unhandled cuda error"));
    }
    EXPECT(n_aborts() == before + 3);
}

static void test_libraries(void) {
    gpt_comm *comm = NULL;
    EXPECT_OK(gpt_comm_create(GPT_COMM_NONE, NULL, 0, &comm));
    test_case("not open");
    EXPECT(gpt_comm_join_gpus(comm) == GPT_ERR_ARGUMENT);
    test_case("a file that is not there");
    EXPECT(gpt_comm_open_nccl(comm, "/no/libnccl.so.2") == GPT_ERR_DEVICE);
    EXPECT(strstr(gpt_last_error(), "/no/libnccl.so.2 does not load") != NULL);
    test_case("another library");
    EXPECT(gpt_comm_open_nccl(comm, "libm.so.6") == GPT_ERR_DEVICE);
    EXPECT(!strcmp(gpt_last_error(), "the NCCL library has no ncclGetUniqueId"));
    test_case("one rank");
    EXPECT_OK(join(comm));
    EXPECT_OK(join(comm));
    gpt_comm_free(comm);
}

/* ---- gradients of models ---- */

/* The emulation computes one model at a time. */
static pthread_mutex_t device = PTHREAD_MUTEX_INITIALIZER;

typedef struct task {
    const int32_t *tokens; /* (STEPS, ranks, T) */
    bool by_nccl;
    gpt_options options;
} task;

static int do_step(const task *t, gpt_model *m, gpt_comm *comm, int step, float *results) {
    int rank = gpt_comm_rank(comm), size = gpt_comm_size(comm);
    const int32_t *tokens = t->tokens + (step * size + rank) * T;
    pthread_mutex_lock(&device);
    int status = gpt_model_backward(m, tokens, tokens, 1, T, 1.0f / (float)size, NULL);
    pthread_mutex_unlock(&device);
    TRY(status);
    TRY(gpt_model_all_reduce(m, comm));
    pthread_mutex_lock(&device);
    status = update_adamw(m, &adamw, &results[0], &results[1]);
    pthread_mutex_unlock(&device);
    return status;
}

/* The embedding, losses and norms. */
static void run_rank(job *j, gpt_comm *comm, int rank) {
    const task *t = j->given;
    float *results = j->x[rank] + j->n - 2 * STEPS;
    gpt_model *m = NULL;
    pthread_mutex_lock(&device);
    int status = gpt_model_create(&families[0].config, &t->options, &m);
    if (status == GPT_OK) status = gpt_model_init(m, 3);
    pthread_mutex_unlock(&device);
    if (status == GPT_OK && t->by_nccl) status = join(comm);
    for (int step = 0; step < STEPS && status == GPT_OK; step++)
        status = do_step(t, m, comm, step, results + 2 * step);
    pthread_mutex_lock(&device);
    if (status == GPT_OK)
        status = gpt_model_read(m, 0, GPT_TENSOR_VALUE, j->x[rank], j->n - 2 * STEPS);
    gpt_model_free(m);
    pthread_mutex_unlock(&device);
    j->status[rank] = status;
}

static job run_task(const task *t, int size) {
    gpt_param embedding;
    EXPECT_OK(gpt_config_param(&families[0].config, 0, &embedding));
    job j = new_job(run_rank, size, embedding.size + 2 * STEPS);
    j.given = t;
    run_good_job(&j);
    return j;
}

/* The bits are those of sums by messages between hosts. On a real GPU its memory is not the host's, which the
 * stand-in reads. */
static void test_models(void) {
    gpt_device_info info = {0};
    bool emulated = gpt_cuda_info(&info) == GPT_OK && !strcmp(info.name, "emulated");
    EACH_PLACE {
        bool is_gpu = place.options.device == GPT_DEVICE_CUDA;
        if (is_gpu && !emulated) continue;
        task t = {random_ints(STEPS * 2 * T, families[0].config.vocab_size), false, place.options};
        t.options.training = 1, t.options.max_batch = 1, t.options.max_seq = T;
        job hosts = run_task(&t, 2);
        t.by_nccl = true;
        job gpus = run_task(&t, 2);
        for (int rank = 0; rank < 2; rank++)
            EXPECT(!memcmp(hosts.x[0], gpus.x[rank], sizeof(float) * (size_t)hosts.n));
        int64_t n = hosts.n - 2 * STEPS;
        EXPECT(memcmp(&hosts.x[0][n], &hosts.x[0][n + 2], 2 * sizeof(float)) != 0);
    }
}

TEST_API_MAIN({"sums", test_sums}, {"faults", test_faults}, {"libraries", test_libraries},
              {"gradients of models", test_models})
