/* weights.cu: the form in which products read weights: bf16 in the same places. fp32 reads the
 * parameters themselves. */
#include "cuda.h"

#ifdef CUDA_BF16
static __global__ void weights_pack_kernel(elem *packed, const float *w, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x;
    if (i < n) packed[i] = from_float<elem>(w[i]);
}
#endif

size_t cuda_weights_bytes(int rows, int cols, int parts, int training) {
    (void)parts, (void)training;
#ifdef CUDA_BF16
    return sizeof(elem) * (size_t)rows * (size_t)cols;
#else
    (void)rows, (void)cols;
    return 0;
#endif
}

CUDA_OP(weights_pack) {
#ifdef CUDA_BF16
    const gpt_segment *s = op->segment;
    launch(ctx, weights_pack_kernel, dim3((unsigned)div_up(s->size, BLOCK_THREADS)), BLOCK_THREADS,
           0, (elem *)s->packed, op->w, s->size);
#else
    (void)ctx, (void)op;
#endif
}
