/* boxes.cu: maps of tensors, which the driver makes; once for both dtypes. */
#define CUDA_DTYPE any
#include "boxes.h"

/* cuTensorMapEncodeTiled, whose enumerations are int here: its header has our cuda.h's name. */
typedef int (*encode_tiled)(box_map *map, int type, uint32_t rank, void *address,
                            const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                            const uint32_t *steps, int interleave, int swizzle, int promotion,
                            int fill);
enum { TYPE_BFLOAT16 = 9, NOT_INTERLEAVED = 0, SWIZZLE_128 = 3, PROMOTION_256 = 3, FILL_ZERO = 0 };
enum { SINCE_CUDA = 12000 };

/* The driver's function, or NULL. */
static encode_tiled find_encode(void) {
    void *found = NULL;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, SINCE_CUDA,
                                     cudaEnableDefault, &result);
    return (encode_tiled)found;
}

box_map cuda_box_map(gpt_ctx *ctx, const void *x, int B, int T, int heads, int HS, int rows) {
    box_map map = {};
    static const encode_tiled encode = find_encode();
    const uint64_t sizes[4] = {(uint64_t)HS, (uint64_t)heads, (uint64_t)T, (uint64_t)B};
    const uint64_t head = 2 * sizes[0], row = head * sizes[1],
                   strides[3] = {head, row, row * sizes[2]};
    const uint32_t box[4] = {BOX_COLS, 1, (uint32_t)rows, 1}, steps[4] = {1, 1, 1, 1};
    if (!encode || encode(&map, TYPE_BFLOAT16, 4, (void *)x, sizes, strides, box, steps,
                          NOT_INTERLEAVED, SWIZZLE_128, PROMOTION_256, FILL_ZERO))
        cuda_remember(ctx, cudaErrorInvalidValue);
    return map;
}
