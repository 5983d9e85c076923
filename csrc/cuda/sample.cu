/* sample.cu: draws from each row of logits, of which each piece of DRAW_PIECE tokens has a block. Three
 * kernels find the largest logit of a row, then its tokens' chances, then a token: what pieces have found is
 * joined by the next kernel, or by the last block of a row to end, always as integers or in the order of
 * pieces. A piece is the same whatever the number of rows.
 *
 * Tokens are not sorted: a filter ends at one of them, and keeps those up to it. Pieces find the end of a
 * row's first filter, if that is top_k or top_p; the last block finds those of others by `keep_first`, and
 * lists the likeliest tokens. The arithmetic is that of sample.h, so that the tokens are the CPU's. */
#include "cuda.h"

#include "sample.h"

/* Half of what a block may have: the other half's registers keep a pass in flight. */
#ifndef SAMPLE_THREADS
#define SAMPLE_THREADS 512
#endif
enum { DRAW_THREADS = SAMPLE_THREADS, DRAW_WARPS = DRAW_THREADS / WARP };
/* Neighbours that a thread reads as one: rows are that far apart, or a multiple of it. And how many of
 * those a thread has of a piece. */
static constexpr int W = 4, OWN = 2, DRAW_PIECE = DRAW_THREADS * OWN * W;
/* Tokens of a step that are ranked one by one; where there are more, the step is taken apart. */
#ifndef RANKED
#define RANKED 1024
#endif

/* What tokens are ordered by. */
enum key { BY_LOGIT, BY_CHANCE, BY_TYPICAL, KEYS };

/* What a piece of a row has. */
struct piece {
    uint64_t raw, top; /* the largest order of a logit, before and after adjustments; 0: no token */
    double sum;        /* of exponentials, before adjustments, by the largest */
    uint64_t chances;  /* of the tokens left */
};

/* What all pieces of a row have found for its first filter, while they find it. */
struct tally {
    uint64_t sums[KEY_STEPS]; /* of chances */
    unsigned counts[KEY_STEPS];
    unsigned weighed, gathered; /* pieces that are done with either */
    unsigned n_ranked;
    int step; /* where the filter ends, or one of the two below */
    uint64_t kept, sum, enough;
    uint64_t ranked[RANKED]; /* orders of that step */
};
enum { KEEPS_ALL = -1, TOO_MANY = -2 /* tokens in that step */ };

/* The block's shared memory. */
struct room {
    /* the tokens, and which of them are left */
    const float *z;
    uint32_t *chances;
    piece *pieces;
    int V;
    float best, steepness;
    uint64_t last[KEYS]; /* the last order that filters by a key keep */
    uint32_t mean;       /* of halvings, for typical_p */
    /* where the filter at work ends */
    unsigned counts[KEY_STEPS], sums[KEY_STEPS][2]; /* of chances: the lower half, the upper one */
    int step;                                       /* -1: it keeps all */
    uint64_t kept, sum;                             /* above that step */
    uint64_t ranked[RANKED];
    unsigned ranked_chances[RANKED], n_ranked;

    uint64_t slots[DRAW_WARPS];
    double normalizer; /* log of the sum of exponentials of all logits */
    bool is_last;      /* block of the row to end */
    int place_piece;   /* of the token that is drawn */
    uint64_t place;    /* in that piece */
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
    x = fold_warp<DRAW_WARPS>(slots[threadIdx.x % DRAW_WARPS], f);
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
    uint64_t warps = scan_warp(m->slots[lane % DRAW_WARPS]);
    uint64_t before = __shfl_sync(~0u, warps, warp > 0 ? warp - 1 : 0);
    __syncthreads();
    return warp > 0 ? before + x : x;
}

/* Whether this is the last of n blocks to come here, which then sees what the others have written. */
static __device__ inline bool is_last(room *m, unsigned *arrived, unsigned n) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) m->is_last = atomicAdd(arrived, 1u) + 1 == n;
    __syncthreads();
    __threadfence();
    return m->is_last;
}

