/* context.cu: the device, its stream and memory; once for both dtypes. */
#define CUDA_DTYPE any
#include "instructions.h"
#include "product.h"

#include "cuda_device.h"
#include "error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the device ---- */

enum { LEAST_CAPABILITY = 80 }; /* bf16 on tensor cores, asynchronous copies */

/* One sentence for why there is no device; GPT_OK where there is one. */
static int check_driver(void) {
    int n = 0, driver = 0, runtime = 0;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaSuccess && n > 0) return GPT_OK;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0)
        return fail(GPT_ERR_DEVICE,
                    "CUDA needs an NVIDIA driver, and none is installed; use --device cpu");
    if (error == cudaErrorInsufficientDriver)
        return fail(
            GPT_ERR_DEVICE,
            "this NVIDIA driver supports CUDA up to %d.%d, and this build needs %d.%d: update "
            "the driver, or use --device cpu",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (error == cudaErrorNoDevice || error == cudaSuccess)
        return fail(GPT_ERR_DEVICE,
                    "CUDA finds no GPU, though there is a driver; use --device cpu");
    return fail(GPT_ERR_DEVICE, "CUDA does not start: %s; use --device cpu",
                cudaGetErrorString(error));
}

static __global__ void probe_kernel(void) {}

/* Whether this build's kernels run on the device: sizes, PTX and all. */
static int check_device(int device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaFuncAttributes unused;
    if (10 * major + minor < LEAST_CAPABILITY)
        return fail(GPT_ERR_DEVICE,
                    "this GPU has compute capability %d.%d; gptc needs %d.%d or later, or --device "
                    "cpu",
                    major, minor, LEAST_CAPABILITY / 10, LEAST_CAPABILITY % 10);
    if (cudaFuncGetAttributes(&unused, (const void *)probe_kernel) != cudaSuccess)
        return fail(GPT_ERR_DEVICE,
                    "this build of gptc has no kernels for compute capability %d.%d: build it on "
                    "this machine, or use --device cpu",
                    major, minor);
    return GPT_OK;
}

int cuda_check(void) {
    TRY(check_driver());
    return check_device(0);
}

int cuda_info(gpt_device_info *out) {
    cudaDeviceProp device;
    cudaDriverGetVersion(&out->driver);
    cudaRuntimeGetVersion(&out->runtime);
    TRY(check_driver());
    cudaError_t error = cudaGetDeviceProperties(&device, 0);
    if (error != cudaSuccess)
        return fail(GPT_ERR_DEVICE, "CUDA does not start: %s; use --device cpu",
                    cudaGetErrorString(error));
    snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, device.name);
    out->major = device.major;
    out->minor = device.minor;
    out->multiprocessors = device.multiProcessorCount;
    out->memory_bytes = device.totalGlobalMem;
    out->free_bytes = cuda_memory_free();
    TRY(check_device(0));
    return cuda_products_describe(out->products, sizeof out->products);
}

/* ---- the context ---- */

static __global__ void features_kernel(int *has_groups) {
    *has_groups = HAS_WGMMA;
}

/* What this build's kernels for the device have; less where GPTC_CUDA_LEVEL asks for that of an earlier
 * compute capability, such as 80. Through pinned memory, which kernels can write. */
static int has_groups(gpt_ctx *ctx) {
    const char *level = getenv("GPTC_CUDA_LEVEL");
    launch(ctx, features_kernel, dim3(1), 1, 0, (int *)ctx->staging);
    cuda_remember(ctx, cudaStreamSynchronize(ctx->stream));
    return *(int *)ctx->staging && (!level || atoi(level) >= 90);
}

/* Of uploads, and of each of the two places where pieces of a download arrive in turn: large enough that
 * the wait for one costs little, small enough that it is still in the cache when it is read. */
enum { STAGING_BYTES = 8 << 20, ARRIVAL_BYTES = 1 << 20 };

int cuda_ctx_create(gpt_ctx **out, int n_threads, int pin) {
    (void)n_threads, (void)pin;
    TRY(cuda_check());
    gpt_ctx *ctx = (gpt_ctx *)calloc(1, sizeof *ctx);
    if (!ctx) return fail(GPT_ERR_MEMORY, "no memory for the device's context");
    int status = cuda_products_open(&ctx->products);
    if (status == GPT_OK) status = cuda_graphs_open(&ctx->graphs);
    cudaError_t error = status == GPT_OK ? cudaSetDevice(ctx->device) : cudaSuccess;
    if (status == GPT_OK && error == cudaSuccess) error = cudaStreamCreate(&ctx->stream);
    if (status == GPT_OK && error == cudaSuccess)
        error = cudaMallocHost((void **)&ctx->staging, STAGING_BYTES + 2 * ARRIVAL_BYTES);
    if (error != cudaSuccess)
        status = fail(GPT_ERR_DEVICE, "CUDA does not start: %s", cudaGetErrorString(error));
    if (status != GPT_OK) {
        cuda_ctx_free(ctx);
        return status;
    }
    ctx->has_groups = has_groups(ctx);
    *out = ctx;
    return GPT_OK;
}

void cuda_ctx_free(gpt_ctx *ctx) {
    if (!ctx) return;
    if (ctx->stream) {
        cudaStreamSynchronize(ctx->stream);
        cudaStreamDestroy(ctx->stream);
    }
    if (ctx->staging) cudaFreeHost(ctx->staging);
    cuda_graphs_close(ctx->graphs);
    cuda_products_close(ctx->products);
    free(ctx);
}

