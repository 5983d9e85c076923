/* adapter.h: adapters in the products of their layers, in bf16: see adapter_bf16.c. `memory` is a part of the
 * workspace that products leave alone, of cpu_adapter_bytes. */
#ifndef CPU_ADAPTER_H
#define CPU_ADAPTER_H

#include "product.h"

#ifdef CPU_BF16

#define cpu_adapter_bytes     CPU_ACTS_NAME(adapter_bytes)
#define cpu_adapter_forward   CPU_ACTS_NAME(adapter_forward)
#define cpu_adapter_backward  CPU_ACTS_NAME(adapter_backward)
#define cpu_adapter_gradients CPU_ACTS_NAME(adapter_gradients)

/* Bytes of workspace that the bf16 table's products of kind TN use. */
size_t CPU_ACTS_NAME(product_workspace)(int N, int K);

/* For N rows, a rank R, and at most `widest` columns of inputs and outputs. */
size_t cpu_adapter_bytes(int N, int R, int widest);

/* u = in a^T, and what the layer's product adds for y += scale u b^T. */
product_more cpu_adapter_forward(gpt_ctx *ctx, const struct lora_forward *op, void *memory);

/* du = scale dout b, and what the layer's product adds for din += du a. */
product_more cpu_adapter_backward(gpt_ctx *ctx, const struct lora_backward *op, void *memory);

/* da += du^T in and db += scale dout^T u, after cpu_adapter_backward with the same memory. */
void cpu_adapter_gradients(gpt_ctx *ctx, const struct lora_backward *op, void *memory);

#endif
#endif
