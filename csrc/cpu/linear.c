/* linear.c: linear layers with their bias and activation. */
#include "activation.h"
#include "adapter.h"
#include "product.h"

/* call(ACTIVATION), where the activation is a constant. */
#define BY_ACTIVATION(activation, call)                                                            \
    switch (activation) {                                                                          \
    case GPT_ACT_GELU:                                                                             \
        call(GPT_ACT_GELU);                                                                        \
        break;                                                                                     \
    case GPT_ACT_SWISH:                                                                            \
        call(GPT_ACT_SWISH);                                                                       \
        break;                                                                                     \
    case GPT_ACT_SWIGLU:                                                                           \
        call(GPT_ACT_SWIGLU);                                                                      \
        break;                                                                                     \
    case GPT_ACT_GELU_ERF:                                                                         \
        call(GPT_ACT_GELU_ERF);                                                                    \
        break;                                                                                     \
    case GPT_ACT_RELU:                                                                             \
        call(GPT_ACT_RELU);                                                                        \
        break;                                                                                     \
    case GPT_ACT_GEGLU:                                                                            \
        call(GPT_ACT_GEGLU);                                                                       \
        break;                                                                                     \
    default:                                                                                       \
        call(GPT_ACT_NONE);                                                                        \
    }

/* pre = y + b, with `add` + what is there; out = activation(pre). The activation is a constant where this is inlined. */
SPECIALIZED void activate_tile(const linear_forward *a, int activation, const float *y,
                               const float *y_twin, int ldy, int row, int rows, int col, int cols) {
    int twin = is_gated(activation) ? a->OC : 0;
    const float *bias = a->b;
    elem *all_out = a->out, *all_pre = activation == GPT_ACT_NONE ? NULL : a->pre;
    for (int r = 0; r < rows; r++, y += ldy, y_twin += ldy) {
        elem *out = all_out + (int64_t)(row + r) * a->OC + col;
        elem *pre = all_pre ? all_pre + (int64_t)(row + r) * (a->OC + twin) + col : NULL;
        const elem *there = !a->add ? NULL : pre ? pre : out;
        if (pre) __builtin_prefetch(pre + cols, 1); /* for the columns after these */
        if (pre && twin) __builtin_prefetch(pre + twin + cols, 1);
        FOR_LANES (c, k, cols) {
            vf x = vf_get(y + c, k), up = {0};
            if (there) x += vf_get(there + c, k);
            if (bias) x += vf_get(bias + col + c, k);
            if (twin) {
                up = vf_get(y_twin + c, k);
                if (there) up += vf_get(there + twin + c, k);
                if (bias) up += vf_get(bias + twin + col + c, k);
                if (pre) vf_put(pre + twin + c, up, k);
            }
            if (pre) vf_put(pre + c, x, k);
            vf_put(out + c, activation_forward(activation, x, up), k);
        }
    }
}

static void forward_epilogue(void *p, const float *y, const float *y_twin, int ldy, int row,
                             int rows, int col, int cols) {
    const linear_forward *a = p;
#define ACTIVATE(activation)                                                                       \
    if (cols == EPILOGUE)                                                                          \
        activate_tile(a, activation, y, y_twin, ldy, row, rows, col, EPILOGUE);                    \
    else                                                                                           \
        activate_tile(a, activation, y, y_twin, ldy, row, rows, col, cols)
    BY_ACTIVATION(a->activation, ACTIVATE);
#undef ACTIVATE
}

/* din = y through the activation; of a gated one, y fills the gates and the ups. din may be pre. */
SPECIALIZED void deactivate_tile(const linear_backward *a, int activation, const float *y, int ldy,
                                 int row, int rows, int col, int cols) {
    int twin = is_gated(activation) ? a->IC : 0;
    int64_t stride = a->IC + twin;
    elem *all_din = a->din, *all_made = activation == GPT_ACT_NONE ? NULL : a->made;
    const elem *all_pre = a->pre;
    for (int r = 0; r < rows; r++, y += ldy) {
        elem *din = all_din + (row + r) * stride + col;
        const elem *pre = NULL;
        if (activation != GPT_ACT_NONE) pre = all_pre + (row + r) * stride + col;
        elem *made = all_made ? all_made + (row + r) * (int64_t)a->IC + col : NULL;
        if (pre) ask_for(pre + cols); /* for the columns after these */
        if (pre && twin) ask_for(pre + twin + cols);
        FOR_LANES (c, k, cols) {
            vf d = vf_get(y + c, k), x = {0}, up = {0}, dup = {0}, value;
            if (activation != GPT_ACT_NONE) x = vf_get(pre + c, k);
            if (twin) up = vf_get(pre + twin + c, k);
            d = activation_backward(activation, d, x, up, &dup, &value);
            if (made) vf_put(made + c, value, k);
            if (twin) vf_put(din + twin + c, dup, k);
            vf_put(din + c, d, k);
        }
    }
}

static void input_epilogue(void *p, const float *y, const float *y_twin, int ldy, int row, int rows,
                           int col, int cols) {
    (void)y_twin;
    const linear_backward *a = p;
#define DEACTIVATE(activation)                                                                     \
    if (cols == EPILOGUE)                                                                          \
        deactivate_tile(a, activation, y, ldy, row, rows, col, EPILOGUE);                          \
    else                                                                                           \
        deactivate_tile(a, activation, y, ldy, row, rows, col, cols)
    BY_ACTIVATION(a->activation, DEACTIVATE);
#undef DEACTIVATE
}

