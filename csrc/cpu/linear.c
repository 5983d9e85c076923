/* linear.c: linear layers with their bias and activation, and the output head. */
#include "activation.h"
#include "product.h"

typedef struct linear_args {
    float *out, *pre, *din, *db;
    const float *b, *pre_in, *dout;
    int activation, N, width; /* width of out, or of din: one half of pre for SwiGLU */
} linear_args;

/* pre = product + b, out = activation(pre); in place when pre is out. */
static void forward_epilogue(void *p, int row, int rows, int col, int cols) {
    const linear_args *a = p;
    int twin = a->activation == GPT_ACT_SWIGLU ? a->width : 0;
    int stride = a->width + twin;
    for (int r = row; r < row + rows; r++) {
        float *pre = a->pre + (int64_t)r * stride + col;
        float *out = a->out + (int64_t)r * a->width + col;
        if (a->b) {
            const float *b = a->b + col;
            FOR_LANES (c, k, cols) vf_put(pre + c, vf_get(pre + c, k) + vf_get(b + c, k), k);
            if (twin)
                FOR_LANES (c, k, cols)
                    vf_put(pre + twin + c, vf_get(pre + twin + c, k) + vf_get(b + twin + c, k), k);
        }
        if (a->activation != GPT_ACT_NONE)
            activation_forward(out, pre, pre + twin, a->activation, cols);
    }
}

void cpu_linear_forward(gpt_ctx *ctx, act *out, act *pre, const act *in, const weight *w,
                        const float *b, int activation, int N, int IC, int OC) {
    int swiglu = activation == GPT_ACT_SWIGLU;
    /* Without a place for pre, the product goes where it does no harm: into out, or, twice as wide
     * for SwiGLU, into the workspace. */
    float *y = activation == GPT_ACT_NONE ? out : pre ? pre : swiglu ? ctx->workspace : out;
    linear_args args = {
        .out = out, .pre = y, .b = b, .activation = activation, .N = N, .width = OC};
    product p = {.kind = PRODUCT_NT,
                 .out = y,
                 .a = in,
                 .b = w,
                 .lda = IC,
                 .ldb = IC,
                 .ldo = swiglu ? 2 * OC : OC,
                 .M = N,
                 .N = OC,
                 .K = IC,
                 .twin = swiglu ? OC : 0};
    if (b || activation != GPT_ACT_NONE) {
        p.epilogue = forward_epilogue;
        p.epilogue_args = &args;
    }
    cpu_product(ctx, &p);
}

size_t cpu_linear_workspace(const gpt_shape *shape, int n_threads) {
    (void)n_threads;
    return shape->activation == GPT_ACT_SWIGLU
               ? sizeof(float) * 2 * (size_t)shape->N * (size_t)shape->F
               : 0;
}

/* din (in place, in its first half for SwiGLU) becomes the gradient of pre. */
static void input_epilogue(void *p, int row, int rows, int col, int cols) {
    const linear_args *a = p;
    int twin = a->activation == GPT_ACT_SWIGLU ? a->width : 0;
    int stride = a->width + twin;
    for (int r = row; r < row + rows; r++) {
        float *din = a->din + (int64_t)r * stride + col;
        const float *pre = a->pre_in + (int64_t)r * stride + col;
        activation_backward(din, din + twin, din, pre, pre + twin, a->activation, cols);
    }
}

/* db += column sums of dout, for the columns of one piece. */
static void bias_columns(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const linear_args *a = p;
    int cols = (int)(end - begin);
    for (int r = 0; r < a->N; r++) {
        const float *dout = a->dout + (int64_t)r * a->width + begin;
        float *db = a->db + begin;
        FOR_LANES (c, k, cols) vf_put(db + c, vf_get(db + c, k) + vf_get(dout + c, k), k);
    }
}

void cpu_linear_backward(gpt_ctx *ctx, act *din, float *dw, float *db, const act *dout,
                         const act *in, const weight *w, const act *pre, int activation, int N,
                         int IC, int OC) {
    int ldi = activation == GPT_ACT_SWIGLU ? 2 * IC : IC;
    linear_args args = {.din = din, .pre_in = pre, .activation = activation, .N = N, .width = IC};
    product dinput = {.kind = PRODUCT_NN,
                      .out = din,
                      .a = dout,
                      .b = w,
                      .lda = OC,
                      .ldb = IC,
                      .ldo = ldi,
                      .M = N,
                      .N = IC,
                      .K = OC};
    if (activation != GPT_ACT_NONE) {
        dinput.epilogue = input_epilogue;
        dinput.epilogue_args = &args;
    }
    cpu_product(ctx, &dinput);

    product dweight = {.kind = PRODUCT_TN,
                       .out = dw,
                       .a = dout,
                       .b = in,
                       .lda = OC,
                       .ldb = IC,
                       .ldo = IC,
                       .M = OC,
                       .N = IC,
                       .K = N};
    cpu_product(ctx, &dweight);

    if (db) {
        linear_args bias = {.db = db, .dout = dout, .N = N, .width = OC};
        cpu_parallel(ctx, bias_columns, &bias, OC, 64);
    }
}

void cpu_head_forward(gpt_ctx *ctx, float *logits, const act *x, const weight *wte, int N, int C,
                      int V, int Vp) {
    (void)Vp;
    product p = {.kind = PRODUCT_NT,
                 .out = logits,
                 .a = x,
                 .b = wte,
                 .lda = C,
                 .ldb = C,
                 .ldo = V,
                 .M = N,
                 .N = V,
                 .K = C};
    cpu_product(ctx, &p);
}
