/* fork.c: counts, in each child, the forks that led to it. */
#include "fork.h"

#include <pthread.h>
#include <stdatomic.h>

static atomic_int forks;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void count(void) {
    atomic_fetch_add(&forks, 1);
}

static void begin(void) {
    pthread_atfork(NULL, NULL, count);
}

int fork_count(void) {
    pthread_once(&once, begin);
    return atomic_load_explicit(&forks, memory_order_relaxed);
}
