/* context.c: threads and memory of the CPU backend. */
#define _GNU_SOURCE
#include "cpu.h"

#include "blas.h"
#include "error.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define cpu_relax() __builtin_ia32_pause()
#else
#define cpu_relax() ((void)0)
#endif

/* How long a thread polls before it sleeps: about the time between two ops of a training step, so
 * that threads stay awake within a step and sleep while Python prepares the next batch. */
enum { SPIN = 20000 };

struct cpu_pool {
    pthread_t *threads;
    int n_workers; /* besides the caller */
    int n_started;

    /* The current job, written by the caller before generation moves on. */
    cpu_task_fn *task;
    void *args;
    int64_t n, grain;
    _Atomic int64_t next;

    _Atomic unsigned generation; /* of jobs */
    _Atomic int n_running;       /* workers that have not finished the current job */
    _Atomic int n_sleeping;
    _Atomic int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

typedef struct worker_args {
    cpu_pool *pool;
    int thread;
} worker_args;

static void take_pieces(cpu_pool *pool, int thread) {
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&pool->next, pool->grain, memory_order_relaxed);
        if (begin >= pool->n) return;
        int64_t end = begin + pool->grain < pool->n ? begin + pool->grain : pool->n;
        pool->task(pool->args, thread, begin, end);
    }
}

/* Waits until the generation is no longer `seen`: polls for a while, then sleeps. */
static void wait_for_job(cpu_pool *pool, unsigned seen) {
    for (int i = 0; i < SPIN; i++) {
        if (atomic_load_explicit(&pool->generation, memory_order_acquire) != seen) return;
        cpu_relax();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->n_sleeping, 1);
    while (atomic_load(&pool->generation) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *worker(void *p) {
    worker_args args = *(worker_args *)p;
    free(p);
    unsigned seen = 0;
    for (;;) {
        wait_for_job(args.pool, seen);
        seen++;
        if (atomic_load(&args.pool->stop)) return NULL;
        take_pieces(args.pool, args.thread);
        atomic_fetch_sub_explicit(&args.pool->n_running, 1, memory_order_release);
    }
}

static void publish(cpu_pool *pool) {
    /* Sequentially consistent on both sides: either the sleeper sees the new generation, or we see
     * the sleeper. */
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->n_sleeping) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

void cpu_parallel(gpt_ctx *ctx, cpu_task_fn *task, void *args, int64_t n, int64_t grain) {
    cpu_pool *pool = ctx->pool;
    if (n <= 0) return;
    if (!pool || n <= grain) {
        for (int64_t i = 0; i < n; i += grain) task(args, 0, i, i + grain < n ? i + grain : n);
        return;
    }
    pool->task = task;
    pool->args = args;
    pool->n = n;
    pool->grain = grain;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->n_running, pool->n_workers, memory_order_relaxed);
    publish(pool);
    take_pieces(pool, 0);
    for (int i = 0; atomic_load_explicit(&pool->n_running, memory_order_acquire) > 0; i++) {
        if (i < SPIN)
            cpu_relax();
        else
            sched_yield(); /* more threads than cores: let the others finish */
    }
}

static void pool_free(cpu_pool *pool) {
    if (!pool) return;
    atomic_store(&pool->stop, 1);
    publish(pool);
    for (int i = 0; i < pool->n_started; i++) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->threads);
    free(pool);
}

static int pool_create(cpu_pool **out, int n_workers) {
    cpu_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return fail(GPT_ERR_MEMORY, "no memory for the thread pool");
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = calloc((size_t)n_workers, sizeof *pool->threads);
    for (int i = 0; pool->threads && i < n_workers; i++) {
        worker_args *args = malloc(sizeof *args);
        if (!args) break;
        *args = (worker_args){pool, i + 1};
        if (pthread_create(&pool->threads[i], NULL, worker, args)) {
            free(args);
            break;
        }
        pool->n_started++;
    }
    pool->n_workers = n_workers;
    if (pool->n_started < n_workers) {
        pool_free(pool);
        return fail(GPT_ERR_MEMORY, "could not start %d threads; try fewer", n_workers + 1);
    }
    *out = pool;
    return GPT_OK;
}

int gpt_cpu_count(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

int cpu_ctx_create(gpt_ctx **out, int n_threads) {
    gpt_ctx *ctx = calloc(1, sizeof *ctx);
    if (!ctx) return fail(GPT_ERR_MEMORY, "no memory for the context");
    ctx->n_threads = n_threads > 0 ? n_threads : gpt_cpu_count();
    int status = ctx->n_threads > 1 ? pool_create(&ctx->pool, ctx->n_threads - 1) : GPT_OK;
    if (status != GPT_OK) {
        free(ctx);
        return status;
    }
    blas_use_one_thread(); /* our tiles are the parallelism: one pool, ours */
    *out = ctx;
    return GPT_OK;
}

void cpu_ctx_free(gpt_ctx *ctx) {
    if (!ctx) return;
    pool_free(ctx->pool);
    free(ctx);
}

int cpu_ctx_threads(const gpt_ctx *ctx) {
    return ctx->n_threads;
}

void cpu_ctx_set_workspace(gpt_ctx *ctx, void *workspace) {
    ctx->workspace = workspace;
}

int cpu_sync(gpt_ctx *ctx) {
    (void)ctx;
    return GPT_OK;
}

/* Straight from the kernel: zeroed, touched only as it is used, in huge pages where it can. */
void *cpu_buffer_alloc(gpt_ctx *ctx, size_t bytes) {
    (void)ctx;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}

void cpu_buffer_free(gpt_ctx *ctx, void *buffer, size_t bytes) {
    (void)ctx;
    if (buffer) munmap(buffer, bytes);
}

void cpu_upload(gpt_ctx *ctx, void *device, const void *host, size_t bytes) {
    (void)ctx;
    memcpy(device, host, bytes);
}

void cpu_download(gpt_ctx *ctx, void *host, const void *device, size_t bytes) {
    (void)ctx;
    memcpy(host, device, bytes);
}

static void zero_task(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    memset((char *)args + begin, 0, (size_t)(end - begin));
}

void cpu_zero(gpt_ctx *ctx, void *device, size_t bytes) {
    cpu_parallel(ctx, zero_task, device, (int64_t)bytes, 1 << 20);
}
