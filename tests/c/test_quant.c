/* linear_forward, head_forward and classifier_forward with weights of 8 and 4 bits. */
#define TEST_QUANTIZED TEST_ROUNDS
#include "testing.h"

#include "reference.h"

#include <float.h>

enum { GROUP = 32 };

typedef struct sizes {
    int N, IC, OC;
} sizes;

/* Odd, around a group of terms, a panel of outputs, a band and a tile of rows, and more terms than
 * are taken at once. */
static const sizes cases[] = {
    {1, 1, 1},    {1, 33, 5},     {2, 32, 16},    {3, 65, 17},   {4, 31, 33},
    {5, 64, 31},  {7, 96, 48},    {1, 256, 65},   {49, 40, 300}, {130, 70, 20},
    {2, 4133, 9}, {6, 4096, 600}, {34, 4133, 20},
};
static const int activations[] = {GPT_ACT_NONE, GPT_ACT_GELU, GPT_ACT_SWISH, GPT_ACT_SWIGLU};

static int largest(void) {
    return strstr(test.ops->name, "int8") ? 127 : 8;
}

/* Numbers that rounding to 8 bits leaves as they are: in each group of each row, multiples of a power of
 * two up to `most` of them, which two reach. */
static double *exact_numbers(int rows, int cols, int most) {
    double *x = host_zeros((int64_t)rows * cols);
    for (int64_t i = 0; i < (int64_t)rows * cols; i++) {
        double scale = ldexp(1.0, -random_below(3) - 5);
        int last = (int)(i % cols) + GROUP < cols ? GROUP : cols - (int)(i % cols);
        if (i % cols % GROUP) continue;
        for (int k = 0; k < last; k++) x[i + k] = scale * (random_below(2 * most - 1) - most + 1);
        int one = random_below(last);
        x[i + one] = -scale * most;
        x[i + (one + 1) % last] = scale * most;
    }
    return x;
}

/* The same for Q4_K, whose scales and minima are integers of 6 bits in blocks of 256: the first group of each
 * has the largest. */
static double *exact_blocks(int rows, int cols) {
    static const int scales[] = {63, 21, 7};
    double *x = host_zeros((int64_t)rows * cols);
    for (int64_t i = 0; i < (int64_t)rows * cols; i++) {
        int col = (int)(i % cols), last = col + GROUP < cols ? GROUP : cols - col;
        if (col % GROUP) continue;
        double scale = ldexp(scales[col % 256 ? random_below(3) : 0], -10);
        for (int k = 0; k < last; k++) x[i + k] = scale * (random_below(16) - 8);
        x[i + last - 1] = scale * 7;
        x[i] = scale * -8;
    }
    return x;
}

/* The numbers that each kind of product multiplies by: of 4 bits, of 8, of 4 as bf16, which a GPU makes of
 * them for more than FEW rows. */
enum { KINDS = 3, FEW = 8 };

static int kind(int N) {
    return largest() == 127 ? 1 : test_on_cpu() || N <= FEW ? 0 : 2;
}

static double *as_bf16(const double *w, int64_t n) {
    double *x = host_zeros(n);
    for (int64_t i = 0; i < n; i++) x[i] = float_of_bf16(bf16_of_float((float)w[i]));
    return x;
}

static gpt_shape shape_of(sizes s, int activation) {
    return (gpt_shape){.N = s.N,
                       .T = s.N,
                       .C = s.IC > s.OC ? s.IC : s.OC,
                       .V = s.OC,
                       .Vp = s.OC,
                       .NH = 1,
                       .NKV = 1,
                       .HS = s.IC,
                       .F = s.IC > s.OC ? s.IC : s.OC,
                       .activation = activation,
                       .n_params = 1};
}

