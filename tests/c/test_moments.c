/* adamw_update with moments of 16 and 8 bits, which CPUs have. */
#include "testing.h"

#include "moments.h"
#include "reference.h"
#include "updates.h"

static const int forms[] = {GPT_MOMENTS_BF16, GPT_MOMENTS_INT8};

/* ---- the numbers that a moment can be, by the paper's description and in float64 ---- */

enum { SIGNED_BITS = 7, UNSIGNED_BITS = 8, MOST_CODES = 256, PER_SCALE = 256 };

/* In the k-th decade below 1 there are 2^(bits - 1 - k), evenly from a tenth of its end on. Ascending, as codes are. */
static int make_codes(int is_first, double *x) {
    int n = 0, bits = is_first ? SIGNED_BITS : UNSIGNED_BITS;
    x[n++] = is_first ? 0 : 1e-8;
    for (int k = bits - 1; k >= 0; k--)
        for (int i = 1, of = 1 << (bits - 1 - k); i <= of; i++)
            x[n++] = pow(10, -k) * (0.1 + 0.9 * i / of);
    return n;
}

static double codes[2][MOST_CODES];
static int n_codes[2];

static void find_codes(void) {
    for (int is_first = 0; is_first < 2 && !n_codes[1]; is_first++)
        n_codes[is_first] = make_codes(is_first, codes[is_first]);
}

/* ---- a state on the device ---- */

typedef struct moments {
    void *m, *v;
    float *m_scales, *v_scales;
    int64_t n;
    int form;
} moments;

static double *decoded(const void *place, const float *scales, const moments *s, int is_first) {
    double *x = host_zeros(s->n);
    find_codes();
    int n_blocks = (int)((s->n + PER_SCALE - 1) / PER_SCALE),
        per = s->form == GPT_MOMENTS_BF16 ? 2 : 1;
    unsigned char *bytes = (unsigned char *)host_zeros(s->n);
    test.ops->download(test.ctx, bytes, place, (size_t)(s->n * per));
    if (s->form == GPT_MOMENTS_BF16) {
        for (int64_t i = 0; i < s->n; i++) x[i] = float_of_bf16(((uint16_t *)bytes)[i]);
        return x;
    }
    double *scale = read_f32(scales, n_blocks);
    for (int64_t i = 0; i < s->n; i++) {
        int j = bytes[i], is_minus = is_first && j >= 128;
        x[i] = codes[is_first][is_minus ? j - 128 : j] * scale[i / PER_SCALE] * (is_minus ? -1 : 1);
    }
    return x;
}

/* A state in which codes and scales of 8 bits are any; the moments are about `size` and its square. */
static moments new_moments(int form, int64_t n, double size) {
    n = (n + PER_SCALE - 1) / PER_SCALE * PER_SCALE;
    moments s = {.n = n, .form = form};
    test.counter = 1 << 20; /* the same on each visit */
    int64_t n_blocks = (n + PER_SCALE - 1) / PER_SCALE;
    uint16_t *m = (uint16_t *)host_floats(n), *v = (uint16_t *)host_floats(n);
    double *m_scales = host_zeros(n_blocks), *v_scales = host_zeros(n_blocks);
    for (int64_t i = 0; i < n; i++) {
        double x = size * random_normal();
        if (form == GPT_MOMENTS_BF16) {
            m[i] = bf16_of_float((float)(size * random_normal())),
            v[i] = bf16_of_float((float)(x * x));
            continue;
        }
        ((uint8_t *)m)[i] = (uint8_t)random_bits(),
                  ((uint8_t *)v)[i] = (uint8_t)(128 + random_below(128));
    }
    for (int64_t i = 0; i < n_blocks; i++)
        m_scales[i] = (float)(size * (1 + random_uniform())),
        v_scales[i] = m_scales[i] * m_scales[i];
    size_t bytes = (size_t)n * (form == GPT_MOMENTS_BF16 ? 2 : 1);
    s.m = test_device_filled(m, bytes, 0), s.v = test_device_filled(v, bytes, 0);
    s.m_scales = device_f32(m_scales, n_blocks), s.v_scales = device_f32(v_scales, n_blocks);
    return s;
}

static void *device_step(gpt_adamw adamw, int64_t step) {
    gpt_adamw_step s = {adamw, (float)(1 - pow(adamw.beta1, (double)step)),
                        (float)(1 - pow(adamw.beta2, (double)step)), moment_key(step)};
    void *device = test_device_alloc(sizeof s, TEST_GARBAGE);
    test.ops->upload(test.ctx, device, &s, sizeof s);
    return device;
}

