/* product.cu: cuBLASLt, found at run time, so that libgpt.so loads where there is none. */
#include "product.h"

#include "error.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the library ---- */

#define FUNCTIONS(use)                                                                             \
    use(Create) use(Destroy) use(Matmul) use(MatmulAlgoGetHeuristic) use(MatmulDescCreate)         \
        use(MatmulDescDestroy) use(MatmulDescSetAttribute) use(MatrixLayoutCreate)                 \
            use(MatrixLayoutDestroy) use(MatmulPreferenceCreate) use(MatmulPreferenceDestroy)      \
                use(MatmulPreferenceSetAttribute)

/* A product at one shape: all that is needed to run it again. */
typedef struct plan {
    product key; /* with pointers replaced by how they are aligned; M is 0 where there is no plan */
    int usable;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, out;
    cublasLtMatmulAlgo_t algo;
} plan;

enum { LOG2_PLANS = 11, MAX_PLANS = 1 << LOG2_PLANS, PLACES = 16 /* that a plan may have */ };
enum { TUNED_ALGORITHMS = 32, TUNING_TURNS = 5 };

struct cuda_library {
    void *handle;
    cublasLtHandle_t lt;
    void *workspace; /* on the device */
    size_t workspace_bytes;
#define DECLARE(name) decltype(&cublasLt##name) name;
    FUNCTIONS(DECLARE)
#undef DECLARE
    int tf32, tune; /* as the environment asks */
    plan plans[MAX_PLANS];
};

#define STRING2(x) #x
#define STRING(x)  STRING2(x)
#define SONAME     "libcublasLt.so." STRING(CUBLAS_VER_MAJOR)

/* By the dynamic linker's rules, which find what the process has loaded already; then the toolkit. It
 * stays loaded when it is closed: it has a part in what runs when threads and the process end, and
 * would take long to load again for the next model. */
static void *open_library(void) {
    static const char *const names[] = {
        SONAME, "/usr/local/cuda/lib64/" SONAME,
        "/usr/local/cuda-" STRING(CUBLAS_VER_MAJOR) "/lib64/" SONAME};
    for (const char *name : names)
        if (void *handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE)) return handle;
    return NULL;
}

/* Set, and not to 0. */
static int is_on(const char *variable) {
    const char *value = getenv(variable);
    return value && strcmp(value, "0");
}

static int missing_library(int found) {
    return fail(GPT_ERR_DEVICE,
                found ? "%s was found but cannot be used; try: pip install nvidia-cublas"
                      : "%s was not found; install it with: pip install nvidia-cublas",
                SONAME);
}

int cuda_products_describe(char *out, size_t size) {
    void *handle = open_library();
    if (!handle) return missing_library(0);
    auto version = (decltype(&cublasLtGetVersion))dlsym(handle, "cublasLtGetVersion");
    Dl_info file = {};
    int found = version && dladdr((void *)version, &file);
    size_t number = found ? version() : 0; /* as CUBLAS_VERSION */
    if (found)
        snprintf(out, size, "%zu.%zu.%zu, %s%s", number / 10000, number / 100 % 100, number % 100,
                 file.dli_fname, is_on("GPTC_TUNE") ? ", tuned (GPTC_TUNE)" : "");
    dlclose(handle);
    return found ? GPT_OK : missing_library(1);
}

