/* Models whose optimizer state is in parts (ZeRO-1), among threads that stand in for ranks. */
#include "testing.h"

#include "adapters.h"
#include "thread_ranks.h"

enum { STEPS = 3, OTHER = 1000 };

/* A job in which each rank makes steps on another row. */
typedef struct task {
    const gpt_config *config;
    const int32_t *tokens; /* (STEPS, ranks, T) */
    bool sharded, overlaps;
    int optimizer; /* enum gpt_optimizer_kind; with Muon, rows are scaled too */
    int wire;
    int moments; /* enum gpt_moments */
    float dropout;
    gpt_lora lora; /* rank 0: all parameters are trained */
} task;

/* Without numbers. */
static gpt_model *rank_model(const task *t, int rank, int size, int *status) {
    gpt_options options = place.options;
    gpt_model *model = NULL;
    options.training = 1, options.max_batch = 1, options.max_seq = T, options.seed = 7;
    options.dropout = t->dropout, options.lora = t->lora, options.wire = t->wire;
    options.moments = t->moments;
    options.optimizer = t->optimizer, options.muon_rows = t->optimizer == GPT_OPTIMIZER_MUON;
    if (t->sharded) options.n_shards = size, options.shard = rank;
    *status = gpt_model_create(t->config, &options, &model);
    return model;
}

/* Whether this place has case i of a list: with short sizes one case in n, other ones at the next place. Parts
 * are the same code at every place. */
static bool is_turn(int i, int n) {
    return !test_is_short() || (i + place.at) % n == 0;
}

static int update(const task *t, gpt_model *m, float *results) {
    gpt_optimizer all[] = {
        {.kind = GPT_OPTIMIZER_ADAMW, .adamw = adamw},
        {.kind = GPT_OPTIMIZER_MUON,
         .muon = {
             .lr = 0.01f, .momentum = 0.9f, .weight_decay = 0.1f, .grad_clip = 1, .beta2 = 0.9f}}};
    int n = t->optimizer == GPT_OPTIMIZER_MUON ? 2 : 1;
    return gpt_model_update(m, all, n, &results[0], &results[1]);
}

static int do_step(const task *t, gpt_model *m, gpt_comm *comm, int step, float *results) {
    int rank = gpt_comm_rank(comm), size = gpt_comm_size(comm);
    const int32_t *tokens = t->tokens + (step * size + rank) * T;
    if (t->overlaps) TRY(gpt_model_begin_all_reduce(m, comm));
    TRY(gpt_model_place(m, 0, rank));
    TRY(gpt_model_backward(m, tokens, tokens, 1, T, 1.0f / (float)size, NULL));
    TRY(gpt_model_all_reduce(m, comm));
    TRY(update(t, m, results));
    if (!t->sharded) return GPT_OK;
    gpt_param info;
    TRY(gpt_config_param(t->config, 0, &info));
    float *x = malloc(sizeof *x * (size_t)info.size);
    int early[] = {gpt_model_loss(m, tokens, tokens, 1, T, results, NULL),
                   gpt_model_read(m, 0, GPT_TENSOR_VALUE, x, info.size),
                   gpt_model_write(m, 0, GPT_TENSOR_VALUE, x, info.size), gpt_model_init(m, 3)};
    free(x);
    for (int i = 0; i < TEST_COUNT(early); i++)
        if (early[i] != GPT_ERR_ARGUMENT) return OTHER;
    TRY(gpt_model_zero_grads(
        m)); /* the parameters come through the gradients' buffer, and leave nothing there */
    return gpt_model_gather(m, comm);
}

/* Values (k = -1) and states of a model, one after the other. */
static int read_one(const task *t, gpt_model *m, gpt_comm *comm, int i, int k, float *out,
                    int64_t n) {
    int tensor = k < 0 ? GPT_TENSOR_VALUE : GPT_TENSOR_STATE0 + k;
    if (k < 0 || !t->sharded) return gpt_model_read(m, i, tensor, out, n);
    if (gpt_model_read(m, i, tensor, out, n) != GPT_ERR_ARGUMENT) return OTHER;
    return gpt_model_gather_state(m, comm, i, k, out, n);
}

