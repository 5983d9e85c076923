/* Matrices that are given as GGUF's blocks: their products and their numbers, each number from its bytes
 * by ggml's formula (ggml/src/ggml-quants.c), in float64. */
#define TEST_QUANTIZED TEST_HAS_BLOCKS
#include "testing.h"

#include "block_types.h"

#include "reference.h"

typedef struct known_type {
    int type, size, bytes, half[2]; /* where its float16 are; -1: there is none */
} known_type;

static const known_type types[] = {
    {GPT_BLOCK_Q4_0, 32, 18, {0, -1}},     {GPT_BLOCK_Q4_1, 32, 20, {0, 2}},
    {GPT_BLOCK_Q5_0, 32, 22, {0, -1}},     {GPT_BLOCK_Q5_1, 32, 24, {0, 2}},
    {GPT_BLOCK_Q8_0, 32, 34, {0, -1}},     {GPT_BLOCK_IQ4_NL, 32, 18, {0, -1}},
    {GPT_BLOCK_Q2_K, 256, 84, {80, 82}},   {GPT_BLOCK_Q3_K, 256, 110, {108, -1}},
    {GPT_BLOCK_Q4_K, 256, 144, {0, 2}},    {GPT_BLOCK_Q5_K, 256, 176, {0, 2}},
    {GPT_BLOCK_Q6_K, 256, 210, {208, -1}}, {GPT_BLOCK_IQ4_XS, 256, 136, {0, -1}},
};

static const known_type *type_of(int type) {
    const known_type *t = types;
    while (t->type != type) t++;
    return t;
}

static double half_value(const uint8_t *b) {
    int x = b[0] | b[1] << 8, exponent = x >> 10 & 31;
    double size = exponent ? ldexp(1024 + (x & 1023), exponent - 25) : ldexp(x & 1023, -24);
    return x >> 15 ? -size : size;
}

static const int steps[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                            1,    13,   25,  38,  53,  69,  89,  113};

/* Number k of a block. */
static double number_of_32(int type, const uint8_t *b, int k) {
    const uint8_t *q = b + type_of(type)->bytes - 16;
    int nibble = k < 16 ? q[k] & 15 : q[k - 16] >> 4;
    double d = half_value(b), m = half_value(b + 2);
    switch (type) {
    case GPT_BLOCK_Q4_0:
        return d * (nibble - 8);
    case GPT_BLOCK_Q4_1:
        return d * nibble + m;
    case GPT_BLOCK_Q5_0:
        return d * ((nibble | (b[2 + k / 8] >> k % 8 & 1) << 4) - 16);
    case GPT_BLOCK_Q5_1:
        return d * (nibble | (b[4 + k / 8] >> k % 8 & 1) << 4) + m;
    case GPT_BLOCK_IQ4_NL:
        return d * steps[nibble];
    default:
        return d * (int8_t)b[2 + k];
    }
}

/* get_scale_min_k4 of ggml. */
static void scale_and_minimum(const uint8_t *q, int j, int *scale, int *least) {
    *scale = j < 4 ? q[j] & 63 : (q[j + 4] & 15) | q[j - 4] >> 6 << 4;
    *least = j < 4 ? q[j + 4] & 63 : q[j + 4] >> 4 | q[j] >> 6 << 4;
}

