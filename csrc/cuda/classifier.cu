/* classifier.cu: the output head fused with softmax cross-entropy, over chunks of rows: a chunk's logits
 * become its gradient in place. */
#include "columns.h"
#include "losses.h"
#include "weights.h"

enum { MIN_CHUNK_ROWS = 128 };
/* Larger chunks read and write dwte less often; smaller ones need less workspace. With GPT-2's
 * vocabulary in bf16 this is 44 tiles of 128 rows: with 3 of 256 columns, for dx, as many as a large GPU
 * has multiprocessors. */
#ifndef CHUNK_BYTES
#define CHUNK_BYTES ((size_t)544 << 20)
#endif

/* The most rows that a chunk has of N or more. */
static int most_chunk_rows(int N, int Vp) {
    int rows = (int)least<size_t>(CHUNK_BYTES / (sizeof(elem) * (size_t)Vp), (size_t)1 << 30);
    return least(N, most(rows / MIN_CHUNK_ROWS, 1) * MIN_CHUNK_ROWS);
}

/* As few chunks as that allows, of nearly equal size. */
static int chunk_rows(int N, int Vp) {
    int64_t n_chunks = div_up(N, most_chunk_rows(N, Vp));
    return (int)least<int64_t>(N, div_up(div_up(N, n_chunks), MIN_CHUNK_ROWS) * MIN_CHUNK_ROWS);
}

static size_t logits_bytes(int N, int Vp) {
    return align_up(sizeof(elem) * (size_t)most_chunk_rows(N, Vp) * (size_t)Vp);
}

/* Logits, quantized weights as bf16 again, all of them for gradients, and sums of the gradient of biases. */
CUDA_WORKSPACE(classifier_workspace) {
    size_t numbers =
        shape->training ? weight_numbers(shape->Vp, shape->C) : slab_numbers(shape->Vp, shape->C);
    size_t sums = shape->training && shape->head_bias ? column_bytes(1, shape->Vp) : 0;
    return logits_bytes(shape->N, shape->Vp) + align_up(sizeof(elem) * numbers) + sums;
}

/* Without dx: the losses alone. */
static void classifier(gpt_ctx *ctx, const classifier_backward *op, int exact) {
    int N = op->N, C = op->C, V = op->V, Vp = op->Vp;
    const elem *x = (const elem *)op->x;
    elem *dx = (elem *)op->dx;
    elem *logits = (elem *)ctx->workspace;
    elem *room = (elem *)((char *)logits + logits_bytes(N, Vp));
    float *sums = (float *)((char *)room + align_up(sizeof(elem) * weight_numbers(Vp, C)));
    const void *wte = dx ? whole_weight(ctx, op->wte, room, Vp, C) : op->wte;
    int rows = chunk_rows(N, Vp);
    for (int row = 0; row < N; row += rows) {
        int n = least(rows, N - row);
        const elem *x_chunk = x + (int64_t)row * C;
        product head = {.kind = PRODUCT_NT,
                        .bf16 = IS_BF16,
                        .M = n,
                        .N = Vp,
                        .K = C,
                        .lda = C,
                        .ldb = C,
                        .ldo = Vp,
                        .out = logits,
                        .a = x_chunk,
                        .b = wte};
        if (dx)
            weight_product(ctx, &head, room, 1);
        else
            slab_product(ctx, &head, room, exact);
        const float *weights = op->weights ? op->weights + row : NULL;
        cuda_losses(ctx, {op->losses + row, logits, op->targets + row, weights, op->scale,
                          op->label_smoothing, op->z_loss, op->cap, op->b, dx != NULL, n, V, Vp});
        if (!dx) continue;
        product dinput = {.kind = PRODUCT_NN,
                          .bf16 = IS_BF16,
                          .M = n,
                          .N = C,
                          .K = Vp,
                          .lda = Vp,
                          .ldb = C,
                          .ldo = C,
                          .out = dx + (int64_t)row * C,
                          .a = logits,
                          .b = wte};
        cuda_product(ctx, &dinput);
        /* All Vp rows, whose padding receives zeros: with V the library chooses a slower product. */
        product dweight = {.kind = PRODUCT_TN,
                           .bf16 = IS_BF16,
                           .float_out = 1,
                           .add = op->add || row > 0,
                           .M = Vp,
                           .N = C,
                           .K = n,
                           .lda = Vp,
                           .ldb = C,
                           .ldo = C,
                           .out = op->dwte,
                           .a = logits,
                           .b = x_chunk};
        if (op->dwte) cuda_product(ctx, &dweight);
        if (op->db) cuda_sum_columns(ctx, op->db, sums, logits, n, Vp);
    }
}

CUDA_OP(classifier_forward) {
    classifier_backward losses = {};
    losses.losses = op->losses;
    losses.x = op->x;
    losses.wte = op->wte;
    losses.targets = op->targets;
    losses.cap = op->cap;
    losses.b = op->b;
    losses.N = op->N;
    losses.C = op->C;
    losses.V = op->V;
    losses.Vp = op->Vp;
    classifier(ctx, &losses, op->exact);
}

CUDA_OP(classifier_backward) {
    classifier(ctx, op, 1);
    cuda_total_losses(ctx, op->total, op->losses, op->weights, op->scale, op->add, op->N);
}
