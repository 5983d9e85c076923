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
#define quant_blocks_pack   CPU_NAME(quant_blocks_pack)
#define quant_blocks_unpack CPU_NAME(quant_blocks_unpack)
#define quant_put_block     CPU_NAME(quant_put_block)
#define quant_search_blocks CPU_NAME(quant_search_blocks)

/* A matrix as the bf16 table has it, with a head. */
size_t quant_bf16_bytes(int rows, int cols, int parts, int training);
void quant_bf16_pack(gpt_ctx *ctx, const weights_pack *op);

/* A matrix rounded to FORM_INT8 or FORM_Q4_K. */
size_t quant_rounded_bytes(int form, int rows, int cols, int parts);
void quant_round(gpt_ctx *ctx, int form, const weights_pack *op);

/* Column j of a panel from term `first` on, of `size` terms: whole groups of 32. The panel is zero there. */
void quant_put_block(quant_form f, uint8_t *panel, int K, int j, int first, int size,
                     const block_parts *b);

/* Q4_K blocks of up to 16 rows of x, ld apart: n numbers of each, up to 256. A block with a number that is not
 * finite, or 2^20 or more, is not a number. */
void quant_search_blocks(block_parts *out, const float *x, int64_t ld, int rows, int n);

/* Slots of gpt_ops. */
size_t quant_weight_bytes(gpt_ctx *ctx, const weight *w);
size_t quant_blocks_bytes(const gpt_segment *segment);
void quant_blocks_pack(gpt_ctx *ctx, const gpt_segment *segment, int part, const void *blocks);
void quant_blocks_unpack(gpt_ctx *ctx, float *out, const gpt_segment *segment, const int32_t *rows,
                         int n);

#endif