/* Activations are bf16, which holds every integer up to 127 of them. */
static void check_exact(sizes s, int activation) {
    int width = ref_activation_width(activation, s.OC);
    int64_t in_size = (int64_t)s.N * s.IC, out_size = (int64_t)s.N * s.OC;
    test_case("N=%d IC=%d OC=%d activation=%d", s.N, s.IC, s.OC, activation);
    double *in = exact_numbers(s.N, s.IC, 127), *b = random_act(width, 1.0);
    double *w[2] = {exact_blocks(width, s.IC), exact_numbers(width, s.IC, 127)};
    double *read[KINDS] = {w[0], w[1], as_bf16(w[0], (int64_t)width * s.IC)}, *y[KINDS];
    double *want = host_zeros(out_size);
    for (int k = 0; k < KINDS; k++) {
        y[k] = host_zeros((int64_t)s.N * width);
        ref_linear_forward(y[k], in, read[k], b, s.N, s.IC, width);
    }
    gpt_shape shape = shape_of(s, activation);
    EACH_BACKEND {
        int k = largest() == 127;
        void *out = device_act(NULL, out_size);
        ref_activation_forward(want, y[kind(s.N)], activation, s.N, s.OC);
        test_workspace(&shape);
        test.ops->linear_forward(
            test.ctx, &(linear_forward){.out = out,
                                        .in = device_act(in, in_size),
                                        .w = device_weight(w[k], width, s.IC, width / s.OC),
                                        .b = device_bias(b, width),
                                        .activation = activation,
                                        .N = s.N,
                                        .IC = s.IC,
                                        .OC = s.OC});
        /* One rounding to bf16; where bias and activation are another kernel, another before
         * it, and two where gates meet ups. */
        EXPECT_CLOSE("out", read_act(out, out_size), want, s.N, s.OC, test_on_cpu() ? 4e-3 : 12e-3);
    }
}

static void test_linear(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++)
        for (int a = 0; a < TEST_COUNT(activations); a++) check_exact(cases[i], activations[a]);
}

/* The losses of inference, then of a training pass, which multiplies by weights in bf16. */
static void check_losses(gpt_shape *shape, const void *x, const void *wte, const void *b,
                         const int32_t *targets, double *losses[KINDS]) {
    int N = shape->N, int8 = largest() == 127;
    for (int exact = 0; exact <= test_on_cpu(); exact++) { /* emulated devices lack the memory */
        void *out = device_f32(NULL, N);
        shape->training = exact;
        test_workspace(shape);
        test.ops->classifier_forward(test.ctx,
                                     &(classifier_forward){.losses = out,
                                                           .x = x,
                                                           .wte = wte,
                                                           .targets = device_i32(targets, N),
                                                           .b = b,
                                                           .exact = exact,
                                                           .N = N,
                                                           .C = shape->HS,
                                                           .V = shape->V,
                                                           .Vp = shape->Vp});
        double *want = losses[!exact || int8 ? kind(N) : KINDS - 1];
        /* A GPU stores a chunk's logits, which are about as large as the losses, in bf16. */
        EXPECT_CLOSE(exact ? "losses of training" : "losses", read_f32(out, N), want, 1, N,
                     test_on_cpu() ? 1e-5 : 4e-3);
    }
    shape->training = 0;
}

