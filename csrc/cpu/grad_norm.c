/* grad_norm.c: the global gradient norm. */
#include "cpu.h"
#include "simd.h"

#include <math.h>

CPU_WORKSPACE(grad_norm_workspace) {
    (void)n_threads;
    return shape->training ? sizeof(double) * (size_t)cpu_div_up(shape->n_params, GRAD_BLOCK) : 0;
}

typedef struct norm_task {
    const float *grads;
    double *sums; /* of squares, a block each */
    int64_t n;
} norm_task;

static void square_sums(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const norm_task *a = p;
    for (int64_t block = begin; block < end; block++) {
        const float *g = a->grads + block * GRAD_BLOCK;
        int size =
            (int)(a->n - block * GRAD_BLOCK < GRAD_BLOCK ? a->n - block * GRAD_BLOCK : GRAD_BLOCK);
        vf sum[4] = {{0}};
        int i = 0;
        for (; i + 4 * LANES <= size; i += 4 * LANES)
            for (int j = 0; j < 4; j++) {
                vf x = vf_load(g + i + j * LANES);
                sum[j] += x * x;
            }
        double total = vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
        for (; i < size; i++) total += (double)g[i] * g[i];
        a->sums[block] = total;
    }
}

CPU_OP(grad_norm) {
    norm_task task = {op->grads, op->squares ? op->squares : ctx->workspace, op->n};
    int64_t blocks = cpu_div_up(op->n, GRAD_BLOCK);
    cpu_parallel(ctx, square_sums, &task, blocks, 4);
    if (op->squares) return;
    double total = 0;
    for (int64_t i = 0; i < blocks; i++) total += task.sums[i];
    *op->norm = (float)sqrt(total);
}
