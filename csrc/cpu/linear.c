/* linear.c: linear layers with their bias and activation, and the output head. */
#include "activation.h"
#include "product.h"

typedef struct linear_args {
    elem *out, *pre, *din;
    const elem *pre_in;
    const float *b;
    int activation, width; /* of out, or of din: one half of pre for SwiGLU */
} linear_args;

/* pre = y + b, out = activation(pre). The activation is a constant where this is inlined. */
__attribute__((always_inline)) static inline void activate_tile(const linear_args *a,
                                                                int activation, const float *y,
                                                                const float *y_twin, int ldy,
                                                                int row, int rows, int col,
                                                                int cols) {
    int twin = activation == GPT_ACT_SWIGLU ? a->width : 0;
    for (int r = 0; r < rows; r++, y += ldy, y_twin += ldy) {
        elem *out = a->out + (int64_t)(row + r) * a->width + col;
        elem *pre = a->pre ? a->pre + (int64_t)(row + r) * (a->width + twin) + col : NULL;
        FOR_LANES (c, k, cols) {
            vf x = vf_get(y + c, k), up = {0};
            if (a->b) x += vf_get(a->b + col + c, k);
            if (twin) {
                up = vf_get(y_twin + c, k);
                if (a->b) up += vf_get(a->b + twin + col + c, k);
                if (pre) vf_put(pre + twin + c, up, k);
            }
            if (pre) vf_put(pre + c, x, k);
            vf_put(out + c, activation_forward(activation, x, up), k);
        }
    }
}

static void forward_epilogue(void *p, const float *y, const float *y_twin, int ldy, int row,
                             int rows, int col, int cols) {
    const linear_args *a = p;
    switch (a->activation) {
    case GPT_ACT_GELU:
        activate_tile(a, GPT_ACT_GELU, y, y_twin, ldy, row, rows, col, cols);
        break;
    case GPT_ACT_SWISH:
        activate_tile(a, GPT_ACT_SWISH, y, y_twin, ldy, row, rows, col, cols);
        break;
    case GPT_ACT_SWIGLU:
        activate_tile(a, GPT_ACT_SWIGLU, y, y_twin, ldy, row, rows, col, cols);
        break;
    default:
        activate_tile(a, GPT_ACT_NONE, y, y_twin, ldy, row, rows, col, cols);
        break;
    }
}

/* din = y through the activation; for SwiGLU, y fills the gates and the ups. */
__attribute__((always_inline)) static inline void deactivate_tile(const linear_args *a,
                                                                  int activation, const float *y,
                                                                  int ldy, int row, int rows,
                                                                  int col, int cols) {
    int twin = activation == GPT_ACT_SWIGLU ? a->width : 0;
    int64_t stride = a->width + twin;
    for (int r = 0; r < rows; r++, y += ldy) {
        elem *din = a->din + (row + r) * stride + col;
        const elem *pre = NULL;
        if (activation != GPT_ACT_NONE) pre = a->pre_in + (row + r) * stride + col;
        FOR_LANES (c, k, cols) {
            vf d = vf_get(y + c, k), up = {0}, dup = {0};
            if (twin) up = vf_get(pre + twin + c, k);
            if (activation != GPT_ACT_NONE)
                d = activation_backward(activation, d, vf_get(pre + c, k), up, &dup);
            if (twin) vf_put(din + twin + c, dup, k);
            vf_put(din + c, d, k);
        }
    }
}

static void input_epilogue(void *p, const float *y, const float *y_twin, int ldy, int row, int rows,
                           int col, int cols) {
    (void)y_twin;
    const linear_args *a = p;
    switch (a->activation) {
    case GPT_ACT_GELU:
        deactivate_tile(a, GPT_ACT_GELU, y, ldy, row, rows, col, cols);
        break;
    case GPT_ACT_SWISH:
        deactivate_tile(a, GPT_ACT_SWISH, y, ldy, row, rows, col, cols);
        break;
    case GPT_ACT_SWIGLU:
        deactivate_tile(a, GPT_ACT_SWIGLU, y, ldy, row, rows, col, cols);
        break;
    default:
        deactivate_tile(a, GPT_ACT_NONE, y, ldy, row, rows, col, cols);
        break;
    }
}

