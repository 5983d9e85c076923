/* Sums of gradients while backward computes others, and numbers that travel in a shorter form, among threads that
 * stand in for ranks. */
#include "testing.h"

#include "comm/background.h"
#include "comm/wire.h"
#include "models.h"
#include "thread_ranks.h"

#include <stdatomic.h>

enum { STEPS = 3, T = 9 };

static const char *const wires[] = {"fp32", "bf16", "int8"};

/* ---- a step of ranks ---- */

/* A job in which each rank makes steps on another row; in the second one, the last rank has no row. */
typedef struct task {
    const gpt_config *config;
    const int32_t *tokens; /* (STEPS, ranks, T) */
    bool overlaps;
    int wire;
    int64_t bucket; /* 0: as it is */
} task;

static gpt_model *rank_model(const task *t, int *status) {
    gpt_options options = place.options; /* of the last place, where a test visits none */
    gpt_model *model = NULL;
    options.device = GPT_DEVICE_CPU;
    options.training = 1, options.max_batch = 1, options.max_seq = T, options.seed = 7;
    options.dropout = 0.2f, options.wire = t->wire;
    *status = gpt_model_create(t->config, &options, &model);
    if (*status == GPT_OK) *status = gpt_model_init(model, 3);
    return model;
}

static int do_step(const task *t, gpt_model *m, gpt_comm *comm, int step, float *results) {
    int rank = gpt_comm_rank(comm), size = gpt_comm_size(comm);
    const int32_t *tokens = t->tokens + (step * size + rank) * T;
    if (t->overlaps) TRY(gpt_model_begin_all_reduce(m, comm));
    if (step != 1 || rank < size - 1) {
        TRY(gpt_model_place(m, 0, rank));
        TRY(gpt_model_backward(m, tokens, tokens, 1, T, 1.0f / (float)size, NULL));
    }
    TRY(gpt_model_all_reduce(m, comm));
    return update_adamw(m, &adamw, &results[0], &results[1]);
}

/* Each gradient is in one sum, and the sums are ready in their order. */
static int check_spans(gpt_model *m, gpt_comm *comm) {
    gpt_sum_span span;
    float *grads;
    int64_t n = 0, n_grads;
    double ready = 0;
    int i = 0;
    TRY(gpt_model_grads(m, &grads, &n_grads));
    for (; gpt_comm_sum_span(comm, i, &span) == GPT_OK; i++) {
        if (span.ready_s < ready || span.begin_s < span.ready_s || span.end_s < span.begin_s)
            return fail(GPT_ERR_ARGUMENT, "sum %d is at the wrong time", i);
        ready = span.ready_s, n += span.n;
    }
    if (n != n_grads) return fail(GPT_ERR_ARGUMENT, "%lld numbers in sums", (long long)n);
    return i > 1 || comm->bucket >= n_grads ? GPT_OK : fail(GPT_ERR_ARGUMENT, "%d sums", i);
}

/* Values, and gradients that were not sent. */
static int read_all(const task *t, gpt_model *m, float *out) {
    for (int i = 0; i < gpt_config_param_count(t->config); i++) {
        gpt_param info;
        TRY(gpt_config_param(t->config, i, &info));
        TRY(gpt_model_read(m, i, GPT_TENSOR_VALUE, out, info.size));
        int status = gpt_model_read(m, i, GPT_TENSOR_RESIDUAL, out + info.size, info.size);
        if ((status == GPT_OK) != (t->wire != GPT_WIRE_FP32)) return GPT_ERR_ARGUMENT;
        out += 2 * info.size;
    }
    return GPT_OK;
}

static void run_rank(job *j, gpt_comm *comm, int rank) {
    const task *t = j->given;
    int *status = &j->status[rank];
    float *results = j->x[rank] + j->n - 2 * STEPS;
    gpt_model *m = rank_model(t, status);
    memset(j->x[rank], 0, sizeof(float) * (size_t)j->n);
    if (t->bucket) comm->bucket = t->bucket;
    for (int step = 0; step < STEPS && *status == GPT_OK; step++)
        *status = do_step(t, m, comm, step, results + 2 * step);
    if (*status == GPT_OK && t->overlaps) *status = check_spans(m, comm);
    if (*status == GPT_OK) *status = read_all(t, m, j->x[rank]);
    gpt_model_free(m);
}

