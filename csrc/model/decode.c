/* decode.c: sessions. One step appends any number of tokens to any of the sequences, so prefill,
 * batched decoding and a mixture of both are the same call. */
#include "model.h"

/* A prompt goes through in pieces of this many rows: enough to keep the products efficient, few
 * enough that activations stay small compared with the cache. */
enum { PREFILL_ROWS = 256 };
/* At least so many rows of logits are made at once, so that the head's weights are read once for
 * all rows of a draft in speculative decoding. */
enum { LOGIT_ROWS = 16 };

int session_max_rows(int n_seq, int n_ctx) {
    int rows = n_ctx < PREFILL_ROWS ? n_ctx : PREFILL_ROWS;
    return rows > n_seq ? rows : n_seq;
}

static gpt_shape session_shape(const gpt_model *m, int rows, int n_seq, int n_ctx, int kv) {
    gpt_shape shape = config_shape(&m->config);
    shape.N = rows;
    for (int l = 0; l < m->config.n_layer; l++) {
        int of_layer = cache_rows(&m->config, l, n_seq, n_ctx);
        if (of_layer > shape.n_ctx) shape.T = shape.n_ctx = of_layer;
        if (of_layer < n_ctx) shape.window_rows = of_layer;
    }
    shape.kv_int8 = kv == GPT_KV_INT8;
    shape.lora_rank = m->options.lora.rank;
    shape.dora = dora_rows(&m->options.lora) > 0;
    if (shape.N < dora_rows(&m->options.lora)) shape.N = dora_rows(&m->options.lora);
    return shape;
}

size_t session_plan(const gpt_model *m, int n_seq, int n_ctx, int kv, char *base, gpt_session *s) {
    acts none = {0};
    int rows = session_max_rows(n_seq, n_ctx);
    int few = rows < LOGIT_ROWS ? rows : LOGIT_ROWS, logit_rows = n_seq > few ? n_seq : few;
    acts_shape shape = {.N = rows,
                        .T = n_ctx,
                        .lora = m->options.lora,
                        .n_seq = n_seq,
                        .n_ctx = n_ctx,
                        .kv = kv,
                        .logit_rows = logit_rows};
    size_t bytes = acts_plan(&m->config, m->ops, &shape, base, s ? &s->acts : &none);
    if (s) s->workspace = base + bytes;
    gpt_shape extent = session_shape(m, rows, n_seq, n_ctx, kv);
    extent.n_draws = logit_rows;
    return bytes + m->ops->workspace_bytes(m->ctx, &extent);
}

static const act *row_of(const gpt_model *m, const act *x, int row) {
    return (const char *)x + (size_t)row * (size_t)m->config.n_embd * m->ops->act_bytes;
}

/* The arguments of a step, and its progress. */
typedef struct step {
    const int32_t *tokens, *seqs; /* (n) */
    const uint8_t *want;          /* (n), NULL: the last of each sequence */
    int n;
    int longest;     /* tokens of the longest of its sequences, at its end */
    step_output out; /* the next row's places on the host */
    int held;        /* rows of logits on the device, to be delivered */
    bool drawn;      /* and what was drawn from them */
} step;

static bool wanted(const step *t, int i) {
    if (t->want) return t->want[i];
    return i + 1 == t->n || t->seqs[i + 1] != t->seqs[i];
}

/* ---- draws ---- */

/* How many of the next n draws the device has room for: one at least. */
static int draws_that_fit(const gpt_session *s, const step *t, int n) {
    int64_t first = t->out.draws->adjustments;
    while (n > 1 && t->out.draws[n - 1].adjustments + t->out.draws[n - 1].n_adjustments - first >
                        s->acts.n_adjustments)
        n--;
    return n;
}

/* The settings of the next n draws. */
static void upload_draws(gpt_session *s, const step *t, int n) {
    const gpt_model *m = s->model;
    const sample_row *draws = t->out.draws, *last = draws + n - 1;
    int32_t first = draws->adjustments;
    for (int i = 0; i < n; i++) {
        s->draws[i] = draws[i];
        s->draws[i].adjustments -= first;
    }
    size_t n_adjustments = (size_t)(last->adjustments + last->n_adjustments - first);
    m->ops->upload(m->ctx, s->acts.draws, s->draws, sizeof *draws * (size_t)n);
    if (n_adjustments > 0)
        m->ops->upload(m->ctx, s->acts.adjustments, t->out.adjustments + first,
                       sizeof *t->out.adjustments * n_adjustments);
}

/* Draws from n rows of logits, the first of which is row `first` of those on the device. */
static void draw(gpt_session *s, int first, int n) {
    const gpt_model *m = s->model;
    int stride = logit_stride(&m->config, m->ops);
    sample op = {.results = s->acts.results,
                 .logits = s->acts.logits + (int64_t)first * stride,
                 .rows = s->acts.draws,
                 .adjustments = s->acts.adjustments,
                 .N = n,
                 .V = m->config.vocab_size,
                 .stride = stride};
    m->ops->sample(m->ctx, &op);
}

