/* cpu.h: what the files of the CPU backend share.
 *
 * Every file here but context.c is compiled once for each table of ops (see CMakeLists.txt): a
 * dtype, CPU_DTYPE, at an instruction-set level, CPU_LEVEL. The names below therefore carry both,
 * so that the copies live in one library; the sources, and readers, see only the plain name. A file
 * ending in _fp32, _bf16 or _quant is compiled for that dtype alone. */
#ifndef CPU_H
#define CPU_H

#include "ops.h"

#define CPU_JOIN2(dtype, level, name) cpu_##dtype##_##level##_##name
#define CPU_JOIN(dtype, level, name)  CPU_JOIN2(dtype, level, name)
#define CPU_NAME(name)                CPU_JOIN(CPU_DTYPE, CPU_LEVEL, name)

/* Quantized tables (CPU_QUANT) have bf16 activations, and take from the bf16 table all functions that
 * see no weights, at CPU_ACTS_LEVEL. They share the others: table.c has one of them for each way to make weights. */
#ifdef CPU_QUANT
#define CPU_ACTS_NAME(name) CPU_JOIN(bf16, CPU_ACTS_LEVEL, name)
#else
#define CPU_ACTS_NAME(name) CPU_NAME(name)
#endif

/* One activation, as this table stores it. Arithmetic is float32 in either. */
#ifdef CPU_BF16
typedef uint16_t elem;
#else
typedef float elem;
#endif

/* An op, as it is defined in a file: CPU_OP(rope_forward) { ... } */
#define CPU_OP(name)      void CPU_NAME(name)(gpt_ctx * ctx, const struct name *op)
#define CPU_ACTS_OP(name) void CPU_ACTS_NAME(name)(gpt_ctx * ctx, const struct name *op)

#define CPU_DECLARE(name)      CPU_OP(name);
#define CPU_DECLARE_ACTS(name) CPU_ACTS_OP(name);
GPT_WEIGHT_OPS(CPU_DECLARE)
GPT_ACT_OPS(CPU_DECLARE_ACTS)
GPT_LORA_OPS(CPU_DECLARE_ACTS)
GPT_DORA_OPS(CPU_DECLARE_ACTS)
GPT_ROUTE_OPS(CPU_DECLARE_ACTS)
GPT_EXPERT_OPS(CPU_DECLARE)

/* Bytes of workspace that the ops of one file need at most; an op lays it out itself. The files of
 * CPU_ACT_WORKSPACES have GPT_ACT_OPS, the others GPT_WEIGHT_OPS. */
#define CPU_ACT_WORKSPACES(X)                                                                      \
    X(norm_workspace)                                                                              \
    X(qk_norm_workspace)                                                                           \
    X(lora_workspace)                                                                              \
    X(route_workspace)                                                                             \
    X(attention_workspace) X(grad_norm_workspace) X(muon_workspace) X(sample_workspace)
#define CPU_WEIGHT_WORKSPACES(X) X(linear_workspace) X(classifier_workspace)
#define CPU_WORKSPACE(name)      size_t CPU_NAME(name)(const gpt_shape *shape, int n_threads)
#define CPU_ACTS_WORKSPACE(name) size_t CPU_ACTS_NAME(name)(const gpt_shape *shape, int n_threads)

#define CPU_DECLARE_WORKSPACE(name)      CPU_WORKSPACE(name);
#define CPU_DECLARE_ACTS_WORKSPACE(name) CPU_ACTS_WORKSPACE(name);
CPU_WEIGHT_WORKSPACES(CPU_DECLARE_WORKSPACE)
CPU_ACT_WORKSPACES(CPU_DECLARE_ACTS_WORKSPACE)

#define cpu_peak          CPU_ACTS_NAME(peak)
#define cpu_weights_bytes CPU_NAME(weights_bytes)
#define cpu_ops           CPU_NAME(ops)
int cpu_peak(gpt_ctx *ctx, double *flops, double *bytes);
size_t cpu_weights_bytes(int rows, int cols, int parts, int training);

/* ---- context.c ---- */

typedef struct cpu_pool cpu_pool;

