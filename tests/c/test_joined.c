/* linear_forward, linear_backward with an adapter in their products, against float64. */
#include "testing.h"

#include "adapted_layer.h"

/* Numbers of A and B as products read them: what is compared is then exact but for u and du. */
static problem new_joined(const sizes *s, int width) {
    problem p = new_problem(s, width, host_dropout(0, 0));
    p.a = random_act((int64_t)s->n_parts * s->R * s->IC, 1 / sqrt(s->IC));
    p.b = random_act((int64_t)p.rows * s->R, 1 / sqrt(s->R));
    return p;
}

static void check_joined_forward(const sizes *s, int activation) {
    int width = ref_activation_width(activation, s->OC), W = s->n_parts * s->R;
    int64_t n_out = (int64_t)s->N * s->OC, n_pre = (int64_t)s->N * width;
    test_case("joined forward N=%d IC=%d OC=%d R=%d parts=%d activation=%d", s->N, s->IC, s->OC,
              s->R, s->n_parts, activation);
    problem p = new_joined(s, width);
    double *w = random_act((int64_t)width * s->IC, 1.5 / sqrt(s->IC)),
           *bias = random_act(width, 1.0);
    double *y = host_zeros(n_pre), *want = host_zeros(n_out);
    ref_linear_forward(y, p.in, w, bias, s->N, s->IC, width);
    double *u = adapt(&p, y);
    ref_activation_forward(want, y, activation, s->N, s->OC);
    gpt_shape shape = shape_of(s, activation);
    EACH_BACKEND {
        if (!test.ops->joins_adapters) continue;
        int activates = activation != GPT_ACT_NONE;
        void *pre = activates ? device_act(NULL, n_pre) : NULL, *out = device_act(NULL, n_out);
        void *device_u = device_f32(NULL, (int64_t)s->N * W),
             *in = device_act(p.in, (int64_t)s->N * s->IC);
        test_workspace(&shape);
        lora_forward lora = {.out = out,
                             .pre = pre,
                             .u = device_u,
                             .in = in,
                             .a = device_f32(p.a, (int64_t)W * s->IC),
                             .b = device_f32(p.b, (int64_t)p.rows * s->R),
                             .scale = (float)p.scale,
                             .activation = activation,
                             .n_parts = s->n_parts,
                             .N = s->N,
                             .IC = s->IC,
                             .OC = s->OC,
                             .R = s->R};
        memcpy(lora.parts, s->parts, sizeof lora.parts);
        test.ops->linear_forward(
            test.ctx, &(linear_forward){.out = out,
                                        .pre = pre,
                                        .in = in,
                                        .w = device_weight(w, width, s->IC, width / s->OC),
                                        .b = device_bias(bias, width),
                                        .activation = activation,
                                        .exact = 1,
                                        .N = s->N,
                                        .IC = s->IC,
                                        .OC = s->OC,
                                        .lora = &lora});
        EXPECT_CLOSE("u", read_f32(device_u, (int64_t)s->N * W), u, s->N, W, 5e-6);
        EXPECT_CLOSE("out", read_act(out, n_out), want, s->N, s->OC, test_tol(5e-6));
        if (pre) EXPECT_CLOSE("pre", read_act(pre, n_pre), y, s->N, width, test_tol(5e-6));
    }
}