static void update(const moments *s, float *w, const double *grads, int64_t n_grads, double norm,
                   gpt_adamw adamw, int64_t step, const gpt_segment *segments, int n_segments) {
    test.ops->adamw_update(test.ctx, &(adamw_update){.w = w,
                                                     .m = s->m,
                                                     .v = s->v,
                                                     .m_scales = s->m_scales,
                                                     .v_scales = s->v_scales,
                                                     .grads = device_f32(grads, n_grads),
                                                     .norm = device_f32(&norm, 1),
                                                     .step = device_step(adamw, step),
                                                     .segments = segments,
                                                     .n_segments = n_segments,
                                                     .moments = s->form});
}

/* ---- one step against float64 ---- */

/* The numbers next to x that a moment can be, in a block whose largest magnitude is scale. */
static void neighbours(int form, int is_first, double x, double scale, double *below,
                       double *above) {
    double size = fabs(x);
    if (form == GPT_MOMENTS_BF16) {
        *below = float_of_bits(bits_of_float((float)size) & 0xffff0000u);
        *above = float_of_bits((bits_of_float((float)size) & 0xffff0000u) + 0x10000u);
        return;
    }
    int j = 0, end = n_codes[is_first] - 1;
    while (end - j > 1) {
        int middle = (j + end) / 2;
        *(codes[is_first][middle] * scale <= size ? &j : &end) = middle;
    }
    *below = codes[is_first][j] * scale, *above = codes[is_first][j + 1] * scale;
}

/* Each number became one next to it, and on average none was lost: adds up by how many gaps. */
static void check_rounding(const moments *s, const gpt_segment *segment, int is_first,
                           const double *got, const double *want, double *sum, double *count) {
    for (int64_t i = 0; i < segment->size; i++) {
        int64_t begin = i / PER_SCALE * PER_SCALE, at = segment->state + i;
        double scale = 0, below, above;
        for (int64_t k = begin; k < segment->size && k < begin + PER_SCALE; k++)
            scale = fmax(scale, fabs(want[segment->state + k]));
        neighbours(s->form, is_first, want[at], scale, &below, &above);
        double x = fabs(want[at]), y = want[at] < 0 ? -got[at] : got[at], gap = above - below;
        double slack = 2e-3 * gap + 2e-6 * x;
        EXPECT(fabs(y - below) <= slack || fabs(y - above) <= slack ||
               (x <= below && y >= 0 && y <= below + slack));
        if (x > below) *sum += (y - x) / gap, *count += 1;
    }
}

enum { MOST_SEGMENTS = 8 };

/* Places of parameters, gradients and states differ; sizes are around those of a block. */
static int make_segments(int64_t n, gpt_segment *segments, int64_t *state) {
    static const int sizes[] = {1, 256, 257, 3, 255, 1000};
    int count = 0;
    *state = PER_SCALE;
    for (int64_t at = 2; at < n + 2; count++) {
        int64_t size = count < TEST_COUNT(sizes) ? sizes[count] : n;
        if (size > n + 2 - at) size = n + 2 - at;
        segments[count] = (gpt_segment){.offset = at,
                                        .size = size,
                                        .grad = at + 1,
                                        .state = *state,
                                        .optimizer = GPT_OPTIMIZER_ADAMW,
                                        .lr_scale = count % 2 ? 0.5f : 1,
                                        .decay = count % 3 == 0};
        at += size;
        *state += (size + PER_SCALE - 1) / PER_SCALE * PER_SCALE;
    }
    return count;
}

