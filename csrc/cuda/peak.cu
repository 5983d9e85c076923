/* peak.cu: what the device reaches: products of one matrix with another, and copying memory. */
#include "product.h"

#include <time.h>

enum {
#ifdef GPTC_EMULATE_CUDA
    PEAK_SIZE = 32,
    PEAK_BYTES = 1 << 16,
#else
    PEAK_SIZE = 8192,
    PEAK_BYTES = 1 << 30,
#endif
    PEAK_TURNS = 8,
    FILL_THREADS = 256,
    FILL_BLOCKS = 1024
};

/* Numbers between -1 and 1 without a pattern: on zeros a GPU draws less power, and multiplies faster than
 * on anything else. */
static __global__ void fill_kernel(elem *x, int64_t n) {
    int64_t step = (int64_t)gridDim.x * FILL_THREADS;
    for (int64_t i = (int64_t)blockIdx.x * FILL_THREADS + threadIdx.x; i < n; i += step)
        x[i] = from_float<elem>((float)(int32_t)counter_bits(1, (uint64_t)i) * 0x1p-31f);
}

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
    char *buffer = (char *)cuda_buffer_alloc(ctx, PEAK_BYTES, BUFFER_WHOLE);
    if (!buffer) return 0;
    size_t matrix = sizeof(elem) * PEAK_SIZE * PEAK_SIZE;
    product p = {.kind = PRODUCT_NT,
                 .bf16 = IS_BF16,
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
    launch(ctx, fill_kernel, dim3(FILL_BLOCKS), FILL_THREADS, 0, (elem *)buffer,
           (int64_t)(PEAK_BYTES / sizeof(elem)));
    *flops = 2 * size * size * size / fastest(ctx, buffer, &p);
    if (bytes) *bytes = (double)PEAK_BYTES / fastest(ctx, buffer, NULL);
    cuda_buffer_free(ctx, buffer, 0);
    return 1;
}
