/* Sessions through gpt.h: decoding with a KV cache gives the logits of the whole text. */
#include "testing.h"

#include "models.h"

/* ---- sessions ---- */

/* Sequences of one session, what they hold, and the logits they must give. */
typedef struct texts {
    const gpt_config *c;
    gpt_model *model;
    gpt_session *session;
    int n_seq, n_ctx;
    int32_t *tokens; /* (n_seq, n_ctx) */
    double *want;    /* (n_seq, n_ctx, V) */
    int *lengths;    /* (n_seq) */
} texts;

static texts new_texts(gpt_model *model, const gpt_config *c, int n_seq, int n_ctx) {
    texts t = {.c = c, .model = model, .n_seq = n_seq, .n_ctx = n_ctx};
    t.tokens = random_ints(n_seq * n_ctx, c->vocab_size);
    int *lengths = host_ints(n_seq);
    t.lengths = lengths;
    t.want = read_logits(model, c, t.tokens, n_seq, n_ctx);
    EXPECT_OK(gpt_session_create(model, n_seq, n_ctx, GPT_KV_ACTIVATIONS, &t.session));
    return t;
}

/* Appends the next counts[s] tokens of each sequence s, in the order given, and compares the logits
 * with those of the whole text: after the last of each, or after every third, all, or none of them. */
static void decode(texts *t, const int *order, const int *counts, int n_order) {
    int n = 0, n_logits = 0, V = t->c->vocab_size, which = random_below(4);
    int32_t *tokens = host_ints(t->n_seq * t->n_ctx), *seqs = host_ints(t->n_seq * t->n_ctx);
    uint8_t *wanted = (uint8_t *)host_ints(t->n_seq * t->n_ctx);
    double *want = host_zeros((int64_t)t->n_seq * t->n_ctx * V);
    for (int k = 0; k < n_order; k++) {
        int s = order[k];
        for (int i = 0; i < counts[k]; i++, n++) {
            const double *row = t->want + ((int64_t)s * t->n_ctx + t->lengths[s]) * V;
            seqs[n] = s;
            tokens[n] = t->tokens[s * t->n_ctx + t->lengths[s]++];
            wanted[n] = which == 1 ? n % 3 == 0 : which == 2 ? 255 : 0;
            if (which == 0 ? i + 1 == counts[k] : wanted[n])
                memcpy(want + (int64_t)n_logits++ * V, row, (size_t)V * sizeof *row);
        }
    }
    if (n == 0) return;
    float *logits = n_logits ? host_floats((int64_t)n_logits * V) : NULL;
    EXPECT_OK(gpt_session_decode(t->session, tokens, seqs, which ? wanted : NULL, n, logits));
    if (n_logits > 0)
        EXPECT_CLOSE("logits", doubles_of(logits, (int64_t)n_logits * V), want, n_logits, V,
                     test_tols(2e-5, 0.1));
    for (int s = 0; s < t->n_seq; s++) EXPECT(gpt_session_length(t->session, s) == t->lengths[s]);
}

/* Pieces of random length of some sequences in a random order, until all are full. */
static void decode_ragged(texts *t, int most) {
    int order[8], counts[8];
    for (;;) {
        int left = 0, first = random_below(t->n_seq), n = 1 + random_below(t->n_seq);
        for (int k = 0; k < n; k++) {
            order[k] = (first + k) % t->n_seq;
            counts[k] = random_below(most + 1);
            int room = t->n_ctx - t->lengths[order[k]];
            if (counts[k] > room) counts[k] = room;
        }
        decode(t, order, counts, n);
        for (int s = 0; s < t->n_seq; s++) left += t->n_ctx - t->lengths[s];
        if (left == 0) return;
    }
}

static void rewind_to(texts *t, int s, int length) {
    EXPECT_OK(gpt_session_rewind(t->session, s, length));
    t->lengths[s] = length;
    EXPECT(gpt_session_length(t->session, s) == length);
}

/* Other tokens after a rewind: what was there must be forgotten. */
static void check_rewind(texts *t) {
    for (int s = 0; s < t->n_seq; s++) {
        int length = s == 0 ? 0 : t->n_ctx / (s + 1);
        rewind_to(t, s, length);
        for (int i = length; i < t->n_ctx; i++) {
            t->tokens[s * t->n_ctx + i] = random_below(t->c->vocab_size);
        }
    }
    t->want = read_logits(t->model, t->c, t->tokens, t->n_seq, t->n_ctx);
    decode_ragged(t, 6);
    rewind_to(t, 0, t->n_ctx);
}

