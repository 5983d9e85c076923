/* kernel.h: the bf16 product that this level has: tiles of AMX, or vectors. Calls of
 * kernel_product come between kernel_begin and kernel_end, on one thread. */
#ifndef CPU_KERNEL_H
#define CPU_KERNEL_H

#ifdef CPU_AMX
#include "kernel_amx.h"
#define kernel_begin()                       tiles_begin()
#define kernel_end()                         tiles_end()
#define kernel_product(o, rows, panels, add) kernel_tiles(o, rows, panels, add)
#else
#include "kernel_bf16.h"
#define kernel_begin()                       ((void)0)
#define kernel_end()                         ((void)0)
#define kernel_product(o, rows, panels, add) kernel_vectors(o, rows, panels, add)
#endif

#endif
