/* session.c: decoding with a KV cache. */
#include "api.h"
#include "sample.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_session(const gpt_model *m, int n_seq, int *n_ctx, int kv) {
    int block = m->config.block_size;
    if (kv != GPT_KV_ACTIVATIONS && kv != GPT_KV_INT8)
        return fail(GPT_ERR_ARGUMENT, "kv is %d; it must be an enum gpt_kv", kv);
    if (*n_ctx == 0) *n_ctx = block;
    if (*n_ctx < 1 || *n_ctx > block)
        return fail(GPT_ERR_ARGUMENT, "n_ctx is %d; it must be between 1 and block_size %d", *n_ctx,
                    block);
    if (n_seq < 1 || (int64_t)n_seq * *n_ctx > MAX_ROWS)
        return fail(GPT_ERR_ARGUMENT, "n_seq is %d; it must be at least 1 and at most %lld", n_seq,
                    (long long)(MAX_ROWS / *n_ctx));
    return GPT_OK;
}

int gpt_session_bytes(const gpt_model *model, int n_seq, int n_ctx, int kv, uint64_t *out) {
    REQUIRE(model);
    REQUIRE(out);
    TRY(check_session(model, n_seq, &n_ctx, kv));
    *out = session_plan(model, n_seq, n_ctx, kv, NULL, NULL);
    return GPT_OK;
}

static int session_out_of_memory(const gpt_session *s) {
    double need = (double)s->arena_bytes * 1e-9;
    size_t bytes = s->model->ops->memory_free();
    char missing[64] = "";
    if (bytes < s->arena_bytes)
        snprintf(missing, sizeof missing, ", %.2f GB more than are free",
                 need - (double)bytes * 1e-9);
    return fail(GPT_ERR_MEMORY,
                "not enough memory: a session of %d sequences of %d tokens needs %.2f GB%s; take "
                "fewer of them, or shorter ones",
                s->n_seq, s->n_ctx, need, missing);
}

static int create_session_parts(gpt_session *s) {
    gpt_model *m = s->model;
    s->max_rows = session_max_rows(s->n_seq, s->n_ctx);
    s->window = cache_window(&m->config, s->n_seq, s->n_ctx);
    for (int l = 0; l < m->config.n_layer; l++) {
        int rows = cache_rows(&m->config, l, s->n_seq, s->n_ctx);
        if (rows < s->n_ctx) s->window_rows = rows;
    }
    s->length = calloc((size_t)s->n_seq, sizeof *s->length);
    s->first = calloc((size_t)s->n_seq, sizeof *s->first);
    s->adapters = calloc((size_t)s->n_seq, sizeof(const gpt_adapter *));
    s->rows = calloc(STEP_INTS * (size_t)s->max_rows, sizeof *s->rows);
    s->acts.layers = calloc((size_t)m->config.n_layer, sizeof *s->acts.layers);
    if (!s->length || !s->first || !s->adapters || !s->rows || !s->acts.layers)
        return fail(GPT_ERR_MEMORY, "no memory for the session's tables");
    s->arena_bytes = session_plan(m, s->n_seq, s->n_ctx, s->kv, NULL, NULL);
    s->arena = m->ops->buffer_alloc(m->ctx, s->arena_bytes, BUFFER_IN_PARTS);
    if (!s->arena) {
        TRY(m->ops->sync(m->ctx));
        return session_out_of_memory(s);
    }
    session_plan(m, s->n_seq, s->n_ctx, s->kv, s->arena, s);
    s->draws = calloc((size_t)s->acts.logit_rows, sizeof *s->draws);
    return s->draws ? GPT_OK : fail(GPT_ERR_MEMORY, "no memory for the session's tables");
}

int gpt_session_create(gpt_model *model, int n_seq, int n_ctx, int kv, gpt_session **out) {
    REQUIRE_MODEL(model);
    REQUIRE(out);
    TRY(check_session(model, n_seq, &n_ctx, kv));
    gpt_session *s = calloc(1, sizeof *s);
    if (!s) return fail(GPT_ERR_MEMORY, "no memory for the session");
    s->model = model;
    s->n_seq = n_seq;
    s->n_ctx = n_ctx;
    s->kv = kv;
    int status = create_session_parts(s);
    if (status != GPT_OK) {
        gpt_session_free(s);
        return status;
    }
    *out = s;
    return GPT_OK;
}

void gpt_session_free(gpt_session *s) {
    if (!s) return;
    if (s->arena && check_process(s->model) == GPT_OK)
        s->model->ops->buffer_free(s->model->ctx, s->arena, s->arena_bytes);
    free(s->length);
    free(s->first);
    free(s->adapters);
    free(s->rows);
    free(s->draws);
    free(s->acts.layers);
    free(s);
}

