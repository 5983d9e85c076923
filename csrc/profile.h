/* profile.h: a table of ops that times those of another. */
#ifndef GPT_PROFILE_H
#define GPT_PROFILE_H

#include "ops.h"

/* Wraps (ops, ctx): *out_ops and *out_ctx are used in their place until profile_free. Unless `layer`,
 * the one that is computed, is NULL, the outputs of each op are checked. */
int profile_create(const gpt_ops *ops, gpt_ctx *ctx, const int *layer, const gpt_ops **out_ops,
                   gpt_ctx **out_ctx);
/* Returns the wrapped (ops, ctx). */
void profile_free(gpt_ctx *profile, const gpt_ops **ops, gpt_ctx **ctx);
/* The first number that was not finite; 0 where there is none. */
int profile_not_finite(const gpt_ctx *profile, gpt_not_finite *out);
/* The i-th kind of call seen so far, and the i-th product of the device's library; 0 past the last. */
int profile_read(const gpt_ctx *profile, int i, gpt_op_time *out);
int profile_product(const gpt_ctx *profile, int i, gpt_product_time *out);

#endif
