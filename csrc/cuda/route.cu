/* route.cu: the experts of each token, and the ways of its rows to them and back. */
#include "cuda.h"

enum {
    ROUTE_WARPS = BLOCK_THREADS / WARP,
    ROUTE_ROWS = 4, /* that a warp multiplies with a row of the router, or a thread with a column */
    ROUTE_EXPERTS = 4, /* of a gradient, in a thread */
    ROUTE_CHUNK = 64,  /* rows at least that a block sums for the router's gradient */
    ROUTE_CHUNKS = 16, /* such blocks of a column */
    LANE_EXPERTS = (int)GPT_MAX_EXPERTS / (int)WARP,
};

/* ---- forward ---- */

/* probs (N, E) = in w^T. A warp has ROUTE_ROWS rows, and a row of w. */
static __global__ void route_logits_kernel(route_forward a) {
    int e = (int)(blockIdx.y * ROUTE_WARPS + threadIdx.x / WARP), lane = (int)threadIdx.x % WARP;
    int64_t first = (int64_t)blockIdx.x * ROUTE_ROWS;
    const elem *in = (const elem *)a.in + first * a.C;
    if (e >= a.E) return;
    float sums[ROUTE_ROWS] = {};
    for (int c = lane; c < a.C; c += WARP) {
        float w = a.w[(int64_t)e * a.C + c];
#pragma unroll
        for (int i = 0; i < ROUTE_ROWS; i++)
            if (first + i < a.N) sums[i] = fmaf(to_float(in[(int64_t)i * a.C + c]), w, sums[i]);
    }
#pragma unroll
    for (int i = 0; i < ROUTE_ROWS; i++) {
        float sum = warp_sum(sums[i]);
        if (lane == 0 && first + i < a.N) a.probs[(first + i) * a.E + e] = sum;
    }
}

/* Of two candidates the likelier, and the first of equal ones; -1 is none. */
static __device__ inline bool is_before(int e, float p, int other, float other_p) {
    if (e < 0 || other < 0) return e >= 0;
    return p > other_p || (!(other_p > p) && e < other);
}

/* The likeliest expert of those that lanes have and `taken` has not, in all lanes. Lane l has experts
 * l, l + WARP and so on. */
static __device__ inline int likeliest(const float (&p)[LANE_EXPERTS], int E, unsigned taken,
                                       float *its_p) {
    int lane = (int)threadIdx.x % WARP, best = -1;
    float best_p = 0;
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) {
        int e = lane + i * WARP;
        if (e < E && !(taken >> i & 1) && is_before(e, p[i], best, best_p)) best = e, best_p = p[i];
    }
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        int other = __shfl_xor_sync(~0u, best, offset);
        float other_p = __shfl_xor_sync(~0u, best_p, offset);
        if (is_before(other, other_p, best, best_p)) best = other, best_p = other_p;
    }
    *its_p = __shfl_sync(~0u, best_p, 0);
    return __shfl_sync(~0u, best, 0); /* with NaNs lanes may disagree */
}

/* The softmax in place, then gates and choices. A warp has a row. */
static __global__ void route_choose_kernel(route_forward a) {
    int64_t n = (int64_t)blockIdx.x * ROUTE_WARPS + threadIdx.x / WARP;
    int lane = (int)threadIdx.x % WARP;
    if (n >= a.N) return;
    float p[LANE_EXPERTS], largest = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) {
        int e = lane + i * WARP;
        p[i] = e < a.E ? a.probs[n * a.E + e] : -INFINITY;
        largest = fmaxf(largest, p[i]);
    }
    largest = warp_max(largest);
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) {
        p[i] = lane + i * WARP < a.E ? expf(p[i] - largest) : 0;
        sum += p[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) {
        p[i] /= sum;
        if (lane + i * WARP < a.E) a.probs[n * a.E + lane + i * WARP] = p[i];
    }
    float of_chosen = 0;
    unsigned taken = 0;
    for (int k = 0; k < a.K; k++) {
        float gate;
        int e = likeliest(p, a.E, taken, &gate);
        if (e % WARP == lane) taken |= 1u << e / WARP;
        of_chosen += gate;
        if (lane == 0) a.choices[n * a.K + k] = e, a.gates[n * a.K + k] = gate;
    }
    __syncwarp();
    if (a.norm && lane == 0)
        for (int k = 0; k < a.K; k++) a.gates[n * a.K + k] /= of_chosen;
}

