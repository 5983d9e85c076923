/* emulate.h: enough of CUDA to run csrc/cuda/ on the host, for tests.
 *
 * The .cu files compile as C++ against this header in place of CUDA's. A launch runs its blocks one
 * after the other; the threads of a block are fibers, which give way to each other at barriers and
 * at whatever a warp does together. It is not fast, and not meant to be. It is strict:
 *
 *  - Every other launch runs its blocks, and the threads of each, in reverse, so that a result that
 *    depends on their order differs between two runs, which the tests compare bit by bit.
 *  - Shared memory holds NaNs when a block begins.
 *  - An asynchronous copy arrives when it is waited for, and no earlier; so does a warpgroup's product,
 *    which also wants its matrices published, and unchanged until then.
 *  - A box arrives when its barrier's phase ends, and until then its place holds NaNs.
 *  - Pinned memory that a copy leaves from must stay as it is until the stream is waited for.
 *  - Shared memory and every allocation end where pages begin that nobody may touch.
 *  - A vector that is not aligned to its size ends the program (-fsanitize=alignment).
 *  - While a stream is being recorded, a call that CUDA refuses then ends the program, and names itself.
 *  - Threads that wait for each other for ever, a warp that works together without all its lanes,
 *    and impossible launches end the program with a message. */
#ifndef EMULATE_H
#define EMULATE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <functional>

/* ---- the language ---- */

#define __global__
#define __device__
#define __host__
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
    float x, y;
};

/* Of the fiber that runs. */
extern dim3 gridDim, blockDim, blockIdx, threadIdx;

void __syncthreads();
void __syncwarp();

/* ---- what lanes of a warp do together ---- */

enum { EMULATED_LANES = 32, EMULATED_SLOT_BYTES = 64 };

[[noreturn]] void emulate_die(const char *what);

/* Every lane gives up to EMULATED_SLOT_BYTES, and sees what all of them gave: (lanes, slot bytes),
 * until its warp's next exchange. */
const unsigned char *emulate_exchange(const void *mine, size_t bytes);

/* What csrc/cuda/cuda.h's shuffled_sum does, or shuffled_max where `largest`, in one exchange: the last lane takes
 * every lane's steps, on the same numbers in the same order. */
float emulate_fold(float mine, int from, int to, bool largest);

template <typename T> static inline T emulate_shuffle(unsigned mask, T x, int from) {
    if (mask != ~0u) emulate_die("a shuffle among some lanes of a warp");
    T got;
    memcpy(&got, emulate_exchange(&x, sizeof x) + from * EMULATED_SLOT_BYTES, sizeof got);
    return got;
}
template <typename T> static inline T __shfl_sync(unsigned mask, T x, int lane) {
    return emulate_shuffle(mask, x, lane % EMULATED_LANES);
}
template <typename T> static inline T __shfl_xor_sync(unsigned mask, T x, int offset) {
    return emulate_shuffle(mask, x, (int)threadIdx.x % EMULATED_LANES ^ offset);
}

/* Fibers give way nowhere in between. */
template <typename T> static inline T atomicAdd(T *to, T x) {
    T before = *to;
    *to += x;
    return before;
}

/* One block runs after the other. */
static inline void __threadfence() {}

/* ---- asynchronous copies: zeros where there is no source ---- */

void emulate_copy_async(void *shared, const void *global, size_t bytes);
void emulate_copy_wait();

/* ---- bfloat16 ---- */

struct __nv_bfloat16 {
    uint16_t bits;
};

static inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* To the nearest, ties to even. */
static inline __nv_bfloat16 __float2bfloat16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f) return {(uint16_t)(bits >> 16 | 0x40)};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

/* A product that is rounded, and no part of a fused multiply and add. */
static inline float __fmul_rn(float a, float b) {
    volatile float product = a * b;
    return product;
}

/* ---- tensor cores: see csrc/cuda/instructions.h ---- */

void emulate_multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void emulate_load_matrices(uint32_t (&r)[4], const __nv_bfloat16 *row, bool transposed);

/* Products of a warpgroup: d (64 x 8 n). Its registers are NaNs until the wait for its group. a is
 * registers, or where those are NULL a matrix. */
void emulate_group_multiply(float *d, int n, const uint32_t *a, uint64_t a_matrix, uint64_t b,
                            bool transposed, bool add);
void emulate_group_commit();
void emulate_group_wait(int n);
void emulate_group_publish();

/* ---- boxes: see csrc/cuda/boxes.h and instructions.h ---- */

struct box_map;
void emulate_barrier_init(uint64_t *barrier, int count);
void emulate_barrier_expect(uint64_t *barrier, int bytes);
void emulate_barrier_arrive(uint64_t *barrier);
void emulate_barrier_wait(uint64_t *barrier, uint32_t parity);
/* Until the phase ends, shared memory holds NaNs there. */
void emulate_copy_box(void *shared, const box_map *map, int col, int head, int row, int b,
                      uint64_t *barrier);

