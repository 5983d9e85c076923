/* sgd_update. */
#include "testing.h"

#include "reference.h"
#include "updates.h"

/* PyTorch's SGD without dampening, in float64. The offsets of the parameter, its gradient and its state
 * differ. */
static void ref_sgd(double *w, double *momentum, const double *grads, double norm, gpt_sgd sgd,
                    const gpt_segment *segments, int n_segments) {
    double clip = sgd.grad_clip > 0 ? fmin(1.0, sgd.grad_clip / (norm + 1e-6)) : 1.0;
    for (const gpt_segment *s = segments; s < segments + n_segments; s++) {
        for (int64_t i = 0; s->optimizer == GPT_OPTIMIZER_SGD && i < s->size; i++) {
            double decay = s->decay ? sgd.weight_decay : 0.0, *m = &momentum[s->state + i];
            double g = clip * grads[s->grad + i] + decay * w[s->offset + i];
            *m = sgd.momentum * *m + g;
            w[s->offset + i] -= (double)sgd.lr * s->lr_scale * *m;
        }
    }
}

/* Segments of SGD, of AdamW and frozen ones by turns. */
static int make_segments(gpt_segment *segments, int64_t n) {
    int count = 0;
    int64_t grads = 0, states = 0;
    for (int64_t at = 0; at < n && count < 32; count++) {
        int64_t size = 1 + random_below(n > 100 ? 900 : 3);
        if (size > n - at) size = n - at;
        segments[count] = (gpt_segment){.offset = at,
                                        .size = size,
                                        .grad = count % 5 == 4 ? -1 : grads,
                                        .state = states,
                                        .optimizer = GPT_OPTIMIZER_SGD,
                                        .lr_scale = count % 2 ? 0.5f : 1.0f,
                                        .decay = count % 3 == 0};
        if (count % 5 == 2) segments[count].optimizer = GPT_OPTIMIZER_ADAMW;
        if (count % 5 == 4) segments[count].optimizer = GPT_OPTIMIZER_DEFAULT;
        if (count % 5 != 4) grads += size;
        if (segments[count].optimizer == GPT_OPTIMIZER_SGD) states += size;
        at += size;
    }
    return count;
}

enum { STEPS = 6 };

static void *device_sgd(gpt_sgd sgd) {
    void *device = test_device_alloc(sizeof sgd, TEST_GARBAGE);
    test.ops->upload(test.ctx, device, &sgd, sizeof sgd);
    return device;
}

static void check_updates(int64_t n, gpt_sgd sgd, double scale) {
    test_case("n=%lld lr=%g momentum=%g decay=%g clip=%g grads=%g", (long long)n, sgd.lr,
              sgd.momentum, sgd.weight_decay, sgd.grad_clip, scale);
    gpt_segment segments[32];
    int n_segments = make_segments(segments, n);
    double *w = random_f32(n, 0.1), *momentum = host_zeros(n), *grads[STEPS], norms[STEPS];
    double *want = host_copy(w, n), *want_momentum = host_copy(momentum, n);
    for (int k = 0; k < STEPS; k++) {
        grads[k] = random_f32(n, scale);
        norms[k] = (float)ref_grad_norm(grads[k], n);
        ref_sgd(want, want_momentum, grads[k], norms[k], sgd, segments, n_segments);
    }
    gpt_shape shape = shape_of(n);
    EACH_BACKEND {
        void *device_w = device_f32(w, n), *device_momentum = device_f32(momentum, n);
        test_workspace(&shape);
        for (int k = 0; k < STEPS; k++)
            test.ops->sgd_update(test.ctx, &(sgd_update){.w = device_w,
                                                         .momentum = device_momentum,
                                                         .grads = device_f32(grads[k], n),
                                                         .norm = device_f32(&norms[k], 1),
                                                         .step = device_sgd(sgd),
                                                         .segments = segments,
                                                         .n_segments = n_segments});
        double *got = read_f32(device_w, n), *got_momentum = read_f32(device_momentum, n);
        EXPECT_CLOSE("w", got, want, 1, n, 2e-6);
        EXPECT_CLOSE("momentum", got_momentum, want_momentum, 1, n, 2e-6);
        for (int i = 0; i < n_segments; i++) {
            const gpt_segment *s = &segments[i];
            if (s->optimizer == GPT_OPTIMIZER_SGD) continue;
            EXPECT_SAME("others", got + s->offset, w + s->offset, s->size);
        }
    }
}

static void test_updates(void) {
    static const int64_t sizes[] = {1, 3, 65, 1000, 10007};
    static const gpt_sgd settings[] = {
        {1e-2f, 0.0f, 0.0f, 0.0f},  {1e-2f, 0.9f, 0.0f, 0.0f}, {1e-2f, 0.9f, 0.1f, 0.0f},
        {1e-2f, 0.9f, 0.1f, 1e-3f}, {0.0f, 0.5f, 0.1f, 1.0f},
    };
    for (int i = 0; i < TEST_COUNT(sizes); i++)
        for (int k = 0; k < TEST_COUNT(settings); k++) check_updates(sizes[i], settings[k], 0.3);
}

/* A norm that is not finite changes nothing. */
static void test_not_finite(void) {
    enum { n = 1003 };
    static const double norms[] = {NAN, INFINITY};
    gpt_segment segment = {.size = n, .optimizer = GPT_OPTIMIZER_SGD, .lr_scale = 1.0f, .decay = 1};
    gpt_shape shape = shape_of(n);
    for (int k = 0; k < 2; k++) {
        test_case("norm=%g", norms[k]);
        double *w = random_f32(n, 1.0), *momentum = random_f32(n, 1.0), *grads = random_f32(n, 1.0);
        EACH_BACKEND {
            void *device_w = device_f32(w, n), *device_momentum = device_f32(momentum, n);
            test_workspace(&shape);
            test.ops->sgd_update(
                test.ctx, &(sgd_update){.w = device_w,
                                        .momentum = device_momentum,
                                        .grads = device_f32(grads, n),
                                        .norm = device_f32(&norms[k], 1),
                                        .step = device_sgd((gpt_sgd){0.1f, 0.9f, 0.1f, 1.0f}),
                                        .segments = &segment,
                                        .n_segments = 1});
            EXPECT_SAME("w", read_f32(device_w, n), w, n);
            EXPECT_SAME("momentum", read_f32(device_momentum, n), momentum, n);
        }
    }
}

TEST_OPS_MAIN({"updates", test_updates}, {"not finite", test_not_finite})
