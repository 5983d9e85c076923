/* train.c: logits, losses, gradients and updates of whole batches. */
#include "api.h"

#include <math.h>
#include <string.h>

int check_gathered(const gpt_model *m) {
    if (!m->shard_updated) return GPT_OK;
    return fail(GPT_ERR_ARGUMENT,
                "the parameters of other parts are missing since the update; call "
                "gpt_model_gather");
}

static int check_batch(const gpt_model *m, int B, int T) {
    const gpt_options *o = &m->options;
    if (o->max_batch == 0)
        return fail(GPT_ERR_ARGUMENT, "the model was created with max_batch 0, for sessions only");
    if (B < 1 || B > o->max_batch)
        return fail(GPT_ERR_ARGUMENT, "batch size %d; the model was created for 1 to %d", B,
                    o->max_batch);
    if (T < 1 || T > o->max_seq)
        return fail(GPT_ERR_ARGUMENT, "sequence length %d; the model was created for 1 to %d", T,
                    o->max_seq);
    return check_gathered(m);
}

int check_tokens(const gpt_model *m, const char *what, const int32_t *tokens, int64_t n,
                 int32_t least) {
    int32_t V = m->config.vocab_size;
    for (int64_t i = 0; i < n; i++)
        if (tokens[i] < least || tokens[i] >= V)
            return fail(GPT_ERR_ARGUMENT, "%s %lld is %d; the vocabulary is 0 to %d", what,
                        (long long)i, tokens[i], V - 1);
    return GPT_OK;
}

int check_interrupted(gpt_model *m) {
    if (!m->interrupted) return GPT_OK;
    m->interrupted = false;
    if (m->lost_rows) {
        m->lost_rows = false;
        return GPT_ERR_FILE; /* its sentence is there */
    }
    return fail(GPT_ERR_INTERRUPTED, "interrupted");
}

static int check_targets(const gpt_model *m, const int32_t *targets, int N, int *n_valid) {
    TRY(check_tokens(m, "target", targets, N, -1));
    *n_valid = 0;
    for (int i = 0; i < N; i++) *n_valid += targets[i] >= 0;
    if (*n_valid == 0)
        return fail(GPT_ERR_ARGUMENT, "all targets are -1; a loss needs at least one");
    return GPT_OK;
}

/* Positions of one document or several: 0, or 1 more than those before. The tokens of the longest. */
static int check_positions(const int32_t *positions, int B, int T, int *longest) {
    *longest = 0;
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            int32_t position = positions[b * T + t], before = t ? positions[b * T + t - 1] : -1;
            if (position != 0 && (t == 0 || position != before + 1))
                return fail(
                    GPT_ERR_ARGUMENT,
                    "position %d of sequence %d is %d; it must be 0 where a document begins, "
                    "and else 1 more than the one before",
                    t, b, position);
            if (position >= *longest) *longest = position + 1;
        }
    return GPT_OK;
}

int gpt_model_documents(gpt_model *model, const int32_t *positions, int B, int T) {
    REQUIRE_MODEL(model);
    REQUIRE(positions);
    model->documents_B = model->documents_T = 0;
    model->forward_B = model->forward_T = 0;
    TRY(check_batch(model, B, T));
    TRY(check_positions(positions, B, T, &model->documents_longest));
    model->ops->upload(model->ctx, model->acts.documents, positions,
                       sizeof(int32_t) * (size_t)(B * T));
    model->documents_B = B, model->documents_T = T;
    return GPT_OK;
}

/* The documents that were given for this call and no other: they are taken before any other check, so that a
 * call that is refused leaves none to the next. */
static int take_documents(gpt_model *m, int B, int T) {
    int given_B = m->documents_B, given_T = m->documents_T;
    m->acts.positions = given_B ? m->acts.documents : NULL;
    m->documents_B = m->documents_T = 0;
    m->forward_B = m->forward_T = 0; /* whose documents are gone */
    if (given_B && (given_B != B || given_T != T))
        return fail(GPT_ERR_ARGUMENT, "the batch is %d x %d; its documents were given as %d x %d",
                    B, T, given_B, given_T);
    return GPT_OK;
}

int check_trains(const gpt_model *m) {
    if (!m->grads)
        return fail(GPT_ERR_ARGUMENT, "the model was created without training: no gradients");
    return GPT_OK;
}

