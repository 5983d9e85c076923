/* attention_forward, attention_backward, attention_decode. */
#include "testing.h"

#include "reference.h"

typedef struct sizes {
    int B, T, NH, NKV, HS, window;
} sizes;

/* Every T near the border of a tile, every way to group heads, every size of head. */
static const sizes cases[] = {
    {1, 1, 1, 1, 2, 0},    {2, 1, 2, 2, 6, 0},    {3, 2, 4, 2, 16, 0},    {1, 5, 6, 1, 20, 0},
    {2, 5, 3, 3, 64, 0},   {1, 63, 3, 3, 2, 0},   {2, 63, 4, 2, 6, 0},    {1, 64, 2, 2, 16, 0},
    {1, 64, 6, 1, 20, 0},  {1, 65, 1, 1, 128, 0}, {3, 65, 4, 2, 6, 0},    {1, 129, 2, 2, 20, 0},
    {1, 129, 6, 1, 2, 0},  {2, 130, 4, 2, 16, 0}, {1, 130, 1, 1, 64, 0},  {1, 31, 3, 1, 33, 0},
    {1, 257, 1, 1, 6, 0},  {5, 17, 3, 3, 7, 0},   {1, 330, 2, 1, 4, 0},   {2, 300, 2, 2, 5, 0},
    {1, 200, 2, 1, 64, 0}, {1, 129, 2, 2, 40, 0}, {1, 140, 2, 1, 128, 0}, {1, 140, 1, 1, 72, 0},
    {1, 129, 4, 2, 24, 0}, {2, 40, 2, 2, 98, 0},  {1, 530, 4, 2, 32, 0},
};

/* The position of each row (B, T) in its document, NULL: a sequence is one. */
static int32_t *positions;

static int64_t row_size(sizes s) {
    return (int64_t)(s.NH + 2 * s.NKV) * s.HS;
}
static int64_t qkv_size(sizes s) {
    return s.B * s.T * row_size(s);
}
static int64_t out_size(sizes s) {
    return (int64_t)s.B * s.T * s.NH * s.HS;
}
static int64_t lse_size(sizes s) {
    return (int64_t)s.B * s.NH * s.T;
}

static gpt_shape shape_of(sizes s, int training) {
    return (gpt_shape){.N = s.B * s.T,
                       .T = s.T,
                       .C = s.NH * s.HS,
                       .V = 2,
                       .Vp = 2,
                       .NH = s.NH,
                       .NKV = s.NKV,
                       .HS = s.HS,
                       .F = s.HS,
                       .activation = GPT_ACT_GELU,
                       .training = training,
                       .n_params = 1};
}

typedef struct answer {
    double *qkv, *dout;
    double *p, *lse, *out, *dqkv;
} answer;

static answer answer_of(sizes s, const double *qkv, gpt_dropout dropout) {
    answer a = {.qkv = host_copy(qkv, qkv_size(s)), .dout = random_act(out_size(s), 1.0)};
    a.p = host_zeros(lse_size(s) * s.T);
    a.lse = host_zeros(lse_size(s));
    a.out = host_zeros(out_size(s));
    a.dqkv = host_zeros(qkv_size(s));
    ref_attention_forward(a.out, a.lse, a.p, a.qkv, dropout, s.window, positions, s.B, s.T, s.NH,
                          s.NKV, s.HS);
    ref_attention_backward(a.dqkv, a.dout, a.p, a.qkv, dropout, s.B, s.T, s.NH, s.NKV, s.HS);
    return a;
}

static void *device_positions(sizes s) {
    return positions ? device_i32(positions, s.B * s.T) : NULL;
}

