/* As test_kernel_int4.c, for weights of 8 bits. */
#define CPU_QUANT 8
#include "kernel_quant_cases.h"
