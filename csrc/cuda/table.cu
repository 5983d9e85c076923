/* table.cu: the CUDA backend's table of ops, one for each dtype. */
#include "product.h"

#include <time.h>

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

/* ---- what the device reaches ---- */

enum {
#ifdef GPTC_EMULATE_CUDA
    PEAK_SIZE = 32,
    PEAK_BYTES = 1 << 16,
#else
    PEAK_SIZE = 8192,
    PEAK_BYTES = 1 << 30,
#endif
    PEAK_TURNS = 8
};

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The time of the fastest turn at copying half of the buffer onto the other, or at a square product
 * within it. */
static double fastest(gpt_ctx *ctx, char *buffer, const product *p) {
    double best = 1e30;
    for (int turn = 0; turn < PEAK_TURNS; turn++) {
        cuda_remember(ctx, cudaStreamSynchronize(ctx->stream));
        double begin = seconds();
        if (p)
            cuda_product(ctx, p);
        else
            cuda_remember(ctx, cudaMemcpyAsync(buffer, buffer + PEAK_BYTES / 2, PEAK_BYTES / 2,
                                               cudaMemcpyDeviceToDevice, ctx->stream));
        cuda_remember(ctx, cudaStreamSynchronize(ctx->stream));
        best = least(best, seconds() - begin);
    }
    return best;
}

int cuda_peak(gpt_ctx *ctx, double *flops, double *bytes) {
    char *buffer = (char *)cuda_buffer_alloc(ctx, PEAK_BYTES);
    if (!buffer) return 0;
    size_t matrix = sizeof(elem) * PEAK_SIZE * PEAK_SIZE;
    product p = {.kind = PRODUCT_NT,
                 .bf16 = sizeof(elem) == 2,
                 .M = PEAK_SIZE,
                 .N = PEAK_SIZE,
                 .K = PEAK_SIZE,
                 .lda = PEAK_SIZE,
                 .ldb = PEAK_SIZE,
                 .ldo = PEAK_SIZE,
                 .out = buffer,
                 .a = buffer + matrix,
                 .b = buffer + 2 * matrix};
    double size = PEAK_SIZE;
    *flops = 2 * size * size * size / fastest(ctx, buffer, &p);
    if (bytes) *bytes = (double)PEAK_BYTES / fastest(ctx, buffer, NULL);
    cuda_buffer_free(ctx, buffer, 0);
    return 1;
}

const gpt_ops cuda_ops = {
    .name = "cuda " CUDA_STRING(CUDA_DTYPE),
    .act_bytes = sizeof(elem),
    .makes_activations = 0,
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
