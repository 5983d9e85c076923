/* collectives.c: the calls over messages between two ranks.
 *
 * MPI's own MPI_Allreduce may add in any order, so that a run would not repeat its bits. Here a rank owns a
 * slice of the numbers, receives everybody's, and adds them in the order of ranks. Each number travels as
 * often as in a ring: (size - 1) / size of them leave a rank, and as many sums.
 *
 * Slices travel in pieces, of which `depth` are under way at a time, so that a call waits for the latency of
 * the network once for its numbers and once for its sums. All ranks begin the messages of a piece at the same
 * place of the same sequence, so that messages between two ranks match in their order.
 *
 * Pieces are short enough that Open MPI sends them over TCP at once. Before a longer message it asks the receiver,
 * and the answer waits behind the data of the same connection: numbers would then go in one direction at a time. */
#define _GNU_SOURCE
#include "error.h"
#include "messages.h"
#include "wire.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    LEAST_DEPTH = 8, /* pieces of a slice that are under way at a time, with many ranks */
    /* Numbers that may be under way from all ranks together: 8 MiB, 64 ms of 1 Gbit/s. */
    ROOM = 1 << 21,
    LEAST_PIECE = 1 << 12,         /* numbers */
    MOST_PIECE = 62 * WIRE_BLOCK,  /* numbers: less than 64 KiB with the headers of MPI */
    COPIED_PIECE = 4 * MOST_PIECE, /* bytes */
    CODED_BYTES = 2,               /* of a number that is not sent as float32, at most */
};

typedef struct exchanger {
    linked l;
    int64_t depth;          /* pieces under way, each with a list of numbers and one of sums */
    int64_t *offsets;       /* (size + 1) in bytes */
    int64_t *slices;        /* (size + 1) of an all-reduce, in numbers */
    float *room;            /* (depth, size - 1, piece) numbers that have arrived */
    char *coded;            /* (depth, size - 1, CODED_BYTES piece) numbers on their way */
    char *sums;             /* (depth, size, CODED_BYTES piece) sums that leave and arrive */
    struct exchanger *next; /* in the list of those that are kept */
} exchanger;

enum way { TO_ALL, TO_ROOT, FROM_ROOT };

/* A call: parts of x, one a rank, are added or copied. */
typedef struct exchange {
    char *x;
    const int64_t *bounds; /* (size + 1) of the parts, in units */
    int64_t unit, piece;   /* bytes, and units */
    bool adds, copies;     /* numbers go to the owner of a part; what it has then goes to all */
    coding coding;         /* of numbers that are added, and of their sums */
    enum way way;          /* of copies */
    int root;
    int64_t
        base; /* the unit at which x begins: another rank than the root has its own part alone */
} exchange;

