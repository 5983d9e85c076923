/* lora_forward, lora_backward: adapters against float64, at odd sizes, around activations and with dropout. */
#include "testing.h"

#include "adapted_layer.h"

/* With `scales`, rows have a gain, and outputs a bias that it leaves alone. */
static void check_forward(const sizes *s, int activation, gpt_dropout_site site, int scales) {
    int width = ref_activation_width(activation, s->OC);
    int64_t n_out = (int64_t)s->N * s->OC, n_pre = (int64_t)s->N * width;
    test_case("forward N=%d IC=%d OC=%d R=%d parts=%d activation=%d p=%g%s", s->N, s->IC, s->OC,
              s->R, s->n_parts, activation, site.p, scales ? ", scaled" : "");
    problem p = new_problem(s, width, site);
    double *y = host_copy(p.y, n_pre), *want = host_zeros(n_out), *u = adapt(&p, y);
    double *gain = random_f32(p.rows, 1.0), *bias = random_act(width, 1.0);
    double *v = host_zeros((int64_t)s->N * p.rows);
    for (int i = 0, row = 0; scales && i < s->n_parts; i++)
        for (int o = 0; o < s->parts[i].rows; o++, row++)
            for (int n = 0; n < s->N; n++) {
                int col = s->parts[i].first + o;
                double *at = &y[(int64_t)n * width + col];
                v[(int64_t)n * p.rows + row] = *at - bias[col];
                *at = gain[row] * (*at - bias[col]) + bias[col];
            }
    ref_activation_forward(want, y, activation, s->N, s->OC);
    int W = s->n_parts * s->R, activates = activation != GPT_ACT_NONE;
    gpt_shape shape = shape_of(s, activation);
    EACH_BACKEND {
        if (!test.ops->lora_forward) continue;
        void *pre = device_act(p.y, n_pre), *out = activates ? device_act(NULL, n_out) : pre;
        void *device_u = device_f32(NULL, (int64_t)s->N * W);
        void *device_v = device_act(NULL, (int64_t)s->N * p.rows);
        test_workspace(&shape);
        lora_forward op = {.out = out,
                           .pre = activates ? pre : NULL,
                           .u = device_u,
                           .v = scales ? device_v : NULL,
                           .gain = scales ? device_f32(gain, p.rows) : NULL,
                           .bias = scales ? device_bias(bias, width) : NULL,
                           .in = device_act(p.in, (int64_t)s->N * s->IC),
                           .a = device_f32(p.a, (int64_t)W * s->IC),
                           .b = device_f32(p.b, (int64_t)p.rows * s->R),
                           .dropout = device_dropout(site),
                           .scale = (float)p.scale,
                           .activation = activation,
                           .n_parts = s->n_parts,
                           .N = s->N,
                           .IC = s->IC,
                           .OC = s->OC,
                           .R = s->R};
        memcpy(op.parts, s->parts, sizeof op.parts);
        test.ops->lora_forward(test.ctx, &op);
        EXPECT_CLOSE("u", read_f32(device_u, (int64_t)s->N * W), u, s->N, W, 5e-6);
        EXPECT_CLOSE("out", read_act(out, n_out), want, s->N, s->OC, test_tol(5e-6));
        EXPECT_CLOSE("pre", read_act(pre, n_pre), y, s->N, width, test_tol(5e-6));
        if (scales)
            EXPECT_CLOSE("v", read_act(device_v, (int64_t)s->N * p.rows), v, s->N, p.rows,
                         test_tol(5e-6));
    }
}

