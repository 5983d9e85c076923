/* nccl.c: NCCL, by a library that is opened when ranks ask for it, so that libgpt.so needs none.
 *
 * Nothing of nccl.h is compiled: a communicator is a pointer, and the numbers below are those of NCCL 2. Ranks get
 * its id over the messages that they have already. */
#include "nccl.h"

#include "error.h"
#include "interrupt.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ID_BYTES = 128, SUCCESS = 0, IN_PROGRESS = 7, FLOAT32 = 7, SUM = 0, NAP_NS = 50 * 1000 };

typedef struct unique_id {
    char bytes[ID_BYTES];
} unique_id;

struct nccl {
    void *library;
    void *ranks; /* ncclComm_t; NULL: not joined, or a sum has failed */
    bool failed; /* a sum, since they joined */
    int (*GetUniqueId)(unique_id *);
    int (*CommInitRank)(void **, int, unique_id, int);
    int (*AllReduce)(const void *, void *, size_t, int, int, void *, void *);
    int (*CommGetAsyncError)(void *, int *);
    int (*CommAbort)(void *);
    int (*CommDestroy)(void *);
    const char *(*GetErrorString)(int);
};

static int check(const struct nccl *l, int code, const char *call) {
    if (code == SUCCESS || code == IN_PROGRESS) return GPT_OK;
    return fail(GPT_ERR_COMM, "%s failed: %s", call, l->GetErrorString(code));
}

static int find(const struct nccl *l, const char *name, void *function) {
    void *found = dlsym(l->library, name);
    if (!found) return fail(GPT_ERR_DEVICE, "the NCCL library has no %s", name);
    memcpy(function, &found, sizeof found);
    return GPT_OK;
}

static int open_library(struct nccl *l, const char *name) {
    l->library = dlopen(name ? name : "libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!l->library && name) return fail(GPT_ERR_DEVICE, "%s does not load: %s", name, dlerror());
    if (!l->library)
        return fail(GPT_ERR_DEVICE, "NCCL was not found; install it with: pip install "
                                    "nvidia-nccl-cu13, or use --device cpu");
    TRY(find(l, "ncclGetUniqueId", &l->GetUniqueId));
    TRY(find(l, "ncclCommInitRank", &l->CommInitRank));
    TRY(find(l, "ncclAllReduce", &l->AllReduce));
    TRY(find(l, "ncclCommGetAsyncError", &l->CommGetAsyncError));
    TRY(find(l, "ncclCommAbort", &l->CommAbort));
    TRY(find(l, "ncclCommDestroy", &l->CommDestroy));
    return find(l, "ncclGetErrorString", &l->GetErrorString);
}

int nccl_open(gpt_comm *comm, const char *library) {
    if (comm->nccl) return GPT_OK;
    struct nccl *l = calloc(1, sizeof *l);
    if (!l) return fail(GPT_ERR_MEMORY, "out of memory for NCCL");
    int status = open_library(l, library);
    if (status == GPT_OK)
        comm->nccl = l;
    else {
        if (l->library) dlclose(l->library);
        free(l);
    }
    return status;
}

/* A rank without an id gives others an empty one, so that all fail. */
int nccl_join(gpt_comm *comm) {
    struct nccl *l = comm->nccl;
    unique_id id = {{0}}, none = {{0}};
    if (!l) return fail(GPT_ERR_ARGUMENT, "NCCL is not open; call gpt_comm_open_nccl first");
    if (l->ranks) return GPT_OK;
    int status = comm->rank ? GPT_OK : check(l, l->GetUniqueId(&id), "ncclGetUniqueId");
    if (status != GPT_OK) id = none;
    TRY(comm->ops->broadcast(comm, &id, sizeof id, 0));
    TRY(status);
    if (!memcmp(&id, &none, sizeof id)) return fail(GPT_ERR_COMM, "rank 0 has no id for NCCL");
    status = check(l, l->CommInitRank(&l->ranks, comm->size, id, comm->rank), "ncclCommInitRank");
    l->failed = false;
    if (status != GPT_OK) l->ranks = NULL;
    return status;
}

bool nccl_is_there(const gpt_comm *comm) {
    return comm->nccl && comm->nccl->ranks;
}

bool nccl_has_failed(const gpt_comm *comm) {
    return comm->nccl && comm->nccl->failed;
}

/* Until the sum has ended: a blocking wait would last for ever where another GPU is lost. */
static int wait_for(const gpt_comm *comm, device_queue queue) {
    const struct nccl *l = comm->nccl;
    double since = comm_seconds();
    for (;;) {
        int state = SUCCESS;
        TRY(check(l, l->CommGetAsyncError(l->ranks, &state), "ncclCommGetAsyncError"));
        TRY(check(l, state, "NCCL's sum"));
        if (state == SUCCESS && !queue.is_busy(queue.given)) return GPT_OK;
        if (interrupt_wanted()) return fail(GPT_ERR_INTERRUPTED, "interrupted");
        if (comm->timeout_s > 0 && comm_seconds() - since > comm->timeout_s)
            return fail(GPT_ERR_COMM, "no answer from the GPUs of other ranks for %g s",
                        comm->timeout_s);
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
}

int nccl_all_reduce(gpt_comm *comm, float *x, int64_t n, device_queue queue) {
    struct nccl *l = comm->nccl;
    int status = check(l, l->AllReduce(x, x, (size_t)n, FLOAT32, SUM, l->ranks, queue.stream),
                       "ncclAllReduce");
    if (status == GPT_OK) status = wait_for(comm, queue);
    if (status == GPT_OK) return GPT_OK;
    l->CommAbort(l->ranks); /* lets the kernel end that waits for others */
    l->ranks = NULL;
    l->failed = true;
    return status;
}

/* The library stays open: it has threads. */
void nccl_close(gpt_comm *comm) {
    if (nccl_is_there(comm)) comm->nccl->CommDestroy(comm->nccl->ranks);
    free(comm->nccl);
    comm->nccl = NULL;
}