static void check_forward(sizes s, const answer *a, gpt_dropout_site dropout, int keep_lse,
                          double tol) {
    gpt_shape shape = shape_of(s, keep_lse);
    void *out = device_act(NULL, out_size(s));
    void *lse = keep_lse ? device_f32(NULL, lse_size(s)) : NULL;
    test_workspace(&shape);
    test.ops->attention_forward(test.ctx,
                                &(attention_forward){.out = out,
                                                     .lse = lse,
                                                     .qkv = device_act(a->qkv, qkv_size(s)),
                                                     .positions = device_positions(s),
                                                     .dropout = device_dropout(dropout),
                                                     .window = s.window,
                                                     .cap = (float)ref_score_cap,
                                                     .B = s.B,
                                                     .T = s.T,
                                                     .NH = s.NH,
                                                     .NKV = s.NKV,
                                                     .HS = s.HS});
    EXPECT_CLOSE("out", read_act(out, out_size(s)), a->out, s.B * s.T, s.NH * s.HS, test_tol(tol));
    if (lse) {
        EXPECT_CLOSE("lse", read_f32(lse, lse_size(s)), a->lse, s.B * s.NH, s.T, test_tol(tol));
    }
}

/* Each head's row is compared by its own size, for gradients of queries, keys and values differ. */
static void expect_dqkv(sizes s, const double *got, const double *want, double tol) {
    int64_t rows = (int64_t)s.B * s.T * (s.NH + 2 * s.NKV);
    /* backward is given out in the element type, and takes from it a mean that nearly cancels. */
    EXPECT_CLOSE("dqkv, by heads", got, want, rows, s.HS, test_tols(tol, fmax(0.1, 60 * tol)));
}

static void check_backward(sizes s, const answer *a, gpt_dropout_site dropout, double tol) {
    gpt_shape shape = shape_of(s, 1);
    void *dqkv = device_act(NULL, qkv_size(s));
    int64_t QKV = (s.NH + 2 * s.NKV) * s.HS;
    double *sums = host_zeros(QKV);
    for (int64_t i = 0; i < QKV; i++) sums[i] = (double)(i % 5); /* to which the op adds */
    void *db = test.ops->sums_attention ? device_f32(sums, QKV) : NULL;
    test_workspace(&shape);
    test.ops->attention_backward(test.ctx,
                                 &(attention_backward){.dqkv = dqkv,
                                                       .db = db,
                                                       .dout = device_act(a->dout, out_size(s)),
                                                       .qkv = device_act(a->qkv, qkv_size(s)),
                                                       .out = device_act(a->out, out_size(s)),
                                                       .lse = device_f32(a->lse, lse_size(s)),
                                                       .positions = device_positions(s),
                                                       .dropout = device_dropout(dropout),
                                                       .window = s.window,
                                                       .cap = (float)ref_score_cap,
                                                       .B = s.B,
                                                       .T = s.T,
                                                       .NH = s.NH,
                                                       .NKV = s.NKV,
                                                       .HS = s.HS});
    const double *got = read_act(dqkv, qkv_size(s));
    expect_dqkv(s, got, a->dqkv, tol);
    if (!db) return;
    for (int64_t i = 0; i < qkv_size(s); i++) sums[i % QKV] += got[i];
    EXPECT_CLOSE("db", read_f32(db, QKV), sums, 1, (int)QKV, test_tol(tol));
}

static void check(sizes s, float p, const double *qkv, double tol, double grad_tol) {
    gpt_dropout_site dropout = host_dropout(p, (uint64_t)s.T);
    answer a = answer_of(s, qkv, dropout_at(dropout));
    EACH_BACKEND {
        if (p == 0.0f) check_forward(s, &a, dropout, 0, tol);
        check_forward(s, &a, dropout, 1, tol);
        check_backward(s, &a, dropout, grad_tol);
    }
}

static void name_case(sizes s, double p, const char *what) {
    test_case("B=%d T=%d NH=%d NKV=%d HS=%d window=%d p=%g%s", s.B, s.T, s.NH, s.NKV, s.HS,
              s.window, p, what);
}

static void test_attention(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        name_case(cases[i], 0.0, "");
        check(cases[i], 0.0f, random_act(qkv_size(cases[i]), 1.0), 5e-6, 1e-5);
    }
}

