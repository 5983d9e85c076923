/* The ranks of a job: the four calls among threads that stand in for processes, and a model's share of a batch. */
#include "testing.h"

#include "models.h"
#include "thread_ranks.h"

#include <unistd.h>

/* ---- the four calls ---- */

/* The sum of element i in the order of ranks. */
static float sum_in_order(float *const *x, int size, int64_t i) {
    float sum = x[0][i];
    for (int rank = 1; rank < size; rank++) sum += x[rank][i];
    return sum;
}

static const int64_t sizes[] = {0, 1, 15, 17, 100, 4099, 3 * 65536 + 77, 400003};

static void copy_inputs(const job *j, float **out) {
    for (int rank = 0; rank < j->size; rank++) {
        out[rank] = host_floats(j->n + 1);
        memcpy(out[rank], j->x[rank], sizeof(float) * (size_t)j->n);
    }
}

static void do_all_reduce(job *j, gpt_comm *comm, int rank) {
    j->status[rank] = gpt_comm_all_reduce(comm, j->x[rank], j->n);
}

/* Messages of these sizes too, many of which follow others. */
static int64_t piece_of(int k) {
    return k % 2 ? 256 : 0;
}

static void test_all_reduce(void) {
    for (int size = 1; size <= MOST_RANKS; size++)
        for (int k = 0; k < TEST_COUNT(sizes); k++) {
            test_case("%d ranks, n=%lld", size, (long long)sizes[k]);
            job j = new_job(do_all_reduce, size, sizes[k]);
            j.piece = piece_of(k), j.connected = k % 4 > 1;
            float *before[MOST_RANKS];
            copy_inputs(&j, before);
            run_job(&j);
            for (int rank = 0; rank < size; rank++) {
                int64_t wrong = 0;
                EXPECT(j.status[rank] == GPT_OK);
                for (int64_t i = 0; i < j.n; i++)
                    wrong += j.x[rank][i] != sum_in_order(before, size, i);
                EXPECT(wrong == 0);
            }
        }
}

static void do_reduce_scatter(job *j, gpt_comm *comm, int rank) {
    j->status[rank] = gpt_comm_reduce_scatter(comm, j->x[rank], j->n);
    j->again[rank] = (int)gpt_comm_slice(comm, j->n, rank);
}

static void test_reduce_scatter(void) {
    for (int size = 2; size <= MOST_RANKS; size++)
        for (int k = 0; k < TEST_COUNT(sizes); k++) {
            test_case("%d ranks, n=%lld", size, (long long)sizes[k]);
            job j = new_job(do_reduce_scatter, size, sizes[k]);
            j.piece = piece_of(k), j.connected = k % 4 > 1;
            float *before[MOST_RANKS];
            copy_inputs(&j, before);
            run_job(&j);
            for (int rank = 0; rank < size; rank++) {
                int64_t first = j.again[rank], end = rank + 1 < size ? j.again[rank + 1] : j.n;
                int64_t wrong = 0;
                EXPECT(j.status[rank] == GPT_OK && first <= end && (rank || first == 0));
                for (int64_t i = 0; i < j.n; i++) {
                    bool own = i >= first && i < end;
                    wrong +=
                        j.x[rank][i] != (own ? sum_in_order(before, size, i) : before[rank][i]);
                }
                EXPECT(wrong == 0);
            }
        }
}

/* Parts of different sizes, one of them empty. */
static void do_gather(job *j, gpt_comm *comm, int rank) {
    int64_t offsets[MOST_RANKS + 1] = {0};
    for (int r = 0; r < j->size; r++)
        offsets[r + 1] = offsets[r] + (r == 1 ? 0 : j->n / j->size * (int64_t)sizeof(float));
    j->status[rank] = gpt_comm_all_gather(comm, j->x[rank], offsets);
    j->again[rank] =
        gpt_comm_broadcast(comm, j->x[rank] + j->n - 5, 5 * sizeof(float), j->size - 1);
}

