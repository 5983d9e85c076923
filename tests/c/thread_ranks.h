/* thread_ranks.h: threads that stand in for the ranks of a job, with a queue of messages for each pair. */
#ifndef THREAD_RANKS_H
#define THREAD_RANKS_H

#include "testing.h"

#include "comm/links.h"
#include "error.h"

#include <pthread.h>
#include <sys/socket.h>

enum { MOST_RANKS = 5 };

typedef struct letter {
    struct letter *next;
    int64_t n_bytes;
    char data[];
} letter;

/* A receive that waits for its letter. */
typedef struct slot {
    void *to; /* NULL: it has come */
    int64_t n_bytes;
    int from, order;
    bool taken; /* until its end is known */
} slot;

typedef struct post {
    pthread_mutex_t lock;
    letter *first[MOST_RANKS][MOST_RANKS]; /* by sender and receiver */
    letter **last[MOST_RANKS][MOST_RANKS];
} post;

typedef struct thread_links {
    links links;
    post *post;
    slot slots[32 * MOST_RANKS];
    int n_receives;
    int *left; /* receives that are under way when the links are freed */
} thread_links;

static bool cancels = true;
static slot late; /* arrives after all else; leaks are not searched for what it points to */

static inline int post_send(links *l, int rank, const void *data, int64_t n_bytes,
                            link_request *out) {
    post *p = ((thread_links *)l)->post;
    letter *new = malloc(sizeof *new + (size_t)n_bytes);
    *new = (letter){.n_bytes = n_bytes};
    memcpy(new->data, data, (size_t)n_bytes);
    pthread_mutex_lock(&p->lock);
    *p->last[l->rank][rank] = new;
    p->last[l->rank][rank] = &new->next;
    pthread_mutex_unlock(&p->lock);
    *out = -1;
    return GPT_OK;
}

static inline int post_receive(links *l, int rank, void *data, int64_t n_bytes, link_request *out) {
    thread_links *t = (thread_links *)l;
    int i = 0;
    while (t->slots[i].taken) i++;
    t->slots[i] = (slot){data, n_bytes, rank, t->n_receives++, true};
    *out = i;
    return GPT_OK;
}

/* Letters of a rank are those of its receives, in their order. */
static inline slot *oldest_slot(thread_links *t, int from) {
    slot *oldest = NULL;
    for (int i = 0; i < TEST_COUNT(t->slots); i++) {
        slot *s = &t->slots[i];
        if (s->to && s->from == from && (!oldest || s->order < oldest->order)) oldest = s;
    }
    return oldest;
}

static inline int deliver(slot *s, const letter *found) {
    if (found->n_bytes != s->n_bytes)
        return fail(GPT_ERR_COMM, "%lld bytes came; %lld were expected", (long long)found->n_bytes,
                    (long long)s->n_bytes);
    memcpy(s->to, found->data, (size_t)s->n_bytes);
    s->to = NULL;
    return GPT_OK;
}

static inline int post_test(links *l, link_request *request, bool *done) {
    thread_links *t = (thread_links *)l;
    *done = *request < 0;
    if (*done) return GPT_OK;
    slot *s = &t->slots[*request], *oldest;
    int from = s->from, status = GPT_OK;
    pthread_mutex_lock(&t->post->lock);
    letter **at = &t->post->first[from][l->rank], *found;
    while ((found = *at) && (oldest = oldest_slot(t, from))) {
        if (status == GPT_OK) status = deliver(oldest, found);
        oldest->to = NULL;
        *at = found->next;
        if (!*at) t->post->last[from][l->rank] = at;
        free(found);
    }
    pthread_mutex_unlock(&t->post->lock);
    *done = !s->to;
    s->taken = !*done;
    return status;
}

static inline void post_cancel(links *l, link_request *request) {
    if (cancels) ((thread_links *)l)->slots[*request].to = NULL;
}

static inline void post_end(links *l, int code) {
    (void)l, (void)code;
}

static inline void post_free(links *l) {
    const thread_links *t = (const thread_links *)l;
    for (int i = 0; i < TEST_COUNT(t->slots); i++)
        if (t->slots[i].to) late = t->slots[i], ++*t->left;
    free(l);
}

/* ---- jobs ---- */

typedef struct job job;
typedef void job_function(job *j, gpt_comm *comm, int rank);