/* A copy of any length continues as its original does, and then differently, and so does the
 * original. */
static void check_fork(texts *t) {
    int n_ctx = t->n_ctx, V = t->c->vocab_size;
    static const int lengths[] = {0, 1, 7, 20};
    for (int k = 0; k < TEST_COUNT(lengths); k++) {
        int length = lengths[k], from = k % t->n_seq, to = (k + 1) % t->n_seq;
        EXPECT_OK(gpt_session_fork(t->session, from, to, length));
        EXPECT_OK(gpt_session_fork(t->session, from, from, length));
        t->lengths[from] = t->lengths[to] = length;
        memcpy(t->tokens + to * n_ctx, t->tokens + from * n_ctx, sizeof(int32_t) * (size_t)length);
        for (int i = length; i < n_ctx; i++) t->tokens[to * n_ctx + i] = random_below(V);
        t->want = read_logits(t->model, t->c, t->tokens, t->n_seq, n_ctx);
        decode_ragged(t, 4);
    }
}

/* A cache in int8: a copy of a prompt, a rewind and many rows at once give the logits of one token after the
 * other, which are near those of an exact cache; and it takes a quarter of float32's memory, or half of bf16's,
 * and 4 bytes a vector. */
static void test_int8(void) {
    enum { N_SEQ = 2, N_CTX = 21, FORKED = 13 };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            int V = c->vocab_size, HS = c->head_size ? c->head_size : c->n_embd / c->n_head;
            test_case("%s", families[f].name);
            gpt_model *model = new_model(c, 0, 1, N_CTX, 0.0f);
            write_random_params(model, c);
            gpt_session *s;
            EXPECT_OK(gpt_session_create(model, N_SEQ, N_CTX, GPT_KV_INT8, &s));
            uint64_t exact_bytes, bytes;
            EXPECT_OK(gpt_session_bytes(model, 64, N_CTX, GPT_KV_ACTIVATIONS, &exact_bytes));
            EXPECT_OK(gpt_session_bytes(model, 64, N_CTX, GPT_KV_INT8, &bytes));
            double vectors = 2.0 * c->n_layer * 64 * N_CTX * c->n_kv_head;
            double saved = vectors * (HS * ((double)test.act_bytes - 1) - 4);
            EXPECT_NEAR("bytes", (double)exact_bytes - (double)bytes, saved,
                        8.0 * 256 * c->n_layer + 3 * 256 * HS * 4.0);
            int32_t *tokens = random_ints(N_CTX, V), seqs[N_CTX] = {0};
            uint8_t want[N_CTX];
            memset(want, 1, sizeof want);
            float *one = host_floats(N_CTX * V), *all = host_floats(N_CTX * V);
            float *forked = host_floats(V);
            for (int i = 0; i < N_CTX; i++)
                EXPECT_OK(gpt_session_decode(s, tokens + i, seqs, NULL, 1, one + i * V));
            double *exact = read_logits(model, c, tokens, 1, N_CTX);
            EXPECT_CLOSE("near the exact cache", doubles_of(one, N_CTX * V), exact, N_CTX, V,
                         test_tols(0.05, 0.1));
            EXPECT_OK(gpt_session_rewind(s, 0, 0));
            EXPECT_OK(gpt_session_decode(s, tokens, seqs, want, N_CTX, all));
            EXPECT_CLOSE("at once", doubles_of(all, N_CTX * V), doubles_of(one, N_CTX * V), N_CTX,
                         V, test_tols(2e-2, 0.1));
            EXPECT_OK(gpt_session_fork(s, 0, 1, FORKED));
            EXPECT_OK(gpt_session_rewind(s, 0, FORKED));
            seqs[0] = 1;
            EXPECT_OK(gpt_session_decode(s, tokens + FORKED, seqs, NULL, 1, forked));
            seqs[0] = 0;
            EXPECT_OK(gpt_session_decode(s, tokens + FORKED, seqs, NULL, 1, all));
            EXPECT_SAME("of a copy", doubles_of(forked, V), doubles_of(all, V), V);
            EXPECT(gpt_session_create(model, N_SEQ, N_CTX, 2, &s) == GPT_ERR_ARGUMENT);
            EXPECT(strstr(gpt_last_error(), "kv is 2") != NULL);
            gpt_session_free(s);
            gpt_model_free(model);
        }
    }
}

