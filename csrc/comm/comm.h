/* comm.h: the ranks of a job, and the calls in which they exchange numbers.
 *
 * A filling of comm_ops is one way to do that: collectives.c over messages between two ranks, or none for a
 * job of one rank. All ranks make the same calls in the same order, with the same sizes. */
#ifndef GPT_COMM_H
#define GPT_COMM_H

#include "gpt.h"

#include <stdbool.h>

/* The form in which numbers travel that are added. */
typedef struct coding {
    int wire;        /* enum gpt_wire */
    float *residual; /* (n) what this rank has not sent yet; NULL for fp32 */
} coding;

/* Of every rank, and of everything that its calls need: nothing is allocated later. */
typedef struct comm_ops {
    /* x (n) becomes the sum over ranks, added in the order of ranks: the same bits on all of them, and in
     * every run. */
    int (*all_reduce)(gpt_comm *comm, float *x, int64_t n, coding coding);
    /* The same for the slice of this rank, numbers bounds[rank] to bounds[rank + 1]; the rest of x keeps its
     * numbers. bounds (size + 1). */
    int (*reduce_scatter)(gpt_comm *comm, float *x, const int64_t *bounds, coding coding);
    /* Bytes offsets[r] to offsets[r + 1] of x are those of rank r, for each r. offsets (size + 1). */
    int (*all_gather)(gpt_comm *comm, void *x, const int64_t *offsets);
    /* The parts of root's x are those of ranks, each of which has its own alone in its x: they go to the ranks, or
     * come from them. */
    int (*scatter)(gpt_comm *comm, void *x, const int64_t *offsets, int root);
    int (*gather)(gpt_comm *comm, void *x, const int64_t *offsets, int root);
    /* x (n_bytes) becomes that of rank `root`. */
    int (*broadcast)(gpt_comm *comm, void *x, int64_t n_bytes, int root);
    /* Whether calls are made by a thread while others compute: they then leave the core where they wait. */
    void (*be_patient)(gpt_comm *comm, bool patient);
    /* Lets the call under way, of another thread, fail. */
    void (*give_up)(gpt_comm *comm);
    /* Ends all processes of the job, this one too. */
    void (*end_job)(gpt_comm *comm, int code);
    void (*free)(gpt_comm *comm);
} comm_ops;

enum { COMM_HOST_BYTES = 64, COMM_STAGE = 1 << 20, COMM_BUCKET = 1 << 21 };

struct gpt_comm {
    const comm_ops *ops;
    int rank, size;
    double timeout_s;               /* of silence, after which a rank counts as lost */
    bool *lost;                     /* (size) ranks that have not answered */
    char (*hosts)[COMM_HOST_BYTES]; /* (size) */
    float *stage;                   /* (COMM_STAGE) numbers of a device on their way */
    int64_t *bounds;                /* (size + 1) of a caller's slices */
    struct background *background;  /* NULL until it is wanted */
    struct nccl *nccl;              /* NULL until it is opened */
    gpt_model *adding;              /* whose gradients it adds, or NULL */
    int64_t piece, copied; /* numbers, and bytes, of a message; there is room for no more */
    int64_t bucket;        /* numbers of a sum that begins while others are computed */
};

/* The first of n numbers in the slice of a rank; of `size`: n. Slices begin at multiples of 16 numbers. */
int64_t comm_slice(const gpt_comm *comm, int64_t n, int rank);

/* Allocates what every filling has, in `bytes` that begin with a gpt_comm. GPT_ERR_MEMORY. */
int comm_allocate(size_t bytes, int rank, int size, double timeout_s, gpt_comm **out);
void comm_release(gpt_comm *comm);

/* Of a clock that no one sets. */
double comm_seconds(void);

/* A job of one rank. */
int comm_none(gpt_comm **out);
/* The ranks of an MPI library that is opened by its name; NULL: by its usual names. GPT_ERR_DEVICE where
 * there is none, or where its ABI is not known. */
int comm_mpi(const char *library, double timeout_s, gpt_comm **out);
/* The ranks at the other ends of stream sockets; sockets (size), of which that of this rank is not read. Takes
 * them, also where it fails. */
int comm_sockets(const int *sockets, int rank, int size, double timeout_s, gpt_comm **out);

#endif