/* f(i, x[i]) for each i below V. */
template <int UNROLL, typename T, typename F>
static __device__ inline void for_tokens(const T *x, int V, F f) {
#pragma unroll UNROLL
    for (int i = (int)threadIdx.x * W; i < V / W * W; i += DRAW_THREADS * W) {
        packed<T, W> own = *(const packed<T, W> *)(x + i);
#pragma unroll
        for (int k = 0; k < W; k++) f(i + k, own.x[k]);
    }
    int i = V / W * W + (int)threadIdx.x;
    if (i < V) f(i, x[i]);
}

/* f(i, x[i] and its W - 1 neighbours) for those of a piece that this thread has; the last ones may be
 * behind its end. */
template <typename T, typename F>
static __device__ inline void for_piece(const T *x, int begin, int end, F f) {
#pragma unroll
    for (int u = 0; u < OWN; u++) {
        int i = begin + (u * DRAW_THREADS + (int)threadIdx.x) * W;
        if (i < end) f(i, *(const packed<T, W> *)(x + i));
    }
}

static __host__ __device__ inline int pieces_of(int V) {
    return (int)div_up(V, DRAW_PIECE);
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

static __device__ inline float logit_of(uint64_t order) {
    uint32_t key = (uint32_t)(order >> 32), bits = key >> 31 ? key & 0x7fffffffu : ~key;
    float z;
    memcpy(&z, &bits, sizeof z);
    return z;
}

/* The largest order of logits from `begin` to `end`, the first token with the largest one: INFINITY for one
 * that is too large or not a number, or with `finite` too small. */
static __device__ inline uint64_t largest(room *m, const float *z, int begin, int end,
                                          bool finite) {
    uint64_t top = 0;
    for_piece(z, begin, end, [&](int i, const packed<float, W> &own) {
#pragma unroll
        for (int k = 0; k < W; k++) {
            float x = own.x[k];
            bool sound = x < INFINITY && !(finite && x == -INFINITY);
            if (i + k < end) top = most(top, order_of(logit_key(sound ? x : INFINITY), i + k));
        }
    });
    return fold(m, top, most<uint64_t>);
}

/* ---- the tokens that filters keep ---- */

/* All that have a chance. */
static __device__ inline void begin_filters(room *m, const float *z, uint32_t *chances,
                                            piece *pieces, int V, float best, float steepness) {
    if (threadIdx.x == 0) {
        m->z = z;
        m->chances = chances;
        m->pieces = pieces;
        m->V = V;
        m->best = best;
        m->steepness = steepness;
        m->last[BY_CHANCE] = order_of(1, V);
        m->last[BY_TYPICAL] = 0;
    }
    __syncthreads();
}

static __device__ inline uint32_t halvings_of(const room *m, int i) {
    return halvings(m->z[i], m->best, m->steepness);
}

static __device__ inline uint64_t typical_order(const room *m, int i) {
    return order_of(typical_key(halvings_of(m, i), m->mean), i);
}

/* What a pass asks of every token, in registers: in shared memory it would be read again for each. */
struct left {
    uint64_t last;

    __device__ left(const room *m) : last(m->last[BY_CHANCE]) {}
    __device__ bool has(int i, uint32_t chance) const { return order_of(chance, i) >= last; }
};

/* f(token, chance) for each that is left. */
template <int UNROLL = 3, typename F> static __device__ inline void for_left(const room *m, F f) {
    left left(m);
    for_tokens<UNROLL>(m->chances, m->V, [&](int i, uint32_t chance) {
        if (left.has(i, chance)) f(i, chance);
    });
}

/* f(order, chance) for each that is left; by their logits, of all tokens. */
template <int UNROLL = 3, typename F>
static __device__ inline void for_orders(const room *m, enum key key, F f) {
    if (key == BY_LOGIT)
        for_tokens<1>(m->z, m->V, [&](int i, float x) { f(order_of(logit_key(x), i), 0u); });
    else
        for_left<UNROLL>(m, [&](int i, uint32_t chance) {
            f(key == BY_CHANCE ? order_of(chance, i) : typical_order(m, i), chance);
        });
}

/* After a filter: what each piece has left, a warp a piece. */
static __device__ inline void sum_pieces(room *m) {
    left left(m);
    int lane = (int)threadIdx.x % WARP;
    for (int p = (int)threadIdx.x / WARP; p < pieces_of(m->V); p += DRAW_WARPS) {
        int end = least((p + 1) * DRAW_PIECE, m->V);
        uint64_t sum = 0;
#pragma unroll 4
        for (int i = p * DRAW_PIECE + lane * W; i < end; i += WARP * W) {
            packed<uint32_t, W> own = *(const packed<uint32_t, W> *)(m->chances + i);
#pragma unroll
            for (int k = 0; k < W; k++)
                if (i + k < end && left.has(i + k, own.x[k])) sum += own.x[k];
        }
        sum = fold_warp(sum, add<uint64_t>);
        if (lane == 0) m->pieces[p].chances = sum;
    }
    __syncthreads();
}

static __device__ inline uint64_t sum_left(room *m, const piece *pieces, int V) {
    uint64_t sum = 0;
    for (int p = (int)threadIdx.x; p < pieces_of(V); p += DRAW_THREADS) sum += pieces[p].chances;
    return fold(m, sum, add<uint64_t>);
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
    const int OWN = (int)div_up(KEY_STEPS, DRAW_THREADS);
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

static __device__ inline void clear_counts(room *m) {
    for (int k = (int)threadIdx.x; k < KEY_STEPS; k += DRAW_THREADS)
        m->counts[k] = m->sums[k][0] = m->sums[k][1] = 0;
    m->n_ranked = 0;
    __syncthreads();
}

/* Finds the end of a filter among the tokens that are ranked, above which are `kept` with chances of
 * `sum`. */
static __device__ inline void rank(room *m, enum key key, uint64_t kept, uint64_t sum,
                                   uint64_t most_tokens, uint64_t enough) {
    for (unsigned i = threadIdx.x; i < m->n_ranked; i += DRAW_THREADS) {
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

/* Keeps the first tokens by falling order: so many of them, or as few as have chances of `enough`. */
static __device__ inline void keep_first(room *m, enum key key, uint64_t most_tokens,
                                         uint64_t enough) {
    uint64_t low = 0, high = ~(uint64_t)0, kept = 0, sum = 0;
    for (int shift = -1;;) {
        auto step_of = [&](uint64_t order) {
            if (order < low || order > high) return -1;
            return shift < 0 ? key_step((uint32_t)(order >> 32)) : (int)((order - low) >> shift);
        };
        clear_counts(m);
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
        for_orders<1>(m, key, [&](uint64_t order, uint32_t) {
            if (step_of(order) != step) return;
            first = least(first, order);
            last = most(last, order);
        });
        low = fold(m, first, least<uint64_t>);
        high = fold(m, last, most<uint64_t>);
        for (shift = 0; (high - low) >> shift >= KEY_STEPS;) shift++;
    }
    __syncthreads();
    rank(m, key, kept, sum, most_tokens, enough);
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

/* Those that typical_p does not keep lose their chance, so that no later pass asks for it. */
static __device__ inline void drop_atypical(room *m) {
    for_tokens<1>(m->chances, m->V, [&](int i, uint32_t chance) {
        if (chance > 0 && typical_order(m, i) < m->last[BY_TYPICAL]) m->chances[i] = 0;
    });
    __syncthreads();
}

/* ---- filters ---- */

static const uint64_t ALL = ~(uint64_t)0;

static __device__ inline bool has_top_k(const sample_row &s) {
    return s.top_k > 0 && s.top_k < s.vocab_size;
}
static __device__ inline bool begins_with_top_p(const sample_row &s) {
    return !has_top_k(s) && s.typical_p >= 1 && s.top_p < 1;
}
/* Whether pieces find where the first filter ends. */
static __device__ inline bool begins_in_pieces(const sample_row &s) {
    return has_top_k(s) || begins_with_top_p(s);
}

/* The filters that keep the first tokens of an order. */
enum by_order { TOP_K, TYPICAL_P, TOP_P, BY_ORDER };

static __device__ inline bool is_asked(const sample_row &s, int by, bool has_first) {
    if (by == TOP_K) return has_top_k(s) && !has_first;
    if (by == TYPICAL_P) return s.typical_p < 1;
    return s.top_p < 1 && !(begins_with_top_p(s) && has_first);
}

/* All filters, or those after the first. */
static __device__ inline void filter(room *m, const sample_row &s, bool has_first) {
#pragma unroll 1 /* keep_first is long, and compiled once for all */
    for (int by = TOP_K; by < BY_ORDER; by++) {
        if (!is_asked(s, by, has_first)) continue;
        if (by == TYPICAL_P) {
            uint32_t mean = mean_halvings(m);
            if (threadIdx.x == 0) m->mean = mean;
            __syncthreads();
        }
        uint64_t tokens = by == TOP_K ? (uint64_t)s.top_k : ALL, enough = ALL;
        if (by != TOP_K)
            enough =
                share_of(sum_left(m, m->pieces, m->V), by == TYPICAL_P ? s.typical_p : s.top_p);
        keep_first(m, by == TYPICAL_P ? BY_TYPICAL : BY_CHANCE, tokens, enough);
        if (by == TYPICAL_P) drop_atypical(m);
        sum_pieces(m);
    }
    if (s.min_p > 0) {
        uint32_t top = 0;
        for_left(m, [&](int, uint32_t chance) { top = most(top, chance); });
        top = fold(m, top, most<uint32_t>);
        uint64_t least = share_of(top, s.min_p) << 32;
        if (threadIdx.x == 0) m->last[BY_CHANCE] = most(m->last[BY_CHANCE], least);
        __syncthreads();
        sum_pieces(m);
    }
}

/* By a row's last piece: the step in which its first filter ends. */
static __device__ inline void end_tally(room *m, tally *t, const piece *pieces,
                                        const sample_row &s) {
    uint64_t most_tokens = has_top_k(s) ? (uint64_t)s.top_k : ALL, enough = ALL;
    if (!has_top_k(s)) enough = share_of(sum_left(m, pieces, s.vocab_size), s.top_p);
    for (int k = (int)threadIdx.x; k < KEY_STEPS; k += DRAW_THREADS) {
        m->counts[k] = t->counts[k];
        m->sums[k][0] = (unsigned)t->sums[k];
        m->sums[k][1] = (unsigned)(t->sums[k] >> 32);
    }
    __syncthreads();
    find_step(m, 0, 0, most_tokens, enough);
    if (threadIdx.x > 0) return;
    t->step = m->step < 0 ? KEEPS_ALL : m->counts[m->step] > RANKED ? TOO_MANY : m->step;
    t->kept = m->kept;
    t->sum = m->sum;
    t->enough = enough;
}

/* By each piece: its tokens of that step, and the chances of those above it. */
static __device__ inline void gather(room *m, tally *t, piece *own, const uint32_t *chances,
                                     int begin, int end) {
    uint64_t above = 0;
    int last = t->step;
    for_piece(chances, begin, end, [&](int i, const packed<uint32_t, W> &chance) {
#pragma unroll
        for (int k = 0; k < W; k++) {
            if (i + k >= end) continue;
            int step = key_step(chance.x[k]);
            if (step > last) above += chance.x[k];
            if (step == last) t->ranked[atomicAdd(&t->n_ranked, 1u)] = order_of(chance.x[k], i + k);
        }
    });
    above = fold(m, above, add<uint64_t>);
    if (threadIdx.x == 0) own->chances = above;
}

/* By a row's last piece: which of them are kept. */
static __device__ inline void end_gather(room *m, const tally *t, const sample_row &s) {
    for (unsigned i = threadIdx.x; i < t->n_ranked; i += DRAW_THREADS) {
        m->ranked[i] = t->ranked[i];
        m->ranked_chances[i] = (unsigned)(t->ranked[i] >> 32);
    }
    if (threadIdx.x == 0) m->n_ranked = t->n_ranked;
    __syncthreads();
    rank(m, BY_CHANCE, t->kept, t->sum, has_top_k(s) ? (uint64_t)s.top_k : ALL, t->enough);
    for (unsigned i = threadIdx.x; i < m->n_ranked; i += DRAW_THREADS) {
        if (m->ranked[i] < m->last[BY_CHANCE]) continue;
        piece *p = m->pieces + token_of(m->ranked[i]) / DRAW_PIECE;
        atomicAdd((unsigned long long *)&p->chances, (unsigned long long)m->ranked_chances[i]);
    }
    __syncthreads();
}

/* ---- the draw ---- */

/* Finds the piece, and the place in it. */
static __device__ inline void find_piece(room *m, uint32_t number) {
    uint64_t place = place_in(sum_left(m, m->pieces, m->V), number), before = 0;
    int n = pieces_of(m->V);
    for (int first = 0; first < n; first += DRAW_THREADS) {
        int p = first + (int)threadIdx.x;
        uint64_t own = p < n ? m->pieces[p].chances : 0, end = before + scan(m, own);
        if (place >= end - own && place < end) {
            m->place_piece = p;
            m->place = place - (end - own);
        }
        before = fold(m, end, most<uint64_t>);
    }
    __syncthreads();
}

/* Of the tokens left, in their order. */
static __device__ inline int draw(room *m, uint32_t number) {
    find_piece(m, number);
    left left(m);
    int first = m->place_piece * DRAW_PIECE + (int)threadIdx.x * OWN * W;
    uint32_t own[OWN * W] = {};
    uint64_t sum = 0, place = m->place;
#pragma unroll
    for (int u = 0; u < OWN * W; u += W) {
        if (first + u >= m->V) continue;
        packed<uint32_t, W> chance = *(const packed<uint32_t, W> *)(m->chances + first + u);
#pragma unroll
        for (int k = 0; k < W; k++) {
            int i = first + u + k;
            if (i < m->V && left.has(i, chance.x[k])) own[u + k] = chance.x[k];
            sum += own[u + k];
        }
    }
    uint64_t at = scan(m, sum) - sum;
#pragma unroll
    for (int k = 0; k < OWN * W; k++) {
        if (place >= at && place - at < own[k]) m->token = first + k;
        at += own[k];
    }
    __syncthreads();
    return m->token;
}

/* ---- log-probabilities ---- */

/* A piece's sum of exponentials. */
static __device__ inline double exponentials(room *m, const float *z, int begin, int end,
                                             float best) {
    double sum = 0;
    for_piece(z, begin, end, [&](int i, const packed<float, W> &own) {
#pragma unroll
        for (int k = 0; k < W; k++)
            if (i + k < end) sum += expf(own.x[k] - best);
    });
    return fold(m, sum, add<double>);
}

/* log of the row's. */
static __device__ inline double normalizer_of(room *m, const piece *pieces, int n, float best) {
    double sum = 0;
    for (int p = (int)threadIdx.x; p < n; p += DRAW_THREADS)
        sum += pieces[p].sum * exp((double)logit_of(pieces[p].raw) - best);
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

/* ---- the kernels ---- */

struct sample_args {
    sample op;
    uint32_t *chances; /* (N, stride) */
    piece *pieces;     /* (N, n_pieces) */
    tally *tallies;    /* (N) */
    int n_pieces;
};

/* A block's row and piece. */
struct sample_place {
    const sample_row &s;
    float *z;
    uint32_t *chances;
    piece *pieces;
    tally *t;
    sample_adjustment *list;
    int row, own, begin;

    __device__ sample_place(const sample_args &a, int row)
        : s(a.op.rows[row]), z(a.op.logits + (int64_t)row * a.op.stride),
          chances(a.chances + (int64_t)row * a.op.stride),
          pieces(a.pieces + (int64_t)row * a.n_pieces), t(a.tallies + row),
          list(a.op.adjustments + s.adjustments), row(row), own((int)blockIdx.x - row * a.n_pieces),
          begin(own * DRAW_PIECE) {}
    __device__ explicit sample_place(const sample_args &a)
        : sample_place(a, (int)blockIdx.x / a.n_pieces) {}
    __device__ int end(int V) const { return least(begin + (int)DRAW_PIECE, V); }
};

static __device__ inline void adjust(const sample_place &at, int end) {
    const sample_row &s = at.s;
    for (int i = (int)threadIdx.x; i < s.n_adjustments; i += DRAW_THREADS) {
        sample_adjustment *a = &at.list[i];
        if (a->token < at.begin || a->token >= end) continue;
        float x = a->raw = at.z[a->token];
        x += a->bias;
        if (a->count > 0) {
            /* In two roundings, as on the host. */
            x = x > 0 ? x / s.repetition_penalty : __fmul_rn(x, s.repetition_penalty);
            x -= s.presence_penalty;
        }
        for (int k = 0; k < a->count; k++) x -= s.frequency_penalty;
        at.z[a->token] = x;
    }
    __syncthreads();
}

/* The largest logits, and an empty tally. */
static __global__ void __launch_bounds__(DRAW_THREADS, 2) sample_largest_kernel(sample_args a) {
    room *m = shared_memory<room>();
    take_turn();
    sample_place at(a);
    const sample_row &s = at.s;
    int all = at.end(a.op.V), end = at.end(s.vocab_size);
    piece own = {};
    own.raw = own.top = largest(m, at.z, at.begin, all, true);
    if (s.n_top >= 0) own.sum = exponentials(m, at.z, at.begin, all, logit_of(own.raw));
    if (s.n_adjustments > 0) adjust(at, all);
    if (s.n_adjustments > 0 || end < all) own.top = largest(m, at.z, at.begin, end, false);
    if (threadIdx.x == 0) at.pieces[at.own] = own;
    if (at.own == 0 && threadIdx.x == 0) at.t->weighed = at.t->gathered = at.t->n_ranked = 0;
    if (!begins_in_pieces(s)) return;
    for (int k = at.own * DRAW_THREADS + (int)threadIdx.x; k < KEY_STEPS;
         k += a.n_pieces * DRAW_THREADS)
        at.t->counts[k] = 0, at.t->sums[k] = 0;
}

/* The row's, of which the first is in `order`; 0, or why nothing can be drawn. */
static __device__ inline int join_largest(room *m, const piece *pieces, int n, float *raw,
                                          uint64_t *order) {
    uint64_t before = 0, after = 0;
    for (int p = (int)threadIdx.x; p < n; p += DRAW_THREADS) {
        before = most(before, pieces[p].raw);
        after = most(after, pieces[p].top);
    }
    *raw = logit_of(fold(m, before, most<uint64_t>));
    *order = fold(m, after, most<uint64_t>);
    float best = logit_of(*order);
    if (*raw == INFINITY) return SAMPLE_NOT_FINITE;
    return best == INFINITY ? SAMPLE_TOO_LARGE : best == -INFINITY ? SAMPLE_NOTHING_LEFT : 0;
}

/* The chances of all tokens, and where a filter by chance ends. */
static __global__ void __launch_bounds__(DRAW_THREADS, 2) sample_weigh_kernel(sample_args a) {
    room *m = shared_memory<room>();
    take_turn();
    sample_place at(a);
    const sample_row &s = at.s;
    float raw;
    uint64_t order;
    if (join_largest(m, at.pieces, a.n_pieces, &raw, &order) || s.steepness == 0) return;
    bool counts = begins_in_pieces(s);
    if (counts) clear_counts(m);
    float best = logit_of(order);
    uint64_t sum = 0;
    int end = at.end(s.vocab_size);
    for_piece(at.z, at.begin, end, [&](int i, const packed<float, W> &own) {
        packed<uint32_t, W> chance = {};
#pragma unroll
        for (int k = 0; k < W; k++) {
            if (i + k < end) chance.x[k] = chance_after(halvings(own.x[k], best, s.steepness));
            if (counts && chance.x[k] > 0) count(m, key_step(chance.x[k]), chance.x[k]);
            sum += chance.x[k];
        }
        *(packed<uint32_t, W> *)(at.chances + i) = chance;
    });
    sum = fold(m, sum, add<uint64_t>);
    if (threadIdx.x == 0) at.pieces[at.own].chances = sum;
    if (!counts) return;
    for (int k = (int)threadIdx.x; k < KEY_STEPS; k += DRAW_THREADS)
        if (m->counts[k]) {
            atomicAdd(&at.t->counts[k], m->counts[k]);
            atomicAdd((unsigned long long *)&at.t->sums[k], (unsigned long long)sum_at(m, k));
        }
    if (is_last(m, &at.t->weighed, (unsigned)a.n_pieces)) end_tally(m, at.t, at.pieces, s);
}

/* A token, by one block of the row, which for that waits for what others gather. */
static __global__ void __launch_bounds__(DRAW_THREADS, 2) sample_draw_kernel(sample_args a) {
    room *m = shared_memory<room>();
    take_turn();
    sample_place at(a);
    const sample_row &s = at.s;
    if (at.own > 0 && (s.steepness == 0 || !begins_in_pieces(s))) return;
    float raw;
    uint64_t order;
    int token = join_largest(m, at.pieces, a.n_pieces, &raw, &order), n_own = s.n_adjustments;
    bool draws = token == 0 && s.steepness > 0, in_pieces = draws && begins_in_pieces(s);
    if (in_pieces && at.t->step >= 0) {
        gather(m, at.t, at.pieces + at.own, at.chances, at.begin, at.end(s.vocab_size));
        if (!is_last(m, &at.t->gathered, (unsigned)a.n_pieces)) return;
    } else if (at.own > 0) {
        return;
    }
    if (token == 0) token = token_of(order);
    if (draws) {
        begin_filters(m, at.z, at.chances, at.pieces, s.vocab_size, logit_of(order), s.steepness);
        if (in_pieces && at.t->step >= 0) end_gather(m, at.t, s);
        filter(m, s, in_pieces && at.t->step != TOO_MANY);
        token = draw(m, s.number);
    }
    /* By the logits before adjustments. */
    for (int i = (int)threadIdx.x; i < n_own; i += DRAW_THREADS)
        at.z[at.list[i].token] = at.list[i].raw;
    sample_result *r = a.op.results + at.row;
    if (s.n_top >= 0 && raw < INFINITY) {
        m->normalizer = normalizer_of(m, at.pieces, a.n_pieces, raw);
        __syncthreads();
        if (s.n_top > 0) list_top(m, at.z, s.vocab_size, s.n_top, r);
    }
    if (threadIdx.x > 0) return;
    r->token = token;
    if (token >= 0) r->logprob = (float)(at.z[token] - m->normalizer);
}

/* ---- the op ---- */

/* Lays them out from `base` on, and returns their bytes. */
static size_t lay_out(sample_args *a, char *base, int N, int V, int stride) {
    a->n_pieces = pieces_of(V);
    size_t chances = align_up(sizeof(uint32_t) * (size_t)N * (size_t)stride);
    size_t pieces = align_up(sizeof(piece) * (size_t)N * (size_t)a->n_pieces);
    a->chances = (uint32_t *)base;
    a->pieces = (piece *)(base + chances);
    a->tallies = (tally *)(base + chances + pieces);
    return chances + pieces + align_up(sizeof(tally) * (size_t)N);
}

CUDA_WORKSPACE(sample_workspace) {
    sample_args a;
    return lay_out(&a, NULL, shape->n_draws, shape->V, shape->Vp);
}

CUDA_OP(sample) {
    if (op->N == 0) return;
    sample_args a;
    a.op = *op;
    lay_out(&a, (char *)ctx->workspace, op->N, op->V, op->stride);
    dim3 blocks((unsigned)(op->N * a.n_pieces));
    launch_early(ctx, sample_largest_kernel, blocks, DRAW_THREADS, sizeof(room), a);
    launch_early(ctx, sample_weigh_kernel, blocks, DRAW_THREADS, sizeof(room), a);
    launch_early(ctx, sample_draw_kernel, blocks, DRAW_THREADS, sizeof(room), a);
}