struct gpt_ctx {
    int n_threads;
    cpu_pool *pool; /* NULL with one thread */
    double *busy;   /* (n_threads) seconds at work, while they are measured; else NULL */
    double *busy_memory;
    void *workspace; /* shared by the threads of an op */
    void *scratch;   /* n_threads x CPU_SCRATCH, and CPU_ROUNDED */
};

/* Where float32 products are our own, from panels (panels_fp32.h); elsewhere larger ones are those of BLAS. */
#if !defined(CPU_BF16) && (defined(__AVX2__) || defined(PLAIN_LANES))
#define CPU_OWN_PRODUCTS
#endif

/* The scratch memory of each thread within an op, a whole number of pages. Behind that of all threads: rows that
 * product_quant.c rounds once for all its tiles, as many as a piece of a prompt has. */
#if defined(CPU_QUANT)
enum { CPU_SCRATCH = 640 << 10, CPU_ROUNDED = 4 << 20 };
#elif defined(CPU_OWN_PRODUCTS) && (defined(__AVX512F__) || defined(PLAIN_LANES))
enum { CPU_SCRATCH = 640 << 10, CPU_ROUNDED = 0 };
#elif defined(CPU_BF16) || defined(CPU_OWN_PRODUCTS)
enum { CPU_SCRATCH = 512 << 10, CPU_ROUNDED = 0 };
#else
enum { CPU_SCRATCH = 0, CPU_ROUNDED = 0 };
#endif

static inline void *cpu_scratch(const gpt_ctx *ctx, int thread) {
    return (char *)ctx->scratch + (size_t)thread * CPU_SCRATCH;
}

/* One piece of work: items begin to end - 1, on thread `thread` (0 is the caller). */
typedef void cpu_task_fn(void *args, int thread, int64_t begin, int64_t end);

/* Runs the task over items 0 to n - 1, at most `grain` at a time. Threads take the next piece as
 * they get free, so a task may write only what belongs to its items (and its thread's scratch);
 * then the result does not depend on who ran what. */
void cpu_parallel(gpt_ctx *ctx, cpu_task_fn *task, void *args, int64_t n, int64_t grain);

int cpu_ctx_create(gpt_ctx **out, int n_threads, int pin);
void cpu_ctx_free(gpt_ctx *ctx);
int cpu_ctx_threads(const gpt_ctx *ctx);
/* Seconds of a clock that only goes forward. */
double cpu_seconds(void);
void cpu_ctx_measure(gpt_ctx *ctx, int on);
double cpu_ctx_busy_seconds(const gpt_ctx *ctx, int thread);
int cpu_sync(gpt_ctx *ctx);
void *cpu_buffer_alloc(gpt_ctx *ctx, size_t bytes, buffer_use use);
void cpu_buffer_free(gpt_ctx *ctx, void *buffer, size_t bytes);
void cpu_upload(gpt_ctx *ctx, void *device, const void *host, size_t bytes);
void cpu_download(gpt_ctx *ctx, void *host, const void *device, size_t bytes);
void cpu_download_rows(gpt_ctx *ctx, void *host, const void *device, int rows, size_t bytes,
                       size_t stride);
void cpu_copy(gpt_ctx *ctx, void *to, const void *from, size_t bytes);
size_t cpu_memory_free(void);
void cpu_zero(gpt_ctx *ctx, void *device, size_t bytes);

/* ---- small helpers ---- */

static inline int cpu_min(int a, int b) {
    return a < b ? a : b;
}
static inline int cpu_max(int a, int b) {
    return a > b ? a : b;
}
static inline int64_t cpu_div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
static inline int64_t cpu_round_up(int64_t a, int64_t b) {
    return cpu_div_up(a, b) * b;
}

/* total += scale * sum(weights * losses), or = without add. Without weights each is 1. */
static inline void cpu_add_losses(float *total, const float *losses, const float *weights,
                                  float scale, int add, int N) {
    double sum = 0;
    for (int n = 0; n < N; n++) sum += weights ? (double)weights[n] * losses[n] : losses[n];
    *total = (float)((add ? *total : 0) + scale * sum);
}

/* Pieces for n items when there should be a few for each thread, and none smaller than `least`. */
static inline int64_t cpu_grain(const gpt_ctx *ctx, int64_t n, int64_t least) {
    int64_t grain = cpu_div_up(n, 4 * (int64_t)ctx->n_threads);
    return grain > least ? grain : least;
}

#endif