/* The host's threads: the one that starts the kernels. */
int cuda_ctx_threads(const gpt_ctx *ctx) {
    (void)ctx;
    return 1;
}

void cuda_ctx_measure(gpt_ctx *ctx, int on) {
    cuda_products_measure(ctx, on);
}

double cuda_ctx_busy_seconds(const gpt_ctx *ctx, int thread) {
    (void)ctx, (void)thread;
    return 0;
}

static void wait(gpt_ctx *ctx) {
    cuda_remember(ctx, cudaStreamSynchronize(ctx->stream));
    ctx->staged = 0;
}

int cuda_sync(gpt_ctx *ctx) {
    wait(ctx);
    cudaError_t error = ctx->error;
    ctx->error = cudaSuccess;
    if (error == cudaSuccess) return GPT_OK;
    if (error == cudaErrorNotSupported)
        return fail(GPT_ERR_DEVICE, "cuBLASLt refused a matrix product of the model");
    return fail(GPT_ERR_DEVICE, "the GPU failed: %s", cudaGetErrorString(error));
}

void *cuda_stream(gpt_ctx *ctx) {
    return ctx->stream;
}

int cuda_is_busy(gpt_ctx *ctx) {
    cudaError_t error = cudaStreamQuery(ctx->stream);
    if (error == cudaErrorNotReady) {
        cudaGetLastError(); /* it is answered here */
        return 1;
    }
    cuda_remember(ctx, error);
    return 0;
}

/* ---- memory ---- */

size_t cuda_memory_free(void) {
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) == cudaSuccess) return free;
    cudaGetLastError(); /* it is answered here */
    return 0;
}

void *cuda_buffer_alloc(gpt_ctx *ctx, size_t bytes, buffer_use use) {
    (void)use;
    void *buffer = NULL;
    cudaError_t error = cudaMalloc(&buffer, bytes ? bytes : 1);
    if (error != cudaSuccess) {
        cudaGetLastError(); /* it is answered here, or by sync */
        if (error != cudaErrorMemoryAllocation) cuda_remember(ctx, error);
        return NULL;
    }
    cuda_zero(ctx, buffer, bytes);
    return buffer;
}

void cuda_buffer_free(gpt_ctx *ctx, void *buffer, size_t bytes) {
    (void)bytes;
    wait(ctx);
    cuda_remember(ctx, cudaFree(buffer));
}

/* The host's memory is ordinary: the copy has left it, or filled it, when these return. Leaving it takes
 * a wait for all that was started before, so what a step uploads leaves from pinned memory; and what
 * is downloaded arrives there, since the driver would do the same more slowly. */
void cuda_upload(gpt_ctx *ctx, void *device, const void *host, size_t bytes) {
    bool fits = bytes <= STAGING_BYTES;
    if (fits) {
        if (bytes > STAGING_BYTES - ctx->staged) wait(ctx);
        host = memcpy(ctx->staging + ctx->staged, host, bytes);
        ctx->staged += bytes;
    }
    cuda_remember(ctx, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, ctx->stream));
    if (!fits)
        wait(ctx); /* where the GPU reads the host's pages itself, they are still being read */
}

/* Rows of `bytes`, `stride` apart, of which the n bytes from `at` on have arrived. */
static void take_rows(char *host, const char *arrived, size_t at, size_t n, size_t bytes,
                      size_t stride) {
    for (size_t end = at + n; at < end;) {
        size_t row = at / stride, from = at % stride, there = least(stride - from, end - at);
        if (from < bytes) memcpy(host + row * bytes + from, arrived, least(there, bytes - from));
        arrived += there;
        at += there;
    }
}

/* While the host takes a piece, the next one is on its way. */
void cuda_download_rows(gpt_ctx *ctx, void *host, const void *device, int rows, size_t bytes,
                        size_t stride) {
    size_t all = rows > 0 ? (size_t)(rows - 1) * stride + bytes : 0;
    auto piece = [&](size_t at) { return least<size_t>(all - at, ARRIVAL_BYTES); };
    auto place = [&](size_t at) {
        return ctx->staging + STAGING_BYTES + at / ARRIVAL_BYTES % 2 * ARRIVAL_BYTES;
    };
    auto start = [&](size_t at) {
        if (at < all)
            cuda_remember(ctx, cudaMemcpyAsync(place(at), (const char *)device + at, piece(at),
                                               cudaMemcpyDeviceToHost, ctx->stream));
    };
    start(0);
    for (size_t at = 0; at < all; at += ARRIVAL_BYTES) {
        wait(ctx);
        start(at + ARRIVAL_BYTES);
        take_rows((char *)host, place(at), at, piece(at), bytes, stride);
    }
}

void cuda_download(gpt_ctx *ctx, void *host, const void *device, size_t bytes) {
    cuda_download_rows(ctx, host, device, 1, bytes, bytes);
}

void cuda_copy(gpt_ctx *ctx, void *to, const void *from, size_t bytes) {
    cuda_remember(ctx, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, ctx->stream));
}

void cuda_zero(gpt_ctx *ctx, void *device, size_t bytes) {
    cuda_remember(ctx, cudaMemsetAsync(device, 0, bytes, ctx->stream));
}
