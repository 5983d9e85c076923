/* lora.cu: adapters of linear layers, in float32 as on the CPU. A thread has an element of an activation, or
 * a few of a gradient, and sums over rows in their order. */
#include "activation.h"
#include "lora.h"

enum {
    LORA_ROWS = 4,  /* that a warp multiplies with a row of A or B */
    LORA_RANKS = 4, /* of a gradient, in a thread */
    LORA_WARPS = BLOCK_THREADS / WARP,
};

/* du; or A A^T of each part for dora_gain. */
CUDA_WORKSPACE(lora_workspace) {
    size_t R = (size_t)shape->lora_rank;
    return sizeof(float) * GPT_MAX_STACKED * R * most((size_t)shape->N, shape->dora ? R : 0);
}

/* ---- what the adapter reads ---- */

typedef struct lora_source {
    const elem *in;  /* (N, K), or NULL: activation(pre) */
    const elem *pre; /* (N, K), or (N, 2 K) for SwiGLU */
    int activation, K;
    gpt_dropout_site dropout;
} lora_source;

static __device__ inline float lora_read(const lora_source &s, gpt_dropout dropout, int64_t row,
                                         int k) {
    int64_t at = row * s.K + k;
    float x, up = 0;
    if (s.in) {
        x = to_float(s.in[at]);
    } else {
        int twin = is_gated(s.activation) ? s.K : 0;
        const elem *pre = s.pre + row * (s.K + twin) + k;
        if (twin) up = to_float(pre[twin]);
        x = activation_forward(s.activation, to_float(pre[0]), up);
    }
    return dropout.p > 0 ? x * dropout_factor(dropout, (uint64_t)at) : x;
}

/* ---- forward ---- */

/* u (N, width) = x a^T. A warp has LORA_ROWS rows, and a row of A. */
static __global__ void lora_project_kernel(float *u, lora_source x, const float *a, int N,
                                           int width) {
    int j = (int)(blockIdx.y * LORA_WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    int64_t first = (int64_t)blockIdx.x * LORA_ROWS;
    if (j >= width) return;
    gpt_dropout dropout = dropout_at(x.dropout);
    float sums[LORA_ROWS] = {};
    for (int k = lane; k < x.K; k += WARP) {
        float w = a[(int64_t)j * x.K + k];
#pragma unroll
        for (int i = 0; i < LORA_ROWS; i++)
            if (first + i < N) sums[i] = fmaf(lora_read(x, dropout, first + i, k), w, sums[i]);
    }
#pragma unroll
    for (int i = 0; i < LORA_ROWS; i++) {
        float sum = warp_sum(sums[i]);
        if (lane == 0 && first + i < N) u[(first + i) * width + j] = sum;
    }
}

/* Column col of y, with what its adapter does. */
static __device__ inline float lora_adapted(const lora_forward &a, const lora_rows &rows,
                                            const elem *y, int64_t row, int col) {
    int part = lora_part_at(rows, col);
    float sum = 0;
    if (part < 0) return to_float(y[col]);
    const float *u = a.u + (row * rows.n_parts + part) * a.R;
    const float *b = a.b + (int64_t)(rows.before[part] + col - rows.parts[part].first) * a.R;
    for (int j = 0; j < a.R; j++) sum = fmaf(u[j], b[j], sum);
    float x = to_float(y[col]) + a.scale * sum;
    if (!a.gain) return x;
    float bias = a.bias ? to_float(((const elem *)a.bias)[col]) : 0;
    int at = rows.before[part] + col - rows.parts[part].first;
    x -= bias;
    if (a.v) ((elem *)a.v)[row * rows.before[rows.n_parts] + at] = from_float<elem>(x);
    return a.gain[at] * x + bias;
}

static __global__ void lora_forward_kernel(const __grid_constant__ lora_forward a,
                                           const __grid_constant__ lora_rows rows) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x;
    if (i >= (int64_t)a.N * a.OC) return;
    int twin = is_gated(a.activation) ? a.OC : 0, col = (int)(i % a.OC);
    int64_t row = i / a.OC;
    elem *y = (elem *)(a.activation == GPT_ACT_NONE ? a.out : a.pre) + row * (a.OC + twin);
    float x = lora_adapted(a, rows, y, row, col), up = 0;
    y[col] = from_float<elem>(x);
    if (a.activation == GPT_ACT_NONE) return;
    if (twin) {
        up = lora_adapted(a, rows, y, row, col + twin);
        y[col + twin] = from_float<elem>(up);
        up = to_float(y[col + twin]);
    }
    x = activation_forward(a.activation, to_float(y[col]), up);
    ((elem *)a.out)[i] = from_float<elem>(x);
}

static inline dim3 lora_grid(int64_t n, int y) {
    return dim3((unsigned)div_up(n, BLOCK_THREADS), (unsigned)y);
}

CUDA_OP(lora_forward) {
    int width = op->n_parts * op->R;
    lora_source in = {(const elem *)op->in, NULL, GPT_ACT_NONE, op->IC, op->dropout};
    dim3 grid((unsigned)div_up(op->N, LORA_ROWS), (unsigned)div_up(width, LORA_WARPS));
    launch(ctx, lora_project_kernel, grid, BLOCK_THREADS, 0, op->u, in, op->a, op->N, width);
    launch(ctx, lora_forward_kernel, lora_grid((int64_t)op->N * op->OC, 1), BLOCK_THREADS, 0, *op,
           lora_rows_of(op));
}

/* ---- backward ---- */

