/* none.c: a job of one rank, and what all fillings share. */
#define _POSIX_C_SOURCE 200809L
#include "comm.h"
#include "error.h"

#include <stdlib.h>
#include <time.h>

double comm_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int64_t comm_slice(const gpt_comm *comm, int64_t n, int rank) {
    enum { UNIT = 16 }; /* numbers of a cache line */
    if (rank >= comm->size) return n;
    return n / UNIT * rank / comm->size * UNIT;
}

int comm_allocate(size_t bytes, int rank, int size, double timeout_s, gpt_comm **out) {
    gpt_comm *comm = calloc(1, bytes);
    if (!comm) return fail(GPT_ERR_MEMORY, "out of memory for the ranks of a job");
    comm->rank = rank, comm->size = size, comm->timeout_s = timeout_s;
    comm->bucket = COMM_BUCKET;
    comm->lost = calloc((size_t)size, sizeof *comm->lost);
    comm->hosts = calloc((size_t)size, sizeof *comm->hosts);
    comm->stage = malloc(sizeof *comm->stage * COMM_STAGE);
    comm->bounds = calloc((size_t)size + 1, sizeof *comm->bounds);
    if (!comm->lost || !comm->hosts || !comm->stage || !comm->bounds) {
        comm_release(comm);
        return fail(GPT_ERR_MEMORY, "out of memory for the ranks of a job");
    }
    *out = comm;
    return GPT_OK;
}

void comm_release(gpt_comm *comm) {
    free(comm->lost);
    free(comm->hosts);
    free(comm->stage);
    free(comm->bounds);
    free(comm);
}

static int numbers_alone(gpt_comm *comm, float *x, int64_t n, coding coding) {
    (void)comm, (void)x, (void)n, (void)coding;
    return GPT_OK;
}

static int scatter_alone(gpt_comm *comm, float *x, const int64_t *bounds, coding coding) {
    (void)comm, (void)x, (void)bounds, (void)coding;
    return GPT_OK;
}

static int gather_alone(gpt_comm *comm, void *x, const int64_t *offsets) {
    (void)comm, (void)x, (void)offsets;
    return GPT_OK;
}

static int parts_alone(gpt_comm *comm, void *x, const int64_t *offsets, int root) {
    (void)comm, (void)x, (void)offsets, (void)root;
    return GPT_OK;
}

static int broadcast_alone(gpt_comm *comm, void *x, int64_t n_bytes, int root) {
    (void)comm, (void)x, (void)n_bytes, (void)root;
    return GPT_OK;
}

static void be_the_same(gpt_comm *comm, bool patient) {
    (void)comm, (void)patient;
}

static void give_up_nothing(gpt_comm *comm) {
    (void)comm;
}

static void end_nothing(gpt_comm *comm, int code) {
    (void)comm, (void)code;
}

int comm_none(gpt_comm **out) {
    static const comm_ops ops = {.all_reduce = numbers_alone,
                                 .reduce_scatter = scatter_alone,
                                 .all_gather = gather_alone,
                                 .scatter = parts_alone,
                                 .gather = parts_alone,
                                 .broadcast = broadcast_alone,
                                 .be_patient = be_the_same,
                                 .give_up = give_up_nothing,
                                 .end_job = end_nothing,
                                 .free = comm_release};
    TRY(comm_allocate(sizeof **out, 0, 1, 0, out));
    (*out)->ops = &ops;
    return GPT_OK;
}
