/* product.cpp: a plain matrix product in cuBLASLt's place. */
#define CUDA_DTYPE any
#include "product.h"

#include "activation.h"
#include "error.h"

#include <stdio.h>

struct cuda_library {
    int unused;
};

int cuda_products_open(cuda_library **out) {
    *out = (cuda_library *)calloc(1, sizeof **out);
    return *out ? GPT_OK : GPT_ERR_MEMORY;
}

void cuda_products_close(cuda_library *library) {
    free(library);
}

int cuda_products_describe(char *out, size_t size) {
    snprintf(out, size, "a plain product");
    return GPT_OK;
}

static float get(const void *x, int bf16, int64_t i) {
    return bf16 ? __bfloat162float(((const __nv_bfloat16 *)x)[i]) : ((const float *)x)[i];
}

static void put(void *x, int bf16, int64_t i, float value) {
    if (bf16)
        ((__nv_bfloat16 *)x)[i] = __float2bfloat16(value);
    else
        ((float *)x)[i] = value;
}

static float dot(const product *p, int m, int n) {
    float sum = 0;
    for (int k = 0; k < p->K; k++) {
        int64_t a = p->kind == PRODUCT_TN ? (int64_t)k * p->lda + m : (int64_t)m * p->lda + k;
        int64_t b = p->kind == PRODUCT_NT ? (int64_t)n * p->ldb + k : (int64_t)k * p->ldb + n;
        sum += get(p->a, p->bf16, a) * get(p->b, p->bf16, b);
    }
    return sum;
}

static void multiply(const product *p) {
    for (int m = 0; m < p->M; m++)
        for (int n = 0; n < p->N; n++) {
            int64_t at = (int64_t)m * p->ldo + n, pre = (int64_t)m * p->N + n;
            float y = dot(p, m, n), unused;
            if (p->bias) y += get(p->bias, p->bf16, n);
            if (p->epilogue == EPILOGUE_GELU_BACKWARD)
                y = activation_backward(GPT_ACT_GELU, y, get(p->pre, p->bf16, pre), 0, &unused);
            if (p->epilogue == EPILOGUE_GELU) {
                if (p->pre) put(p->pre, p->bf16, pre, y);
                y = activation_forward(GPT_ACT_GELU, y, 0);
            }
            if (p->add) y += get(p->out, p->bf16 && !p->float_out, at);
            put(p->out, p->bf16 && !p->float_out, at, y);
        }
}

/* For tests: the next product has no plan, as if others had taken its place. */
static bool forgets;
extern "C" void emulate_forget_plan(void) {
    forgets = true;
}

enum { FEW = 128 };

/* As the library, it has the epilogues only for rows that are aligned. Small products are left to our own
 * kernel, which is slow here but is to be tested. */
int cuda_product(gpt_ctx *ctx, const product *p) {
    if (forgets) {
        forgets = false;
        cuda_remember(ctx, cudaErrorNotSupported);
        return 1;
    }
    if (p->epilogue != EPILOGUE_NONE && p->N % 8) return 0;
    if (p->epilogue == EPILOGUE_NONE && (int64_t)p->M * p->N <= FEW)
        cuda_product_plain(ctx, p);
    else
        emulate_enqueue([p = *p] { multiply(&p); });
    return 1;
}