static void check_step(int form, int64_t n, double size, gpt_adamw adamw) {
    gpt_segment segments[MOST_SEGMENTS];
    int64_t n_state, N = n + 3;
    int count = make_segments(n, segments, &n_state);
    double sums[2] = {0}, counts[2] = {0};
    gpt_shape shape = shape_of(N);
    test_case("n=%lld form=%d size=%g", (long long)n, form, size);
    double *w = random_f32(N, 0.1), *grads = random_f32(N, size);
    double norm = (float)ref_grad_norm(grads, N);
    EACH_BACKEND {
        if (!test_on_cpu()) continue;
        moments s = new_moments(form, n_state, size);
        double *m = decoded(s.m, s.m_scales, &s, 1), *v = decoded(s.v, s.v_scales, &s, 0);
        double *want_w = host_copy(w, N), *want_m = host_copy(m, n_state),
               *want_v = host_copy(v, n_state);
        for (int i = 0; i < count; i++) {
            gpt_segment own = segments[i];
            gpt_adamw scaled = adamw;
            scaled.lr *= own.lr_scale, own.offset = 0;
            ref_adamw(want_w + segments[i].offset, want_m + own.state, want_v + own.state,
                      grads + own.grad, norm, scaled, 7, &own, 1);
        }
        void *device_w = device_f32(w, N);
        test_workspace(&shape);
        update(&s, device_w, grads, N, norm, adamw, 7, segments, count);
        double *got_w = read_f32(device_w, N), *moved = host_zeros(N), *wanted = host_zeros(N);
        for (int64_t i = 0; i < N; i++) moved[i] = got_w[i] - w[i], wanted[i] = want_w[i] - w[i];
        EXPECT_CLOSE("w moved by", moved, wanted, 1, N, 2e-5);
        double *got_m = decoded(s.m, s.m_scales, &s, 1), *got_v = decoded(s.v, s.v_scales, &s, 0);
        for (int i = 0; i < count; i++) {
            check_rounding(&s, &segments[i], 1, got_m, want_m, &sums[0], &counts[0]);
            check_rounding(&s, &segments[i], 0, got_v, want_v, &sums[1], &counts[1]);
        }
        EXPECT_SAME("m before the first", got_m, m, PER_SCALE);
        EXPECT_SAME("v before the first", got_v, v, PER_SCALE);
    }
    /* Visits have the same numbers: their error is that of one. A rounding has a deviation of half a gap at most. */
    for (int k = 0; k < 2 && n > 100 && counts[k] > 0; k++) /* none without a CPU */
        EXPECT(fabs(sums[k]) / counts[k] < 5 * 0.5 / sqrt((double)n));
}

static void test_steps(void) {
    static const int64_t sizes[] = {1, 3, 255, 513, 2500};
    const gpt_adamw usual = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1.0f};
    const gpt_adamw slow = {1e-2f, 0.9f, 0.999f, 1e-8f, 0.0f, 0.0f};
    for (int f = 0; f < TEST_COUNT(forms); f++)
        for (int i = 0; i < TEST_COUNT(sizes); i++) {
            check_step(forms[f], sizes[i], 1e-3, usual);
            check_step(forms[f], sizes[i], 30, slow);
        }
}

/* Without gradients a second moment decays as it should, though a step changes it by less than half a gap. */
static void test_decay(void) {
    enum { n = 1000, STEPS = 60 };
    const gpt_adamw slow = {0, 0.9f, 0.999f, 1e-8f, 0.0f, 0.0f};
    gpt_segment segment = {.size = n, .optimizer = GPT_OPTIMIZER_ADAMW, .lr_scale = 1};
    for (int f = 0; f < TEST_COUNT(forms); f++) {
        test_case("form=%d", forms[f]);
        double *zeros = host_zeros(n);
        gpt_shape shape = shape_of(n);
        EACH_BACKEND {
            if (!test_on_cpu()) continue;
            if (test.threads > 1) continue;
            moments s = new_moments(forms[f], n, 1);
            double *before = decoded(s.v, s.v_scales, &s, 0), sum = 0, want = 0;
            void *w = device_f32(zeros, n);
            test_workspace(&shape);
            for (int step = 1; step <= STEPS; step++)
                update(&s, w, zeros, n, 0, slow, step, &segment, 1);
            double *after = decoded(s.v, s.v_scales, &s, 0);
            for (int i = 0; i < n; i++) want += before[i] * pow(0.999f, STEPS), sum += after[i];
            EXPECT_NEAR("the sum", sum, want, 0.01 * want);
        }
    }
}

/* A norm that is not finite changes nothing; gradients and moments of 0 leave a parameter as it is. */
static void test_no_step(void) {
    enum { n = 300 };
    const gpt_adamw adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.0f, 1.0f};
    gpt_segment segment = {.size = n, .optimizer = GPT_OPTIMIZER_ADAMW, .lr_scale = 1};
    for (int f = 0; f < TEST_COUNT(forms); f++) {
        test_case("form=%d", forms[f]);
        double *w = random_f32(n, 1), *grads = random_f32(n, 1), *zeros = host_zeros(4 * n);
        gpt_shape shape = shape_of(n);
        EACH_BACKEND {
            if (!test_on_cpu()) continue;
            moments s = new_moments(forms[f], n, 1), none = s;
            double *m = decoded(s.m, s.m_scales, &s, 1), *v = decoded(s.v, s.v_scales, &s, 0);
            float *device_w = device_f32(w, n);
            test_workspace(&shape);
            update(&s, device_w, grads, n, NAN, adamw, 3, &segment, 1);
            EXPECT_SAME("m", decoded(s.m, s.m_scales, &s, 1), m, n);
            EXPECT_SAME("v", decoded(s.v, s.v_scales, &s, 0), v, n);
            none.m = device_f32(zeros, s.n), none.v = device_f32(zeros, s.n);
            none.m_scales = device_f32(zeros, 2), none.v_scales = device_f32(zeros, 2);
            update(&none, device_w, zeros, n, 0, adamw, 3, &segment, 1);
            EXPECT_SAME("w", read_f32(device_w, n), w, n);
            EXPECT_SAME("new m", decoded(none.m, none.m_scales, &none, 1), zeros, n);
            EXPECT_SAME("new v", decoded(none.v, none.v_scales, &none, 0), zeros, n);
        }
    }
}