/* With an activation before the layer; `recomputes` has the table make the layer's input of pre. */
static void check_backward(const sizes *s, int activation, int recomputes, gpt_dropout_site site) {
    int width = ref_activation_width(activation, s->IC), W = s->n_parts * s->R;
    int64_t n_in = (int64_t)s->N * s->IC, n_pre = (int64_t)s->N * width;
    int64_t n_out = (int64_t)s->N * s->OC, n_a = (int64_t)W * s->IC;
    test_case("backward N=%d IC=%d OC=%d R=%d parts=%d activation=%d%s p=%g", s->N, s->IC, s->OC,
              s->R, s->n_parts, activation, recomputes ? ", recomputed" : "", site.p);
    problem p = new_problem(s, s->OC, site);
    double *pre = random_act(n_pre, 1.0), *dout = random_act(n_out, 1.0);
    if (recomputes) ref_activation_forward(p.in, pre, activation, s->N, s->IC);
    int64_t n_b = (int64_t)p.rows * s->R;
    double *u = adapt(&p, p.y);
    for (int64_t i = 0; i < (int64_t)s->N * W; i++) u[i] = (float)u[i];
    gradients g = {host_zeros(n_in), random_f32(n_a, 1.0), random_f32(n_b, 1.0)};
    double *before_a = host_copy(g.da, n_a), *before_b = host_copy(g.db, n_b);
    differentiate(&p, u, dout, g);
    double *before = random_act(n_pre, 0.5), *want = host_zeros(n_pre);
    ref_activation_backward(want, g.din, pre, activation, s->N, s->IC);
    for (int64_t i = 0; i < n_pre; i++) want[i] += before[i];
    gpt_shape shape = shape_of(s, activation);
    EACH_BACKEND {
        if (!test.ops->lora_backward) continue;
        void *din = device_act(before, n_pre);
        void *da = device_f32(before_a, n_a), *db = device_f32(before_b, n_b);
        test_workspace(&shape);
        lora_backward op = {.din = din,
                            .da = da,
                            .db = db,
                            .dout = device_act(dout, n_out),
                            .in = recomputes ? NULL : device_act(p.in, n_in),
                            .pre = activation == GPT_ACT_NONE ? NULL : device_act(pre, n_pre),
                            .u = device_f32(u, (int64_t)s->N * W),
                            .a = device_f32(p.a, n_a),
                            .b = device_f32(p.b, n_b),
                            .dropout = device_dropout(site),
                            .scale = (float)p.scale,
                            .activation = activation,
                            .n_parts = s->n_parts,
                            .N = s->N,
                            .IC = s->IC,
                            .OC = s->OC,
                            .R = s->R};
        memcpy(op.parts, s->parts, sizeof op.parts);
        test.ops->lora_backward(test.ctx, &op);
        EXPECT_CLOSE("din", read_act(din, n_pre), want, s->N, width, test_tol(1e-5));
        EXPECT_CLOSE("da", read_f32(da, n_a), g.da, W, s->IC, 1e-5);
        EXPECT_CLOSE("db", read_f32(db, n_b), g.db, p.rows, s->R, 1e-5);
    }
}

static void test_forward(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        check_forward(&cases[i], GPT_ACT_NONE, host_dropout(0, 0), 0);
        check_forward(&cases[i], GPT_ACT_GELU, host_dropout(i % 2 ? 0.3f : 0, 1), 0);
        check_forward(&cases[i], GPT_ACT_SWIGLU, host_dropout(i % 2 ? 0 : 0.3f, 2), 0);
        check_forward(&cases[i], i % 2 ? GPT_ACT_GELU : GPT_ACT_NONE, host_dropout(0, 0), 1);
    }
    /* Gates and ups of SwiGLU. */
    const sizes gate_and_up = {7, 12, 20, 4, 2, {{0, 20}, {20, 20}}};
    for (int scales = 0; scales < 2; scales++)
        check_forward(&gate_and_up, GPT_ACT_SWIGLU, host_dropout(0, 0), scales);
}

/* ---- DoRA ---- */

/* Gains against the lengths of rows of W + scale B A; one row of zeros. */
static void check_gain(const sizes *s) {
    test_case("gain IC=%d OC=%d R=%d parts=%d", s->IC, s->OC, s->R, s->n_parts);
    problem p = new_problem(s, s->OC, host_dropout(0, 0));
    int R = s->R, W = s->n_parts * R;
    double *w = random_f32((int64_t)s->OC * s->IC, 1 / sqrt(s->IC)), *m = random_f32(p.rows, 1.0);
    double *squares = host_zeros(p.rows), *gain = host_zeros(p.rows),
           *per_norm = host_zeros(p.rows);
    double *aw = host_zeros((int64_t)W * s->OC);
    for (int k = 0; k < s->IC; k++) w[s->parts[0].first * s->IC + k] = 0;
    for (int j = 0; j < R; j++) p.b[j] = 0;
    for (int j = 0; j < W; j++)
        for (int o = 0; o < s->OC; o++) {
            double *to = &aw[(int64_t)j * s->OC + o];
            for (int k = 0; k < s->IC; k++) *to += p.a[j * s->IC + k] * w[o * s->IC + k];
            *to = round_act(*to);
        }
    for (int i = 0, row = 0; i < s->n_parts; i++)
        for (int o = 0; o < s->parts[i].rows; o++, row++) {
            double square = 0;
            for (int k = 0; k < s->IC; k++) {
                double x = w[(s->parts[i].first + o) * s->IC + k], y = x;
                for (int j = 0; j < R; j++)
                    y += p.scale * p.b[row * R + j] * p.a[(i * R + j) * s->IC + k];
                squares[row] += x * x;
                square += y * y;
            }
            per_norm[row] = square > 0 ? 1 / sqrt(square) : 0;
            gain[row] = m[row] * per_norm[row];
        }
    gpt_shape shape = shape_of(s, GPT_ACT_NONE);
    shape.dora = 1;
    EACH_BACKEND {
        float *got = device_f32(NULL, p.rows), *inverse = device_f32(NULL, p.rows);
        test_workspace(&shape);
        dora_gain op = {.gain = got,
                        .per_norm = inverse,
                        .m = device_f32(m, p.rows),
                        .squares = device_f32(squares, p.rows),
                        .aw = device_act(aw, (int64_t)W * s->OC),
                        .a = device_f32(p.a, (int64_t)W * s->IC),
                        .b = device_f32(p.b, (int64_t)p.rows * R),
                        .scale = (float)p.scale,
                        .n_parts = s->n_parts,
                        .IC = s->IC,
                        .OC = s->OC,
                        .R = R};
        memcpy(op.parts, s->parts, sizeof op.parts);
        test.ops->dora_gain(test.ctx, &op);
        EXPECT_CLOSE("gain", read_f32(got, p.rows), gain, 1, p.rows, test_tol(5e-6));
        EXPECT_CLOSE("per_norm", read_f32(inverse, p.rows), per_norm, 1, p.rows, test_tol(5e-6));
    }
}

