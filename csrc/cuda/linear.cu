/* linear.cu: linear layers with their bias and activation. The products are
 * cuBLASLt's, with bias and GELU in its epilogue where it offers that; activation.cu does the
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

/* ---- forward ---- */

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
    if (a.b || activation != GPT_ACT_NONE) cuda_activation_forward(ctx, a);
}

/* ---- backward ---- */

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
        if (activation != GPT_ACT_NONE) cuda_activation_backward(ctx, a);
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

    if (op->db) cuda_sum_columns(ctx, op->db, m.partial, (const elem *)op->dout, N, OC);
}
