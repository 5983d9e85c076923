/* simd.h: a vector of floats as wide as the level allows, and the few operations on it that C does
 * not spell. Arithmetic, comparison and conversion are the compiler's vector extensions, so that
 * `a * b + c` is a fused multiply-add where the level has one. */
#ifndef CPU_SIMD_H
#define CPU_SIMD_H

#include "ops.h"

#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16 };
#elif defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8 };
#elif defined(PLAIN_LANES) /* a test of the code for wider vectors, without their instructions */
enum { LANES = PLAIN_LANES };
#else
enum { LANES = 4 };
#endif

typedef float vf __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t vi __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint32_t vu __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef int8_t vc __attribute__((vector_size(LANES)));
typedef uint16_t vh __attribute__((vector_size(LANES * sizeof(uint16_t))));

/* The upper half of a float32, rounded to nearest even (the instructions of AVX-512 BF16 and AMX
 * take subnormal numbers as zero). */
typedef uint16_t bf16;

/* Asks for the line at p, which is read soon, into the second-level cache. */
static inline void ask_for(const void *p) {
    __builtin_prefetch(p, 0, 2);
}

static inline vf vf_set(float x) {
    return x - (vf){0};
}

static inline vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void vf_store(float *p, vf v) {
    memcpy(p, &v, sizeof v);
}

/* Whether `numbers` of them that begin at p are written past the caches, which would not keep them until they are
 * read, and would read the old ones first. Other threads see them once cpu_parallel returns. */
static inline int is_streamed(const void *p, int64_t numbers) {
    enum { LEAST = 1 << 18, LINE = 64 };
    return numbers >= LEAST && (uintptr_t)p % LINE == 0;
}

/* As vf_store, past the caches, to a place that is aligned for a vector. */
static inline void vf_stream(float *p, vf v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)v);
#else
    vf_store(p, v);
#endif
}

/* The first n lanes (n <= LANES); the others are zero, or left alone in memory. */
static inline vf vf_load_n(const float *p, int n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vf v = {0};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
#endif
}

static inline void vf_store_n(float *p, vf v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}

/* sum += a b in the register of `sum`: of many terms in a row, GCC 12 would move sums between registers. */
static inline void vf_add_product(vf *sum, vf a, vf b) {
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(*sum) : "x"(a), "x"(b));
#else
    *sum += a * b;
#endif
}

/* x in a register, also where instructions could read it from memory again each time. */
static inline vf vf_in_register(vf x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));
#endif
    return x;
}

static inline vf vf_select(vi mask, vf yes, vf no) {
    return (vf)(((vi)yes & mask) | ((vi)no & ~mask));
}

static inline vf vf_max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return vf_select(a > b, a, b);
#endif
}

/* table[i] of each lane, 0 <= i < 8. */
static inline vf vf_pick(const float *table, vi i) {
#if defined(__AVX512F__)
    __m512 entries = _mm512_castps256_ps512(_mm256_loadu_ps(table));
    return (vf)_mm512_permutexvar_ps((__m512i)i, entries);
#elif defined(__AVX2__)
    return (vf)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)i);
#else
    vf v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = table[i[lane]];
    return v;
#endif
}

static inline vf vf_sqrt(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

/* Sums in a fixed tree, so the result depends on nothing but the numbers and LANES. */
static inline float vf_sum(vf v) {
#if defined(__AVX512F__)
    __m256 lower = _mm512_castps512_ps256((__m512)v);
    __m256 upper = _mm512_extractf32x8_ps((__m512)v, 1);
    __m256 eight = _mm256_add_ps(lower, upper);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

/* The sums of LANES vectors, in order. */
static inline vf vf_sums(const vf *v) {
#if defined(__AVX512F__)
    __m512 x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = (__m512)v[i];
    /* Within each 128 bits: pairs of vectors, then fours; then quarters of the vectors. */
    for (int i = 0; i < LANES; i += 2)
        x[i] =
            _mm512_add_ps(_mm512_unpacklo_ps(x[i], x[i + 1]), _mm512_unpackhi_ps(x[i], x[i + 1]));
    for (int i = 0; i < LANES; i += 4) {
        __m512d a = _mm512_castps_pd(x[i]), b = _mm512_castps_pd(x[i + 2]);
        x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < LANES; i += 8)
        x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x88),
                             _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd));
    return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[8], 0x88),
                             _mm512_shuffle_f32x4(x[0], x[8], 0xdd));
