/* muon.cu: the momentum of each matrix, brought near to an orthogonal matrix by products, is its step. */
#include "product.h"

#include <math.h>

enum { MOST_BLOCKS = 1024 };

/* A matrix as the kernels see it. */
typedef struct muon_matrix {
    float *w, *momentum;
    float *v; /* (rows) or NULL */
    const float *grad;
    elem *packed;         /* the form of w that products read, or NULL */
    const float *norm;    /* (1) of all gradients */
    const gpt_muon *step; /* (1) */
    float lr_scale, scale;
    int decay, rows, cols;
} muon_matrix;

typedef struct muon_buffers {
    double *sums;      /* (most of MOST_BLOCKS and rows) of squares */
    float *factor;     /* (1) of x */
    elem *x, *next;    /* (rows, cols) */
    elem *gram, *poly; /* (least, least) of rows and cols */
    float *square;     /* (least, least) */
} muon_buffers;

static void *take_bytes(char *base, size_t *used, size_t bytes) {
    void *at = base ? base + *used : NULL;
    *used += align_up(bytes);
    return at;
}

/* Lays the buffers out from base (NULL: only counts). Returns the bytes. */
static size_t muon_lay_out(char *base, int rows, int cols, muon_buffers *out) {
    size_t used = 0, n = (size_t)rows * (size_t)cols, side = (size_t)least(rows, cols);
    out->sums =
        (double *)take_bytes(base, &used, sizeof(double) * most<size_t>(MOST_BLOCKS, (size_t)rows));
    out->factor = (float *)take_bytes(base, &used, sizeof(float));
    out->x = (elem *)take_bytes(base, &used, sizeof(elem) * n);
    out->next = (elem *)take_bytes(base, &used, sizeof(elem) * n);
    out->gram = (elem *)take_bytes(base, &used, sizeof(elem) * side * side);
    out->poly = (elem *)take_bytes(base, &used, sizeof(elem) * side * side);
    out->square = (float *)take_bytes(base, &used, sizeof(float) * side * side);
    return used;
}

CUDA_WORKSPACE(muon_workspace) {
    int A = shape->NH * shape->HS, KV = shape->NKV * shape->HS, C = shape->C, F = shape->F;
    const int sizes[][2] = {{A, C}, {KV, C}, {C, A}, {F, C}, {C, F}};
    size_t largest = 0;
    muon_buffers none;
    for (const auto &size : sizes)
        if (shape->muon) largest = most(largest, muon_lay_out(NULL, size[0], size[1], &none));
    return largest;
}

static __device__ inline float muon_clip(const muon_matrix &a) {
    float clip = a.step->grad_clip;
    return clip > 0 ? fminf(1.0f, clip / (*a.norm + 1e-6f)) : 1;
}

/* The gradient and the momentum buffer, by Nesterov's factors. */
static __device__ inline float muon_mix(const muon_matrix &a, float clip, int64_t i) {
    float momentum = a.step->momentum;
    return a.grad[i] * (clip * (1 - momentum)) + a.momentum[i] * momentum;
}