/* The first row of expert blockIdx.x, and the rows of its choices, in their order. A thread has neighbouring
 * choices; shared memory holds how many of them, and of those of threads before, have a smaller expert, and
 * this one. */
static __global__ void route_places_kernel(route_forward a) {
    int e = (int)blockIdx.x, t = (int)threadIdx.x, R = a.N * a.K;
    int *below = shared_memory<int>(), *here = below + BLOCK_THREADS;
    int each = (int)div_up(R, BLOCK_THREADS);
    int begin = least(t * each, R), end = least(begin + each, R), n_below = 0, n_here = 0;
    for (int i = begin; i < end; i++) {
        n_below += a.choices[i] < e;
        n_here += a.choices[i] == e;
    }
    below[t] = n_below, here[t] = n_here;
    __syncthreads();
    for (int step = 1; step < BLOCK_THREADS; step *= 2) {
        int more_below = t >= step ? below[t - step] : 0,
            more_here = t >= step ? here[t - step] : 0;
        __syncthreads();
        below[t] += more_below, here[t] += more_here;
        __syncthreads();
    }
    int first = below[BLOCK_THREADS - 1], row = first + here[t] - n_here;
    if (t == 0) a.begins[e] = first;
    if (t == 0 && e == a.E - 1) a.begins[a.E] = R;
    for (int i = begin; i < end; i++)
        if (a.choices[i] == e) a.places[i] = row++;
}

CUDA_ACTS_OP(route_forward) {
    dim3 products((unsigned)div_up(op->N, ROUTE_ROWS), (unsigned)div_up(op->E, ROUTE_WARPS));
    launch(ctx, route_logits_kernel, products, BLOCK_THREADS, 0, *op);
    launch(ctx, route_choose_kernel, dim3((unsigned)div_up(op->N, ROUTE_WARPS)), BLOCK_THREADS, 0,
           *op);
    launch(ctx, route_places_kernel, dim3((unsigned)op->E), BLOCK_THREADS,
           sizeof(int) * 2 * BLOCK_THREADS, *op);
}

/* A warp has a choice. */
template <int W> static __global__ void expert_spread_kernel(expert_spread a) {
    int64_t i = (int64_t)blockIdx.x * ROUTE_WARPS + threadIdx.x / WARP;
    int lane = (int)threadIdx.x % WARP;
    if (i >= (int64_t)a.N * a.K) return;
    const elem *in = (const elem *)a.in + i / a.K * a.C;
    int64_t place = (int64_t)a.places[i] * a.C;
    float gate = a.gates ? a.gates[i] : 1, dot = 0;
    for (int c = lane * W; c < a.C; c += WARP * W) {
        float x[W], value[W];
        load(x, in + c);
        if (a.dgates) {
            load(value, (const elem *)a.values + place + c);
#pragma unroll
            for (int k = 0; k < W; k++) dot = fmaf(x[k], value[k], dot);
        }
#pragma unroll
        for (int k = 0; k < W; k++) x[k] *= gate;
        store((elem *)a.out + place + c, x);
    }
    if (!a.dgates) return;
    dot = warp_sum(dot);
    if (lane == 0) a.dgates[i] = dot;
}

CUDA_ACTS_OP(expert_spread) {
    launch(ctx, op->C % PACK ? expert_spread_kernel<1> : expert_spread_kernel<PACK>,
           dim3((unsigned)div_up((int64_t)op->N * op->K, ROUTE_WARPS)), BLOCK_THREADS, 0, *op);
}

