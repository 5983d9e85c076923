/* cuda.h: what the files of the CUDA backend share.
 *
 * Every file here but boxes.cu, context.cu, graph.cu, plan_store.cu, product.cu and product_plain.cu is compiled
 * once for each dtype (CUDA_DTYPE: see cuda.cmake), so that `elem` and the names below are that dtype's, as in
 * cpu/cpu.h. A file ending in _bf16, _quant or _packed is compiled for that dtype alone; grad_norm.cu and
 * sample.cu see float32 in every dtype, and are compiled for fp32 alone. Most are compiled as one file
 * (sources.cmake), so a name belongs to one of them.
 *
 * The same sources also compile as C++ for the host: tests/cuda/emulate.h runs each thread of a block
 * as a fiber, so that every layer is tested where there is no GPU. For that, kernels are started
 * by `launch` alone, dynamic shared memory comes from `shared_memory`, and instructions that C++
 * cannot express have names in instructions.h. */
#ifndef CUDA_H
#define CUDA_H

#include "ops.h"

#ifdef GPTC_EMULATE_CUDA
#include <emulate.h>
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

#define CUDA_JOIN2(dtype, name) cuda_##dtype##_##name
#define CUDA_JOIN(dtype, name)  CUDA_JOIN2(dtype, name)
#define CUDA_NAME(name)         CUDA_JOIN(CUDA_DTYPE, name)

/* As on the CPU, quantized tables take all functions that see no weights from the bf16 table. CUDA_QUANT is
 * defined for them; with CUDA_PACKED their weights have the layout of packed.h, and with CUDA_ROUNDS they are
 * rounded to it. */
#ifdef CUDA_QUANT
#define CUDA_ACTS_NAME(name) CUDA_JOIN(bf16, name)
#else
#define CUDA_ACTS_NAME(name) CUDA_NAME(name)
#endif

/* Functions of the form of weights in memory, which packed.h has for two tables. */
#ifdef CUDA_ROUNDS
#define CUDA_FORM_NAME(name) CUDA_JOIN(packed, name)
#else
#define CUDA_FORM_NAME(name) CUDA_NAME(name)
#endif

/* These see float32 in every dtype, so that they are compiled once, for fp32: see sources.cmake. */
#define cuda_bf16_grad_norm           cuda_fp32_grad_norm
#define cuda_bf16_grad_norm_workspace cuda_fp32_grad_norm_workspace
#define cuda_bf16_sample              cuda_fp32_sample
#define cuda_bf16_sample_workspace    cuda_fp32_sample_workspace

/* One activation, and one weight as products read it. Arithmetic is float32 in either. */
#ifdef CUDA_BF16
typedef __nv_bfloat16 elem;
#else
typedef float elem;
#endif

/* An op, as it is defined in a file: CUDA_OP(rope_forward) { ... } */
#define CUDA_OP(name)      void CUDA_NAME(name)(gpt_ctx * ctx, const struct name *op)
#define CUDA_ACTS_OP(name) void CUDA_ACTS_NAME(name)(gpt_ctx * ctx, const struct name *op)

/* Bytes of workspace that the ops of one file need at most; an op lays it out itself. The files of
 * CUDA_ACT_WORKSPACES have GPT_ACT_OPS, the others GPT_WEIGHT_OPS. */
#define CUDA_ACT_WORKSPACES(X)                                                                     \
    X(embedding_workspace)                                                                         \
    X(norm_workspace)                                                                              \
    X(qk_norm_workspace)                                                                           \
    X(lora_workspace)                                                                              \
    X(route_workspace)                                                                             \
    X(attention_workspace) X(grad_norm_workspace) X(muon_workspace) X(sample_workspace)
#define CUDA_WEIGHT_WORKSPACES(X) X(linear_workspace) X(head_workspace) X(classifier_workspace)
#define CUDA_WORKSPACE(name)      size_t CUDA_NAME(name)(const gpt_shape *shape)
#define CUDA_ACTS_WORKSPACE(name) size_t CUDA_ACTS_NAME(name)(const gpt_shape *shape)

#define cuda_peak          CUDA_ACTS_NAME(peak)
#define cuda_weights_bytes CUDA_NAME(weights_bytes)
#define cuda_ops           CUDA_NAME(ops)