static void test_gather_and_broadcast(void) {
    for (int size = 2; size <= MOST_RANKS; size++) {
        int64_t n = 300003; /* more than a message */
        test_case("%d ranks", size);
        job j = new_job(do_gather, size, n);
        j.piece = 4096, j.connected = size % 2;
        float *before[MOST_RANKS];
        copy_inputs(&j, before);
        run_job(&j);
        for (int rank = 0; rank < size; rank++) {
            int64_t at = 0, wrong = 0;
            EXPECT(j.status[rank] == GPT_OK && j.again[rank] == GPT_OK);
            for (int r = 0; r < size; r++)
                for (int64_t i = r == 1 ? n / size : 0; i < n / size; i++, at++)
                    wrong += j.x[rank][at] != before[r][at];
            for (; at < n - 5; at++) wrong += j.x[rank][at] != before[rank][at];
            for (; at < n; at++) wrong += j.x[rank][at] != before[size - 1][at];
            EXPECT(wrong == 0);
        }
    }
}

/* The root's parts go to the ranks, which send them back to another place of it. */
static void do_parts(job *j, gpt_comm *comm, int rank) {
    int root = j->size - 1;
    int64_t offsets[MOST_RANKS + 1] = {0};
    for (int r = 0; r < j->size; r++) offsets[r + 1] = offsets[r] + (r == 1 ? 0 : 40001 + 4096 * r);
    char *x = (char *)j->x[rank];
    j->status[rank] = gpt_comm_scatter(comm, x, offsets, root);
    j->again[rank] = gpt_comm_gather(comm, rank == root ? x + j->n * 2 : x, offsets, root);
}

static void test_parts(void) {
    for (int size = 2; size <= MOST_RANKS; size++) {
        int64_t n = 150000; /* numbers: two halves of the root's parts */
        test_case("%d ranks", size);
        job j = new_job(do_parts, size, n);
        j.piece = 4096, j.connected = size % 2 == 0;
        float *before[MOST_RANKS];
        copy_inputs(&j, before);
        run_job(&j);
        int root = size - 1;
        int64_t at = 0;
        for (int rank = 0; rank < size; rank++) {
            int64_t bytes = rank == 1 ? 0 : 40001 + 4096 * rank;
            const char *given = (const char *)before[root] + at;
            const char *own = (const char *)j.x[rank], *old = (const char *)before[rank];
            int64_t n_own = rank == root ? 0 : bytes;
            EXPECT(j.status[rank] == GPT_OK && j.again[rank] == GPT_OK);
            EXPECT(rank == root || !memcmp(own, given, (size_t)bytes));
            EXPECT(!memcmp(own + n_own, old + n_own, (size_t)(n * 2 - n_own)));
            const char *back = (const char *)j.x[root] + n * 2 + at;
            EXPECT(rank == root || !memcmp(back, given, (size_t)bytes));
            at += bytes;
        }
        EXPECT(!memcmp(j.x[root], before[root], (size_t)at));
    }
    float x = 3;
    const int64_t offsets[] = {0, 4};
    gpt_comm *comm = NULL;
    EXPECT(gpt_comm_create(GPT_COMM_NONE, NULL, 0, &comm) == GPT_OK);
    EXPECT(gpt_comm_scatter(comm, &x, offsets, 0) == GPT_OK);
    EXPECT(gpt_comm_gather(comm, &x, offsets, 0) == GPT_OK && x == 3);
    EXPECT(gpt_comm_gather(comm, &x, offsets, 1) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_comm_scatter(comm, &x, (const int64_t[]){4, 0}, 0) == GPT_ERR_ARGUMENT);
    gpt_comm_free(comm);
}

static void do_two(job *j, gpt_comm *comm, int rank) {
    j->status[rank] = gpt_comm_all_reduce(comm, j->x[rank], j->n);
    j->again[rank] = gpt_comm_all_reduce(comm, j->x[rank], j->n);
}