static void deliver_draws(gpt_session *s, step *t) {
    const gpt_model *m = s->model;
    for (int first = 0, n; first < t->held; first += n) {
        n = t->drawn ? t->held : draws_that_fit(s, t, t->held - first);
        if (!t->drawn) {
            upload_draws(s, t, n);
            draw(s, first, n);
        }
        m->ops->download(m->ctx, t->out.results, s->acts.results,
                         sizeof *t->out.results * (size_t)n);
        t->out.results += n;
        t->out.draws += n;
    }
    t->drawn = false;
}

/* ---- a step ---- */

/* What was asked for of the rows of logits on the device. */
static void deliver(gpt_session *s, step *t) {
    const gpt_model *m = s->model;
    size_t V = (size_t)m->config.vocab_size, stride = (size_t)logit_stride(&m->config, m->ops);
    if (t->held == 0) return;
    if (t->out.logits) {
        m->ops->download_rows(m->ctx, t->out.logits, s->acts.logits, t->held, sizeof(float) * V,
                              sizeof(float) * stride);
        t->out.logits += (size_t)t->held * V;
    } else {
        deliver_draws(s, t);
    }
    t->held = 0;
}

/* The logits of n rows of the final norm, from `first` on. */
static void head(gpt_session *s, step *t, int first, int n) {
    const gpt_model *m = s->model;
    const gpt_config *c = &m->config;
    for (int rows; n > 0; first += rows, n -= rows, t->held += rows) {
        if (t->held == s->acts.logit_rows) deliver(s, t);
        rows = s->acts.logit_rows - t->held < n ? s->acts.logit_rows - t->held : n;
        head_forward op = {.logits = s->acts.logits + (int64_t)t->held * logit_stride(c, m->ops),
                           .x = row_of(m, s->acts.norm_f, first),
                           .wte = m->w.head,
                           .cap = c->logit_cap,
                           .b = m->w.head_b,
                           .N = rows,
                           .C = c->n_embd,
                           .V = c->vocab_size,
                           .Vp = padded_vocab_size(c)};
        m->ops->head_forward(m->ctx, &op);
    }
}

/* n rows of the final norm, from `first` on, to the host. */
static void deliver_states(gpt_session *s, step *t, int first, int n) {
    const gpt_model *m = s->model;
    size_t bytes = (size_t)n * (size_t)m->config.n_embd * m->ops->act_bytes;
    if (n == 0) return;
    m->ops->download(m->ctx, t->out.states, row_of(m, s->acts.norm_f, first), bytes);
    t->out.states = (char *)t->out.states + bytes;
}

/* Neighbours among the wanted rows go through the head together: all of them in plain decoding. */
static void heads(gpt_session *s, step *t, int begin, int n) {
    for (int i = 0, first; i < n; i++) {
        for (first = i; i < n && wanted(t, begin + i);) i++;
        if (t->out.states)
            deliver_states(s, t, first, i - first);
        else
            head(s, t, first, i - first);
    }
}

/* How many rows from begin on go through the model together. A sequence that would be cut begins
 * the next piece, so that its logits do not depend on the sequences before it. */
static int rows_from(const step *t, int begin, int most) {
    int end = begin + most;
    if (end >= t->n) return t->n - begin;
    while (end > begin && t->seqs[end] == t->seqs[end - 1]) end--;
    return end > begin ? end - begin : most;
}

/* Plain decoding: one token for each of some sequences, whose logits are all wanted. */
static bool one_each(const step *t) {
    for (int i = 0; i < t->n; i++)
        if (!wanted(t, i) || (i > 0 && t->seqs[i] == t->seqs[i - 1])) return false;
    return true;
}

/* The rows' tokens, positions and sequences, one after the other. */
static void upload_rows(gpt_session *s, const step *t, int begin, int n) {
    gpt_model *m = s->model;
    int32_t *tokens = s->rows, *positions = tokens + STEP_POSITION * n;
    int32_t *seqs = tokens + STEP_SEQ * n, *in_cache = tokens + STEP_CACHE_POSITION * n;
    int32_t first = INT32_MAX, last = 0;
    bool looks_up = rows_are_looked_up(m);
    for (int i = 0, run; i < n; i += run) { /* the tokens of each sequence */
        for (run = 1; i + run < n && t->seqs[begin + i + run] == t->seqs[begin + i];) run++;
        window_make_room(s, t->seqs[begin + i], run);
    }
    for (int i = 0; i < n; i++) {
        tokens[i] = looks_up ? i : t->tokens[begin + i]; /* then its row of wte_rows */
        seqs[i] = t->seqs[begin + i];
        positions[i] = s->length[seqs[i]]++;
        in_cache[i] = positions[i] - s->first[seqs[i]];
        if (positions[i] > last) last = positions[i];
        if (positions[i] < first) first = positions[i];
    }
    rope_reach(m, &s->acts, first, last + 1, t->longest);
    if (looks_up && rows_look_up(m, &s->acts, t->tokens + begin, n) != GPT_OK)
        m->interrupted = m->lost_rows = true;
    m->ops->upload(m->ctx, s->acts.tokens, s->rows, STEP_INTS * sizeof *s->rows * (size_t)n);
    s->acts.positions = s->acts.tokens + STEP_POSITION * n;
    s->acts.seqs = s->acts.tokens + STEP_SEQ * n;
    s->acts.cache_positions = s->acts.tokens + STEP_CACHE_POSITION * n;
}

