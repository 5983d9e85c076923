/* instructions.h: what the tensor cores, asynchronous copies and a few others are asked, by name. PTX ISA 7.1, for
 * compute capability 8.0 and later; in the emulation, the same in plain C++. */
#ifndef CUDA_INSTRUCTIONS_H
#define CUDA_INSTRUCTIONS_H

#include "cuda.h"

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

/* 16 bytes to shared memory, some time before the wait for their group: zeros where not `there`. */
static __device__ inline void copy_async(void *shared, const void *global, bool there) {
#ifdef GPTC_EMULATE_CUDA
    emulate_copy_async(shared, there ? global : NULL);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(there ? 16 : 0)
                 : "memory");
#endif
}
/* Ends a group of copies. */
static __device__ inline void copy_commit() {
#ifdef GPTC_EMULATE_CUDA
    emulate_copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/* Waits until this thread's copies have arrived, but for those of the last n groups. */
template <int n> static __device__ inline void copy_wait() {
#ifdef GPTC_EMULATE_CUDA
    emulate_copy_wait(n);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

#endif
