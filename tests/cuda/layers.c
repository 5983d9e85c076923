/* layers.c: each layer once, in bf16, on random numbers; what went in and what came out is written
 * into a file, for layers.py to compare with PyTorch.
 *
 *     GPTC_TEST_TABLES="cuda bf16" layers FILE
 *
 * The file is a list of arrays: a name of 32 bytes, the count of numbers (int64), the numbers
 * (float32). Names are case.array; sizes are in "sizes". */
#include "testing.h"

enum { B = 2, T = 96, NH = 4, NKV = 2, HS = 32, C = NH * HS, F = 192, V = 300, Vp = 320 };
enum { N = B * T, QKV = (NH + 2 * NKV) * HS };

static FILE *file;
static const char *case_name;

static const double *record(const char *name, const double *x, int64_t n) {
    char whole[32] = {0};
    snprintf(whole, sizeof whole, "%s.%s", case_name, name);
    fwrite(whole, sizeof whole, 1, file);
    fwrite(&n, sizeof n, 1, file);
    for (int64_t i = 0; i < n; i++) {
        float value = (float)x[i];
        fwrite(&value, sizeof value, 1, file);
    }
    return x;
}

/* Random numbers that bf16 holds, so that PyTorch starts from the same. */
static const double *given(const char *name, int64_t n, double scale) {
    return record(name, random_act(n, scale), n);
}
static void *given_act(const char *name, int64_t n, double scale) {
    return device_act(given(name, n, scale), n);
}
static void *given_f32(const char *name, int64_t n, double scale) {
    return device_f32(given(name, n, scale), n);
}
static void *given_bias(const char *name, int n) {
    return device_bias(given(name, n, 1), n);
}
static void *given_weight(const char *name, int rows, int cols, int parts) {
    return device_weight(given(name, (int64_t)rows * cols, 1 / sqrt(cols)), rows, cols, parts);
}
static int32_t *given_tokens(const char *name) {
    int32_t *tokens = random_ints(N, V);
    double *x = host_zeros(N);
    for (int i = 0; i < N; i++) x[i] = tokens[i];
    record(name, x, N);
    return device_i32(tokens, N);
}
static void *zeros(int64_t n) {
    return device_f32(host_zeros(n), n);
}
static void got_act(const char *name, const void *x, int64_t n) {
    record(name, read_act(x, n), n);
}
static void got_f32(const char *name, const void *x, int64_t n) {
    record(name, read_f32(x, n), n);
}

static void begin(const char *name) {
    static const gpt_shape shape = {.N = N,
                                    .T = T,
                                    .C = C,
                                    .V = V,
                                    .Vp = Vp,
                                    .NH = NH,
                                    .NKV = NKV,
                                    .HS = HS,
                                    .F = F,
                                    .activation = GPT_ACT_SWIGLU,
                                    .training = 1,
                                    .n_params = 1};
    test_case("%s", name);
    test.counter = 0;
    case_name = name;
    test_workspace(&shape);
}

static void norm(const char *name, int kind) {
    begin(name);
    void *out = device_act(NULL, N * C), *stats = device_f32(NULL, 2 * N), *dw = zeros(C);
    void *sum = device_act(NULL, N * C), *resid = given_act("resid", N * C, 1), *db = zeros(C);
    void *branch = given_act("branch", N * C, 1), *w = given_f32("w", C, 1);
    test.ops->residual_norm_forward(test.ctx, &(residual_norm_forward){.resid_out = sum,
                                                                       .out = out,
                                                                       .stats = stats,
                                                                       .resid = resid,
                                                                       .branch = branch,
                                                                       .w = w,
                                                                       .b = given_f32("b", C, 1),
                                                                       .norm = kind,
                                                                       .eps = 1e-5f,
                                                                       .N = N,
                                                                       .C = C});
    got_act("sum", sum, N * C);
    got_act("out", out, N * C);
    /* Backward by itself, of a stream that is as stored. */
    test.ops->residual_norm_forward(test.ctx, &(residual_norm_forward){.out = out,
                                                                       .stats = stats,
                                                                       .resid = resid,
                                                                       .w = w,
                                                                       .norm = kind,
                                                                       .eps = 1e-5f,
                                                                       .N = N,
                                                                       .C = C});
    void *dresid = given_act("dresid_before", N * C, 1);
    test.ops->residual_norm_backward(test.ctx,
                                     &(residual_norm_backward){.dresid = dresid,
                                                               .dw = dw,
                                                               .db = db,
                                                               .dout = given_act("dout", N * C, 1),
                                                               .resid = resid,
                                                               .stats = stats,
                                                               .w = w,
                                                               .norm = kind,
                                                               .N = N,
                                                               .C = C});
    got_act("dresid", dresid, N * C);
    got_f32("dw", dw, C);
    got_f32("db", db, C);
}