static void test_sessions(void) {
    enum { N_SEQ = 3, N_CTX = 21 };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            static const int pieces[] = {1, 4, N_CTX};
            const gpt_config *c = &families[f].config;
            /* With short sizes a family has one at each place. */
            int step = test_step(TEST_COUNT(pieces));
            for (int k = (f + place.at) % step; k < TEST_COUNT(pieces); k += step) {
                test_case("%s, up to %d tokens at once", families[f].name, pieces[k]);
                gpt_model *model = new_model(c, 0, N_SEQ, N_CTX, 0.0f);
                write_random_params(model, c);
                texts t = new_texts(model, c, N_SEQ, N_CTX);
                decode_ragged(&t, pieces[k]);
                check_rewind(&t);
                check_fork(&t);
                gpt_session_free(t.session);
                gpt_model_free(model);
            }
        }
    }
}

/* Prompts longer than the pieces in which a session takes them, with sequences that end just
 * before, at and after a border of 256 rows, in one call. */
static void test_long_prompts(void) {
    static const int counts[][4] = {{300, 300, 300, 300}, {255, 1, 256, 1},   {256, 256, 0, 300},
                                    {257, 300, 1, 2},     {1, 255, 299, 300}, {254, 1, 1, 1}};
    enum { N_SEQ = 4, N_CTX = 300 };
    static const int order[] = {2, 0, 3, 1};
    gpt_config c = families[1].config;
    c.block_size = N_CTX;
    c.n_layer = 1;
    EACH_PLACE {
        gpt_model *model = new_model(&c, 0, N_SEQ, 0, 0.0f);
        test_case("prompts of up to %d tokens", N_CTX);
        write_random_params(model, &c);
        texts t = new_texts(model, &c, N_SEQ, 0 + N_CTX);
        for (int k = 0; k < TEST_COUNT(counts); k++) {
            decode(&t, order, counts[k], N_SEQ);
            for (int s = 0; s < N_SEQ; s++) rewind_to(&t, s, 0);
        }
        gpt_session_free(t.session);
        gpt_model_free(model);
    }
}

/* A prompt that does not fit into a piece with another begins the next one: in bf16 it gets the bits
 * that it would get alone. (In fp32 a product of few rows may be summed in another order.) */
static void test_several_prompts(void) {
    enum { N_SEQ = 2, N_CTX = 300, OTHERS = 100, OWN = 200 };
    gpt_config c = families[1].config;
    c.block_size = N_CTX;
    EACH_PLACE {
        test_case("%d tokens after %d", OWN, OTHERS);
        gpt_model *model = new_model(&c, 0, 0, 0, 0.0f);
        gpt_session *session;
        write_random_params(model, &c);
        EXPECT_OK(gpt_session_create(model, N_SEQ, N_CTX, GPT_KV_ACTIVATIONS, &session));
        int32_t *tokens = random_ints(OTHERS + OWN, c.vocab_size);
        int32_t *seqs = host_ints(OTHERS + OWN);
        for (int i = 0; i < OTHERS + OWN; i++) seqs[i] = i < OTHERS ? 1 : 0;
        float *alone = host_floats(c.vocab_size), *both = host_floats(N_SEQ * c.vocab_size);
        EXPECT_OK(gpt_session_decode(session, tokens + OTHERS, seqs + OTHERS, NULL, OWN, alone));
        EXPECT_OK(gpt_session_rewind(session, 0, 0));
        EXPECT_OK(gpt_session_decode(session, tokens, seqs, NULL, OTHERS + OWN, both));
        if (test.act_bytes == 2)
            EXPECT_SAME("logits", doubles_of(both + c.vocab_size, c.vocab_size),
                        doubles_of(alone, c.vocab_size), c.vocab_size);
        else
            EXPECT_CLOSE("logits", doubles_of(both + c.vocab_size, c.vocab_size),
                         doubles_of(alone, c.vocab_size), 1, c.vocab_size, 2e-5);
        gpt_session_free(session);
        gpt_model_free(model);
    }
}

/* The logits of a text do not depend on the other texts of the batch: to the bit, where vectors multiply
 * (on a CPU, but for AMX). */
