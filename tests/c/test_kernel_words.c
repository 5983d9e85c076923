/* test_kernel_quant.c with the kernels that a CPU without x86's instructions has: 4 lanes, and activations as 16-bit
 * numbers. */
#define PLAIN_LANES     4
#define ONLY_IN_PLAIN_C "4 lanes in plain C"
#include "test_kernel_quant.c"
