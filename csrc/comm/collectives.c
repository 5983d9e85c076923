/* collectives.c: the four calls over messages between two ranks.
 *
 * MPI's own MPI_Allreduce may add in any order, so that a run would not repeat its bits. Here a rank owns a
 * slice of the numbers, receives everybody's, and adds them in the order of ranks. Each number travels as
 * often as in a ring: (size - 1) / size of them leave a rank, and as many sums. */
#define _GNU_SOURCE
#include "error.h"
#include "interrupt.h"
#include "links.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    REDUCE_PIECE =
        1 << 16, /* numbers of a message that is added; a rank has room for one of each other */
    GATHER_PIECE = 1 << 22, /* bytes of a message that is not */
    EAGER_TESTS = 2000,     /* before a wait begins to sleep */
    NAP_NS = 100 * 1000,
};

/* For messages that are cancelled to end. */
static const double CANCEL_S = 1;

/* A message under way, of a rank that is awaited. */
typedef struct message {
    link_request request;
    int rank;
    bool sends, under_way;
} message;

typedef struct linked {
    gpt_comm comm;
    links *links;
    message *messages; /* (2 size) */
    int n_messages;
    int64_t *offsets; /* (size + 1) in bytes */
    int64_t *slices;  /* (size + 1) of an all-reduce, in numbers */
    float *room;      /* (size, REDUCE_PIECE) */
} linked;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int begin(linked *l, int rank, void *data, int64_t n_bytes, bool sends) {
    const link_ops *ops = l->links->ops;
    if (n_bytes <= 0) return GPT_OK;
    message *m = &l->messages[l->n_messages++];
    *m = (message){.rank = rank, .sends = sends};
    if (sends)
        TRY(ops->send(l->links, rank, data, n_bytes, &m->request));
    else
        TRY(ops->receive(l->links, rank, data, n_bytes, &m->request));
    m->under_way = true;
    return GPT_OK;
}

/* Names the ranks that have not answered. */
static int lost(linked *l) {
    char names[400] = "";
    int n = 0;
    for (int i = 0; i < l->n_messages; i++)
        if (l->messages[i].under_way) l->comm.lost[l->messages[i].rank] = true;
    for (int rank = 0; rank < l->comm.size; rank++) {
        size_t used = strlen(names);
        if (l->comm.lost[rank] && used < sizeof names - 100)
            snprintf(names + used, sizeof names - used, "%srank %d (%s)", n++ ? ", " : "", rank,
                     l->comm.hosts[rank]);
    }
    return fail(GPT_ERR_COMM, "no answer from %s for %g s", names, l->comm.timeout_s);
}

static int test_message(linked *l, message *m) {
    bool done = false;
    int status = l->links->ops->test(l->links, &m->request, &done);
    if (status != GPT_OK || done) m->under_way = false;
    return status;
}

/* Receives that have not ended: they may write yet. */
static int receives_left(const linked *l) {
    int n = 0;
    for (int i = 0; i < l->n_messages; i++) n += l->messages[i].under_way && !l->messages[i].sends;
    return n;
}