static void check_joined_backward(const sizes *s, int activation) {
    int width = ref_activation_width(activation, s->IC), W = s->n_parts * s->R;
    int64_t n_in = (int64_t)s->N * s->IC, n_pre = (int64_t)s->N * width;
    int64_t n_out = (int64_t)s->N * s->OC, n_a = (int64_t)W * s->IC, n_b;
    test_case("joined backward N=%d IC=%d OC=%d R=%d parts=%d activation=%d", s->N, s->IC, s->OC,
              s->R, s->n_parts, activation);
    problem p = new_joined(s, s->OC);
    n_b = (int64_t)p.rows * s->R;
    double *w = random_act((int64_t)s->OC * s->IC, 1.5 / sqrt(s->OC));
    double *pre = random_act(n_pre, 1.0), *dout = random_act(n_out, 1.0), *want = host_zeros(n_pre);
    if (activation != GPT_ACT_NONE) ref_activation_forward(p.in, pre, activation, s->N, s->IC);
    double *u = adapt(&p, p.y);
    gradients g = {host_zeros(n_in), random_f32(n_a, 1.0), random_f32(n_b, 1.0)};
    double *before_a = host_copy(g.da, n_a), *before_b = host_copy(g.db, n_b);
    differentiate(&p, u, dout, g);
    for (int n = 0; n < s->N; n++)
        for (int o = 0; o < s->OC; o++)
            for (int c = 0; c < s->IC; c++)
                g.din[(int64_t)n * s->IC + c] +=
                    dout[(int64_t)n * s->OC + o] * w[(int64_t)o * s->IC + c];
    ref_activation_backward(want, g.din, pre, activation, s->N, s->IC);
    gpt_shape shape = shape_of(s, activation);
    EACH_BACKEND {
        if (!test.ops->joins_adapters) continue;
        void *din = device_act(NULL, n_pre), *device_dout = device_act(dout, n_out);
        void *da = device_f32(before_a, n_a), *db = device_f32(before_b, n_b);
        int activates = activation != GPT_ACT_NONE;
        void *in = activates ? NULL : device_act(p.in, n_in);
        void *device_pre = activates ? device_act(pre, n_pre) : NULL;
        test_workspace(&shape);
        lora_backward lora = {.din = din,
                              .da = da,
                              .db = db,
                              .dout = device_dout,
                              .in = in,
                              .pre = device_pre,
                              .u = device_f32(u, (int64_t)s->N * W),
                              .a = device_f32(p.a, n_a),
                              .b = device_f32(p.b, n_b),
                              .scale = (float)p.scale,
                              .activation = activation,
                              .n_parts = s->n_parts,
                              .N = s->N,
                              .IC = s->IC,
                              .OC = s->OC,
                              .R = s->R};
        memcpy(lora.parts, s->parts, sizeof lora.parts);
        linear_backward op = {.din = din,
                              .dout = device_dout,
                              .in = in,
                              .w = device_weight(w, s->OC, s->IC, 1),
                              .pre = device_pre,
                              .activation = activation,
                              .N = s->N,
                              .IC = s->IC,
                              .OC = s->OC,
                              .lora = &lora};
        test.ops->linear_backward(test.ctx, &op);
        EXPECT_CLOSE("din", read_act(din, n_pre), want, s->N, width, test_tol(1e-5));
        EXPECT_CLOSE("da", read_f32(da, n_a), g.da, W, s->IC, test_tol(1e-5));
        EXPECT_CLOSE("db", read_f32(db, n_b), g.db, p.rows, s->R, test_tol(1e-5));
        if (!activates) continue;
        /* The input made with din, in the place of pre: the same numbers. */
        op.din = device_pre;
        op.made = device_act(NULL, n_in);
        lora.da = device_f32(before_a, n_a);
        lora.db = device_f32(before_b, n_b);
        test.ops->linear_backward(test.ctx, &op);
        EXPECT_SAME("din in place", read_act(device_pre, n_pre), read_act(din, n_pre), n_pre);
        EXPECT_SAME("da of made", read_f32(lora.da, n_a), read_f32(da, n_a), n_a);
    }
}

static void test_layers(void) {
    /* Many rows and columns; gates and ups that end within a panel; only ups. */
    const sizes more[] = {{201, 96, 150, 16, 3, {{0, 90}, {90, 30}, {120, 30}}},
                          {130, 40, 72, 3, 2, {{0, 72}, {72, 72}}},
                          {9, 33, 40, 8, 1, {{40, 40}}}};
    /* More ranks than columns. */
    const sizes large_rank[] = {{70, 20, 24, 80, 1, {{0, 24}}},
                                {70, 40, 48, 40, 3, {{0, 24}, {24, 12}, {36, 12}}}};
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        check_joined_forward(&cases[i], i % 2 ? GPT_ACT_GELU : GPT_ACT_NONE);
        check_joined_backward(&cases[i], i % 2 ? GPT_ACT_NONE : GPT_ACT_SWIGLU);
    }
    for (int i = 0; i < TEST_COUNT(more); i++)
        check_joined_forward(&more[i], i ? GPT_ACT_SWIGLU : GPT_ACT_NONE);
    check_joined_backward(&more[0], GPT_ACT_GELU);
    for (int i = 0; i < TEST_COUNT(large_rank); i++) {
        check_joined_forward(&large_rank[i], GPT_ACT_NONE);
        check_joined_backward(&large_rank[i], GPT_ACT_NONE);
    }
}

TEST_OPS_MAIN({"joined", test_layers})