/* Where rows are looked up, a token is the number of its row among those that are looked up. */
static void number_tokens(gpt_model *m, int N) {
    enum { SOME = 256 };
    int32_t numbers[SOME];
    for (int first = 0, n; first < N; first += n) {
        n = N - first < SOME ? N - first : SOME;
        for (int i = 0; i < n; i++) numbers[i] = first + i;
        m->ops->upload(m->ctx, m->acts.tokens + first, numbers, sizeof *numbers * (size_t)n);
    }
}

static int set_tokens(gpt_model *m, const int32_t *tokens, const int32_t *targets, int B, int T) {
    int N = B * T, longest = m->acts.positions ? m->documents_longest : T;
    size_t bytes = sizeof(int32_t) * (size_t)N;
    m->forward_B = m->forward_T = 0;
    m->ops->ctx_set_workspace(m->ctx, m->workspace);
    model_pack(m);
    dora_measure(m);
    rope_reach(m, &m->acts, 0, longest, longest);
    if (rows_are_looked_up(m)) {
        TRY(rows_look_up(m, &m->acts, tokens, N));
        number_tokens(m, N);
    } else {
        m->ops->upload(m->ctx, m->acts.tokens, tokens, bytes);
    }
    if (targets) m->ops->upload(m->ctx, m->acts.targets, targets, bytes);
    return GPT_OK;
}

/* The mean of acts.losses over the targets that count. */
static int mean_loss(gpt_model *m, int N, int n_valid, float *loss, float *losses) {
    float *host = losses ? losses : m->host_losses;
    m->ops->download(m->ctx, host, m->acts.losses, sizeof(float) * (size_t)N);
    int status = m->ops->sync(m->ctx);
    double sum = 0;
    for (int i = 0; i < N; i++) sum += host[i];
    if (loss) *loss = (float)(sum / n_valid);
    return status;
}

int gpt_model_logits(gpt_model *model, const int32_t *tokens, int B, int T, float *logits) {
    REQUIRE_MODEL(model);
    TRY(take_documents(model, B, T));
    REQUIRE(tokens);
    REQUIRE(logits);
    TRY(check_batch(model, B, T));
    int N = B * T, V = model->config.vocab_size, C = model->config.n_embd;
    size_t stride = (size_t)logit_stride(&model->config, model->ops);
    TRY(check_tokens(model, "token", tokens, N, 0));
    TRY(set_tokens(model, tokens, NULL, B, T));
    batch x = {.B = B, .T = T, .N = N};
    model_forward(model, &model->acts, &x);
    TRY(check_interrupted(model));
    for (int row = 0; row < N; row += model->acts.logit_rows) {
        int n = N - row < model->acts.logit_rows ? N - row : model->acts.logit_rows;
        const char *rows = (const char *)model->acts.norm_f;
        rows += (size_t)row * (size_t)C * model->ops->act_bytes;
        model->ops->head_forward(model->ctx,
                                 &(head_forward){.logits = model->acts.logits,
                                                 .x = rows,
                                                 .wte = model->w.head,
                                                 .cap = model->config.logit_cap,
                                                 .b = model->w.head_b,
                                                 .N = n,
                                                 .C = C,
                                                 .V = V,
                                                 .Vp = padded_vocab_size(&model->config)});
        model->ops->download_rows(model->ctx, logits + (int64_t)row * V, model->acts.logits, n,
                                  sizeof(float) * (size_t)V, sizeof(float) * stride);
    }
    return model->ops->sync(model->ctx);
}

static void classifier_losses(gpt_model *m, int N, int exact) {
    m->ops->classifier_forward(m->ctx, &(classifier_forward){.losses = m->acts.losses,
                                                             .x = m->acts.norm_f,
                                                             .wte = m->w.head,
                                                             .cap = m->config.logit_cap,
                                                             .b = m->w.head_b,
                                                             .targets = m->acts.targets,
                                                             .exact = exact,
                                                             .N = N,
                                                             .C = m->config.n_embd,
                                                             .V = m->config.vocab_size,
                                                             .Vp = padded_vocab_size(&m->config)});
}