static int check_whole(const exchanger *e) {
    if (!e->l.links->broken && !atomic_load(&e->l.given_up)) return GPT_OK;
    return fail(GPT_ERR_COMM, "the ranks are apart since a call that failed");
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* ---- pieces ---- */

/* Piece k of a rank's part: where it begins in x, in units, and its units. */
static int64_t piece_at(const exchange *x, int rank, int64_t k) {
    return x->bounds[rank] + k * x->piece;
}

static int64_t piece_size(const exchange *x, int rank, int64_t k) {
    return most(least(x->bounds[rank + 1] - piece_at(x, rank, k), x->piece), 0);
}

static char *place_of(const exchange *x, int rank, int64_t k) {
    return x->x + (piece_at(x, rank, k) - x->base) * x->unit;
}

static int64_t message_bytes(const exchange *x, int64_t n) {
    return x->unit == 1 ? n : wire_bytes(x->coding.wire, n);
}

static bool is_coded(const exchange *x) {
    return x->coding.wire != GPT_WIRE_FP32;
}

static float *residual_of(const exchange *x, int rank, int64_t k) {
    return x->coding.residual + piece_at(x, rank, k);
}

/* The place of another rank in the room of a piece: 0 to size - 2. */
static int64_t seat(const exchanger *e, int rank, int64_t k) {
    int size = e->l.comm.size, others = (rank - e->l.comm.rank - 1 + size) % size;
    return k % e->depth * (size - 1) + others;
}

static float *room_of(const exchanger *e, int rank, int64_t k) {
    return e->room + seat(e, rank, k) * e->l.comm.piece;
}

static char *coded_for(const exchanger *e, int rank, int64_t k) {
    return e->coded + seat(e, rank, k) * e->l.comm.piece * CODED_BYTES;
}

static char *sums_of(const exchanger *e, int rank, int64_t k) {
    return e->sums + (k % e->depth * e->l.comm.size + rank) * e->l.comm.piece * CODED_BYTES;
}

/* ---- numbers go to the owners of parts ---- */

static int send_numbers(exchanger *e, const exchange *x, int64_t k) {
    const gpt_comm *comm = &e->l.comm;
    message_list *list = &e->l.lists[k % e->depth];
    int64_t n_own = piece_size(x, comm->rank, k);
    for (int i = 1; i < comm->size; i++) {
        int to = (comm->rank + i) % comm->size, from = (comm->rank - i + comm->size) % comm->size;
        int64_t n = piece_size(x, to, k);
        void *sent = place_of(x, to, k);
        TRY(message_begin(&e->l, list, from, room_of(e, from, k), message_bytes(x, n_own), false));
        if (is_coded(x) && n) {
            wire_encode(x->coding.wire, coded_for(e, to, k), sent, residual_of(x, to, k), n);
            sent = coded_for(e, to, k);
        }
        TRY(message_begin(&e->l, list, to, sent, message_bytes(x, n), true));
    }
    return GPT_OK;
}

/* Numbers first to first + size of a rank's, for piece k (n) of this rank's part. */
static const float *numbers_of(const exchanger *e, const exchange *x, int rank, int64_t k,
                               int64_t n, int64_t first, int64_t size, float *decoded) {
    int own = e->l.comm.rank;
    if (rank == own) return (const float *)(const void *)place_of(x, own, k) + first;
    if (!is_coded(x)) return room_of(e, rank, k) + first;
    wire_decode(x->coding.wire, decoded, room_of(e, rank, k), n, first, size);
    return decoded;
}

/* Piece k of this rank's part becomes the sum over ranks, in their order. */
static void add_up(const exchanger *e, const exchange *x, int64_t k) {
    enum { BLOCK = 2 * WIRE_BLOCK };
    float sum[BLOCK], decoded[BLOCK];
    int own = e->l.comm.rank;
    int64_t n = piece_size(x, own, k);
    float *out = (float *)(void *)place_of(x, own, k);
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t size = least(n - first, BLOCK);
        for (int rank = 0; rank < e->l.comm.size; rank++) {
            const float *part = numbers_of(e, x, rank, k, n, first, size, decoded);
            if (rank == 0)
                memcpy(sum, part, sizeof *sum * (size_t)size);
            else
                for (int64_t i = 0; i < size; i++) sum[i] += part[i];
        }
        memcpy(out + first, sum, sizeof *sum * (size_t)size);
    }
    if (!is_coded(x) || x->copies) return;
    float *residual = residual_of(x, own, k); /* of an earlier call, which had other parts */
    for (int64_t i = 0; i < n; i++) out[i] += residual[i], residual[i] = 0;
}

/* ---- what owners have goes to all ---- */

/* The own piece, which is then the one that others get. */
static void encode_sums(exchanger *e, const exchange *x, int64_t k) {
    int own = e->l.comm.rank;
    int64_t n = piece_size(x, own, k);
    float *place = (float *)(void *)place_of(x, own, k);
    wire_encode(x->coding.wire, sums_of(e, own, k), place, residual_of(x, own, k), n);
    wire_decode(x->coding.wire, place, sums_of(e, own, k), n, 0, n);
}

/* Whose part goes from one rank to another; -1: none. */
static int part_of(const exchange *x, int from, int to) {
    if (x->way == TO_ROOT) return to == x->root ? from : -1;
    if (x->way == FROM_ROOT) return from == x->root ? to : -1;
    return from;
}

static int64_t part_bytes(const exchange *x, int part, int64_t k) {
    return part < 0 ? 0 : message_bytes(x, piece_size(x, part, k));
}