/* The tokens of each sequence are neighbours, and there is room for them. */
static int check_step(const gpt_session *s, const int32_t *seqs, int n) {
    for (int i = 0, count = 0; i < n; i++) {
        int seq = seqs[i];
        if (seq < 0 || seq >= s->n_seq)
            return fail(GPT_ERR_ARGUMENT, "sequence %d does not exist; the session has %d", seq,
                        s->n_seq);
        count = i > 0 && seqs[i - 1] == seq ? count + 1 : 1;
        if (s->length[seq] + count > s->n_ctx)
            return fail(GPT_ERR_ARGUMENT,
                        "sequence %d would have %d tokens or more; the context is %d", seq,
                        s->length[seq] + count, s->n_ctx);
        if (count > 1 || i == 0) continue;
        for (int j = 0; j < i; j++)
            if (seqs[j] == seq)
                return fail(GPT_ERR_ARGUMENT, "the tokens of sequence %d are not neighbours", seq);
    }
    return GPT_OK;
}

static int count_wanted(const int32_t *seqs, const uint8_t *want, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) count += want ? want[i] != 0 : i + 1 == n || seqs[i + 1] != seqs[i];
    return count;
}

static int check_tokens_of(const gpt_session *s, const int32_t *tokens, const int32_t *seqs,
                           int n) {
    if (n < 1) return fail(GPT_ERR_ARGUMENT, "a step needs at least 1 token, not %d", n);
    TRY(check_gathered(s->model));
    TRY(check_tokens(s->model, "token", tokens, n, 0));
    return check_step(s, seqs, n);
}

static int run_step(gpt_session *s, const int32_t *tokens, const int32_t *seqs, const uint8_t *want,
                    int n, const step_output *out) {
    session_step(s, tokens, seqs, want, n, out);
    TRY(check_interrupted(s->model));
    return s->model->ops->sync(s->model->ctx);
}

int gpt_session_decode(gpt_session *session, const int32_t *tokens, const int32_t *seqs,
                       const uint8_t *want, int n, float *logits) {
    REQUIRE(session);
    TRY(check_process(session->model));
    REQUIRE(tokens);
    REQUIRE(seqs);
    if (count_wanted(seqs, want, n) > 0) REQUIRE(logits);
    TRY(check_tokens_of(session, tokens, seqs, n));
    return run_step(session, tokens, seqs, want, n, &(step_output){.logits = logits});
}

