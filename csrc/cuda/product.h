/* product.h: matrix products through cuBLASLt, on row-major matrices, as in cpu/product.h. */
#ifndef CUDA_PRODUCT_H
#define CUDA_PRODUCT_H

#include "cuda.h"

#ifdef CUDA_BF16
enum { IS_BF16 = 1 };
#else
enum { IS_BF16 = 0 };
#endif

enum product_kind {
    PRODUCT_NT, /* out = a b^T: a (M, K), b (N, K) */
    PRODUCT_NN, /* out = a b:   a (M, K), b (K, N) */
    PRODUCT_TN, /* out = a^T b: a (K, M), b (K, N) */
};

enum product_epilogue {
    EPILOGUE_NONE,
    EPILOGUE_BIAS,          /* out += bias */
    EPILOGUE_GELU,          /* pre = out + bias, out = gelu(pre); either may be absent */
    EPILOGUE_GELU_BACKWARD, /* out *= gelu'(pre) */
};

struct product {
    int kind, epilogue = EPILOGUE_NONE;
    int bf16 = 0;      /* what a, b, bias and pre hold, else float32 */
    int float_out = 0; /* out is float32 whatever they are */
    int add = 0;       /* out += rather than = */
    int M, N, K;
    int lda, ldb, ldo; /* numbers from one row to the next */
    void *out;         /* (M, N) */
    const void *a, *b;
    const void *bias = NULL; /* (N) or NULL */
    void *pre = NULL;        /* (M, N), row after row, or NULL */
    bool operator==(const product &) const = default;
};

/* Runs it, or returns 0 and does nothing where the library has no such epilogue at this shape. Where it
 * has no such product even without one, that is an error that sync reports. */
int cuda_product(gpt_ctx *ctx, const product *p);
/* One without an epilogue, slowly: product_plain.cu. */
void cuda_product_plain(gpt_ctx *ctx, const product *p);

/* Device memory that the library keeps for itself, and that it keeps where products are tuned. */
#ifndef PRODUCT_WORKSPACE
#define PRODUCT_WORKSPACE (32 << 20)
#define TUNED_WORKSPACE   (128 << 20)
#endif
/* Opening it gives a status, with its sentence. */
int cuda_products_open(cuda_library **out);
void cuda_products_close(cuda_library *library);
/* Times each product from now on, from 0, or no longer; and what was measured: gpt_ops.product. */
void cuda_products_measure(gpt_ctx *ctx, int on);
int cuda_product_read(const gpt_ctx *ctx, int i, gpt_product_time *out);
/* For tests: as if other products had taken the place of all plans. */
extern "C" void cuda_products_forget(gpt_ctx *ctx);
/* The version and the file that would be opened, as text. */
int cuda_products_describe(char *out, size_t size);

#endif
