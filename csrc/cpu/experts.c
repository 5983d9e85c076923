/* experts.c: the products of experts, each with the rows of its tokens. */
#include "cpu.h"

static elem *rows_at(const act *x, int64_t row, int width) {
    return x ? (elem *)x + row * width : NULL;
}

CPU_OP(expert_forward) {
    int width = is_gated(op->activation) ? 2 * op->OC : op->OC;
    for (int e = 0; e < op->E; e++) {
        int first = op->begins[e];
        linear_forward one = {.out = rows_at(op->out, first, op->OC),
                              .pre = rows_at(op->pre, first, width),
                              .in = rows_at(op->in, first, op->IC),
                              .w = op->w[e],
                              .activation = op->activation,
                              .exact = op->exact,
                              .N = op->begins[e + 1] - first,
                              .IC = op->IC,
                              .OC = op->OC};
        if (one.N) CPU_NAME(linear_forward)(ctx, &one);
    }
}

CPU_OP(expert_backward) {
    int width = is_gated(op->activation) ? 2 * op->IC : op->IC;
    for (int e = 0; e < op->E; e++) {
        int first = op->begins[e];
        linear_backward one = {.din = rows_at(op->din, first, width),
                               .dw = op->dw[e],
                               .dout = rows_at(op->dout, first, op->OC),
                               .in = rows_at(op->in, first, op->IC),
                               .w = op->w[e],
                               .pre = rows_at(op->pre, first, width),
                               .activation = op->activation,
                               .add = op->add,
                               .N = op->begins[e + 1] - first,
                               .IC = op->IC,
                               .OC = op->OC};
        if (one.N)
            CPU_NAME(linear_backward)(ctx, &one);
        else if (one.dw && !op->add)
            cpu_zero(ctx, one.dw, sizeof(float) * (size_t)op->IC * (size_t)op->OC);
    }
}