/* n numbers of `bytes` each, which are at the end of the room for out. */
static void widen(float *out, const char *numbers, int64_t n, size_t bytes) {
    for (int64_t i = 0; bytes < sizeof *out && i < n; i++) {
        uint16_t half; /* of the bits of a float */
        memcpy(&half, numbers + i * (int64_t)sizeof half, sizeof half);
        uint32_t bits = (uint32_t)half << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

int gpt_session_states(gpt_session *session, const int32_t *tokens, const int32_t *seqs,
                       const uint8_t *want, int n, float *states) {
    REQUIRE(session);
    TRY(check_process(session->model));
    REQUIRE(tokens);
    REQUIRE(seqs);
    int64_t size = (int64_t)count_wanted(seqs, want, n) * session->model->config.n_embd;
    if (size > 0) REQUIRE(states);
    TRY(check_tokens_of(session, tokens, seqs, n));
    size_t bytes = session->model->ops->act_bytes;
    char *numbers = (char *)states + (size_t)size * (sizeof *states - bytes);
    TRY(run_step(session, tokens, seqs, want, n, &(step_output){.states = size ? numbers : NULL}));
    widen(states, numbers, size, bytes);
    return GPT_OK;
}

/* ---- draws ---- */

static int32_t drawn_from(const gpt_session *s, const gpt_draw *d) {
    return d->vocab_size ? d->vocab_size : s->model->config.vocab_size;
}

static int check_draws(const gpt_session *s, const gpt_draw *draws, int n) {
    int V = s->model->config.vocab_size;
    for (int i = 0; i < n; i++) {
        const gpt_draw *d = draws + i;
        int from = drawn_from(s, d), most = from < GPT_MAX_TOP ? from : GPT_MAX_TOP;
        if (from < 1 || from > V)
            return fail(GPT_ERR_ARGUMENT,
                        "vocab_size is %d; it must be between 1 and the model's %d", from, V);
        if (d->n_top < -1 || d->n_top > most)
            return fail(GPT_ERR_ARGUMENT, "n_top is %d; it must be between -1 (none) and %d",
                        d->n_top, most);
        TRY(sample_check(&d->sampling, from, d->history, d->n_history));
    }
    return GPT_OK;
}

/* The host's part of n draws. */
typedef struct draw_tables {
    sample_row *rows;
    sample_result *results;
    sample_adjustment *adjustments;
    int32_t *marks; /* (V) */
} draw_tables;

static void free_draw_tables(draw_tables *t) {
    free(t->rows);
    free(t->results);
    free(t->adjustments);
    free(t->marks);
}

static int make_draw_tables(const gpt_session *s, const gpt_draw *draws, int n, draw_tables *t) {
    int64_t most = 0;
    for (int i = 0; i < n; i++)
        most += sample_most_adjustments(&draws[i].sampling, draws[i].n_history,
                                        drawn_from(s, draws + i));
    if (most > INT32_MAX)
        return fail(GPT_ERR_ARGUMENT,
                    "biases and penalties are for %lld tokens; draw fewer at once",
                    (long long)most);
    t->rows = malloc(sizeof *t->rows * (size_t)n + 1);
    t->results = malloc(sizeof *t->results * (size_t)n + 1);
    t->adjustments = malloc(sizeof *t->adjustments * (size_t)most + 1);
    t->marks = most ? calloc((size_t)s->model->config.vocab_size, sizeof *t->marks) : NULL;
    if (!t->rows || !t->results || !t->adjustments || (most && !t->marks))
        return fail(GPT_ERR_MEMORY, "no memory to draw %d tokens", n);
    int32_t n_adjustments = 0;
    for (int i = 0; i < n; i++) {
        const gpt_draw *d = draws + i;
        sample_prepare(&t->rows[i], t->adjustments, &n_adjustments, t->marks, &d->sampling,
                       drawn_from(s, d), d->history, d->n_history, d->position);
        t->rows[i].n_top = d->n_top;
    }
    return GPT_OK;
}

static int take_result(gpt_draw *d, const sample_result *r) {
    TRY(sample_status(r));
    d->token = r->token;
    d->logprob = d->n_top >= 0 ? r->logprob : 0;
    for (int k = 0; k < d->n_top; k++) {
        d->top_tokens[k] = r->top_tokens[k];
        d->top_logprobs[k] = r->top_logprobs[k];
    }
    return GPT_OK;
}

int gpt_session_sample(gpt_session *session, const int32_t *tokens, const int32_t *seqs,
                       const uint8_t *want, int n, gpt_draw *draws) {
    REQUIRE(session);
    TRY(check_process(session->model));
    REQUIRE(tokens);
    REQUIRE(seqs);
    int n_draws = count_wanted(seqs, want, n);
    if (n_draws > 0) REQUIRE(draws);
    TRY(check_tokens_of(session, tokens, seqs, n));
    TRY(check_draws(session, draws, n_draws));
    draw_tables t = {NULL};
    int status = make_draw_tables(session, draws, n_draws, &t);
    step_output out = {.results = t.results, .draws = t.rows, .adjustments = t.adjustments};
    if (status == GPT_OK) status = run_step(session, tokens, seqs, want, n, &out);
    for (int i = 0; i < n_draws && status == GPT_OK; i++)
        status = take_result(draws + i, t.results + i);
    free_draw_tables(&t);
    return status;
}

int gpt_session_length(const gpt_session *session, int seq) {
    if (!session || seq < 0 || seq >= session->n_seq) return -1;
    return session->length[seq];
}

static int check_seq(const gpt_session *s, int seq) {
    if (seq >= 0 && seq < s->n_seq) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "sequence %d does not exist; the session has %d", seq, s->n_seq);
}

int gpt_session_adapt(gpt_session *session, int seq, const gpt_adapter *adapter) {
    REQUIRE(session);
    TRY(check_process(session->model));
    TRY(check_seq(session, seq));
    if (adapter && adapter->model != session->model)
        return fail(GPT_ERR_ARGUMENT, "the adapter is of another model than the session");
    session->adapters[seq] = adapter;
    return GPT_OK;
}

int gpt_session_reaches(const gpt_session *session, int seq, int length) {
    if (!session || seq < 0 || seq >= session->n_seq) return 0;
    return length >= 0 && length <= session->length[seq] && window_reaches(session, seq, length);
}

static int check_reached(const gpt_session *s, int seq, int length) {
    if (window_reaches(s, seq, length)) return GPT_OK;
    return fail(
        GPT_ERR_ARGUMENT,
        "sequence %d no longer holds what a token after its first %d sees: its windowed layers "
        "keep positions from %d on; rewind it to 0",
        seq, length, s->first[seq]);
}

int gpt_session_fork(gpt_session *session, int from, int to, int length) {
    REQUIRE(session);
    TRY(check_process(session->model));
    TRY(check_seq(session, from));
    TRY(check_seq(session, to));
    if (length < 0 || length > session->length[from])
        return fail(GPT_ERR_ARGUMENT, "sequence %d holds %d tokens; %d of them cannot be copied",
                    from, session->length[from], length);
    TRY(check_reached(session, from, length));
    session_fork(session, from, to, length);
    return session->model->ops->sync(session->model->ctx);
}

int gpt_session_rewind(gpt_session *session, int seq, int length) {
    REQUIRE(session);
    TRY(check_process(session->model));
    TRY(check_seq(session, seq));
    if (length < 0 || length > session->length[seq])
        return fail(GPT_ERR_ARGUMENT, "sequence %d holds %d tokens; it cannot be rewound to %d",
                    seq, session->length[seq], length);
    TRY(check_reached(session, seq, length));
    window_rewind(session, seq, length);
    return GPT_OK;
}