/* Tokens begin to begin + n - 1 of the step, at most max_rows. */
static void session_rows(gpt_session *s, step *t, int begin, int n) {
    gpt_model *m = s->model;
    const gpt_ops *ops = m->ops;
    bool states = t->out.states, draws = !states && !t->out.logits;
    upload_rows(s, t, begin, n);
    batch x = {.B = n, .T = 1, .N = n, .session = s};
    bool same;
    const gpt_adapter *adapter = adapter_of_all(s, t->seqs + begin, n, &same);
    int64_t numbers = !adapter ? 0 : adapter->arena ? (int64_t)(intptr_t)adapter->arena : -1;
    const int64_t key[] = {
        (int64_t)(intptr_t)s->arena, s->n_seq, s->n_ctx, s->kv, n, draws, numbers};
    bool replays = ops->replay_begin && !states && n == t->n && one_each(t) && same &&
                   (!draws || draws_that_fit(s, t, n) == n);
    if (replays && draws) upload_draws(s, t, n);
    t->drawn = replays && draws;
    _Static_assert(sizeof key <= GPT_REPLAY_KEY * sizeof *key, "GPT_REPLAY_KEY is too small");
    if (replays && ops->replay_begin(m->ctx, key, sizeof key / sizeof *key)) {
        t->held = n;
        return;
    }
    do {
        t->held = replays ? 0 : t->held;
        model_forward(m, &s->acts, &x);
        if (!m->interrupted) heads(s, t, begin, n);
        if (t->drawn) draw(s, 0, n);
    } while (replays && !ops->replay_end(m->ctx));
}

static int longest_after(const gpt_session *s, const int32_t *seqs, int n) {
    int longest = 0;
    for (int i = 0, added = 0; i < n; i++) {
        added = i > 0 && seqs[i] == seqs[i - 1] ? added + 1 : 1;
        int length = s->length[seqs[i]] + added;
        if (length > longest) longest = length;
    }
    return longest;
}

/* Of a step that has stopped, the first n tokens leave the session; with them a sequence whose cache no longer
 * has what they were appended to. */
static void take_back(gpt_session *s, const int32_t *seqs, int n) {
    for (int i = 0; i < n; i++) s->length[seqs[i]]--;
    for (int i = 0; i < n; i++)
        if (!window_reaches(s, seqs[i], s->length[seqs[i]])) window_rewind(s, seqs[i], 0);
}

void session_step(gpt_session *s, const int32_t *tokens, const int32_t *seqs, const uint8_t *want,
                  int n, const step_output *out) {
    gpt_model *m = s->model;
    step t = {.tokens = tokens,
              .seqs = seqs,
              .want = want,
              .n = n,
              .longest = longest_after(s, seqs, n),
              .out = *out};
    m->ops->ctx_set_workspace(m->ctx, s->workspace);
    model_pack(m);
    dora_measure(m);
    for (int begin = 0, rows; begin < n && !m->interrupted; begin += rows) {
        rows = rows_from(&t, begin, s->max_rows);
        session_rows(s, &t, begin, rows);
        if (m->interrupted) take_back(s, seqs, begin + rows);
    }
    if (!m->interrupted) deliver(s, &t);
}

/* Copies the first `length` rows of each head of a cache, where there is one. */
static void copy_rows(const gpt_session *s, char *cache, size_t row, int cache_rows, int from,
                      int to, int length) {
    const gpt_model *m = s->model;
    int heads = m->config.n_kv_head;
    size_t head = row * (size_t)cache_rows;
    for (int h = 0; cache && h < heads; h++)
        m->ops->copy(m->ctx, cache + head * (size_t)(to * heads + h),
                     cache + head * (size_t)(from * heads + h), row * (size_t)length);
}

void session_fork(gpt_session *s, int from, int to, int length) {
    const gpt_model *m = s->model;
    size_t row = cache_row_bytes(s);
    s->first[to] = s->first[from];
    window_rewind(s, to, length);
    if (from == to || length == 0) return;
    for (int l = 0; l < m->config.n_layer; l++) {
        const layer_acts *la = &s->acts.layers[l];
        int rows = la->cache_rows, n = length - (rows < s->n_ctx ? s->first[from] : 0);
        copy_rows(s, la->cache_k, row, rows, from, to, n);
        copy_rows(s, la->cache_v, row, rows, from, to, n);
        copy_rows(s, (char *)la->scale_k, sizeof(float), rows, from, to, n);
        copy_rows(s, (char *)la->scale_v, sizeof(float), rows, from, to, n);
    }
}
