/* context.c: threads and memory of the CPU backend. */
#define _GNU_SOURCE
#include "cpu.h"

#include "blas.h"
#include "error.h"
#include "fork.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define cpu_relax() __builtin_ia32_pause()
#else
#define cpu_relax() ((void)0)
#endif

/* What a task wrote past the caches (simd.h: vf_stream) comes before what its thread writes next. */
#ifdef __SSE__
#define finish_streams() __builtin_ia32_sfence()
#else
#define finish_streams() ((void)0)
#endif

/* How long a thread polls before it sleeps or lets others run: about the time between two ops of a
 * training step, so that threads stay awake within a step and sleep while Python prepares the next
 * batch. */
enum { SPIN = 20000 };

/* Below this many bytes nobody asks whether there is memory for a buffer. */
enum { SMALL_BUFFER = 64 << 20 };

struct cpu_pool {
    const gpt_ctx *ctx;
    int forks; /* fork_count() of the process that has the threads */
    pthread_t *threads;
    int n_started;

    /* The current job. A thread may read these while the next job is being written; what it read
     * counts only if it then wins a ticket, and while a job is being written none can be won. */
    _Atomic(cpu_task_fn *) task;
    _Atomic(void *) args;
    _Atomic int64_t n, grain;

    _Atomic uint64_t ticket; /* generation << 32 | the next piece to take */
    _Atomic int64_t n_done;  /* pieces of the current job that are finished */
    _Atomic int n_sleeping;
    _Atomic int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

#define CLOSED UINT32_MAX /* the piece of a ticket while a job is being written: none */

typedef struct worker_args {
    cpu_pool *pool;
    int thread;
} worker_args;

static uint32_t generation_of(uint64_t ticket) {
    return (uint32_t)(ticket >> 32);
}

double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void run_piece(const gpt_ctx *ctx, cpu_task_fn *task, void *args, int thread, int64_t begin,
                      int64_t end) {
    double started = ctx->busy ? cpu_seconds() : 0;
    task(args, thread, begin, end);
    finish_streams();
    if (ctx->busy) ctx->busy[thread] += cpu_seconds() - started;
}

/* Takes pieces of one generation until there are none. The caller waits for finished pieces, not
 * for threads: one that the system does not run in time takes nothing and holds up nobody. */
static void take_pieces(cpu_pool *pool, int thread, uint32_t generation) {
    uint64_t ticket = atomic_load(&pool->ticket);
    while (generation_of(ticket) == generation) {
        cpu_task_fn *task = atomic_load_explicit(&pool->task, memory_order_relaxed);
        void *args = atomic_load_explicit(&pool->args, memory_order_relaxed);
        int64_t n = atomic_load_explicit(&pool->n, memory_order_relaxed);
        int64_t grain = atomic_load_explicit(&pool->grain, memory_order_relaxed);
        int64_t begin = (int64_t)(uint32_t)ticket * grain;
        if (begin >= n || (uint32_t)ticket == CLOSED) return;
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) continue;
        run_piece(pool->ctx, task, args, thread, begin, begin + grain < n ? begin + grain : n);
        atomic_fetch_add_explicit(&pool->n_done, 1, memory_order_release);
        ticket = atomic_load(&pool->ticket);
    }
}

/* One turn of a waiting loop: polls at first, then gives the core to whoever needs it. */
static void wait_a_moment(int turn) {
    if (turn % 64 == 63 && turn > SPIN / 10)
        sched_yield();
    else
        cpu_relax();
}

/* Waits for a generation other than `seen` and returns it: polls for a while, then sleeps. */
static uint32_t wait_for_job(cpu_pool *pool, uint32_t seen) {
    uint32_t generation;
    for (int i = 0; i < SPIN; i++) {
        generation = generation_of(atomic_load(&pool->ticket));
        if (generation != seen) return generation;
        wait_a_moment(i);
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->n_sleeping, 1);
    while ((generation = generation_of(atomic_load(&pool->ticket))) == seen)
        pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    pthread_mutex_unlock(&pool->mutex);
    return generation;
}