int gpt_model_loss(gpt_model *model, const int32_t *tokens, const int32_t *targets, int B, int T,
                   float *loss, float *losses) {
    REQUIRE_MODEL(model);
    TRY(take_documents(model, B, T));
    REQUIRE(tokens);
    REQUIRE(targets);
    TRY(check_batch(model, B, T));
    int N = B * T, n_valid;
    TRY(check_tokens(model, "token", tokens, N, 0));
    TRY(check_targets(model, targets, N, &n_valid));
    TRY(set_tokens(model, tokens, targets, B, T));
    batch x = {.B = B, .T = T, .N = N};
    model_forward(model, &model->acts, &x);
    TRY(check_interrupted(model));
    classifier_losses(model, N, 0);
    return mean_loss(model, N, n_valid, loss, losses);
}

int zero_grads(gpt_model *m) {
    m->ops->zero(m->ctx, m->grads, sizeof(float) * (size_t)m->layout.n_grads);
    m->ops->zero(m->ctx, &m->state->report, sizeof m->state->report);
    m->grads_stale = m->shard_summed = false;
    m->n_micro = 0;
    m->place = (batch_place){0};
    return m->ops->sync(m->ctx);
}

int gpt_model_zero_grads(gpt_model *model) {
    REQUIRE_MODEL(model);
    TRY(check_trains(model));
    drop_sums(model);
    return zero_grads(model);
}

/* The pass of which gradients are added at once is the last one. */
static int begin_sums(gpt_model *m) {
    if (!m->sums.comm) return GPT_OK;
    if (m->sums.had_pass)
        return fail(GPT_ERR_ARGUMENT, "gradients are being added; call gpt_model_all_reduce first");
    m->sums.had_pass = true;
    return GPT_OK;
}

/* After a pass. One that was interrupted leaves no gradients, so that none are sent. */
static int end_pass(gpt_model *m) {
    if (m->interrupted) drop_sums(m);
    m->grads_stale = m->interrupted;
    m->shard_summed = false;
    m->n_micro = m->interrupted ? 0 : m->n_micro + 1;
    return check_interrupted(m);
}

static void forward_backward(gpt_model *m, const batch *x, int64_t micro, float scale) {
    const gpt_ops *ops = m->ops;
    int32_t scale_bits, balance_bits;
    memcpy(&scale_bits, &scale, sizeof scale_bits);
    memcpy(&balance_bits, &x->balance, sizeof balance_bits);
    bool documents = m->acts.positions != NULL;
    const int64_t key[] = {(int64_t)(intptr_t)m->arena,
                           x->B,
                           x->T,
                           x->first,
                           scale_bits,
                           balance_bits,
                           documents,
                           x->row};
    if (m->options.dropout > 0 || m->options.lora.dropout > 0) dropout_draw(m, micro);
    _Static_assert(sizeof key <= GPT_REPLAY_KEY * sizeof *key, "GPT_REPLAY_KEY is too small");
    if (ops->replay_begin && ops->replay_begin(m->ctx, key, sizeof key / sizeof *key)) return;
    do {
        model_forward(m, &m->acts, x);
        model_backward(m, &m->acts, x, scale);
    } while (ops->replay_begin && !ops->replay_end(m->ctx));
}

int gpt_model_backward(gpt_model *model, const int32_t *tokens, const int32_t *targets, int B,
                       int T, float scale, float *loss) {
    REQUIRE_MODEL(model);
    batch_place place = model->place;
    model->place = (batch_place){0};
    TRY(take_documents(model, B, T));
    REQUIRE(tokens);
    REQUIRE(targets);
    TRY(check_trains(model));
    TRY(check_batch(model, B, T));
    int N = B * T, n_valid;
    TRY(check_tokens(model, "token", tokens, N, 0));
    TRY(check_targets(model, targets, N, &n_valid));
    TRY(begin_sums(model));
    if (model->grads_stale) model->n_micro = 0;
    TRY(set_tokens(model, tokens, targets, B, T));
    batch x = {.B = B,
               .T = T,
               .N = N,
               .training = true,
               .first = model->grads_stale,
               .row = place.row,
               .balance = model->config.router_loss * scale};
    forward_backward(model, &x, place.given ? place.micro : model->n_micro, scale / (float)n_valid);
    TRY(end_pass(model));
    return loss ? mean_loss(model, N, n_valid, loss, NULL) : GPT_OK;
}

