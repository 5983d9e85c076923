/* decode.c: sessions. One step appends any number of tokens to any of the sequences, so prefill,
 * batched decoding and a mixture of both are the same call. */
#include "model.h"

/* A prompt goes through in pieces of this many rows: enough to keep the products efficient, few
 * enough that activations stay small beside the cache. */
enum { PREFILL_ROWS = 256 };

int session_max_rows(int n_seq, int n_ctx) {
    int rows = n_ctx < PREFILL_ROWS ? n_ctx : PREFILL_ROWS;
    return rows > n_seq ? rows : n_seq;
}

static gpt_shape session_shape(const gpt_model *m, int rows, int n_ctx) {
    gpt_shape shape = config_shape(&m->config);
    shape.N = rows;
    shape.T = n_ctx;
    return shape;
}

size_t session_plan(const gpt_model *m, int n_seq, int n_ctx, char *base, gpt_session *s) {
    acts none = {0};
    int rows = session_max_rows(n_seq, n_ctx);
    acts_shape shape = {.N = rows, .T = n_ctx, .n_seq = n_seq, .n_ctx = n_ctx, .logit_rows = n_seq};
    size_t bytes = acts_plan(&m->config, m->ops, &shape, base, s ? &s->acts : &none);
    if (s) s->workspace = base + bytes;
    gpt_shape extent = session_shape(m, rows, n_ctx);
    return bytes + m->ops->workspace_bytes(m->ctx, &extent);
}

static const act *row_of(const gpt_model *m, const act *x, int row) {
    return (const char *)x + (size_t)row * (size_t)m->config.n_embd * m->ops->act_bytes;
}

/* The logits of rows first to first + n - 1, as the next rows of the step's output. */
static void head(gpt_session *s, int first, int n, int out_row) {
    const gpt_model *m = s->model;
    const gpt_config *c = &m->config;
    m->ops->head_forward(m->ctx, s->acts.logits + (int64_t)out_row * c->vocab_size,
                         row_of(m, s->acts.norm_f, first), m->w.head, n, c->n_embd, c->vocab_size,
                         padded_vocab_size(c));
}

/* The logits of each sequence's last row, as the rows of the step's output from out_row on; returns
 * where they end. Neighbours go through the head together: all of them in plain decoding. */
static int heads(gpt_session *s, const int32_t *seqs, int n, bool more_follow, int out_row) {
    for (int i = 0; i < n;) {
        int first = i;
        while (i < n && (i + 1 < n ? seqs[i + 1] != seqs[i] : !more_follow)) i++;
        if (i > first) {
            head(s, first, i - first, out_row);
            out_row += i - first;
        } else {
            i++;
        }
    }
    return out_row;
}

/* At most max_rows tokens. */
static int session_rows(gpt_session *s, const int32_t *tokens, const int32_t *seqs, int n,
                        bool more_follow, int out_row) {
    gpt_model *m = s->model;
    const gpt_ops *ops = m->ops;
    size_t bytes = sizeof(int32_t) * (size_t)n;
    for (int i = 0; i < n; i++) s->positions[i] = s->length[seqs[i]]++;
    ops->upload(m->ctx, s->acts.tokens, tokens, bytes);
    ops->upload(m->ctx, s->acts.seqs, seqs, bytes);
    ops->upload(m->ctx, s->acts.positions, s->positions, bytes);
    batch x = {.B = n, .T = 1, .N = n, .session = s};
    bool one_each = !more_follow; /* plain decoding: a token for each sequence */
    for (int i = 1; i < n; i++) one_each &= seqs[i] != seqs[i - 1];
    const int64_t key[] = {(int64_t)(intptr_t)s->arena, s->n_seq, s->n_ctx, n, out_row};
    bool replays = one_each && ops->replay_begin;
    if (replays && ops->replay_begin(m->ctx, key, sizeof key / sizeof *key)) return out_row + n;
    int end;
    do {
        model_forward(m, &s->acts, &x);
        end = heads(s, seqs, n, more_follow, out_row);
    } while (replays && !ops->replay_end(m->ctx));
    return end;
}

void session_step(gpt_session *s, const int32_t *tokens, const int32_t *seqs, int n,
                  float *logits) {
    gpt_model *m = s->model;
    m->ops->ctx_set_workspace(m->ctx, s->workspace);
    model_pack(m);
    int n_logits = 0;
    for (int i = 0; i < n; i += s->max_rows) {
        int rows = n - i < s->max_rows ? n - i : s->max_rows;
        bool more = i + rows < n && seqs[i + rows] == seqs[i + rows - 1];
        n_logits = session_rows(s, tokens + i, seqs + i, rows, more, n_logits);
    }
    m->ops->download(m->ctx, logits, s->acts.logits,
                     sizeof(float) * (size_t)n_logits * (size_t)m->config.vocab_size);
}