static void *worker(void *p) {
    worker_args args = *(worker_args *)p;
    free(p);
    for (uint32_t generation = 0;;) {
        generation = wait_for_job(args.pool, generation);
        if (atomic_load(&args.pool->stop)) return NULL;
        take_pieces(args.pool, args.thread, generation);
    }
}

/* Before the next job is written: no ticket of the last one can be won any more, not even by a
 * thread that read it long ago. */
static void close_job(cpu_pool *pool) {
    uint64_t generation = generation_of(atomic_load(&pool->ticket));
    atomic_store(&pool->ticket, generation << 32 | CLOSED);
}

/* Starts the next generation and returns it. Sequentially consistent on both sides: either a thread
 * on its way to sleep sees the new generation, or we see that it sleeps. */
static uint32_t publish(cpu_pool *pool) {
    uint32_t generation = generation_of(atomic_load(&pool->ticket)) + 1;
    atomic_store(&pool->ticket, (uint64_t)generation << 32);
    if (atomic_load(&pool->n_sleeping) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    return generation;
}

static int pool_create(cpu_pool **out, const gpt_ctx *ctx, int pin);

/* The pool, started again in a process that was forked from the one with its threads: the lock and the
 * condition are theirs, and a wait for them would not end. Without threads, the caller does it all. */
static cpu_pool *pool_of(gpt_ctx *ctx) {
    if (ctx->pool && ctx->pool->forks != fork_count()) {
        ctx->pool = NULL; /* what little memory it has stays behind */
        pool_create(&ctx->pool, ctx, 0);
    }
    return ctx->pool;
}

void cpu_parallel(gpt_ctx *ctx, cpu_task_fn *task, void *args, int64_t n, int64_t grain) {
    cpu_pool *pool = pool_of(ctx);
    if (n <= 0) return;
    if (!pool || n <= grain) {
        for (int64_t i = 0; i < n; i += grain)
            run_piece(ctx, task, args, 0, i, i + grain < n ? i + grain : n);
        return;
    }
    close_job(pool);
    atomic_store_explicit(&pool->task, task, memory_order_relaxed);
    atomic_store_explicit(&pool->args, args, memory_order_relaxed);
    atomic_store_explicit(&pool->n, n, memory_order_relaxed);
    atomic_store_explicit(&pool->grain, grain, memory_order_relaxed);
    atomic_store_explicit(&pool->n_done, 0, memory_order_relaxed);
    take_pieces(pool, 0, publish(pool));
    int64_t n_pieces = cpu_div_up(n, grain);
    for (int i = 0; atomic_load_explicit(&pool->n_done, memory_order_acquire) < n_pieces; i++)
        wait_a_moment(i < SPIN ? i : i % SPIN + SPIN);
}

static void pool_free(cpu_pool *pool) {
    if (!pool || pool->forks != fork_count()) return;
    atomic_store(&pool->stop, 1);
    publish(pool);
    for (int i = 0; i < pool->n_started; i++) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->threads);
    free(pool);
}

/* Keeps a thread on the i-th core that this process may use; where there are fewer, it is left free.
 * The caller of the pool is thread 0, and whoever made it may move it. */
static void pin_thread(pthread_t thread, int i) {
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed) || i-- > 0) continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_setaffinity_np(thread, sizeof one, &one);
        return;
    }
}

/* The library's threads take no signals that the program would handle: those are its own threads'
 * business. Faults stay where they happen. */
static void block_signals(sigset_t *before) {
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    sigset_t all;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, before);
}