static double number_of_256(int type, const uint8_t *b, int k) {
    int half = k / 128, in_half = k % 128, l = k % 32, quarter = in_half / 32, scale, least, q;
    switch (type) {
    case GPT_BLOCK_Q2_K:
        q = b[16 + half * 32 + l] >> 2 * quarter & 3;
        return half_value(b + 80) * (b[k / 16] & 15) * q - half_value(b + 82) * (b[k / 16] >> 4);
    case GPT_BLOCK_Q3_K: {
        int g = k / 16, low = g < 8 ? b[96 + g] & 15 : b[96 + g - 8] >> 4;
        q = (b[32 + half * 32 + l] >> 2 * quarter & 3) - (b[l] >> k / 32 & 1 ? 0 : 4);
        return half_value(b + 108) * ((low | (b[104 + g % 4] >> 2 * (g / 4) & 3) << 4) - 32) * q;
    }
    case GPT_BLOCK_Q4_K:
    case GPT_BLOCK_Q5_K: {
        const uint8_t *packed = b + (type == GPT_BLOCK_Q4_K ? 16 : 48);
        q = packed[k / 64 * 32 + l] >> (k % 64 < 32 ? 0 : 4) & 15;
        if (type == GPT_BLOCK_Q5_K) q |= (b[16 + l] >> k / 32 & 1) << 4;
        scale_and_minimum(b + 4, k / 32, &scale, &least);
        return half_value(b) * scale * q - half_value(b + 2) * least;
    }
    case GPT_BLOCK_Q6_K:
        q = b[half * 64 + quarter % 2 * 32 + l] >> (quarter < 2 ? 0 : 4) & 15;
        q |= (b[128 + half * 32 + l] >> 2 * quarter & 3) << 4;
        return half_value(b + 208) * (int8_t)b[192 + k / 16] * (q - 32);
    default: /* IQ4_XS */
        scale = (b[4 + k / 64] >> 4 * (k / 32 % 2) & 15) | ((b[2] | b[3] << 8) >> 2 * (k / 32) & 3)
                                                               << 4;
        return half_value(b) * (scale - 32) * steps[b[8 + k / 32 * 16 + l % 16] >> l / 16 * 4 & 15];
    }
}

/* Random blocks of a matrix, and its numbers. Float16 are below 2^-3. */
static uint8_t *random_blocks(const known_type *t, double *w, int rows, int cols) {
    int64_t n = (int64_t)rows * cols / t->size;
    uint8_t *blocks = test_alloc(&test.host, (size_t)(n * t->bytes));
    for (int64_t i = 0; i < n; i++) {
        uint8_t *b = blocks + i * t->bytes;
        for (int k = 0; k < t->bytes; k++) b[k] = (uint8_t)random_below(256);
        for (int h = 0; h < 2; h++)
            if (t->half[h] >= 0)
                b[t->half[h] + 1] = (uint8_t)(random_below(2) << 7 | random_below(48));
        for (int k = 0; k < t->size; k++)
            w[i * t->size + k] =
                t->size == 32 ? number_of_32(t->type, b, k) : number_of_256(t->type, b, k);
    }
    return blocks;
}

/* Rows of several types, one after the other. */
typedef struct matrix {
    gpt_segment segment;
    uint8_t *blocks[GPT_MAX_STACKED];
    double *w; /* (rows, cols) */
} matrix;

static matrix random_matrix(int n, const gpt_stack *stacked, int cols) {
    matrix m = {.segment = {.cols = cols, .parts = 1, .n_stacked = n}};
    for (int part = 0; part < n; part++) m.segment.rows += stacked[part].rows;
    m.segment.size = (int64_t)m.segment.rows * cols;
    m.w = host_zeros(m.segment.size);
    double *w = m.w;
    for (int part = 0; part < n; part++) {
        const known_type *t = type_of(stacked[part].block);
        m.segment.stacked[part] = stacked[part];
        m.blocks[part] = random_blocks(t, w, stacked[part].rows, cols);
        w += (int64_t)stacked[part].rows * cols;
    }
    return m;
}

static gpt_segment device_blocks(const matrix *m) {
    gpt_segment s = m->segment;
    size_t bytes = test.ops->blocks_bytes(&s);
    s.packed = test_device_alloc(bytes, TEST_GARBAGE);
    for (int part = 0; part < s.n_stacked; part++) {
        const known_type *t = type_of(s.stacked[part].block);
        EXPECT(block_bytes(&s, part) ==
               (size_t)(s.stacked[part].rows * (s.cols / t->size) * t->bytes));
        test.ops->blocks_pack(test.ctx, &s, part, m->blocks[part]);
    }
    EXPECT(test.ops->weight_bytes(test.ctx, s.packed) == bytes);
    return s;
}