int gpt_model_forward(gpt_model *model, const int32_t *tokens, const int32_t *targets, int B, int T,
                      float *losses) {
    REQUIRE_MODEL(model);
    TRY(take_documents(model, B, T));
    REQUIRE(tokens);
    REQUIRE(targets);
    REQUIRE(losses);
    TRY(check_trains(model));
    TRY(check_batch(model, B, T));
    int N = B * T, n_valid;
    TRY(check_tokens(model, "token", tokens, N, 0));
    TRY(check_targets(model, targets, N, &n_valid));
    if (model->grads_stale) model->n_micro = 0;
    TRY(set_tokens(model, tokens, targets, B, T));
    batch x = {.B = B, .T = T, .N = N, .training = true};
    if (model->options.dropout > 0 || model->options.lora.dropout > 0)
        dropout_draw(model, model->n_micro);
    model_forward(model, &model->acts, &x);
    TRY(check_interrupted(model));
    classifier_losses(model, N, 1);
    TRY(mean_loss(model, N, n_valid, NULL, losses));
    model->forward_B = B, model->forward_T = T;
    return GPT_OK;
}

int gpt_model_backward_weighted(gpt_model *model, const float *weights, int B, int T) {
    REQUIRE_MODEL(model);
    REQUIRE(weights);
    TRY(check_trains(model));
    if (!model->forward_B || model->forward_B != B || model->forward_T != T)
        return fail(GPT_ERR_ARGUMENT,
                    "weights of %d x %d; call gpt_model_forward with as many tokens just before", B,
                    T);
    int N = B * T;
    for (int i = 0; i < N; i++)
        if (!isfinite(weights[i]))
            return fail(GPT_ERR_ARGUMENT, "weight %d is %g; it must be finite", i, weights[i]);
    TRY(begin_sums(model));
    model->forward_B = model->forward_T = 0;
    model->ops->ctx_set_workspace(model->ctx, model->workspace);
    model->ops->upload(model->ctx, model->acts.weights, weights, sizeof(float) * (size_t)N);
    batch x = {
        .B = B, .T = T, .N = N, .training = true, .first = model->grads_stale, .weighted = true};
    if (model->grads_stale) model->n_micro = 0;
    model_backward(model, &model->acts, &x, 1);
    return end_pass(model);
}

static int check_adamw(const gpt_adamw *a) {
    if (!(a->lr >= 0 && isfinite(a->lr)))
        return fail(GPT_ERR_ARGUMENT, "lr is %g; it must be 0 or above", a->lr);
    if (!(a->beta1 >= 0 && a->beta1 < 1))
        return fail(GPT_ERR_ARGUMENT, "beta1 is %g; it must be at least 0 and below 1", a->beta1);
    if (!(a->beta2 >= 0 && a->beta2 < 1))
        return fail(GPT_ERR_ARGUMENT, "beta2 is %g; it must be at least 0 and below 1", a->beta2);
    if (!(a->eps >= 0 && isfinite(a->eps)))
        return fail(GPT_ERR_ARGUMENT, "eps is %g; it must be 0 or above", a->eps);
    if (!(a->weight_decay >= 0 && isfinite(a->weight_decay)))
        return fail(GPT_ERR_ARGUMENT, "weight_decay is %g; it must be 0 or above", a->weight_decay);
    if (!(a->grad_clip >= 0 && isfinite(a->grad_clip)))
        return fail(GPT_ERR_ARGUMENT, "grad_clip is %g; it must be 0 (off) or above", a->grad_clip);
    return GPT_OK;
}

/* The settings that SGD and Muon share. */
static int check_momentum(float lr, float momentum, float weight_decay, float grad_clip) {
    if (!(lr >= 0 && isfinite(lr)))
        return fail(GPT_ERR_ARGUMENT, "lr is %g; it must be 0 or above", lr);
    if (!(momentum >= 0 && momentum < 1))
        return fail(GPT_ERR_ARGUMENT, "momentum is %g; it must be at least 0 and below 1",
                    momentum);
    if (!(weight_decay >= 0 && isfinite(weight_decay)))
        return fail(GPT_ERR_ARGUMENT, "weight_decay is %g; it must be 0 or above", weight_decay);
    if (!(grad_clip >= 0 && isfinite(grad_clip)))
        return fail(GPT_ERR_ARGUMENT, "grad_clip is %g; it must be 0 (off) or above", grad_clip);
    return GPT_OK;
}

