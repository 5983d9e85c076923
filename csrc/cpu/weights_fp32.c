/* weights_fp32.c: fp32 products read the parameters as they are. */
#include "weights.h"

size_t cpu_weights_bytes(int rows, int cols, int parts, int training) {
    (void)rows, (void)cols, (void)parts, (void)training;
    return 0;
}

CPU_OP(weights_pack) {
    (void)ctx, (void)op;
}

int cpu_strips_are_whole(const gpt_segment *s) {
    (void)s;
    return 0;
}

void cpu_pack_strip(const gpt_segment *s, const float *w, int64_t strip, int training) {
    (void)s, (void)w, (void)strip, (void)training;
}