/* Numbers that rounding leaves as they are: multiples up to 127 of a power of two in each group, which
 * two reach: a number that is larger than all others would stay out. */
static double *exact_numbers(int rows, int cols) {
    double *x = host_zeros((int64_t)rows * cols);
    for (int64_t i = 0; i < (int64_t)rows * cols; i++) {
        if (i % cols % 32) continue;
        double scale = ldexp(1.0, -random_below(3) - 5);
        for (int k = 0; k < 32; k++) x[i + k] = scale * (random_below(253) - 126);
        int one = random_below(32);
        x[i + one] = -scale * 127;
        x[i + (one + 1) % 32] = scale * 127;
    }
    return x;
}

static gpt_shape shape_of(int N, int IC, int OC, int activation) {
    int widest = IC > OC ? IC : OC;
    return (gpt_shape){.N = N,
                       .T = N,
                       .C = widest,
                       .V = OC,
                       .Vp = OC,
                       .NH = 1,
                       .NKV = 1,
                       .HS = IC,
                       .F = widest,
                       .activation = activation,
                       .n_params = 1};
}

/* On a GPU, weights become bf16 for more than a few rows. */
static int becomes_bf16(int N) {
    return !test_on_cpu() && N > 8;
}

static const double *bf16_numbers(const matrix *m) {
    int64_t n = (int64_t)m->segment.rows * m->segment.cols;
    double *w = host_zeros(n);
    for (int64_t i = 0; i < n; i++) w[i] = float_of_bf16(bf16_of_float((float)m->w[i]));
    return w;
}

/* So many rows are enough on a GPU, where each number is computed as others are. */
static int is_tested(int k) {
    return test_on_cpu() || k % 3 == 1;
}

/* Logits are float32: nothing is rounded on the way. */
static void check_head(const matrix *m, int N, int tested) {
    int IC = m->segment.cols, OC = m->segment.rows;
    double *in = exact_numbers(N, IC), *want = host_zeros((int64_t)N * OC);
    ref_linear_forward(want, in, m->w, NULL, N, IC, OC);
    gpt_shape shape = shape_of(N, IC, OC, GPT_ACT_NONE);
    EACH_BACKEND {
        if (!is_tested(tested)) continue;
        double *answer = becomes_bf16(N) ? host_zeros((int64_t)N * OC) : want;
        if (answer != want) ref_linear_forward(answer, in, bf16_numbers(m), NULL, N, IC, OC);
        void *out = device_f32(NULL, (int64_t)N * OC);
        gpt_segment s = device_blocks(m);
        test_workspace(&shape);
        test.ops->head_forward(test.ctx, &(head_forward){.logits = out,
                                                         .x = device_act(in, (int64_t)N * IC),
                                                         .wte = s.packed,
                                                         .N = N,
                                                         .C = IC,
                                                         .V = OC,
                                                         .Vp = OC});
        /* A CPU's sums of a group are integers, a GPU's float32. */
        EXPECT_CLOSE("logits", read_f32(out, (int64_t)N * OC), answer, N, OC,
                     test_on_cpu() ? 3e-6 : 1e-5);
    }
}

static const int rows_of[] = {1, 3, 4, 7, 49, 130};

static void test_types(void) {
    static const int widths[] = {1, 17, 64, 300};
    for (int i = 0; i < TEST_COUNT(types); i++)
        for (int k = i / 2 % test_step(2); k < TEST_COUNT(rows_of); k += test_step(2)) {
            const known_type *t = &types[i];
            int cols = t->size * (k == 1 ? 4096 / t->size + 1 : 1 + k % 3);
            int rows = widths[(i + k) % TEST_COUNT(widths)];
            test_case("type %d, N=%d, %d x %d", t->type, rows_of[k], rows, cols);
            matrix m = random_matrix(1, &(gpt_stack){rows, t->type}, cols);
            check_head(&m, rows_of[k], i + k);
        }
}