static job run_task(const task *t, int size) {
    job j = blank_job(run_rank, size, 2 * n_params(t->config) + 2 * STEPS);
    j.given = t;
    run_good_job(&j);
    return j;
}

/* The bits of values, residuals, losses and norms are those of sums after backward; values are those of rank 0. */
static void check_bits(const family *f, int size, int wire, int64_t bucket) {
    test_case("%s, %d ranks, %s, sums of %lld", f->name, size, wires[wire], (long long)bucket);
    const int32_t *tokens = random_ints(STEPS * size * T, f->config.vocab_size);
    task after = {&f->config, tokens, false, wire, bucket}, during = after;
    during.overlaps = true;
    job one = run_task(&after, size), other = run_task(&during, size);
    for (int rank = 0; rank < size; rank++)
        EXPECT(!memcmp(one.x[rank], other.x[rank], sizeof(float) * (size_t)one.n));
    EXPECT(!memcmp(one.x[0] + one.n - 2 * STEPS, one.x[size - 1] + one.n - 2 * STEPS,
                   sizeof(float) * 2 * STEPS));
}

static void test_bits(void) {
    EACH_PLACE {
        if (place.options.device != GPT_DEVICE_CPU) continue;
        for (int f = 0; f < 2; f++)
            for (int wire = 0; wire < TEST_COUNT(wires); wire++) {
                check_bits(&families[f], 2 + f, wire, 100);
                check_bits(&families[f], 3 - f, wire, 0);
            }
    }
}

/* ---- sums are made meanwhile ---- */

static _Atomic int n_sums, n_questions, last_question;

static int count_sum(gpt_comm *comm, float *x, int64_t n, coding coding) {
    (void)comm, (void)x, (void)n, (void)coding;
    n_sums++;
    return GPT_OK;
}

static void be_patient(gpt_comm *comm, bool patient) {
    (void)comm, (void)patient;
}

/* Asked between layers: before the last one, backward waits for the sum of another. */
static int wait_for_a_sum(void) {
    if (++n_questions == last_question)
        for (int i = 0; i < 20000 && !n_sums; i++)
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    return 0;
}

static void test_meanwhile(void) {
    static const comm_ops ops = {.all_reduce = count_sum, .be_patient = be_patient};
    const gpt_config *c = &families[0].config;
    int32_t tokens[T] = {0};
    test_case("a sum before the last layer");
    gpt_comm comm = {.ops = &ops, .size = 2, .bucket = 100};
    gpt_options options = {.training = 1, .max_batch = 1, .max_seq = T, .n_threads = 1};
    gpt_model *m = NULL;
    EXPECT_OK(gpt_model_create(c, &options, &m));
    last_question = 0;
    gpt_set_interrupt(wait_for_a_sum, 0);
    EXPECT_OK(gpt_model_backward(m, tokens, tokens, 1, T, 1, NULL));
    last_question = n_questions;
    n_questions = 0;
    EXPECT_OK(gpt_model_begin_all_reduce(m, &comm));
    EXPECT_OK(gpt_model_backward(m, tokens, tokens, 1, T, 1, NULL));
    gpt_set_interrupt(NULL, 0);
    EXPECT(n_questions == last_question && n_sums > 0);
    EXPECT(gpt_model_backward(m, tokens, tokens, 1, T, 1, NULL) == GPT_ERR_ARGUMENT);
    EXPECT(update_adamw(m, &adamw, NULL, NULL) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_comm_all_reduce(&comm, NULL, 0) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), "call gpt_model_all_reduce first"));
    EXPECT(gpt_model_begin_all_reduce(m, &comm) == GPT_ERR_ARGUMENT);
    EXPECT_OK(gpt_model_all_reduce(m, &comm));
    EXPECT_OK(update_adamw(m, &adamw, NULL, NULL));
    background_stop(&comm);
    gpt_model_free(m);
}