static int read_all(const task *t, gpt_model *m, gpt_comm *comm, float *out) {
    for (int i = 0; i < gpt_config_param_count(t->config); i++) {
        gpt_param info;
        TRY(gpt_config_param(t->config, i, &info));
        for (int k = -1; k < gpt_model_state_count(m, i); k++) {
            int64_t n = k < 0 ? info.size : gpt_model_state_size(m, i, k);
            TRY(read_one(t, m, comm, i, k, out, n));
            out += n;
        }
    }
    return GPT_OK;
}

static int write_all(const task *t, gpt_model *m, const float *x) {
    for (int i = 0; i < gpt_config_param_count(t->config); i++) {
        gpt_param info;
        TRY(gpt_config_param(t->config, i, &info));
        for (int k = -1; k < gpt_model_state_count(m, i); k++) {
            int64_t n = k < 0 ? info.size : gpt_model_state_size(m, i, k);
            TRY(gpt_model_write(m, i, k < 0 ? GPT_TENSOR_VALUE : GPT_TENSOR_STATE0 + k, x, n));
            x += n;
        }
    }
    return gpt_model_set_step(m, STEPS - 1);
}

/* All steps but the last; that one by another model, which is given what the first one has. */
static int train_rank(job *j, gpt_comm *comm, int rank, gpt_model *models[2]) {
    const task *t = j->given;
    float *x = j->x[rank], *results = x + j->n - 2 * STEPS;
    memset(x, 0, sizeof *x * (size_t)j->n); /* states may be fewer */
    TRY(gpt_model_init(models[0], 3));
    if (t->lora.rank) TRY(gpt_model_init_lora(models[0], 5));
    for (int step = 0; step < STEPS; step++) {
        if (t->lora.rank) {
            TRY(do_step(t, models[0], comm, step, results + 2 * step));
            continue;
        }
        if (step == STEPS - 1) {
            TRY(read_all(t, models[0], comm, x));
            TRY(write_all(t, models[1], x));
        }
        TRY(do_step(t, models[step == STEPS - 1], comm, step, results + 2 * step));
    }
    return t->lora.rank ? GPT_OK : read_all(t, models[1], comm, x);
}

static void run_rank(job *j, gpt_comm *comm, int rank) {
    gpt_model *models[2] = {NULL};
    int *status = &j->status[rank];
    const task *t = j->given;
    int n_models = t->lora.rank ? 1 : 2;
    for (int i = 0; i < n_models && *status == GPT_OK; i++)
        models[i] = rank_model(t, rank, j->size, status);
    if (*status == GPT_OK) *status = train_rank(j, comm, rank, models);
    gpt_model_free(models[0]);
    gpt_model_free(models[1]);
}

/* Losses, norms, values and states of a sharded job have the bits of one in which each rank has all. */
static void check_bits(const gpt_config *c, const char *name, int size, float dropout,
                       gpt_lora lora, int moments) {
    task whole = {.config = c, .dropout = dropout, .lora = lora, .moments = moments}, parts;
    test_case("%s, %d ranks, dropout %g, adapters of rank %d, DoRA %d, moments %d", name, size,
              dropout, lora.rank, lora.dora, moments);
    whole.tokens = random_ints(STEPS * size * T, c->vocab_size);
    parts = whole, parts.sharded = true;
    int64_t n = (lora.rank ? 0 : 3 * n_params(c)) + 2 * STEPS;
    job one = blank_job(run_rank, size, n), other = blank_job(run_rank, size, n);
    one.given = &whole, other.given = &parts;
    run_job(&one);
    run_job(&other);
    for (int rank = 0; rank < size; rank++) {
        int64_t wrong = 0;
        EXPECT(one.status[rank] == GPT_OK && other.status[rank] == GPT_OK);
        if (other.status[rank] != GPT_OK) test_case("%s", other.sentence[rank]);
        for (int64_t i = 0; i < n; i++) wrong += one.x[0][i] != other.x[rank][i];
        EXPECT(wrong == 0);
    }
}

