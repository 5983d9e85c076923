/* weights_quant.cu: weights rounded to 8 or 4 bits, and products with them. */
#include "quant.h"

enum { THREADS = 256, WARPS = THREADS / WARP, FEW_ROWS = 8 };

size_t cuda_weights_bytes(int rows, int cols, int parts, int training) {
    (void)parts, (void)training;
    return (size_t)quant_scales_at(rows, cols) +
           sizeof(__nv_bfloat16) * (size_t)rows * (size_t)quant_groups(cols);
}

/* A scale no smaller than x, so that nothing grows past the largest integer. */
static __device__ inline __nv_bfloat16 scale_above(float x) {
    __nv_bfloat16 scale = __float2bfloat16(x);
    return fabsf(to_float(scale)) < fabsf(x) ? __float2bfloat16(x * (1 + 0x1p-7f)) : scale;
}

/* A thread a group: the largest number becomes the largest integer, with 4 bits that of the longer
 * side. */
static __global__ void weights_pack_kernel(uint8_t *to, const float *w, int rows, int K) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, G = quant_groups(K);
    if (i >= rows * G) return;
    int row = (int)(i / G), first = (int)(i % G) * QUANT_GROUP,
        n = least<int>(QUANT_GROUP, K - first);
    const float *x = w + (int64_t)row * K + first;
    float extreme = 0;
    for (int k = 0; k < n; k++)
        if (fabsf(x[k]) > fabsf(extreme)) extreme = x[k];
    __nv_bfloat16 scale =
        scale_above(extreme / (CUDA_QUANT == 8 ? (float)LARGEST : -(float)LARGEST - 1));
    float inverse = to_float(scale) != 0 ? 1 / to_float(scale) : 0;
    uint8_t *bytes = to + i * QUANT_BYTES;
    for (int k = 0; k < QUANT_GROUP; k++) {
        int q = k < n ? least<int>((int)rintf(x[k] * inverse), LARGEST) : 0;
        if (CUDA_QUANT == 8)
            bytes[k] = (uint8_t)q;
        else if (k < QUANT_BYTES)
            bytes[k] = (uint8_t)(q + 8);
        else
            bytes[k - QUANT_BYTES] |= (uint8_t)((q + 8) << 4);
    }
    ((__nv_bfloat16 *)(to + quant_scales_at(rows, K)))[i] = scale;
}

void cuda_weights_pack(gpt_ctx *ctx, const float *w, const gpt_segment *segments, int n_segments,
                       int training) {
    (void)training;
    for (int i = 0; i < n_segments; i++) {
        const gpt_segment *s = &segments[i];
        if (!s->packed) continue;
        int64_t groups = s->rows * quant_groups(s->cols);
        launch(ctx, weights_pack_kernel, dim3((unsigned)div_up(groups, THREADS)), THREADS, 0,
               (uint8_t *)s->packed, w + s->offset, s->rows, s->cols);
    }
}

/* ---- products ---- */

/* The weights as the bf16 table has them. A thread a group. */
static __global__ void unpack_kernel(elem *to, const uint8_t *w, int rows, int K) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, G = quant_groups(K);
    if (i >= rows * G) return;
    int row = (int)(i / G), first = (int)(i % G) * QUANT_GROUP;
    float q[QUANT_GROUP], scale = to_float(((const elem *)(w + quant_scales_at(rows, K)))[i]);
    unpack_group(q, w + i * QUANT_BYTES);
#pragma unroll
    for (int k = 0; k < QUANT_GROUP; k++)
        if (first + k < K) to[(int64_t)row * K + first + k] = from_float<elem>(scale * q[k]);
}

/* A warp an output, a lane a group at a time, for all M rows of a. */
template <typename T>
static __global__ void quant_product_kernel(T *out, const elem *a, const uint8_t *w, int M, int N,
                                            int K, int lda, int ldo) {
    int n = (int)(blockIdx.x * WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    if (n >= N) return;
    int64_t G = quant_groups(K);
    const elem *scales = (const elem *)(w + quant_scales_at(N, K));
    float sum[FEW_ROWS] = {};
    for (int64_t g = lane; g < G; g += WARP) {
        float q[QUANT_GROUP], scale = to_float(scales[n * G + g]);
        unpack_group(q, w + (n * G + g) * QUANT_BYTES);
        for (int m = 0; m < M; m++) {
            const elem *x = a + (int64_t)m * lda + g * QUANT_GROUP;
            float dot = 0;
            if (K % QUANT_GROUP == 0 && lda % PACK == 0) {
#pragma unroll
                for (int k = 0; k < QUANT_GROUP; k += PACK) {
                    float v[PACK];
                    load(v, x + k);
#pragma unroll
                    for (int i = 0; i < PACK; i++) dot += q[k + i] * v[i];
                }
            } else {
#pragma unroll
                for (int k = 0; k < QUANT_GROUP; k++)
                    if (g * QUANT_GROUP + k < K) dot += q[k] * to_float(x[k]);
            }
#pragma unroll
            for (int i = 0; i < FEW_ROWS; i++)
                if (i == m) sum[i] += scale * dot; /* so that sums stay in registers */
        }
    }
#pragma unroll
    for (int m = 0; m < FEW_ROWS; m++) {
        float total = warp_sum(sum[m]);
        if (m < M && lane == 0) out[(int64_t)m * ldo + n] = from_float<T>(total);
    }
}

int cuda_quant_product(gpt_ctx *ctx, const product *p, elem *room) {
    const uint8_t *w = (const uint8_t *)p->b;
    const elem *a = (const elem *)p->a;
    dim3 outputs((unsigned)div_up(p->N, WARPS));
    if (p->M > FEW_ROWS) {
        product whole = *p;
        launch(ctx, unpack_kernel, dim3((unsigned)div_up(p->N * quant_groups(p->K), THREADS)),
               THREADS, 0, room, w, p->N, p->K);
        whole.b = room;
        return cuda_product(ctx, &whole);
    }
    if (p->epilogue != EPILOGUE_NONE) return 0;
    if (p->float_out)
        launch(ctx, quant_product_kernel<float>, outputs, THREADS, 0, (float *)p->out, a, w, p->M,
               p->N, p->K, p->lda, p->ldo);
    else
        launch(ctx, quant_product_kernel<elem>, outputs, THREADS, 0, (elem *)p->out, a, w, p->M,
               p->N, p->K, p->lda, p->ldo);
    return 1;
}
