/* messages.c: waits for messages, and the names of ranks that do not answer. */
#define _GNU_SOURCE
#include "messages.h"

#include "error.h"
#include "interrupt.h"
#include "tried.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    EAGER_TESTS = 2000, /* before a wait begins to sleep */
    NAP_NS = 100 * 1000,
};

/* For messages that are cancelled to end. */
static const double CANCEL_S = 1;

int messages_allocate(linked *l, int n_lists) {
    int most = 2 * (l->comm.size - 1);
    l->n_lists = n_lists;
    l->lists = calloc((size_t)n_lists, sizeof *l->lists);
    l->messages = calloc((size_t)n_lists * (size_t)(most + 1), sizeof *l->messages);
    if (!l->lists || !l->messages)
        return fail(GPT_ERR_MEMORY, "out of memory for %d ranks", l->comm.size);
    for (int i = 0; i < n_lists; i++) l->lists[i].messages = l->messages + (ptrdiff_t)i * most;
    return GPT_OK;
}

void messages_free(linked *l) {
    free(l->lists);
    free(l->messages);
}

int message_begin(linked *l, message_list *list, int rank, void *data, int64_t n_bytes,
                  bool sends) {
    const link_ops *ops = l->links->ops;
    if (n_bytes <= 0) return GPT_OK;
    message *m = &list->messages[list->n++];
    *m = (message){.rank = rank, .sends = sends};
    if (sends)
        TRY(ops->send(l->links, rank, data, n_bytes, &m->request));
    else
        TRY(ops->receive(l->links, rank, data, n_bytes, &m->request));
    m->under_way = true;
    return GPT_OK;
}

/* Names the ranks that have not answered. Those that never have may be out of reach: then also the addresses that
 * this process tries. Later, all ranks are connected, and a socket without an answer is that of other work. */
static int lost(linked *l, const message_list *list) {
    char names[300] = "", addresses[100] = "";
    bool tried = false;
    int n = 0;
    for (int i = 0; i < list->n; i++)
        if (list->messages[i].under_way) l->comm.lost[list->messages[i].rank] = true;
    for (int rank = 0; rank < l->comm.size; rank++) {
        size_t used = strlen(names);
        tried |= l->comm.lost[rank] && !l->comm.hosts[rank][0];
        if (l->comm.lost[rank] && used < sizeof names - 100)
            snprintf(names + used, sizeof names - used,
                     l->comm.hosts[rank][0] ? "%srank %d (%s)" : "%srank %d%s", n++ ? ", " : "",
                     rank, l->comm.hosts[rank]);
    }
    tried = tried && addresses_tried(addresses, sizeof addresses) > 0;
    return fail(GPT_ERR_COMM, "no answer from %s for %g s%s%s", names, l->comm.timeout_s,
                tried ? "; no connection to " : "", addresses);
}

static int test_message(linked *l, message *m) {
    bool done = false;
    int status = l->links->ops->test(l->links, &m->request, &done);
    if (status != GPT_OK || done) m->under_way = false;
    if (status != GPT_OK) l->comm.lost[m->rank] = true;
    return status;
}

/* Messages that have not ended. */
static int count_left(const linked *l, bool sends) {
    int n = 0;
    for (int k = 0; k < l->n_lists; k++)
        for (int i = 0; i < l->lists[k].n; i++)
            n += l->lists[k].messages[i].under_way && l->lists[k].messages[i].sends == sends;
    return n;
}

int messages_left(const linked *l) {
    return count_left(l, true) + count_left(l, false);
}

/* Tests the messages under way, or cancels receives. */
static void visit(linked *l, bool cancels) {
    for (int k = 0; k < l->n_lists; k++)
        for (int i = 0; i < l->lists[k].n; i++) {
            message *m = &l->lists[k].messages[i];
            if (m->under_way && !cancels) test_message(l, m);
            if (m->under_way && cancels && !m->sends) l->links->ops->cancel(l->links, &m->request);
        }
}

int messages_ended(linked *l, int status) {
    if (status == GPT_OK) return GPT_OK;
    double since = comm_seconds();
    l->links->broken = true;
    visit(l, true);
    visit(l, false);
    while (count_left(l, false) && comm_seconds() - since < CANCEL_S) {
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
        visit(l, false);
    }
    return status;
}

/* How many of a list are under way yet. */
static int test_list(linked *l, message_list *list, int *n_left) {
    *n_left = 0;
    for (int i = 0; i < list->n; i++) {
        message *m = &list->messages[i];
        if (m->under_way) TRY(test_message(l, m));
        *n_left += m->under_way;
    }
    return GPT_OK;
}

int messages_wait(linked *l, message_list *list) {
    double since = comm_seconds();
    int n_before = list->n + 1, n_left;
    for (int n_idle = 0;; n_idle++) {
        TRY(test_list(l, list, &n_left));
        if (!n_left) break;
        if (n_left < n_before) n_before = n_left, n_idle = 0, since = comm_seconds();
        if (atomic_load(&l->given_up)) return fail(GPT_ERR_COMM, "the exchange was given up");
        if (!l->patient && n_idle < EAGER_TESTS) {
            sched_yield(); /* ranks may outnumber cores */
            continue;
        }
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
        if (!l->patient && interrupt_wanted()) return fail(GPT_ERR_INTERRUPTED, "interrupted");
        if (l->comm.timeout_s > 0 && comm_seconds() - since > l->comm.timeout_s)
            return lost(l, list);
    }
    list->n = 0;
    return GPT_OK;
}