extern "C" {
#define CUDA_DECLARE(name)                CUDA_OP(name);
#define CUDA_DECLARE_ACTS(name)           CUDA_ACTS_OP(name);
#define CUDA_DECLARE_WORKSPACE(name)      CUDA_WORKSPACE(name);
#define CUDA_DECLARE_ACTS_WORKSPACE(name) CUDA_ACTS_WORKSPACE(name);
GPT_WEIGHT_OPS(CUDA_DECLARE)
GPT_ACT_OPS(CUDA_DECLARE_ACTS)
GPT_LORA_OPS(CUDA_DECLARE_ACTS)
GPT_DORA_OPS(CUDA_DECLARE_ACTS)
GPT_ROUTE_OPS(CUDA_DECLARE_ACTS)
GPT_EXPERT_OPS(CUDA_DECLARE)
CUDA_WEIGHT_WORKSPACES(CUDA_DECLARE_WORKSPACE)
CUDA_ACT_WORKSPACES(CUDA_DECLARE_ACTS_WORKSPACE)
int cuda_peak(gpt_ctx *ctx, double *flops, double *bytes);
size_t cuda_weights_bytes(int rows, int cols, int parts, int training);
extern const gpt_ops cuda_ops;
}

/* ---- context.cu ---- */

typedef struct cuda_library cuda_library; /* cuBLASLt, and its plans: product.cu */
typedef struct cuda_graphs cuda_graphs;   /* recorded sequences of ops: graph.cu */

struct gpt_ctx {
    cudaStream_t stream;
    int device;
    int has_groups; /* a Hopper, and kernels compiled for it: products of a warpgroup, launch_early */
    cudaError_t error; /* the first that happened; sync reports it */
    cuda_library *products;
    cuda_graphs *graphs;
    void *workspace;
    char *staging; /* pinned: uploads leave from here, and behind it downloads arrive */
    size_t staged; /* bytes of it that may still be on their way */
};

int cuda_ctx_create(gpt_ctx **out, int n_threads, int pin);
void cuda_ctx_free(gpt_ctx *ctx);
int cuda_ctx_threads(const gpt_ctx *ctx);
void cuda_ctx_measure(gpt_ctx *ctx, int on);
double cuda_ctx_busy_seconds(const gpt_ctx *ctx, int thread);
int cuda_sync(gpt_ctx *ctx);
void *cuda_stream(gpt_ctx *ctx);
int cuda_is_busy(gpt_ctx *ctx);
size_t cuda_memory_free(void);
void *cuda_buffer_alloc(gpt_ctx *ctx, size_t bytes, buffer_use use);
void cuda_buffer_free(gpt_ctx *ctx, void *buffer, size_t bytes);
void cuda_upload(gpt_ctx *ctx, void *device, const void *host, size_t bytes);
void cuda_download(gpt_ctx *ctx, void *host, const void *device, size_t bytes);
void cuda_download_rows(gpt_ctx *ctx, void *host, const void *device, int rows, size_t bytes,
                        size_t stride);
void cuda_copy(gpt_ctx *ctx, void *to, const void *from, size_t bytes);
void cuda_zero(gpt_ctx *ctx, void *device, size_t bytes);

/* ---- graph.cu ---- */

int cuda_graphs_open(cuda_graphs **out);
void cuda_graphs_close(cuda_graphs *graphs);
int cuda_replay_begin(gpt_ctx *ctx, const int64_t *key, int n);
int cuda_replay_end(gpt_ctx *ctx);

/* Remembers an error, unless there was one before. */
static inline void cuda_remember(gpt_ctx *ctx, cudaError_t error) {
    if (ctx->error == cudaSuccess) ctx->error = error;
}

/* ---- starting kernels ---- */

enum { WARP = 32, DEFAULT_SHARED_BYTES = 48 << 10, BLOCK_THREADS = 256 /* of small kernels */ };

/* Of a large card: how finely work is cut. */
#ifndef MULTIPROCESSORS
#define MULTIPROCESSORS 132
#endif

#ifndef GPTC_EMULATE_CUDA
/* Lets a kernel have so much shared memory. */
static inline void allow_shared(gpt_ctx *ctx, const void *kernel, size_t bytes) {
    if (bytes > DEFAULT_SHARED_BYTES)
        cuda_remember(ctx, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                (int)bytes));
}

template <typename... P, typename... A>
static void launch(gpt_ctx *ctx, void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes,
                   A... args) {
    allow_shared(ctx, (const void *)kernel, shared_bytes);
    kernel<<<grid, threads, shared_bytes, ctx->stream>>>((P)args...);
    cuda_remember(ctx, cudaGetLastError());
}

