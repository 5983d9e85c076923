/* head.c: the output head, which gives logits in float32. */
#include "product.h"
#include "softmax.h"

enum { BLOCK = 4096 };

/* Item i is a block of a row's logits. */
static void finish_logits(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const head_forward *op = p;
    int64_t per_row = cpu_div_up(op->V, BLOCK);
    for (int64_t i = begin; i < end; i++) {
        int col = (int)(i % per_row) * BLOCK, n = cpu_min(BLOCK, op->V - col);
        float *z = op->logits + i / per_row * op->V + col;
        if (op->b) add_row(z, op->b + col, n);
        if (op->cap > 0) cap_row(z, n, (scoring){1, op->cap});
    }
}

CPU_OP(head_forward) {
    product p = {.kind = PRODUCT_NT,
                 .out = op->logits,
                 .a = op->x,
                 .w = op->wte,
                 .lda = op->C,
                 .ldb = op->C,
                 .ldo = op->V,
                 .M = op->N,
                 .N = op->V,
                 .K = op->C};
    cpu_product(ctx, &p);
    int64_t n_blocks = op->N * cpu_div_up(op->V, BLOCK);
    if (op->b || op->cap > 0) cpu_parallel(ctx, finish_logits, (void *)op, n_blocks, 1);
}