static int pool_create(cpu_pool **out, const gpt_ctx *ctx, int pin) {
    int n_workers = ctx->n_threads - 1;
    cpu_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return fail(GPT_ERR_MEMORY, "no memory for the thread pool");
    pool->ctx = ctx;
    pool->forks = fork_count();
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = calloc((size_t)n_workers, sizeof *pool->threads);
    sigset_t before;
    block_signals(&before);
    for (int i = 0; pool->threads && i < n_workers; i++) {
        worker_args *args = malloc(sizeof *args);
        if (!args) break;
        *args = (worker_args){pool, i + 1};
        if (pthread_create(&pool->threads[i], NULL, worker, args)) {
            free(args);
            break;
        }
        if (pin) pin_thread(pool->threads[i], i + 1);
        pool->n_started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
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

int cpu_ctx_create(gpt_ctx **out, int n_threads, int pin) {
    gpt_ctx *ctx = calloc(1, sizeof *ctx);
    if (!ctx) return fail(GPT_ERR_MEMORY, "no memory for the context");
    ctx->n_threads = n_threads > 0 ? n_threads : gpt_cpu_count();
    ctx->busy_memory = calloc((size_t)ctx->n_threads, sizeof *ctx->busy_memory);
    int status = ctx->busy_memory ? GPT_OK : fail(GPT_ERR_MEMORY, "no memory for the context");
    if (status == GPT_OK && ctx->n_threads > 1) status = pool_create(&ctx->pool, ctx, pin);
    if (status != GPT_OK) {
        free(ctx->busy_memory);
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
    free(ctx->busy_memory);
    free(ctx);
}

/* Between two ops no thread is at work, and none looks at this before it has taken a piece. */
void cpu_ctx_measure(gpt_ctx *ctx, int on) {
    memset(ctx->busy_memory, 0, sizeof(double) * (size_t)ctx->n_threads);
    ctx->busy = on ? ctx->busy_memory : NULL;
}

double cpu_ctx_busy_seconds(const gpt_ctx *ctx, int thread) {
    return thread >= 0 && thread < ctx->n_threads ? ctx->busy_memory[thread] : 0;
}

int cpu_ctx_threads(const gpt_ctx *ctx) {
    return ctx->n_threads;
}

int cpu_sync(gpt_ctx *ctx) {
    (void)ctx;
    return GPT_OK;
}

/* The number that follows a word in a file of the kernel's; SIZE_MAX where there is none. */
static size_t kernel_number(const char *path, const char *word) {
    unsigned long long number;
    char line[128];
    size_t found = SIZE_MAX, length = strlen(word);
    FILE *file = fopen(path, "r");
    while (file && found == SIZE_MAX && fgets(line, sizeof line, file))
        if (!strncmp(line, word, length) && sscanf(line + length, "%llu", &number) == 1)
            found = number;
    if (file) fclose(file);
    return found;
}

/* The memory available without swapping, by Linux's estimate, and within the container's limit
 * (cgroup v2); no limit where neither is known. */
size_t cpu_memory_free(void) {
    size_t available = kernel_number("/proc/meminfo", "MemAvailable:");
    if (available < SIZE_MAX) available <<= 10;
    size_t most = kernel_number("/sys/fs/cgroup/memory.max", "");
    size_t used = kernel_number("/sys/fs/cgroup/memory.current", "");
    if (most == SIZE_MAX || used == SIZE_MAX) return available;
    size_t left = most > used ? most - used : 0;
    return left < available ? left : available;
}

/* Straight from the kernel: zeroed, touched only as it is used. Huge pages make large products faster. In a cache,
 * whose heads are megabytes apart, each would be taken and cleared for one token. */
void *cpu_buffer_alloc(gpt_ctx *ctx, size_t bytes, buffer_use use) {
    (void)ctx;
    /* The kernel promises more than it has, and would end the process when it is used. */
    if (bytes > SMALL_BUFFER && bytes > cpu_memory_free()) return NULL;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    madvise(p, bytes, use == BUFFER_WHOLE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
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

void cpu_download_rows(gpt_ctx *ctx, void *host, const void *device, int rows, size_t bytes,
                       size_t stride) {
    (void)ctx;
    for (int row = 0; row < rows; row++)
        memcpy((char *)host + (size_t)row * bytes, (const char *)device + (size_t)row * stride,
               bytes);
}

void cpu_copy(gpt_ctx *ctx, void *to, const void *from, size_t bytes) {
    (void)ctx;
    memcpy(to, from, bytes);
}

static void zero_task(void *args, int thread, int64_t begin, int64_t end) {
    (void)thread;
    memset((char *)args + begin, 0, (size_t)(end - begin));
}

void cpu_zero(gpt_ctx *ctx, void *device, size_t bytes) {
    cpu_parallel(ctx, zero_task, device, (int64_t)bytes, 1 << 20);
}