/* du (N, n_parts R) = scale dout b, of each part's columns. A warp has LORA_ROWS rows, and a column of B. */
static __global__ void lora_outputs_backward_kernel(float *du, lora_backward a, lora_rows rows) {
    int j = (int)(blockIdx.y * LORA_WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    int64_t first = (int64_t)blockIdx.x * LORA_ROWS, width = (int64_t)a.n_parts * a.R;
    if (j >= width) return;
    int part = j / a.R;
    const elem *dout = (const elem *)a.dout + rows.parts[part].first;
    const float *b = a.b + (int64_t)rows.before[part] * a.R + j % a.R;
    float sums[LORA_ROWS] = {};
    for (int o = lane; o < rows.parts[part].rows; o += WARP) {
        float w = b[(int64_t)o * a.R];
#pragma unroll
        for (int i = 0; i < LORA_ROWS; i++)
            if (first + i < a.N) sums[i] = fmaf(to_float(dout[(first + i) * a.OC + o]), w, sums[i]);
    }
#pragma unroll
    for (int i = 0; i < LORA_ROWS; i++) {
        float sum = warp_sum(sums[i]);
        if (lane == 0 && first + i < a.N) du[(first + i) * width + j] = a.scale * sum;
    }
}

/* din += du a, through dropout and the activation. */
static __global__ void lora_inputs_backward_kernel(const float *du, lora_backward a) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x;
    if (i >= (int64_t)a.N * a.IC) return;
    int twin = is_gated(a.activation) ? a.IC : 0, k = (int)(i % a.IC);
    int64_t row = i / a.IC, at = row * (a.IC + twin) + k, width = (int64_t)a.n_parts * a.R;
    float d = 0, x = 0, up = 0, dup = 0;
    for (int j = 0; j < width; j++) d = fmaf(du[row * width + j], a.a[(int64_t)j * a.IC + k], d);
    gpt_dropout dropout = dropout_at(a.dropout);
    if (dropout.p > 0) d *= dropout_factor(dropout, (uint64_t)i);
    if (a.activation != GPT_ACT_NONE) x = to_float(((const elem *)a.pre)[at]);
    if (twin) up = to_float(((const elem *)a.pre)[at + twin]);
    d = activation_backward(a.activation, d, x, up, &dup);
    elem *din = (elem *)a.din + at;
    din[0] = from_float<elem>(to_float(din[0]) + d);
    if (twin) din[twin] = from_float<elem>(to_float(din[twin]) + dup);
}

/* da (width, K) += du^T x. */
static __global__ void lora_a_backward_kernel(float *da, const float *du, lora_source x, int N,
                                              int width) {
    int k = (int)(blockIdx.x * BLOCK_THREADS + threadIdx.x), first = (int)blockIdx.y * LORA_RANKS;
    if (k >= x.K) return;
    gpt_dropout dropout = dropout_at(x.dropout);
    float sums[LORA_RANKS] = {};
    for (int64_t row = 0; row < N; row++) {
        float value = lora_read(x, dropout, row, k);
#pragma unroll
        for (int j = 0; j < LORA_RANKS; j++)
            if (first + j < width) sums[j] = fmaf(du[row * width + first + j], value, sums[j]);
    }
#pragma unroll
    for (int j = 0; j < LORA_RANKS; j++)
        if (first + j < width) da[(int64_t)(first + j) * x.K + k] += sums[j];
}

/* db (rows, R) += scale dout^T u. */
static __global__ void lora_b_backward_kernel(lora_backward a, lora_rows rows) {
    int row = (int)(blockIdx.x * BLOCK_THREADS + threadIdx.x), first = (int)blockIdx.y * LORA_RANKS;
    if (row >= rows.before[rows.n_parts]) return;
    int part = lora_part_of(rows, row);
    const elem *dout = (const elem *)a.dout + rows.parts[part].first + row - rows.before[part];
    const float *u = a.u + (int64_t)part * a.R + first;
    float sums[LORA_RANKS] = {};
    for (int64_t n = 0; n < a.N; n++) {
        float d = to_float(dout[n * a.OC]);
#pragma unroll
        for (int j = 0; j < LORA_RANKS; j++)
            if (first + j < a.R) sums[j] = fmaf(d, u[n * rows.n_parts * a.R + j], sums[j]);
    }
#pragma unroll
    for (int j = 0; j < LORA_RANKS; j++)
        if (first + j < a.R) a.db[(int64_t)row * a.R + first + j] += a.scale * sums[j];
}

CUDA_OP(lora_backward) {
    int width = op->n_parts * op->R;
    lora_rows rows = lora_rows_of(op);
    float *du = (float *)ctx->workspace;
    lora_source in = {(const elem *)op->in, (const elem *)op->pre, op->activation, op->IC,
                      op->dropout};
    dim3 grid((unsigned)div_up(op->N, LORA_ROWS), (unsigned)div_up(width, LORA_WARPS));
    launch(ctx, lora_outputs_backward_kernel, grid, BLOCK_THREADS, 0, du, *op, rows);
    launch(ctx, lora_inputs_backward_kernel, lora_grid((int64_t)op->N * op->IC, 1), BLOCK_THREADS,
           0, du, *op);
    if (op->da)
        launch(ctx, lora_a_backward_kernel, lora_grid(op->IC, (int)div_up(width, LORA_RANKS)),
               BLOCK_THREADS, 0, op->da, du, in, op->N, width);
    if (op->db)
        launch(ctx, lora_b_backward_kernel,
               lora_grid(rows.before[op->n_parts], (int)div_up(op->R, LORA_RANKS)), BLOCK_THREADS,
               0, *op, rows);
}