static void test_dropout(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        float p = i % 2 ? 0.1f : 0.6f;
        name_case(cases[i], p, "");
        check(cases[i], p, random_act(qkv_size(cases[i]), 1.0), 5e-6, 1e-5);
    }
}

/* Windows of one key, around a panel and a tile, and of more than there is. */
static const int windows[] = {1, 5, 15, 16, 17, 33, 63, 64, 65, 128, 300, 1000};
/* In short tests a case meets one window. Of the cases from the first of them on, some are longer than it,
 * and each size of head is among them. */
static int first_case(void) {
    return test_is_short() ? 11 : 0;
}
static int window_of(int i) {
    return (i + (test_is_short() ? 6 : 0)) % TEST_COUNT(windows);
}

static void test_window(void) {
    for (int i = first_case(); i < TEST_COUNT(cases); i++) {
        int step = test_is_short() ? TEST_COUNT(windows) : 4;
        for (int k = window_of(i) % step; k < TEST_COUNT(windows); k += step) {
            float p = (i + k) % 3 ? 0.0f : 0.3f;
            sizes s = cases[i];
            s.window = windows[k];
            name_case(s, p, "");
            check(s, p, random_act(qkv_size(s), 1.0), 5e-6, 1e-5);
        }
    }
}

/* Documents of 1 to `most` rows, from the first row of each sequence on. */
static int32_t *random_documents(sizes s, int most) {
    int32_t *out = host_ints((int64_t)s.B * s.T);
    for (int b = 0; b < s.B; b++)
        for (int t = 0, end = 0, begin = 0; t < s.T; t++) {
            if (t == end) begin = t, end = t + 1 + random_below(most);
            out[b * s.T + t] = t - begin;
        }
    return out;
}

/* Documents that end within panels, within tiles and after several; with windows too. */
static void test_documents(void) {
    static const int most[] = {1, 3, 20, 70, 300};
    for (int i = 0; i < TEST_COUNT(cases); i += test_step(3)) {
        int step = test_is_short() ? TEST_COUNT(most) : 2;
        for (int k = i % step; k < TEST_COUNT(most); k += step) {
            sizes s = cases[i];
            float p = (i + k) % 3 ? 0.0f : 0.3f;
            if ((i + k) % 4 == 0) s.window = 19;
            name_case(s, p, " documents");
            positions = random_documents(s, most[k]);
            check(s, p, random_act(qkv_size(s), 1.0), 5e-6, 1e-5);
        }
    }
    positions = NULL;
}

/* A window as long as the sequence hides nothing: the same bits as without. */
static void test_whole_window(void) {
    sizes s = {2, 130, 4, 2, 16, 0};
    name_case(s, 0.0, " window of T");
    double *qkv = random_act(qkv_size(s), 1.0), *dout = random_act(out_size(s), 1.0);
    gpt_shape shape = shape_of(s, 1);
    EACH_BACKEND {
        double *outs[2], *dqkvs[2];
        for (int k = 0; k < 2; k++) {
            attention_forward forward = {.out = device_act(NULL, out_size(s)),
                                         .lse = device_f32(NULL, lse_size(s)),
                                         .qkv = device_act(qkv, qkv_size(s)),
                                         .window = k ? s.T : 0,
                                         .cap = (float)ref_score_cap,
                                         .B = s.B,
                                         .T = s.T,
                                         .NH = s.NH,
                                         .NKV = s.NKV,
                                         .HS = s.HS};
            attention_backward backward = {.dqkv = device_act(NULL, qkv_size(s)),
                                           .dout = device_act(dout, out_size(s)),
                                           .qkv = forward.qkv,
                                           .out = forward.out,
                                           .lse = forward.lse,
                                           .window = forward.window,
                                           .cap = (float)ref_score_cap,
                                           .B = s.B,
                                           .T = s.T,
                                           .NH = s.NH,
                                           .NKV = s.NKV,
                                           .HS = s.HS};
            test_workspace(&shape);
            test.ops->attention_forward(test.ctx, &forward);
            test.ops->attention_backward(test.ctx, &backward);
            outs[k] = read_act(forward.out, out_size(s));
            dqkvs[k] = read_act(backward.dqkv, qkv_size(s));
        }
        EXPECT_SAME("out", outs[1], outs[0], out_size(s));
        EXPECT_SAME("dqkv", dqkvs[1], dqkvs[0], qkv_size(s));
    }
}

