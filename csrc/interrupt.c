/* interrupt.c: asks, between layers, whether to go on. */
#include "interrupt.h"

#include "gpt.h"

#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

typedef int (*question)(void);

static _Atomic(question) interrupted;
static _Atomic double interval;
static _Thread_local double last;

void gpt_set_interrupt(int (*function)(void), double seconds) {
    atomic_store(&interval, seconds);
    atomic_store(&interrupted, function);
}

bool interrupt_wanted(void) {
    question ask = atomic_load_explicit(&interrupted, memory_order_relaxed);
    if (!ask) return false;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    double now = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    if (now - last < atomic_load_explicit(&interval, memory_order_relaxed)) return false;
    last = now;
    return ask() != 0;
}