/* fp32 has the product where its result will be, and then needs no epilogue but to change it. For
 * SwiGLU without a place for pre, that is twice as wide and lies in the workspace. */
static float *forward_target(gpt_ctx *ctx, elem *out, elem *pre, int activation) {
#ifdef CPU_BF16
    (void)ctx, (void)out, (void)pre, (void)activation;
    return NULL;
#else
    if (activation == GPT_ACT_NONE) return out;
    if (pre) return pre;
    return activation == GPT_ACT_SWIGLU ? ctx->workspace : out;
#endif
}

void cpu_linear_forward(gpt_ctx *ctx, act *out, act *pre, const act *in, const weight *w,
                        const float *b, int activation, int N, int IC, int OC) {
    int swiglu = activation == GPT_ACT_SWIGLU;
    if (activation == GPT_ACT_NONE) pre = NULL;
    linear_args args = {.out = out, .pre = pre, .b = b, .activation = activation, .width = OC};
    product p = {.kind = PRODUCT_NT,
                 .out = forward_target(ctx, out, pre, activation),
                 .a = in,
                 .w = w,
                 .lda = IC,
                 .ldb = IC,
                 .ldo = swiglu ? 2 * OC : OC,
                 .M = N,
                 .N = OC,
                 .K = IC,
                 .twin = swiglu ? OC : 0};
    if (!p.out || b || activation != GPT_ACT_NONE) {
        p.epilogue = forward_epilogue;
        p.epilogue_args = &args;
    }
    cpu_product(ctx, &p);
}

void cpu_linear_backward(gpt_ctx *ctx, act *din, float *dw, float *db, const act *dout,
                         const act *in, const weight *w, const act *pre, int activation, int add,
                         int N, int IC, int OC) {
    linear_args args = {.din = din, .pre_in = pre, .activation = activation, .width = IC};
    product dinput = {.kind = PRODUCT_NN,
                      .a = dout,
                      .w = w,
                      .lda = OC,
                      .ldb = IC,
                      .ldo = activation == GPT_ACT_SWIGLU ? 2 * IC : IC,
                      .M = N,
                      .N = IC,
                      .K = OC};
#ifndef CPU_BF16
    dinput.out = din;
#endif
    if (!dinput.out || activation != GPT_ACT_NONE) {
        dinput.epilogue = input_epilogue;
        dinput.epilogue_args = &args;
    }
    cpu_product(ctx, &dinput);

    product dweight = {.kind = PRODUCT_TN,
                       .out = dw,
                       .add = add,
                       .sums = db,
                       .a = dout,
                       .b = in,
                       .activation = in ? GPT_ACT_NONE : activation,
                       .pre = pre,
                       .lda = OC,
                       .ldb = IC,
                       .ldo = IC,
                       .M = OC,
                       .N = IC,
                       .K = N};
    cpu_product(ctx, &dweight);
}

size_t cpu_linear_workspace(const gpt_shape *shape, int n_threads) {
    (void)n_threads;
    int fc = shape->activation == GPT_ACT_SWIGLU ? 2 * shape->F : shape->F;
    size_t twice = 0, most = 0;
#ifndef CPU_BF16
    if (shape->activation == GPT_ACT_SWIGLU) twice = sizeof(float) * (size_t)shape->N * (size_t)fc;
#endif
    int widest = cpu_max(cpu_max(fc, (shape->NH + 2 * shape->NKV) * shape->HS), shape->C);
    if (shape->training) most = cpu_product_workspace(widest, shape->N);
    return twice > most ? twice : most;
}

void cpu_head_forward(gpt_ctx *ctx, float *logits, const act *x, const weight *wte, int N, int C,
                      int V, int Vp) {
    (void)Vp;
    product p = {.kind = PRODUCT_NT,
                 .out = logits,
                 .a = x,
                 .w = wte,
                 .lda = C,
                 .ldb = C,
                 .ldo = V,
                 .M = N,
                 .N = V,
                 .K = C};
    cpu_product(ctx, &p);
}
