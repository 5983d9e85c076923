/* sample.cu: draws from each row of logits by a block, in a few passes over the row. Tokens are not
 * sorted: each filter ends at one of them, which `keep_first` finds, and keeps those up to it.
 * The arithmetic is that of sample.h, so that the tokens are the CPU's. */
#include "cuda.h"

#include "sample.h"

/* Half of what a block may have: the other half's registers keep a pass in flight. */
enum { THREADS = 512, WARPS = THREADS / WARP };
/* Tokens of a step that are ranked one by one; where there are more, the step is taken apart. */
#ifndef RANKED
#define RANKED 1024
#endif

/* What tokens are ordered by. */
enum key { BY_LOGIT, BY_CHANCE, BY_TYPICAL, KEYS };

/* The block's shared memory. */
struct room {
    /* the tokens, and which of them are left */
    const float *z;
    uint32_t *chances;
    int V;
    float best, steepness;
    uint64_t last[KEYS]; /* the last order that filters by a key keep */
    bool typical;        /* whether typical_p is asked for */
    uint32_t mean;       /* of halvings, for that */
    /* where the filter at work ends */
    unsigned counts[KEY_STEPS], sums[KEY_STEPS][2]; /* of chances: the lower half, the upper one */
    int step;                                       /* -1: it keeps all */
    uint64_t kept, sum;                             /* above that step */
    uint64_t ranked[RANKED];
    unsigned ranked_chances[RANKED], n_ranked;

    uint64_t parts[WARPS]; /* the chances of the tokens left in the part of each warp */
    uint64_t slots[WARPS];
    double normalizer; /* log of the sum of exponentials of all logits */
    int token;         /* drawn */
};

/* ---- what a block does together ---- */

template <typename T> static __device__ inline T add(T a, T b) {
    return a + b;
}

/* f over the x of neighbouring lanes, in all of them. */
template <int LANES = WARP, typename T, typename F> static __device__ inline T fold_warp(T x, F f) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) x = f(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

/* f over all threads' x, in all of them. */
template <typename T, typename F> static __device__ inline T fold(room *m, T x, F f) {
    T *slots = (T *)m->slots;
    x = fold_warp(x, f);
    if (threadIdx.x % WARP == 0) slots[threadIdx.x / WARP] = x;
    __syncthreads();
    x = fold_warp<WARPS>(slots[threadIdx.x % WARPS], f);
    __syncthreads();
    return x;
}

/* The sum over this lane and those before it. */
static __device__ inline uint64_t scan_warp(uint64_t x) {
    int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        uint64_t other = __shfl_sync(~0u, x, lane < offset ? lane : lane - offset);
        if (lane >= offset) x += other;
    }
    return x;
}

/* The sum over this thread and those before it. */
static __device__ inline uint64_t scan(room *m, uint64_t x) {
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    x = scan_warp(x);
    if (lane == WARP - 1) m->slots[warp] = x;
    __syncthreads();
    uint64_t warps = scan_warp(m->slots[lane % WARPS]);
    uint64_t before = __shfl_sync(~0u, warps, warp > 0 ? warp - 1 : 0);
    __syncthreads();
    return warp > 0 ? before + x : x;
}

/* Neighbours that a thread reads as one: rows are that far apart, or a multiple of it. */
static const int W = 4;

/* f(i, x[i]) for each i below V. */
template <int UNROLL, typename T, typename F>
static __device__ inline void for_tokens(const T *x, int V, F f) {
#pragma unroll UNROLL
    for (int i = (int)threadIdx.x * W; i < V / W * W; i += THREADS * W) {
        packed<T, W> own = *(const packed<T, W> *)(x + i);
#pragma unroll
        for (int k = 0; k < W; k++) f(i + k, own.x[k]);
    }
    int i = V / W * W + (int)threadIdx.x;
    if (i < V) f(i, x[i]);
}