/* After a failure, so that nothing arrives in memory that its owner has again. */
static void cancel_receives(linked *l) {
    double since = seconds();
    for (int i = 0; i < l->n_messages; i++) {
        message *m = &l->messages[i];
        if (m->under_way && !m->sends) l->links->ops->cancel(l->links, &m->request);
    }
    while (receives_left(l) && seconds() - since < CANCEL_S) {
        for (int i = 0; i < l->n_messages; i++)
            if (l->messages[i].under_way && !l->messages[i].sends) test_message(l, &l->messages[i]);
        if (receives_left(l)) nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
}

/* Until all messages have arrived. The time that may pass begins again with each that does. */
static int wait_for_all(linked *l) {
    double since = seconds();
    int n_left = l->n_messages;
    for (int n_idle = 0; n_left > 0; n_idle++) {
        for (int i = 0; i < l->n_messages; i++) {
            message *m = &l->messages[i];
            if (!m->under_way) continue;
            TRY(test_message(l, m));
            if (m->under_way) continue;
            n_left--, n_idle = 0, since = seconds();
        }
        if (!n_left) break;
        if (n_idle < EAGER_TESTS) {
            sched_yield(); /* ranks may outnumber cores */
            continue;
        }
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
        if (interrupt_wanted()) return fail(GPT_ERR_INTERRUPTED, "interrupted");
        if (l->comm.timeout_s > 0 && seconds() - since > l->comm.timeout_s) return lost(l);
    }
    l->n_messages = 0;
    return GPT_OK;
}

/* The result of a call, and whether there can be others. */
static int ended(linked *l, int status) {
    if (status != GPT_OK) {
        l->links->broken = true;
        cancel_receives(l);
    }
    return status;
}

static int check_whole(const linked *l) {
    if (!l->links->broken) return GPT_OK;
    return fail(GPT_ERR_COMM, "the ranks are apart since a call that failed");
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* ---- sums ---- */

/* The numbers of a rank for the piece x (n) of this rank's slice. */
static const float *numbers_of(const linked *l, int rank, const float *x) {
    return rank == l->comm.rank ? x : l->room + (int64_t)rank * REDUCE_PIECE;
}

/* x (n) becomes the sum over ranks, in their order. */
static void add_up(const linked *l, float *x, int64_t n) {
    enum { BLOCK = 512 };
    float sum[BLOCK];
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t size = least(n - first, BLOCK);
        memcpy(sum, numbers_of(l, 0, x) + first, sizeof *sum * (size_t)size);
        for (int rank = 1; rank < l->comm.size; rank++) {
            const float *part = numbers_of(l, rank, x) + first;
            for (int64_t i = 0; i < size; i++) sum[i] += part[i];
        }
        memcpy(x + first, sum, sizeof *sum * (size_t)size);
    }
}

/* Piece `first` to first + REDUCE_PIECE of every slice. */
static int reduce_pieces(linked *l, float *x, const int64_t *bounds, int64_t first) {
    const gpt_comm *comm = &l->comm;
    int64_t own = bounds[comm->rank] + first;
    int64_t n_own = least(bounds[comm->rank + 1] - own, REDUCE_PIECE);
    for (int i = 1; i < comm->size; i++) {
        int to = (comm->rank + i) % comm->size, from = (comm->rank - i + comm->size) % comm->size;
        int64_t theirs = bounds[to] + first;
        int64_t n_theirs = least(bounds[to + 1] - theirs, REDUCE_PIECE);
        TRY(begin(l, from, l->room + (int64_t)from * REDUCE_PIECE, n_own * (int64_t)sizeof *x,
                  false));
        TRY(begin(l, to, x + theirs, n_theirs * (int64_t)sizeof *x, true));
    }
    TRY(wait_for_all(l));
    if (n_own > 0) add_up(l, x + own, n_own);
    return GPT_OK;
}

static int64_t longest_slice(const gpt_comm *comm, const int64_t *bounds) {
    int64_t longest = 0;
    for (int rank = 0; rank < comm->size; rank++)
        if (bounds[rank + 1] - bounds[rank] > longest) longest = bounds[rank + 1] - bounds[rank];
    return longest;
}

static int reduce_scatter(gpt_comm *comm, float *x, const int64_t *bounds) {
    linked *l = (linked *)comm;
    int64_t longest = longest_slice(comm, bounds);
    TRY(check_whole(l));
    for (int64_t first = 0; first < longest; first += REDUCE_PIECE)
        TRY(ended(l, reduce_pieces(l, x, bounds, first)));
    return GPT_OK;
}

/* ---- copies ---- */

/* Bytes first to first + GATHER_PIECE of everybody's part. */
static int gather_pieces(linked *l, char *x, const int64_t *offsets, int64_t first) {
    const gpt_comm *comm = &l->comm;
    int64_t own = offsets[comm->rank] + first;
    int64_t n_own = least(offsets[comm->rank + 1] - own, GATHER_PIECE);
    for (int i = 1; i < comm->size; i++) {
        int to = (comm->rank + i) % comm->size, from = (comm->rank - i + comm->size) % comm->size;
        int64_t theirs = offsets[from] + first;
        int64_t n_theirs = least(offsets[from + 1] - theirs, GATHER_PIECE);
        TRY(begin(l, from, x + theirs, n_theirs, false));
        TRY(begin(l, to, x + own, n_own, true));
    }
    return wait_for_all(l);
}

static int all_gather(gpt_comm *comm, void *x, const int64_t *offsets) {
    linked *l = (linked *)comm;
    int64_t longest = longest_slice(comm, offsets);
    TRY(check_whole(l));
    for (int64_t first = 0; first < longest; first += GATHER_PIECE)
        TRY(ended(l, gather_pieces(l, x, offsets, first)));
    return GPT_OK;
}

static int broadcast_piece(linked *l, char *x, int64_t n_bytes, int root) {
    if (l->comm.rank != root) {
        TRY(begin(l, root, x, n_bytes, false));
    } else {
        for (int rank = 0; rank < l->comm.size; rank++)
            if (rank != root) TRY(begin(l, rank, x, n_bytes, true));
    }
    return wait_for_all(l);
}

static int broadcast(gpt_comm *comm, void *x, int64_t n_bytes, int root) {
    linked *l = (linked *)comm;
    TRY(check_whole(l));
    for (int64_t first = 0; first < n_bytes; first += GATHER_PIECE)
        TRY(ended(
            l, broadcast_piece(l, (char *)x + first, least(n_bytes - first, GATHER_PIECE), root)));
    return GPT_OK;
}

static int all_reduce(gpt_comm *comm, float *x, int64_t n) {
    linked *l = (linked *)comm;
    for (int rank = 0; rank <= comm->size; rank++) {
        l->slices[rank] = comm_slice(comm, n, rank);
        l->offsets[rank] = l->slices[rank] * (int64_t)sizeof *x;
    }
    TRY(reduce_scatter(comm, x, l->slices));
    return all_gather(comm, x, l->offsets);
}

/* ---- a job ---- */

static void end_job(gpt_comm *comm, int code) {
    links *links = ((linked *)comm)->links;
    links->ops->end_job(links, code);
}

static void release(gpt_comm *comm) {
    linked *l = (linked *)comm;
    bool is_written = receives_left(l); /* then room stays, for good */
    if (l->links) l->links->ops->free(l->links);
    free(l->messages);
    free(l->offsets);
    free(l->slices);
    if (!is_written) free(l->room);
    comm_release(comm);
}

/* Everybody's host, for errors. */
static int exchange_hosts(gpt_comm *comm) {
    linked *l = (linked *)comm;
    gethostname(comm->hosts[comm->rank], COMM_HOST_BYTES - 1);
    for (int rank = 0; rank <= comm->size; rank++)
        l->offsets[rank] = (int64_t)rank * COMM_HOST_BYTES;
    TRY(all_gather(comm, comm->hosts, l->offsets));
    for (int rank = 0; rank < comm->size; rank++) comm->hosts[rank][COMM_HOST_BYTES - 1] = 0;
    return GPT_OK;
}

int comm_over_links(links *links, double timeout_s, gpt_comm **out) {
    static const comm_ops ops = {all_reduce, reduce_scatter, all_gather,
                                 broadcast,  end_job,        release};
    gpt_comm *comm = NULL;
    int status = comm_allocate(sizeof(linked), links->rank, links->size, timeout_s, &comm);
    if (status != GPT_OK) {
        links->ops->free(links);
        return status;
    }
    linked *l = (linked *)comm;
    size_t size = (size_t)links->size;
    l->links = links, comm->ops = &ops;
    l->messages = calloc(2 * size, sizeof *l->messages);
    l->offsets = calloc(size + 1, sizeof *l->offsets);
    l->slices = calloc(size + 1, sizeof *l->slices);
    l->room = malloc(sizeof *l->room * size * REDUCE_PIECE);
    if (!l->messages || !l->offsets || !l->slices || !l->room)
        status = fail(GPT_ERR_MEMORY, "out of memory for %d ranks", links->size);
    else
        status = exchange_hosts(comm);
    if (status != GPT_OK)
        release(comm);
    else
        *out = comm;
    return status;
}
