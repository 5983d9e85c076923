/* grad_norm, adamw_update. */
#include "testing.h"

#include "reference.h"
#include "updates.h"

static const int64_t norm_sizes[] = {1, 3, 1000, 100003};

static void test_norm(void) {
    for (int i = 0; i < TEST_COUNT(norm_sizes); i++) {
        int64_t n = norm_sizes[i];
        test_case("n=%lld", (long long)n);
        double *grads = random_f32(n, 1e-3), want = ref_grad_norm(grads, n);
        gpt_shape shape = shape_of(n);
        EACH_BACKEND {
            void *norm = device_f32(NULL, 1);
            test_workspace(&shape);
            test.ops->grad_norm(test.ctx,
                                &(grad_norm){.norm = norm, .grads = device_f32(grads, n), .n = n});
            EXPECT_CLOSE("norm", read_f32(norm, 1), &want, 1, 1, 1e-6);
        }
    }
}

/* A gradient that is not finite shows, whatever its position. */
static void test_norm_not_finite(void) {
    static const double spoilers[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < TEST_COUNT(norm_sizes) * 9; i++) {
        int64_t n = norm_sizes[i / 9], at = (n - 1) * (i % 3) / 2;
        double spoiler = spoilers[i / 3 % 3];
        test_case("n=%lld, %g at %lld", (long long)n, spoiler, (long long)at);
        double *grads = random_f32(n, 1e-3);
        grads[at] = spoiler;
        gpt_shape shape = shape_of(n);
        EACH_BACKEND {
            void *norm = device_f32(NULL, 1);
            test_workspace(&shape);
            test.ops->grad_norm(test.ctx,
                                &(grad_norm){.norm = norm, .grads = device_f32(grads, n), .n = n});
            EXPECT(!isfinite(read_f32(norm, 1)[0]));
        }
    }
}

/* One whose gradient and moments have its place, too. */
static gpt_segment adamw_segment(int64_t offset, int64_t size) {
    return (gpt_segment){.offset = offset,
                         .size = size,
                         .grad = offset,
                         .state = offset,
                         .optimizer = GPT_OPTIMIZER_ADAMW,
                         .lr_scale = 1};
}

/* Matrices and vectors by turns, with gaps that belong to no segment, as padding does. */
static int make_segments(gpt_segment *segments, int64_t n) {
    int count = 0;
    for (int64_t at = 0; at < n;) {
        int64_t size = 1 + random_below(n > 100 ? 700 : 3);
        if (size > n - at) size = n - at;
        segments[count] = adamw_segment(at, size);
        segments[count].decay = count % 2 == 0;
        at += size + (count % 3 == 2 ? 5 : 0);
        if (++count == 64) break;
    }
    return count;
}

/* The settings of the step'th update, as the device reads them. */
static void *device_step(gpt_adamw adamw, int64_t step) {
    gpt_adamw_step s = {adamw, (float)(1 - pow(adamw.beta1, (double)step)),
                        (float)(1 - pow(adamw.beta2, (double)step)), 0};
    void *device = test_device_alloc(sizeof s, TEST_GARBAGE);
    test.ops->upload(test.ctx, device, &s, sizeof s);
    return device;
}

typedef struct setup {
    gpt_adamw adamw;
    int64_t first_step;
    double grad_scale;
} setup;

enum { STEPS = 10 };

typedef struct problem {
    double *w, *m, *v, *grads[STEPS], norms[STEPS];
    double *want_w, *want_m, *want_v;
    gpt_segment segments[64];
    int n_segments;
    int64_t n;
} problem;

/* Training continues from step first_step; after the first there are moments. */
static problem make_problem(int64_t n, setup s) {
    problem p = {.n = n, .w = random_f32(n, 0.1)};
    p.m = s.first_step > 1 ? random_f32(n, s.grad_scale) : host_zeros(n);
    p.v = s.first_step > 1 ? random_f32(n, s.grad_scale) : host_zeros(n);
    for (int64_t i = 0; i < n; i++) p.v[i] = (float)(p.v[i] * p.v[i]);
    p.n_segments = make_segments(p.segments, n);
    p.want_w = host_copy(p.w, n);
    p.want_m = host_copy(p.m, n);
    p.want_v = host_copy(p.v, n);
    for (int k = 0; k < STEPS; k++) {
        p.grads[k] = random_f32(n, s.grad_scale);
        p.norms[k] = (float)ref_grad_norm(p.grads[k], n);
        ref_adamw(p.want_w, p.want_m, p.want_v, p.grads[k], p.norms[k], s.adamw, s.first_step + k,
                  p.segments, p.n_segments);
    }
    return p;
}

static double *difference(const double *a, const double *b, int64_t n) {
    double *d = host_zeros(n);
    for (int64_t i = 0; i < n; i++) d[i] = a[i] - b[i];
    return d;
}

