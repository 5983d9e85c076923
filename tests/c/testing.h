/* testing.h: what the C tests share. Include it first.
 *
 * A test program is a list of entries. An entry computes inputs and a float64 answer (reference.h),
 * then runs the op in an EACH_BACKEND loop and compares:
 *
 *     test_case("N=%d C=%d", N, C);
 *     double *x = random_act((int64_t)N * C, 1.0);
 *     ... the answer, in float64 ...
 *     EACH_BACKEND {
 *         void *out = device_act(NULL, (int64_t)N * C);
 *         test_workspace(&shape);
 *         test.ops->some_op(test.ctx, out, device_act(x, (int64_t)N * C), N, C);
 *         EXPECT_CLOSE("out", read_act(out, (int64_t)N * C), want, N, C, test_tol(1e-5));
 *     }
 *
 * The loop visits every table of backend_ops_at() (those whose name contains GPTC_TEST_TABLES, where
 * that is set) with 1, 2 and 3 threads. A device, and either two or three threads, come twice:
 * the second visit starts from other garbage in the workspace and must repeat every compared number
 * bit for bit. Under AddressSanitizer a case visits a table once (test_is_turn). Short tests visit half of
 * the tables there, and repeat half of a device's cases. Entries run once for each element size that a
 * table has, because inputs are rounded to that type before the answer is computed.
 *
 * All data moves through buffer_alloc, upload and download, so that nothing here knows a device.
 * Device buffers carry a guard of NaNs, so that a stray write is seen and a stray read spoils the
 * result; under AddressSanitizer the guard of a CPU buffer may not be touched at all. */
#ifndef GPTC_TESTING_H
#define GPTC_TESTING_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include "backend.h"
#include "ops.h"

#include <float.h>
#include <limits.h>
#include <malloc.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
/* Whether an op repeats itself, and the numbers of each case with each number of threads, are another
 * build's question: here a case visits a table once, with the next number of threads each time. */
enum { TEST_PASSES = 1, TEST_ROTATES = 1 };
/* Of the float64 code in which a test spends more time than in what it tests. */
#define TEST_REFERENCE __attribute__((no_sanitize("address,undefined")))
#else
enum { TEST_PASSES = 2, TEST_ROTATES = 0 };
#define TEST_REFERENCE
#define ASAN_POISON_MEMORY_REGION(data, bytes)   ((void)(data), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#endif

enum {
    TEST_GUARD_BYTES = 64,
    TEST_LEAST_ROOM = 4096, /* a page */
    TEST_MAX_TABLES = 32,
    TEST_MAX_THREADS = 3,
    TEST_FAILURES_SHOWN = 12,
    TEST_GARBAGE = 0xff, /* four of these bytes are a NaN as float32, two are one as bfloat16 */
};

typedef struct test_block {
    struct test_block *next;
    size_t bytes; /* without the guard */
    size_t room;  /* of a device's buffer, and of host memory that is kept; else 0 */
    void *data;
    const gpt_ops *ops; /* of a device's buffer, with its context */
    gpt_ctx *ctx;
} test_block;

/* The program's state. Tests read ops, ctx, threads and act_bytes. */
static struct {
    const gpt_ops *ops; /* NULL outside an EACH_BACKEND loop */
    gpt_ctx *ctx;
    int threads;
    size_t act_bytes; /* of the entry that runs: 4 is float32, 2 is bfloat16 */

    const gpt_ops *tables[TEST_MAX_TABLES];
    gpt_ctx *contexts[TEST_MAX_TABLES][TEST_MAX_THREADS];
    int n_tables;
    int visit; /* counts (table, threads, pass) in an EACH_BACKEND loop; -1 outside */
    int n_cases;

    test_block *host, *host_before; /* as it was when the visit began */
    test_block *kept;               /* large host memory that was freed */
    test_block *device;
    test_block
        *spare; /* buffers of earlier visits, which later ones use again: on a GPU, the case's */
    test_block *recorded, **recorded_at; /* what pass 0 compared, in order; the cursor of pass 1 */
    uint64_t counter;                    /* of the random inputs; starts again with each case */

    const char *entry;
    const char *target; /* where a test of gpt.h runs: see models.h */
    char sizes[200];
    long n_checks, n_failures;
} test;

