/* sockets.c: messages over connected sockets, one for each other rank, which the caller has opened.
 *
 * Messages between two ranks have an order and a size that both know. A message has its size in front, so that
 * ranks that are at different calls fail instead of reading each other's numbers. Nothing waits: a test of one
 * message moves those of all ranks, since a rank may wait for one that another rank's message is in front of. */
#define _GNU_SOURCE
#include "error.h"
#include "links.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* In place of a message's size: its sender alone has an error, has printed it, and ends the job. */
enum { FAREWELL = -1 };

/* Messages under way in one direction: collectives.c has two lists for a piece, with one each for a rank. */
enum { QUEUE = 2 * MOST_DEPTH };

typedef struct packet {
    char *data;
    int64_t n_bytes, header; /* of the message, as its receiver or its sender has it */
} packet;

/* The messages to or from one rank, in their order. */
typedef struct queue {
    packet packets[QUEUE];
    int64_t n_begun, n_ended;
    int64_t moved; /* bytes of the oldest that has not ended, with its header */
    bool cancelled;
} queue;

typedef struct peer {
    int socket;
    queue in, out;
    int64_t expected; /* bytes of a message that was not as long; 0: all were */
    int problem;      /* an errno; 0: none */
    bool closed;      /* by the other rank */
    bool left;        /* the same, and it has said why */
} peer;

typedef struct socket_links {
    links links;
    peer *peers; /* (size) */
} socket_links;

/* ---- one queue ---- */

static bool is_idle(const queue *q) {
    return q->n_begun == q->n_ended || q->cancelled;
}

/* The parts of the oldest message that have not moved yet: of its header, then of its data. */
static int parts_left(packet *p, int64_t moved, struct iovec out[2]) {
    const int64_t header = sizeof p->header;
    int n = 0;
    if (moved < header)
        out[n++] = (struct iovec){(char *)&p->header + moved, (size_t)(header - moved)};
    int64_t skipped = moved > header ? moved - header : 0;
    if (skipped < p->n_bytes)
        out[n++] = (struct iovec){p->data + skipped, (size_t)(p->n_bytes - skipped)};
    return n;
}

