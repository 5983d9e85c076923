/* weights_quant.h: how the tables with quantized weights make them. */
#ifndef CPU_WEIGHTS_QUANT_H
#define CPU_WEIGHTS_QUANT_H

#include "quant.h"

#define quant_bf16_bytes    CPU_NAME(quant_bf16_bytes)
#define quant_bf16_pack     CPU_NAME(quant_bf16_pack)
#define quant_rounded_bytes CPU_NAME(quant_rounded_bytes)
#define quant_round         CPU_NAME(quant_round)
#define quant_weight_bytes  CPU_NAME(quant_weight_bytes)
#define quant_blocks_bytes  CPU_NAME(quant_blocks_bytes)
#define quant_blocks_given  CPU_NAME(quant_blocks_given)
#define quant_blocks_pack   CPU_NAME(quant_blocks_pack)
#define quant_blocks_unpack CPU_NAME(quant_blocks_unpack)
#define quant_put_block     CPU_NAME(quant_put_block)
#define quant_search_block  CPU_NAME(quant_search_block)

/* A matrix as the bf16 table has it, with a head. */
size_t quant_bf16_bytes(int rows, int cols, int parts, int training);
void quant_bf16_pack(gpt_ctx *ctx, const weights_pack *op);

/* One block: its integers as the form has them, its scales and minima. */
typedef struct block_parts {
    uint8_t u[QUANT_BLOCK];
    int8_t scale[QUANT_BLOCK / 16], least[QUANT_BLOCK / 16]; /* of each group, in forms of 256 */
    uint16_t d, d_least; /* float16. The minimum is d_least, or d_least times least */
} block_parts;

/* `size` numbers of row j of a panel of K terms, from number `first` on. */
void quant_put_block(quant_form f, uint8_t *panel, int K, int j, int first, int size,
                     const block_parts *b);

/* 256 numbers as a block of FORM_Q4_K, by a search for its scales and minima. */
void quant_search_block(block_parts *out, const float *x);

/* A matrix rounded to FORM_INT8, or to 4 bits: FORM_Q4_K where rows are whole blocks of it, else
 * FORM_INT4. */
size_t quant_rounded_bytes(int form, int rows, int cols, int parts);
void quant_round(gpt_ctx *ctx, int form, const weights_pack *op);

/* Slots of gpt_ops. */
size_t quant_weight_bytes(const weight *w);
size_t quant_blocks_bytes(const gpt_segment *segment);
size_t quant_blocks_given(const gpt_segment *segment, int part);
void quant_blocks_pack(gpt_ctx *ctx, const gpt_segment *segment, int part, const void *blocks);
void quant_blocks_unpack(gpt_ctx *ctx, float *out, const gpt_segment *segment, const int32_t *rows,
                         int n);

#endif
