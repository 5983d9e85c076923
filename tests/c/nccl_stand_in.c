/* nccl_stand_in.c: as much of libnccl.so.2 as gptc calls, over memory that ranks share, for tests without a GPU.
 *
 * Ranks are threads or processes of a machine; a device's memory is the host's. A sum makes progress where its caller
 * asks whether it has ended. It is of the order of ranks. */
#define _GNU_SOURCE
#pragma GCC visibility push(default)
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    UNHANDLED_CUDA_ERROR = 1,
    SYSTEM_ERROR = 2,
    IN_PROGRESS = 7,
    FLOAT32 = 7,
    SUM = 0,
    ID_BYTES = 128,
    MOST_RANKS = 8,
    CHUNK = 1000, /* numbers that a rank gives at a time */
    UNLUCKY = 13, /* a sum of so many numbers fails */
};

typedef struct unique_id {
    char path[ID_BYTES];
} unique_id;

typedef struct shared {
    _Atomic int joined;
    _Atomic long given[MOST_RANKS], taken[MOST_RANKS]; /* chunks so far */
    float numbers[MOST_RANKS][CHUNK];
} shared;

typedef struct communicator {
    shared *all;
    int size, rank;
    float *x; /* the rest of the present sum */
    size_t n;
    long chunk;
    int has_given, error;
} communicator;

_Atomic int stand_in_aborts;

const char *ncclGetErrorString(int code) {
    return code == UNHANDLED_CUDA_ERROR ? "unhandled cuda error" : "unhandled system error";
}

static shared *map(int file) {
    void *at = mmap(NULL, sizeof(shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return at == MAP_FAILED ? NULL : at;
}

int ncclGetUniqueId(unique_id *id) {
    memset(id, 0, sizeof *id);
    snprintf(id->path, sizeof id->path, "/tmp/nccl-stand-in-XXXXXX");
    int file = mkstemp(id->path);
    if (file < 0 || ftruncate(file, sizeof(shared))) return SYSTEM_ERROR;
    close(file);
    return SUCCESS;
}

int ncclCommInitRank(communicator **out, int size, unique_id id, int rank) {
    int file = open(id.path, O_RDWR);
    communicator *c = calloc(1, sizeof *c);
    *c = (communicator){.all = file < 0 ? NULL : map(file), .size = size, .rank = rank};
    if (!c->all || size > MOST_RANKS) {
        free(c);
        return SYSTEM_ERROR;
    }
    c->all->joined++;
    while (c->all->joined < size) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    if (!rank) unlink(id.path);
    *out = c;
    return SUCCESS;
}

int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, communicator *c,
                  void *stream) {
    (void)stream;
    if (from != to || type != FLOAT32 || op != SUM || c->n) return SYSTEM_ERROR;
    c->x = to, c->n = n;
    c->error = n == UNLUCKY ? UNHANDLED_CUDA_ERROR : SUCCESS;
    return SUCCESS;
}

static int all_have(const _Atomic long *chunks, int size, long chunk) {
    for (int rank = 0; rank < size; rank++)
        if (chunks[rank] < chunk) return 0;
    return 1;
}

/* Gives the next chunk once all have taken the one before, then takes those of all. */
static void go_on(communicator *c) {
    shared *all = c->all;
    size_t n = c->n < CHUNK ? c->n : CHUNK;
    if (!c->has_given && all_have(all->taken, c->size, c->chunk)) {
        memcpy(all->numbers[c->rank], c->x, n * sizeof *c->x);
        all->given[c->rank] = c->chunk + 1;
        c->has_given = 1;
    }
    if (!c->has_given || !all_have(all->given, c->size, c->chunk + 1)) return;
    memcpy(c->x, all->numbers[0], n * sizeof *c->x);
    for (int rank = 1; rank < c->size; rank++)
        for (size_t i = 0; i < n; i++) c->x[i] += all->numbers[rank][i];
    all->taken[c->rank] = ++c->chunk;
    c->has_given = 0;
    c->x += n, c->n -= n;
}

int ncclCommGetAsyncError(communicator *c, int *state) {
    if (c->error == SUCCESS && c->n) go_on(c);
    *state = c->error != SUCCESS ? c->error : c->n ? IN_PROGRESS : SUCCESS;
    return SUCCESS;
}

int ncclCommDestroy(communicator *c) {
    munmap(c->all, sizeof *c->all);
    free(c);
    return SUCCESS;
}

int ncclCommAbort(communicator *c) {
    stand_in_aborts++;
    return ncclCommDestroy(c);
}
