/* linear.cu: linear layers with their bias and activation. The products are
 * cuBLASLt's, with bias and GELU in its epilogue where it offers that; the kernels here do the
 * rest, and GELU in float32, where nobody says how near the library's tanh comes. */
#include "activation.h"
#include "columns.h"
#include "weights.h"

/* The workspace of this file: quantized weights as bf16 again, a product that no output has room for,
 * and sums. */
typedef struct linear_memory {
    elem *weights;  /* (OC, IC) */
    elem *product;  /* (N, F), or (N, 2 F) for SwiGLU */
    float *partial; /* sums of a bias's gradient */
} linear_memory;

static size_t lay_out(linear_memory *m, char *base, size_t weights, size_t product, int bias) {
    size_t product_at = align_up(sizeof(elem) * weights);
    size_t partial_at = product_at + align_up(sizeof(elem) * product);
    m->weights = (elem *)base;
    m->product = (elem *)(base + product_at);
    m->partial = (float *)(base + partial_at);
    return partial_at + column_bytes(1, bias);
}

static size_t product_numbers(int activation, int N, int F) {
    return is_gated(activation) ? 2 * (size_t)N * (size_t)F : 0;
}

CUDA_WORKSPACE(linear_workspace) {
    const gpt_shape *s = shape;
    linear_memory m;
    int qkv = (s->NH + 2 * s->NKV) * s->HS;
    int widest = most(most(qkv, s->C), 2 * s->F);
    return lay_out(&m, NULL, weight_numbers(widest, s->C),
                   product_numbers(s->activation, s->N, s->F), widest);
}

/* For n numbers, W of them a thread. */
static inline dim3 grid_of(int64_t n, int W) {
    return dim3((unsigned)div_up(n, BLOCK_THREADS * W));
}

/* ---- forward ---- */

typedef struct activation_args {
    elem *out;     /* (N, F) */
    elem *pre;     /* (N, F or 2 F): y with its bias; NULL where it is not kept */
    const elem *y; /* the same shape */
    const elem *b; /* NULL where y has it already */
    int activation, N, F;
} activation_args;

template <int W> static __device__ inline void add_bias(float (&x)[W], const elem *b) {
    float bias[W];
    load(bias, b);
#pragma unroll
    for (int k = 0; k < W; k++) x[k] += bias[k];
}

