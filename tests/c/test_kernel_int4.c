/* The products of one thread with weights of 4 bits: on vectors, and on AMX tiles with plain C in the
 * place of the tile instructions (tiles.h). */
#define CPU_QUANT 4
#include "kernel_quant_cases.h"