/* f(i, x[i] and its W - 1 neighbours) for the part of V that a warp has, by whole warps and in order. */
template <typename T, typename F> static __device__ inline void for_part(const T *x, int V, F f) {
    int lane = (int)threadIdx.x % WARP, part = (int)div_up(V, (int)THREADS * W) * (int)WARP * W;
    int begin = (int)threadIdx.x / WARP * part, end = least(begin + part, V);
    for (int first = begin; first < end; first += WARP * W) {
        int i = first + lane * W;
        packed<T, W> own = {};
        if (i < V) own = *(const packed<T, W> *)(x + i);
        f(i, own);
    }
}

/* ---- orders: a key, and of equal keys the first token is the largest ---- */

static __device__ inline uint64_t order_of(uint32_t key, int token) {
    return (uint64_t)key << 32 | (uint32_t)~token;
}
static __device__ inline int token_of(uint64_t order) {
    return (int)~(uint32_t)order;
}

/* Rises as a logit does. */
static __device__ inline uint32_t logit_key(float z) {
    uint32_t bits;
    z += 0.0f; /* -0 is 0 */
    memcpy(&bits, &z, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The largest of V logits: INFINITY where one is too large or not a number, or with `finite` too small. */
static __device__ inline float largest(room *m, const float *z, int V, bool finite) {
    float top = -INFINITY;
    for_tokens<4>(z, V, [&](int, float x) {
        bool sound = x < INFINITY && !(finite && x == -INFINITY);
        top = fmaxf(top, sound ? x : INFINITY);
    });
    return fold(m, top, [](float a, float b) { return fmaxf(a, b); });
}

/* The first token with this logit. */
static __device__ inline int first_of(room *m, const float *z, int V, float logit) {
    int first = V;
    for_tokens<4>(z, V, [&](int i, float x) {
        if (x == logit) first = least(first, i);
    });
    return fold(m, first, least<int>);
}

/* ---- the tokens that filters keep ---- */

/* The chances of a warp's part. */
static __device__ inline void set_part(room *m, uint64_t sum) {
    sum = fold_warp(sum, add<uint64_t>);
    if (threadIdx.x % WARP == 0) m->parts[threadIdx.x / WARP] = sum;
    __syncthreads();
}

/* All tokens, with their chances. */
static __device__ inline void weigh(room *m, const float *z, uint32_t *chances, int V, float best,
                                    float steepness) {
    uint64_t sum = 0;
    for_part(z, V, [&](int i, const packed<float, W> &own) {
        packed<uint32_t, W> chance = {};
#pragma unroll
        for (int k = 0; k < W; k++) {
            if (i + k < V) chance.x[k] = chance_after(halvings(own.x[k], best, steepness));
            sum += chance.x[k];
        }
        if (i < V) *(packed<uint32_t, W> *)(chances + i) = chance;
    });
    if (threadIdx.x == 0) {
        m->z = z;
        m->chances = chances;
        m->V = V;
        m->best = best;
        m->steepness = steepness;
        m->last[BY_CHANCE] = order_of(1, V); /* all that have a chance */
        m->last[BY_TYPICAL] = 0;
        m->typical = false;
    }
    set_part(m, sum);
}

static __device__ inline uint32_t halvings_of(const room *m, int i) {
    return halvings(m->z[i], m->best, m->steepness);
}

static __device__ inline uint64_t typical_order(const room *m, int i) {
    return order_of(typical_key(halvings_of(m, i), m->mean), i);
}

/* What a pass asks of every token, in registers: in shared memory it would be read again for each. */
struct left {
    const room *m;
    uint64_t last;
    bool typical;

    __device__ left(const room *m) : m(m), last(m->last[BY_CHANCE]), typical(m->typical) {}
    __device__ bool has(int i, uint32_t chance) const {
        return order_of(chance, i) >= last &&
               (!typical || typical_order(m, i) >= m->last[BY_TYPICAL]);
    }
};

/* f(token, chance) for each that is left. */
template <typename F> static __device__ inline void for_left(const room *m, F f) {
    left left(m);
    for_tokens<4>(m->chances, m->V, [&](int i, uint32_t chance) {
        if (left.has(i, chance)) f(i, chance);
    });
}

/* f(order, chance) for each that is left; by their logits, of all tokens. */
template <typename F> static __device__ inline void for_orders(const room *m, enum key key, F f) {
    if (key == BY_LOGIT)
        for_tokens<1>(m->z, m->V, [&](int i, float x) { f(order_of(logit_key(x), i), 0u); });
    else
        for_left(m, [&](int i, uint32_t chance) {
            f(key == BY_CHANCE ? order_of(chance, i) : typical_order(m, i), chance);
        });
}

/* What is left of a warp's part: f(its first token, their chances). */
template <typename F> static __device__ inline void for_part_left(const room *m, F f) {
    left left(m);
    for_part(m->chances, m->V, [&](int i, packed<uint32_t, W> own) {
#pragma unroll
        for (int k = 0; k < W; k++)
            if (i + k >= m->V || !left.has(i + k, own.x[k])) own.x[k] = 0;
        f(i, own);
    });
}

/* After a filter. */
static __device__ inline void sum_parts(room *m) {
    uint64_t sum = 0;
    for_part_left(m, [&](int, const packed<uint32_t, W> &chance) {
#pragma unroll
        for (int k = 0; k < W; k++) sum += chance.x[k];
    });
    set_part(m, sum);
}

static __device__ inline uint64_t sum_left(const room *m) {
    return fold_warp<WARPS>(m->parts[threadIdx.x % WARPS], add<uint64_t>);
}

/* ---- the end of a filter ---- */

/* In two halves, since a 64-bit addition in shared memory would be a loop. */
static __device__ inline void count(room *m, int step, uint32_t chance) {
    atomicAdd(&m->counts[step], 1u);
    if (atomicAdd(&m->sums[step][0], chance) + chance < chance) atomicAdd(&m->sums[step][1], 1u);
}
static __device__ inline uint64_t sum_at(const room *m, int step) {
    return (uint64_t)m->sums[step][1] << 32 | m->sums[step][0];
}

/* The step in which so many tokens, or chances of `enough`, are reached from the highest on; and what the
 * steps above it have. */
static __device__ inline void find_step(room *m, uint64_t kept, uint64_t sum, uint64_t most_tokens,
                                        uint64_t enough) {
    const int OWN = (int)div_up(KEY_STEPS, THREADS);
    int top = KEY_STEPS - 1 - (int)threadIdx.x * OWN;
    uint64_t count = 0, chances = 0;
    if (threadIdx.x == 0) m->step = -1;
    for (int k = top; k > top - OWN && k >= 0; k--) count += m->counts[k], chances += sum_at(m, k);
    kept += scan(m, count) - count;
    sum += scan(m, chances) - chances;
    for (int k = top; k > top - OWN && k >= 0 && kept < most_tokens && sum < enough; k--) {
        if (kept + m->counts[k] >= most_tokens || sum + sum_at(m, k) >= enough) {
            m->step = k;
            m->kept = kept;
            m->sum = sum;
        }
        kept += m->counts[k];
        sum += sum_at(m, k);
    }
    __syncthreads();
}

/* Keeps the first tokens by falling order: so many of them, or as few as have chances of `enough`. */
static __device__ inline void keep_first(room *m, enum key key, uint64_t most_tokens,
                                         uint64_t enough) {
    uint64_t low = 0, high = ~(uint64_t)0, kept = 0, sum = 0;
    for (int shift = -1;;) {
        auto step_of = [&](uint64_t order) {
            if (order < low || order > high) return -1;
            return shift < 0 ? key_step((uint32_t)(order >> 32)) : (int)((order - low) >> shift);
        };
        for (int k = (int)threadIdx.x; k < KEY_STEPS; k += THREADS)
            m->counts[k] = m->sums[k][0] = m->sums[k][1] = 0;
        m->n_ranked = 0;
        __syncthreads();
        for_orders(m, key, [&](uint64_t order, uint32_t chance) {
            int step = step_of(order);
            if (step >= 0) count(m, step, chance);
        });
        __syncthreads();
        find_step(m, kept, sum, most_tokens, enough);
        int step = m->step;
        if (step < 0) return;
        kept = m->kept;
        sum = m->sum;
        if (m->counts[step] <= RANKED) {
            for_orders(m, key, [&](uint64_t order, uint32_t chance) {
                if (step_of(order) != step) return;
                unsigned at = atomicAdd(&m->n_ranked, 1u);
                m->ranked[at] = order;
                m->ranked_chances[at] = chance;
            });
            break;
        }
        uint64_t first = ~(uint64_t)0, last = 0;
        for_orders(m, key, [&](uint64_t order, uint32_t) {
            if (step_of(order) != step) return;
            first = least(first, order);
            last = most(last, order);
        });
        low = fold(m, first, least<uint64_t>);
        high = fold(m, last, most<uint64_t>);
        for (shift = 0; (high - low) >> shift >= KEY_STEPS;) shift++;
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < m->n_ranked; i += THREADS) {
        uint64_t own = m->ranked[i], before = kept, chances = sum;
        for (unsigned k = 0; k < m->n_ranked; k++) {
            bool is_before = m->ranked[k] > own;
            before += is_before;
            chances += is_before ? m->ranked_chances[k] : 0;
        }
        bool ends = before + 1 >= most_tokens || chances + m->ranked_chances[i] >= enough;
        if (ends && before < most_tokens && chances < enough) m->last[key] = own;
    }
    __syncthreads();
}

/* What typical_p expects of halvings. */
static __device__ inline uint32_t mean_halvings(room *m) {
    uint64_t total = 0, sum = 0;
    for_left(m, [&](int i, uint32_t chance) {
        total += chance;
        sum += (uint64_t)chance * (halvings_of(m, i) >> TYPICAL_SHIFT);
    });
    total = fold(m, total, add<uint64_t>);
    return (uint32_t)(fold(m, sum, add<uint64_t>) / total);
}

static __device__ inline void filter(room *m, const sample_row &s) {
    const uint64_t ALL = ~(uint64_t)0;
    if (s.top_k > 0 && s.top_k < m->V) {
        keep_first(m, BY_CHANCE, (uint64_t)s.top_k, ALL);
        sum_parts(m);
    }
    if (s.typical_p < 1) {
        uint32_t mean = mean_halvings(m);
        if (threadIdx.x == 0) {
            m->mean = mean;
            m->typical = true;
        }
        __syncthreads();
        keep_first(m, BY_TYPICAL, ALL, share_of(sum_left(m), s.typical_p));
        sum_parts(m);
    }
    if (s.top_p < 1) {
        keep_first(m, BY_CHANCE, ALL, share_of(sum_left(m), s.top_p));
        sum_parts(m);
    }
    if (s.min_p > 0) {
        uint32_t top = 0;
        for_left(m, [&](int, uint32_t chance) { top = most(top, chance); });
        top = fold(m, top, most<uint32_t>);
        uint64_t least = share_of(top, s.min_p) << 32;
        if (threadIdx.x == 0) m->last[BY_CHANCE] = most(m->last[BY_CHANCE], least);
        __syncthreads();
        sum_parts(m);
    }
}

/* ---- the draw ---- */

/* Of the tokens left, in their order. */
static __device__ inline int draw(room *m, uint32_t number) {
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    uint64_t all = scan_warp(m->parts[lane % WARPS]), end = __shfl_sync(~0u, all, warp);
    uint64_t place = place_in(__shfl_sync(~0u, all, WARPS - 1), number);
    uint64_t before = end - m->parts[warp];
    if (place >= before && place < end)
        for_part_left(m, [&](int i, const packed<uint32_t, W> &chance) {
            uint64_t sum = 0;
#pragma unroll
            for (int k = 0; k < W; k++) sum += chance.x[k];
            uint64_t after = before + scan_warp(sum), at = after - sum;
#pragma unroll
            for (int k = 0; k < W; k++) {
                if (place >= at && place - at < chance.x[k]) m->token = i + k;
                at += chance.x[k];
            }
            before = __shfl_sync(~0u, after, WARP - 1);
        });
    __syncthreads();
    return m->token;
}

/* ---- log-probabilities ---- */

/* log of the sum of exponentials. */
static __device__ inline double normalizer_of(room *m, const float *z, int V, float best) {
    double sum = 0;
    for_tokens<4>(z, V, [&](int, float x) { sum += expf(x - best); });
    return best + log(fold(m, sum, add<double>));
}

/* The n_top most likely, in order. */
static __device__ inline void list_top(room *m, const float *z, int V, int n_top,
                                       sample_result *r) {
    if (threadIdx.x == 0) {
        m->z = z;
        m->V = V;
        m->last[BY_LOGIT] = 0;
    }
    __syncthreads();
    keep_first(m, BY_LOGIT, (uint64_t)n_top, ~(uint64_t)0);
    uint64_t end = m->last[BY_LOGIT];
    m->n_ranked = 0;
    __syncthreads();
    for_tokens<4>(z, V, [&](int i, float x) {
        uint64_t order = order_of(logit_key(x), i);
        if (order >= end) m->ranked[atomicAdd(&m->n_ranked, 1u)] = order;
    });
    __syncthreads();
    if ((int)threadIdx.x < n_top) {
        uint64_t own = m->ranked[threadIdx.x];
        int rank = 0;
        for (int k = 0; k < n_top; k++) rank += m->ranked[k] > own;
        r->top_tokens[rank] = token_of(own);
        r->top_logprobs[rank] = (float)(z[token_of(own)] - m->normalizer);
    }
    __syncthreads();
}

/* ---- the kernel ---- */

static __device__ inline void adjust(float *z, const sample_row &s, sample_adjustment *list) {
    for (int i = (int)threadIdx.x; i < s.n_adjustments; i += THREADS) {
        sample_adjustment *a = &list[i];
        float x = a->raw = z[a->token];
        x += a->bias;
        if (a->count > 0) {
            /* In two roundings, as on the host. */
            x = x > 0 ? x / s.repetition_penalty : __fmul_rn(x, s.repetition_penalty);
            x -= s.presence_penalty;
        }
        for (int k = 0; k < a->count; k++) x -= s.frequency_penalty;
        z[a->token] = x;
    }
    __syncthreads();
}

static __global__ void __launch_bounds__(THREADS, 1) sample_kernel(sample op, uint32_t *chances) {
    room *m = shared_memory<room>();
    const sample_row &s = op.rows[blockIdx.x];
    float *z = op.logits + (int64_t)blockIdx.x * op.stride;
    sample_adjustment *list = op.adjustments + s.adjustments;
    sample_result *r = op.results + blockIdx.x;
    float best = largest(m, z, op.V, true);
    int token = best < INFINITY ? 0 : SAMPLE_NOT_FINITE;
    if (token == 0) {
        if (s.n_top >= 0) m->normalizer = normalizer_of(m, z, op.V, best);
        if (s.n_top > 0) list_top(m, z, s.vocab_size, s.n_top, r);
        if (s.n_adjustments > 0) adjust(z, s, list);
        if (s.n_adjustments > 0 || s.vocab_size < op.V) best = largest(m, z, s.vocab_size, false);
        if (best == INFINITY) token = SAMPLE_TOO_LARGE;
        if (best == -INFINITY) token = SAMPLE_NOTHING_LEFT;
    }
    if (token == 0 && s.steepness == 0) token = first_of(m, z, s.vocab_size, best);
    if (token == 0 && s.steepness > 0) {
        weigh(m, z, chances + (int64_t)blockIdx.x * op.stride, s.vocab_size, best, s.steepness);
        filter(m, s);
        token = draw(m, s.number);
    }
    if (threadIdx.x == 0) {
        r->token = token;
        if (token >= 0) r->logprob = (float)(z[token] - m->normalizer);
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < s.n_adjustments; i += THREADS)
        if (list[i].token == token) r->logprob = (float)(list[i].raw - m->normalizer);
}

/* Chances. */
CUDA_WORKSPACE(sample_workspace) {
    return align_up(sizeof(uint32_t) * (size_t)shape->n_draws * (size_t)shape->Vp);
}

CUDA_OP(sample) {
    if (op->N == 0) return;
    launch(ctx, sample_kernel, dim3((unsigned)op->N), THREADS, sizeof(room), *op,
           (uint32_t *)ctx->workspace);
}