static void test_several_texts(void) {
    enum { N_SEQ = 5, STEPS = 4, N_CTX = N_SEQ + STEPS };
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            int V = c->vocab_size, exact = place.options.device == GPT_DEVICE_CPU;
            if (test.act_bytes == 2 && strcmp(gpt_cpu_level(), "amx") == 0) exact = 0;
            test_case("%s", families[f].name);
            gpt_model *model = new_model(c, 0, 0, 0, 0.0f);
            write_random_params(model, c);
            gpt_session *session;
            EXPECT_OK(gpt_session_create(model, N_SEQ, N_CTX, GPT_KV_ACTIVATIONS, &session));
            int32_t *tokens = random_ints(N_SEQ * N_CTX, V), *step = host_ints(N_SEQ * N_SEQ);
            int32_t *seqs = host_ints(N_SEQ * N_SEQ);
            float *together = host_floats(STEPS * N_SEQ * V), *alone = host_floats(V);
            for (int t = 0; t < STEPS; t++) { /* prompts of 1 to N_SEQ tokens, then one each */
                int n = 0;
                for (int q = 0; q < N_SEQ; q++) {
                    int at = gpt_session_length(session, q), count = t == 0 ? q + 1 : 1;
                    for (int i = 0; i < count; i++, n++)
                        seqs[n] = q, step[n] = tokens[q * N_CTX + at + i];
                }
                EXPECT_OK(
                    gpt_session_decode(session, step, seqs, NULL, n, together + t * N_SEQ * V));
            }
            for (int q = 0; q < N_SEQ; q++) {
                EXPECT_OK(gpt_session_rewind(session, q, 0));
                for (int i = 0; i < N_SEQ; i++) seqs[i] = q;
                for (int t = 0, at = 0, count; t < STEPS; t++, at += count) {
                    count = t == 0 ? q + 1 : 1;
                    EXPECT_OK(gpt_session_decode(session, tokens + q * N_CTX + at, seqs, NULL,
                                                 count, alone));
                    double *got = doubles_of(alone, V);
                    double *want = doubles_of(together + (t * N_SEQ + q) * V, V);
                    if (exact)
                        EXPECT_SAME("logits", got, want, V);
                    else
                        EXPECT_CLOSE("logits", got, want, 1, V, test_tols(2e-5, 0.1));
                }
            }
            gpt_session_free(session);
            gpt_model_free(model);
        }
    }
}

/* Sessions share the model's weights and nothing else: two of them, and training and evaluation in
 * between, do not disturb each other. */
static void test_several_sessions(void) {
    enum { N_SEQ = 2, N_CTX = 9 };
    EACH_PLACE {
        const gpt_config *c = &families[2].config;
        test_case("%s", families[2].name);
        gpt_model *model = new_model(c, 1, N_SEQ, N_CTX, 0.0f);
        write_random_params(model, c);
        texts one = new_texts(model, c, N_SEQ, N_CTX), two = new_texts(model, c, N_SEQ, N_CTX);
        static const int order[] = {0, 1}, counts[] = {2, 1};
        for (int k = 0; k < 4; k++) {
            float loss;
            decode(&one, order, counts, 2);
            EXPECT_OK(gpt_model_backward(model, one.tokens, two.tokens, N_SEQ, N_CTX, 1.0f, &loss));
            decode(&two, order, counts, 2);
            EXPECT_OK(gpt_model_loss(model, one.tokens, two.tokens, 1, N_CTX, &loss, NULL));
        }
        gpt_session_free(one.session);
        gpt_session_free(two.session);
        gpt_session_free(NULL);
        gpt_model_free(model);
    }
}

/* Layers with windows keep the end of a long text. The session's logits are those of the whole text: for
 * prompts in pieces, for single tokens, for copies and after rewinding. A rewind too far back is refused, and
 * leaves the session as it was. */
