/* messages.h: messages under way between this rank and others, in lists that are waited for. */
#ifndef GPT_MESSAGES_H
#define GPT_MESSAGES_H

#include "links.h"

#include <stdatomic.h>

/* A message under way, of a rank that is awaited. */
typedef struct message {
    link_request request;
    int rank;
    bool sends, under_way;
} message;

/* Messages that are waited for together. */
typedef struct message_list {
    message *messages; /* (2 (size - 1)) */
    int n;
} message_list;

typedef struct linked {
    gpt_comm comm;
    links *links;
    message_list *lists; /* (n_lists) all there are */
    int n_lists;
    message *messages; /* of all lists */
    bool patient; /* the caller computes meanwhile: waits begin to sleep at once, and ask nobody */
    atomic_bool given_up; /* a wait under way fails */
} linked;

/* Room for so many lists. GPT_ERR_MEMORY. */
int messages_allocate(linked *l, int n_lists);
void messages_free(linked *l);

/* Begins a message of a list; of no bytes: does nothing. */
int message_begin(linked *l, message_list *list, int rank, void *data, int64_t n_bytes, bool sends);
/* Until all of a list have arrived. The time that may pass begins again with each that does. */
int messages_wait(linked *l, message_list *list);
/* The result of a call. After a failure there can be no others, and receives are cancelled, so that nothing
 * arrives in memory that its owner has again. */
int messages_ended(linked *l, int status);
/* Messages that have not ended: they may use their memory yet. */
int messages_left(const linked *l);

#endif