struct job {
    job_function *run;
    int size;
    int64_t n;
    double timeout_s;
    int64_t piece;  /* numbers of a message; 0: as many as there is room for */
    int missing;    /* this rank makes no call; -1: none */
    bool connected; /* by sockets, of a pair of ranks each */
    int sockets[MOST_RANKS][MOST_RANKS];
    post post;
    float *x[MOST_RANKS];                      /* (n) of each rank */
    int status[MOST_RANKS], again[MOST_RANKS]; /* of the call, and of another after it */
    int lost[MOST_RANKS];                      /* bits of lost ranks */
    int left[MOST_RANKS];                      /* receives under way at the end */
    const void *given;                         /* what `run` is about */
    char sentence[MOST_RANKS][200], host[MOST_RANKS][COMM_HOST_BYTES];
};

typedef struct member {
    job *job;
    int rank;
} member;

static inline void *run_member(void *p) {
    static const link_ops ops = {post_send,   post_receive, post_test,
                                 post_cancel, post_end,     post_free};
    member *me = p;
    job *j = me->job;
    gpt_comm *comm = NULL;
    if (j->connected) {
        j->status[me->rank] = gpt_comm_connect(j->sockets[me->rank], me->rank, j->size, 20, &comm);
    } else {
        thread_links *t = calloc(1, sizeof *t);
        t->links = (links){.ops = &ops, .rank = me->rank, .size = j->size};
        t->post = &j->post, t->left = &j->left[me->rank];
        j->status[me->rank] = comm_over_links(&t->links, 20, &comm);
    }
    if (j->status[me->rank] != GPT_OK) return NULL;
    gpt_comm_set_timeout(comm, j->timeout_s);
    if (j->piece) comm->piece = j->piece, comm->copied = j->piece;
    if (me->rank != j->missing) j->run(j, comm, me->rank);
    snprintf(j->sentence[me->rank], sizeof j->sentence[0], "%s", gpt_last_error());
    snprintf(j->host[me->rank], sizeof j->host[0], "%s", gpt_comm_host(comm, j->size - 1));
    for (int rank = 0; rank < j->size; rank++)
        j->lost[me->rank] |= gpt_comm_lost(comm, rank) << rank;
    gpt_comm_free(comm);
    return NULL;
}

static inline void run_job(job *j) {
    pthread_t threads[MOST_RANKS];
    member members[MOST_RANKS];
    pthread_mutex_init(&j->post.lock, NULL);
    for (int a = 0; a < j->size; a++)
        for (int b = 0; b < j->size; b++) j->post.last[a][b] = &j->post.first[a][b];
    for (int a = 0; a < j->size && j->connected; a++)
        for (int b = 0; b < a; b++) {
            int pair[2];
            EXPECT(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
            j->sockets[a][b] = pair[0], j->sockets[b][a] = pair[1];
        }
    for (int rank = 0; rank < j->size; rank++) {
        members[rank] = (member){j, rank};
        pthread_create(&threads[rank], NULL, run_member, &members[rank]);
    }
    for (int rank = 0; rank < j->size; rank++) pthread_join(threads[rank], NULL);
    for (int a = 0; a < j->size; a++)
        for (int b = 0; b < j->size; b++)
            while (j->post.first[a][b]) {
                letter *next = j->post.first[a][b]->next;
                free(j->post.first[a][b]);
                j->post.first[a][b] = next;
            }
    pthread_mutex_destroy(&j->post.lock);
}

/* A job in which no rank fails. */
static inline void run_good_job(job *j) {
    run_job(j);
    for (int rank = 0; rank < j->size; rank++) {
        EXPECT(j->status[rank] == GPT_OK);
        if (j->status[rank] != GPT_OK) printf("rank %d: %s\n", rank, j->sentence[rank]);
    }
}

/* Of ranks that have zeros. */
static inline job blank_job(job_function *run, int size, int64_t n) {
    job j = {.run = run, .size = size, .n = n, .timeout_s = 20, .missing = -1};
    for (int rank = 0; rank < size; rank++) j.x[rank] = host_floats(n + 1);
    return j;
}

/* Of ranks that have random numbers. */
static inline job new_job(job_function *run, int size, int64_t n) {
    job j = blank_job(run, size, n);
    for (int rank = 0; rank < size; rank++)
        for (int64_t i = 0; i < n; i++) j.x[rank][i] = (float)random_normal();
    return j;
}

#endif
