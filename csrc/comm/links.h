/* links.h: messages between two ranks, over which collectives.c makes the calls of comm.h.
 *
 * Messages from one rank to another arrive in order. send and receive only begin: `test` says whether a
 * message is done, and never waits. */
#ifndef GPT_LINKS_H
#define GPT_LINKS_H

#include "comm.h"

enum { MOST_DEPTH = 128 }; /* pieces under way at a time */

typedef struct links links;

typedef intptr_t link_request;

typedef struct link_ops {
    int (*send)(links *l, int rank, const void *data, int64_t n_bytes, link_request *out);
    int (*receive)(links *l, int rank, void *data, int64_t n_bytes, link_request *out);
    int (*test)(links *l, link_request *request, bool *done);
    void (*cancel)(links *l, link_request *request); /* a receive; `test` says when it has ended */
    void (*end_job)(links *l, int code);
    void (*free)(links *l); /* and l itself */
} link_ops;

struct links {
    const link_ops *ops;
    int rank, size;
    bool broken; /* a call has failed, so that ranks no longer agree which is next */
};

/* The ranks that are linked. Takes the links, also where it fails. */
int comm_over_links(links *l, double timeout_s, gpt_comm **out);

#endif