/* Logits are float32: nothing is rounded on the way. */
static void test_head(void) {
    for (int i = 0; i < TEST_COUNT(cases); i++) {
        sizes s = cases[i];
        int64_t in_size = (int64_t)s.N * s.IC;
        test_case("N=%d C=%d V=%d", s.N, s.IC, s.OC);
        double *in = exact_numbers(s.N, s.IC, 127);
        int Vp = (s.OC + 63) / 64 * 64; /* padding rows hold what all others do */
        double *w[2] = {exact_blocks(Vp, s.IC), exact_numbers(Vp, s.IC, 127)};
        double *b = random_f32(Vp, 1.0);
        for (int v = 0; v < Vp; v++) b[v] = v < s.OC ? b[v] : 1024.0;
        ref_head_bias = i % 2 ? b : NULL;
        int32_t *targets = random_ints(s.N, s.OC);
        targets[s.N / 2] = -1;
        double *read[KINDS] = {w[0], w[1], NULL}, *logits[KINDS], *losses[KINDS];
        for (int k = 0; k < KINDS; k++) {
            /* So that the softmax is none of a single logit. */
            double unit = ldexp(1.0, -2 - (int)ceil(log2(sqrt(s.IC))));
            for (int64_t j = 0; j < (int64_t)Vp * s.IC && k < 2; j++) w[k][j] *= unit;
            if (k == 2) read[k] = as_bf16(w[0], (int64_t)Vp * s.IC);
            logits[k] = host_zeros((int64_t)s.N * s.OC);
            losses[k] = host_zeros(s.N);
            ref_linear_forward(logits[k], in, read[k], ref_head_bias, s.N, s.IC, s.OC);
            ref_classifier(losses[k], NULL, NULL, in, read[k], targets, 1.0, s.N, s.IC, s.OC);
        }
        gpt_shape shape = shape_of(s, GPT_ACT_GELU);
        shape.Vp = Vp;
        EACH_BACKEND {
            int k = largest() == 127;
            void *out = device_f32(NULL, (int64_t)s.N * Vp);
            void *x = device_act(in, in_size), *wte = device_weight(w[k], Vp, s.IC, 1);
            void *bias = ref_head_bias ? device_f32(b, Vp) : NULL;
            test_workspace(&shape);
            test.ops->head_forward(test.ctx, &(head_forward){.logits = out,
                                                             .x = x,
                                                             .wte = wte,
                                                             .b = bias,
                                                             .N = s.N,
                                                             .C = s.IC,
                                                             .V = s.OC,
                                                             .Vp = Vp});
            double *got = read_head(out, s.N, s.OC, Vp);
            EXPECT_CLOSE("logits", got, logits[kind(s.N)], s.N, s.OC, 2e-6);
            check_losses(&shape, x, wte, bias, targets, losses);
        }
    }
    ref_head_bias = NULL;
}

/* The error of normally distributed weights, read back with unit vectors. The uniform error of a group's
 * scale s is s / sqrt(12); its largest number is about 2.1 sigma of 32. Minima save steps: ggml's search, of
 * seven times as many candidates, gives Q4_K 0.0711. */
static void check_quality(int COLS) {
    enum { ROWS = 64 };
    test_case("%d x %d normal weights", ROWS, COLS);
    double *w = random_f32(ROWS * COLS, 1.0), *unit = host_zeros(COLS * COLS);
    for (int i = 0; i < COLS; i++) unit[i * COLS + i] = 1.0;
    gpt_shape shape = shape_of((sizes){COLS, COLS, ROWS}, GPT_ACT_GELU);
    EACH_BACKEND {
        void *out = device_f32(NULL, COLS * ROWS);
        test_workspace(&shape);
        test.ops->head_forward(test.ctx, &(head_forward){.logits = out,
                                                         .x = device_act(unit, COLS * COLS),
                                                         .wte = device_weight(w, ROWS, COLS, 1),
                                                         .N = COLS,
                                                         .C = COLS,
                                                         .V = ROWS,
                                                         .Vp = ROWS});
        double *got = read_f32(out, COLS * ROWS), error = 0, all = 0;
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLS; c++) {
                double d = got[c * ROWS + r] - w[r * COLS + c];
                error += d * d;
                all += w[r * COLS + c] * w[r * COLS + c];
            }
        double relative = sqrt(error / all), bound = largest() == 127 ? 0.006 : 0.0735;
        EXPECT(relative < bound);
        EXPECT(relative > bound / 4); /* they are rounded */
    }
}

/* In blocks that are not whole, whole, and both. */
static void test_quality(void) {
    check_quality(96);
    check_quality(256);
    check_quality(300);
}

/* Activations and weights that have no scale: NaNs, infinities, and numbers near the smallest. A sum
 * with one that is not finite is not a number, all others are right. */
