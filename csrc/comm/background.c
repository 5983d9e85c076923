/* background.c: the thread's queue, in which a sum is wanted once and waits for its turn. */
#define _POSIX_C_SOURCE 200809L
#include "background.h"

#include "error.h"
#include "interrupt.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST_SUMS = 1024, SENTENCE_BYTES = 512 };

typedef struct wanted_sum {
    float *x;
    int64_t n;
    const int64_t *bounds;
    coding coding;
} wanted_sum;

struct background {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t change;
    bool ends, busy;
    double since;
    wanted_sum sums[MOST_SUMS];
    gpt_sum_span spans[MOST_SUMS];
    int n_wanted, n_done;
    int status; /* of the first that failed; the others are left out */
    char sentence[SENTENCE_BYTES];
};

/* Without the mutex: sum i is the thread's until n_done has passed it. */
static int add_one(gpt_comm *comm, background *b, int i) {
    const wanted_sum *sum = &b->sums[i];
    b->spans[i].begin_s = comm_seconds() - b->since;
    int status = sum->bounds ? comm->ops->reduce_scatter(comm, sum->x, sum->bounds, sum->coding)
                             : comm->ops->all_reduce(comm, sum->x, sum->n, sum->coding);
    b->spans[i].end_s = comm_seconds() - b->since;
    if (status != GPT_OK) snprintf(b->sentence, sizeof b->sentence, "%s", gpt_last_error());
    return status;
}

static void *work(void *given) {
    gpt_comm *comm = given;
    background *b = comm->background;
    pthread_mutex_lock(&b->mutex);
    while (!b->ends) {
        if (b->n_done == b->n_wanted) {
            pthread_cond_wait(&b->change, &b->mutex);
            continue;
        }
        int i = b->n_done;
        if (b->status == GPT_OK) {
            pthread_mutex_unlock(&b->mutex);
            int status = add_one(comm, b, i);
            pthread_mutex_lock(&b->mutex);
            b->status = status;
        }
        b->n_done++;
        pthread_cond_broadcast(&b->change);
    }
    pthread_mutex_unlock(&b->mutex);
    return NULL;
}

int background_start(gpt_comm *comm) {
    if (comm->background) return GPT_OK;
    background *b = calloc(1, sizeof *b);
    if (!b) return fail(GPT_ERR_MEMORY, "out of memory for a thread of messages");
    comm->background = b;
    pthread_mutex_init(&b->mutex, NULL);
    pthread_cond_init(&b->change, NULL);
    if (!pthread_create(&b->thread, NULL, work, comm)) return GPT_OK;
    comm->background = NULL;
    free(b);
    return fail(GPT_ERR_MEMORY, "a thread of messages does not start");
}

void background_begin(gpt_comm *comm) {
    background *b = comm->background;
    comm->ops->be_patient(comm, true);
    pthread_mutex_lock(&b->mutex);
    b->n_wanted = b->n_done = 0;
    b->status = GPT_OK;
    b->busy = true;
    b->since = comm_seconds();
    pthread_mutex_unlock(&b->mutex);
}

void background_add(gpt_comm *comm, float *x, int64_t first, int64_t n, const int64_t *bounds,
                    coding coding) {
    if (!bounds) x += first;
    if (!bounds && coding.residual) coding.residual += first;
    background *b = comm->background;
    pthread_mutex_lock(&b->mutex);
    int i = b->n_wanted++;
    b->sums[i] = (wanted_sum){x, n, bounds, coding};
    b->spans[i] = (gpt_sum_span){.first = first, .n = n, .ready_s = comm_seconds() - b->since};
    pthread_cond_broadcast(&b->change);
    pthread_mutex_unlock(&b->mutex);
}

/* For a change, with the mutex. */
static void wait_a_while(background *b) {
    const long nap_ns = 50 * 1000 * 1000, second_ns = 1000 * 1000 * 1000;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += nap_ns;
    if (until.tv_nsec >= second_ns) until.tv_nsec -= second_ns, until.tv_sec++;
    pthread_cond_timedwait(&b->change, &b->mutex, &until);
}

int background_wait(gpt_comm *comm) {
    background *b = comm->background;
    bool interrupted = false;
    pthread_mutex_lock(&b->mutex);
    while (b->n_done < b->n_wanted) {
        wait_a_while(b);
        if (!interrupted && interrupt_wanted()) comm->ops->give_up(comm), interrupted = true;
    }
    pthread_mutex_unlock(&b->mutex);
    comm->ops->be_patient(comm, false);
    b->busy = false;
    if (interrupted) return fail(GPT_ERR_INTERRUPTED, "interrupted");
    return b->status == GPT_OK ? GPT_OK : fail(b->status, "%s", b->sentence);
}

void background_give_up(gpt_comm *comm) {
    comm->ops->give_up(comm);
    background_wait(comm);
}

bool background_is_busy(const gpt_comm *comm) {
    return comm->background && comm->background->busy;
}

int background_span(const gpt_comm *comm, int i, gpt_sum_span *out) {
    const background *b = comm->background;
    if (!b || b->busy || i < 0 || i >= b->n_done) return GPT_ERR_ARGUMENT;
    *out = b->spans[i];
    return GPT_OK;
}

void background_stop(gpt_comm *comm) {
    background *b = comm->background;
    if (!b) return;
    if (b->busy) background_give_up(comm);
    pthread_mutex_lock(&b->mutex);
    b->ends = true;
    pthread_cond_broadcast(&b->change);
    pthread_mutex_unlock(&b->mutex);
    pthread_join(b->thread, NULL);
    pthread_cond_destroy(&b->change);
    pthread_mutex_destroy(&b->mutex);
    free(b);
    comm->background = NULL;
}
