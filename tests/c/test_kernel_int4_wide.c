/* As test_kernel_int4.c, with the vectors, bands and offsets of AVX-512 VNNI. */
#define CPU_QUANT 4
#define CPU_LANES 16
#include "kernel_quant_cases.h"
