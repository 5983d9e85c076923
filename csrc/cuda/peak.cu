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
    *flops = 2 * size * size * size / fastest(ctx, buffer, &p);
    if (bytes) *bytes = (double)PEAK_BYTES / fastest(ctx, buffer, NULL);
    cuda_buffer_free(ctx, buffer, 0);
    return 1;
}
