/* embedding_forward, embedding_backward. */
#include "testing.h"

#include "reference.h"

typedef struct sizes {
    int B, T, C, V;
} sizes;

static const sizes cases[] = {
    {1, 1, 1, 2},    {1, 1, 65, 65},   {1, 3, 3, 7},    {7, 1, 5, 2},     {1, 7, 33, 7},
    {5, 13, 65, 65}, {1, 65, 96, 256}, {2, 63, 128, 3}, {3, 64, 65, 300}, {2, 129, 33, 5},
    {5, 128, 8, 2},  {1, 96, 24, 1},   {1, 192, 8, 11},
};

static gpt_shape shape_of(sizes s, int Vp) {
    return (gpt_shape){.N = s.B * s.T,
                       .T = s.T,
                       .C = s.C,
                       .V = s.V,
                       .Vp = Vp,
                       .NH = 1,
                       .NKV = 1,
                       .HS = s.C,
                       .F = s.C,
                       .activation = GPT_ACT_GELU,
                       .training = 1,
                       .n_params = (int64_t)Vp * s.C};
}

static void check_forward(sizes s, int use_positions, int use_wpe) {
    int N = s.B * s.T, Vp = s.V + 3, block_size = s.T + 4;
    test_case("B=%d T=%d C=%d V=%d positions=%d wpe=%d", s.B, s.T, s.C, s.V, use_positions,
              use_wpe);
    double *wte = random_f32((int64_t)Vp * s.C, 1.0);
    double *wpe = use_wpe ? random_f32((int64_t)block_size * s.C, 1.0) : NULL;
    int32_t *tokens = random_ints(N, s.V);
    int32_t *positions = use_positions ? random_ints(N, block_size) : NULL;
    double *want = host_zeros((int64_t)N * s.C);
    ref_embedding_forward(want, tokens, positions, wte, wpe, N, s.T, s.C);
    gpt_shape shape = shape_of(s, Vp);
    EACH_BACKEND {
        void *out = device_act(NULL, (int64_t)N * s.C), *rest = NULL;
        if (!strncmp(test.ops->name, "cpu bf16", 8)) rest = device_act(NULL, (int64_t)N * s.C);
        test_workspace(&shape);
        test.ops->embedding_forward(
            test.ctx,
            &(embedding_forward){.out = out,
                                 .tokens = device_i32(tokens, N),
                                 .positions = positions ? device_i32(positions, N) : NULL,
                                 .wte = device_f32(wte, (int64_t)Vp * s.C),
                                 .wpe = wpe ? device_f32(wpe, (int64_t)block_size * s.C) : NULL,
                                 .N = N,
                                 .T = s.T,
                                 .C = s.C,
                                 .rest = rest});
        double *got = read_act(out, (int64_t)N * s.C);
        EXPECT_CLOSE("out", got, want, N, s.C, test_tol(1e-6));
        if (!rest) continue;
        double *lacks = read_act(rest, (int64_t)N * s.C);
        for (int64_t i = 0; i < (int64_t)N * s.C; i++) got[i] += lacks[i];
        EXPECT_CLOSE("out and rest", got, want, N, s.C, 1e-5);
    }
}

static void test_forward(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        for (int variant = 0; variant < 4; variant++) {
            check_forward(cases[i], variant & 1, variant >> 1);
        }
    }
}

/* Few tokens for many rows, so that rows of dwte are added to many times; the rows that no token
 * names, and the positions past T, must keep what they hold. */
