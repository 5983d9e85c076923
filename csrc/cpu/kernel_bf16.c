/* kernel_bf16.c: the product of kernel.h, compiled once for all files that multiply in bf16. */
#ifdef CPU_AMX
#include "kernel_amx.h"
#else
#include "kernel_bf16.h"
#endif

void kernel_product(kernel_operands o, int rows, int panels, int add) {
#ifdef CPU_AMX
    kernel_tiles(o, rows, panels, add);
#else
    kernel_vectors(o, rows, panels, add);
#endif
}