/* The same, where the kernel may begin while those in front of it end. Until it has called take_turn, it
 * reads only what is older than the kernel in front, such as weights, and writes nothing. Every thread has to
 * call that. */
template <typename... P, typename... A>
static void launch_early(gpt_ctx *ctx, void (*kernel)(P...), dim3 grid, int threads,
                         size_t shared_bytes, A... args) {
    if (!ctx->has_groups) {
        launch(ctx, kernel, grid, threads, shared_bytes, args...);
        return;
    }
    allow_shared(ctx, (const void *)kernel, shared_bytes);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = ctx->stream;
    config.attrs = &early;
    config.numAttrs = 1;
    cuda_remember(ctx, cudaLaunchKernelEx(&config, kernel, (P)args...));
}

/* The block's dynamic shared memory. */
template <typename T> static __device__ inline T *shared_memory() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    return (T *)dynamic_shared;
}
#endif

/* Waits until all that the kernels in front have written is there, then lets the next one begin: see
 * launch_early. */
static __device__ inline void take_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ---- small helpers ---- */

template <typename T> static __host__ __device__ inline T least(T a, T b) {
    return a < b ? a : b;
}
template <typename T> static __host__ __device__ inline T most(T a, T b) {
    return a > b ? a : b;
}
static __host__ __device__ inline int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
static inline size_t align_up(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

static __device__ inline float to_float(float x) {
    return x;
}
static __device__ inline float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <typename T> static __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) {
    return x;
}
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16(x);
}

/* W neighbours, read and written as one where that is 16 bytes; more are several of those. Kernels
 * take W as a parameter: PACK where a row has a multiple of it, else 1. */
enum { PACK = 16 / sizeof(elem) };

template <typename T, int W> struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) packed {
    T x[W];
};

template <int W, typename T> static __device__ inline void load(float (&x)[W], const T *from) {
    packed<T, W> p = *(const packed<T, W> *)from;
#pragma unroll
    for (int i = 0; i < W; i++) x[i] = to_float(p.x[i]);
}

template <int W, typename T> static __device__ inline void store(T *to, const float (&x)[W]) {
    packed<T, W> p;
#pragma unroll
    for (int i = 0; i < W; i++) p.x[i] = from_float<T>(x[i]);
    *(packed<T, W> *)to = p;
}

/* PACK numbers as they are in memory: in fewer registers than bf16 numbers would take apart. */
struct alignas(16) chunk {
    uint32_t words[4];
};
static __device__ inline float number(const chunk &c, int i) {
    uint32_t bits = c.words[i * 4 / PACK];
    if (PACK == 8) bits = i % 2 ? bits & 0xffff0000u : bits << 16; /* the upper half of a float */
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The sum, or the largest, over lanes whose numbers differ in bits, from bit FROM to bit TO: all of them receive
 * it, always added in the same order. */
template <int FROM, int TO> static __device__ inline float shuffled_sum(float x) {
#pragma unroll
    for (int offset = FROM; offset >= TO; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}
template <int FROM, int TO> static __device__ inline float shuffled_max(float x) {
#pragma unroll
    for (int offset = FROM; offset >= TO; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

#ifdef GPTC_EMULATE_CUDA
/* The same steps in one exchange of a warp's fibers. */
template <int FROM, int TO> static inline float lanes_sum(float x) {
    return emulate_fold(x, FROM, TO, false);
}
template <int FROM, int TO> static inline float lanes_max(float x) {
    return emulate_fold(x, FROM, TO, true);
}
#else
template <int FROM, int TO> static __device__ inline float lanes_sum(float x) {
    return shuffled_sum<FROM, TO>(x);
}
template <int FROM, int TO> static __device__ inline float lanes_max(float x) {
    return shuffled_max<FROM, TO>(x);
}
#endif
/* Over all lanes of a warp. */
static __device__ inline float warp_sum(float x) {
    return lanes_sum<WARP / 2, 1>(x);
}
static __device__ inline float warp_max(float x) {
    return lanes_max<WARP / 2, 1>(x);
}

/* The sum over a block's THREADS, a power of two, in thread 0; through as many doubles of shared
 * memory. */
template <int THREADS> static __device__ inline double block_sum(double x) {
    double *sums = shared_memory<double>();
    sums[threadIdx.x] = x;
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];
}

#endif