/* Scores of several hundred, of both signs: exponentials overflow unless the maximum is taken off.
 * A score of 500 is known to 500 * 2^-24, which its exponential shows as a relative error. */
static void test_large_scores(void) {
    sizes s = {2, 70, 4, 2, 16, 0};
    name_case(s, 0.0, " large scores");
    double *qkv = random_act(qkv_size(s), 1.0);
    for (int64_t i = 0; i < qkv_size(s); i++) {
        if (i % row_size(s) < (s.NH + s.NKV) * s.HS) qkv[i] = round_act(10.0 * qkv[i]);
    }
    check(s, 0.0f, qkv, 2e-4, 4e-4);
}

/* Keys whose scores rise with their position, by more than exp can hold from one tile to the next,
 * so that the running maximum moves in every tile; and ones whose scores fall, so that the first
 * tile has nearly all. The gradient of a query is a sum of keys up to 80 whose factors cancel, and
 * these are known to 270 * 2^-24. */
static void test_trend(void) {
    for (int sign = -1; sign <= 1; sign += 2) {
        sizes s = {1, 330, 2, 1, 6, 0};
        name_case(s, 0.0, sign > 0 ? " rising" : " falling");
        double *qkv = random_act(qkv_size(s), 0.5);
        for (int t = 0; t < s.T; t++) {
            double *row = qkv + t * row_size(s);
            for (int h = 0; h < s.NH; h++) row[h * s.HS] = round_act(sign * 8.0);
            row[s.NH * s.HS] = round_act(0.25 * t);
        }
        check(s, 0.0f, qkv, 1e-4, 5e-3);
    }
}

/* Later positions must not reach earlier ones: whatever the last row of each sequence holds, the
 * rows before it are what they were. */
static void test_causal(void) {
    sizes s = {2, 67, 4, 2, 16, 0};
    name_case(s, 0.0, " last row changed");
    gpt_dropout none = {0};
    int width = s.NH * s.HS;
    answer a = answer_of(s, random_act(qkv_size(s), 1.0), none);
    double *changed = host_copy(a.qkv, qkv_size(s));
    for (int b = 1; b <= s.B; b++) {
        double *last = changed + (b * s.T - 1) * row_size(s);
        for (int i = 0; i < row_size(s); i++) last[i] = 1024.0;
    }
    gpt_shape shape = shape_of(s, 0);
    EACH_BACKEND {
        void *out = device_act(NULL, out_size(s));
        test_workspace(&shape);
        test.ops->attention_forward(test.ctx,
                                    &(attention_forward){.out = out,
                                                         .qkv = device_act(changed, qkv_size(s)),
                                                         .dropout = (gpt_dropout_site){0},
                                                         .window = s.window,
                                                         .cap = (float)ref_score_cap,
                                                         .B = s.B,
                                                         .T = s.T,
                                                         .NH = s.NH,
                                                         .NKV = s.NKV,
                                                         .HS = s.HS});
        double *got = read_act(out, out_size(s));
        for (int b = 0; b < s.B; b++) {
            int64_t first = (int64_t)b * s.T * width;
            EXPECT_CLOSE("rows before the last", got + first, a.out + first, s.T - 1, width,
                         test_tol(5e-6));
        }
    }
}

/* ---- decode ---- */

/* A schedule decodes the B sequences of an answer to the end: each call takes some of them, in some
 * order, and of each a chunk of its next rows. */
