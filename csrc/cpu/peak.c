/* peak.c: what this level's multiplications and this machine's memory reach, to compare with. */
#include "cpu.h"

#if defined(CPU_BF16) && defined(CPU_AMX)
#include "kernel_amx.h"
#elif defined(CPU_BF16)
#include "kernel_bf16.h"
#else
#include "simd.h"
#endif

/* The best of several short runs: others may be using the machine. */
enum { RUNS = 8, SUMS = 12, COPY_BYTES = 64 << 20, COPY_GRAIN = 1 << 20 };
#ifdef GPTC_EMULATE_AMX
enum { ROUNDS = 1 << 6 };
#else
enum { ROUNDS = 1 << 16 };
#endif

/* ROUNDS products of registers with registers, into sums enough to hide their latency. Returns what
 * keeps the compiler from leaving them out. */
#if defined(CPU_BF16) && defined(CPU_AMX)
static const double round_flops = 4 * 2.0 * TILE_ROWS * PANEL * TILE_TERMS;

static float multiply_rounds(void) {
    static const bf16 zeros[TILE_ROWS * TILE_TERMS];
    float out[TILE_ROWS * PANEL];
    kernel_begin();
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tiles_sync();
    tile_load(4, zeros, 64);
    tile_load(5, zeros, 64);
    tile_load(6, zeros, 64);
    tile_load(7, zeros, 64);
    for (int i = 0; i < ROUNDS; i++) {
        tile_dot(0, 4, 6);
        tile_dot(1, 4, 7);
        tile_dot(2, 5, 6);
        tile_dot(3, 5, 7);
    }
    tile_store(0, out, 64);
    kernel_end();
    return out[0];
}
#elif defined(CPU_BF16) && defined(__AVX512BF16__)
static const double round_flops = SUMS * 2.0 * PAIR * LANES;

static float multiply_rounds(void) {
    vf sum[SUMS];
    for (int i = 0; i < SUMS; i++) sum[i] = vf_set((float)i); /* no two alike, or one would do */
    pairs x = pairs_set(0x3f803f80);
    for (int n = 0; n < ROUNDS; n++) {
        UNROLL
        for (int i = 0; i < SUMS; i++) sum[i] = pairs_dot(sum[i], x, x);
    }
    for (int i = 1; i < SUMS; i++) sum[0] += sum[i];
    return vf_sum(sum[0]);
}
#else /* bf16 without an instruction for it is multiplied as float32 */
static const double round_flops = SUMS * 2.0 * LANES;

static float multiply_rounds(void) {
    vf sum[SUMS], x = vf_set(0.5f), y = vf_set(1);
    for (int i = 0; i < SUMS; i++) sum[i] = vf_set((float)i); /* no two alike, or one would do */
    for (int n = 0; n < ROUNDS; n++) {
        UNROLL
        for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * x + y;
    }
    for (int i = 1; i < SUMS; i++) sum[0] += sum[i];
    return vf_sum(sum[0]);
}
#endif

typedef struct peak_args {
    char *to;
    const char *from;
} peak_args;

static void multiply_task(void *p, int thread, int64_t begin, int64_t end) {
    (void)p, (void)thread;
    for (int64_t i = begin; i < end; i++) {
        volatile float kept = multiply_rounds();
        (void)kept;
    }
}

static void copy_task(void *p, int thread, int64_t begin, int64_t end) {
    (void)thread;
    const peak_args *a = p;
    memcpy(a->to + begin, a->from + begin, (size_t)(end - begin));
}

static double best_seconds(gpt_ctx *ctx, cpu_task_fn *task, peak_args *args, int64_t n,
                           int64_t grain) {
    double best = 1e30;
    for (int run = 0; run < RUNS; run++) {
        double begin = cpu_seconds();
        cpu_parallel(ctx, task, args, n, grain);
        double seconds = cpu_seconds() - begin;
        best = seconds < best ? seconds : best;
    }
    return best;
}

int cpu_peak(gpt_ctx *ctx, double *flops, double *bytes) {
    int64_t pieces = 4 * (int64_t)ctx->n_threads;
    *flops =
        (double)pieces * ROUNDS * round_flops / best_seconds(ctx, multiply_task, NULL, pieces, 1);
    if (!bytes) return 1;
    char *memory = cpu_buffer_alloc(ctx, 2 * (size_t)COPY_BYTES, BUFFER_WHOLE);
    if (!memory) return 0;
    memset(memory, 1, 2 * (size_t)COPY_BYTES);
    peak_args args = {memory + COPY_BYTES, memory};
    *bytes = 2.0 * COPY_BYTES / best_seconds(ctx, copy_task, &args, COPY_BYTES, COPY_GRAIN);
    cpu_buffer_free(ctx, memory, 2 * (size_t)COPY_BYTES);
    return 1;
}
