/* table.cu: the CUDA backend's table of ops, one for each dtype. */
#include "product.h"
#ifdef CUDA_PACKED
#include "packed.h"
#endif

#define CUDA_STRING2(x) #x
#define CUDA_STRING(x)  CUDA_STRING2(x)

static size_t workspace_bytes(const gpt_ctx *ctx, const gpt_shape *shape) {
    (void)ctx;
    size_t largest = 0;
#define MOST(name)      largest = most(largest, CUDA_NAME(name)(shape));
#define MOST_ACTS(name) largest = most(largest, CUDA_ACTS_NAME(name)(shape));
    CUDA_WEIGHT_WORKSPACES(MOST)
    CUDA_ACT_WORKSPACES(MOST_ACTS)
    return largest;
}

static void ctx_set_workspace(gpt_ctx *ctx, void *workspace) {
    ctx->workspace = workspace;
}

#if defined CUDA_PACKED && !defined CUDA_ROUNDS
#define BLOCKS                                                                                     \
    .weight_bytes = cuda_weight_bytes, .blocks_bytes = cuda_blocks_bytes,                          \
    .blocks_pack = cuda_blocks_pack, .blocks_unpack = cuda_blocks_unpack,
#else
#define BLOCKS                                                                                     \
    .weight_bytes = NULL, .blocks_bytes = NULL, .blocks_pack = NULL, .blocks_unpack = NULL,
#endif

/* Experts' products read bf16 or float32 weights. */
#ifdef CUDA_QUANT
#define EXPERTS .expert_forward = NULL, .expert_backward = NULL,
#else
#define EXPERTS GPT_EXPERT_OPS(FILL)
#endif

const gpt_ops cuda_ops = {.name = "cuda " CUDA_STRING(CUDA_DTYPE),
                          .act_bytes = sizeof(elem),
                          .makes_activations = 0,
                          .packs_host_memory = 0,
                          .sums_branches = 1,
                          .sums_attention = 1,
                          .pads_logits = 1,
                          .packs_biases = IS_BF16,
                          .thread_library_bytes = PRODUCT_WORKSPACE,
                          .ctx_create = cuda_ctx_create,
                          .ctx_free = cuda_ctx_free,
                          .ctx_threads = cuda_ctx_threads,
                          .ctx_measure = cuda_ctx_measure,
                          .ctx_busy_seconds = cuda_ctx_busy_seconds,
                          .product = cuda_product_read,
                          .peak = cuda_peak,
                          .replay_begin = cuda_replay_begin,
                          .replay_end = cuda_replay_end,
                          .workspace_bytes = workspace_bytes,
                          .ctx_set_workspace = ctx_set_workspace,
                          .sync = cuda_sync,
                          .stream = cuda_stream,
                          .is_busy = cuda_is_busy,
                          .memory_free = cuda_memory_free,
                          .buffer_alloc = cuda_buffer_alloc,
                          .buffer_free = cuda_buffer_free,
                          .upload = cuda_upload,
                          .download = cuda_download,
                          .download_rows = cuda_download_rows,
                          .copy = cuda_copy,
                          .zero = cuda_zero,
                          .weights_bytes = cuda_weights_bytes,
                          BLOCKS
#define FILL(name)      .name = CUDA_NAME(name),
#define FILL_ACTS(name) .name = CUDA_ACTS_NAME(name),
                              GPT_ACT_OPS(FILL_ACTS) GPT_LORA_OPS(FILL_ACTS) GPT_DORA_OPS(FILL_ACTS)
                                  GPT_ROUTE_OPS(FILL_ACTS) EXPERTS GPT_WEIGHT_OPS(FILL)};