/* Where a part is read or arrives. */
static void *copy_of(const exchanger *e, const exchange *x, int part, int64_t k) {
    if (part < 0) return NULL;
    return is_coded(x) ? (void *)sums_of(e, part, k) : place_of(x, part, k);
}

static int send_copies(exchanger *e, const exchange *x, int64_t k) {
    message_list *list = &e->l.lists[e->depth + k % e->depth];
    int own = e->l.comm.rank, size = e->l.comm.size;
    if (is_coded(x) && piece_size(x, own, k)) encode_sums(e, x, k);
    for (int i = 1; i < size; i++) {
        int to = (own + i) % size, from = (own - i + size) % size;
        int in = part_of(x, from, own), out = part_of(x, own, to);
        TRY(message_begin(&e->l, list, from, copy_of(e, x, in, k), part_bytes(x, in, k), false));
        TRY(message_begin(&e->l, list, to, copy_of(e, x, out, k), part_bytes(x, out, k), true));
    }
    return GPT_OK;
}

/* Waits for the copies of piece k, which may be before the first. */
static int end_copies(exchanger *e, const exchange *x, int64_t k) {
    if (k < 0 || !x->copies) return GPT_OK;
    TRY(messages_wait(&e->l, &e->l.lists[e->depth + k % e->depth]));
    for (int rank = 0; rank < e->l.comm.size && is_coded(x); rank++) {
        int64_t n = piece_size(x, rank, k);
        float *place = (float *)(void *)place_of(x, rank, k);
        if (rank != e->l.comm.rank)
            wire_decode(x->coding.wire, place, sums_of(e, rank, k), n, 0, n);
    }
    return GPT_OK;
}

/* ---- calls ---- */

static int run(exchanger *e, const exchange *x) {
    int64_t longest = 0;
    for (int rank = 0; rank < e->l.comm.size; rank++)
        longest = most(longest, x->bounds[rank + 1] - x->bounds[rank]);
    int64_t n = (longest + x->piece - 1) / x->piece;
    for (int64_t k = 0; k < least(n, e->depth) && x->adds; k++) TRY(send_numbers(e, x, k));
    for (int64_t k = 0; k < n; k++) {
        if (x->adds) {
            TRY(messages_wait(&e->l, &e->l.lists[k % e->depth]));
            add_up(e, x, k);
        }
        TRY(end_copies(e, x, k - e->depth));
        if (x->copies) TRY(send_copies(e, x, k));
        if (x->adds && k + e->depth < n) TRY(send_numbers(e, x, k + e->depth));
    }
    for (int64_t k = n - e->depth; k < n; k++) TRY(end_copies(e, x, k));
    return GPT_OK;
}

static int call(exchanger *e, const exchange *x) {
    TRY(check_whole(e));
    return messages_ended(&e->l, run(e, x));
}

static int reduce_scatter(gpt_comm *comm, float *x, const int64_t *bounds, coding coding) {
    exchanger *e = (exchanger *)comm;
    return call(e, &(exchange){.x = (char *)x,
                               .bounds = bounds,
                               .unit = sizeof *x,
                               .piece = comm->piece,
                               .adds = true,
                               .coding = coding});
}

static int all_reduce(gpt_comm *comm, float *x, int64_t n, coding coding) {
    exchanger *e = (exchanger *)comm;
    for (int rank = 0; rank <= comm->size; rank++) e->slices[rank] = comm_slice(comm, n, rank);
    return call(e, &(exchange){.x = (char *)x,
                               .bounds = e->slices,
                               .unit = sizeof *x,
                               .piece = comm->piece,
                               .adds = true,
                               .copies = true,
                               .coding = coding});
}

static int all_gather(gpt_comm *comm, void *x, const int64_t *offsets) {
    exchange gather = {.x = x, .bounds = offsets, .unit = 1, .piece = comm->copied, .copies = true};
    return call((exchanger *)comm, &gather);
}

static int with_root(gpt_comm *comm, void *x, const int64_t *offsets, int root, bool gathers) {
    exchange parts = {.x = x, .bounds = offsets, .unit = 1, .piece = comm->copied, .copies = true};
    parts.way = gathers ? TO_ROOT : FROM_ROOT;
    parts.root = root;
    parts.base = comm->rank == root ? 0 : offsets[comm->rank];
    return call((exchanger *)comm, &parts);
}

