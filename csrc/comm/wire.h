/* wire.h: the forms in which numbers travel that are added, enum gpt_wire.
 *
 * A shorter form is rounded, and what rounding has left out is added to the next numbers: error feedback
 * (Seide et al. 2014; with a rounded sum too, Tang et al. 2019). */
#ifndef GPT_WIRE_H
#define GPT_WIRE_H

#include <stdint.h>

/* Numbers that share a scale in 8 bits. Messages begin with such a block. */
enum { WIRE_BLOCK = 256 };

/* Of n numbers. */
int64_t wire_bytes(int wire, int64_t n);
/* out = x + residual (n), rounded; residual = what that leaves out. A number that is not finite arrives
 * as one, and leaves its residual, in 8 bits those of its block. Not for fp32. */
void wire_encode(int wire, void *out, const float *x, float *residual, int64_t n);
/* Numbers first to first + size of n that were encoded; first is a multiple of WIRE_BLOCK. */
void wire_decode(int wire, float *out, const void *in, int64_t n, int64_t first, int64_t size);

#endif