/* Queries, keys and values of different types, whose rows do not end with panels or tiles. */
static void test_stacked(void) {
    for (int i = 0; i < TEST_COUNT(types); i++)
        for (int k = 0; k < TEST_COUNT(rows_of); k += 2) {
            const gpt_stack stacked[] = {{70 + i, types[i].type},
                                         {1 + 7 * k, types[(i + 5) % 12].type},
                                         {33, types[(i + 7) % 12].type}};
            test_case("types from %d, N=%d", types[i].type, rows_of[k]);
            matrix m = random_matrix(3, stacked, 512);
            check_head(&m, rows_of[k], i + k);
        }
}

/* Gates of one type, ups of another. */
static void test_swiglu(void) {
    for (int i = 0; i < TEST_COUNT(types); i++)
        for (int k = i / 2 % test_step(2); k < TEST_COUNT(rows_of); k += test_step(2)) {
            int N = rows_of[k], OC = 35 + 90 * (k % 2), IC = 256;
            const gpt_stack stacked[] = {{OC, types[i].type}, {OC, types[(i + 3) % 12].type}};
            test_case("gates of type %d, N=%d", types[i].type, N);
            matrix m = random_matrix(2, stacked, IC);
            m.segment.parts = 2;
            double *in = exact_numbers(N, IC), *b = random_act(2 * OC, 1.0);
            for (int64_t j = 0; j < (int64_t)N * IC; j++) in[j] *= 0.125;
            double *y = host_zeros((int64_t)N * 2 * OC), *want = host_zeros((int64_t)N * OC);
            ref_linear_forward(y, in, m.w, b, N, IC, 2 * OC);
            ref_activation_forward(want, y, GPT_ACT_SWIGLU, N, OC);
            gpt_shape shape = shape_of(N, IC, OC, GPT_ACT_SWIGLU);
            EACH_BACKEND {
                if (!is_tested(i + k)) continue;
                double *answer = becomes_bf16(N) ? host_zeros((int64_t)N * OC) : want;
                if (answer != want) {
                    ref_linear_forward(y, in, bf16_numbers(&m), b, N, IC, 2 * OC);
                    ref_activation_forward(answer, y, GPT_ACT_SWIGLU, N, OC);
                }
                void *out = device_act(NULL, (int64_t)N * OC);
                gpt_segment s = device_blocks(&m);
                test_workspace(&shape);
                test.ops->linear_forward(test.ctx,
                                         &(linear_forward){.out = out,
                                                           .in = device_act(in, (int64_t)N * IC),
                                                           .w = s.packed,
                                                           .b = device_bias(b, 2 * OC),
                                                           .activation = GPT_ACT_SWIGLU,
                                                           .N = N,
                                                           .IC = IC,
                                                           .OC = OC});
                /* One rounding to bf16; on a GPU gates and ups are rounded before they meet. */
                EXPECT_CLOSE("out", read_act(out, (int64_t)N * OC), answer, N, OC,
                             test_on_cpu() ? 4e-3 : 12e-3);
            }
        }
}