/* A feed-forward layer there and back. */
static void mlp(const char *name, int activation) {
    int parts = activation == GPT_ACT_SWIGLU ? 2 : 1, FC = parts * F;
    begin(name);
    void *in = given_act("in", N * C, 1), *w1 = given_weight("w1", FC, C, parts);
    void *w2 = given_weight("w2", C, F, 1), *dout = given_act("dout", N * C, 1);
    void *fc = device_act(NULL, N * F), *pre = device_act(NULL, N * FC);
    void *out = device_act(NULL, N * C), *dpre = device_act(NULL, N * FC);
    void *din = device_act(NULL, N * C), *dw1 = zeros(FC * C), *dw2 = zeros(C * F);
    void *db1 = zeros(FC), *db2 = zeros(C);
    test.ops->linear_forward(test.ctx, &(linear_forward){.out = fc,
                                                         .pre = pre,
                                                         .in = in,
                                                         .w = w1,
                                                         .b = given_bias("b1", FC),
                                                         .activation = activation,
                                                         .N = N,
                                                         .IC = C,
                                                         .OC = F});
    test.ops->linear_forward(
        test.ctx,
        &(linear_forward){
            .out = out, .in = fc, .w = w2, .b = given_bias("b2", C), .N = N, .IC = F, .OC = C});
    test.ops->linear_backward(test.ctx, &(linear_backward){.din = dpre,
                                                           .dw = dw2,
                                                           .db = db2,
                                                           .dout = dout,
                                                           .in = fc,
                                                           .w = w2,
                                                           .pre = pre,
                                                           .activation = activation,
                                                           .add = 1,
                                                           .N = N,
                                                           .IC = F,
                                                           .OC = C});
    test.ops->linear_backward(test.ctx, &(linear_backward){.din = din,
                                                           .dw = dw1,
                                                           .db = db1,
                                                           .dout = dpre,
                                                           .in = in,
                                                           .w = w1,
                                                           .add = 1,
                                                           .N = N,
                                                           .IC = C,
                                                           .OC = FC});
    got_act("fc", fc, N * F);
    got_act("out", out, N * C);
    got_act("dpre", dpre, N * FC);
    got_act("din", din, N * C);
    got_f32("dw1", dw1, FC * C);
    got_f32("db1", db1, FC);
    got_f32("dw2", dw2, C * F);
    got_f32("db2", db2, C);
}

static void attention(void) {
    begin("attention");
    void *qkv = given_act("qkv", N * QKV, 1), *out = device_act(NULL, N * C);
    void *lse = device_f32(NULL, N * NH), *dqkv = device_act(NULL, N * QKV);
    test.ops->attention_forward(
        test.ctx,
        &(attention_forward){
            .out = out, .lse = lse, .qkv = qkv, .B = B, .T = T, .NH = NH, .NKV = NKV, .HS = HS});
    test.ops->attention_backward(test.ctx,
                                 &(attention_backward){.dqkv = dqkv,
                                                       .dout = given_act("dout", N * C, 1),
                                                       .qkv = qkv,
                                                       .out = out,
                                                       .lse = lse,
                                                       .B = B,
                                                       .T = T,
                                                       .NH = NH,
                                                       .NKV = NKV,
                                                       .HS = HS});
    got_act("out", out, N * C);
    got_act("dqkv", dqkv, N * QKV);
}

static void rope(void) {
    begin("rope");
    double *table = host_zeros(T * HS);
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < HS / 2; i++) {
            double angle = t * pow(10000, -2.0 * i / HS);
            table[t * HS + 2 * i] = cos(angle), table[t * HS + 2 * i + 1] = sin(angle);
        }
    }
    void *qkv = given_act("qkv", N * QKV, 1);
    test.ops->rope_forward(test.ctx, &(rope_forward){.qkv = qkv,
                                                     .table = device_f32(table, T * HS),
                                                     .pos = GPT_POS_ROPE,
                                                     .N = N,
                                                     .T = T,
                                                     .NH = NH,
                                                     .NKV = NKV,
                                                     .HS = HS});
    got_act("out", qkv, N * QKV);
}