static job run_task(const task *t, int size) {
    job j = blank_job(run_rank, size, 3 * n_params(t->config) + 2 * STEPS);
    j.given = t;
    run_good_job(&j);
    return j;
}

/* Sums of pieces that begin during backward, of a model with several ranges of gradients. With 8 bits the rounding
 * depends on the pieces, so those are compared with sums after backward. */
static void check_overlap(void) {
    gpt_config c = families[0].config;
    c.vocab_size = 301, c.n_embd = 192, c.n_ff = 800, c.n_layer = 5;
    for (int wire = GPT_WIRE_FP32; wire <= GPT_WIRE_INT8; wire += GPT_WIRE_INT8) {
        if (!is_turn(wire == GPT_WIRE_INT8, 3)) continue;
        task whole = {.config = &c, .wire = wire};
        test_case("%s", wire ? "8 bits" : "fp32");
        whole.tokens = random_ints(STEPS * 2 * T, c.vocab_size);
        task after = whole, during;
        after.sharded = true, during = after, during.overlaps = true;
        job one = run_task(&during, 2), other = run_task(wire ? &after : &whole, 2);
        for (int rank = 0; rank < 2; rank++)
            EXPECT(!memcmp(one.x[rank], other.x[rank], sizeof(float) * (size_t)one.n));
    }
}

static void test_overlap(void) {
    EACH_PLACE {
        if (place.options.device != GPT_DEVICE_CPU || place.options.dtype != GPT_DTYPE_FP32)
            continue;
        check_overlap();
    }
}

/* Whole matrices are those of a rank. The norm is added in other blocks, so that last bits may differ. */
static void check_muon(const gpt_config *c, int size) {
    task whole = {.config = c, .optimizer = GPT_OPTIMIZER_MUON}, parts;
    test_case("%d ranks", size);
    whole.tokens = random_ints(STEPS * size * T, c->vocab_size);
    parts = whole, parts.sharded = true;
    job one = run_task(&whole, size), other = run_task(&parts, size);
    double worst = 0;
    for (int rank = 0; rank < size; rank++) {
        for (int64_t i = 0; i < one.n; i++)
            worst = fmax(worst, fabs((double)one.x[0][i] - other.x[rank][i]));
        for (int64_t i = one.n - 2 * STEPS; i < one.n; i++)
            EXPECT(fabsf(one.x[0][i] / other.x[rank][i] - 1) < 1e-6f);
    }
    EXPECT(worst < 1e-6);
    EXPECT(one.x[0][one.n - 2 * STEPS] != one.x[0][one.n - 2]); /* it has learned */
}

static void test_muon(void) {
    gpt_config c = families[1].config;
    c.vocab_size = 1003, c.n_embd = 64, c.n_ff = 200;
    EACH_PLACE {
        if (place.options.device != GPT_DEVICE_CPU || place.options.dtype != GPT_DTYPE_FP32)
            continue;
        if (is_turn(0, 2)) check_muon(&c, 3);
    }
}

/* Parts have all matrices between them, each of which is in one. */
static void test_muon_memory(void) {
    gpt_config c = families[1].config;
    gpt_options o = {.training = 1, .max_batch = 1, .max_seq = T, .n_threads = 1};
    gpt_plan whole, part;
    c.vocab_size = 1003, c.n_embd = 64, c.n_ff = 200;
    o.optimizer = GPT_OPTIMIZER_MUON;
    test_case("memory");
    EXPECT_OK(gpt_plan_memory(&c, &o, &whole));
    size_t sum = 0;
    for (o.n_shards = 3, o.shard = 0; o.shard < 3; o.shard++) {
        EXPECT_OK(gpt_plan_memory(&c, &o, &part));
        EXPECT(part.optimizer_bytes < whole.optimizer_bytes * 6 / 10);
        sum += part.optimizer_bytes;
    }
    EXPECT(sum + 4096 > whole.optimizer_bytes && sum < whole.optimizer_bytes + 4096);
}