static void check_rows_backward(const sizes *s) {
    test_case("rows backward N=%d OC=%d parts=%d", s->N, s->OC, s->n_parts);
    int rows = 0;
    for (int i = 0; i < s->n_parts; i++) rows += s->parts[i].rows;
    int64_t n = (int64_t)s->N * s->OC, n_v = (int64_t)s->N * rows;
    double *dout = random_act(n, 1.0), *v = random_act(n_v, 1.0), *gain = random_f32(rows, 1.0);
    double *per_norm = random_f32(rows, 1.0), *before = random_f32(rows, 1.0);
    double *dv = host_copy(dout, n), *dm = host_copy(before, rows);
    for (int i = 0, row = 0; i < s->n_parts; i++)
        for (int o = 0; o < s->parts[i].rows; o++, row++)
            for (int64_t k = 0; k < s->N; k++) {
                int64_t at = k * s->OC + s->parts[i].first + o;
                dm[row] += per_norm[row] * v[k * rows + row] * dout[at];
                dv[at] *= gain[row];
            }
    EACH_BACKEND {
        void *got = device_act(NULL, n);
        float *got_m = device_f32(before, rows);
        dora_backward op = {.dv = got,
                            .dm = got_m,
                            .dout = device_act(dout, n),
                            .v = device_act(v, n_v),
                            .gain = device_f32(gain, rows),
                            .per_norm = device_f32(per_norm, rows),
                            .n_parts = s->n_parts,
                            .N = s->N,
                            .OC = s->OC};
        memcpy(op.parts, s->parts, sizeof op.parts);
        test.ops->dora_backward(test.ctx, &op);
        EXPECT_CLOSE("dv", read_act(got, n), dv, s->N, s->OC, test_tol(1e-6));
        EXPECT_CLOSE("dm", read_f32(got_m, rows), dm, 1, rows, 1e-5);
        void *in = device_act(NULL, rows);
        test.ops->dora_inputs(test.ctx,
                              &(dora_inputs){.out = in, .a = device_f32(gain, rows), .n = rows});
        EXPECT_CLOSE("inputs", read_act(in, rows), gain, 1, rows, test_tol(1e-7));
    }
}

static void test_dora(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        check_gain(&cases[i]);
        check_rows_backward(&cases[i]);
    }
}

static void test_backward(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        check_backward(&cases[i], GPT_ACT_NONE, 0, host_dropout(0, 0));
        check_backward(&cases[i], GPT_ACT_NONE, 0, host_dropout(0.3f, 3));
        check_backward(&cases[i], GPT_ACT_GELU, i % 2, host_dropout(0, 0));
        check_backward(&cases[i], GPT_ACT_SWIGLU, i % 2, host_dropout(i % 3 ? 0 : 0.3f, 4));
        check_backward(&cases[i], GPT_ACT_SWISH, 1 - i % 2, host_dropout(0, 0));
    }
}

/* The reference itself, by finite differences. */
static const double *direction;
static double loss_of(void *state) {
    const problem *p = state;
    double *y = host_copy(p->y, (int64_t)p->s->N * p->width);
    adapt(p, y);
    return test_dot(y, direction, (int64_t)p->s->N * p->width);
}

static void test_reference(void) {
    const sizes *s = &cases[4];
    test_case("finite differences");
    problem p = new_problem(s, s->OC, host_dropout(0.3f, 5));
    int64_t n_in = (int64_t)s->N * s->IC, n_a = (int64_t)s->n_parts * s->R * s->IC;
    int64_t n_b = (int64_t)p.rows * s->R, n_out = (int64_t)s->N * s->OC;
    double *dout = random_act(n_out, 1.0), *y = host_copy(p.y, n_out), *u = adapt(&p, y);
    gradients g = {host_zeros(n_in), host_zeros(n_a), host_zeros(n_b)};
    differentiate(&p, u, dout, g);
    direction = dout;
    EXPECT_GRADIENT("din", loss_of, &p, p.in, g.din, n_in);
    EXPECT_GRADIENT("da", loss_of, &p, p.a, g.da, n_a);
    EXPECT_GRADIENT("db", loss_of, &p, p.b, g.db, n_b);
}

TEST_OPS_MAIN({"reference", test_reference}, {"forward", test_forward}, {"backward", test_backward},
              {"dora", test_dora})