#else
    vf sums;
    for (int i = 0; i < LANES; i++) sums[i] = vf_sum(v[i]);
    return sums;
#endif
}

static inline float vf_max_lane(vf v) {
#if defined(__AVX512F__)
    __m256 eight =
        _mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    return v[0];
#endif
}

/* e^x within 2 ulp, and exactly 0 below -87.3: 2^n times a polynomial on [-ln2/2, ln2/2] (the
 * coefficients are those of a degree-6 minimax fit). NaN stays NaN. */
static inline vf vf_exp(vf x) {
#if defined(__AVX512F__)
    __mmask16 zero = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
    vf top = (vf)_mm512_min_ps(_mm512_set1_ps(88.0f), (__m512)x); /* the second, where one is NaN */
    vf n = (vf)_mm512_roundscale_ps((__m512)(top * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
    vf r = top - n * 0.693359375f + n * 2.12194440e-4f;
#else
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf clamped = vf_select(x > 88.0f, vf_set(88.0f), vf_select(x < -87.3f, vf_set(-87.3f), x));
    vf n = clamped * 1.44269504f + shift;
    vi exponent = ((vi)n) << 23; /* n's low bits hold the integer */
    n -= shift;
    vf r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
#endif
    vf p = r * 1.3981999507e-3f + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + (r + 1.0f);
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_scalef_ps(~zero, (__m512)p, (__m512)n);
#else
    vf y = (vf)((vi)p + exponent);
    return vf_select(x != x, x, vf_select(x < -87.3f, vf_set(0.0f), y));
#endif
}

/* 1 / x within 2 ulp, for x from 1 to the largest float. */
static inline vf vf_reciprocal(vf x) {
#if defined(__AVX512F__)
    vf y = (vf)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

static inline vf vf_sigmoid(vf x) {
    return vf_reciprocal(1.0f + vf_exp(-x));
}

/* Within 4 ulp: Lambert's continued fraction up to 1, and 1 - 2 / (e^2x + 1) above. NaN stays NaN. */
static inline vf vf_tanh(vf x) {
    vf square = x * x, size = vf_max(x, -x);
    vf near =
        x * ((square + 105.0f) * square + 945.0f) / ((square * 15.0f + 420.0f) * square + 945.0f);
    vf far = 1.0f - 2.0f * vf_reciprocal(vf_exp(size + size) + 1.0f);
    return vf_select(size > 1.0f, vf_select(x < 0.0f, -far, far), near);
}

/* The lanes below n, n > 0, of v; `other` in the rest. */
static inline vf vf_first(vf v, int n, float other) {
#if defined(__AVX512F__)
    return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(other), (__mmask16)((1u << n) - 1), (__m512)v);
#else
    if (n == LANES) return v;
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return vf_select(lane < n, v, vf_set(other));
#endif
}

#if defined(__AVX512F__)
/* The upper 24 bits of counter_bits for 8 counters, a step of the key's multiples apart. */
static inline __m256i counter_lanes(uint64_t first, uint64_t step) {
    __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    __m512i z = _mm512_mullo_epi64(lane, _mm512_set1_epi64((long long)step));
    z = _mm512_add_epi64(z, _mm512_set1_epi64((long long)first));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)),
                           _mm512_set1_epi64((long long)0xbf58476d1ce4e5b9ull));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)),
                           _mm512_set1_epi64((long long)0x94d049bb133111ebull));
    return _mm512_cvtepi64_epi32(_mm512_srli_epi64(z, 40));
}
#endif