static void qk_norm(void) {
    enum { WIDTH = (NH + NKV) * HS };
    begin("qk_norm");
    void *qkv = given_act("qkv", N * QKV, 1), *in = device_act(NULL, N * WIDTH);
    void *q_w = given_f32("q_w", HS, 1), *k_w = given_f32("k_w", HS, 1);
    void *stats = device_f32(NULL, N * (NH + NKV)), *dq_w = zeros(HS), *dk_w = zeros(HS);
    void *dqkv = given_act("dout", N * QKV, 1);
    test.ops->qk_norm_forward(test.ctx, &(qk_norm_forward){.qkv = qkv,
                                                           .in = in,
                                                           .stats = stats,
                                                           .q_w = q_w,
                                                           .k_w = k_w,
                                                           .eps = 1e-5f,
                                                           .N = N,
                                                           .NH = NH,
                                                           .NKV = NKV,
                                                           .HS = HS});
    test.ops->qk_norm_backward(test.ctx, &(qk_norm_backward){.dqkv = dqkv,
                                                             .dq_w = dq_w,
                                                             .dk_w = dk_w,
                                                             .in = in,
                                                             .stats = stats,
                                                             .q_w = q_w,
                                                             .k_w = k_w,
                                                             .N = N,
                                                             .NH = NH,
                                                             .NKV = NKV,
                                                             .HS = HS});
    got_act("out", qkv, N * QKV);
    got_act("dqkv", dqkv, N * QKV);
    got_f32("dq_w", dq_w, HS);
    got_f32("dk_w", dk_w, HS);
}

static void classifier(void) {
    begin("classifier");
    double *wte = random_act(Vp * C, 1 / sqrt(C));
    void *x = given_act("x", N * C, 1), *losses = device_f32(NULL, N), *total = zeros(1);
    void *dx = device_act(NULL, N * C), *dwte = zeros(Vp * C);
    record("wte", wte, V * C);
    test.ops->classifier_backward(test.ctx,
                                  &(classifier_backward){.losses = losses,
                                                         .total = total,
                                                         .dx = dx,
                                                         .dwte = dwte,
                                                         .x = x,
                                                         .wte = device_weight(wte, Vp, C, 1),
                                                         .targets = given_tokens("targets"),
                                                         .scale = 1.0f / N,
                                                         .add = 1,
                                                         .N = N,
                                                         .C = C,
                                                         .V = V,
                                                         .Vp = Vp});
    got_f32("losses", losses, N);
    got_act("dx", dx, N * C);
    got_f32("dwte", dwte, V * C);
}

static void embedding(void) {
    begin("embedding");
    void *out = device_act(NULL, N * C), *dwte = zeros(Vp * C), *dwpe = zeros(T * C);
    int32_t *tokens = given_tokens("tokens");
    test.ops->embedding_forward(test.ctx, &(embedding_forward){.out = out,
                                                               .tokens = tokens,
                                                               .wte = given_f32("wte", V * C, 1),
                                                               .wpe = given_f32("wpe", T * C, 1),
                                                               .N = N,
                                                               .T = T,
                                                               .C = C});
    test.ops->embedding_backward(test.ctx,
                                 &(embedding_backward){.dwte = dwte,
                                                       .dwpe = dwpe,
                                                       .dout = given_act("dout", N * C, 1),
                                                       .tokens = tokens,
                                                       .N = N,
                                                       .T = T,
                                                       .C = C,
                                                       .V = V});
    got_act("out", out, N * C);
    got_f32("dwte", dwte, V * C);
    got_f32("dwpe", dwpe, T * C);
}

int main(int argc, char **argv) {
    static const double sizes[] = {B, T, NH, NKV, HS, C, F, V};
    if (argc != 2 || !(file = fopen(argv[1], "wb"))) {
        fprintf(stderr, "usage: GPTC_TEST_TABLES='cuda bf16' layers FILE\n");
        return 2;
    }
    test.act_bytes = 2;
    test.visit = -1;
    test_open_tables();
    for (int i = 0; i < test.n_tables && !test.ops; i++) {
        if (test.tables[i]->act_bytes == 2) test.ops = test.tables[i];
        test.ctx = test.contexts[i][0];
    }
    if (!test.ops) {
        fprintf(stderr, "no such table: %s\n", gpt_last_error());
        return 1;
    }
    case_name = "all";
    record("sizes", sizes, TEST_COUNT(sizes));
    embedding();
    norm("layernorm", GPT_NORM_LAYERNORM);
    norm("rmsnorm", GPT_NORM_RMSNORM);
    qk_norm();
    rope();
    attention();
    mlp("gelu", GPT_ACT_GELU);
    mlp("swish", GPT_ACT_SWISH);
    mlp("swiglu", GPT_ACT_SWIGLU);
    classifier();
    test_free_device();
    test_case("%s", "");
    test.ops = NULL;
    test_close_tables();
    return fclose(file) || test.n_failures ? 1 : 0;
}
