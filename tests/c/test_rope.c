/* rope_forward, rope_backward. */
#include "testing.h"

#include "reference.h"

typedef struct sizes {
    int B, T, NH, NKV, HS;
    int turned; /* channels of a head; 0: HS */
} sizes;

static const sizes cases[] = {
    {1, 1, 1, 1, 2, 0},   {1, 2, 2, 2, 6, 0},  {3, 5, 4, 2, 16, 0},   {1, 7, 6, 1, 20, 0},
    {2, 63, 3, 3, 2, 0},  {1, 64, 4, 2, 6, 0}, {1, 65, 1, 1, 128, 0}, {2, 13, 2, 2, 64, 0},
    {1, 130, 6, 1, 6, 0}, {7, 1, 3, 3, 20, 0}, {2, 13, 2, 2, 64, 16}, {3, 5, 4, 2, 21, 6},
    {1, 9, 2, 1, 40, 32},
};

/* The wide kind numbers its pairs over the C channels of the queries; keys have as many. */
static int is_possible(sizes s, int pos) {
    return pos == GPT_POS_ROPE || (s.NH == s.NKV && !s.turned);
}

static int turned_of(sizes s) {
    return s.turned ? s.turned : s.HS;
}

static const char *pos_name(int pos) {
    return pos == GPT_POS_ROPE ? "rope" : "rope_wide";
}

static int64_t row_size(sizes s) {
    return (int64_t)(s.NH + 2 * s.NKV) * s.HS;
}

static gpt_shape shape_of(sizes s) {
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
                       .training = 1,
                       .n_params = 1};
}

typedef struct table {
    double *values;
    int64_t size;
} table;

static table table_of(sizes s, int pos, int block_size) {
    int pairs = pos == GPT_POS_ROPE ? turned_of(s) / 2 : s.NH * s.HS / 2;
    table t = {host_zeros((int64_t)block_size * pairs * 2), (int64_t)block_size * pairs * 2};
    ref_rope_table(t.values, pos, 10000.0, block_size, turned_of(s), s.NH * s.HS);
    for (int64_t i = 0; i < t.size; i++) t.values[i] = (float)t.values[i];
    return t;
}

/* The length of each query and key, and the values, which no rotation may change. */
static void check_kept(sizes s, const double *got, const double *x) {
    int heads = s.NH + 2 * s.NKV;
    for (int n = 0; n < s.B * s.T; n++) {
        for (int h = 0; h < s.NH + s.NKV; h++) {
            const double *a = got + ((int64_t)n * heads + h) * s.HS;
            const double *b = x + ((int64_t)n * heads + h) * s.HS;
            double want = test_dot(b, b, s.HS);
            EXPECT_NEAR("squared length", test_dot(a, a, s.HS), want, test_tol(1e-6) * want);
        }
        int64_t values = ((int64_t)n * heads + s.NH + s.NKV) * s.HS;
        EXPECT_SAME("values", got + values, x + values, (int64_t)s.NKV * s.HS);
    }
}

static void check_forward(sizes s, int pos, int use_positions) {
    int N = s.B * s.T, block_size = s.T + 9;
    int64_t size = N * row_size(s);
    test_case("%s B=%d T=%d NH=%d NKV=%d HS=%d positions=%d", pos_name(pos), s.B, s.T, s.NH, s.NKV,
              s.HS, use_positions);
    double *x = random_act(size, 1.0), *want = host_copy(x, size);
    int32_t *positions = use_positions ? random_ints(N, block_size) : NULL;
    table t = table_of(s, pos, block_size);
    ref_rope(want, t.values, positions, pos, 1, N, s.T, s.NH, s.NKV, s.HS, turned_of(s));
    gpt_shape shape = shape_of(s);
    EACH_BACKEND {
        void *qkv = device_act(x, size), *device_table = device_f32(t.values, t.size);
        test_workspace(&shape);
        test.ops->rope_forward(
            test.ctx, &(rope_forward){.qkv = qkv,
                                      .table = device_table,
                                      .positions = positions ? device_i32(positions, N) : NULL,
                                      .pos = pos,
                                      .turned = s.turned,
                                      .N = N,
                                      .T = s.T,
                                      .NH = s.NH,
                                      .NKV = s.NKV,
                                      .HS = s.HS});
        double *got = read_act(qkv, size);
        EXPECT_CLOSE("qkv", got, want, N, row_size(s), test_tol(1e-6));
        check_kept(s, got, x);
        test.ops->rope_backward(
            test.ctx, &(rope_backward){.dqkv = qkv,
                                       .table = device_table,
                                       .positions = positions ? device_i32(positions, N) : NULL,
                                       .pos = pos,
                                       .turned = s.turned,
                                       .N = N,
                                       .T = s.T,
                                       .NH = s.NH,
                                       .NKV = s.NKV,
                                       .HS = s.HS});
        EXPECT_CLOSE("there and back", read_act(qkv, size), x, N, row_size(s), test_tol(1e-6));
    }
}

