/* buckets.c: the gradients in ranges, in the order in which backward completes them.
 *
 * Products' gradients come first in the buffer, in the order of layers: backward completes them from the end.
 * The last ranges are those of a tied embedding, and of all that products do not write. */
#include "model.h"

/* Ranges, but for those that end where another layer is needed. */
enum { MOST_BUCKETS = 512 };

/* The first gradient that no product writes. */
static int64_t products_end(const params_layout *layout) {
    for (int i = 0; i < layout->n_slots; i++) {
        const gpt_segment *s = &layout->segments[i];
        if (s->grad >= 0 && !s->product) return s->grad;
    }
    return layout->n_grads;
}

/* The last of the products whose gradient is before `end`, or -1. */
static int product_before(const params_layout *layout, int64_t end) {
    for (int i = layout->n_slots - 1; i >= 0; i--) {
        const gpt_segment *s = &layout->segments[i];
        if (s->product && s->grad >= 0 && s->grad < end) return i;
    }
    return -1;
}

/* The range that ends there. */
static bucket cut(const params_layout *layout, int64_t least, int64_t end) {
    int i = product_before(layout, end);
    if (i < 0) return (bucket){products_end(layout), layout->n_grads, -1};
    bucket b = {end, end, layout->slots[i].layer};
    if (least < layout->n_grads / MOST_BUCKETS) least = layout->n_grads / MOST_BUCKETS;
    while (i >= 0 && b.end - b.begin < least) {
        int layer = layout->slots[i].layer;
        if (layer < 0 && b.begin < b.end && b.layer >= 0)
            break; /* an embedding, which comes last */
        b.begin = layout->segments[i].grad, b.layer = layer;
        i = product_before(layout, b.begin);
    }
    return b;
}

bucket bucket_first(const params_layout *layout, int64_t least) {
    if (layout->n_grads <= least) return (bucket){0, layout->n_grads, -1};
    return cut(layout, least, products_end(layout));
}

bucket bucket_after(const params_layout *layout, int64_t least, bucket b) {
    bucket none = {layout->n_grads, layout->n_grads, -1};
    if (b.end == layout->n_grads && b.begin == 0) return none;
    if (b.begin == products_end(layout)) return none; /* the last */
    return cut(layout, least, b.begin);
}