static void do_look(job *j, gpt_comm *comm, int rank) {
    j->status[rank] = comm->piece > 0 && comm->piece % 256 == 0 ? GPT_OK : GPT_ERR_ARGUMENT;
    j->again[rank] = (int)(comm->piece * 4 > comm->copied ? comm->piece * 4 : comm->copied);
}

/* Open MPI asks the receiver before a message of more than 64 KiB over TCP, with its header, and the answer waits
 * behind other data. */
static void test_messages_are_short(void) {
    enum { AT_ONCE = 65536 - 64 };
    for (int size = 2; size <= MOST_RANKS; size++)
        for (int connected = 0; connected < 2; connected++) {
            test_case("%d ranks, %d", size, connected);
            job j = new_job(do_look, size, 1);
            j.connected = connected;
            run_job(&j);
            for (int rank = 0; rank < size; rank++)
                EXPECT(j.status[rank] == GPT_OK && j.again[rank] <= AT_ONCE);
        }
}

/* The other rank waits for as long as it may, then names the one that is missing, and its host. */
static void test_a_missing_rank(void) {
    enum { SIZE = 2, MISSING = 1 };
    char host[COMM_HOST_BYTES] = "", want[200];
    test_case("rank %d of %d", MISSING, SIZE);
    job j = new_job(do_all_reduce, SIZE, 100);
    j.timeout_s = 0.3, j.missing = MISSING;
    run_job(&j);
    gethostname(host, sizeof host - 1);
    snprintf(want, sizeof want, "no answer from rank 1 (%s) for 0.3 s", host);
    EXPECT(j.status[0] == GPT_ERR_COMM && j.lost[0] == 1 << MISSING);
    EXPECT(!strcmp(j.sentence[0], want) && !strcmp(j.host[0], host));
    j = new_job(do_two, SIZE, 100);
    j.timeout_s = 0.3, j.missing = MISSING;
    run_job(&j);
    EXPECT(j.status[0] == GPT_ERR_COMM && j.again[0] == GPT_ERR_COMM);
}

/* What a failed call received with is freed when nothing arrives there any more: a receive is cancelled, or
 * else its memory stays. */
static void test_messages_under_way(void) {
    for (int i = 0; i < 2; i++) {
        cancels = i == 0;
        test_case("a receive %s", cancels ? "is cancelled" : "stays");
        job j = new_job(do_all_reduce, 2, 100);
        j.timeout_s = 0.05, j.missing = 1;
        run_job(&j);
        EXPECT(j.status[0] == GPT_ERR_COMM && j.left[0] == !cancels);
        if (late.to) memset(late.to, 1, (size_t)late.n_bytes);
    }
    cancels = true;
}

static void do_other_call(job *j, gpt_comm *comm, int rank) {
    j->status[rank] = gpt_comm_broadcast(comm, j->x[rank], 4 * (j->n - rank), 1);
}

static void do_abort(job *j, gpt_comm *comm, int rank) {
    if (rank)
        gpt_comm_abort(comm, 1);
    else
        j->status[rank] = gpt_comm_all_reduce(comm, j->x[rank], j->n);
}

/* Rank 0 sends more than the connection holds, and expects nothing. */
static void do_abort_while_sent_to(job *j, gpt_comm *comm, int rank) {
    const int64_t offsets[] = {0, j->n * (int64_t)sizeof(float), j->n * (int64_t)sizeof(float)};
    if (rank) {
        nanosleep(&(struct timespec){.tv_nsec = 100 * 1000 * 1000}, NULL);
        gpt_comm_abort(comm, 1);
    } else
        j->status[rank] = gpt_comm_gather(comm, j->x[rank], offsets, 1);
}