/* A model whose gradients fit into one sum has some too, so that the first can begin before backward has ended. */
static void test_a_small_model(void) {
    enum {
        SUMS = 3 + 1,
        OTHERS = 2 + 1
    }; /* of layers and norms; of the embedding, norms and the loss */
    static const comm_ops ops = {.all_reduce = count_sum, .be_patient = be_patient};
    gpt_config c = families[0].config;
    c.n_layer = 6, c.n_embd = 128, c.n_ff = 256;
    int32_t tokens[T] = {0};
    gpt_comm comm = {.ops = &ops, .size = 2, .bucket = COMM_BUCKET};
    gpt_options options = {.training = 1, .max_batch = 1, .max_seq = T, .n_threads = 1};
    gpt_model *m = NULL;
    test_case("%lld numbers", (long long)n_params(&c));
    EXPECT(n_params(&c) < COMM_BUCKET);
    EXPECT_OK(gpt_model_create(&c, &options, &m));
    n_sums = 0;
    EXPECT_OK(gpt_model_begin_all_reduce(m, &comm));
    EXPECT_OK(gpt_model_backward(m, tokens, tokens, 1, T, 1, NULL));
    EXPECT_OK(gpt_model_all_reduce(m, &comm));
    EXPECT(n_sums >= SUMS && n_sums <= SUMS + OTHERS);
    background_stop(&comm);
    gpt_model_free(m);
}

/* Rank 0 gives its step up after some sums: it and the others can go no further. */
static void do_half(job *j, gpt_comm *comm, int rank) {
    const task *t = j->given;
    gpt_model *m = rank_model(t, &j->status[rank]);
    if (j->status[rank] != GPT_OK) return;
    comm->bucket = t->bucket;
    int status = gpt_model_begin_all_reduce(m, comm);
    if (status == GPT_OK) status = gpt_model_backward(m, t->tokens, t->tokens, 1, T, 1, NULL);
    if (status == GPT_OK && rank == 0) status = gpt_model_zero_grads(m);
    j->status[rank] = status;
    j->again[rank] = gpt_model_all_reduce(m, comm);
    gpt_model_free(m);
}

static void test_half(void) {
    const gpt_config *c = &families[0].config;
    test_case("a step that is given up");
    task t = {c, random_ints(T, c->vocab_size), true, GPT_WIRE_FP32, 100};
    job j = new_job(do_half, 3, 1);
    j.given = &t, j.timeout_s = 0.3;
    j.missing = 1; /* so that no sum ends */
    run_job(&j);
    EXPECT(j.status[0] == GPT_OK && j.status[2] == GPT_OK);
    EXPECT(j.again[0] == GPT_ERR_COMM && j.again[2] == GPT_ERR_COMM);
    EXPECT(!strcmp(j.sentence[0], "the ranks are apart since a call that failed"));
    EXPECT(strstr(j.sentence[2], "no answer from rank") != NULL);
}

static int ends_there(void) {
    return ++n_questions >= last_question;
}

static int64_t numbers_added(const gpt_comm *comm) {
    gpt_sum_span span;
    int64_t n = 0;
    for (int i = 0; gpt_comm_sum_span(comm, i, &span) == GPT_OK; i++) n += span.n;
    return n;
}

/* A pass that ends between layers sends no more, and ranks and models are freed in any order. */
static void test_ends(void) {
    const gpt_config *c = &families[0].config;
    int32_t tokens[T] = {0};
    gpt_options options = {.training = 1, .max_batch = 1, .max_seq = T, .n_threads = 1};
    gpt_model *m = NULL;
    gpt_comm *one = NULL, *other = NULL;
    EXPECT_OK(gpt_model_create(c, &options, &m));
    EXPECT_OK(gpt_comm_create(GPT_COMM_NONE, NULL, 0, &one));
    EXPECT_OK(gpt_comm_create(GPT_COMM_NONE, NULL, 0, &other));
    test_case("an interrupted pass");
    one->bucket = 100;
    n_questions = 0;
    last_question = 2 * c->n_layer;
    EXPECT_OK(gpt_model_begin_all_reduce(m, one));
    gpt_set_interrupt(ends_there, 0);
    EXPECT(gpt_model_backward(m, tokens, tokens, 1, T, 1, NULL) == GPT_ERR_INTERRUPTED);
    gpt_set_interrupt(NULL, 0);
    EXPECT(numbers_added(one) < n_params(c));
    test_case("ranks of another job");
    EXPECT_OK(gpt_model_begin_all_reduce(m, one));
    EXPECT(gpt_model_begin_all_reduce(m, other) == GPT_ERR_ARGUMENT);
    test_case("ranks freed before the model");
    gpt_comm_free(one);
    EXPECT_OK(gpt_model_zero_grads(m));
    EXPECT_OK(gpt_model_all_reduce(m, other));
    EXPECT_OK(gpt_model_begin_all_reduce(m, other));
    gpt_model_free(m);
    gpt_comm_free(other);
}

