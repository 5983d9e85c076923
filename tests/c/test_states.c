/* States of a session's tokens: the output of the final norm, against float64. */
#include "testing.h"

#include "reference_model.h"

enum { N_SEQ = 3, N_CTX = 17, ROWS = N_SEQ * N_CTX };

/* The tokens of all sequences in steps of pieces (length of each sequence so far, in steps of `piece`): which
 * rows are wanted changes from step to step. */
typedef struct reader {
    gpt_session *session;
    const int32_t *tokens; /* (N_SEQ, N_CTX) */
    const ref_model *m;
    int32_t next[ROWS], seqs[ROWS];
    uint8_t want[ROWS];
    double *expected; /* (number wanted, C) */
    int n, n_wanted;
} reader;

/* Tokens from `at` on of each sequence, at most `piece` of them. */
static void fill(reader *r, int at, int piece, int kind) {
    int C = r->m->c.n_embd;
    r->n = r->n_wanted = 0;
    for (int q = N_SEQ - 1; q >= 0; q--) {
        int end = at + piece < N_CTX ? at + piece : N_CTX;
        for (int t = at; t < end; t++, r->n++) {
            int row = q * N_CTX + t;
            r->next[r->n] = r->tokens[row];
            r->seqs[r->n] = q;
            r->want[r->n] = kind == 1 || (kind == 2 && r->n % 3 != 1);
            if (kind == 0 ? t + 1 == end : r->want[r->n])
                memcpy(r->expected + r->n_wanted++ * C, r->m->norm_f + row * C,
                       (size_t)C * sizeof *r->expected);
        }
    }
}

/* Whatever the pieces, and whichever rows are wanted. Between two steps with states, one gives logits. */
static void check_pieces(reader *r, int piece) {
    int C = r->m->c.n_embd, V = r->m->c.vocab_size;
    float *states = host_floats(ROWS * C), *logits = host_floats(N_SEQ * V);
    for (int at = 0, kind = piece % 3; at < N_CTX; at += piece, kind = (kind + 1) % 4) {
        fill(r, at, piece, kind % 3);
        const uint8_t *want = kind % 3 ? r->want : NULL;
        if (kind == 3) {
            EXPECT_OK(gpt_session_decode(r->session, r->next, r->seqs, NULL, r->n, logits));
            continue;
        }
        EXPECT_OK(gpt_session_states(r->session, r->next, r->seqs, want, r->n, states));
        EXPECT_CLOSE("states", doubles_of(states, r->n_wanted * C), r->expected, r->n_wanted, C,
                     test_tols(2e-5, 0.05));
    }
    for (int q = 0; q < N_SEQ; q++) {
        EXPECT(gpt_session_length(r->session, q) == N_CTX);
        EXPECT_OK(gpt_session_rewind(r->session, q, 0));
    }
}

static void test_reference(void) {
    EACH_PLACE {
        for (int f = 0; f < families_here(); f++) {
            const gpt_config *c = &families[f].config;
            test_case("%s", families[f].name);
            gpt_model *model = new_model(c, 1, 1, 1, 0.0f);
            write_random_params(model, c);
            reader r = {.tokens = random_ints(ROWS, c->vocab_size)};
            ref_model m = ref_model_of(model, c, r.tokens, r.tokens, N_SEQ, N_CTX);
            ref_model_forward(&m);
            r.m = &m;
            r.expected = host_zeros(ROWS * c->n_embd);
            EXPECT_OK(gpt_session_create(model, N_SEQ, N_CTX, GPT_KV_ACTIVATIONS, &r.session));
            static const int pieces[] = {1, 4, N_CTX};
            for (int k = 0; k < TEST_COUNT(pieces); k++) check_pieces(&r, pieces[k]);
            gpt_session_free(r.session);
            gpt_model_free(model);
        }
    }
}

/* A text longer than the pieces in which a session takes it: the last state of each sequence. */
static void test_long_text(void) {
    enum { LONG = 301 };
    gpt_config c = families[1].config;
    c.block_size = LONG;
    c.n_layer = 1;
    EACH_PLACE {
        test_case("%d tokens", LONG);
        gpt_model *model = new_model(&c, 1, 1, 1, 0.0f);
        write_random_params(model, &c);
        int32_t *tokens = random_ints(LONG, c.vocab_size), *seqs = host_ints(LONG);
        ref_model m = ref_model_of(model, &c, tokens, tokens, 1, LONG);
        ref_model_forward(&m);
        gpt_session *session;
        EXPECT_OK(gpt_session_create(model, 1, LONG, GPT_KV_ACTIVATIONS, &session));
        uint8_t *want = (uint8_t *)host_ints(LONG);
        memset(want, 1, LONG);
        float *states = host_floats(LONG * c.n_embd);
        EXPECT_OK(gpt_session_states(session, tokens, seqs, want, LONG, states));
        EXPECT_CLOSE("states", doubles_of(states, LONG * c.n_embd), m.norm_f, LONG, c.n_embd,
                     test_tols(2e-5, 0.05));
        gpt_session_free(session);
        gpt_model_free(model);
    }
}

static void test_arguments(void) {
    EACH_PLACE {
        const gpt_config *c = &families[0].config;
        int32_t token = 1, seq = 0, outside = c->vocab_size;
        uint8_t none = 0;
        float state[64];
        gpt_model *model = new_model(c, 0, 0, 0, 0.0f);
        gpt_session *s;
        EXPECT_OK(gpt_session_create(model, 1, 2, GPT_KV_ACTIVATIONS, &s));
        EXPECT(gpt_session_states(NULL, &token, &seq, NULL, 1, state) == GPT_ERR_ARGUMENT);
        EXPECT(gpt_session_states(s, NULL, &seq, NULL, 1, state) == GPT_ERR_ARGUMENT);
        EXPECT(gpt_session_states(s, &token, NULL, NULL, 1, state) == GPT_ERR_ARGUMENT);
        EXPECT(gpt_session_states(s, &token, &seq, NULL, 1, NULL) == GPT_ERR_ARGUMENT);
        EXPECT(strstr(gpt_last_error(), "states is NULL") != NULL);
        EXPECT(gpt_session_states(s, &outside, &seq, NULL, 1, state) == GPT_ERR_ARGUMENT);
        EXPECT(gpt_session_states(s, &token, &seq, NULL, 0, state) == GPT_ERR_ARGUMENT);
        EXPECT(gpt_session_length(s, 0) == 0);
        EXPECT_OK(gpt_session_states(s, &token, &seq, &none, 1, NULL));
        EXPECT_OK(gpt_session_states(s, &token, &seq, NULL, 1, state));
        EXPECT(gpt_session_states(s, &token, &seq, NULL, 1, state) == GPT_ERR_ARGUMENT);
        EXPECT(gpt_session_length(s, 0) == 2);
        gpt_session_free(s);
        gpt_model_free(model);
    }
}

TEST_API_MAIN({"against float64", test_reference}, {"a long text", test_long_text},
              {"arguments", test_arguments})
