#include "backend.h"

#include "error.h"

#include <stdlib.h>
#include <string.h>

extern const gpt_ops cpu_portable_ops;
#ifdef GPTC_X86
extern const gpt_ops cpu_avx2_ops, cpu_avx512_ops;
#endif

/* The CPU's instruction-set levels, best first. */
typedef struct cpu_level {
    const char *name;
    const gpt_ops *ops;
    int (*supported)(void);
} cpu_level;

static int always(void) {
    return 1;
}

#ifdef GPTC_X86
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

static const cpu_level levels[] = {
#ifdef GPTC_X86
    {"avx512", &cpu_avx512_ops, has_avx512},
    {"avx2", &cpu_avx2_ops, has_avx2},
#endif
    {"portable", &cpu_portable_ops, always},
};
enum { N_LEVELS = sizeof levels / sizeof *levels };

/* The best level the CPU has, no better than GPTC_CPU_LEVEL where that names one. */
static const cpu_level *best_level(void) {
    const char *cap = getenv("GPTC_CPU_LEVEL");
    int first = 0;
    for (int i = 0; cap && i < N_LEVELS; i++)
        if (!strcmp(cap, levels[i].name)) first = i;
    for (int i = first; i < N_LEVELS; i++)
        if (levels[i].supported()) return &levels[i];
    return &levels[N_LEVELS - 1];
}

const char *gpt_cpu_level(void) {
    return best_level()->name;
}

const gpt_ops *backend_ops_at(int i) {
    for (int j = 0; j < N_LEVELS; j++)
        if (levels[j].supported() && i-- == 0) return levels[j].ops;
    return NULL;
}

int backend_ops(int device, int dtype, const gpt_ops **out) {
    if (device == GPT_DEVICE_CUDA)
        return fail(GPT_ERR_DEVICE, "this build of gptc has no CUDA backend; use --device cpu");
    if (device != GPT_DEVICE_CPU) return fail(GPT_ERR_ARGUMENT, "unknown device %d", device);
    if (dtype == GPT_DTYPE_BF16)
        return fail(GPT_ERR_ARGUMENT, "the CPU backend has no bf16 yet; use --dtype fp32");
    if (dtype != GPT_DTYPE_FP32) return fail(GPT_ERR_ARGUMENT, "unknown dtype %d", dtype);
    *out = best_level()->ops;
    return GPT_OK;
}
