/* As test_kernel_int8.c, with the vectors, bands and offsets of AVX-512 VNNI. */
#define CPU_QUANT 8
#define CPU_LANES 16
#include "kernel_quant_cases.h"
