#define _GNU_SOURCE
#include "backend.h"

#include "choice.h"
#include "cuda_device.h"
#include "error.h"

#include <stdlib.h>
#include <string.h>
#ifdef GPTC_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* A level's tables by enum gpt_dtype. */
#define DECLARE_QUANT(level)                                                                       \
    extern const gpt_ops cpu_int8_##level##_ops, cpu_int4_##level##_ops, cpu_packed_##level##_ops
#define DECLARE_BF16(level)                                                                        \
    extern const gpt_ops cpu_bf16_##level##_ops;                                                   \
    DECLARE_QUANT(level)
#define DECLARE(level)                                                                             \
    extern const gpt_ops cpu_fp32_##level##_ops;                                                   \
    DECLARE_BF16(level)
#define TABLES_QUANT(level)                                                                        \
    {NULL, NULL, &cpu_int8_##level##_ops, &cpu_int4_##level##_ops, &cpu_packed_##level##_ops}
#define TABLES_BF16(level)                                                                         \
    {NULL, &cpu_bf16_##level##_ops, &cpu_int8_##level##_ops, &cpu_int4_##level##_ops,              \
     &cpu_packed_##level##_ops}
#define TABLES(level)                                                                              \
    {&cpu_fp32_##level##_ops, &cpu_bf16_##level##_ops, &cpu_int8_##level##_ops,                    \
     &cpu_int4_##level##_ops, &cpu_packed_##level##_ops}
DECLARE(portable);
#ifdef GPTC_X86
DECLARE(avx2);
DECLARE(avx512);
DECLARE_QUANT(avx512vnni);
DECLARE_BF16(avx512bf16);
DECLARE_BF16(amx);
#endif
#ifdef GPTC_HAS_CUDA
extern const gpt_ops cuda_fp32_ops, cuda_bf16_ops, cuda_int8_ops, cuda_int4_ops, cuda_packed_ops;
static const gpt_ops *const cuda_ops[] = {&cuda_fp32_ops, &cuda_bf16_ops, &cuda_int8_ops,
                                          &cuda_int4_ops, &cuda_packed_ops};
enum { N_CUDA_DTYPES = sizeof cuda_ops / sizeof *cuda_ops };
#endif

/* An instruction-set level of the CPU, and its tables: NULL where another level's will do. */
typedef struct cpu_level {
    const char *name;
    const gpt_ops *ops[GPT_DTYPE_PACKED + 1];
    int (*supported)(void);
} cpu_level;

static int always(void) {
    return 1;
}

#ifdef GPTC_X86
/* Leaf 1 of CPUID: ECX bit 29 is F16C. */
__attribute__((unused)) static int has_avx2(void) {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

__attribute__((unused)) static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

__attribute__((unused)) static int has_avx512vnni(void) {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

__attribute__((unused)) static int has_avx512bf16(void) {
    return has_avx512vnni() && __builtin_cpu_supports("avx512bf16");
}

/* Leaf 7 of CPUID: EDX bit 24 is AMX-TILE, 22 AMX-BF16, 25 AMX-INT8 (Intel SDM volume 2A). */
static int cpu_has_amx(void) {
#ifdef GPTC_EMULATE_AMX
    return 1;
#endif
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 22 & 1) &&
           (d >> 25 & 1);
}

/* Linux saves tile registers only for processes that ask: 18 is XFEATURE_XTILEDATA. Asking again is
 * harmless. */
static int request_amx(void) {
#if defined(GPTC_EMULATE_AMX)
    return 1;
#elif defined(__linux__) && defined(SYS_arch_prctl)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

__attribute__((unused)) static int has_amx(void) {
    return has_avx512bf16() && cpu_has_amx() && request_amx();
}
#endif

/* Best first. */
static const cpu_level levels[] = {
#ifdef GPTC_HAS_AMX
    {"amx", TABLES_BF16(amx), has_amx},
#endif
#ifdef GPTC_HAS_AVX512BF16
    {"avx512bf16", TABLES_BF16(avx512bf16), has_avx512bf16},
#endif
#ifdef GPTC_HAS_AVX512VNNI
    {"avx512vnni", TABLES_QUANT(avx512vnni), has_avx512vnni},
#endif
#ifdef GPTC_HAS_AVX512
    {"avx512", TABLES(avx512), has_avx512},
#endif
#ifdef GPTC_HAS_AVX2
    {"avx2", TABLES(avx2), has_avx2},
#endif
    {"portable", TABLES(portable), always},
};
enum { N_LEVELS = sizeof levels / sizeof *levels, N_DTYPES = GPT_DTYPE_PACKED + 1 };

/* The level that GPTC_CPU_LEVEL names; -1: none. */
static int named_level(void) {
    const char *cap = getenv("GPTC_CPU_LEVEL");
    for (int i = 0; cap && i < N_LEVELS; i++)
        if (!strcmp(cap, levels[i].name)) return i;
    return -1;
}

/* The best level for a dtype that the CPU has, no better than GPTC_CPU_LEVEL where that names one. */
static const cpu_level *best_level(int dtype) {
    int cap = named_level();
    for (int i = cap < 0 ? 0 : cap; i < N_LEVELS; i++)
        if (levels[i].ops[dtype] && levels[i].supported()) return &levels[i];
    return &levels[N_LEVELS - 1];
}

/* Every level has quantized weights. */
const char *gpt_cpu_level(void) {
    return best_level(GPT_DTYPE_INT8)->name;
}

int gpt_cpu_has_bf16(void) {
    return best_level(GPT_DTYPE_BF16) != best_level(GPT_DTYPE_FP32);
}

/* Whether level "amx" shares its ops with the one below it, as measured. */
static int has_choice(void) {
#ifdef GPTC_HAS_AMX
    return named_level() < 0 && has_amx();
#else
    return 0;
#endif
}

const char *gpt_cpu_notice(void) {
#ifdef GPTC_HAS_AMX
    if (named_level() > 0) return ""; /* not asked for */
    if (has_avx512bf16() && cpu_has_amx() && !request_amx())
        return "this CPU has AMX, but the system does not let programs use it; it is not used";
#endif
    return "";
}

int gpt_cpu_measure(int on) {
    if (on != 0 && on != 1) return fail(GPT_ERR_ARGUMENT, "on is %d; it must be 0 or 1", on);
    if (has_choice()) choice_measure(on);
    return GPT_OK;
}

int gpt_cpu_times(int i, gpt_level_times *out) {
    if (!out) return fail(GPT_ERR_ARGUMENT, "gpt_cpu_times: out is NULL");
    if (i < 0 || !has_choice() || !choice_times(i, out))
        return fail(GPT_ERR_ARGUMENT, "measured op %d does not exist", i);
    return GPT_OK;
}

int gpt_cpu_set_times(const gpt_level_times *times) {
    if (!times) return fail(GPT_ERR_ARGUMENT, "gpt_cpu_set_times: times is NULL");
    if (!memchr(times->op, 0, sizeof times->op) || !(times->seconds[0] > 0) ||
        !(times->seconds[1] > 0))
        return fail(GPT_ERR_ARGUMENT,
                    "gpt_cpu_set_times: an op has a name of up to %zu letters, and takes time",
                    sizeof times->op - 1);
    return has_choice() ? choice_set_times(times) : GPT_OK;
}

#ifndef GPTC_HAS_CUDA
static int built_without_cuda(void) {
    return fail(GPT_ERR_DEVICE, "this build of gptc has no CUDA backend (nvcc or cuBLAS was not "
                                "found when it was built); use --device cpu");
}
#endif

int gpt_cuda_info(gpt_device_info *out) {
    if (!out) return fail(GPT_ERR_ARGUMENT, "gpt_cuda_info: out is NULL");
    *out = (gpt_device_info){0};
#ifdef GPTC_HAS_CUDA
    return cuda_info(out);
#else
    return built_without_cuda();
#endif
}

static const gpt_ops *table_at(int i, int supported) {
#ifdef GPTC_HAS_CUDA
    if (!(cuda_check() == GPT_OK) == !supported) {
        if (i < N_CUDA_DTYPES) return cuda_ops[i];
        i -= N_CUDA_DTYPES;
    }
#endif
    for (int j = 0; j < N_LEVELS; j++)
        for (int dtype = 0; dtype < N_DTYPES; dtype++)
            if (levels[j].ops[dtype] && !levels[j].supported() == !supported && i-- == 0)
                return levels[j].ops[dtype];
    return NULL;
}

const gpt_ops *backend_ops_at(int i) {
    return table_at(i, 1);
}

const gpt_ops *backend_missing_at(int i) {
    return table_at(i, 0);
}

int backend_ops(int device, int dtype, const gpt_ops **out) {
    if (device != GPT_DEVICE_CPU && device != GPT_DEVICE_CUDA)
        return fail(GPT_ERR_ARGUMENT, "unknown device %d", device);
    if (dtype < GPT_DTYPE_FP32 || dtype > GPT_DTYPE_PACKED)
        return fail(GPT_ERR_ARGUMENT, "unknown dtype %d", dtype);
    if (device == GPT_DEVICE_CUDA) {
#ifdef GPTC_HAS_CUDA
        TRY(cuda_check());
        *out = cuda_ops[dtype];
        return GPT_OK;
#else
        return built_without_cuda();
#endif
    }
    const cpu_level *level = best_level(dtype);
    *out = level->ops[dtype];
    if (has_choice() && level == levels) *out = choice_ops(dtype, level[1].ops[dtype], *out);
    return GPT_OK;
}
