/* instructions.h: what the tensor cores, asynchronous copies and a few others are asked, by name. PTX ISA 7.1, for
 * compute capability 8.0 and later, and 8.0 for Hopper's own; in the emulation, the same in plain C++. */
#ifndef CUDA_INSTRUCTIONS_H
#define CUDA_INSTRUCTIONS_H

#include "boxes.h"

#include <math.h>

/* Two bfloat16 in a register, the first in the low half. */
static __device__ inline uint32_t pair_of(float low, float high) {
#ifdef GPTC_EMULATE_CUDA
    return __float2bfloat16(low).bits | (uint32_t)__float2bfloat16(high).bits << 16;
#else
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&pair;
#endif
}

/* blockIdx.x once more: what is made of it at the end takes no registers before. */
static __device__ inline int block_index_again() {
#ifdef GPTC_EMULATE_CUDA
    return (int)blockIdx.x;
#else
    int i;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i));
    return i;
#endif
}

static constexpr float LOG2E = 1.4426950408889634f; /* e to the x is 2 to the x LOG2E */

/* 2 to the x, within two units in the last place, and 0 where that would be denormal: the one
 * instruction, of which exp2f makes four. */
static __device__ inline float exp2_of(float x) {
#ifdef GPTC_EMULATE_CUDA
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/* 1 / x and log2(x), as inaccurate: of numbers that are not denormal, or 0. */
static __device__ inline float inverse_of(float x) {
#ifdef GPTC_EMULATE_CUDA
    return 1 / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
static __device__ inline float log2_of(float x) {
#ifdef GPTC_EMULATE_CUDA
    return log2f(x);
#else
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/* d (16 x 8) += a (16 x 16) b (16 x 8), by a warp: mma.m16n8k16. Lane l has rows l / 4 and l / 4 + 8
 * of d, columns l % 4 * 2 and the next: d[0], d[1], then d[2], d[3]. */
static __device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
#ifdef GPTC_EMULATE_CUDA
    emulate_multiply_add(d, a, b0, b1);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/* Four 8 x 8 matrices from shared memory: ldmatrix. Lane l points at row l % 8 of matrix l / 8, and
 * receives of matrix i the pair at row l / 4, columns l % 4 * 2 and the next; of its transpose, in
 * the second form. */
static __device__ inline void load_matrices(uint32_t (&r)[4], const __nv_bfloat16 *row) {
#ifdef GPTC_EMULATE_CUDA
    emulate_load_matrices(r, row, false);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}
static __device__ inline void load_matrices_transposed(uint32_t (&r)[4], const __nv_bfloat16 *row) {
#ifdef GPTC_EMULATE_CUDA
    emulate_load_matrices(r, row, true);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

/* 16 bytes to shared memory, some time before the wait for them: zeros where not `there`. */
static __device__ inline void copy_async(void *shared, const void *global, bool there) {
#ifdef GPTC_EMULATE_CUDA
    emulate_copy_async(shared, there ? global : NULL, 16);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(there ? 16 : 0)
                 : "memory");
#endif
}
/* The same for one float. */
static __device__ inline void copy_async_4(float *shared, const float *global, bool there) {
#ifdef GPTC_EMULATE_CUDA
    emulate_copy_async(shared, there ? global : NULL, 4);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global),
                 "r"(there ? 4 : 0)
                 : "memory");
#endif
}
/* Waits until all of this thread's copies have arrived. */
static __device__ inline void copy_wait() {
#ifdef GPTC_EMULATE_CUDA
    emulate_copy_wait();
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

/* The 128 bytes there will be in the second-level cache some time later. */
static __device__ inline void bring_near(const void *global) {
#ifdef GPTC_EMULATE_CUDA
    (void)*(const volatile char *)global;
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

/* ---- boxes: see boxes.h ---- */

/* A barrier in shared memory, 8 bytes. Its phase ends when `count` threads have arrived, and as many bytes of
 * boxes as they expect. Phases have parity 0, 1, 0 and so on. */
static __device__ inline void barrier_init(uint64_t *barrier, int count) {
#ifdef GPTC_EMULATE_CUDA
    emulate_barrier_init(barrier, count);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
#endif
}
/* In this phase, which this thread is still to arrive at. */
static __device__ inline void barrier_expect(uint64_t *barrier, int bytes) {
#ifdef GPTC_EMULATE_CUDA
    emulate_barrier_expect(barrier, bytes);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(address),
                 "r"(bytes)
                 : "memory");
#endif
}
static __device__ inline void barrier_arrive(uint64_t *barrier) {
#ifdef GPTC_EMULATE_CUDA
    emulate_barrier_arrive(barrier);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
#endif
}
/* Waits for the end of a phase, the current one or the one before, of that parity. */
static __device__ inline void barrier_wait(uint64_t *barrier, uint32_t parity) {
#ifdef GPTC_EMULATE_CUDA
    emulate_barrier_wait(barrier, parity);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile("{ .reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again; }" ::"r"(address),
                 "r"(parity)
                 : "memory");
#endif
}
/* A box to shared memory, at a multiple of 1,024 bytes, some time before the end of the barrier's phase. */
static __device__ inline void copy_box(void *shared, const box_map *map, int col, int head, int row,
                                       int b, uint64_t *barrier) {
#ifdef GPTC_EMULATE_CUDA
    emulate_copy_box(shared, map, col, head, row, b, barrier);
#else
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    uint32_t address = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(map), "r"(col), "r"(head), "r"(row), "r"(b), "r"(address)
                 : "memory");
#endif
}

/* ---- products of a warpgroup, which is four warps: wgmma, on Hopper alone ---- */

/* Whether this compilation has them. For other targets their kernels are empty. */
#if defined(GPTC_EMULATE_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
static constexpr bool HAS_WGMMA = true;
#else
static constexpr bool HAS_WGMMA = false;
#endif

/* Descriptor of a matrix in shared memory: rows of 64 numbers (128 bytes), of which each eight, at
 * a multiple of 1,024 bytes, have their 16-byte chunks in the order chunk ^ row. Where numbers that follow
 * each other are not multiplied with each other (transposed), columns from 64 on are `panel` bytes later. */
static __device__ inline uint64_t matrix_of(const __nv_bfloat16 *at, int panel) {
#ifdef GPTC_EMULATE_CUDA
    uint32_t address = (uint32_t)((const char *)at - shared_memory<char>());
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(at);
#endif
    const uint64_t EIGHT_ROWS = 1024, SWIZZLE_128 = 1;
    return (address & 0x3ffff) >> 4 | (uint64_t)panel >> 4 << 16 | EIGHT_ROWS >> 4 << 32 |
           SWIZZLE_128 << 62;
}

/* Before the first product on registers that ordinary instructions have written. */
static __device__ inline void group_begin() {
#ifndef GPTC_EMULATE_CUDA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
/* Makes the registers of a left side before that. */
static __device__ inline void group_pin(uint32_t (&a)[4]) {
#ifdef GPTC_EMULATE_CUDA
    (void)a;
#else
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
#endif
}
/* Ends a group of products. */
static __device__ inline void group_commit() {
#ifdef GPTC_EMULATE_CUDA
    emulate_group_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/* Waits until all but the last n groups are done; x is what they made. */
template <int n, int N> static __device__ inline void group_wait(float (&x)[N][4]) {
#ifdef GPTC_EMULATE_CUDA
    emulate_group_wait(n);
    (void)x;
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) /* nothing that reads x may move above */
        asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
#endif
}

/* Before tensor cores read what this thread has put into shared memory, and the barrier between. */
static __device__ inline void group_publish() {
#ifdef GPTC_EMULATE_CUDA
    emulate_group_publish();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#define ROW_OF_4(i)  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define ROWS_OF_4(i) ROW_OF_4(i), ROW_OF_4(i + 1), ROW_OF_4(i + 2), ROW_OF_4(i + 3)
#define REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "             \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "             \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "             \
    "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "             \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* d (64 x 8 N) = or += a (64 x 16) b (16 x 8 N), where a's rows and b's columns are rows of matrices.
 * Of d each warp has 16 rows, as in multiply_add. It happens some time before the wait for its group,
 * and until then nobody may touch registers and matrices. */
template <int N>
static __device__ inline void group_multiply(float (&d)[N][4], uint64_t a, uint64_t b, bool add) {
#ifdef GPTC_EMULATE_CUDA
    emulate_group_multiply(&d[0][0], N, NULL, a, b, false, add);
#else
#define MULTIPLY(n, REGISTERS, A, B, ADD, ...)                                                     \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ADD ", 0;\n"                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" REGISTERS "}, %" #A  \
                 ", %" #B ", p, 1, 1, 0, 0; }"                                                     \
                 : __VA_ARGS__                                                                     \
                 : "l"(a), "l"(b), "r"((int)add))
    static_assert(N == 4 || N == 8 || N == 16);
    if constexpr (N == 4)
        MULTIPLY(32, REGISTERS_16, 16, 17, 18, ROWS_OF_4(0));
    else if constexpr (N == 8)
        MULTIPLY(64, REGISTERS_32, 32, 33, 34, ROWS_OF_4(0), ROWS_OF_4(4));
    else
        MULTIPLY(128, REGISTERS_64, 64, 65, 66, ROWS_OF_4(0), ROWS_OF_4(4), ROWS_OF_4(8),
                 ROWS_OF_4(12));
#undef MULTIPLY
#endif
}

/* d (64 x 8 N) += a (64 x 16) b (16 x 8 N), where a is in registers, and b's rows are the matrix's. */
template <int N>
static __device__ inline void group_multiply_transposed(float (&d)[N][4], const uint32_t (&a)[4],
                                                        uint64_t b) {
#ifdef GPTC_EMULATE_CUDA
    emulate_group_multiply(&d[0][0], N, a, 0, b, true, true);
#else
#define MULTIPLY(n, REGISTERS, A0, A1, A2, A3, B, ...)                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" REGISTERS            \
                 "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, 1;"               \
                 : __VA_ARGS__                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    static_assert(N == 8 || N == 16);
    if constexpr (N == 8)
        MULTIPLY(64, REGISTERS_32, 32, 33, 34, 35, 36, ROWS_OF_4(0), ROWS_OF_4(4));
    else
        MULTIPLY(128, REGISTERS_64, 64, 65, 66, 67, 68, ROWS_OF_4(0), ROWS_OF_4(4), ROWS_OF_4(8),
                 ROWS_OF_4(12));
#undef MULTIPLY
#endif
}

#endif
