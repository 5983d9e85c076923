/* finite.h: the outputs of each op, and numbers among them that are not finite. */
#ifndef GPT_FINITE_H
#define GPT_FINITE_H

#include "ops.h"

/* An output of an op: n numbers in the device's memory. */
typedef struct output {
    const char *name; /* of the op's field; NULL behind the last */
    const void *data; /* NULL: this call has none */
    int64_t n;
    int is_act; /* else float32 */
} output;

enum { MAX_OUTPUTS = 6 }; /* with the one behind the last */

/* The outputs of a call. Those that follow from checked ones, such as updated weights, are left out. */
#define FINITE_DECLARE(name) void outputs_of_##name(const struct name *op, output *out);
GPT_OPS(FINITE_DECLARE)
#undef FINITE_DECLARE

/* The first number of an output that is not finite; 0 where there is none. */
int finite_find(const gpt_ops *ops, gpt_ctx *ctx, const output *out, int64_t *index, float *value);

#endif