/* Ranks that are connected by sockets: one of them leaves, ends the job, or is at another call. */
static void test_sockets(void) {
    enum { LEAVES, ENDS, ENDS_LATER, DIFFERS, N };
    static const char *const want[N] = {"the connection to rank 1 has ended",
                                        "rank 1 has ended the job", "rank 1 has ended the job",
                                        "rank 1 is at another call: it has sent no 400 bytes"};
    static job_function *const calls[N] = {do_all_reduce, do_abort, do_abort_while_sent_to,
                                           do_other_call};
    for (int i = 0; i < N; i++) {
        test_case("%s", want[i]);
        job j = new_job(calls[i], 2, i == ENDS_LATER ? 4000000 : 100);
        j.connected = true, j.missing = i == LEAVES ? 1 : -1;
        run_job(&j);
        EXPECT(j.status[0] == GPT_ERR_COMM && j.lost[0] == 2 && !strcmp(j.sentence[0], want[i]));
    }
    gpt_comm *comm = NULL;
    const int none[] = {-1};
    EXPECT(gpt_comm_connect(NULL, 0, 1, 1, &comm) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_comm_connect(none, 1, 1, 1, &comm) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_comm_connect(none, 0, 1, -1, &comm) == GPT_ERR_ARGUMENT);
    EXPECT_OK(gpt_comm_connect(none, 0, 1, 1, &comm));
    EXPECT_OK(gpt_comm_all_reduce(comm, (float[]){1}, 1));
    gpt_comm_free(comm);
}

static void test_arguments(void) {
    gpt_comm *comm = NULL;
    float x[3] = {1, 2, 3};
    int64_t good[] = {0, 12}, bad[] = {4, 0};
    test_case("one rank");
    EXPECT(gpt_comm_create(7, NULL, 1, &comm) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_comm_create(GPT_COMM_NONE, NULL, -1, &comm) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_comm_create(GPT_COMM_MPI, "/nowhere/libmpi.so", 1, &comm) == GPT_ERR_DEVICE);
    EXPECT(strstr(gpt_last_error(), "/nowhere/libmpi.so") != NULL);
    EXPECT_OK(gpt_comm_create(GPT_COMM_NONE, NULL, 0, &comm));
    EXPECT(gpt_comm_rank(comm) == 0 && gpt_comm_size(comm) == 1);
    EXPECT(gpt_comm_slice(comm, 3, 0) == 0 && gpt_comm_slice(comm, 3, 1) == 3);
    EXPECT_OK(gpt_comm_all_reduce(comm, x, 3));
    EXPECT_OK(gpt_comm_reduce_scatter(comm, x, 3));
    EXPECT_OK(gpt_comm_all_gather(comm, x, good));
    EXPECT_OK(gpt_comm_broadcast(comm, x, sizeof x, 0));
    EXPECT(x[0] == 1 && x[1] == 2 && x[2] == 3);
    EXPECT(gpt_comm_all_reduce(comm, NULL, 3) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_comm_all_reduce(comm, x, -1) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_comm_all_gather(comm, x, bad) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_comm_broadcast(comm, x, sizeof x, 1) == GPT_ERR_ARGUMENT);
    gpt_comm_free(comm);
    gpt_comm_free(NULL);
}

/* ---- a model's share ---- */

/* Ranks one after the other: rank 0 leaves its numbers, and the last one adds them to its own. */
typedef struct relay {
    gpt_comm comm;
    float *numbers;
    int64_t n, at;
} relay;

static int relay_numbers(gpt_comm *comm, float *x, int64_t n, coding coding) {
    EXPECT(coding.wire == GPT_WIRE_FP32);
    relay *r = (relay *)comm;
    for (int64_t i = 0; i < n; i++, r->at++) {
        if (comm->rank) x[i] += r->numbers[r->at];
        r->numbers[r->at] = x[i];
    }
    return GPT_OK;
}

static const comm_ops relay_ops = {.all_reduce = relay_numbers};

/* Adds some, and then loses a rank. */
static int break_off(gpt_comm *comm, float *x, int64_t n, coding coding) {
    (void)comm, (void)coding;
    for (int64_t i = 0; i < n / 2; i++) x[i] *= 2;
    return fail(GPT_ERR_COMM, "lost");
}