static __device__ inline int64_t first_number() {
    return (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x;
}
static __device__ inline int64_t next_number() {
    return (int64_t)gridDim.x * BLOCK_THREADS;
}

/* The momentum, and each block's sum of squares of Nesterov's. */
static __global__ void muon_gather_kernel(double *sums, muon_matrix a) {
    int64_t n = (int64_t)a.rows * a.cols;
    double sum = 0;
    if (isfinite(*a.norm)) {
        float clip = muon_clip(a);
        for (int64_t i = first_number(); i < n; i += next_number()) {
            a.momentum[i] = muon_mix(a, clip, i);
            float u = muon_mix(a, clip, i);
            sum += (double)u * u;
        }
    }
    sum = block_sum<BLOCK_THREADS>(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

static __global__ void muon_factor_kernel(float *factor, const double *sums, int n, double least) {
    double sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += BLOCK_THREADS) sum += sums[i];
    sum = block_sum<BLOCK_THREADS>(sum);
    if (threadIdx.x == 0)
        *factor = sum > least ? (float)(1 / ((double)MUON_MARGIN * sqrt(sum))) : 0;
}

static __global__ void muon_scale_kernel(elem *x, const float *factor, muon_matrix a) {
    int64_t n = (int64_t)a.rows * a.cols;
    float clip = muon_clip(a);
    for (int64_t i = first_number(); i < n; i += next_number())
        x[i] = from_float<elem>(muon_mix(a, clip, i) * *factor);
}

/* out = alpha a + beta b, of which b may be NULL. */
typedef struct muon_sum {
    elem *out;
    const elem *a;
    const float *b;
    float alpha, beta;
    int64_t n;
} muon_sum;

static __global__ void muon_sum_kernel(muon_sum s) {
    for (int64_t i = first_number(); i < s.n; i += next_number()) {
        float x = to_float(s.a[i]) * s.alpha;
        s.out[i] = from_float<elem>(s.b ? x + s.b[i] * s.beta : x);
    }
}

static __device__ inline float row_factor(const muon_matrix &a, int64_t row) {
    return 1 / (sqrtf(a.v[row]) + MUON_ROW_EPS);
}

/* The average of each row's mean square, and the sum of squares of the row that it scales: a block each. */
static __global__ void muon_rows_kernel(double *sums, const elem *x, muon_matrix a) {
    int64_t row = blockIdx.x;
    double sum = 0;
    if (!isfinite(*a.norm)) return;
    for (int c = (int)threadIdx.x; c < a.cols; c += BLOCK_THREADS) {
        float u = to_float(x[row * a.cols + c]);
        sum += (double)u * u;
    }
    sum = block_sum<BLOCK_THREADS>(sum);
    if (threadIdx.x != 0) return;
    float beta2 = a.step->beta2;
    a.v[row] = beta2 * a.v[row] + (1 - beta2) * ((float)sum / (float)a.cols);
    sums[row] = sum * row_factor(a, row) * row_factor(a, row);
}

/* The factor of such rows with which the step is as large as without. */
static __global__ void muon_size_kernel(float *factor, const double *sums, int n, double size) {
    double sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += BLOCK_THREADS) sum += sums[i];
    sum = block_sum<BLOCK_THREADS>(sum);
    if (threadIdx.x == 0) *factor = sum > 0 ? (float)sqrt(size / sum) : 0;
}

/* factor: of rows that v scales. */
static __global__ void muon_step_kernel(const elem *x, const float *factor, muon_matrix a) {
    int64_t n = (int64_t)a.rows * a.cols;
    float lr = a.step->lr * a.lr_scale;
    float decayed = 1 - lr * (a.decay ? a.step->weight_decay : 0), rate = lr * a.scale;
    if (!isfinite(*a.norm)) return;
    if (a.v) rate *= *factor;
    for (int64_t i = first_number(); i < n; i += next_number()) {
        float step = to_float(x[i]), now = a.w[i];
        float keep = a.step->cautious && step * now < 0 ? 1 : decayed;
        float w = now * keep - step * (a.v ? rate * row_factor(a, i / a.cols) : rate);
        a.w[i] = w;
        if (a.packed) a.packed[i] = from_float<elem>(w);
    }
}

static dim3 blocks_of(int64_t n) {
    return dim3((unsigned)least<int64_t>(div_up(n, BLOCK_THREADS), MOST_BLOCKS));
}

static void muon_add(gpt_ctx *ctx, muon_sum s) {
    launch(ctx, muon_sum_kernel, blocks_of(s.n), BLOCK_THREADS, 0, s);
}

/* x = a x + (b A + c A^2) x with A = x x^T; from the right, with x^T x, where that is smaller. */
static void muon_iterate(gpt_ctx *ctx, muon_buffers *m, int rows, int cols, const float abc[3]) {
    int side = least(rows, cols);
    int64_t n_side = (int64_t)side * side, n = (int64_t)rows * cols;
    product p = {};
    p.bf16 = IS_BF16;
    p.kind = rows > cols ? PRODUCT_TN : PRODUCT_NT;
    p.M = p.N = p.ldo = side, p.K = most(rows, cols);
    p.lda = p.ldb = cols;
    p.out = m->gram, p.a = p.b = m->x;
    cuda_product(ctx, &p);
    p.kind = PRODUCT_NN, p.K = p.lda = p.ldb = side;
    p.out = m->square, p.float_out = 1, p.a = p.b = m->gram;
    cuda_product(ctx, &p);
    muon_add(ctx, {m->poly, m->gram, m->square, abc[1], abc[2], n_side});
    muon_add(ctx, {m->next, m->x, NULL, abc[0], 0, n});
    p.M = rows, p.N = p.ldb = p.ldo = cols;
    p.out = m->next, p.float_out = 0, p.add = 1;
    p.a = rows > cols ? m->x : m->poly;
    p.b = rows > cols ? m->poly : m->x;
    cuda_product(ctx, &p);
    elem *x = m->x;
    m->x = m->next;
    m->next = x;
}

static void update_matrix(gpt_ctx *ctx, const muon_matrix &a) {
    static const float polynomials[MUON_ITERATIONS][3] = MUON_POLYNOMIALS;
    muon_buffers m;
    muon_lay_out((char *)ctx->workspace, a.rows, a.cols, &m);
    dim3 blocks = blocks_of((int64_t)a.rows * a.cols);
    size_t shared_bytes = sizeof(double) * BLOCK_THREADS;
    launch(ctx, muon_gather_kernel, blocks, BLOCK_THREADS, shared_bytes, m.sums, a);
    launch(ctx, muon_factor_kernel, dim3(1), BLOCK_THREADS, shared_bytes, m.factor,
           (const double *)m.sums, (int)blocks.x, MUON_LEAST * a.rows * a.cols);
    launch(ctx, muon_scale_kernel, blocks, BLOCK_THREADS, 0, m.x, (const float *)m.factor, a);
    for (const auto &abc : polynomials) muon_iterate(ctx, &m, a.rows, a.cols, abc);
    if (a.v) {
        launch(ctx, muon_rows_kernel, dim3((unsigned)a.rows), BLOCK_THREADS, shared_bytes, m.sums,
               (const elem *)m.x, a);
        launch(ctx, muon_size_kernel, dim3(1), BLOCK_THREADS, shared_bytes, m.factor,
               (const double *)m.sums, a.rows, (double)least(a.rows, a.cols));
    }
    launch(ctx, muon_step_kernel, blocks, BLOCK_THREADS, 0, (const elem *)m.x,
           (const float *)m.factor, a);
}

CUDA_OP(muon_update) {
    for (const gpt_segment *s = op->segments; s < op->segments + op->n_segments; s++) {
        if (s->optimizer != GPT_OPTIMIZER_MUON) continue;
        int64_t row = 0;
        for (int k = 0; k < s->n_matrices; row += s->matrix_rows[k++]) {
            int64_t first = row * s->cols;
            muon_matrix a = {};
            a.v = s->row_state ? op->momentum + s->row_state + row : NULL;
            a.w = op->w + s->offset + first;
            a.momentum = op->momentum + s->state + first;
            a.grad = op->grads + s->grad + first;
            a.packed = s->packed ? (elem *)s->packed + first : NULL;
            a.norm = op->norm, a.step = op->step;
            a.lr_scale = s->lr_scale, a.decay = s->decay;
            a.rows = s->matrix_rows[k], a.cols = s->cols;
            a.scale = muon_scale(a.rows, a.cols);
            update_matrix(ctx, a);
        }
    }
}