static int check_settings(const gpt_optimizer *o) {
    switch (o->kind) {
    case GPT_OPTIMIZER_ADAMW:
        return check_adamw(&o->adamw);
    case GPT_OPTIMIZER_SGD:
        return check_momentum(o->sgd.lr, o->sgd.momentum, o->sgd.weight_decay, o->sgd.grad_clip);
    case GPT_OPTIMIZER_MUON:
        if (!(o->muon.beta2 >= 0 && o->muon.beta2 < 1))
            return fail(GPT_ERR_ARGUMENT, "beta2 is %g; it must be at least 0 and below 1",
                        o->muon.beta2);
        if (o->muon.cautious != 0 && o->muon.cautious != 1)
            return fail(GPT_ERR_ARGUMENT, "cautious is %d; it must be 0 or 1", o->muon.cautious);
        return check_momentum(o->muon.lr, o->muon.momentum, o->muon.weight_decay,
                              o->muon.grad_clip);
    }
    return fail(GPT_ERR_ARGUMENT, "unknown optimizer %d", o->kind);
}

/* The settings of each kind: one for every kind that has parameters, and none twice. */
static int find_settings(const gpt_model *m, const gpt_optimizer *optimizers, int n,
                         const gpt_optimizer *found[N_OPTIMIZERS]) {
    static const char *const names[N_OPTIMIZERS] = {"", "AdamW", "SGD", "Muon"};
    for (int i = 0; i < n; i++) {
        const gpt_optimizer *o = &optimizers[i];
        TRY(check_settings(o));
        if (found[o->kind])
            return fail(GPT_ERR_ARGUMENT, "there are two settings of %s", names[o->kind]);
        found[o->kind] = o;
    }
    for (int kind = 0; kind < N_OPTIMIZERS; kind++)
        if (m->layout.n_states[kind] && !found[kind])
            return fail(GPT_ERR_ARGUMENT, "there are no settings of %s, which has parameters",
                        names[kind]);
    return GPT_OK;
}

int gpt_model_grads(gpt_model *model, float **grads, int64_t *n) {
    REQUIRE_MODEL(model);
    REQUIRE(grads);
    REQUIRE(n);
    TRY(check_trains(model));
    *grads = model->grads;
    *n = model->layout.n_grads;
    return model->ops->sync(model->ctx);
}

int gpt_model_update(gpt_model *model, const gpt_optimizer *optimizers, int n_optimizers,
                     float *loss, float *grad_norm) {
    const gpt_optimizer *settings[N_OPTIMIZERS] = {NULL};
    REQUIRE_MODEL(model);
    REQUIRE(optimizers);
    TRY(find_settings(model, optimizers, n_optimizers, settings));
    TRY(check_trains(model));
    if (model->n_micro == 0)
        return fail(GPT_ERR_ARGUMENT, "no gradients to apply; call backward first");
    if (model->sums.comm)
        return fail(GPT_ERR_ARGUMENT, "gradients are being added; call gpt_model_all_reduce first");
    if (is_sharded(&model->layout) && !model->shard_summed)
        return fail(GPT_ERR_ARGUMENT, "the state is in %d parts; call gpt_model_all_reduce first",
                    model->layout.n_shards);
    step_report report;
    model->ops->ctx_set_workspace(model->ctx, model->workspace);
    model->forward_B = model->forward_T = 0;
    for (int kind = 0; kind < N_OPTIMIZERS; kind++)
        if (!model->layout.n_states[kind]) settings[kind] = NULL;
    model_update(model, settings);
    model->ops->download(model->ctx, &report, &model->state->report, sizeof report);
    TRY(model->ops->sync(model->ctx));
    if (loss) *loss = report.loss;
    if (grad_norm) *grad_norm = report.grad_norm;
    model->grads_stale = true;
    model->shard_summed = false;
    model->n_micro = 0;
    if (!isfinite(report.grad_norm))
        return fail(GPT_ERR_NUMERIC,
                    "the gradient norm is %g at step %lld: training diverged; try a lower "
                    "learning rate or a longer warm-up",
                    report.grad_norm, (long long)model->step);
    model->step++;
    model->shard_updated = is_sharded(&model->layout);
    return GPT_OK;
}
