/* weights.h: packing a weight matrix strip by strip, so that an optimizer can do it in passing. */
#ifndef CPU_WEIGHTS_H
#define CPU_WEIGHTS_H

#include "cpu.h"

#define cpu_strips_are_whole CPU_NAME(strips_are_whole)
#define cpu_pack_strip       CPU_NAME(pack_strip)

/* Rows of a strip: in bf16 one panel of the forward form, eight pairs of the backward form. */
enum { STRIP = 16 };

/* Whether the segment is packed, and divides into strips. */
int cpu_strips_are_whole(const gpt_segment *s);
/* Packs one strip of w, the segment's float32 numbers. */
void cpu_pack_strip(const gpt_segment *s, const float *w, int64_t strip, int training);

#endif