static void expect_gaps_kept(const problem *p, const double *got, const double *before) {
    for (int s = 0; s < p->n_segments; s++) {
        int64_t from = p->segments[s].offset + p->segments[s].size;
        int64_t to = s + 1 < p->n_segments ? p->segments[s + 1].offset : p->n;
        EXPECT_SAME("what no segment names", got + from, before + from, to - from);
    }
}

static void check_updates(int64_t n, setup s) {
    test_case("n=%lld step=%lld lr=%g decay=%g clip=%g eps=%g grads=%g", (long long)n,
              (long long)s.first_step, s.adamw.lr, s.adamw.weight_decay, s.adamw.grad_clip,
              s.adamw.eps, s.grad_scale);
    problem p = make_problem(n, s);
    double *want = difference(p.want_w, p.w, n);
    gpt_shape shape = shape_of(n);
    EACH_BACKEND {
        void *w = device_f32(p.w, n), *m = device_f32(p.m, n), *v = device_f32(p.v, n);
        test_workspace(&shape);
        for (int k = 0; k < STEPS; k++) {
            test.ops->adamw_update(test.ctx,
                                   &(adamw_update){.w = w,
                                                   .m = m,
                                                   .v = v,
                                                   .grads = device_f32(p.grads[k], n),
                                                   .norm = device_f32(&p.norms[k], 1),
                                                   .step = device_step(s.adamw, s.first_step + k),
                                                   .segments = p.segments,
                                                   .n_segments = p.n_segments});
        }
        double *got = read_f32(w, n), *got_m = read_f32(m, n), *got_v = read_f32(v, n);
        EXPECT_CLOSE("m", got_m, p.want_m, 1, n, 2e-6);
        EXPECT_CLOSE("v", got_v, p.want_v, 1, n, 2e-6);
        /* Weights near 0.1 are kept to 4e-9 a step, and ten steps move them by a few lr. */
        EXPECT_CLOSE("w moved by", difference(got, p.w, n), want, 1, n, 1e-5);
        expect_gaps_kept(&p, got, p.w);
        expect_gaps_kept(&p, got_m, p.m);
        expect_gaps_kept(&p, got_v, p.v);
    }
}

static void test_updates(void) {
    static const int64_t sizes[] = {1, 3, 65, 1000, 10007};
    static const setup setups[] = {
        {{1e-2f, 0.9f, 0.999f, 1e-8f, 0.0f, 0.0f}, 1, 1e-2},
        {{1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f}, 1, 1e-6},
        {{1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f}, 1, 30.0},
        {{1e-2f, 0.8f, 0.99f, 1e-3f, 0.5f, 0.5f}, 1, 1e-3}, /* eps as large as the gradients */
        {{1e-2f, 0.9f, 0.999f, 1e-8f, 0.1f, 1.0f}, 1000, 1.0},
        {{1e-2f, 0.9f, 0.999f, 1e-8f, 0.1f, 1.0f}, 5000000000, 1.0},
        {{1e-2f, 0.0f, 0.0f, 1e-8f, 0.0f, 0.0f}, 1, 1.0}, /* no memory: the sign of the gradient */
    };
    for (int i = 0; i < TEST_COUNT(sizes); i++) {
        for (int k = 0; k < TEST_COUNT(setups); k++) check_updates(sizes[i], setups[k]);
    }
}

/* PyTorch adds 1e-6 to the norm, which a norm of 2e-3 shows. Adam's step forgets the scale of the
 * gradients, so this one reads the moments. */
static void test_clip_of_small_norm(void) {
    setup s = {{1e-2f, 0.9f, 0.999f, 1e-8f, 0.0f, 1e-3f}, 1, 1e-4};
    check_updates(401, s);
}

static void test_not_finite(void) {
    static const double norms[] = {NAN, INFINITY};
    enum { n = 1003 };
    for (int k = 0; k < 2; k++) {
        for (int clip = 0; clip < 2; clip++) {
            test_case("norm=%g clip=%d", norms[k], clip);
            gpt_adamw adamw = {1e-2f, 0.9f, 0.999f, 1e-8f, 0.1f, (float)clip};
            gpt_segment segment = adamw_segment(0, n);
            segment.decay = 1;
            double *w = random_f32(n, 1.0), *m = random_f32(n, 1.0), *v = host_copy(w, n);
            for (int i = 0; i < n; i++) v[i] = fabs(v[i]);
            double *grads = random_f32(n, 1.0);
            grads[17] = norms[k];
            gpt_shape shape = shape_of(n);
            EACH_BACKEND {
                void *device_w = device_f32(w, n), *device_m = device_f32(m, n);
                void *device_v = device_f32(v, n);
                test_workspace(&shape);
                test.ops->adamw_update(test.ctx, &(adamw_update){.w = device_w,
                                                                 .m = device_m,
                                                                 .v = device_v,
                                                                 .grads = device_f32(grads, n),
                                                                 .norm = device_f32(&norms[k], 1),
                                                                 .step = device_step(adamw, 3),
                                                                 .segments = &segment,
                                                                 .n_segments = 1});
                EXPECT_SAME("w", read_f32(device_w, n), w, n);
                EXPECT_SAME("m", read_f32(device_m, n), m, n);
                EXPECT_SAME("v", read_f32(device_v, n), v, n);
            }
        }
    }
}

