#define _GNU_SOURCE
#include "backend.h"

#include "cuda_device.h"
#include "error.h"

#include <stdlib.h>
#include <string.h>
#ifdef GPTC_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const gpt_ops cpu_fp32_portable_ops, cpu_bf16_portable_ops;
#ifdef GPTC_X86
extern const gpt_ops cpu_fp32_avx2_ops, cpu_fp32_avx512_ops;
extern const gpt_ops cpu_bf16_avx2_ops, cpu_bf16_avx512_ops, cpu_bf16_avx512bf16_ops;
extern const gpt_ops cpu_bf16_amx_ops;
#endif
#ifdef GPTC_HAS_CUDA
extern const gpt_ops cuda_fp32_ops, cuda_bf16_ops;
static const gpt_ops *const cuda_ops[] = {&cuda_fp32_ops, &cuda_bf16_ops}; /* by enum gpt_dtype */
#endif

/* An instruction-set level of the CPU, and its tables by dtype: NULL where another level's will do. */
typedef struct cpu_level {
    const char *name;
    const gpt_ops *ops[2]; /* by enum gpt_dtype */
    int (*supported)(void);
} cpu_level;

static int always(void) {
    return 1;
}

#ifdef GPTC_X86
__attribute__((unused)) static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

__attribute__((unused)) static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

__attribute__((unused)) static int has_avx512bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

/* Leaf 7 of CPUID: EDX bit 24 is AMX-TILE, bit 22 AMX-BF16 (Intel SDM volume 2A). */
static int cpu_has_amx(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 22 & 1);
}

/* Linux saves tile registers only for processes that ask: 18 is XFEATURE_XTILEDATA. Asking again is
 * harmless. */
static int request_amx(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
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
    {"amx", {NULL, &cpu_bf16_amx_ops}, has_amx},
#endif
#ifdef GPTC_HAS_AVX512BF16
    {"avx512bf16", {NULL, &cpu_bf16_avx512bf16_ops}, has_avx512bf16},
#endif
#ifdef GPTC_HAS_AVX512
    {"avx512", {&cpu_fp32_avx512_ops, &cpu_bf16_avx512_ops}, has_avx512},
#endif
#ifdef GPTC_HAS_AVX2
    {"avx2", {&cpu_fp32_avx2_ops, &cpu_bf16_avx2_ops}, has_avx2},
#endif
    {"portable", {&cpu_fp32_portable_ops, &cpu_bf16_portable_ops}, always},
};
enum { N_LEVELS = sizeof levels / sizeof *levels, N_DTYPES = 2 };

/* The best level for a dtype that the CPU has, no better than GPTC_CPU_LEVEL where that names one. */
static const cpu_level *best_level(int dtype) {
    const char *cap = getenv("GPTC_CPU_LEVEL");
    int first = 0;
    for (int i = 0; cap && i < N_LEVELS; i++)
        if (!strcmp(cap, levels[i].name)) first = i;
    for (int i = first; i < N_LEVELS; i++)
        if (levels[i].ops[dtype] && levels[i].supported()) return &levels[i];
    return &levels[N_LEVELS - 1];
}

/* Every level has bf16; the best ones have nothing else. */
const char *gpt_cpu_level(void) {
    return best_level(GPT_DTYPE_BF16)->name;
}

int gpt_cpu_has_bf16(void) {
    return best_level(GPT_DTYPE_BF16) != best_level(GPT_DTYPE_FP32);
}

const char *gpt_cpu_notice(void) {
#ifdef GPTC_HAS_AMX
    const char *cap = getenv("GPTC_CPU_LEVEL");
    if (cap && strcmp(cap, "amx")) return ""; /* nobody asked for it */
    if (has_avx512bf16() && cpu_has_amx() && !request_amx())
        return "this CPU has AMX, but the system does not let programs use it; going on without";
#endif
    return "";
}

static const gpt_ops *table_at(int i, int supported) {
#ifdef GPTC_HAS_CUDA
    if (!(cuda_check() == GPT_OK) == !supported) {
        if (i < N_DTYPES) return cuda_ops[i];
        i -= N_DTYPES;
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
    if (dtype != GPT_DTYPE_FP32 && dtype != GPT_DTYPE_BF16)
        return fail(GPT_ERR_ARGUMENT, "unknown dtype %d", dtype);
    if (device == GPT_DEVICE_CUDA) {
#ifdef GPTC_HAS_CUDA
        TRY(cuda_check());
        *out = cuda_ops[dtype];
        return GPT_OK;
#else
        return fail(GPT_ERR_DEVICE,
                    "this build of gptc has no CUDA backend (nvcc or cuBLAS was not found when it "
                    "was built); use --device cpu");
#endif
    }
    *out = best_level(dtype)->ops[dtype];
    return GPT_OK;
}