int cuda_products_open(cuda_library **out) {
    cuda_library *l = (cuda_library *)calloc(1, sizeof *l);
    if (!l) return fail(GPT_ERR_MEMORY, "no memory for the table of matrix products");
    l->tf32 = is_on("GPTC_TF32");
    l->tune = is_on("GPTC_TUNE");
    l->workspace_bytes = PRODUCT_WORKSPACE;
    if (l->tune) l->workspace_bytes = TUNED_WORKSPACE;
    l->handle = open_library();
    int found = l->handle != NULL;
#define FIND(name)                                                                                 \
    found = found && (l->name = (decltype(l->name))dlsym(l->handle, "cublasLt" #name));
    FUNCTIONS(FIND)
#undef FIND
    if (!found || l->Create(&l->lt) != CUBLAS_STATUS_SUCCESS) {
        int there = l->handle != NULL;
        l->lt = NULL;
        cuda_products_close(l);
        return missing_library(there);
    }
    if (cudaMalloc(&l->workspace, l->workspace_bytes) != cudaSuccess) {
        size_t megabytes = l->workspace_bytes >> 20;
        cudaGetLastError(); /* it is answered here */
        cuda_products_close(l);
        return fail(GPT_ERR_MEMORY, "the GPU has no %zu MB left for cuBLASLt", megabytes);
    }
    *out = l;
    return GPT_OK;
}

static void close_plan(cuda_library *l, plan *p) {
    if (p->a) l->MatrixLayoutDestroy(p->a);
    if (p->b) l->MatrixLayoutDestroy(p->b);
    if (p->out) l->MatrixLayoutDestroy(p->out);
    if (p->desc) l->MatmulDescDestroy(p->desc);
    *p = plan();
}

void cuda_products_forget(gpt_ctx *ctx) {
    for (plan &p : ctx->products->plans) close_plan(ctx->products, &p);
}

void cuda_products_close(cuda_library *l) {
    if (!l) return;
    for (plan &p : l->plans) close_plan(l, &p);
    if (l->workspace) cudaFree(l->workspace);
    if (l->lt) l->Destroy(l->lt);
    if (l->handle) dlclose(l->handle);
    free(l);
}

/* ---- plans ---- */

/* How a pointer is aligned, up to `most` bytes; NULL stays NULL. */
static void *alignment(const void *p, uintptr_t most = 256) {
    uintptr_t address = (uintptr_t)p;
    for (uintptr_t bytes = most; p && bytes > 1; bytes /= 2)
        if (address % bytes == 0) return (void *)bytes;
    return NULL;
}

static product key_of(const product *p) {
    product key = *p;
    key.out = alignment(p->out);
    key.a = alignment(p->a);
    key.b = alignment(p->b);
    key.bias = alignment(p->bias, 16);
    key.pre = alignment(p->pre, 16);
    return key;
}

static cublasLtEpilogue_t epilogue_of(const product *p) {
    switch (p->epilogue) {
    case EPILOGUE_BIAS:
        return CUBLASLT_EPILOGUE_BIAS;
    case EPILOGUE_GELU:
        if (p->pre) return p->bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
        return p->bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    case EPILOGUE_GELU_BACKWARD:
        return CUBLASLT_EPILOGUE_DGELU;
    default:
        return CUBLASLT_EPILOGUE_DEFAULT;
    }
}

/* cuBLASLt's matrices are column-major: it computes out^T (N, M) from b and a in exchanged roles. */
static int describe(cuda_library *l, plan *plan, const product *p) {
    cudaDataType_t type = p->bf16 ? CUDA_R_16BF : CUDA_R_32F;
    cudaDataType_t out_type = p->float_out ? CUDA_R_32F : type;
    cublasComputeType_t compute =
        !p->bf16 && l->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    cublasOperation_t first = p->kind == PRODUCT_NT ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t second = p->kind == PRODUCT_TN ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = epilogue_of(p);
    uint64_t M = (uint64_t)p->M, N = (uint64_t)p->N, K = (uint64_t)p->K;
    int bad = l->MatmulDescCreate(&plan->desc, compute, CUDA_R_32F);
    if (bad) return 0;
#define SET(attribute, value)                                                                      \
    bad |= l->MatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_##attribute, &(value),       \
                                     sizeof(value))
    SET(TRANSA, first);
    SET(TRANSB, second);
    SET(EPILOGUE, epilogue);
    if (p->bias) SET(BIAS_DATA_TYPE, type);
    if (p->pre) {
        int64_t ld = p->N;
        SET(EPILOGUE_AUX_LD, ld);
    }
    bad |= first == CUBLAS_OP_T ? l->MatrixLayoutCreate(&plan->a, type, K, N, p->ldb)
                                : l->MatrixLayoutCreate(&plan->a, type, N, K, p->ldb);
    bad |= second == CUBLAS_OP_T ? l->MatrixLayoutCreate(&plan->b, type, M, K, p->lda)
                                 : l->MatrixLayoutCreate(&plan->b, type, K, M, p->lda);
    bad |= l->MatrixLayoutCreate(&plan->out, out_type, N, M, p->ldo);
    return !bad;
}

/* The addresses that the description, rather than the call, carries. */
static int set_addresses(cuda_library *l, plan *plan, const product *p) {
    int bad = 0;
    if (p->bias) SET(BIAS_POINTER, p->bias);
    if (p->pre) SET(EPILOGUE_AUX_POINTER, p->pre);
    return !bad;
}
#undef SET

static int multiply(gpt_ctx *ctx, const plan *plan, const product *p, void *out) {
    cuda_library *l = ctx->products;
    float one = 1, zero = 0;
    return l->Matmul(l->lt, plan->desc, &one, p->b, plan->a, p->a, plan->b, p->add ? &one : &zero,
                     p->out, plan->out, out, plan->out, &plan->algo, l->workspace,
                     l->workspace_bytes, ctx->stream) == CUBLAS_STATUS_SUCCESS;
}

/* Milliseconds of the fastest of a few runs of the plan, its output thrown away: adding to p->out
 * more than once would not be the same. */
static float time_plan(gpt_ctx *ctx, const plan *plan, const product *p, void *out,
                       cudaEvent_t begin, cudaEvent_t end) {
    float best = INFINITY;
    for (int turn = 0; turn < TUNING_TURNS; turn++) {
        float ms = INFINITY;
        cudaEventRecord(begin, ctx->stream);
        if (!multiply(ctx, plan, p, out)) return INFINITY;
        cudaEventRecord(end, ctx->stream);
        if (cudaEventSynchronize(end) == cudaSuccess) cudaEventElapsedTime(&ms, begin, end);
        best = least(best, ms);
    }
    return best;
}

/* Replaces the plan's algorithm by the fastest of those found. Which one that is may differ from one
 * model to the next, and with it the last bits of what the products give: so one has to ask for it. */
static void tune(gpt_ctx *ctx, plan *plan, const product *p,
                 const cublasLtMatmulHeuristicResult_t *found, int n_found) {
    cudaEvent_t begin = NULL, end = NULL;
    void *out = NULL;
    if (cudaMalloc(&out, sizeof(float) * (size_t)p->M * (size_t)p->ldo) == cudaSuccess &&
        cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess) {
        float best = INFINITY;
        cublasLtMatmulAlgo_t fastest = plan->algo;
        for (int i = 0; i < n_found; i++) {
            plan->algo = found[i].algo;
            float ms = time_plan(ctx, plan, p, out, begin, end);
            if (ms < best) best = ms, fastest = plan->algo;
        }
        plan->algo = fastest;
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaFree(out);
    cudaGetLastError(); /* without room to measure in, it is the first choice */
}

/* The library's first choice for this shape, or the fastest of its first few. */
static int choose(gpt_ctx *ctx, plan *plan, const product *p) {
    cuda_library *l = ctx->products;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found[TUNED_ALGORITHMS];
    /* Parts of a long sum may be added in float32 only, never in bf16. */
    uint32_t sums = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    int n_found = 0;
    if (l->MatmulPreferenceCreate(&preference) != CUBLAS_STATUS_SUCCESS) return 0;
    int bad = l->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &l->workspace_bytes, sizeof l->workspace_bytes);
    if (p->bf16 && !p->float_out)
        bad |= l->MatmulPreferenceSetAttribute(
            preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &sums, sizeof sums);
    const struct {
        cublasLtMatmulPreferenceAttributes_t which;
        const void *pointer;
    } operands[] = {{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, p->b},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, p->a},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p->out},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, p->out}};
    for (const auto &operand : operands) {
        uint32_t bytes = (uint32_t)(uintptr_t)alignment(operand.pointer);
        bad |= l->MatmulPreferenceSetAttribute(preference, operand.which, &bytes, sizeof bytes);
    }
    if (!bad)
        bad =
            l->MatmulAlgoGetHeuristic(l->lt, plan->desc, plan->a, plan->b, plan->out, plan->out,
                                      preference, l->tune ? TUNED_ALGORITHMS : 1, found, &n_found);
    l->MatmulPreferenceDestroy(preference);
    if (bad || n_found == 0) return 0;
    plan->algo = found[0].algo;
    if (l->tune && n_found > 1) tune(ctx, plan, p, found, n_found);
    return 1;
}

