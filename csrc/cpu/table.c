/* table.c: the CPU backend's table of ops, one for each dtype and instruction-set level. */
#include "cpu.h"

#define CPU_STRING2(x) #x
#define CPU_STRING(x)  CPU_STRING2(x)

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static size_t workspace_bytes(const gpt_ctx *ctx, const gpt_shape *shape) {
    size_t most = 0;
#define MOST(name)      most = larger(most, CPU_NAME(name)(shape, ctx->n_threads));
#define MOST_ACTS(name) most = larger(most, CPU_ACTS_NAME(name)(shape, ctx->n_threads));
    CPU_WEIGHT_WORKSPACES(MOST)
    CPU_ACT_WORKSPACES(MOST_ACTS)
    return most + CPU_SCRATCH * (size_t)ctx->n_threads;
}

static void ctx_set_workspace(gpt_ctx *ctx, void *workspace) {
    ctx->scratch = workspace;
    ctx->workspace = workspace ? (char *)workspace + CPU_SCRATCH * (size_t)ctx->n_threads : NULL;
}

extern const gpt_ops cpu_ops;
const gpt_ops cpu_ops = {.name = "cpu " CPU_STRING(CPU_DTYPE) " " CPU_STRING(CPU_LEVEL),
                         .act_bytes = sizeof(elem),
                         .packs_host_memory = 1,
#ifdef CPU_BF16
                         .makes_activations = 1,
#else
                         .thread_library_bytes =
                             2 << 20, /* OpenBLAS's packing buffers, as far as tiles touch them */
#endif
                         .ctx_create = cpu_ctx_create,
                         .ctx_free = cpu_ctx_free,
                         .ctx_threads = cpu_ctx_threads,
                         .ctx_measure = cpu_ctx_measure,
                         .ctx_busy_seconds = cpu_ctx_busy_seconds,
                         .peak = cpu_peak,
                         .workspace_bytes = workspace_bytes,
                         .ctx_set_workspace = ctx_set_workspace,
                         .sync = cpu_sync,
                         .buffer_alloc = cpu_buffer_alloc,
                         .buffer_free = cpu_buffer_free,
                         .upload = cpu_upload,
                         .download = cpu_download,
                         .download_rows = cpu_download_rows,
                         .copy = cpu_copy,
                         .memory_free = cpu_memory_free,
                         .zero = cpu_zero,
                         .weights_bytes = cpu_weights_bytes,
#define FILL(name)      .name = CPU_NAME(name),
#define FILL_ACTS(name) .name = CPU_ACTS_NAME(name),
                         GPT_WEIGHT_OPS(FILL) GPT_ACT_OPS(FILL_ACTS)};