typedef struct call {
    int32_t *seqs, *positions;
    int N;
} call;

/* Chunks of 1 to most rows of sequences that are taken in a random order, some of them left out. */
static call next_call(sizes s, int *lengths, int most) {
    call c = {host_ints(s.B * most), host_ints(s.B * most), 0};
    int first = random_below(s.B), step = random_below(2) ? 1 : s.B - 1;
    for (int k = 0; k < s.B; k++) {
        int seq = (first + k * step) % s.B, rows = 1 + random_below(most);
        if (k > 0 && random_below(3) == 0) continue;
        for (; rows > 0 && lengths[seq] < s.T; rows--) {
            c.seqs[c.N] = seq;
            c.positions[c.N++] = lengths[seq]++;
        }
    }
    return c;
}

static int all_done(sizes s, const int *lengths) {
    for (int b = 0; b < s.B; b++) {
        if (lengths[b] < s.T) return 0;
    }
    return 1;
}

/* Copies the rows that a call takes out of a (B, T, width) tensor. */
static double *take_rows(sizes s, call c, const double *x, int64_t width) {
    double *rows = host_zeros(c.N * width);
    for (int n = 0; n < c.N; n++) {
        const double *row = x + ((int64_t)c.seqs[n] * s.T + c.positions[n]) * width;
        memcpy(rows + n * width, row, (size_t)width * sizeof *rows);
    }
    return rows;
}

/* The caches of n_seq slots, of which sequence b of the answer has slot slots[b]; the others belong
 * to nobody. Rows not yet written are NaN, which must never be read. */
typedef struct caches {
    void *k, *v;
    double *empty;
    int32_t *slots;
    int64_t size;
    int n_seq, n_ctx;
} caches;

static caches new_caches(sizes s, int n_ctx) {
    caches c = {.n_seq = s.B + 2, .n_ctx = n_ctx, .slots = host_ints(s.B)};
    c.size = (int64_t)c.n_seq * s.NKV * n_ctx * s.HS;
    c.empty = host_zeros(c.size);
    for (int64_t i = 0; i < c.size; i++) c.empty[i] = NAN;
    for (int b = 0; b < s.B; b++) c.slots[b] = c.n_seq - 1 - b;
    return c;
}

/* The right content of a cache: keys (part 0) or values (part 1) of the first lengths[b] rows of each
 * sequence b, and what was there before everywhere else. */
static double *want_cache(sizes s, const caches *c, const double *qkv, const int *lengths,
                          int part) {
    double *cache = host_copy(c->empty, c->size);
    for (int b = 0; b < s.B; b++) {
        for (int h = 0; h < s.NKV; h++) {
            for (int t = 0; t < lengths[b]; t++) {
                int64_t from = (b * s.T + t) * row_size(s) + (s.NH + part * s.NKV + h) * s.HS;
                int64_t to = ((int64_t)(c->slots[b] * s.NKV + h) * c->n_ctx + t) * s.HS;
                memcpy(cache + to, qkv + from, (size_t)s.HS * sizeof *cache);
            }
        }
    }
    return cache;
}

/* The call's out (N, NH HS). */
static double *decode_rows(sizes s, const double *qkv, const caches *c, call step) {
    int width = s.NH * s.HS, N = step.N;
    double *rows = take_rows(s, step, qkv, row_size(s));
    int32_t *slots = host_ints(N);
    for (int n = 0; n < N; n++) slots[n] = c->slots[step.seqs[n]];
    void *out = device_act(NULL, (int64_t)N * width);
    test.ops->attention_decode(test.ctx,
                               &(attention_decode){.out = out,
                                                   .cache_k = c->k,
                                                   .cache_v = c->v,
                                                   .qkv = device_act(rows, N * row_size(s)),
                                                   .seqs = device_i32(slots, N),
                                                   .positions = device_i32(step.positions, N),
                                                   .window = s.window,
                                                   .cap = (float)ref_score_cap,
                                                   .N = N,
                                                   .n_ctx = c->n_ctx,
                                                   .NH = s.NH,
                                                   .NKV = s.NKV,
                                                   .HS = s.HS});
    return read_act(out, (int64_t)N * width);
}

