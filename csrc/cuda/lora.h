/* lora.h: the parts of an adapter, which lora.cu and dora.cu share. */
#ifndef CUDA_LORA_H
#define CUDA_LORA_H

#include "cuda.h"

/* Those of parts, in their order; `before`: rows of the parts before. */
typedef struct lora_rows {
    lora_part parts[GPT_MAX_STACKED];
    int before[GPT_MAX_STACKED + 1], n_parts;
} lora_rows;

template <typename op_type> static inline lora_rows lora_rows_of(const op_type *op) {
    lora_rows rows = {};
    rows.n_parts = op->n_parts;
    for (int i = 0; i < op->n_parts; i++) {
        rows.parts[i] = op->parts[i];
        rows.before[i + 1] = rows.before[i] + op->parts[i].rows;
    }
    return rows;
}

/* The part that column col of the layer's products is in; -1: none. */
static __device__ inline int lora_part_at(const lora_rows &rows, int col) {
    for (int i = 0; i < rows.n_parts; i++)
        if (col >= rows.parts[i].first && col < rows.parts[i].first + rows.parts[i].rows) return i;
    return -1;
}

/* The part that row `row` of B is in. */
static __device__ inline int lora_part_of(const lora_rows &rows, int row) {
    int i = 0;
    while (row >= rows.before[i + 1]) i++;
    return i;
}

#endif
