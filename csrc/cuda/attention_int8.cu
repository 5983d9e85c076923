/* attention_int8.cu: decoding with a cache in int8, see attention_decode in ops.h. Rows enter the cache first, so that
 * a query sees its own key as later ones do. A scale of keys is a factor of scores, one of values of probabilities. */
#include "attention.h"

/* ---- storing ---- */

/* A warp for the key or the value of a row and head: the largest number becomes 127. */
static __global__ void store_int8_kernel(attention_decode a) {
    int64_t task = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP; /* of (N, 2, NKV) */
    if (task >= (int64_t)a.N * 2 * a.NKV) return;
    int kv = (int)(task % a.NKV), lane = (int)threadIdx.x % WARP;
    int64_t n = task / a.NKV / 2;
    bool is_value = task / a.NKV % 2;
    const elem *x = (const elem *)a.qkv + n * row_stride(a) +
                    (int64_t)(a.NH + (is_value ? a.NKV : 0) + kv) * a.HS;
    int64_t row = ((int64_t)a.seqs[n] * a.NKV + kv) * a.n_ctx + a.positions[n];
    int8_t *to = (int8_t *)(is_value ? a.cache_v : a.cache_k) + row * a.HS;
    float largest = 0, none = 0; /* or NaN, where a number is not finite */
    for (int s = lane; s < a.HS; s += WARP) {
        float y = to_float(x[s]);
        largest = fmaxf(largest, fabsf(y));
        none += y * 0.0f;
    }
    largest = warp_max(largest);
    none = warp_sum(none);
    float inverse = largest > 0 ? 127 / largest : 0;
    for (int s = lane; s < a.HS; s += WARP) {
        float y = rintf(to_float(x[s]) * inverse);
        to[s] = (int8_t)(fabsf(y) <= 127 ? (int)y : 0);
    }
    if (lane == 0) (is_value ? a.scale_v : a.scale_k)[row] = largest / 127 + none;
}

/* ---- attention ---- */

/* What the block has in shared memory. */
typedef struct int8_memory {
    float *q;         /* (HS) */
    float *sums;      /* (WARPS, HS) weighted sums of values */
    float *weights;   /* (WARPS, WARP) of the keys at hand */
    float *max, *sum; /* (WARPS) */
} int8_memory;

static inline size_t int8_shared_bytes(int HS) {
    return sizeof(float) * ((1 + WARPS) * (size_t)HS + WARPS * WARP + 2 * WARPS);
}

static __device__ inline int8_memory int8_memory_of(int HS) {
    float *q = shared_memory<float>(), *sums = q + HS, *weights = sums + WARPS * HS;
    float *max = weights + WARPS * WARP;
    return {q, sums, weights, max, max + WARPS};
}

/* Each lane has another key, so each reads as much at a time as it can. */
static __device__ inline float dot_int8(const float *q, const int8_t *k, int HS) {
    float sum = 0;
    if (HS % 16 == 0) {
        for (int s = 0; s < HS; s += 16) {
            packed<uint32_t, 4> w = *(const packed<uint32_t, 4> *)(k + s);
#pragma unroll
            for (int i = 0; i < 16; i++)
                sum = fmaf(q[s + i], (float)(int8_t)(w.x[i / 4] >> i % 4 * 8), sum);
        }
    } else {
        for (int s = 0; s < HS; s++) sum = fmaf(q[s], (float)k[s], sum);
    }
    return sum;
}

/* A block for each row and query head: its warps take turns at the keys and then join. */
static __global__ void decode_int8_kernel(attention_decode a, scoring how) {
    int h = (int)(blockIdx.x % a.NH), n = (int)(blockIdx.x / a.NH), end = a.positions[n] + 1;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, HS = a.HS;
    int8_memory m = int8_memory_of(HS);
    int64_t start = cache_at(a, a.seqs[n], h), first_row = start / HS;
    const int8_t *k = (const int8_t *)a.cache_k + start, *v = (const int8_t *)a.cache_v + start;
    const float *scale_k = a.scale_k + first_row, *scale_v = a.scale_v + first_row;
    const elem *q = (const elem *)a.qkv + (int64_t)n * row_stride(a) + (int64_t)h * HS;
    float *sums = m.sums + warp * HS, *weights = m.weights + warp * WARP;
    for (int s = (int)threadIdx.x; s < HS; s += THREADS) m.q[s] = to_float(q[s]);
    for (int s = lane; s < HS; s += WARP) sums[s] = 0;
    __syncthreads();
    float max = -INFINITY, sum = 0;
    int begin = first_key(sight{a.window, NULL, 0}, end - 1);
    for (int first = begin + warp * WARP; first < end; first += THREADS) {
        int key = first + lane, n_keys = least<int>(WARP, end - first);
        float score = -INFINITY;
        if (key < end)
            score = score_of(how, scale_k[key] * dot_int8(m.q, k + (int64_t)key * HS, HS));
        float top = fmaxf(max, warp_max(score)), p = key < end ? expf(score - top) : 0;
        float shrink = sum > 0 ? expf(max - top) : 0;
        sum = sum * shrink + warp_sum(p);
        max = top;
        weights[lane] = key < end ? p * scale_v[key] : 0;
        __syncwarp();
        for (int s = lane; s < HS; s += WARP) {
            float x = sums[s] * shrink;
            for (int j = 0; j < n_keys; j++)
                x = fmaf(weights[j], (float)v[(int64_t)(first + j) * HS + s], x);
            sums[s] = x;
        }
        __syncwarp();
    }
    if (lane == 0) m.max[warp] = max, m.sum[warp] = sum;
    __syncthreads();
    float top = -INFINITY, total = 0, factor[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, m.max[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        factor[w] = expf(m.max[w] - top);
        total += factor[w] * m.sum[w];
    }
    for (int s = (int)threadIdx.x; s < HS; s += THREADS) {
        float x = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) x += factor[w] * m.sums[w * HS + s];
        ((elem *)a.out)[((int64_t)n * a.NH + h) * HS + s] = from_float<elem>(x / total);
    }
}

void attention_decode_int8(gpt_ctx *ctx, const attention_decode &op) {
    launch(ctx, store_int8_kernel, dim3((unsigned)div_up((int64_t)op.N * 2 * op.NKV, WARPS)),
           THREADS, 0, op);
    launch(ctx, decode_int8_kernel, dim3((unsigned)(op.N * op.NH)), THREADS,
           int8_shared_bytes(op.HS), op, scoring_of(op));
}
