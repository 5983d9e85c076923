/* weights.h: products with weights in the form of this table: float32 parameters, bf16, or quantized. */
#ifndef CUDA_WEIGHTS_H
#define CUDA_WEIGHTS_H

#include "product.h"
#ifdef CUDA_PACKED
#include "packed.h"
#elif defined CUDA_QUANT
#include "quant.h"
#endif

/* A product of kind NT of a few rows, whose time is that of reading p->b; 0 where there are more: product_few.cu.
 * `early`: b is older than the kernel in front. */
#define cuda_few_product CUDA_ACTS_NAME(few_product)
int cuda_few_product(gpt_ctx *ctx, const product *p, bool early);

#ifdef CUDA_BF16
/* One of up to 64 rows with p->b in bf16, if rows are aligned; else 0: product_rows_bf16.cu. */
int cuda_rows_product(gpt_ctx *ctx, const product *p, bool early);
#endif

#ifdef CUDA_QUANT
/* One of a few rows with p->b in this table's form; else 0: product_quant.cu, product_packed.cu. */
#define cuda_quant_product CUDA_FORM_NAME(quant_product)
int cuda_quant_product(gpt_ctx *ctx, const product *p);
#endif

/* Numbers of room that products with a whole weight need, to make it bf16. */
static inline size_t weight_numbers(int rows, int cols) {
#ifdef CUDA_QUANT
    return (size_t)rows * (size_t)cols;
#else
    (void)rows, (void)cols;
    return 0;
#endif
}

/* The weight (rows, cols) as bf16, in `room`; as it is in tables that read it so. */
static inline const void *whole_weight(gpt_ctx *ctx, const void *w, elem *room, int rows,
                                       int cols) {
#ifdef CUDA_QUANT
    cuda_unpack(ctx, room, w, 0, rows, rows, cols);
    return room;
#else
    (void)ctx, (void)room, (void)rows, (void)cols;
    return w;
#endif
}

/* Products whose b has the bf16 table's form; `early` as above. */
static inline int plain_product(gpt_ctx *ctx, const product *p, bool early) {
    if (cuda_few_product(ctx, p, early)) return 1;
#ifdef CUDA_BF16
    if (cuda_rows_product(ctx, p, early)) return 1;
#else
    (void)early;
#endif
    return cuda_product(ctx, p);
}

/* A product with a weight, of any number of rows. `exact`: by the numbers that whole_weight makes of it. Where the
 * weight becomes bf16, p->b is `room` afterwards, so that another try finds it there. */
static inline int weight_product(gpt_ctx *ctx, product *p, elem *room, int exact) {
#ifdef CUDA_QUANT
    if (p->b != room) {
        if (!exact && cuda_quant_product(ctx, p)) return 1;
        p->b = whole_weight(ctx, p->b, room, p->N, p->K);
    }
    return plain_product(ctx, p, false);
#else
    (void)room, (void)exact;
    return plain_product(ctx, p, true);
#endif
}

/* ---- a slab of a weight's rows at a time: for logits, whose weight is the largest ---- */

#ifndef SLAB_BYTES
#define SLAB_BYTES (64 << 20)
#endif

/* Rows of a slab, and numbers of room for one. */
static inline int slab_rows(int rows, int cols) {
    int64_t most_rows = SLAB_BYTES / (int64_t)(sizeof(elem) * (size_t)cols) / 64 * 64;
    return (int)least<int64_t>(rows, most(most_rows, (int64_t)64));
}
static inline size_t slab_numbers(int rows, int cols) {
    return weight_numbers(slab_rows(rows, cols), cols);
}

/* weight_product without bias and epilogue, with room for a slab. */
static inline void slab_product(gpt_ctx *ctx, product *p, elem *room, int exact) {
#ifdef CUDA_QUANT
    if (!exact && cuda_quant_product(ctx, p)) return;
    size_t number = p->float_out ? sizeof(float) : sizeof(elem);
    int slab = slab_rows(p->N, p->K);
    for (int first = 0; first < p->N; first += slab) {
        product part = *p;
        part.N = least(slab, p->N - first);
        part.out = (char *)p->out + number * (size_t)first;
        part.b = room;
        cuda_unpack(ctx, room, p->b, first, part.N, p->N, p->K);
        plain_product(ctx, &part, false);
    }
#else
    weight_product(ctx, p, room, exact);
#endif
}

#endif