/* The first place of a plan with this key: the high bits of a product (Knuth, volume 3, 6.4). */
static int place_of(const product &key) {
    uint64_t hash = 0;
    for (int part : {key.kind, key.epilogue, key.float_out, key.add, key.M, key.N, key.K})
        hash = (hash ^ (uint32_t)part) * 0x9e3779b97f4a7c15ull;
    return (int)(hash >> (64 - LOG2_PLANS));
}

static int is_recording(gpt_ctx *ctx) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(ctx->stream, &status);
    return status != cudaStreamCaptureStatusNone;
}

/* NULL where there is none and a sequence of ops is being recorded, when nothing can be measured. */
static plan *plan_for(gpt_ctx *ctx, const product *p) {
    cuda_library *l = ctx->products;
    product key = key_of(p);
    int first = place_of(key);
    plan *made = &l->plans[first]; /* which makes room where every place is taken */
    for (int i = 0; i < PLACES; i++) {
        plan *at = &l->plans[(first + i) % MAX_PLANS];
        if (at->key == key) return at;
        if (at->key.M == 0) {
            made = at;
            break;
        }
    }
    if (is_recording(ctx)) return NULL;
    close_plan(l, made);
    made->key = key;
    made->usable = describe(l, made, p) && set_addresses(l, made, p) && choose(ctx, made, p);
    return made;
}

static int has_aligned_rows(const product *p) {
    size_t in = p->bf16 ? 2 : 4, out = p->float_out ? 4 : in;
    return (size_t)p->lda * in % 16 == 0 && (size_t)p->ldb * in % 16 == 0 &&
           (size_t)p->ldo * out % 16 == 0;
}

int cuda_product(gpt_ctx *ctx, const product *p) {
    cuda_library *l = ctx->products;
    if (p->pre && p->N % 8) return 0; /* the library wants its rows aligned */
    plan *plan = plan_for(ctx, p);
    if (!plan) { /* the recording fails, and the ops then run: graph.cu */
        cuda_remember(ctx, cudaErrorStreamCaptureUnsupported);
        return 1;
    }
    int done = plan->usable && set_addresses(l, plan, p) && multiply(ctx, plan, p, p->out);
    if (done || p->epilogue != EPILOGUE_NONE) return done;
    /* Rows that are aligned it must know: without it the product would take for ever. */
    if (has_aligned_rows(p))
        cuda_remember(ctx, cudaErrorNotSupported);
    else
        cuda_product_plain(ctx, p);
    return 1;
}