/* ---- the runtime ---- */

typedef enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorMemoryAllocation,
    cudaErrorInsufficientDriver,
    cudaErrorNoDevice,
    cudaErrorNotReady,
    cudaErrorNotSupported,
    cudaErrorLaunchFailure,
    cudaErrorStreamCaptureUnsupported,
} cudaError_t;
typedef struct emulated_stream *cudaStream_t;
typedef struct emulated_event *cudaEvent_t;
typedef struct emulated_graph *cudaGraph_t, *cudaGraphExec_t;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
typedef enum cudaMemcpyKind {
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice
} cudaMemcpyKind;
typedef struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int major, minor, multiProcessorCount;
} cudaDeviceProp;
typedef struct cudaFuncAttributes {
    int unused;
} cudaFuncAttributes;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

/* Of a machine with two, of which CUDA_VISIBLE_DEVICES may name one. */
static inline cudaError_t cudaGetDeviceCount(int *n) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *n = !visible || !strcmp(visible, "0") || !strcmp(visible, "1");
    return *n ? cudaSuccess : cudaErrorNoDevice;
}
static inline cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
static inline cudaError_t cudaRuntimeGetVersion(int *version) {
    return cudaDriverGetVersion(version);
}
/* Of the compute capability; tests may choose another. */
inline std::atomic<int> emulated_major{8};
extern "C" void emulate_capability(int major);
static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? emulated_major.load() : 0;
    return cudaSuccess;
}
static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, const void *) {
    return cudaSuccess;
}
/* The driver's functions: cuTensorMapEncodeTiled alone. */
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult *);
static inline const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory"
           : error == cudaErrorLaunchFailure  ? "unspecified launch failure"
                                              : "an emulated error";
}
static inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
/* For tests: after so many more calls of that name one fails, as where a kernel before it did. */
extern "C" void emulate_fail(const char *call, int after);
static inline cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
static inline cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = (cudaStream_t)stream;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamDestroy(cudaStream_t) {
    return cudaSuccess;
}
/* Pinned memory, and waits of the host so far, for tests. */
cudaError_t cudaMallocHost(void **out, size_t bytes);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamQuery(cudaStream_t);
cudaError_t cudaDeviceSynchronize();
extern "C" long emulate_waits(void);

/* Does it now, or, where a stream is being recorded, when that is replayed. What and on what is a line
 * of the trace; a kernel is named by where it is. */
void emulate_enqueue(const char *what, const char *on, const std::function<void()> &run,
                     const void *kernel = NULL);
/* From now on, writes all that is done into a file, line by line; NULL: no longer. */
extern "C" void emulate_trace(FILE *to);
/* Ends the program where a stream is being recorded: the call is not one that CUDA accepts then. */
void emulate_not_recorded(const char *call);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *);
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *, cudaGraph_t, unsigned long long);
cudaError_t cudaGraphDestroy(cudaGraph_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
/* Launches of graphs so far, and nodes of the last one, for tests. */
extern "C" long emulate_graph_launches(void);
extern "C" long emulate_graph_nodes(void);

/* The device's clock, which passes only where a product of the library says so. */
void emulate_pass(float ms);
cudaError_t cudaEventCreate(cudaEvent_t *);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end);

/* Memory that ends where the result points, and pages after it that nobody may touch; NULL: no memory. */
unsigned char *emulate_pages(size_t bytes);

/* The device has little memory, so that tests can run out of it. */
enum { EMULATED_BYTES = 256 << 20, EMULATED_ALIGNMENT = 16 };
inline std::atomic<size_t> emulated_bytes_used;

static inline cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = EMULATED_BYTES;
    *free = EMULATED_BYTES - emulated_bytes_used;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **out, size_t bytes);
cudaError_t cudaFree(void *p);
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *device, int) {
    *device = {"emulated", EMULATED_BYTES, emulated_major, 0, 1};
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t);

/* ---- launches ---- */

void emulate_launch(dim3 grid, int threads, size_t shared_bytes, const std::function<void()> &run);
void *emulate_shared_memory();

struct gpt_ctx;
template <typename... P, typename... A>
static void launch(gpt_ctx *, void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes,
                   A... args) {
    char shape[96];
    snprintf(shape, sizeof shape, "%u %u %u %d %zu", grid.x, grid.y, grid.z, threads, shared_bytes);
    emulate_enqueue(
        "kernel", shape,
        [=] { emulate_launch(grid, threads, shared_bytes, [=] { kernel((P)args...); }); },
        (const void *)kernel);
}

/* There, too, one kernel runs after the other. */
template <typename... P, typename... A>
static void launch_early(gpt_ctx *ctx, void (*kernel)(P...), dim3 grid, int threads,
                         size_t shared_bytes, A... args) {
    launch(ctx, kernel, grid, threads, shared_bytes, args...);
}

template <typename T> static inline T *shared_memory() {
    return (T *)emulate_shared_memory();
}

#endif
