/* test_kernel.c with the kernels of AVX2, which widen operands of several rows to float32. */
#define PLAIN_LANES 8
#include "test_kernel.c"