/* Rows come back as float32 rounds them once: products of scales and integers are exact. */
static void test_rows(void) {
    for (int i = 0; i < TEST_COUNT(types); i++) {
        const gpt_stack stacked[] = {{19, types[i].type}, {40, types[(i + 1) % 12].type}};
        enum { N = 9, COLS = 512, ROWS = 59 };
        test_case("type %d", types[i].type);
        matrix m = random_matrix(2, stacked, COLS);
        int32_t *rows = random_ints(N, ROWS);
        double *some = host_zeros(N * COLS), *all = host_zeros(ROWS * COLS);
        for (int k = 0; k < ROWS * COLS; k++) all[k] = (float)m.w[k];
        for (int k = 0; k < N * COLS; k++) some[k] = all[rows[k / COLS] * COLS + k % COLS];
        EACH_BACKEND {
            gpt_segment s = device_blocks(&m);
            float *out = device_f32(NULL, ROWS * COLS);
            test.ops->blocks_unpack(test.ctx, out, &s, rows, N);
            EXPECT_SAME("some rows", read_f32(out, N * COLS), some, N * COLS);
            test.ops->blocks_unpack(test.ctx, out, &s, NULL, ROWS);
            EXPECT_SAME("all rows", read_f32(out, ROWS * COLS), all, ROWS * COLS);
        }
    }
}

/* A scale that is not a number spoils its output alone. */
static void test_not_finite(void) {
    enum { N = 5, ROWS = 20, COLS = 256, BAD = 7 };
    for (int i = 0; i < TEST_COUNT(types); i++) {
        test_case("type %d", types[i].type);
        matrix m = random_matrix(1, &(gpt_stack){ROWS, types[i].type}, COLS);
        uint8_t *d = m.blocks[0] + BAD * (COLS / types[i].size) * types[i].bytes + types[i].half[0];
        d[0] = 1, d[1] = 0x7c;
        double *in = exact_numbers(N, COLS);
        gpt_shape shape = shape_of(N, COLS, ROWS, GPT_ACT_NONE);
        EACH_BACKEND {
            float *out = device_f32(NULL, N * ROWS);
            gpt_segment s = device_blocks(&m);
            test_workspace(&shape);
            test.ops->head_forward(test.ctx, &(head_forward){.logits = out,
                                                             .x = device_act(in, N * COLS),
                                                             .wte = s.packed,
                                                             .N = N,
                                                             .C = COLS,
                                                             .V = ROWS,
                                                             .Vp = ROWS});
            double *got = read_f32(out, N * ROWS);
            for (int k = 0; k < N * ROWS; k++) EXPECT(isnan(got[k]) == (k % ROWS == BAD));
        }
    }
}

/* A matrix that is given as floats stays bf16. */
static void test_floats(void) {
    enum { N = 5, IC = 40, OC = 37 };
    test_case("floats");
    double *in = random_act(N * IC, 1.0), *w = random_act(OC * IC, 1.0), *want = host_zeros(N * OC);
    ref_linear_forward(want, in, w, NULL, N, IC, OC);
    gpt_shape shape = shape_of(N, IC, OC, GPT_ACT_NONE);
    EACH_BACKEND {
        void *out = device_f32(NULL, N * OC);
        test_workspace(&shape);
        test.ops->head_forward(test.ctx, &(head_forward){.logits = out,
                                                         .x = device_act(in, N * IC),
                                                         .wte = device_weight(w, OC, IC, 1),
                                                         .N = N,
                                                         .C = IC,
                                                         .V = OC,
                                                         .Vp = OC});
        EXPECT_CLOSE("logits", read_f32(out, N * OC), want, N, OC, 1e-6);
    }
}

static void test_refusals(void) {
    EACH_BACKEND {
        gpt_segment s = {.rows = 3, .cols = 288, .parts = 1, .n_stacked = 1};
        s.stacked[0] = (gpt_stack){3, GPT_BLOCK_Q8_0};
        EXPECT(test.ops->blocks_bytes(&s) > 0);
        s.stacked[0].block = GPT_BLOCK_Q6_K; /* 288 is not a multiple of 256 */
        EXPECT(test.ops->blocks_bytes(&s) == 0);
        s.stacked[0].block = 9;
        EXPECT(test.ops->blocks_bytes(&s) == 0);
    }
}

TEST_OPS_MAIN({"types", test_types}, {"stacked", test_stacked}, {"swiglu", test_swiglu},
              {"rows", test_rows}, {"not finite", test_not_finite}, {"floats", test_floats},
              {"refusals", test_refusals})