/* An update packs what packing the updated weights gives, and its numbers are those without a packed form. */
static void check_packing(int form, int rows, int cols, int parts) {
    test_case("form=%d rows=%d cols=%d parts=%d", form, rows, cols, parts);
    int64_t n = (int64_t)rows * cols, n_state = (n + PER_SCALE - 1) / PER_SCALE * PER_SCALE;
    gpt_adamw adamw = {1e-2f, 0.9f, 0.999f, 1e-8f, 0.1f, 1.0f};
    double *w = random_f32(n, 1.0), *grads = random_f32(n, 1.0);
    gpt_shape shape = shape_of(n);
    EACH_BACKEND {
        if (!test_on_cpu()) continue;
        size_t bytes = test.ops->weights_bytes(rows, cols, parts, 1);
        if (bytes == 0) continue;
        gpt_segment plain = {.size = n,
                             .optimizer = GPT_OPTIMIZER_ADAMW,
                             .lr_scale = 1,
                             .rows = rows,
                             .cols = cols,
                             .parts = parts};
        gpt_segment segment = plain, again = plain;
        segment.packed = test_device_alloc(bytes, 0), again.packed = test_device_alloc(bytes, 0);
        moments s = new_moments(form, n_state, 1);
        moments other = new_moments(form, n_state, 1);
        float *device_w = device_f32(w, n), *other_w = device_f32(w, n);
        test_workspace(&shape);
        update(&s, device_w, grads, n, 1, adamw, 3, &segment, 1);
        update(&other, other_w, grads, n, 1, adamw, 3, &plain, 1);
        test.ops->weights_pack(test.ctx,
                               &(weights_pack){.w = device_w, .segment = &again, .training = 1});
        int64_t count = (int64_t)bytes / 2;
        EXPECT_SAME("packed", read_act(segment.packed, count), read_act(again.packed, count),
                    count);
        EXPECT_SAME("w", read_f32(device_w, n), read_f32(other_w, n), n);
        EXPECT_SAME("m", decoded(s.m, s.m_scales, &s, 1),
                    decoded(other.m, other.m_scales, &other, 1), n);
        EXPECT_SAME("v", decoded(s.v, s.v_scales, &s, 0),
                    decoded(other.v, other.v_scales, &other, 0), n);
    }
}

static void test_packing(void) {
    for (int f = 0; f < TEST_COUNT(forms); f++) {
        check_packing(forms[f], 16, 5, 1);
        check_packing(forms[f], 80, 33, 1);
        check_packing(forms[f], 96, 40, 2);
        check_packing(forms[f], 42, 17, 2);
    }
}

/* Codes ascend, 1 is the last one, and each is kept by a rounding to nearest and by any random one. */
static void test_codes(void) {
    for (int is_first = 0; is_first < 2; is_first++) {
        moment_code code = moment_code_of(is_first ? M_BITS : V_BITS);
        find_codes();
        const double *x = codes[is_first];
        int n = n_codes[is_first];
        test_case("%d codes", n);
        EXPECT(n == (is_first ? 128 : 256) && x[n - 1] == 1);
        for (int j = 0; j < n; j++) {
            float share = moment_share(&code, j);
            EXPECT_NEAR("a code", share, x[j], 2e-7 * x[j]);
            EXPECT(j == 0 || share > moment_share(&code, j - 1));
            EXPECT(moment_code_at(&code, share, 0.5f) == j);
            EXPECT(moment_code_at(&code, share, MOMENT_U(0.0f)) == j);
            EXPECT(moment_code_at(&code, share, MOMENT_U(65535.0f)) == j);
        }
        EXPECT(moment_share(&code, n - 1) == 1);
    }
}

TEST_OPS_MAIN({"codes", test_codes}, {"steps", test_steps}, {"decay", test_decay},
              {"no step", test_no_step}, {"packing", test_packing})
