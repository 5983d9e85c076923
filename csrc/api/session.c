/* session.c: decoding with a KV cache. */
#include "api.h"

#include <stdio.h>
#include <stdlib.h>

static int check_session(const gpt_model *m, int n_seq, int *n_ctx) {
    int block = m->config.block_size;
    if (*n_ctx == 0) *n_ctx = block;
    if (*n_ctx < 1 || *n_ctx > block)
        return fail(GPT_ERR_ARGUMENT, "n_ctx is %d; it must be between 1 and block_size %d", *n_ctx,
                    block);
    if (n_seq < 1 || (int64_t)n_seq * *n_ctx > MAX_ROWS)
        return fail(GPT_ERR_ARGUMENT, "n_seq is %d; it must be at least 1 and at most %lld", n_seq,
                    (long long)(MAX_ROWS / *n_ctx));
    return GPT_OK;
}

int gpt_session_bytes(const gpt_model *model, int n_seq, int n_ctx, uint64_t *out) {
    REQUIRE(model);
    REQUIRE(out);
    TRY(check_session(model, n_seq, &n_ctx));
    *out = session_plan(model, n_seq, n_ctx, NULL, NULL);
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
    s->length = calloc((size_t)s->n_seq, sizeof *s->length);
    s->rows = calloc(STEP_INTS * (size_t)s->max_rows, sizeof *s->rows);
    s->acts.layers = calloc((size_t)m->config.n_layer, sizeof *s->acts.layers);
    if (!s->length || !s->rows || !s->acts.layers)
        return fail(GPT_ERR_MEMORY, "no memory for the session's tables");
    s->arena_bytes = session_plan(m, s->n_seq, s->n_ctx, NULL, NULL);
    s->arena = m->ops->buffer_alloc(m->ctx, s->arena_bytes);
    if (!s->arena) {
        TRY(m->ops->sync(m->ctx));
        return session_out_of_memory(s);
    }
    session_plan(m, s->n_seq, s->n_ctx, s->arena, s);
    return GPT_OK;
}

int gpt_session_create(gpt_model *model, int n_seq, int n_ctx, gpt_session **out) {
    REQUIRE(model);
    REQUIRE(out);
    TRY(check_session(model, n_seq, &n_ctx));
    gpt_session *s = calloc(1, sizeof *s);
    if (!s) return fail(GPT_ERR_MEMORY, "no memory for the session");
    s->model = model;
    s->n_seq = n_seq;
    s->n_ctx = n_ctx;
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
    if (s->arena) s->model->ops->buffer_free(s->model->ctx, s->arena, s->arena_bytes);
    free(s->length);
    free(s->rows);
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

int gpt_session_decode(gpt_session *session, const int32_t *tokens, const int32_t *seqs,
                       const uint8_t *want, int n, float *logits) {
    REQUIRE(session);
    REQUIRE(tokens);
    REQUIRE(seqs);
    bool some = !want;
    for (int i = 0; want && i < n; i++) some |= want[i];
    if (some) REQUIRE(logits);
    if (n < 1) return fail(GPT_ERR_ARGUMENT, "a step needs at least 1 token, not %d", n);
    TRY(check_tokens(session->model, "token", tokens, n, 0));
    TRY(check_step(session, seqs, n));
    session_step(session, tokens, seqs, want, n, logits);
    TRY(check_interrupted(session->model));
    return session->model->ops->sync(session->model->ctx);
}

int gpt_session_length(const gpt_session *session, int seq) {
    if (!session || seq < 0 || seq >= session->n_seq) return -1;
    return session->length[seq];
}

static int check_seq(const gpt_session *s, int seq) {
    if (seq >= 0 && seq < s->n_seq) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT, "sequence %d does not exist; the session has %d", seq, s->n_seq);
}

int gpt_session_fork(gpt_session *session, int from, int to, int length) {
    REQUIRE(session);
    TRY(check_seq(session, from));
    TRY(check_seq(session, to));
    if (length < 0 || length > session->length[from])
        return fail(GPT_ERR_ARGUMENT, "sequence %d holds %d tokens; %d of them cannot be copied",
                    from, session->length[from], length);
    session_fork(session, from, to, length);
    return session->model->ops->sync(session->model->ctx);
}

int gpt_session_rewind(gpt_session *session, int seq, int length) {
    REQUIRE(session);
    TRY(check_seq(session, seq));
    if (length < 0 || length > session->length[seq])
        return fail(GPT_ERR_ARGUMENT, "sequence %d holds %d tokens; it cannot be rewound to %d",
                    seq, session->length[seq], length);
    session->length[seq] = length;
    return GPT_OK;
}