static void decode_call(sizes s, const answer *a, const caches *c, call step) {
    int width = s.NH * s.HS;
    double *got = decode_rows(s, a->qkv, c, step), *want = take_rows(s, step, a->out, width);
    EXPECT_CLOSE("out", got, want, step.N, width, test_tol(5e-6));
}

static void check_decode(sizes s, int most, int n_ctx) {
    test_case("decode B=%d T=%d NH=%d NKV=%d HS=%d window=%d chunk=%d n_ctx=%d", s.B, s.T, s.NH,
              s.NKV, s.HS, s.window, most, n_ctx);
    answer a = answer_of(s, random_act(qkv_size(s), 1.0), (gpt_dropout){0});
    caches c = new_caches(s, n_ctx);
    gpt_shape shape = shape_of(s, 0);
    shape.N = s.B * most, shape.T = shape.n_ctx = n_ctx;
    uint64_t counter = test.counter;
    EACH_BACKEND {
        int *lengths = host_ints(s.B);
        test.counter = counter; /* the same schedule for all */
        c.k = device_act(NULL, c.size), c.v = device_act(NULL, c.size);
        test_workspace(&shape);
        for (int k = 0; !all_done(s, lengths); k++) {
            call step = next_call(s, lengths, most);
            if (step.N > 0) decode_call(s, &a, &c, step);
            if (k % 7 && !all_done(s, lengths)) continue;
            EXPECT_SAME("cache_k", read_act(c.k, c.size), want_cache(s, &c, a.qkv, lengths, 0),
                        c.size);
            EXPECT_SAME("cache_v", read_act(c.v, c.size), want_cache(s, &c, a.qkv, lengths, 1),
                        c.size);
        }
    }
}

static void test_decode(void) {
    for (int i = 0; i < TEST_COUNT(cases); i += test_step(2)) {
        sizes s = cases[i];
        check_decode(s, s.T > 100 ? s.T : 70, s.T + i % 3);
        if (s.T < 10) check_decode(s, 1, s.T + 1);
    }
    check_decode((sizes){3, 65, 4, 2, 6, 0}, 9, 65);
    check_decode((sizes){1, 70, 2, 1, 20, 0}, 1, 71);
    check_decode((sizes){4, 19, 3, 3, 16, 0}, 3, 300);
    check_decode((sizes){2, 330, 2, 1, 6, 0}, 100, 331);
    /* Whole tiles that start anywhere, and tiles of two sequences. */
    check_decode((sizes){2, 200, 4, 2, 64, 0}, 130, 201);
    check_decode((sizes){1, 190, 1, 1, 128, 0}, 100, 190);
}

static void test_decode_window(void) {
    for (int i = first_case(); i < TEST_COUNT(cases); i++) {
        sizes s = cases[i];
        s.window = windows[window_of(i)];
        check_decode(s, s.T > 100 ? s.T : 70, s.T + i % 3);
    }
    check_decode((sizes){3, 65, 4, 2, 6, 7}, 9, 65);
    check_decode((sizes){4, 19, 3, 3, 16, 3}, 3, 300);
    check_decode((sizes){2, 330, 2, 1, 6, 20}, 100, 331);
    check_decode((sizes){2, 200, 4, 2, 64, 70}, 130, 201);
    check_decode((sizes){1, 190, 1, 1, 128, 10}, 100, 190);
}

