/* table.c: the CPU backend's table of ops, one for each dtype and instruction-set level. */
#include "cpu.h"

#define CPU_STRING2(x) #x
#define CPU_STRING(x)  CPU_STRING2(x)

static size_t workspace_bytes(const gpt_ctx *ctx, const gpt_shape *shape) {
    cpu_workspace_fn *const needs[] = {cpu_norm_workspace, cpu_linear_workspace,
                                       cpu_attention_workspace, cpu_loss_workspace,
                                       cpu_adamw_workspace};
    size_t most = 0;
    for (size_t i = 0; i < sizeof needs / sizeof *needs; i++) {
        size_t bytes = needs[i](shape, ctx->n_threads);
        most = bytes > most ? bytes : most;
    }
    return most + CPU_SCRATCH * (size_t)ctx->n_threads;
}

static void ctx_set_workspace(gpt_ctx *ctx, void *workspace) {
    ctx->scratch = workspace;
    ctx->workspace = workspace ? (char *)workspace + CPU_SCRATCH * (size_t)ctx->n_threads : NULL;
}

extern const gpt_ops cpu_ops;
const gpt_ops cpu_ops = {
    .name = "cpu " CPU_STRING(CPU_DTYPE) " " CPU_STRING(CPU_LEVEL),
    .act_bytes = sizeof(elem),
    .packs_host_memory = 1,
#ifdef CPU_BF16
    .makes_activations = 1,
#else
    .thread_library_bytes = 2 << 20, /* OpenBLAS's packing buffers, as far as tiles touch them */
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
    .copy = cpu_copy,
    .memory_free = cpu_memory_free,
    .zero = cpu_zero,
    .embedding_forward = cpu_embedding_forward,
    .embedding_backward = cpu_embedding_backward,
    .dropout_forward = cpu_dropout_forward,
    .dropout_backward = cpu_dropout_forward, /* the same factors again */
    .residual_norm_forward = cpu_residual_norm_forward,
    .residual_norm_backward = cpu_residual_norm_backward,
    .linear_forward = cpu_linear_forward,
    .linear_backward = cpu_linear_backward,
    .head_forward = cpu_head_forward,
    .rope_forward = cpu_rope_forward,
    .rope_backward = cpu_rope_backward,
    .attention_forward = cpu_attention_forward,
    .attention_backward = cpu_attention_backward,
    .attention_decode = cpu_attention_decode,
    .classifier_forward = cpu_classifier_forward,
    .classifier_backward = cpu_classifier_backward,
    .weights_bytes = cpu_weights_bytes,
    .weights_pack = cpu_weights_pack,
    .grad_norm = cpu_grad_norm,
    .adamw_update = cpu_adamw_update,
};
