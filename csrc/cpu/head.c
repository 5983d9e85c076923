/* head.c: the output head, which gives logits in float32. */
#include "product.h"
#include "softmax.h"

enum { CAP_BLOCK = 4096 };

/* Item i is a block of all N V logits. */
static void cap_logits(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const head_forward *op = p;
    int64_t n = (int64_t)op->N * op->V;
    for (int64_t i = begin * CAP_BLOCK; i < end * CAP_BLOCK && i < n; i += CAP_BLOCK)
        cap_row(op->logits + i, n - i < CAP_BLOCK ? (int)(n - i) : CAP_BLOCK,
                (scoring){1, op->cap});
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
    int64_t n_blocks = cpu_div_up((int64_t)op->N * op->V, CAP_BLOCK);
    if (op->cap > 0) cpu_parallel(ctx, cap_logits, (void *)op, n_blocks, 1);
}