/* Soft caps that bend most scores, or few; with windows, dropout and documents, and in decoding. */
static void test_soft_cap(void) {
    static const double caps[] = {0.5, 4.0, 50.0};
    for (int i = 0; i * test_step(2) < TEST_COUNT(cases); i++) {
        sizes s = cases[i * test_step(2)];
        float p = i % 3 ? 0.0f : 0.3f;
        if (i % 2) s.window = windows[i % TEST_COUNT(windows)];
        ref_score_cap = caps[i % TEST_COUNT(caps)];
        test_case("soft cap %g, case %d", ref_score_cap, i);
        if (i % 5 == 4) positions = random_documents(s, 20);
        check(s, p, random_act(qkv_size(s), 1.0), 5e-6, 1e-5);
        positions = NULL;
        if (i % 4 == 0) check_decode(s, s.T > 100 ? s.T : 70, s.T + i % 3);
        if (i % 4 == 2) check_decode(s, 9, s.T);
    }
    check_decode((sizes){1, 90, 10, 1, 256, 20}, 50, 2190);
    /* Scores that tanh takes to its ends. */
    sizes s = {1, 70, 2, 1, 16, 0};
    ref_score_cap = 20.0;
    name_case(s, 0.0, " large scores with a soft cap");
    double *qkv = random_act(qkv_size(s), 1.0);
    for (int64_t i = 0; i < qkv_size(s); i++)
        if (i % row_size(s) < (s.NH + s.NKV) * s.HS) qkv[i] = round_act(10.0 * qkv[i]);
    check(s, 0.0f, qkv, 2e-4, 4e-4);
    ref_score_cap = 0.0;
}

/* Heads of every number of vectors, more heads of a group than a block takes, and keys in several pieces
 * of one or more tiles. */
static const sizes many_keys[] = {
    {1, 70, 10, 1, 64, 0}, {1, 140, 20, 2, 16, 0}, {1, 90, 2, 1, 256, 0}, {1, 130, 2, 1, 128, 0},
    {1, 330, 1, 1, 20, 0}, {1, 200, 2, 1, 96, 0},  {1, 70, 2, 2, 100, 0}, {1, 66, 1, 1, 260, 0},
};

static void test_decode_pieces(void) {
    static const int contexts[] = {0, 2100, 4200}; /* longer than T by so much */
    for (int i = 0; i < TEST_COUNT(many_keys); i++) {
        sizes s = many_keys[i];
        check_decode(s, i % 3 ? 50 : 64, s.T + contexts[i % TEST_COUNT(contexts)]);
        s.window = windows[(i + 4) % TEST_COUNT(windows)];
        check_decode(s, i % 3 ? 50 : 64, s.T);
    }
}

/* Rows of some sequences in one call, by their counts, which end at the lengths. */
static call rows_of(const int *lengths, const int *counts, int first, int end) {
    call c = {host_ints(1000), host_ints(1000), 0};
    for (int b = first; b < end; b++)
        for (int t = lengths[b] - counts[b]; t < lengths[b]; t++) {
            c.seqs[c.N] = b;
            c.positions[c.N++] = t;
        }
    return c;
}

/* Many rows that begin at the edge of a tile, or next to it: they see all keys before them and their own. */
static void test_decode_begins(void) {
    static const int begins[] = {1, 15, 16, 63, 64, 65, 128}, counts[] = {9, 40, 64, 65};
    for (int i = 0; i < TEST_COUNT(begins) * TEST_COUNT(counts); i += test_step(3)) {
        int first = begins[i / TEST_COUNT(counts)], rows = counts[i % TEST_COUNT(counts)];
        sizes s = {1, first + rows, 4, 2, i % 2 ? 64 : 20, 0};
        test_case("decode %d rows after %d, HS=%d", rows, first, s.HS);
        answer a = answer_of(s, random_act(qkv_size(s), 1.0), (gpt_dropout){0});
        caches c = new_caches(s, s.T);
        gpt_shape shape = shape_of(s, 0);
        shape.T = shape.n_ctx = s.T;
        EACH_BACKEND {
            c.k = device_act(NULL, c.size), c.v = device_act(NULL, c.size);
            test_workspace(&shape);
            decode_call(s, &a, &c, rows_of(&first, &first, 0, 1));
            decode_call(s, &a, &c, rows_of(&s.T, &rows, 0, 1));
        }
    }
}

