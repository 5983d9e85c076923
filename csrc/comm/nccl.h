/* nccl.h: sums of numbers that are in the memory of GPUs, one GPU a rank. */
#ifndef GPT_NCCL_H
#define GPT_NCCL_H

#include "comm.h"

/* The queue of a device, in whose order it computes. */
typedef struct device_queue {
    void *stream;           /* a cudaStream_t */
    int (*is_busy)(void *); /* whether there is work that has not ended; never waits */
    void *given;            /* to is_busy */
} device_queue;

/* Opens the library: libnccl.so.2 by its name, NULL: the linker's. GPT_ERR_DEVICE, which says what to install. */
int nccl_open(gpt_comm *comm, const char *library);
/* Makes a communicator of all ranks, for the thread's current GPU. All ranks have opened the library. */
int nccl_join(gpt_comm *comm);
/* Whether ranks have joined. */
bool nccl_is_there(const gpt_comm *comm);
/* Whether a sum has failed since: then this rank cannot know where others are. */
bool nccl_has_failed(const gpt_comm *comm);
/* x (n) of the device becomes the sum over ranks. The order of additions is the library's: fixed for the same
 * GPUs and links. Waits for it; GPT_ERR_COMM where other GPUs do not answer within comm->timeout_s. */
int nccl_all_reduce(gpt_comm *comm, float *x, int64_t n, device_queue queue);
/* Harmless where nothing was opened. */
void nccl_close(gpt_comm *comm);

#endif