static _Atomic bool is_in_sum, is_given_up, ended_in_sum, has_ended;

static int wait_in_sum(gpt_comm *comm, float *x, int64_t n, coding coding) {
    (void)comm, (void)x, (void)n, (void)coding;
    is_in_sum = true;
    for (int i = 0; i < 20000 && !is_given_up; i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    is_in_sum = false;
    return fail(GPT_ERR_COMM, "given up");
}

static void give_sum_up(gpt_comm *comm) {
    (void)comm;
    is_given_up = true;
}

static void end_job(gpt_comm *comm, int code) {
    (void)comm, (void)code;
    ended_in_sum = is_in_sum;
    has_ended = true;
}

/* The thread of the sums has left its call before this one makes another, as MPI wants it. */
static void test_abort(void) {
    static const comm_ops ops = {.all_reduce = wait_in_sum,
                                 .be_patient = be_patient,
                                 .give_up = give_sum_up,
                                 .end_job = end_job};
    const gpt_config *c = &families[0].config;
    int32_t tokens[T] = {0};
    gpt_comm comm = {.ops = &ops, .size = 2, .bucket = 100};
    gpt_options options = {.training = 1, .max_batch = 1, .max_seq = T, .n_threads = 1};
    gpt_model *m = NULL;
    test_case("a job that ends while a sum is under way");
    EXPECT_OK(gpt_model_create(c, &options, &m));
    EXPECT_OK(gpt_model_begin_all_reduce(m, &comm));
    EXPECT_OK(gpt_model_backward(m, tokens, tokens, 1, T, 1, NULL));
    for (int i = 0; i < 20000 && !is_in_sum; i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    gpt_comm_abort(&comm, 1);
    EXPECT(has_ended && is_given_up && !ended_in_sum);
    gpt_model_free(m);
    background_stop(&comm);
}

/* ---- shorter forms ---- */

enum { CALLS = 4 };

/* x: numbers of each call, then the result of each, then the residual. */
static void do_coded(job *j, gpt_comm *comm, int rank) {
    int wire = *(const int *)j->given, *status = &j->status[rank];
    int64_t n = j->n / (2 * CALLS + 1);
    float *residual = j->x[rank] + 2 * CALLS * n;
    memset(residual, 0, sizeof(float) * (size_t)n);
    for (int call = 0; call < CALLS && *status == GPT_OK; call++) {
        float *out = j->x[rank] + (CALLS + call) * n;
        memcpy(out, j->x[rank] + call * n, sizeof(float) * (size_t)n);
        *status = gpt_comm_all_reduce_coded(comm, wire, out, residual, n);
    }
}

/* All ranks have the same sums, near the true ones, and nothing is lost: what was not sent is in the residuals. */
static void check_coded(int size, int wire, int64_t n) {
    test_case("%d ranks, %s, n=%lld", size, wires[wire], (long long)n);
    job j = new_job(do_coded, size, (2 * CALLS + 1) * n);
    j.given = &wire, j.piece = WIRE_BLOCK;
    run_job(&j);
    int64_t wrong = 0;
    double worst = 0, off = 0;
    for (int64_t i = 0; i < n; i++) {
        double lost = 0;
        for (int call = 0; call < CALLS; call++) {
            double sum = 0, got = j.x[0][(CALLS + call) * n + i];
            for (int rank = 0; rank < size; rank++) {
                sum += j.x[rank][call * n + i];
                wrong += j.x[rank][(CALLS + call) * n + i] != j.x[0][(CALLS + call) * n + i];
            }
            lost += sum - got;
            off = fmax(off, fabs(sum - got));
        }
        for (int rank = 0; rank < size; rank++) lost -= j.x[rank][2 * CALLS * n + i];
        worst = fmax(worst, fabs(lost));
    }
    for (int rank = 0; rank < size; rank++) EXPECT(j.status[rank] == GPT_OK);
    EXPECT(wrong == 0);
    EXPECT(worst < 1e-5 * CALLS * size);
    EXPECT(n < 100 || (off > 1e-4 && off < 0.1 * size)); /* of normal numbers */
}

static void test_coded(void) {
    static const int64_t sizes[] = {0, 1, 17, 4099, 20003};
    for (int wire = GPT_WIRE_BF16; wire <= GPT_WIRE_INT8; wire++)
        for (int size = 2; size <= 3; size++)
            for (int k = 0; k < TEST_COUNT(sizes); k++) check_coded(size, wire, sizes[k]);
}

/* x has four arrays of n: the rank's numbers, the sums of its slice, the residual before the call, and the
 * residual after it. */
static void do_scattered(job *j, gpt_comm *comm, int rank) {
    int64_t n = j->n / 4, bounds[MOST_RANKS + 1];
    float *x = j->x[rank];
    memcpy(x + n, x, sizeof(float) * (size_t)n);
    memcpy(x + 3 * n, x + 2 * n, sizeof(float) * (size_t)n);
    for (int r = 0; r <= j->size; r++) bounds[r] = gpt_comm_slice(comm, n, r);
    coding coding = {*(const int *)j->given, x + 3 * n};
    j->status[rank] = comm->ops->reduce_scatter(comm, x + n, bounds, coding);
    for (int64_t i = 0; i < n; i++) {
        bool own = i >= bounds[rank] && i < bounds[rank + 1];
        if (!own) x[n + i] = 0;
        j->again[rank] += own && x[3 * n + i] != 0;
    }
}

/* An owner adds its residual of an earlier call, too. */
static void test_scattered(void) {
    enum { SIZE = 3, N = 5003 };
    for (int wire = GPT_WIRE_BF16; wire <= GPT_WIRE_INT8; wire++) {
        double worst = 0;
        test_case("%s", wires[wire]);
        job j = new_job(do_scattered, SIZE, 4 * N);
        j.given = &wire, j.piece = WIRE_BLOCK;
        run_job(&j);
        for (int i = 0; i < N; i++) {
            double lost = 0;
            for (int rank = 0; rank < SIZE; rank++) {
                const float *x = j.x[rank] + i;
                lost += (double)x[0] + x[2 * N] - x[N] - x[3 * N];
            }
            worst = fmax(worst, fabs(lost));
        }
        for (int rank = 0; rank < SIZE; rank++)
            EXPECT(j.status[rank] == GPT_OK && j.again[rank] == 0);
        EXPECT(worst < 1e-5);
    }
}

/* Numbers that are not finite arrive as such, and leave their residual as it was. */
static void test_not_finite(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    enum { SOME = WIRE_BLOCK + 3 };
    for (int wire = GPT_WIRE_BF16; wire <= GPT_WIRE_INT8; wire++)
        for (int k = 0; k < TEST_COUNT(bad); k++) {
            float x[SOME], residual[SOME], out[SOME];
            char coded[4 * SOME];
            test_case("%s, %g", wires[wire], (double)bad[k]);
            for (int i = 0; i < SOME; i++) x[i] = (float)random_normal(), residual[i] = 0.25f;
            x[5] = bad[k];
            EXPECT(wire_bytes(wire, SOME) <= (int64_t)sizeof coded);
            wire_encode(wire, coded, x, residual, SOME);
            wire_decode(wire, out, coded, SOME, 0, SOME);
            EXPECT(!isfinite(out[5]) && residual[5] == 0.25f);
            for (int i = 0; i < SOME; i++) EXPECT(isfinite(residual[i]));
            for (int i = WIRE_BLOCK; i < SOME; i++) EXPECT(fabsf(out[i] - x[i] - 0.25f) < 0.05f);
        }
    float zeros[3] = {0, 1e-40f, -1e-35f}, residual[3] = {0}, out[3];
    char coded[16];
    test_case("8 bits of nothing");
    wire_encode(GPT_WIRE_INT8, coded, zeros, residual, 3);
    wire_decode(GPT_WIRE_INT8, out, coded, 3, 0, 3);
    for (int i = 0; i < 3; i++) EXPECT(out[i] == 0 && residual[i] == zeros[i]);
}

TEST_API_MAIN({"bits of overlapped sums", test_bits}, {"sums meanwhile", test_meanwhile},
              {"a small model", test_a_small_model}, {"a step given up", test_half},
              {"ends", test_ends}, {"a job that ends", test_abort}, {"shorter forms", test_coded},
              {"shorter forms of parts", test_scattered},
              {"numbers that are not finite", test_not_finite})
