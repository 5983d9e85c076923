/* cublas_lt.cpp: plain matrix products behind the interface of cuBLASLt, for the emulation. It knows three
 * algorithms for a shape, of which one is the fastest by the emulated clock, the second unless a test
 * chooses another, and the last wants the largest workspace. All of them give the same bits. */
#define CUDA_DTYPE any
#include "cublasLt.h"

#include "activation.h"

#include <stdio.h>

/* ---- for tests ---- */

/* The version that it says it has, and calls of the heuristic so far. */
static std::atomic<size_t> version{130100};
static std::atomic<long> heuristics, products;
static std::atomic<bool> refuses;
static std::atomic<int> fastest{1};

extern "C" void emulate_cublas_version(size_t number) {
    version = number;
}
extern "C" long emulate_cublas_heuristics(void) {
    return heuristics;
}
extern "C" long emulate_cublas_products(void) {
    return products;
}
extern "C" void emulate_cublas_fastest(int i) {
    fastest = i;
}
/* The next product fails. */
extern "C" void emulate_refuse_product(void) {
    refuses = true;
}

/* ---- the interface ---- */

struct emulated_lt {
    int unused;
};

struct emulated_layout {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
};

struct emulated_desc {
    cublasOperation_t first, second;
    cublasLtEpilogue_t epilogue;
    const void *bias;
    void *pre;
    int64_t pre_ld;
};

struct emulated_preference {
    size_t workspace_bytes;
    uint32_t alignment[4]; /* of a, b, c, d */
};