/* A row's bits do not depend on the other sequences of the call, few or many. (In bf16 a GPU has tiles
 * for 64 rows of one sequence; there are none here.) */
static void test_decode_alone(void) {
    enum { B = 3, T = 90, N_CTX = 100 };
    static const int lengths[] = {90, 71, 64};
    static const int counts[][B] = {{1, 1, 1}, {50, 16, 1}, {2, 30, 5}};
    static const sizes shapes[] = {{B, T, 4, 2, 64, 0}, {B, T, 3, 1, 20, 50}, {B, T, 10, 1, 16, 0}};
    for (int i = 0; i < TEST_COUNT(shapes) * TEST_COUNT(counts); i++) {
        sizes s = shapes[i / TEST_COUNT(counts)];
        const int *own = counts[i % TEST_COUNT(counts)];
        int before[B], rest[B], width = s.NH * s.HS;
        test_case("NH=%d NKV=%d HS=%d window=%d, %d %d %d rows", s.NH, s.NKV, s.HS, s.window,
                  own[0], own[1], own[2]);
        for (int b = 0; b < B; b++) rest[b] = before[b] = lengths[b] - own[b];
        double *qkv = random_act(qkv_size(s), 1.0);
        caches c = new_caches(s, N_CTX);
        gpt_shape shape = shape_of(s, 0);
        shape.T = shape.n_ctx = N_CTX;
        EACH_BACKEND {
            c.k = device_act(NULL, c.size), c.v = device_act(NULL, c.size);
            test_workspace(&shape);
            decode_rows(s, qkv, &c, rows_of(before, rest, 0, B));
            double *together = decode_rows(s, qkv, &c, rows_of(lengths, own, 0, B));
            for (int b = 0; b < B; together += (int64_t)own[b++] * width)
                EXPECT_SAME("out", decode_rows(s, qkv, &c, rows_of(lengths, own, b, b + 1)),
                            together, (int64_t)own[b] * width);
        }
    }
}

typedef struct state {
    double *qkv, *dout, *out, *lse, *p;
    gpt_dropout dropout;
    sizes s;
} state;

static double loss_of(void *pointer) {
    state *a = pointer;
    sizes s = a->s;
    ref_attention_forward(a->out, a->lse, a->p, a->qkv, a->dropout, s.window, positions, s.B, s.T,
                          s.NH, s.NKV, s.HS);
    return test_dot(a->out, a->dout, out_size(s));
}

static void test_reference(void) {
    for (int k = 0; k < 5; k++) {
        sizes s = {2, 5, 4, 2, 3, k == 2 ? 3 : 0};
        ref_score_cap = k == 4 ? 0.8 : 0;
        gpt_dropout dropout = {k ? 0.4f : 0.0f, 99};
        name_case(s, dropout.p, "");
        positions = k == 3 ? random_documents(s, 3) : NULL;
        answer a = answer_of(s, random_f32(qkv_size(s), 1.0), dropout);
        state p = {a.qkv, a.dout, a.out, a.lse, a.p, dropout, s};
        EXPECT_GRADIENT("dqkv", loss_of, &p, p.qkv, a.dqkv, qkv_size(s));
    }
    positions = NULL;
    ref_score_cap = 0;
}

TEST_OPS_MAIN({"reference", test_reference}, {"attention", test_attention},
              {"attention, dropout", test_dropout}, {"large scores", test_large_scores},
              {"trend", test_trend}, {"causal", test_causal}, {"decode", test_decode},
              {"decode, begins", test_decode_begins}, {"window", test_window},
              {"window of all", test_whole_window}, {"documents", test_documents},
              {"decode, window", test_decode_window}, {"decode, pieces", test_decode_pieces},
              {"decode, alone", test_decode_alone}, {"soft cap", test_soft_cap})