static const comm_ops broken_ops = {.all_reduce = break_off};

static gpt_model *share_model(const gpt_config *c, float dropout, gpt_lora lora) {
    gpt_options options = place.options;
    options.training = 1, options.max_batch = 4, options.max_seq = 9, options.seed = 77;
    options.dropout = dropout, options.lora = lora;
    gpt_model *model = NULL;
    EXPECT_OK(gpt_model_create(c, &options, &model));
    EXPECT_OK(gpt_model_init(model, 5));
    if (lora.rank) EXPECT_OK(gpt_model_init_lora(model, 5));
    return model;
}

/* A step that leaves gradients of before. */
static void do_other_step(gpt_model *m, const int32_t *tokens) {
    EXPECT_OK(gpt_model_backward(m, tokens, tokens, 1, 9, 1.0f, NULL));
    EXPECT_OK(update_adamw(m, &adamw, NULL, NULL));
}

/* Two ranks with two rows each of a batch, which is the second of its step, and one process with all four. A
 * third rank without a row changes nothing. */
static void check_share(const family *f, float dropout, gpt_lora lora) {
    enum { B = 4, T = 9, HALF = 2 * T };
    const gpt_config *c = &f->config;
    float loss, norm, whole_loss, whole_norm;
    test_case("%s, dropout %g, rank %d", f->name, dropout, lora.rank);
    int32_t *tokens = random_ints(B * T, c->vocab_size),
            *targets = random_ints(B * T, c->vocab_size);
    gpt_model *whole = share_model(c, dropout, lora), *part = share_model(c, dropout, lora);
    EXPECT_OK(gpt_model_place(whole, 1, 0));
    EXPECT_OK(gpt_model_backward(whole, tokens, targets, B, T, 1.0f, NULL));
    float *grads;
    relay r = {.comm = {.ops = &relay_ops, .size = 3}};
    EXPECT_OK(gpt_model_grads(part, &grads, &r.n));
    r.n++; /* the loss */
    r.numbers = host_floats(r.n), r.comm.stage = host_floats(COMM_STAGE);
    for (int rank = 0; rank < 3; rank++) {
        r.comm.rank = rank, r.at = 0;
        if (rank == 2 && !lora.rank) do_other_step(part, tokens);
        if (rank < 2) {
            int32_t *x = tokens + rank * HALF, *y = targets + rank * HALF;
            EXPECT_OK(gpt_model_place(part, 1, 2 * rank));
            EXPECT_OK(gpt_model_backward(part, x, y, 2, T, 0.5f, NULL));
        }
        EXPECT_OK(gpt_model_all_reduce(part, &r.comm));
        EXPECT(r.at == r.n);
        if (rank < 2) {
            gpt_model_free(part);
            part = share_model(c, dropout, lora);
        }
    }
    EXPECT_OK(update_adamw(part, &adamw, &loss, &norm));
    EXPECT_OK(update_adamw(whole, &adamw, &whole_loss, &whole_norm));
    EXPECT_NEAR("loss", loss, whole_loss, whole_loss * test_tols(1e-6, 1e-2));
    EXPECT_NEAR("norm", norm, whole_norm, whole_norm * test_tols(1e-5, 2e-2));
    gpt_model_free(part);
    gpt_model_free(whole);
}