/* A parameter without gradient and decay does not change, whatever eps: 0 / (0 + eps). */
static void test_zero_gradients(void) {
    enum { n = 70 };
    test_case("n=%d", n);
    gpt_adamw adamw = {1e-2f, 0.9f, 0.999f, 1e-8f, 0.1f, 1.0f};
    gpt_segment segments[] = {adamw_segment(0, 33), adamw_segment(33, n - 33)};
    segments[1].decay = 1;
    double *w = random_f32(n, 1.0), *zeros = host_zeros(n), *want = host_copy(w, n);
    for (int i = 33; i < n; i++) want[i] *= 1.0 - (double)adamw.lr * adamw.weight_decay;
    gpt_shape shape = shape_of(n);
    EACH_BACKEND {
        void *device_w = device_f32(w, n);
        test_workspace(&shape);
        test.ops->adamw_update(test.ctx, &(adamw_update){.w = device_w,
                                                         .m = device_f32(zeros, n),
                                                         .v = device_f32(zeros, n),
                                                         .grads = device_f32(zeros, n),
                                                         .norm = device_f32(zeros, 1),
                                                         .step = device_step(adamw, 1),
                                                         .segments = segments,
                                                         .n_segments = 2});
        double *got = read_f32(device_w, n);
        EXPECT_SAME("without decay", got, w, 33);
        EXPECT_CLOSE("with decay", got, want, 1, n, 2e-7);
    }
}

/* An update packs what packing the updated weights gives, bit for bit. */
static void check_packing(int rows, int cols, int parts) {
    test_case("rows=%d cols=%d parts=%d", rows, cols, parts);
    int64_t n = (int64_t)rows * cols;
    gpt_adamw adamw = {1e-2f, 0.9f, 0.999f, 1e-8f, 0.1f, 1.0f};
    double *w = random_f32(n, 1.0), *grads = random_f32(n, 1.0), *zeros = host_zeros(n);
    double norm = 1.0;
    gpt_shape shape = shape_of(n);
    EACH_BACKEND {
        size_t bytes = test.ops->weights_bytes(rows, cols, parts, 1);
        if (bytes == 0) continue;
        void *device_w = device_f32(w, n);
        gpt_segment segment = adamw_segment(0, n);
        segment.rows = rows, segment.cols = cols, segment.parts = parts;
        gpt_segment again = segment;
        segment.packed = test_device_alloc(bytes, 0);
        again.packed = test_device_alloc(bytes, 0);
        test_workspace(&shape);
        test.ops->weights_pack(test.ctx,
                               &(weights_pack){.w = device_w, .segment = &segment, .training = 1});
        test.ops->adamw_update(test.ctx, &(adamw_update){.w = device_w,
                                                         .m = device_f32(zeros, n),
                                                         .v = device_f32(zeros, n),
                                                         .grads = device_f32(grads, n),
                                                         .norm = device_f32(&norm, 1),
                                                         .step = device_step(adamw, 1),
                                                         .segments = &segment,
                                                         .n_segments = 1});
        test.ops->weights_pack(test.ctx,
                               &(weights_pack){.w = device_w, .segment = &again, .training = 1});
        int64_t count = (int64_t)bytes / 2;
        double *got = read_act(segment.packed, count);
        EXPECT_SAME("packed weights", got, read_act(again.packed, count), count);
        double largest = 0;
        for (int64_t i = 0; i < count; i++) largest = fmax(largest, fabs(got[i]));
        EXPECT(largest > 0);
    }
}

static void test_packing(void) {
    check_packing(16, 5, 1);
    check_packing(64, 33, 1);
    check_packing(96, 40, 2); /* each part divides into strips */
    check_packing(7, 3, 1);
    check_packing(42, 17, 2); /* neither does */
    check_packing(48, 32, 2); /* 24 rows a part: ragged */
}

TEST_OPS_MAIN({"norm", test_norm}, {"packing in passing", test_packing},
              {"norm, not finite", test_norm_not_finite}, {"updates", test_updates},
              {"clip of a small norm", test_clip_of_small_norm}, {"not finite", test_not_finite},
              {"zero gradients", test_zero_gradients})
