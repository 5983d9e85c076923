/* table.cu: the CUDA backend's table of ops, one for each dtype. */
#include "product.h"

#define CUDA_STRING2(x) #x
#define CUDA_STRING(x)  CUDA_STRING2(x)

static size_t workspace_bytes(const gpt_ctx *ctx, const gpt_shape *shape) {
    (void)ctx;
    cuda_workspace_fn *const needs[] = {cuda_embedding_workspace, cuda_norm_workspace,
                                        cuda_linear_workspace,    cuda_attention_workspace,
                                        cuda_loss_workspace,      cuda_adamw_workspace};
    size_t largest = 0;
    for (cuda_workspace_fn *need : needs) largest = most(largest, need(shape));
    return largest;
}

static void ctx_set_workspace(gpt_ctx *ctx, void *workspace) {
    ctx->workspace = workspace;
}

const gpt_ops cuda_ops = {
    .name = "cuda " CUDA_STRING(CUDA_DTYPE),
    .act_bytes = sizeof(elem),
    .makes_activations = 0,
    .packs_host_memory = 0,
    .thread_library_bytes = PRODUCT_WORKSPACE,
    .ctx_create = cuda_ctx_create,
    .ctx_free = cuda_ctx_free,
    .ctx_threads = cuda_ctx_threads,
    .ctx_measure = cuda_ctx_measure,
    .ctx_busy_seconds = cuda_ctx_busy_seconds,
    .peak = cuda_peak,
    .replay_begin = cuda_replay_begin,
    .replay_end = cuda_replay_end,
    .workspace_bytes = workspace_bytes,
    .ctx_set_workspace = ctx_set_workspace,
    .sync = cuda_sync,
    .memory_free = cuda_memory_free,
    .buffer_alloc = cuda_buffer_alloc,
    .buffer_free = cuda_buffer_free,
    .upload = cuda_upload,
    .download = cuda_download,
    .copy = cuda_copy,
    .zero = cuda_zero,
    .embedding_forward = cuda_embedding_forward,
    .embedding_backward = cuda_embedding_backward,
    .dropout_forward = cuda_dropout_forward,
    .dropout_backward = cuda_dropout_forward, /* the same factors again */
    .residual_norm_forward = cuda_residual_norm_forward,
    .residual_norm_backward = cuda_residual_norm_backward,
    .linear_forward = cuda_linear_forward,
    .linear_backward = cuda_linear_backward,
    .head_forward = cuda_head_forward,
    .rope_forward = cuda_rope_forward,
    .rope_backward = cuda_rope_backward,
    .attention_forward = cuda_attention_forward,
    .attention_backward = cuda_attention_backward,
    .attention_decode = cuda_attention_decode,
    .classifier_forward = cuda_classifier_forward,
    .classifier_backward = cuda_classifier_backward,
    .weights_bytes = cuda_weights_bytes,
    .weights_pack = cuda_weights_pack,
    .grad_norm = cuda_grad_norm,
    .adamw_update = cuda_adamw_update,
};