/* Moves as much as the socket takes or has. What a rank has sent before it closed can still be read. */
static void move(peer *r, queue *q, bool sends) {
    while (!is_idle(q) && !r->problem && !r->expected && !r->left && !(sends && r->closed)) {
        packet *p = &q->packets[q->n_ended % QUEUE];
        struct iovec parts[2];
        struct msghdr message = {.msg_iov = parts};
        message.msg_iovlen = (size_t)parts_left(p, q->moved, parts);
        /* A header comes alone: it tells whether the data are as long as their room. */
        if (!sends && q->moved < (int64_t)sizeof p->header) message.msg_iovlen = 1;
        ssize_t n = sends ? sendmsg(r->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                          : recvmsg(r->socket, &message, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
        if (n <= 0) {
            r->closed = n == 0 || errno == EPIPE || errno == ECONNRESET;
            r->problem = r->closed ? 0 : errno;
            return;
        }
        q->moved += n;
        bool differs = !sends && q->moved == (int64_t)sizeof p->header && p->header != p->n_bytes;
        if (differs && p->header == FAREWELL)
            r->left = r->closed = true;
        else if (differs)
            r->expected = p->n_bytes;
        if (q->moved == (int64_t)sizeof p->header + p->n_bytes) q->moved = 0, q->n_ended++;
    }
}

static int begin(links *l, int rank, char *data, int64_t n_bytes, bool sends, link_request *out) {
    peer *r = &((socket_links *)l)->peers[rank];
    queue *q = sends ? &r->out : &r->in;
    if (q->n_begun - q->n_ended == QUEUE)
        return fail(GPT_ERR_COMM, "more than %d messages with rank %d are under way", QUEUE, rank);
    q->packets[q->n_begun % QUEUE] = (packet){data, n_bytes, sends ? n_bytes : 0};
    *out = (intptr_t)((q->n_begun++ * l->size + rank) * 2 + sends);
    move(r, q, sends);
    return GPT_OK;
}

/* ---- links ---- */

static int socket_send(links *l, int rank, const void *data, int64_t n_bytes, link_request *out) {
    return begin(l, rank, (char *)data, n_bytes, true, out);
}

static int socket_receive(links *l, int rank, void *data, int64_t n_bytes, link_request *out) {
    return begin(l, rank, data, n_bytes, false, out);
}

static int failure(const links *l, const peer *r) {
    int rank = (int)(r - ((const socket_links *)l)->peers);
    if (r->left) return fail(GPT_ERR_COMM, "rank %d has ended the job", rank);
    if (r->expected)
        return fail(GPT_ERR_COMM, "rank %d is at another call: it has sent no %lld bytes", rank,
                    (long long)r->expected);
    return fail(GPT_ERR_COMM, "the connection to rank %d has ended%s%s", rank,
                r->closed ? "" : ": ", r->closed ? "" : strerror(r->problem));
}

/* Whether a rank has ended the job. Where no message of it is expected, its last word has not been read yet. */
static bool has_left(peer *r) {
    int64_t header = 0;
    if (r->closed && !r->left && r->in.n_begun == r->in.n_ended)
        r->left = recv(r->socket, &header, sizeof header, MSG_DONTWAIT) == (ssize_t)sizeof header &&
                  header == FAREWELL;
    return r->left;
}

static int socket_test(links *l, link_request *request, bool *done) {
    socket_links *s = (socket_links *)l;
    for (int rank = 0; rank < l->size; rank++) {
        move(&s->peers[rank], &s->peers[rank].out, true);
        move(&s->peers[rank], &s->peers[rank].in, false);
    }
    bool sends = *request % 2;
    peer *r = &s->peers[*request / 2 % l->size];
    const queue *q = sends ? &r->out : &r->in;
    *done = *request / 2 / l->size < q->n_ended || q->cancelled;
    if (*done || (!r->problem && !r->closed && !r->expected)) return GPT_OK;
    for (int rank = 0; rank < l->size; rank++) /* others leave because of the one that did first */
        if (has_left(&s->peers[rank])) r = &s->peers[rank];
    return failure(l, r);
}

/* Nothing can be read from this rank afterwards. */
static void socket_cancel(links *l, link_request *request) {
    ((socket_links *)l)->peers[*request / 2 % l->size].in.cancelled = true;
}

/* Each other rank finds its connection ended, and so on. Where it was no failed call, they hear that this rank ends
 * the job, unless a message is half sent. */
static void socket_end_job(links *l, int code) {
    const socket_links *s = (socket_links *)l;
    const int64_t farewell = FAREWELL;
    (void)code;
    for (int rank = 0; rank < l->size; rank++) {
        if (rank == l->rank) continue;
        const peer *r = &s->peers[rank];
        if (!l->broken && !r->out.moved)
            send(r->socket, &farewell, sizeof farewell, MSG_DONTWAIT | MSG_NOSIGNAL);
        shutdown(r->socket, SHUT_RDWR);
    }
}

static void socket_free(links *l) {
    socket_links *s = (socket_links *)l;
    for (int rank = 0; rank < l->size && s->peers; rank++)
        if (rank != l->rank) close(s->peers[rank].socket);
    free(s->peers);
    free(s);
}

int comm_sockets(const int *sockets, int rank, int size, double timeout_s, gpt_comm **out) {
    static const link_ops ops = {socket_send,   socket_receive, socket_test,
                                 socket_cancel, socket_end_job, socket_free};
    socket_links *s = calloc(1, sizeof *s);
    peer *peers = calloc((size_t)size, sizeof *peers);
    if (!s || !peers) {
        free(s);
        free(peers);
        for (int i = 0; i < size; i++)
            if (i != rank) close(sockets[i]);
        return fail(GPT_ERR_MEMORY, "out of memory for the ranks of a job");
    }
    s->links = (links){.ops = &ops, .rank = rank, .size = size};
    s->peers = peers;
    for (int i = 0; i < size; i++) peers[i].socket = i == rank ? -1 : sockets[i];
    return comm_over_links(&s->links, timeout_s, out);
}