size_t cublasLtGetVersion(void) {
    return version;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *out) {
    emulate_not_recorded("cublasLtCreate");
    *out = new emulated_lt();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t,
                                        cudaDataType_t) {
    emulate_not_recorded("cublasLtMatmulDescCreate");
    *out = new emulated_desc{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL, 0};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t size) {
    int unused;
    void *to = attribute == CUBLASLT_MATMUL_DESC_TRANSA                 ? (void *)&desc->first
               : attribute == CUBLASLT_MATMUL_DESC_TRANSB               ? (void *)&desc->second
               : attribute == CUBLASLT_MATMUL_DESC_EPILOGUE             ? (void *)&desc->epilogue
               : attribute == CUBLASLT_MATMUL_DESC_BIAS_POINTER         ? (void *)&desc->bias
               : attribute == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER ? (void *)&desc->pre
               : attribute == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD      ? (void *)&desc->pre_ld
                                                                        : (void *)&unused;
    memcpy(to, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType_t type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
    emulate_not_recorded("cublasLtMatrixLayoutCreate");
    if (ld < (int64_t)rows) return CUBLAS_STATUS_INVALID_VALUE;
    *out = new emulated_layout{type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
    emulate_not_recorded("cublasLtMatmulPreferenceCreate");
    *out = new emulated_preference{0, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t size) {
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
        memcpy(&preference->workspace_bytes, value, size);
    else if (attribute >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES)
        memcpy(&preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES],
               value, size);
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- algorithms: data[0] is the number of one, and data[1] tells which matrices it was made for ---- */

namespace {

enum { N_ALGORITHMS = 3, FEW = 128 };
const struct algorithm {
    int32_t id;
    uint32_t tile;
    int32_t parts; /* of the sum */
    uint32_t stages;
    uint16_t cluster;
    size_t workspace_bytes;
} algorithms[N_ALGORITHMS] = {
    {66, 20, 1, 36, 3, 0}, {66, 24, 2, 36, 5, 1 << 20}, {21, 15, 1, 15, 0, 2 << 20}};

bool is_known(const cublasLtMatmulAlgo_t *algo) {
    return algo->data[0] < N_ALGORITHMS;
}

size_t bytes_of(cudaDataType_t type) {
    return type == CUDA_R_16BF ? 2 : 4;
}

bool has_aligned_rows(cublasLtMatrixLayout_t layout) {
    return (size_t)layout->ld * bytes_of(layout->type) % 16 == 0;
}

/* As the library, it has the epilogues only for rows that are aligned. Of products without aligned rows
 * it leaves the small ones to our own kernel, which is slow here but is to be tested. */
bool has_product(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                 cublasLtMatrixLayout_t d) {
    if (desc->epilogue != CUBLASLT_EPILOGUE_DEFAULT) return d->rows % 8 == 0;
    bool aligned = has_aligned_rows(a) && has_aligned_rows(b) && has_aligned_rows(d);
    return aligned || d->rows * d->cols > FEW;
}

uint64_t made_for(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                  cublasLtMatrixLayout_t d) {
    uint64_t sum = desc->epilogue;
    for (cublasLtMatrixLayout_t x : {a, b, d})
        for (uint64_t n : {(uint64_t)x->type, x->rows, x->cols, (uint64_t)x->ld})
            sum = sum * 1000003 + n;
    return sum;
}

} // namespace

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t *out, int *found) {
    emulate_not_recorded("cublasLtMatmulAlgoGetHeuristic");
    heuristics++;
    *found = 0;
    if (!has_product(desc, a, b, d)) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (uint64_t i = 0; i < N_ALGORITHMS && *found < wanted; i++) {
        if (algorithms[i].workspace_bytes > preference->workspace_bytes) continue;
        cublasLtMatmulHeuristicResult_t *result = &out[(*found)++];
        *result = {{{i, made_for(desc, a, b, d)}},
                   algorithms[i].workspace_bytes,
                   CUBLAS_STATUS_SUCCESS,
                   1,
                   {}};
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t *algo,
                                       cublasLtMatmulHeuristicResult_t *out) {
    if (!is_known(algo) || algo->data[1] != made_for(desc, a, b, d))
        return CUBLAS_STATUS_INVALID_VALUE;
    *out = {*algo, algorithms[algo->data[0]].workspace_bytes, CUBLAS_STATUS_SUCCESS, 1, {}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                    void *value, size_t size, size_t *written) {
    if (!is_known(algo)) return CUBLAS_STATUS_INVALID_VALUE;
    const algorithm &a = algorithms[algo->data[0]];
    const void *from = attribute == CUBLASLT_ALGO_CONFIG_ID           ? (const void *)&a.id
                       : attribute == CUBLASLT_ALGO_CONFIG_TILE_ID    ? (const void *)&a.tile
                       : attribute == CUBLASLT_ALGO_CONFIG_SPLITK_NUM ? (const void *)&a.parts
                       : attribute == CUBLASLT_ALGO_CONFIG_STAGES_ID  ? (const void *)&a.stages
                                                                      : (const void *)&a.cluster;
    memcpy(value, from, size);
    *written = size;
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- the product ---- */

namespace {

/* d (rows, cols) = op(a) op(b) + c, column-major as in the library; c may be NULL. */
struct work {
    emulated_desc desc;
    emulated_layout a_layout, b_layout, d_layout;
    const void *a, *b, *c;
    void *d;
};

float get(const void *x, cudaDataType_t type, int64_t i) {
    return type == CUDA_R_16BF ? __bfloat162float(((const __nv_bfloat16 *)x)[i])
                               : ((const float *)x)[i];
}

void put(void *x, cudaDataType_t type, int64_t i, float value) {
    if (type == CUDA_R_16BF)
        ((__nv_bfloat16 *)x)[i] = __float2bfloat16(value);
    else
        ((float *)x)[i] = value;
}

template <typename T> float dot(const work &w, int64_t row, int64_t col, int64_t K) {
    bool turned_a = w.desc.first == CUBLAS_OP_T, turned_b = w.desc.second == CUBLAS_OP_T;
    int64_t a_step = turned_a ? 1 : w.a_layout.ld, b_step = turned_b ? w.b_layout.ld : 1;
    const T *a = (const T *)w.a + (turned_a ? row * w.a_layout.ld : row);
    const T *b = (const T *)w.b + (turned_b ? col : col * w.b_layout.ld);
    float sum = 0;
    for (int64_t k = 0; k < K; k++) sum += to_float(a[k * a_step]) * to_float(b[k * b_step]);
    return sum;
}

void multiply(const work &w) {
    const emulated_desc &desc = w.desc;
    cudaDataType_t in = w.a_layout.type, out = w.d_layout.type;
    int64_t K = (int64_t)(desc.first == CUBLAS_OP_T ? w.a_layout.rows : w.a_layout.cols);
    bool gelu = desc.epilogue & CUBLASLT_EPILOGUE_GELU;
    for (int64_t col = 0; col < (int64_t)w.d_layout.cols; col++)
        for (int64_t row = 0; row < (int64_t)w.d_layout.rows; row++) {
            int64_t at = col * w.d_layout.ld + row, pre = col * desc.pre_ld + row;
            float y =
                in == CUDA_R_16BF ? dot<__nv_bfloat16>(w, row, col, K) : dot<float>(w, row, col, K);
            float unused;
            if (desc.epilogue & CUBLASLT_EPILOGUE_BIAS) y += get(desc.bias, in, row);
            if (desc.epilogue == CUBLASLT_EPILOGUE_DGELU)
                y = activation_backward(GPT_ACT_GELU, y, get(desc.pre, in, pre), 0, &unused);
            if (gelu) {
                if (desc.epilogue & 128) put(desc.pre, in, pre, y);
                y = activation_forward(GPT_ACT_GELU, y, 0);
            }
            if (w.c) y += get(w.c, out, at);
            put(w.d, out, at, y);
        }
}

/* As product.h has it: rows of ours are columns here. */
void describe(char *text, size_t size, const work &w) {
    int64_t K = (int64_t)(w.desc.first == CUBLAS_OP_T ? w.a_layout.rows : w.a_layout.cols);
    const char *kind = w.desc.first == CUBLAS_OP_T    ? "NT"
                       : w.desc.second == CUBLAS_OP_T ? "TN"
                                                      : "NN";
    snprintf(text, size, "%s %lld %lld %lld %d %s%s", kind, (long long)w.d_layout.cols,
             (long long)w.d_layout.rows, (long long)K, (int)w.desc.epilogue,
             w.d_layout.type == CUDA_R_32F ? "float" : "bf16", w.c ? " add" : "");
}

} // namespace

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t, void *d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t *algo, void *, size_t workspace_bytes,
                              cudaStream_t) {
    products++;
    if (refuses.exchange(false)) return CUBLAS_STATUS_EXECUTION_FAILED;
    if (!is_known(algo) || algorithms[algo->data[0]].workspace_bytes > workspace_bytes ||
        algo->data[1] != made_for(desc, a_layout, b_layout, d_layout))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (*(const float *)alpha != 1) return CUBLAS_STATUS_NOT_SUPPORTED;
    const void *added = *(const float *)beta != 0 ? c : NULL;
    work w = {*desc, *a_layout, *b_layout, *d_layout, a, b, added, d};
    char text[96];
    describe(text, sizeof text, w);
    float ms = (int)algo->data[0] == fastest ? 1 : 2 + (float)algo->data[0];
    emulate_enqueue("product", text, [=] {
        emulate_pass(ms);
        multiply(w);
    });
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- opening it ---- */

void *emulate_dlopen(const char *, int) {
    return (void *)cublasLtCreate;
}

int emulate_dlclose(void *) {
    return 0;
}

void *emulate_dlsym(void *, const char *name) {
#define FUNCTION(function)                                                                         \
    if (!strcmp(name, #function)) return (void *)function;
    FUNCTION(cublasLtGetVersion)
    FUNCTION(cublasLtCreate)
    FUNCTION(cublasLtDestroy)
    FUNCTION(cublasLtMatmul)
    FUNCTION(cublasLtMatmulAlgoGetHeuristic)
    FUNCTION(cublasLtMatmulAlgoCheck)
    FUNCTION(cublasLtMatmulAlgoConfigGetAttribute)
    FUNCTION(cublasLtMatmulDescCreate)
    FUNCTION(cublasLtMatmulDescDestroy)
    FUNCTION(cublasLtMatmulDescSetAttribute)
    FUNCTION(cublasLtMatrixLayoutCreate)
    FUNCTION(cublasLtMatrixLayoutDestroy)
    FUNCTION(cublasLtMatmulPreferenceCreate)
    FUNCTION(cublasLtMatmulPreferenceDestroy)
    FUNCTION(cublasLtMatmulPreferenceSetAttribute)
#undef FUNCTION
    return NULL;
}
