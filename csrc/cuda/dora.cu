/* dora.cu: magnitudes of adapted rows. Products with A and B are small, and made once an update. */
#include "lora.h"

static __global__ void dora_inputs_kernel(dora_inputs a) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x;
    if (i < a.n) ((elem *)a.out)[i] = from_float<elem>(a.a[i]);
}

CUDA_OP(dora_inputs) {
    launch(ctx, dora_inputs_kernel, dim3((unsigned)div_up(op->n, BLOCK_THREADS)), BLOCK_THREADS, 0,
           *op);
}

/* ---- lengths of rows ---- */

enum { DORA_WARPS = BLOCK_THREADS / WARP };

/* squares (n_parts, R, R) = A A^T of each part. A warp a number. */
static __global__ void dora_squares_kernel(float *squares, const float *a, int n, int R, int K) {
    int i = (int)(blockIdx.x * DORA_WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    if (i >= n) return;
    int row = i / R;
    const float *x = a + (int64_t)row * K, *y = a + (int64_t)(row / R * R + i % R) * K;
    float sum = 0;
    for (int k = lane; k < K; k += WARP) sum = fmaf(x[k], y[k], sum);
    sum = warp_sum(sum);
    if (lane == 0) squares[i] = sum;
}

/* A thread a row of B: b (A A^T) b^T, and what the model's row adds to it. */
static __global__ void dora_gain_kernel(const __grid_constant__ dora_gain a,
                                        const __grid_constant__ lora_rows rows,
                                        const float *all_squares) {
    int row = (int)(blockIdx.x * BLOCK_THREADS + threadIdx.x), R = a.R;
    if (row >= rows.before[rows.n_parts]) return;
    int part = lora_part_of(rows, row), col = rows.parts[part].first + row - rows.before[part];
    const float *b = a.b + (int64_t)row * R, *squares = all_squares + (int64_t)part * R * R;
    const elem *aw = (const elem *)a.aw + (int64_t)part * R * a.OC + col;
    double cross = 0, own = 0, scale = a.scale;
    for (int i = 0; i < R; i++) {
        double along = 0;
        for (int j = 0; j < R; j++) along += (double)squares[i * R + j] * b[j];
        own += b[i] * along;
        cross += (double)b[i] * to_float(aw[(int64_t)i * a.OC]);
    }
    double square = a.squares[row] + 2 * scale * cross + scale * scale * own;
    a.per_norm[row] = square > 0 ? (float)(1 / sqrt(square)) : 0;
    a.gain[row] = a.m[row] * a.per_norm[row];
}

CUDA_OP(dora_gain) {
    lora_rows rows = lora_rows_of(op);
    float *squares = (float *)ctx->workspace;
    int n = op->n_parts * op->R * op->R;
    launch(ctx, dora_squares_kernel, dim3((unsigned)div_up(n, DORA_WARPS)), BLOCK_THREADS, 0,
           squares, op->a, n, op->R, op->IC);
    launch(ctx, dora_gain_kernel, dim3((unsigned)div_up(rows.before[op->n_parts], BLOCK_THREADS)),
           BLOCK_THREADS, 0, *op, rows, squares);
}

/* ---- backward ---- */

static __global__ void dora_backward_kernel(const __grid_constant__ dora_backward a,
                                            const __grid_constant__ lora_rows rows) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x;
    if (i >= (int64_t)a.N * a.OC) return;
    int col = (int)(i % a.OC), part = lora_part_at(rows, col);
    float d = to_float(((const elem *)a.dout)[i]);
    if (part >= 0) d *= a.gain[rows.before[part] + col - rows.parts[part].first];
    ((elem *)a.dv)[i] = from_float<elem>(d);
}

/* A thread a row of B, which sums over the batch in order. */
static __global__ void dora_magnitudes_kernel(const __grid_constant__ dora_backward a,
                                              const __grid_constant__ lora_rows rows) {
    int row = (int)(blockIdx.x * BLOCK_THREADS + threadIdx.x), all = rows.before[rows.n_parts];
    if (row >= all) return;
    int part = lora_part_of(rows, row);
    const elem *dout = (const elem *)a.dout + rows.parts[part].first + row - rows.before[part];
    const elem *v = (const elem *)a.v + row;
    float sum = 0;
    for (int64_t n = 0; n < a.N; n++)
        sum = fmaf(to_float(dout[n * a.OC]), to_float(v[n * all]), sum);
    a.dm[row] += a.per_norm[row] * sum;
}

CUDA_OP(dora_backward) {
    lora_rows rows = lora_rows_of(op);
    launch(ctx, dora_backward_kernel,
           dim3((unsigned)div_up((int64_t)op->N * op->OC, BLOCK_THREADS)), BLOCK_THREADS, 0, *op,
           rows);
    if (op->dm)
        launch(ctx, dora_magnitudes_kernel,
               dim3((unsigned)div_up(rows.before[op->n_parts], BLOCK_THREADS)), BLOCK_THREADS, 0,
               *op, rows);
}
