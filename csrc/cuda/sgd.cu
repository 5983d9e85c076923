/* sgd.cu: clipping and SGD with momentum in one launch. */
#include "update.h"

/* W numbers from i on. */
template <int W>
static __device__ inline void sgd_numbers(const sgd_update &a, const gpt_sgd &s,
                                          const update_segment &segment, int64_t i, float clip,
                                          elem *packed) {
    float lr = s.lr * segment.lr_scale, decay = segment.decay ? s.weight_decay : 0;
    int64_t at = segment.offset + i, state = segment.state + i;
    float w[W], m[W], g[W];
    load(w, a.w + at);
    load(m, a.momentum + state);
    load(g, a.grads + segment.grad + i);
#pragma unroll
    for (int k = 0; k < W; k++) {
        m[k] = s.momentum * m[k] + (g[k] * clip + decay * w[k]);
        w[k] -= lr * m[k];
    }
    store(a.momentum + state, m);
    store(a.w + at, w);
    if (packed) store(packed, w);
}

static __global__ void sgd_update_kernel(const __grid_constant__ update_args<sgd_update> a) {
    const gpt_sgd sgd = *a.op.step;
    float norm = *a.op.norm, clip = update_clip(norm, sgd.grad_clip);
    if (!isfinite(norm)) return;
    update_numbers(a, [&](auto width, const update_segment &s, int64_t i, elem *packed) {
        sgd_numbers<decltype(width)::value>(a.op, sgd, s, i, clip, packed);
    });
}

CUDA_OP(sgd_update) {
    launch_update(ctx, sgd_update_kernel, *op, GPT_OPTIMIZER_SGD);
}