static int scatter(gpt_comm *comm, void *x, const int64_t *offsets, int root) {
    return with_root(comm, x, offsets, root, false);
}

static int gather(gpt_comm *comm, void *x, const int64_t *offsets, int root) {
    return with_root(comm, x, offsets, root, true);
}

/* All bytes are the part of one rank. */
static int broadcast(gpt_comm *comm, void *x, int64_t n_bytes, int root) {
    exchanger *e = (exchanger *)comm;
    for (int rank = 0; rank <= comm->size; rank++) e->offsets[rank] = rank > root ? n_bytes : 0;
    return all_gather(comm, x, e->offsets);
}

/* ---- a job ---- */

static void be_patient(gpt_comm *comm, bool patient) {
    ((linked *)comm)->patient = patient;
}

static void give_up(gpt_comm *comm) {
    atomic_store(&((linked *)comm)->given_up, true);
}

static void end_job(gpt_comm *comm, int code) {
    links *links = ((linked *)comm)->links;
    links->ops->end_job(links, code);
}

/* Where messages are left, memory that they read or write stays for good, in this list. */
static _Atomic(exchanger *) kept;

static void release(gpt_comm *comm) {
    exchanger *e = (exchanger *)comm;
    bool is_used = e->l.lists && messages_left(&e->l);
    if (e->l.links) e->l.links->ops->free(e->l.links);
    messages_free(&e->l);
    free(e->offsets);
    free(e->slices);
    if (is_used) {
        e->next = atomic_exchange(&kept, e);
        return;
    }
    free(e->room);
    free(e->coded);
    free(e->sums);
    comm_release(comm);
}

/* Everybody's host, for errors. */
static int exchange_hosts(gpt_comm *comm) {
    exchanger *e = (exchanger *)comm;
    gethostname(comm->hosts[comm->rank], COMM_HOST_BYTES - 1);
    for (int rank = 0; rank <= comm->size; rank++)
        e->offsets[rank] = (int64_t)rank * COMM_HOST_BYTES;
    TRY(all_gather(comm, comm->hosts, e->offsets));
    for (int rank = 0; rank < comm->size; rank++) comm->hosts[rank][COMM_HOST_BYTES - 1] = 0;
    return GPT_OK;
}

static int allocate(exchanger *e, int size) {
    int64_t others = most(size - 1, 1);
    int64_t each = ROOM / others, piece = each / LEAST_DEPTH / WIRE_BLOCK * WIRE_BLOCK;
    piece = most(least(piece, MOST_PIECE), LEAST_PIECE);
    e->depth = least(most(each / piece, LEAST_DEPTH), MOST_DEPTH);
    size_t numbers = (size_t)(e->depth * others * piece);
    e->l.comm.piece = piece, e->l.comm.copied = COPIED_PIECE;
    TRY(messages_allocate(&e->l, 2 * (int)e->depth));
    e->offsets = calloc((size_t)size + 1, sizeof *e->offsets);
    e->slices = calloc((size_t)size + 1, sizeof *e->slices);
    e->room = malloc(sizeof *e->room * numbers);
    e->coded = malloc(CODED_BYTES * numbers);
    e->sums = malloc(CODED_BYTES * (size_t)(e->depth * size * piece));
    if (!e->offsets || !e->slices || !e->room || !e->coded || !e->sums)
        return fail(GPT_ERR_MEMORY, "out of memory for %d ranks", size);
    return GPT_OK;
}

int comm_over_links(links *links, double timeout_s, gpt_comm **out) {
    static const comm_ops ops = {all_reduce, reduce_scatter, all_gather, scatter, gather,
                                 broadcast,  be_patient,     give_up,    end_job, release};
    gpt_comm *comm = NULL;
    int status = comm_allocate(sizeof(exchanger), links->rank, links->size, timeout_s, &comm);
    if (status != GPT_OK) {
        links->ops->free(links);
        return status;
    }
    exchanger *e = (exchanger *)comm;
    e->l.links = links, comm->ops = &ops;
    status = allocate(e, links->size);
    if (status == GPT_OK) status = exchange_hosts(comm);
    if (status != GPT_OK)
        release(comm);
    else
        *out = comm;
    return status;
}
