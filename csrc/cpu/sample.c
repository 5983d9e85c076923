/* sample.c: rows are drawn from in parallel; a row by ../sample.c. */
#include "cpu.h"

#include "sample.h"

CPU_WORKSPACE(sample_workspace) {
    return shape->n_draws > 0 ? sample_scratch_bytes(shape->V) * (size_t)n_threads : 0;
}

typedef struct sample_task {
    const sample *op;
    char *scratch; /* of each thread */
} sample_task;

static void weigh(uint32_t *p, const float *z, int32_t V, float best, float steepness) {
    sample_chances(p, z, V, best, steepness);
}

static void sample_rows(void *p, int thread, int64_t begin, int64_t end) {
    const sample_task *task = p;
    char *scratch = task->scratch + sample_scratch_bytes(task->op->V) * (size_t)thread;
    for (int64_t n = begin; n < end; n++) sample_one(task->op, (int)n, scratch, weigh);
}

CPU_OP(sample) {
    sample_task task = {op, ctx->workspace};
    cpu_parallel(ctx, sample_rows, &task, op->N, 1);
}
