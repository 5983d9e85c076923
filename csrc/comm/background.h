/* background.h: a thread that adds numbers of all ranks while its owner computes others. */
#ifndef GPT_BACKGROUND_H
#define GPT_BACKGROUND_H

#include "comm.h"

typedef struct background background;

/* Starts comm->background, unless it is there. GPT_ERR_MEMORY. */
int background_start(gpt_comm *comm);
/* Begins a series of sums: time counts from here, and nothing else may use comm until background_wait. */
void background_begin(gpt_comm *comm);
/* Adds numbers first to first + n of x after the sums that were wanted before. With bounds (size + 1), which have to
 * stay, a rank gets the sums of numbers bounds[rank] to bounds[rank + 1]; NULL: all. coding has the residual of x. */
void background_add(gpt_comm *comm, float *x, int64_t first, int64_t n, const int64_t *bounds,
                    coding coding);
/* Until all have been added, or one has failed. */
int background_wait(gpt_comm *comm);
/* The same, and lets the one under way fail. */
void background_give_up(gpt_comm *comm);
/* Whether a series has begun and was not waited for. */
bool background_is_busy(const gpt_comm *comm);
/* The i-th sum of the last series; GPT_ERR_ARGUMENT past the last. */
int background_span(const gpt_comm *comm, int i, gpt_sum_span *out);
/* Ends the thread; harmless where there is none. */
void background_stop(gpt_comm *comm);

#endif