static void check_long_text(gpt_model *model, const gpt_config *c, int kv) {
    enum { N_SEQ = 2, N_CTX = 640, FIRST = 600 };
    int V = c->vocab_size;
    gpt_session *s;
    int32_t *tokens = random_ints(N_CTX, V), *seqs = host_ints(N_CTX);
    for (int i = 0; i < N_CTX; i++) seqs[i] = 1;
    double *want = read_logits(model, c, tokens, 1, N_CTX);
    float *logits = host_floats(V);
    double tol = kv == GPT_KV_INT8 ? 0.1 : test_tols(2e-5, 0.1);
    EXPECT_OK(gpt_session_create(model, N_SEQ, N_CTX, kv, &s));
    for (int at = 0, k = 0, n; at < FIRST; at += n) {
        /* Up to what fits; then a token that needs room, and sees rows that have moved. */
        static const int pieces[] = {150, 1, 40, 250, 7, 1, 1, 50, 1};
        n = pieces[k++ % TEST_COUNT(pieces)];
        if (at + n > FIRST) n = FIRST - at;
        EXPECT_OK(gpt_session_decode(s, tokens + at, seqs + at, NULL, n, logits));
        EXPECT_CLOSE("logits", doubles_of(logits, V), want + (int64_t)(at + n - 1) * V, 1, V, tol);
    }
    EXPECT(!gpt_session_reaches(s, 1, 100) && !gpt_session_reaches(s, 1, FIRST + 1));
    EXPECT(gpt_session_reaches(s, 1, 0) && gpt_session_reaches(s, 1, FIRST - 64));
    EXPECT(gpt_session_rewind(s, 1, 100) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_session_fork(s, 1, 0, 100) == GPT_ERR_ARGUMENT);
    EXPECT(gpt_session_length(s, 1) == FIRST && gpt_session_length(s, 0) == 0);
    EXPECT_OK(gpt_session_fork(s, 1, 0, FIRST - 30));
    EXPECT_OK(gpt_session_rewind(s, 1, FIRST - 64));
    for (int seq = 0; seq < N_SEQ; seq++) {
        int at = gpt_session_length(s, seq), n = N_CTX - at;
        for (int i = 0; i < N_CTX; i++) seqs[i] = seq;
        EXPECT_OK(gpt_session_decode(s, tokens + at, seqs, NULL, n, logits));
        EXPECT_CLOSE("after it", doubles_of(logits, V), want + (int64_t)(N_CTX - 1) * V, 1, V, tol);
        EXPECT_OK(gpt_session_rewind(s, seq, 0));
        EXPECT_OK(gpt_session_decode(s, tokens, seqs, NULL, 9, logits));
        EXPECT_CLOSE("from 0", doubles_of(logits, V), want + (int64_t)8 * V, 1, V, tol);
    }
    gpt_session_free(s);
}

static void test_windows(void) {
    static const gpt_layer layers[] = {
        {GPT_NORM_RMSNORM, 1, 100.0f, 20},
        {GPT_NORM_RMSNORM, 0, 0.0f, 0},
        {GPT_NORM_RMSNORM, 1, 1000.0f, 33},
    };
    EACH_PLACE {
        for (int k = 0; k < 2; k++) {
            gpt_config c = families[1].config; /* a Llama */
            c.block_size = 5000, c.n_layer = 2 + k, c.window = 33;
            if (k) c.layers = layers;
            test_case("window, %s", k ? "of some layers" : "of all");
            gpt_model *model = new_model(&c, 0, 1, 640, 0.0f);
            write_random_params(model, &c);
            check_long_text(model, &c, k ? GPT_KV_INT8 : GPT_KV_ACTIVATIONS);
            uint64_t bytes, more, row = 2 * (uint64_t)(c.n_kv_head * c.n_embd / c.n_head);
            EXPECT_OK(gpt_session_bytes(model, 4, 1000, GPT_KV_ACTIVATIONS, &bytes));
            EXPECT_OK(gpt_session_bytes(model, 4, 2000, GPT_KV_ACTIVATIONS, &more));
            /* Of all that, the layer without a window, tables of rotations and lists of draws. */
            uint64_t grows = 4 * 1000 * row * test.act_bytes * (uint64_t)k;
            EXPECT(more - bytes >= grows && more - bytes < grows + 1000 * 150);
            gpt_model_free(model);
        }
    }
}

/* A model that only generates needs no batch buffers, and a session may be shorter than it. */
static void test_session_only(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            int n_ctx = c->block_size;
            test_case("%s", families[f].name);
            gpt_model *model = new_model(c, 0, 0, 0, 0.0f), *full = new_model(c, 1, 1, 0, 0.0f);
            write_random_params(full, c);
            param_set values = read_params(full, c, GPT_TENSOR_VALUE);
            write_params(model, &values, GPT_TENSOR_VALUE);
            texts t = {.c = c, .model = model, .n_seq = 1, .n_ctx = n_ctx};
            t.tokens = random_ints(n_ctx, c->vocab_size);
            t.want = read_logits(full, c, t.tokens, 1, n_ctx);
            t.lengths = host_ints(1);
            EXPECT_OK(gpt_session_create(model, 1, 0, GPT_KV_ACTIVATIONS, &t.session));
            decode_ragged(&t, 5);
            gpt_session_free(t.session);
            gpt_model_free(model);
            gpt_model_free(full);
        }
    }
}

