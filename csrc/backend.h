/* backend.h: which table of ops serves a (device, dtype). */
#ifndef GPT_BACKEND_H
#define GPT_BACKEND_H

#include "ops.h"

/* Finds the best table this machine can run; fails with a sentence when there is none. */
int backend_ops(int device, int dtype, const gpt_ops **out);

/* Every table that this machine can run, NULL past the last: for tests. */
const gpt_ops *backend_ops_at(int i);

#endif