static gpt_config wide(const family *f) {
    gpt_config c = f->config;
    c.vocab_size = 3000; /* so that there are several blocks of gradients */
    return c;
}

static void test_bits(void) {
    const gpt_lora none = {.rank = 0};
    EACH_PLACE {
        if (place.options.device != GPT_DEVICE_CPU) continue;
        for (int f = 0; f < 2; f++) {
            gpt_config c = wide(&families[f]);
            for (int moments = 0; moments <= GPT_MOMENTS_INT8; moments++)
                if (is_turn(moments + f, 3))
                    check_bits(&c, families[f].name, 2 + f, f ? 0.3f : 0, none, moments);
            gpt_lora lora = lora_of(&c, f, 0);
            lora.dora = f;
            if (is_turn(f, 2)) check_bits(&c, families[f].name, 2, 0, lora, f);
        }
        /* One block: a rank has no part. */
        check_bits(&families[0].config, families[0].name, 2, 0, none, GPT_MOMENTS_INT8);
    }
}

static int create(gpt_options o) {
    gpt_model *model = NULL;
    int status = gpt_model_create(&families[0].config, &o, &model);
    gpt_model_free(model);
    return status;
}

static void test_arguments(void) {
    gpt_options o = {.training = 1, .max_batch = 1, .max_seq = T, .n_shards = 2, .n_threads = 1};
    const gpt_config c = wide(&families[0]);
    gpt_plan plan[3];
    gpt_comm *comm;
    gpt_model *model;
    int32_t tokens[T] = {0};
    float out[1];
    test_case("arguments");
    for (int shard = -1; shard < 3; shard++) {
        o.shard = shard;
        EXPECT((create(o) == GPT_OK) == (shard == 0 || shard == 1));
    }
    o.shard = 0, o.n_shards = -1;
    EXPECT(create(o) == GPT_ERR_ARGUMENT);
    o.n_shards = 2, o.device = GPT_DEVICE_CUDA;
    EXPECT(create(o) == GPT_ERR_ARGUMENT);
    o.device = GPT_DEVICE_CPU;
    for (int n = 0; n < 2; n++) {
        o.shard = n;
        EXPECT_OK(gpt_plan_memory(&c, &o, &plan[n]));
    }
    o.n_shards = o.shard = 0;
    EXPECT_OK(gpt_plan_memory(&c, &o, &plan[2]));
    EXPECT(plan[0].optimizer_bytes < plan[2].optimizer_bytes);
    EXPECT(plan[0].optimizer_bytes + plan[1].optimizer_bytes <= plan[2].optimizer_bytes + 1024);
    o.n_shards = 2;
    EXPECT_OK(gpt_comm_create(GPT_COMM_NONE, NULL, 0, &comm));
    EXPECT_OK(gpt_model_create(&c, &o, &model));
    EXPECT_OK(gpt_model_backward(model, tokens, tokens, 1, T, 1, NULL));
    EXPECT(update_adamw(model, &adamw, NULL, NULL) == GPT_ERR_ARGUMENT);
    EXPECT(strstr(gpt_last_error(), "call gpt_model_all_reduce first"));
    EXPECT(gpt_model_all_reduce(model, comm) == GPT_ERR_ARGUMENT);
    EXPECT(!strcmp(gpt_last_error(), "the model has part 0 of 2; this is rank 0 of 1"));
    EXPECT(gpt_model_gather(model, comm) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_model_gather_state(model, comm, 0, 0, out, 1) == GPT_ERR_ARGUMENT);
    gpt_model_free(model);
    gpt_comm_free(comm);
}

TEST_API_MAIN({"bits of a whole state", test_bits}, {"sums during backward", test_overlap},
              {"Muon", test_muon}, {"Muon's memory", test_muon_memory},
              {"arguments", test_arguments})