/* ---- failures ---- */

static inline const char *test_basename(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

__attribute__((format(printf, 3, 4))) static inline void test_fail(const char *file, int line,
                                                                   const char *format, ...) {
    if (++test.n_failures > TEST_FAILURES_SHOWN) return;
    fprintf(stderr, "%s:%d: %s", test_basename(file), line, test.entry ? test.entry : "");
    if (test.sizes[0]) fprintf(stderr, " [%s]", test.sizes);
    if (test.ops) fprintf(stderr, " [%s, %d threads]", test.ops->name, test.threads);
    if (test.target) fprintf(stderr, " [%s]", test.target);
    fprintf(stderr, ": ");
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

static inline void test_expect(int ok, const char *file, int line, const char *text) {
    test.n_checks++;
    if (!ok) test_fail(file, line, "not true: %s", text);
}
#define EXPECT(condition) test_expect(!!(condition), __FILE__, __LINE__, #condition)

/* ---- host memory: lives until the visit of EACH_BACKEND ends, or the next test_case begins ---- */

/* Memory of so many bytes is kept for later: giving pages back to the kernel and taking them again
 * takes AddressSanitizer longer than the tests. What is not in use may not be touched. */
enum { TEST_KEPT_BYTES = 1 << 16 };

static inline test_block *test_new_host_block(size_t bytes) {
    size_t room = 0;
    if (bytes >= TEST_KEPT_BYTES) {
        for (room = TEST_KEPT_BYTES; room < bytes;) room *= 2;
        for (test_block **at = &test.kept; *at; at = &(*at)->next) {
            test_block *block = *at;
            if (block->room != room) continue;
            *at = block->next;
            return block;
        }
    }
    test_block *block = malloc(sizeof *block);
    void *data = malloc(room ? room : bytes ? bytes : 1);
    if (!block || !data) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    *block = (test_block){.room = room, .data = data};
    return block;
}

static inline void *test_alloc(test_block **list, size_t bytes) {
    test_block *block = test_new_host_block(bytes);
    if (block->room) {
        ASAN_UNPOISON_MEMORY_REGION(block->data, bytes);
        ASAN_POISON_MEMORY_REGION((char *)block->data + bytes, block->room - bytes);
    }
    block->bytes = bytes;
    block->next = *list;
    *list = block;
    return block->data;
}

static inline void test_free_until(test_block **list, const test_block *end) {
    while (*list != end) {
        test_block *block = *list;
        *list = block->next;
        if (block->room) {
            ASAN_POISON_MEMORY_REGION(block->data, block->room);
            block->next = test.kept;
            test.kept = block;
        } else {
            free(block->data);
            free(block);
        }
    }
}

static inline void test_free_kept(void) {
    while (test.kept) {
        test_block *block = test.kept;
        ASAN_UNPOISON_MEMORY_REGION(block->data, block->room);
        test.kept = block->next;
        free(block->data);
        free(block);
    }
}

static inline void test_free_list(test_block **list) {
    test_free_until(list, NULL);
}

/* n numbers, to be written. */
static inline double *host_doubles(int64_t n) {
    return test_alloc(&test.host, (size_t)n * sizeof(double));
}

/* n numbers, zero. */
static inline double *host_zeros(int64_t n) {
    double *x = host_doubles(n);
    for (int64_t i = 0; i < n; i++) x[i] = 0.0;
    return x;
}

static inline double *host_copy(const double *x, int64_t n) {
    double *copy = test_alloc(&test.host, (size_t)n * sizeof *copy);
    memcpy(copy, x, (size_t)n * sizeof *copy);
    return copy;
}

static inline int32_t *host_ints(int64_t n) {
    int32_t *x = test_alloc(&test.host, (size_t)n * sizeof *x);
    memset(x, 0, (size_t)n * sizeof *x);
    return x;
}

static inline float *host_floats(int64_t n) {
    float *x = test_alloc(&test.host, (size_t)n * sizeof *x);
    memset(x, 0, (size_t)n * sizeof *x);
    return x;
}

static inline int test_is_of_cpu(const gpt_ops *ops) {
    return strncmp(ops->name, "cpu", 3) == 0;
}

/* Frees buffers that are not in use: the GPU's, or all. */
static inline void test_free_spare(int all) {
    for (test_block **at = &test.spare; *at;) {
        test_block *block = *at;
        if (!all && test_is_of_cpu(block->ops)) {
            at = &block->next;
            continue;
        }
        ASAN_UNPOISON_MEMORY_REGION(block->data, block->room);
        block->ops->buffer_free(block->ctx, block->data, block->room);
        *at = block->next;
        free(block);
    }
}

/* Starts a case: names its sizes for messages, frees the last one's memory, restarts the inputs. */
__attribute__((format(printf, 1, 2))) static inline void test_case(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(test.sizes, sizeof test.sizes, format, args);
    va_end(args);
    test_free_list(&test.host);
    test_free_spare(0);
    test.counter = 0;
    test.n_cases++;
}

/* ---- random inputs, from a counter ---- */

/* Another mixer than counter_bits, so that inputs and dropout decisions are unrelated (the 64-bit
 * finaliser of MurmurHash3: Appleby 2011). */
static inline uint64_t random_bits(void) {
    uint64_t z = ++test.counter * 0xd1342543de82ef95ull;
    z = (z ^ (z >> 33)) * 0xff51afd7ed558ccdull;
    z = (z ^ (z >> 33)) * 0xc4ceb9fe1a85ec53ull;
    return z ^ (z >> 33);
}

/* In [0, 1). */
static inline double random_uniform(void) {
    return (double)(random_bits() >> 11) * 0x1p-53;
}

static inline int random_below(int n) {
    return (int)(random_uniform() * n);
}

/* Standard normal: Box and Muller 1958. */
static inline double random_normal(void) {
    double radius = sqrt(-2.0 * log(1.0 - random_uniform()));
    return radius * cos(6.283185307179586 * random_uniform());
}

static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Rounds to the nearest bfloat16, ties to even. */
static inline uint16_t bf16_of_float(float x) {
    uint32_t bits = bits_of_float(x);
    if (isnan(x)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float float_of_bf16(uint16_t x) {
    return float_of_bits((uint32_t)x << 16);
}

/* x as the entry's element type holds it. */
static inline double round_act(double x) {
    return test.act_bytes == 4 ? (float)x : float_of_bf16(bf16_of_float((float)x));
}

static inline double *random_f32(int64_t n, double scale) {
    double *x = host_doubles(n);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(scale * random_normal());
    return x;
}

static inline double *random_act(int64_t n, double scale) {
    double *x = host_doubles(n);
    for (int64_t i = 0; i < n; i++) x[i] = round_act(scale * random_normal());
    return x;
}

static inline int32_t *random_ints(int64_t n, int below) {
    int32_t *x = host_ints(n);
    for (int64_t i = 0; i < n; i++) x[i] = random_below(below);
    return x;
}

/* The tolerance of a comparison, by element type. A bfloat16 has 8 bits, and an op may round what
 * it holds between two products once more. */
static inline double test_tols(double fp32, double bf16) {
    return test.act_bytes == 4 ? fp32 : bf16;
}
static inline double test_tol(double fp32) {
    return test_tols(fp32, 2e-2);
}

/* ---- device memory: lives for one visit of EACH_BACKEND ---- */

static inline int test_on_cpu(void) {
    return test_is_of_cpu(test.ops);
}

/* A buffer with its guard: a spare one if there is one of this room, which saves the kernel zeroing pages,
 * half of a test's time. A CPU's has up to twice the room, so that other cases can use it; AddressSanitizer
 * knows where it ends. A GPU's ends with its guard. */
static inline test_block *test_new_block(size_t bytes) {
    size_t needed = bytes + TEST_GUARD_BYTES, room = needed;
    if (test_on_cpu())
        for (room = TEST_LEAST_ROOM; room < needed;) room *= 2;
    for (test_block **at = &test.spare; *at; at = &(*at)->next) {
        test_block *block = *at;
        if (block->room != room || block->ops->buffer_alloc != test.ops->buffer_alloc) continue;
        *at = block->next;
        ASAN_UNPOISON_MEMORY_REGION(block->data, room);
        block->bytes = bytes;
        return block;
    }
    test_block *block = malloc(sizeof *block);
    void *data = test.ops->buffer_alloc(test.ctx, room, BUFFER_WHOLE);
    if (!data || !block) {
        fprintf(stderr, "no device memory for %zu bytes\n", room);
        exit(2);
    }
    *block =
        (test_block){.bytes = bytes, .room = room, .data = data, .ops = test.ops, .ctx = test.ctx};
    return block;
}

/* A buffer of these bytes, NULL: of garbage, and its guard. */
static inline void *test_device_filled(const void *values, size_t bytes, int garbage) {
    test_block *block = test_new_block(bytes), *temporary = NULL;
    void *data = block->data, *end = (char *)data + bytes;
    unsigned char guard[TEST_GUARD_BYTES];
    memset(guard, TEST_GARBAGE, sizeof guard);
    if (!values) values = memset(test_alloc(&temporary, bytes), garbage, bytes);
    test.ops->upload(test.ctx, data, values, bytes);
    test.ops->upload(test.ctx, end, guard, sizeof guard);
    test_free_list(&temporary);
    if (test_on_cpu()) ASAN_POISON_MEMORY_REGION(end, block->room - bytes);
    block->next = test.device;
    test.device = block;
    return data;
}

static inline void *test_device_alloc(size_t bytes, int garbage) {
    return test_device_filled(NULL, bytes, garbage);
}

static inline void test_check_guard(const test_block *block) {
    unsigned char guard[TEST_GUARD_BYTES];
    char *end = (char *)block->data + block->bytes;
    if (test_on_cpu()) ASAN_UNPOISON_MEMORY_REGION(end, sizeof guard);
    test.ops->download(test.ctx, guard, end, sizeof guard);
    for (size_t i = 0; i < sizeof guard; i++) {
        if (guard[i] == TEST_GARBAGE) continue;
        test_fail(__FILE__, __LINE__, "a buffer of %zu bytes was written past its end, at byte %zu",
                  block->bytes, block->bytes + i);
        break;
    }
}

static inline void test_free_device(void) {
    while (test.device) {
        test_block *block = test.device;
        test_check_guard(block);
        test.device = block->next;
        block->next = test.spare;
        test.spare = block;
        if (test_on_cpu()) /* until it is used again */
            ASAN_POISON_MEMORY_REGION(block->data, block->room);
    }
}

/* Each device_* uploads n numbers; NULL fills with NaNs, for outputs that an op must overwrite. */
static inline void *device_f32(const double *values, int64_t n) {
    size_t bytes = (size_t)n * 4;
    if (!values) return test_device_alloc(bytes, TEST_GARBAGE);
    test_block *temporary = NULL;
    float *host = test_alloc(&temporary, bytes);
    for (int64_t i = 0; i < n; i++) host[i] = (float)values[i];
    void *data = test_device_filled(host, bytes, 0);
    test_free_list(&temporary);
    return data;
}

static inline void *device_act(const double *values, int64_t n) {
    if (test.ops->act_bytes == 4) return device_f32(values, n);
    size_t bytes = (size_t)n * 2;
    if (!values) return test_device_alloc(bytes, TEST_GARBAGE);
    test_block *temporary = NULL;
    uint16_t *host = test_alloc(&temporary, bytes);
    for (int64_t i = 0; i < n; i++) host[i] = bf16_of_float((float)values[i]);
    void *data = test_device_filled(host, bytes, 0);
    test_free_list(&temporary);
    return data;
}

static inline void *device_i32(const int32_t *values, int64_t n) {
    return test_device_filled(values, (size_t)n * 4, 0);
}

/* A weight matrix as the products of this table read it: all that backward needs too. */
static inline void *device_weight(const double *values, int rows, int cols, int parts) {
    int64_t n = (int64_t)rows * cols;
    size_t bytes = test.ops->weights_bytes(rows, cols, parts, 1);
    void *params = device_f32(values, n);
    if (bytes == 0) return params;
    gpt_segment segment = {.size = n,
                           .rows = rows,
                           .cols = cols,
                           .parts = parts,
                           .packed = test_device_alloc(bytes, TEST_GARBAGE)};
    test.ops->weights_pack(test.ctx,
                           &(weights_pack){.w = params, .segment = &segment, .training = 1});
    return segment.packed;
}

/* A bias as the products of this table read it; NULL: none. */
static inline void *device_bias(const double *values, int n) {
    if (!values) return NULL;
    return test.ops->packs_biases ? device_weight(values, n, 1, 0) : device_f32(values, n);
}

/* A dropout on the host, for dropout_at, and the same for an op: with its key on the device. */
static inline gpt_dropout_site host_dropout(float p, uint64_t site) {
    static const uint64_t key = 0x51ed2701abcdefull;
    return (gpt_dropout_site){.p = p, .site = site, .key = &key};
}

static inline gpt_dropout_site device_dropout(gpt_dropout_site host) {
    if (host.p == 0) return (gpt_dropout_site){0};
    host.key = test_device_filled(host.key, sizeof *host.key, 0);
    return host;
}

static inline double *read_f32(const void *device, int64_t n) {
    EXPECT(test.ops->sync(test.ctx) == GPT_OK);
    float *host = host_floats(n);
    test.ops->download(test.ctx, host, device, (size_t)n * 4);
    double *x = host_doubles(n);
    for (int64_t i = 0; i < n; i++) x[i] = host[i];
    return x;
}

/* What head_forward wrote, (N, V) on the host. */
static inline double *read_head(const void *device, int N, int V, int Vp) {
    int64_t n = (int64_t)N * V;
    float *host = host_floats(n);
    test.ops->download_rows(test.ctx, host, device, N, sizeof *host * (size_t)V,
                            sizeof *host * (size_t)(test.ops->pads_logits ? Vp : V));
    double *values = host_doubles(n);
    for (int64_t i = 0; i < n; i++) values[i] = host[i];
    return values;
}

static inline double *read_act(const void *device, int64_t n) {
    if (test.ops->act_bytes == 4) return read_f32(device, n);
    EXPECT(test.ops->sync(test.ctx) == GPT_OK);
    uint16_t *host = test_alloc(&test.host, (size_t)n * 2);
    test.ops->download(test.ctx, host, device, (size_t)n * 2);
    double *x = host_doubles(n);
    for (int64_t i = 0; i < n; i++) x[i] = float_of_bf16(host[i]);
    return x;
}

/* Exactly the workspace that ops on this shape ask for, full of garbage. */
static inline void test_workspace(const gpt_shape *shape) {
    size_t bytes = test.ops->workspace_bytes(test.ctx, shape);
    int garbage = test.visit % TEST_PASSES ? 0x3f : TEST_GARBAGE;
    void *workspace = bytes ? test_device_alloc(bytes, garbage) : NULL;
    test.ops->ctx_set_workspace(test.ctx, workspace);
}

/* ---- comparisons ---- */

/* Whether lists of sizes and of something else are crossed in part: each of both is met, but few pairs.
 * For builds that take long (GPTC_TEST_SIZES=short); a plain build meets the pairs. */
static inline int test_is_short(void) {
    const char *sizes = getenv("GPTC_TEST_SIZES");
    return sizes && strcmp(sizes, "short") == 0;
}
static inline int test_step(int step) {
    return test_is_short() ? step : 1;
}

/* True for half of the cases, as a hash has it, so that it does not go with an option of a list of cases. */
static inline int test_is_half(void) {
    uint32_t x = (uint32_t)test.n_cases * 2654435761u;
    x = (x ^ x >> 15) * 2246822519u;
    return x >> 31;
}

/* Whether a second visit follows the first: on a device, in short tests for half of the cases; on a CPU with two
 * threads, or with three. */
static inline int test_repeats(void) {
    if (TEST_PASSES == 1) return 0;
    if (!test_on_cpu()) return !test_is_short() || test_is_half();
    return test.threads == 2 + test_is_half();
}

/* In pass 0 keeps what an EACH_BACKEND loop compared; in pass 1 the same call must see the same
 * bits. The conversion to double is exact, so comparing doubles compares bits. */
static inline void test_repeat(const char *file, int line, const char *what, const double *got,
                               int64_t n) {
    if (test.visit < 0 || !test_repeats()) return;
    size_t bytes = (size_t)n * sizeof *got;
    if (test.visit % TEST_PASSES == 0) {
        test_block **end = test.recorded_at;
        memcpy(test_alloc(end, bytes), got, bytes);
        test.recorded_at = &(*end)->next;
        return;
    }
    const test_block *block = *test.recorded_at;
    test.n_checks++;
    if (!block || block->bytes != bytes || memcmp(block->data, got, bytes) != 0) {
        test_fail(file, line, "%s: the same call gave other bits the second time", what);
    }
    if (block) test.recorded_at = &(*test.recorded_at)->next;
}

static inline double test_row_max(const double *x, int64_t n) {
    double max = 0.0;
    for (int64_t i = 0; i < n; i++) {
        double size = fabs(x[i]);
        if (size > max && size <= DBL_MAX) max = size;
    }
    return max;
}

/* How far got is from want, in parts of scale; numbers that are not finite must be the same. */
static inline double test_error(double got, double want, double scale) {
    if (isnan(want) || isinf(want))
        return (isnan(want) && isnan(got)) || got == want ? 0 : INFINITY;
    if (!isfinite(got)) return INFINITY;
    return fabs(got - want) / scale;
}

/* Errors are relative to a norm: the largest number of the row, or a tenth of the largest of all
 * where that is more, since a row can be nothing but what is left of cancelled terms. */
static inline void test_close(const char *file, int line, const char *what, const double *got,
                              const double *want, int64_t rows, int64_t cols, double tol) {
    test.n_checks++;
    double all = test_row_max(want, rows * cols), worst = -1.0;
    int64_t at = 0;
    for (int64_t r = 0; r < rows; r++) {
        double scale = fmax(test_row_max(want + r * cols, cols), 0.1 * all) + 1e-30;
        double least = 0.999 * worst * scale; /* without the division for most numbers */
        for (int64_t i = r * cols; i < (r + 1) * cols; i++) {
            if (fabs(got[i] - want[i]) < least) continue;
            double error = test_error(got[i], want[i], scale);
            if (error <= worst) continue;
            worst = error;
            least = 0.999 * worst * scale;
            at = i;
        }
    }
    if (!(worst <= tol)) {
        test_fail(file, line,
                  "%s at [%lld, %lld] of %lld x %lld: got %.9g, want %.9g, error %.2e > %.0e", what,
                  (long long)(at / cols), (long long)(at % cols), (long long)rows, (long long)cols,
                  got[at], want[at], worst, tol);
    }
    test_repeat(file, line, what, got, rows * cols);
}
#define EXPECT_CLOSE(what, got, want, rows, cols, tol)                                             \
    test_close(__FILE__, __LINE__, what, got, want, rows, cols, tol)

/* The same numbers: for what an op must leave alone, and for zeros that must be zeros. */
static inline void test_same(const char *file, int line, const char *what, const double *got,
                             const double *want, int64_t n) {
    test.n_checks++;
    for (int64_t i = 0; i < n; i++) {
        if (test_error(got[i], want[i], 1e-300) == 0.0) continue;
        test_fail(file, line, "%s at %lld of %lld: got %.9g, want exactly %.9g", what, (long long)i,
                  (long long)n, got[i], want[i]);
        break;
    }
    test_repeat(file, line, what, got, n);
}
#define EXPECT_SAME(what, got, want, n) test_same(__FILE__, __LINE__, what, got, want, n)

static inline void test_near(const char *file, int line, const char *what, double got, double want,
                             double margin) {
    test.n_checks++;
    if (fabs(got - want) <= margin) return;
    test_fail(file, line, "%s: got %.9g, want %.9g +- %.3g", what, got, want, margin);
}
#define EXPECT_NEAR(what, got, want, margin) test_near(__FILE__, __LINE__, what, got, want, margin)

/* ---- finite differences ---- */

typedef double test_loss_fn(void *state);

/* Compares <dx, r> for a random direction r with (loss(x + h r) - loss(x - h r)) / 2h. In float64
 * with h = 1e-5 truncation and rounding both stay near 1e-10 of the loss. The margin is relative to
 * the norm of dx, since <dx, r> itself can be small by chance. */
static inline void test_gradient(const char *file, int line, const char *what, test_loss_fn *loss,
                                 void *state, double *x, const double *dx, int64_t n) {
    const double h = 1e-5;
    double *r = host_zeros(n), *saved = host_copy(x, n);
    double want = 0.0, norm = 0.0;
    for (int64_t i = 0; i < n; i++) {
        r[i] = random_normal();
        want += dx[i] * r[i];
        norm += dx[i] * dx[i];
    }
    for (int64_t i = 0; i < n; i++) x[i] = saved[i] + h * r[i];
    double up = loss(state);
    for (int64_t i = 0; i < n; i++) x[i] = saved[i] - h * r[i];
    double down = loss(state);
    memcpy(x, saved, (size_t)n * sizeof *x);
    test_near(file, line, what, (up - down) / (2 * h), want, 1e-6 * sqrt(norm) + 1e-9);
}
#define EXPECT_GRADIENT(what, loss, state, x, dx, n)                                               \
    test_gradient(__FILE__, __LINE__, what, loss, state, x, dx, n)

/* sum a_i b_i: the loss whose gradient with respect to a is b. */
static inline double test_dot(const double *a, const double *b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* ---- the loop over backends ---- */

static inline void test_backend_begin(void) {
    test.visit = -1;
    test.ops = NULL;
}

static inline void test_backend_leave(void) {
    if (!test.ops) return;
    EXPECT(test.ops->sync(test.ctx) == GPT_OK);
    test_free_device();
    test_free_until(&test.host, test.host_before);
    test.ops->ctx_set_workspace(test.ctx, NULL);
    test.ops = NULL;
}

/* In short tests a case visits half of the tables of its element type, if there are several. */
static inline int test_has_table(int table) {
    int n = 0, before = 0;
    if (!test_is_short()) return 1;
    for (int i = 0; i < test.n_tables; i++)
        if (test.tables[i]->act_bytes == test.act_bytes) n++, before += i < table;
    return n == 1 || (test_is_half() + before) % 2;
}

/* Every pair of a case, a table and a number of threads is met where three tables have the element
 * type, but not every three of them. Few tables are visited with each number of threads. */
static inline int test_is_turn(int table) {
    if (!TEST_ROTATES || !test_on_cpu() || (test.n_tables <= 2 && !test_is_short())) return 1;
    return test.threads == 1 + (test.n_cases + table) % TEST_MAX_THREADS && test_has_table(table);
}

static inline int test_backend_next(void) {
    test_backend_leave();
    for (test.visit++;; test.visit++) {
        int table = test.visit / (TEST_PASSES * TEST_MAX_THREADS);
        if (table >= test.n_tables) break;
        if (test.tables[table]->act_bytes != test.act_bytes) continue;
        test.ops = test.tables[table];
        test.threads = test.visit / TEST_PASSES % TEST_MAX_THREADS + 1;
        if (test.threads > 1 && !test_on_cpu()) continue; /* threads are the CPU's */
        if (test.visit % TEST_PASSES > 0 && !test_repeats()) continue;
        if (!test_is_turn(table)) continue;
        test.ctx = test.contexts[table][test.threads - 1];
        if (test.visit % TEST_PASSES == 0) test_free_list(&test.recorded);
        test.recorded_at = &test.recorded;
        test.host_before = test.host;
        return 1;
    }
    test.ops = NULL;
    test_free_list(&test.recorded);
    test.visit = -1;
    return 0;
}
/* Runs what follows for each table, thread count and pass. Do not leave it with break. */
#define EACH_BACKEND for (test_backend_begin(); test_backend_next();)

/* ---- main ---- */

typedef struct test_entry {
    const char *name;
    void (*run)(void);
} test_entry;

/* Tables with rounded weights, and those that have blocks, answer other questions than the rest: a program
 * tests one of these sorts. */
enum { TEST_PLAIN, TEST_ROUNDS, TEST_HAS_BLOCKS };
#ifndef TEST_QUANTIZED
#define TEST_QUANTIZED TEST_PLAIN
#endif
static inline int test_is_quantized(const gpt_ops *ops) {
    if (ops->blocks_pack) return TEST_HAS_BLOCKS;
    return strstr(ops->name, "int8") || strstr(ops->name, "int4") ? TEST_ROUNDS : TEST_PLAIN;
}

static inline void test_open_tables(void) {
    const char *only = getenv("GPTC_TEST_TABLES");
    for (int i = 0; test.n_tables < TEST_MAX_TABLES && backend_ops_at(i); i++) {
        const gpt_ops *ops = backend_ops_at(i);
        if (only && !strstr(ops->name, only)) continue;
        if (test_is_quantized(ops) != TEST_QUANTIZED) continue;
        for (int n = 1; n <= TEST_MAX_THREADS; n++) {
            gpt_ctx **ctx = &test.contexts[test.n_tables][n - 1];
            EXPECT(ops->ctx_create(ctx, n, n == 2) == GPT_OK);
            EXPECT(ops->ctx_threads(*ctx) >= 1);
        }
        test.tables[test.n_tables++] = ops;
    }
    EXPECT(test.n_tables > 0);
}

static inline void test_close_tables(void) {
    for (int i = 0; i < test.n_tables; i++) {
        for (int n = 0; n < TEST_MAX_THREADS; n++) test.tables[i]->ctx_free(test.contexts[i][n]);
    }
}

static inline int test_has_act_bytes(size_t act_bytes) {
    for (int i = 0; i < test.n_tables; i++) {
        if (test.tables[i]->act_bytes == act_bytes) return 1;
    }
    return 0;
}

static inline void test_run_entries(const test_entry *entries, int n, const char *only) {
    for (int i = 0; i < n; i++) {
        if (only && !strstr(entries[i].name, only)) continue;
        /* The float64 code against itself: it is the same in each build. */
        if (test_is_short() && !strcmp(entries[i].name, "reference")) continue;
        test.entry = entries[i].name;
        test_case("%s", "");
        entries[i].run();
    }
    test_case("%s", "");
    test.entry = NULL;
}

static inline int test_summary(const char *program) {
    if (test.n_failures > TEST_FAILURES_SHOWN) {
        fprintf(stderr, "... and %ld more\n", test.n_failures - TEST_FAILURES_SHOWN);
    }
    printf("%s: %ld checks, %ld failed", test_basename(program), test.n_checks, test.n_failures);
    for (int i = 0; i < test.n_tables; i++) {
        printf("%s%s", i ? ", " : " (", test.tables[i]->name);
    }
    for (int i = 0, n = 0; test.n_tables && backend_missing_at(i); i++) {
        if (test_is_quantized(backend_missing_at(i)) != TEST_QUANTIZED) continue;
        printf("%s%s", n++ ? ", " : "; skipped, not on this CPU: ", backend_missing_at(i)->name);
    }
    puts(test.n_tables ? ")" : "");
    return test.n_failures ? 1 : 0;
}

/* Tests of ops: once for each element size that some table has. An argument runs only the entries
 * whose name contains it. */
static inline int test_main_ops(const test_entry *entries, int n, int argc, char **argv) {
    static const size_t act_bytes[] = {4, 2};
    test_open_tables();
    for (int i = 0; i < 2; i++) {
        test.act_bytes = act_bytes[i];
        if (test_has_act_bytes(act_bytes[i])) {
            test_run_entries(entries, n, argc > 1 ? argv[1] : NULL);
        }
    }
    test_free_spare(1);
    test_close_tables();
    test_free_kept();
    return test_summary(argv[0]);
}

/* Tests of gpt.h: once. */
static inline int test_main_api(const test_entry *entries, int n, int argc, char **argv) {
    test.act_bytes = 4;
    test.visit = -1;
    test_run_entries(entries, n, argc > 1 ? argv[1] : NULL);
    test_free_kept();
    return test_summary(argv[0]);
}

/* Freed memory stays with the program: to get it from the kernel again, zeroed, takes longer than most
 * tests. */
static inline void test_keep_memory(void) {
    mallopt(M_MMAP_THRESHOLD, INT_MAX);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
}

#define TEST_ENTRIES_MAIN(run, ...)                                                                \
    int main(int argc, char **argv) {                                                              \
        static const test_entry entries[] = {__VA_ARGS__};                                         \
        test_keep_memory();                                                                        \
        return run(entries, (int)(sizeof entries / sizeof *entries), argc, argv);                  \
    }
#define TEST_OPS_MAIN(...) TEST_ENTRIES_MAIN(test_main_ops, __VA_ARGS__)
#define TEST_API_MAIN(...) TEST_ENTRIES_MAIN(test_main_api, __VA_ARGS__)

#define TEST_COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

#endif
