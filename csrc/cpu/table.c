/* table.c: the CPU backend's table of ops, one for each dtype and instruction-set level. Tables with
 * quantized weights share all but what makes these. */
#include "cpu.h"

#ifdef CPU_QUANT
#include "weights_quant.h"
#endif

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
    return most + CPU_SCRATCH * (size_t)ctx->n_threads + CPU_ROUNDED;
}

static void ctx_set_workspace(gpt_ctx *ctx, void *workspace) {
    ctx->scratch = workspace;
    size_t before = CPU_SCRATCH * (size_t)ctx->n_threads + CPU_ROUNDED;
    ctx->workspace = workspace ? (char *)workspace + before : NULL;
}

#ifdef CPU_BF16
#define BY_DTYPE .makes_activations = 1, .joins_adapters = 1
#else
#define BY_DTYPE                                                                                   \
    .thread_library_bytes = 2 << 20 /* OpenBLAS's buffers, as far as tiles touch them */
#endif

#define SLOTS                                                                                      \
    .act_bytes = sizeof(elem), .packs_host_memory = 1, BY_DTYPE, .ctx_create = cpu_ctx_create,     \
    .ctx_free = cpu_ctx_free, .ctx_threads = cpu_ctx_threads, .ctx_measure = cpu_ctx_measure,      \
    .ctx_busy_seconds = cpu_ctx_busy_seconds, .peak = cpu_peak,                                    \
    .workspace_bytes = workspace_bytes, .ctx_set_workspace = ctx_set_workspace, .sync = cpu_sync,  \
    .buffer_alloc = cpu_buffer_alloc, .buffer_free = cpu_buffer_free, .upload = cpu_upload,        \
    .download = cpu_download, .download_rows = cpu_download_rows, .copy = cpu_copy,                \
    .memory_free = cpu_memory_free, .zero = cpu_zero
#define FILL(name)      .name = CPU_NAME(name),
#define FILL_ACTS(name) .name = CPU_ACTS_NAME(name),

#ifdef CPU_QUANT

/* A table whose weights are packed otherwise. */
#define QUANT_TABLE(dtype, bytes, pack, ...)                                                       \
    extern const gpt_ops CPU_JOIN(dtype, CPU_LEVEL, ops);                                          \
    const gpt_ops CPU_JOIN(dtype, CPU_LEVEL, ops) = {                                              \
        .name = "cpu " #dtype " " CPU_STRING(CPU_LEVEL),                                           \
        SLOTS,                                                                                     \
        .keeps_rest = 1,                                                                           \
        GPT_PRODUCT_OPS(FILL) GPT_ACT_OPS(FILL_ACTS) GPT_LORA_OPS(FILL_ACTS)                       \
            GPT_DORA_OPS(FILL_ACTS) GPT_ROUTE_OPS(FILL_ACTS) GPT_EXPERT_OPS(FILL)                  \
                .weights_bytes = bytes,                                                            \
        .weights_pack = pack,                                                                      \
        .weight_bytes = quant_weight_bytes,                                                        \
        __VA_ARGS__}

#define ROUNDS(dtype, form)                                                                        \
    static size_t dtype##_bytes(int rows, int cols, int parts, int training) {                     \
        (void)training;                                                                            \
        return quant_rounded_bytes(form, rows, cols, parts);                                       \
    }                                                                                              \
    static void dtype##_pack(gpt_ctx *ctx, const weights_pack *op) {                               \
        quant_round(ctx, form, op);                                                                \
    }                                                                                              \
    QUANT_TABLE(dtype, dtype##_bytes, dtype##_pack)
ROUNDS(int8, FORM_INT8);
ROUNDS(int4, FORM_Q4_K);

QUANT_TABLE(packed, quant_bf16_bytes, quant_bf16_pack, .blocks_bytes = quant_blocks_bytes,
            .blocks_pack = quant_blocks_pack, .blocks_unpack = quant_blocks_unpack);

#else

extern const gpt_ops cpu_ops;
const gpt_ops cpu_ops = {.name = "cpu " CPU_STRING(CPU_DTYPE) " " CPU_STRING(CPU_LEVEL),
                         SLOTS,
                         .weights_bytes = cpu_weights_bytes,
                         GPT_WEIGHT_OPS(FILL) GPT_ACT_OPS(FILL_ACTS) GPT_LORA_OPS(FILL_ACTS)
                             GPT_DORA_OPS(FILL_ACTS) GPT_ROUTE_OPS(FILL_ACTS) GPT_EXPERT_OPS(FILL)};

#endif
