/* comm.h: the ranks of a job, and the four calls in which they exchange numbers.
 *
 * A filling of comm_ops is one way to do that: collectives.c over messages between two ranks, or none for a
 * job of one rank. All ranks make the same calls in the same order, with the same sizes. */
#ifndef GPT_COMM_H
#define GPT_COMM_H

#include "gpt.h"

#include <stdbool.h>

/* Of every rank, and of everything that its calls need: nothing is allocated later. */
typedef struct comm_ops {
    /* x (n) becomes the sum over ranks, added in the order of ranks: the same bits on all of them, and in
     * every run. */
    int (*all_reduce)(gpt_comm *comm, float *x, int64_t n);
    /* The same for the slice of this rank, numbers bounds[rank] to bounds[rank + 1]; the rest of x keeps its
     * numbers. bounds (size + 1). */
    int (*reduce_scatter)(gpt_comm *comm, float *x, const int64_t *bounds);
    /* Bytes offsets[r] to offsets[r + 1] of x are those of rank r, for each r. offsets (size + 1). */
    int (*all_gather)(gpt_comm *comm, void *x, const int64_t *offsets);
    /* x (n_bytes) becomes that of rank `root`. */
    int (*broadcast)(gpt_comm *comm, void *x, int64_t n_bytes, int root);
    /* Ends all processes of the job, this one too. */
    void (*end_job)(gpt_comm *comm, int code);
    void (*free)(gpt_comm *comm);
} comm_ops;

enum { COMM_HOST_BYTES = 64, COMM_STAGE = 1 << 20 };

struct gpt_comm {
    const comm_ops *ops;
    int rank, size;
    double timeout_s;               /* of silence, after which a rank counts as lost */
    bool *lost;                     /* (size) ranks that have not answered */
    char (*hosts)[COMM_HOST_BYTES]; /* (size) */
    float *stage;                   /* (COMM_STAGE) numbers of a device on their way */
    int64_t *bounds;                /* (size + 1) of a caller's slices */
};

/* The first of n numbers in the slice of a rank; of `size`: n. Slices begin at multiples of 16 numbers. */
int64_t comm_slice(const gpt_comm *comm, int64_t n, int rank);

/* Allocates what every filling has, in `bytes` that begin with a gpt_comm. GPT_ERR_MEMORY. */
int comm_allocate(size_t bytes, int rank, int size, double timeout_s, gpt_comm **out);
void comm_release(gpt_comm *comm);

/* A job of one rank. */
int comm_none(gpt_comm **out);
/* The ranks of an MPI library that is opened by its name; NULL: by its usual names. GPT_ERR_DEVICE where
 * there is none, or where its ABI is not known. */
int comm_mpi(const char *library, double timeout_s, gpt_comm **out);

#endif
