/* kernel.h: the bf16 product that this level has (kernel_bf16.c): tiles of AMX, or vectors. Calls of
 * kernel_product come between kernel_begin and kernel_end, on one thread. */
#ifndef CPU_KERNEL_H
#define CPU_KERNEL_H

#include "pack.h"

#ifdef CPU_AMX
#include "tiles.h"
#define kernel_begin() tiles_begin()
#define kernel_end()   tiles_end()
#else
#define kernel_begin() ((void)0)
#define kernel_end()   ((void)0)
#endif

/* Whether rows are widened to float32; panels that a call of kernel_product may span. */
enum { WIDENS = LANES == 8, GROUP = WIDENS ? 16 : 2 };

/* Rows and terms of them that are widened at once: few rows, so that all terms of a common width are multiplied in
 * one go, and no more than a fifth of the second-level cache. WIDE_STRIDE: from row to row, not a power of two. */
enum { WIDE_ROWS = 32, WIDE_TERMS = 768, WIDE_STRIDE = WIDE_TERMS + 8 };

typedef struct wide_operands {
    _Alignas(64) float a[WIDE_ROWS][WIDE_STRIDE];
} wide_operands;

/* a (rows, K): lda numbers from row to row. b: panels, `panel` numbers from one to the next. c: ldc
 * from row to row, whole panels wide. next: the panels that will be read after these, where they
 * come from memory and should be asked for meanwhile, else NULL. streamed: c is written past the
 * caches (vf_stream), where the kernel can. wide: room that the thread has for rows widened to
 * float32, where this level widens them. */
typedef struct kernel_operands {
    const bf16 *a, *b, *next;
    float *c;
    int64_t lda, panel, ldc;
    int K, streamed;
    wide_operands *wide;
} kernel_operands;

/* c (rows, 16 panels) = a b, or c += a b, for up to GROUP panels. */
#define kernel_product CPU_NAME(kernel_product)
void kernel_product(kernel_operands o, int rows, int panels, int add);

#endif