template <int W> static __global__ void activation_forward_kernel(activation_args a) {
    int64_t i = ((int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x) * W;
    if (i >= (int64_t)a.N * a.F) return;
    int twin = is_gated(a.activation) ? a.F : 0, f = (int)(i % a.F);
    int64_t at = i / a.F * (a.F + twin) + f;
    float x[W], up[W] = {};
    load(x, a.y + at);
    if (a.b) add_bias(x, a.b + f);
    if (a.pre) store(a.pre + at, x);
    if (twin) {
        load(up, a.y + at + twin);
        if (a.b) add_bias(up, a.b + f + twin);
        if (a.pre) store(a.pre + at + twin, up);
    }
#pragma unroll
    for (int k = 0; k < W; k++) x[k] = activation_forward(a.activation, x[k], up[k]);
    store(a.out + i, x);
}

CUDA_OP(linear_forward) {
    int activation = op->activation, N = op->N, IC = op->IC, OC = op->OC;
    int gated = is_gated(activation), width = gated ? 2 * OC : OC;
    act *pre = activation == GPT_ACT_NONE ? NULL : op->pre;
    linear_memory m;
    lay_out(&m, (char *)ctx->workspace, weight_numbers(width, IC),
            product_numbers(activation, N, OC), 0);
    product p = {.kind = PRODUCT_NT,
                 .bf16 = IS_BF16,
                 .M = N,
                 .N = width,
                 .K = IC,
                 .lda = IC,
                 .ldb = IC,
                 .ldo = width,
                 .out = op->out,
                 .a = op->in,
                 .b = op->w,
                 .bias = op->b,
                 .pre = pre};
    if (activation == GPT_ACT_GELU && IS_BF16) {
        p.epilogue = EPILOGUE_GELU;
        if (weight_product(ctx, &p, m.weights, op->exact)) return;
    }
    p.out = pre ? pre : gated ? m.product : op->out;
    p.pre = NULL;
    p.epilogue = EPILOGUE_BIAS;
    int has_bias = op->b && weight_product(ctx, &p, m.weights, op->exact);
    if (!has_bias) {
        p.bias = NULL;
        p.epilogue = EPILOGUE_NONE;
        weight_product(ctx, &p, m.weights, op->exact);
    }
    activation_args a = {(elem *)op->out,
                         (elem *)pre,
                         (const elem *)p.out,
                         has_bias ? NULL : (const elem *)op->b,
                         activation,
                         N,
                         OC};
    int W = OC % PACK == 0 ? PACK : 1;
    if (a.b || activation != GPT_ACT_NONE)
        launch(ctx, W == 1 ? activation_forward_kernel<1> : activation_forward_kernel<PACK>,
               grid_of((int64_t)N * OC, W), BLOCK_THREADS, 0, a);
}

/* ---- backward ---- */

typedef struct activation_backward_args {
    elem *din;        /* (N, F or 2 F) */
    const elem *dout; /* (N, F); may be din */
    const elem *pre;  /* (N, F or 2 F) */
    int activation, N, F;
} activation_backward_args;

template <int W> static __global__ void activation_backward_kernel(activation_backward_args a) {
    int64_t i = ((int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x) * W;
    if (i >= (int64_t)a.N * a.F) return;
    int twin = is_gated(a.activation) ? a.F : 0;
    int64_t at = i / a.F * (a.F + twin) + i % a.F;
    float d[W], x[W], up[W] = {}, dup[W] = {};
    load(d, a.dout + i);
    load(x, a.pre + at);
    if (twin) load(up, a.pre + at + twin);
#pragma unroll
    for (int k = 0; k < W; k++)
        d[k] = activation_backward(a.activation, d[k], x[k], up[k], &dup[k]);
    store(a.din + at, d);
    if (twin) store(a.din + at + twin, dup);
}

CUDA_OP(linear_backward) {
    int activation = op->activation, N = op->N, IC = op->IC, OC = op->OC;
    int gated = is_gated(activation);
    linear_memory m;
    lay_out(&m, (char *)ctx->workspace, weight_numbers(OC, IC), product_numbers(activation, N, IC),
            0);
    product dinput = {.kind = PRODUCT_NN,
                      .bf16 = IS_BF16,
                      .M = N,
                      .N = IC,
                      .K = OC,
                      .lda = OC,
                      .ldb = IC,
                      .ldo = IC,
                      .out = gated ? m.product : op->din,
                      .a = op->dout,
                      .b = whole_weight(ctx, op->w, m.weights, OC, IC)};
    int done = 0;
    if (activation == GPT_ACT_GELU && IS_BF16) {
        dinput.epilogue = EPILOGUE_GELU_BACKWARD;
        dinput.pre = (void *)op->pre;
        done = cuda_product(ctx, &dinput);
    }
    if (!done) {
        dinput.epilogue = EPILOGUE_NONE;
        dinput.pre = NULL;
        cuda_product(ctx, &dinput);
        activation_backward_args a = {
            (elem *)op->din, (const elem *)dinput.out, (const elem *)op->pre, activation, N, IC};
        int W = IC % PACK == 0 ? PACK : 1;
        if (activation != GPT_ACT_NONE)
            launch(ctx, W == 1 ? activation_backward_kernel<1> : activation_backward_kernel<PACK>,
                   grid_of((int64_t)N * IC, W), BLOCK_THREADS, 0, a);
    }

    product dweight = {.kind = PRODUCT_TN,
                       .bf16 = IS_BF16,
                       .float_out = 1,
                       .add = op->add,
                       .M = OC,
                       .N = IC,
                       .K = N,
                       .lda = OC,
                       .ldb = IC,
                       .ldo = IC,
                       .out = op->dw,
                       .a = op->dout,
                       .b = op->in};
    if (op->dw) cuda_product(ctx, &dweight);

    if (op->db) sum_columns(ctx, op->db, m.partial, (const elem *)op->dout, N, OC);
}