/* The factors that dropout multiplies elements i, i + step, … by: dropout_factor of each. */
static inline vf dropout_steps(gpt_dropout dropout, uint64_t i, uint64_t step) {
#if defined(__AVX512F__)
    uint64_t first = dropout.key + i * GPT_COUNTER_STEP, apart = step * GPT_COUNTER_STEP;
    __m512i bits = _mm512_castsi256_si512(counter_lanes(first, apart));
    bits = _mm512_inserti64x4(bits, counter_lanes(first + 8 * apart, apart), 1);
    vf u = (vf)_mm512_cvtepi32_ps(bits) * 0x1p-24f;
    return vf_select(u < dropout.p, vf_set(0), vf_set(1.0f / (1.0f - dropout.p)));
#else
    float factors[LANES];
    for (int j = 0; j < LANES; j++, i += step) factors[j] = dropout_factor(dropout, i);
    return vf_load(factors);
#endif
}

static inline vf dropout_lanes(gpt_dropout dropout, uint64_t i) {
    return dropout_steps(dropout, i, 1);
}

/* ---- bf16 ---- */

static inline float bf16_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline bf16 bf16_round(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (bf16)(bits >> 16 | 0x40);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline vf vf_from_bf16(vh x) {
#if defined(__AVX512F__) /* GCC 12 would take halves */
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#else
    return (vf)(__builtin_convertvector(x, vu) << 16);
#endif
}

static inline vh vf_to_bf16(vf x) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vu nan = (vu)(x != x);
    rounded = (rounded & ~nan) | ((bits >> 16 | 0x40) & nan);
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded); /* each half twice */
    return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(rounded, vh);
#endif
#endif
}

static inline vh vh_load_n(const bf16 *p, int n) {
#if defined(__AVX512F__)
    return (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
    vh v = {0};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
#endif
}

static inline void vh_store_n(bf16 *p, vh v, int n) {
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)v);
#else
    for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}

/* LANES bytes as integers. */
static inline vi vi_from_bytes(const int8_t *p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    vi v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}

/* Before a function that is compiled again for each set of constant arguments. With GENERAL, for
 * sanitizers, calls share one function: the same statements in a twentieth of the compiler's time. */
#ifdef GENERAL
#define SPECIALIZED static inline
#else
#define SPECIALIZED __attribute__((always_inline)) static inline
#endif

/* Before a loop of few and constant rounds, whose arrays can then live in registers. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* ---- loops over memory ---- */

/* The loop every elementwise op is made of: full vectors, then the rest with n < LANES. The body
 * sees i and n; load and store through vf_get and vf_put. */
#define FOR_LANES(i, n, size)                                                                      \
    for (int i = 0, n = LANES; i < (size) && ((n = (size) - i < LANES ? (size) - i : LANES), 1);   \
         i += LANES)

static inline vf vf_get_f32(const float *p, int n) {
    return n == LANES ? vf_load(p) : vf_load_n(p, n);
}

static inline void vf_put_f32(float *p, vf v, int n) {
    if (n == LANES)
        vf_store(p, v);
    else
        vf_store_n(p, v, n);
}

static inline vf vf_get_bf16(const bf16 *p, int n) {
    vh v;
    if (n == LANES)
        memcpy(&v, p, sizeof v);
    else
        v = vh_load_n(p, n);
    return vf_from_bf16(v);
}

static inline void vf_put_bf16(bf16 *p, vf v, int n) {
    vh h = vf_to_bf16(v);
    if (n == LANES)
        memcpy(p, &h, sizeof h);
    else
        vh_store_n(p, h, n);
}

/* One number of the table's type. */
#ifdef CPU_BF16
#define to_float(x) bf16_float(x)
#define to_elem(x)  bf16_round(x)
#else
#define to_float(x) (x)
#define to_elem(x)  (x)
#endif

/* n numbers of either type, as floats in registers. */
#define vf_get(p, n)                                                                               \
    _Generic((p), const bf16 *: vf_get_bf16, bf16 *: vf_get_bf16, default: vf_get_f32)(p, n)
#define vf_put(p, v, n) _Generic((p), bf16 *: vf_put_bf16, default: vf_put_f32)(p, v, n)

#endif