/* The fp32 product writes to the op's output, so that it needs an epilogue only to change the result.
 * A gated one's is twice as wide as out: without a place for pre it goes to the workspace. */
static float *forward_target(gpt_ctx *ctx, const linear_forward *op) {
#ifdef CPU_BF16
    (void)ctx, (void)op;
    return NULL;
#else
    if (op->activation == GPT_ACT_NONE) return op->out;
    if (op->pre) return op->pre;
    return is_gated(op->activation) ? ctx->workspace : op->out;
#endif
}

#ifdef CPU_BF16
/* Bytes at the beginning of the workspace that products use, and behind which adapters have theirs. */
static size_t products_room(int N, int widest) {
    size_t own = cpu_product_room(widest), gradients = CPU_ACTS_NAME(product_workspace)(widest, N);
    return (size_t)cpu_round_up((int64_t)(own > gradients ? own : gradients), 64);
}

/* Of a layer or of its adapter, whose rank may be more. */
static int widest_of(int layer, int n_parts, int rank) {
    return cpu_max(layer, n_parts * rank);
}

/* The product, with the adapter where there is one. */
static void forward_product(gpt_ctx *ctx, const linear_forward *op, product *p) {
    product_more more;
    if (op->lora) {
        size_t room = products_room(
            op->N, widest_of(cpu_max(op->IC, p->ldo), op->lora->n_parts, op->lora->R));
        more = cpu_adapter_forward(ctx, op->lora, (char *)ctx->workspace + room);
        p->more = &more;
    }
    cpu_product(ctx, p);
}

static void backward_product(gpt_ctx *ctx, const linear_backward *op, product *p) {
    if (!op->lora) {
        cpu_product(ctx, p);
        return;
    }
    int widest = widest_of(cpu_max(op->OC, p->ldo), op->lora->n_parts, op->lora->R);
    void *memory = (char *)ctx->workspace + products_room(op->N, widest);
    product_more more = cpu_adapter_backward(ctx, op->lora, memory);
    p->more = &more;
    cpu_product(ctx, p);
    lora_backward with_input = *op->lora;
    if (op->made) with_input.in = op->made;
    cpu_adapter_gradients(ctx, &with_input, memory);
}
#else
static void forward_product(gpt_ctx *ctx, const linear_forward *op, product *p) {
    (void)op;
    cpu_product(ctx, p);
}
static void backward_product(gpt_ctx *ctx, const linear_backward *op, product *p) {
    (void)op;
    cpu_product(ctx, p);
}
#endif

CPU_OP(linear_forward) {
    int gated = is_gated(op->activation);
    product p = {.kind = PRODUCT_NT,
                 .out = forward_target(ctx, op),
                 .a = op->in,
                 .w = op->w,
                 .lda = op->IC,
                 .ldb = op->IC,
                 .ldo = gated ? 2 * op->OC : op->OC,
                 .M = op->N,
                 .N = op->OC,
                 .K = op->IC,
                 .exact = op->exact,
                 .twin = gated ? op->OC : 0};
    if (!p.out || op->b || op->activation != GPT_ACT_NONE) {
        p.epilogue = forward_epilogue;
        p.epilogue_args = (void *)op;
    }
    forward_product(ctx, op, &p);
}

CPU_OP(linear_backward) {
    product dinput = {.kind = PRODUCT_NN,
                      .a = op->dout,
                      .w = op->w,
                      .lda = op->OC,
                      .ldb = op->IC,
                      .ldo = is_gated(op->activation) ? 2 * op->IC : op->IC,
                      .M = op->N,
                      .N = op->IC,
                      .K = op->OC};
#ifndef CPU_BF16
    dinput.out = op->din;
#endif
    if (!dinput.out || op->activation != GPT_ACT_NONE) {
        dinput.epilogue = input_epilogue;
        dinput.epilogue_args = (void *)op;
    }
    backward_product(ctx, op, &dinput);

    const act *in = op->made ? op->made : op->in;
    product dweight = {.kind = PRODUCT_TN,
                       .out = op->dw,
                       .add = op->add,
                       .sums = op->db,
                       .a = op->dout,
                       .b = in,
                       .activation = in ? GPT_ACT_NONE : op->activation,
                       .pre = op->pre,
                       .lda = op->OC,
                       .ldb = op->IC,
                       .ldo = op->IC,
                       .M = op->OC,
                       .N = op->IC,
                       .K = op->N};
    if (op->dw || op->db) cpu_product(ctx, &dweight);
}

CPU_WORKSPACE(linear_workspace) {
    (void)n_threads;
    int fc = is_gated(shape->activation) ? 2 * shape->F : shape->F;
    size_t twice = 0, most = 0;
#ifndef CPU_BF16
    if (is_gated(shape->activation)) twice = sizeof(float) * (size_t)shape->N * (size_t)fc;
#endif
    int widest = cpu_max(cpu_max(fc, (shape->NH + 2 * shape->NKV) * shape->HS), shape->C);
    if (shape->training || shape->dora) most = cpu_product_workspace(widest, shape->N);
#ifdef CPU_BF16
    if (shape->training && shape->lora_rank) {
        size_t adapters = cpu_adapter_bytes(shape->N, shape->lora_rank, widest);
        most = products_room(shape->N, widest_of(widest, GPT_MAX_STACKED, shape->lora_rank)) +
               adapters;
    }
#endif
    return twice > most ? twice : most;
}
