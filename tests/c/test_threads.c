/* test_threads.c: the thread pool runs every item exactly once, with more threads than cores too. */
#include "cpu/cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 300, ROUNDS = 20000 };

static void count(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    int *seen = args;
    for (int64_t i = begin; i < end; i++) seen[i]++;
}

/* Jobs of odd sizes follow each other as fast as they can, so that threads which wake up late meet
 * the jobs after theirs. */
static long stress(int n_threads) {
    static int seen[MOST];
    long wrong = 0;
    gpt_ctx *ctx;
    if (cpu_ctx_create(&ctx, n_threads, 0) != GPT_OK) return 1;
    for (int round = 0; round < ROUNDS; round++) {
        int n = 1 + round * 7 % MOST, grain = 1 + round % 5;
        memset(seen, 0, sizeof seen);
        cpu_parallel(ctx, count, seen, n, grain);
        for (int i = 0; i < MOST; i++) wrong += seen[i] != (i < n);
    }
    cpu_ctx_free(ctx);
    return wrong;
}

int main(void) {
    long wrong = 0;
    for (int n_threads = 1; n_threads <= 5; n_threads++) {
        long here = stress(n_threads);
        printf("%d threads: %d jobs, %ld items run a wrong number of times\n", n_threads, ROUNDS,
               here);
        wrong += here;
    }
    return wrong != 0;
}