static void check_backward(sizes s, int pos) {
    int N = s.B * s.T, block_size = s.T + 2;
    int64_t size = N * row_size(s);
    test_case("%s B=%d T=%d NH=%d NKV=%d HS=%d", pos_name(pos), s.B, s.T, s.NH, s.NKV, s.HS);
    double *x = random_act(size, 1.0), *want = host_copy(x, size);
    table t = table_of(s, pos, block_size);
    ref_rope(want, t.values, NULL, pos, -1, N, s.T, s.NH, s.NKV, s.HS, turned_of(s));
    gpt_shape shape = shape_of(s);
    EACH_BACKEND {
        void *dqkv = device_act(x, size);
        test_workspace(&shape);
        test.ops->rope_backward(test.ctx, &(rope_backward){.dqkv = dqkv,
                                                           .table = device_f32(t.values, t.size),
                                                           .pos = pos,
                                                           .turned = s.turned,
                                                           .N = N,
                                                           .T = s.T,
                                                           .NH = s.NH,
                                                           .NKV = s.NKV,
                                                           .HS = s.HS});
        double *got = read_act(dqkv, size);
        EXPECT_CLOSE("dqkv", got, want, N, row_size(s), test_tol(1e-6));
        check_kept(s, got, x);
    }
}

static void test_forward(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        for (int pos = GPT_POS_ROPE; pos <= GPT_POS_ROPE_WIDE; pos++) {
            if (!is_possible(cases[i], pos)) continue;
            check_forward(cases[i], pos, 0);
            check_forward(cases[i], pos, 1);
        }
    }
}

static void test_backward(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        for (int pos = GPT_POS_ROPE; pos <= GPT_POS_ROPE_WIDE; pos++) {
            if (is_possible(cases[i], pos)) check_backward(cases[i], pos);
        }
    }
}

/* The purpose of the rotation: a query and a key turned by their positions have a product that
 * depends on the distance alone. */
static void test_relative(void) {
    sizes s = {1, 2, 1, 1, 16, 0};
    enum { BLOCK = 40, SIZE = 2 * 3 * 16 };
    for (int pos = GPT_POS_ROPE; pos <= GPT_POS_ROPE_WIDE; pos++) {
        test_case("%s", pos_name(pos));
        double *x = random_act(SIZE, 1.0);
        table t = table_of(s, pos, BLOCK);
        gpt_shape shape = shape_of(s);
        EACH_BACKEND {
            double products[2];
            for (int shift = 0; shift < 2; shift++) {
                int32_t positions[] = {7 + 20 * shift, 3 + 20 * shift};
                void *qkv = device_act(x, SIZE);
                test_workspace(&shape);
                test.ops->rope_forward(test.ctx,
                                       &(rope_forward){.qkv = qkv,
                                                       .table = device_f32(t.values, t.size),
                                                       .positions = device_i32(positions, 2),
                                                       .pos = pos,
                                                       .turned = s.turned,
                                                       .N = 2,
                                                       .T = 2,
                                                       .NH = 1,
                                                       .NKV = 1,
                                                       .HS = s.HS});
                double *got = read_act(qkv, SIZE);
                products[shift] = test_dot(got, got + row_size(s) + s.HS, turned_of(s));
            }
            EXPECT_NEAR("q k", products[1], products[0], test_tol(3e-6) * s.HS);
        }
    }
}

typedef struct state {
    double *x, *dout, *out;
    table t;
    sizes s;
    int pos;
} state;

static double loss_of(void *pointer) {
    state *p = pointer;
    sizes s = p->s;
    int64_t size = s.B * s.T * row_size(s);
    memcpy(p->out, p->x, (size_t)size * sizeof *p->out);
    ref_rope(p->out, p->t.values, NULL, p->pos, 1, s.B * s.T, s.T, s.NH, s.NKV, s.HS, turned_of(s));
    return test_dot(p->out, p->dout, size);
}

static void test_reference(void) {
    for (int pos = GPT_POS_ROPE; pos <= GPT_POS_ROPE_WIDE; pos++) {
        sizes s = {2, 3, 2, 2, 6, 0};
        int64_t size = s.B * s.T * row_size(s);
        test_case("%s", pos_name(pos));
        state p = {random_f32(size, 1.0),
                   random_f32(size, 1.0),
                   host_zeros(size),
                   table_of(s, pos, s.T),
                   s,
                   pos};
        double *dx = host_copy(p.dout, size);
        ref_rope(dx, p.t.values, NULL, pos, -1, s.B * s.T, s.T, s.NH, s.NKV, s.HS, turned_of(s));
        EXPECT_GRADIENT("dx", loss_of, &p, p.x, dx, size);
    }
}

TEST_OPS_MAIN({"reference", test_reference}, {"forward", test_forward}, {"backward", test_backward},
              {"relative", test_relative})
