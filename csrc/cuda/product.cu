/* product.cu: cuBLASLt, found at run time, so that libgpt.so loads where there is none. */
#include "plan_store.h"

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
                use(MatmulPreferenceSetAttribute) use(MatmulAlgoCheck)                             \
                    use(MatmulAlgoConfigGetAttribute) use(GetVersion)

/* A product at one shape: all that is needed to run it again. */
typedef struct plan {
    product key; /* with pointers replaced by how they are aligned; M is 0 where there is no plan */
    int usable;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, out;
    cublasLtMatmulAlgo_t algo;
    size_t workspace_bytes; /* that the algorithm needs */
    int64_t calls;          /* since products are measured */
    double seconds;
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
    int major;      /* compute capability */
    int measures;
    cudaEvent_t begin, end; /* of a product that is measured, or tuned */
    plan_store *store;      /* NULL: nothing is tuned */
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

/* The measured plans of this card; to be closed. */
static plan_store *open_store(size_t version, int tf32) {
    plan_circumstances where = {};
    cudaDeviceProp device = {};
    cudaGetDeviceProperties(&device, 0);
    cudaDriverGetVersion(&where.driver);
    snprintf(where.card, sizeof where.card, "%.*s", (int)sizeof where.card - 1, device.name);
    where.version = version;
    where.tf32 = tf32;
    return plan_store_open(getenv("GPTC_PLANS"), &where);
}

/* Appends how products are tuned, if they are. */
static void describe_tuning(char *out, size_t size, size_t version) {
    size_t n = strlen(out);
    if (!is_on("GPTC_TUNE")) return;
    n += (size_t)snprintf(out + n, size - n, ", tuned (GPTC_TUNE), ");
    if (n >= size) return;
    plan_store *store = open_store(version, is_on("GPTC_TF32"));
    plan_store_describe(store, out + n, size - n);
    plan_store_close(store);
}

int cuda_products_describe(char *out, size_t size) {
    void *handle = open_library();
    if (!handle) return missing_library(0);
    auto version = (decltype(&cublasLtGetVersion))dlsym(handle, "cublasLtGetVersion");
    Dl_info file = {};
    int found = version && dladdr((void *)version, &file);
    size_t number = found ? version() : 0; /* as CUBLAS_VERSION */
    if (found)
        snprintf(out, size, "%zu.%zu.%zu, %s", number / 10000, number / 100 % 100, number % 100,
                 file.dli_fname);
    if (found) describe_tuning(out, size, number);
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
    cudaError_t error = cudaMalloc(&l->workspace, l->workspace_bytes);
    if (error != cudaSuccess) {
        size_t megabytes = l->workspace_bytes >> 20;
        cudaGetLastError(); /* it is answered here */
        cuda_products_close(l);
        if (error == cudaErrorMemoryAllocation)
            return fail(GPT_ERR_MEMORY, "the GPU has no %zu MB left for cuBLASLt", megabytes);
        return fail(GPT_ERR_DEVICE, "the GPU failed: %s", cudaGetErrorString(error));
    }
    cudaDeviceGetAttribute(&l->major, cudaDevAttrComputeCapabilityMajor, 0);
    if (l->tune) l->store = open_store(l->GetVersion(), l->tf32);
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
    plan_store_close(l->store);
    if (l->begin) cudaEventDestroy(l->begin);
    if (l->end) cudaEventDestroy(l->end);
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

/* The events that measure, made when they are first needed. */
static bool has_events(cuda_library *l) {
    return (l->begin || cudaEventCreate(&l->begin) == cudaSuccess) &&
           (l->end || cudaEventCreate(&l->end) == cudaSuccess);
}

/* Milliseconds since `begin` was recorded, once all is done. */
static float elapsed(gpt_ctx *ctx) {
    cuda_library *l = ctx->products;
    float ms = INFINITY;
    cudaEventRecord(l->end, ctx->stream);
    if (cudaEventSynchronize(l->end) == cudaSuccess) cudaEventElapsedTime(&ms, l->begin, l->end);
    return ms;
}

/* Milliseconds of the fastest of a few runs of the plan, its output thrown away: adding to p->out
 * more than once would not be the same. */
static float time_plan(gpt_ctx *ctx, const plan *plan, const product *p, void *out) {
    float best = INFINITY;
    for (int turn = 0; turn < TUNING_TURNS; turn++) {
        cudaEventRecord(ctx->products->begin, ctx->stream);
        if (!multiply(ctx, plan, p, out)) return INFINITY;
        best = least(best, elapsed(ctx));
    }
    return best;
}

/* The library's first choices with so much workspace, at most n. */
static int heuristics(cuda_library *l, const plan *plan, const product *p, size_t workspace_bytes,
                      cublasLtMatmulHeuristicResult_t *found, int n) {
    cublasLtMatmulPreference_t preference;
    /* Parts of a long sum may be added in float32 only, never in bf16. */
    uint32_t sums = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    int n_found = 0;
    if (l->MatmulPreferenceCreate(&preference) != CUBLAS_STATUS_SUCCESS) return 0;
    int bad = l->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &workspace_bytes, sizeof workspace_bytes);
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
        bad = l->MatmulAlgoGetHeuristic(l->lt, plan->desc, plan->a, plan->b, plan->out, plan->out,
                                        preference, n, found, &n_found);
    l->MatmulPreferenceDestroy(preference);
    return bad ? 0 : n_found;
}

static void take(plan *plan, const cublasLtMatmulAlgo_t &algo, size_t workspace_bytes) {
    plan->algo = algo;
    plan->workspace_bytes = workspace_bytes;
}

/* Takes the plan that was measured for this shape before, if the library still knows it. */
static int restore(cuda_library *l, plan *plan) {
    const stored_plan *stored = plan_store_find(l->store, plan->key);
    cublasLtMatmulAlgo_t algo;
    cublasLtMatmulHeuristicResult_t checked;
    static_assert(sizeof algo == sizeof stored->algo);
    if (!stored) return 0;
    memcpy(&algo, stored->algo, sizeof algo);
    if (l->MatmulAlgoCheck(l->lt, plan->desc, plan->a, plan->b, plan->out, plan->out, &algo,
                           &checked) != CUBLAS_STATUS_SUCCESS ||
        checked.workspaceSize > l->workspace_bytes)
        return 0;
    take(plan, algo, checked.workspaceSize);
    return 1;
}

/* Replaces the plan's algorithm by the fastest of the first ones with less or more workspace. Which one
 * that is may differ from one measurement to the next, and with it the last bits of what the products
 * give: so one has to ask for it. */
static void tune(gpt_ctx *ctx, plan *plan, const product *p) {
    cuda_library *l = ctx->products;
    const size_t workspaces[] = {0, PRODUCT_WORKSPACE, TUNED_WORKSPACE};
    cublasLtMatmulHeuristicResult_t found[TUNED_ALGORITHMS];
    cublasLtMatmulAlgo_t fastest = plan->algo;
    size_t workspace_bytes = plan->workspace_bytes;
    float best = INFINITY;
    void *out = NULL;
    bool measures = has_events(l) &&
                    cudaMalloc(&out, sizeof(float) * (size_t)p->M * (size_t)p->ldo) == cudaSuccess;
    for (size_t workspace : workspaces) {
        int n = measures ? heuristics(l, plan, p, workspace, found, TUNED_ALGORITHMS) : 0;
        for (int i = 0; i < n; i++) {
            take(plan, found[i].algo, found[i].workspaceSize);
            float ms = time_plan(ctx, plan, p, out);
            if (ms >= best) continue;
            best = ms;
            fastest = plan->algo;
            workspace_bytes = plan->workspace_bytes;
        }
    }
    take(plan, fastest, workspace_bytes);
    cudaFree(out);
    cudaGetLastError(); /* without room to measure in, it is the first choice */
    if (best == INFINITY) return;
    stored_plan stored = {plan->key, {}, best};
    memcpy(stored.algo, &plan->algo, sizeof stored.algo);
    plan_store_add(l->store, stored);
}

/* The library's first choice for this shape, or the fastest of its first few. */
static int choose(gpt_ctx *ctx, plan *plan, const product *p) {
    cuda_library *l = ctx->products;
    cublasLtMatmulHeuristicResult_t first;
    if (l->tune && restore(l, plan)) return 1;
    if (!heuristics(l, plan, p, l->workspace_bytes, &first, 1)) return 0;
    take(plan, first.algo, first.workspaceSize);
    if (l->tune) tune(ctx, plan, p);
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
    /* With a second output, the library wants rows aligned. */
    made->usable = !(p->pre && p->N % 8) && describe(l, made, p) && set_addresses(l, made, p) &&
                   choose(ctx, made, p);
    return made;
}

static int has_aligned_rows(const product *p) {
    size_t in = p->bf16 ? 2 : 4, out = p->float_out ? 4 : in;
    return (size_t)p->lda * in % 16 == 0 && (size_t)p->ldb * in % 16 == 0 &&
           (size_t)p->ldo * out % 16 == 0;
}

/* Runs the plan, or where it has no algorithm and no epilogue the plain kernel. */
static int run(gpt_ctx *ctx, plan *plan, const product *p) {
    cuda_library *l = ctx->products;
    int done = plan->usable && set_addresses(l, plan, p) && multiply(ctx, plan, p, p->out);
    if (done || p->epilogue != EPILOGUE_NONE) return done;
    /* Rows that are aligned it must know: without it the product would take for ever. */
    if (has_aligned_rows(p))
        cuda_remember(ctx, cudaErrorNotSupported);
    else
        cuda_product_plain(ctx, p);
    return 1;
}

int cuda_product(gpt_ctx *ctx, const product *p) {
    cuda_library *l = ctx->products;
    plan *plan = plan_for(ctx, p);
    if (!plan) { /* the recording fails, and the ops then run: graph.cu */
        cuda_remember(ctx, cudaErrorStreamCaptureUnsupported);
        return 1;
    }
    if (!l->measures) return run(ctx, plan, p);
    cudaEventRecord(l->begin, ctx->stream);
    int done = run(ctx, plan, p);
    float ms = elapsed(ctx);
    plan->calls++;
    if (done && ms < INFINITY) plan->seconds += 1e-3 * (double)ms;
    return done;
}

/* ---- what was measured ---- */

void cuda_products_measure(gpt_ctx *ctx, int on) {
    cuda_library *l = ctx->products;
    for (plan &p : l->plans) p.calls = 0, p.seconds = 0;
    l->measures = on && has_events(l);
}

/* Rows and columns of output that a block has, of those tiles that are often chosen. */
static const char *tile_name(uint32_t tile) {
#define TILES(use)                                                                                 \
    use(64x64) use(64x128) use(128x64) use(64x256) use(128x128) use(256x64) use(128x256)           \
        use(256x128) use(192x128) use(128x192) use(192x256) use(256x192) use(256x256)
#define NAME(size)                                                                                 \
    if (tile == CUBLASLT_MATMUL_TILE_##size) return #size;
    TILES(NAME)
#undef NAME
    return NULL;
}

template <typename T>
static T config_of(const cuda_library *l, const plan *p,
                   cublasLtMatmulAlgoConfigAttributes_t which) {
    T value = 0;
    size_t written;
    l->MatmulAlgoConfigGetAttribute(&p->algo, which, &value, sizeof value, &written);
    return value;
}

/* Algorithms for Hopper and later ones have clusters of blocks, or as many stages as fit. */
static bool is_earlier(const cuda_library *l, uint32_t stages, uint16_t cluster) {
    const uint32_t FIRST_AUTO = 32;
    return l->major >= 9 && cluster == 0 && stages < FIRST_AUTO;
}

static void describe_plan(const cuda_library *l, const plan *p, gpt_product_time *out) {
    uint32_t tile = config_of<uint32_t>(l, p, CUBLASLT_ALGO_CONFIG_TILE_ID);
    uint32_t stages = config_of<uint32_t>(l, p, CUBLASLT_ALGO_CONFIG_STAGES_ID);
    uint16_t cluster = config_of<uint16_t>(l, p, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID);
    char number[16];
    snprintf(number, sizeof number, "%u", tile);
    snprintf(out->plan, sizeof out->plan,
             "algorithm %d, tile %s, stages %u, cluster %u, split-K %d, %.1f MB",
             config_of<int32_t>(l, p, CUBLASLT_ALGO_CONFIG_ID),
             tile_name(tile) ? tile_name(tile) : number, stages, cluster,
             config_of<int32_t>(l, p, CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
             (double)p->workspace_bytes * 1e-6);
    if (is_earlier(l, stages, cluster))
        snprintf(out->problem, sizeof out->problem, "an algorithm of an earlier architecture");
}

static void describe_product(const plan *p, gpt_product_time *out) {
    static const char *const kinds[] = {"a b^T", "a b", "a^T b"};
    static const char *const epilogues[] = {"", "bias", "gelu", "gelu backward"};
    const product &k = p->key;
    snprintf(out->name, sizeof out->name, "%s %d x %d x %d", kinds[k.kind], k.M, k.N, k.K);
    snprintf(out->epilogue, sizeof out->epilogue, "%s%s%s", epilogues[k.epilogue],
             k.epilogue == EPILOGUE_GELU && k.bias ? ", bias" : "", k.add ? "add" : "");
    double size = k.bf16 ? 2 : 4, out_size = k.float_out ? 4 : size, M = k.M, N = k.N, K = k.K;
    double outputs = M * N * (out_size * (k.add ? 2 : 1) + (k.pre ? size : 0));
    out->calls = p->calls;
    out->seconds = p->seconds;
    out->flops = 2 * M * N * K * (double)p->calls;
    out->bytes = (size * (M * K + K * N) + outputs) * (double)p->calls;
}

int cuda_product_read(const gpt_ctx *ctx, int i, gpt_product_time *out) {
    const cuda_library *l = ctx->products;
    for (const plan &p : l->plans) {
        if (p.calls == 0 || i-- > 0) continue;
        *out = {};
        describe_product(&p, out);
        if (p.usable) {
            describe_plan(l, &p, out);
        } else if (p.key.epilogue != EPILOGUE_NONE) {
            out->seconds = out->flops = out->bytes = 0;
            snprintf(out->problem, sizeof out->problem, "the epilogue is not fused");
        } else {
            snprintf(out->problem, sizeof out->problem, "no algorithm: our plain kernel");
        }
        return 1;
    }
    return 0;
}
