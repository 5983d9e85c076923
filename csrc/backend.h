/* backend.h: the table of ops of a (device, dtype). */
#ifndef GPT_BACKEND_H
#define GPT_BACKEND_H

#include "ops.h"

/* Finds the best table this machine can run; fails with a sentence when there is none. */
int backend_ops(int device, int dtype, const gpt_ops **out);

/* For tests: every table that this machine can run, and every one that this build has and the
 * machine lacks; NULL past the last. */
const gpt_ops *backend_ops_at(int i);
const gpt_ops *backend_missing_at(int i);

#endif