static void check_extremes(int IC) {
    enum { ROWS = 7, OC = 19, BAD_ROW = 2, BAD_OUT = 3 };
    static const float values[] = {NAN,     INFINITY, -INFINITY, FLT_MAX,      -FLT_MAX,
                                   FLT_MIN, 1e-39f,   -1e-39f,   FLT_TRUE_MIN, -0.0f};
    for (int v = 0; v < TEST_COUNT(values); v++)
        for (int side = 0; side < 2; side++)
            for (int whole = 0; whole < 2; whole++) {
                float value = values[v];
                test_case("%g in %s, %d", value, side ? "weights" : "activations", whole);
                double *in = random_f32(ROWS * IC, 1.0), *w = random_f32(OC * IC, 1.0);
                double *row = side ? w + BAD_OUT * IC : in + BAD_ROW * IC;
                for (int k = 0; k < (whole ? GROUP : 1); k++) row[GROUP + k] = value;
                gpt_shape shape = shape_of((sizes){ROWS, IC, OC}, GPT_ACT_NONE);
                EACH_BACKEND {
                    void *out = device_act(NULL, ROWS * OC);
                    if (!test_on_cpu()) continue;
                    test_workspace(&shape);
                    test.ops->linear_forward(test.ctx,
                                             &(linear_forward){.out = out,
                                                               .in = device_act(in, ROWS * IC),
                                                               .w = device_weight(w, OC, IC, 1),
                                                               .b = NULL,
                                                               .activation = GPT_ACT_NONE,
                                                               .N = ROWS,
                                                               .IC = IC,
                                                               .OC = OC});
                    double *got = read_act(out, ROWS * OC);
                    for (int r = 0; r < ROWS; r++)
                        for (int o = 0; o < OC; o++) {
                            int here = side ? o == BAD_OUT : r == BAD_ROW;
                            double y = got[r * OC + o];
                            if (here && !isfinite(value)) EXPECT(isnan(y));
                            if (!here) EXPECT(fabs(y) < 100);
                            if (here && fabsf(value) < 1) EXPECT(fabs(y) < 100);
                        }
                }
            }
}

static void test_extremes(void) {
    check_extremes(3 * GROUP + 5);
    check_extremes(512);
}

/* The bits of `rows` rows from `first` on, multiplied alone. */
static const double *rows_alone(const double *in, void *w, sizes s, int first, int rows) {
    void *out = device_act(NULL, (int64_t)rows * s.OC);
    test.ops->linear_forward(
        test.ctx, &(linear_forward){.out = out,
                                    .in = device_act(in + first * s.IC, (int64_t)rows * s.IC),
                                    .w = w,
                                    .activation = GPT_ACT_NONE,
                                    .N = rows,
                                    .IC = s.IC,
                                    .OC = s.OC});
    return read_act(out, (int64_t)rows * s.OC);
}

/* A row has the same bits alone, among a few, and among so many that other kernels multiply them. */
static void check_alone(sizes s) {
    static const int counts[] = {1, 2, 7, 32, 33, 70};
    test_case("N=%d IC=%d OC=%d", s.N, s.IC, s.OC);
    double *in = random_act(s.N * s.IC, 1.0), *w = random_f32(s.OC * s.IC, 1.0);
    gpt_shape shape = shape_of(s, GPT_ACT_NONE);
    EACH_BACKEND {
        if (!test_on_cpu() || strstr(test.ops->name, "amx")) continue;
        test_workspace(&shape);
        void *weights = device_weight(w, s.OC, s.IC, 1);
        const double *all = rows_alone(in, weights, s, 0, s.N);
        for (int i = 0; i < TEST_COUNT(counts); i++) {
            int first = s.N - counts[i];
            EXPECT_SAME("rows", rows_alone(in, weights, s, first, counts[i]), all + first * s.OC,
                        counts[i] * s.OC);
        }
    }
}

static void test_alone(void) {
    check_alone((sizes){73, 300, 41});
    check_alone((sizes){400, 33, 70});
    check_alone((sizes){600, 4133, 9}); /* more than there is room for at once */
}

TEST_OPS_MAIN({"alone", test_alone}, {"linear", test_linear}, {"head", test_head},
              {"quality", test_quality}, {"extremes", test_extremes})