static void check_backward(sizes s, int use_wpe, int use_positions) {
    int N = s.B * s.T, Vp = s.V + 3, block_size = s.T + 4;
    int64_t wte_size = (int64_t)Vp * s.C, wpe_size = (int64_t)block_size * s.C;
    test_case("B=%d T=%d C=%d V=%d wpe=%d positions=%d", s.B, s.T, s.C, s.V, use_wpe,
              use_positions);
    int32_t *positions = use_positions ? random_ints(N, s.T) : NULL;
    double *dout = random_act((int64_t)N * s.C, 1.0);
    double *dwte = random_f32(wte_size, 1.0), *dwpe = random_f32(wpe_size, 1.0);
    int32_t *tokens = random_ints(N, s.V);
    double *want_dwte = host_copy(dwte, wte_size), *want_dwpe = host_copy(dwpe, wpe_size);
    ref_embedding_backward(want_dwte, use_wpe ? want_dwpe : NULL, dout, tokens, positions, N, s.T,
                           s.C);
    gpt_shape shape = shape_of(s, Vp);
    EACH_BACKEND {
        void *device_dwte = device_f32(dwte, wte_size);
        void *device_dwpe = use_wpe ? device_f32(dwpe, wpe_size) : NULL;
        void *given = positions ? device_i32(positions, N) : NULL;
        test_workspace(&shape);
        test.ops->embedding_backward(
            test.ctx, &(embedding_backward){.dwte = device_dwte,
                                            .dwpe = device_dwpe,
                                            .dout = device_act(dout, (int64_t)N * s.C),
                                            .tokens = device_i32(tokens, N),
                                            .positions = given,
                                            .N = N,
                                            .T = s.T,
                                            .C = s.C,
                                            .V = s.V});
        double *got = read_f32(device_dwte, wte_size);
        EXPECT_CLOSE("dwte", got, want_dwte, Vp, s.C, test_tol(3e-6));
        EXPECT_SAME("dwte, padding rows", got + (int64_t)s.V * s.C, dwte + (int64_t)s.V * s.C,
                    wte_size - (int64_t)s.V * s.C);
        void *alone = use_wpe ? device_f32(dwpe, wpe_size) : NULL; /* dwte not wanted */
        test.ops->embedding_backward(
            test.ctx, &(embedding_backward){.dwpe = alone,
                                            .dout = device_act(dout, (int64_t)N * s.C),
                                            .tokens = device_i32(tokens, N),
                                            .positions = given,
                                            .N = N,
                                            .T = s.T,
                                            .C = s.C,
                                            .V = s.V});
        if (!use_wpe) continue;
        EXPECT_SAME("dwpe alone", read_f32(alone, wpe_size), read_f32(device_dwpe, wpe_size),
                    wpe_size);
        got = read_f32(device_dwpe, wpe_size);
        EXPECT_CLOSE("dwpe", got, want_dwpe, block_size, s.C, test_tol(3e-6));
        EXPECT_SAME("dwpe past T", got + (int64_t)s.T * s.C, dwpe + (int64_t)s.T * s.C,
                    wpe_size - (int64_t)s.T * s.C);
    }
}

static void test_backward(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        check_backward(cases[i], 0, 0);
        check_backward(cases[i], 1, 0);
        check_backward(cases[i], 1, 1);
    }
}

typedef struct state {
    double *wte, *wpe, *dout, *out;
    int32_t *tokens;
    int N, T, C;
} state;

static double loss_of(void *pointer) {
    state *s = pointer;
    ref_embedding_forward(s->out, s->tokens, NULL, s->wte, s->wpe, s->N, s->T, s->C);
    return test_dot(s->out, s->dout, (int64_t)s->N * s->C);
}

static void test_reference(void) {
    enum { N = 6, T = 3, C = 5, V = 4 };
    test_case("N=%d T=%d C=%d V=%d", N, T, C, V);
    state s = {random_f32(V * C, 1.0),
               random_f32(T * C, 1.0),
               random_f32(N * C, 1.0),
               host_zeros(N * C),
               random_ints(N, V),
               N,
               T,
               C};
    double *dwte = host_zeros(V * C), *dwpe = host_zeros(T * C);
    ref_embedding_backward(dwte, dwpe, s.dout, s.tokens, NULL, N, T, C);
    EXPECT_GRADIENT("dwte", loss_of, &s, s.wte, dwte, V * C);
    EXPECT_GRADIENT("dwpe", loss_of, &s, s.wpe, dwpe, T * C);
}

TEST_OPS_MAIN({"reference", test_reference}, {"forward", test_forward}, {"backward", test_backward})