/* Draws are gpt_sample's of the logits that decoding gives, whichever rows are wanted and however many
 * there are: also when a step is recorded, and when adjustments take several turns. */
static void test_drawing(void) {
    enum { N_SEQ = 3, N_CTX = 12, STEPS = 5, MOST = N_SEQ * N_CTX };
    EACH_PLACE {
        for (int f = 0; f < 2; f++) {
            const gpt_config *c = &families[f].config;
            int V = c->vocab_size;
            test_case("%s", families[f].name);
            gpt_model *model = new_model(c, 0, 0, 0, 0.0f);
            write_random_params(model, c);
            gpt_session *drawn, *decoded;
            EXPECT_OK(gpt_session_create(model, N_SEQ, N_CTX, GPT_KV_ACTIVATIONS, &drawn));
            EXPECT_OK(gpt_session_create(model, N_SEQ, N_CTX, GPT_KV_ACTIVATIONS, &decoded));
            float *logits = host_floats((int64_t)MOST * V);
            int32_t *tokens = random_ints(MOST, V), seqs[MOST], *history = random_ints(V, V);
            gpt_bias *bias = (gpt_bias *)host_ints(2 * V);
            for (int i = 0; i < V; i++) bias[i] = (gpt_bias){i, (float)random_normal()};
            for (int t = 0; t < STEPS; t++) {
                int n = 0, each = t == 0 ? 4 : 1;
                uint8_t *want = t == 0 ? (uint8_t *)host_ints(MOST) : NULL;
                for (int q = 0; q < N_SEQ; q++)
                    for (int i = 0; i < each; i++, n++) seqs[n] = q;
                for (int i = 0; want && i < n; i++) want[i] = i % 3 != 1;
                gpt_draw draws[MOST] = {{.n_history = 0}};
                for (int i = 0; i < n; i++) {
                    draws[i].sampling = (gpt_sampling){.repetition_penalty = 1.1f,
                                                       .temperature = i % 3 ? 0.9f : 0,
                                                       .typical_p = 1,
                                                       .top_p = 0.95f,
                                                       .seed = 5};
                    draws[i].position = (uint64_t)(t * N_SEQ + i);
                    draws[i].n_top = i % 2 ? -1 : 2;
                    draws[i].history = history, draws[i].n_history = t < 3 ? V : 0;
                    if (t < 3) draws[i].sampling.bias = bias, draws[i].sampling.n_bias = V;
                }
                EXPECT_OK(gpt_session_sample(drawn, tokens, seqs, want, n, draws));
                EXPECT_OK(gpt_session_decode(decoded, tokens, seqs, want, n, logits));
                for (int i = 0, row = 0; i < n; i++) {
                    if (want && !want[i]) continue;
                    const gpt_draw *d = &draws[row];
                    const float *z = logits + (int64_t)row++ * V;
                    int32_t token;
                    float logprob;
                    EXPECT_OK(gpt_sample(z, V, &d->sampling, d->history, d->n_history, d->position,
                                         &token));
                    EXPECT(d->token == token);
                    if (d->n_top < 0) continue;
                    EXPECT_OK(gpt_logprobs(z, V, token, &logprob, 0, NULL, NULL));
                    EXPECT_NEAR("log-probability", d->logprob, logprob, 1e-4);
                    EXPECT(d->top_logprobs[0] >= d->top_logprobs[1]);
                }
            }
            for (int q = 0; q < N_SEQ; q++)
                EXPECT(gpt_session_length(drawn, q) == gpt_session_length(decoded, q));
            gpt_session_free(drawn);
            gpt_session_free(decoded);
            gpt_model_free(model);
        }
    }
}

TEST_API_MAIN({"sessions", test_sessions}, {"int8 cache", test_int8},
              {"long prompts", test_long_prompts}, {"several sessions", test_several_sessions},
              {"several texts", test_several_texts}, {"several prompts", test_several_prompts},
              {"windows", test_windows}, {"session only", test_session_only},
              {"drawing", test_drawing})