/* A rank has the second micro-batch of a step alone, and drops out what one process drops out there. */
static void check_micro(const family *f) {
    enum { B = 2, T = 9 };
    const gpt_config *c = &f->config;
    float loss[3];
    test_case("%s", f->name);
    int32_t *tokens = random_ints(2 * B * T, c->vocab_size), *second = tokens + B * T;
    gpt_model *m = share_model(c, 0.4f, (gpt_lora){0});
    EXPECT_OK(gpt_model_backward(m, tokens, tokens, B, T, 0.5f, NULL));
    EXPECT_OK(gpt_model_backward(m, second, second, B, T, 0.5f, &loss[0]));
    EXPECT_OK(gpt_model_zero_grads(m));
    EXPECT_OK(gpt_model_place(m, 1, 0));
    EXPECT_OK(gpt_model_backward(m, second, second, B, T, 0.5f, &loss[1]));
    EXPECT_OK(gpt_model_zero_grads(m));
    EXPECT_OK(gpt_model_place(m, 1, 0));
    EXPECT(gpt_model_backward(m, second, second, 0, T, 0.5f, &loss[1]) == GPT_ERR_ARGUMENT);
    EXPECT_OK(gpt_model_backward(m, second, second, B, T, 0.5f, &loss[2]));
    EXPECT(loss[0] == loss[1]);
    EXPECT(loss[0] != loss[2]); /* the place was that of the call that was refused */
    EXPECT(gpt_model_place(m, -1, 0) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_model_place(m, 0, INT64_MAX / T) ==
           GPT_ERR_ARGUMENT); /* elements without a number */
    EXPECT_OK(gpt_model_place(m, INT64_MAX, INT32_MAX));
    EXPECT_OK(gpt_model_zero_grads(m));
    EXPECT_OK(gpt_model_place(m, 1, 0));
    EXPECT_OK(gpt_model_zero_grads(m)); /* a step is given up, and its place with it */
    EXPECT_OK(gpt_model_backward(m, second, second, B, T, 0.5f, &loss[1]));
    EXPECT(loss[1] == loss[2]);
    gpt_model_free(m);
}

/* What a lost rank leaves is not a step: it cannot be applied, and the next step does without it. */
static void check_broken(const family *f) {
    enum { B = 2, T = 9 };
    const gpt_config *c = &f->config;
    gpt_comm comm = {.ops = &broken_ops, .size = 2, .stage = host_floats(COMM_STAGE)};
    float norm, again;
    test_case("%s, broken", f->name);
    int32_t *tokens = random_ints(B * T, c->vocab_size);
    gpt_model *m = share_model(c, 0, (gpt_lora){0}), *other = share_model(c, 0, (gpt_lora){0});
    EXPECT_OK(gpt_model_backward(m, tokens, tokens, B, T, 1.0f, NULL));
    EXPECT(gpt_model_all_reduce(m, &comm) == GPT_ERR_COMM);
    EXPECT(update_adamw(m, &adamw, NULL, NULL) == GPT_ERR_ARGUMENT);
    EXPECT_OK(gpt_model_backward(m, tokens, tokens, B, T, 1.0f, NULL));
    EXPECT_OK(gpt_model_backward(other, tokens, tokens, B, T, 1.0f, NULL));
    EXPECT_OK(update_adamw(m, &adamw, NULL, &norm));
    EXPECT_OK(update_adamw(other, &adamw, NULL, &again));
    EXPECT(norm == again);
    gpt_model_free(m);
    gpt_model_free(other);
}

static void test_shares(void) {
    EACH_PLACE {
        gpt_lora lora = {.rank = 3,
                         .targets = GPT_LORA_ATT_PROJ | GPT_LORA_MLP_PROJ,
                         .scale = 2,
                         .dropout = 0.4f};
        for (int f = 0; f < 2; f++) {
            check_share(&families[f], 0.0f, (gpt_lora){0});
            check_share(&families[f], 0.4f, (gpt_lora){0});
            check_micro(&families[f]);
            check_broken(&families[f]);
            if (place.options.device == GPT_DEVICE_CPU) check_share(&families[f], 0.0f, lora);
        }
    }
}

TEST_API_MAIN({"all-reduce", test_all_reduce}, {"reduce-scatter", test_reduce_scatter},
              {"gather and broadcast", test_gather_and_broadcast}, {"parts", test_parts},
              {"messages are short", test_messages_are_short},
              {"a missing rank", test_a_missing_rank},
              {"messages under way", test_messages_under_way}, {"sockets", test_sockets},
              {"arguments", test_arguments}, {"shares of a batch", test_shares})