template <int W> static __global__ void expert_combine_kernel(expert_combine a) {
    int64_t i = ((int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x) * W, n = i / a.C;
    if (i >= (int64_t)a.N * a.C) return;
    float sum[W] = {};
    for (int k = 0; k < a.K; k++) {
        float x[W], gate = a.gates ? a.gates[n * a.K + k] : 1;
        load(x, (const elem *)a.in + (int64_t)a.places[n * a.K + k] * a.C + i % a.C);
#pragma unroll
        for (int j = 0; j < W; j++) sum[j] = fmaf(gate, x[j], sum[j]);
    }
    store((elem *)a.out + i, sum);
}

CUDA_ACTS_OP(expert_combine) {
    int W = op->C % PACK ? 1 : PACK;
    launch(ctx, W == 1 ? expert_combine_kernel<1> : expert_combine_kernel<PACK>,
           dim3((unsigned)div_up((int64_t)op->N * op->C, BLOCK_THREADS * W)), BLOCK_THREADS, 0,
           *op);
}

/* ---- backward ---- */

static inline int route_chunks(int N) {
    return (int)least<int64_t>(div_up(N, ROUTE_CHUNK), ROUTE_CHUNKS);
}

/* The workspace of this file. */
typedef struct route_memory {
    float *dlogits; /* (N, E) */
    float *partial; /* (ROUTE_CHUNKS, E, C): sums of the router's gradient */
} route_memory;

static size_t lay_out_route(route_memory *m, char *base, int N, int E, int C) {
    size_t partial_at = align_up(sizeof(float) * (size_t)N * (size_t)E);
    m->dlogits = (float *)base;
    m->partial = (float *)(base + partial_at);
    return partial_at + sizeof(float) * ROUTE_CHUNKS * (size_t)E * (size_t)C;
}

CUDA_ACTS_WORKSPACE(route_workspace) {
    route_memory m;
    if (!shape->training || !shape->E) return 0;
    return lay_out_route(&m, NULL, shape->N, shape->E, shape->C);
}

/* Of the load-balance loss, with respect to a probability of expert e. */
static __device__ inline float balance_slope(const route_backward &a, int e) {
    double rows = (double)a.N * a.L;
    int64_t tokens = 0;
    for (int l = 0; l < a.L; l++) {
        const int32_t *begins = a.begins + (int64_t)l * (a.E + 1) + e;
        tokens += begins[1] - begins[0];
    }
    return (float)(a.balance * a.E * (double)tokens / (rows * rows));
}

/* The chosen gates are a softmax over their logits with `norm`, and else probabilities of that over all. A
 * warp has ROUTE_ROWS rows. */
static __global__ void route_logits_backward_kernel(float *dlogits, route_backward a) {
    float *slopes = shared_memory<float>(); /* (E) */
    int lane = (int)threadIdx.x % WARP;
    for (int e = (int)threadIdx.x; e < a.E; e += BLOCK_THREADS) slopes[e] = balance_slope(a, e);
    __syncthreads();
    int64_t first = ((int64_t)blockIdx.x * ROUTE_WARPS + threadIdx.x / WARP) * ROUTE_ROWS;
    for (int64_t n = first; n < least(first + ROUTE_ROWS, (int64_t)a.N); n++) {
        const float *p = a.probs + n * a.E, *gates = a.gates + n * a.K;
        const float *dgates = a.dgates + n * a.K;
        float over_chosen = 0, over_all = 0;
        for (int k = 0; k < a.K; k++) over_chosen = fmaf(gates[k], dgates[k], over_chosen);
        for (int e = lane; e < a.E; e += WARP) over_all = fmaf(p[e], slopes[e], over_all);
        over_all = warp_sum(over_all);
        if (!a.norm) over_all += over_chosen;
        for (int e = lane; e < a.E; e += WARP) {
            float d = p[e] * (slopes[e] - over_all);
            for (int k = 0; k < a.K; k++)
                if (a.choices[n * a.K + k] == e)
                    d += gates[k] * (a.norm ? dgates[k] - over_chosen : dgates[k]);
            dlogits[n * a.E + e] = d;
        }
    }
}

/* din += dlogits w. A thread has a column of ROUTE_ROWS rows. */
static __global__ void route_inputs_backward_kernel(const float *dlogits, route_backward a) {
    int c = (int)(blockIdx.y * BLOCK_THREADS + threadIdx.x);
    int64_t first = (int64_t)blockIdx.x * ROUTE_ROWS; /* x, which may be large */
    if (c >= a.C) return;
    float sums[ROUTE_ROWS] = {};
    for (int e = 0; e < a.E; e++) {
        float w = a.w[(int64_t)e * a.C + c];
#pragma unroll
        for (int i = 0; i < ROUTE_ROWS; i++)
            if (first + i < a.N) sums[i] = fmaf(dlogits[(first + i) * a.E + e], w, sums[i]);
    }
#pragma unroll
    for (int i = 0; i < ROUTE_ROWS; i++) {
        elem *din = (elem *)a.din + (first + i) * a.C + c;
        if (first + i < a.N) *din = from_float<elem>(to_float(*din) + sums[i]);
    }
}

/* partial (chunks, E, C) = dlogits^T in, of a chunk of rows. A thread has a column of ROUTE_EXPERTS rows. */
static __global__ void route_weights_backward_kernel(float *partial, const float *dlogits,
                                                     route_backward a) {
    int c = (int)(blockIdx.x * BLOCK_THREADS + threadIdx.x),
        first = (int)blockIdx.y * ROUTE_EXPERTS;
    int rows = (int)div_up(a.N, gridDim.z), row = (int)blockIdx.z * rows;
    int end = least(row + rows, a.N);
    if (c >= a.C) return;
    float sums[ROUTE_EXPERTS] = {};
    for (; row < end; row++) {
        float x = to_float(((const elem *)a.in)[(int64_t)row * a.C + c]);
        const float *d = dlogits + (int64_t)row * a.E + first;
#pragma unroll
        for (int i = 0; i < ROUTE_EXPERTS; i++)
            if (first + i < a.E) sums[i] = fmaf(d[i], x, sums[i]);
    }
    partial += ((int64_t)blockIdx.z * a.E + first) * a.C + c;
#pragma unroll
    for (int i = 0; i < ROUTE_EXPERTS; i++)
        if (first + i < a.E) partial[(int64_t)i * a.C] = sums[i];
}

/* dw += the chunks' sums, in their order. */
static __global__ void route_weights_add_kernel(float *dw, const float *partial, int n_chunks,
                                                int64_t n) {
    int64_t i = (int64_t)blockIdx.x * BLOCK_THREADS + threadIdx.x;
    if (i >= n) return;
    float sum = 0;
    for (int chunk = 0; chunk < n_chunks; chunk++) sum += partial[chunk * n + i];
    dw[i] += sum;
}

CUDA_ACTS_OP(route_backward) {
    route_memory m;
    lay_out_route(&m, (char *)ctx->workspace, op->N, op->E, op->C);
    unsigned columns = (unsigned)div_up(op->C, BLOCK_THREADS);
    int chunks = route_chunks(op->N);
    int64_t weights = (int64_t)op->E * op->C;
    launch(ctx, route_logits_backward_kernel,
           dim3((unsigned)div_up(op->N, ROUTE_WARPS * ROUTE_ROWS)), BLOCK_THREADS,
           sizeof(float) * (size_t)op->E, m.dlogits, *op);
    launch(ctx, route_inputs_backward_kernel, dim3((unsigned)div_up(op->N, ROUTE_ROWS), columns),
           BLOCK_THREADS, 0, m.dlogits, *op);
    if (!op->dw) return;
    launch(ctx, route_weights_backward_kernel,
           dim3(columns, (unsigned)div_up(op->E, ROUTE_EXPERTS), (unsigned)chunks), BLOCK_THREADS,
           0, m.partial, m.dlogits, *op);
    launch(ctx, route_weights_add_kernel, dim3((unsigned)div_up(weights, BLOCK_THREADS)),
           BLOCK_THREADS, 0, op->dw, m.partial, chunks, weights);
}
