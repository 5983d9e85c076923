/* adamw.cu: clipping and AdamW in one launch. */
#include "update.h"

/* W numbers from i on: Loshchilov and Hutter 2019, algorithm 2. */
template <int W>
static __device__ inline void adamw_numbers(const adamw_update &a, const gpt_adamw_step &step,
                                            const update_segment &segment, int64_t i, float clip,
                                            elem *packed) {
    const gpt_adamw &s = step.adamw;
    float lr = s.lr * segment.lr_scale, decay = segment.decay ? s.weight_decay : 0;
    int64_t at = segment.offset + i, state = segment.state + i;
    float *all_m = (float *)a.m + state, *all_v = (float *)a.v + state;
    float w[W], m[W], v[W], g[W];
    load(w, a.w + at);
    load(m, all_m);
    load(v, all_v);
    load(g, a.grads + segment.grad + i);
#pragma unroll
    for (int k = 0; k < W; k++) {
        g[k] *= clip;
        m[k] = s.beta1 * m[k] + (1 - s.beta1) * g[k];
        v[k] = s.beta2 * v[k] + (1 - s.beta2) * g[k] * g[k];
        float direction = m[k] / step.correction1 / (sqrtf(v[k] / step.correction2) + s.eps);
        w[k] -= lr * (direction + decay * w[k]);
    }
    store(all_m, m);
    store(all_v, v);
    store(a.w + at, w);
    if (packed) store(packed, w);
}

static __global__ void adamw_update_kernel(const __grid_constant__ update_args<adamw_update> a) {
    const gpt_adamw_step step = *a.op.step;
    float norm = *a.op.norm, clip = update_clip(norm, step.adamw.grad_clip);
    if (!isfinite(norm)) return;
    update_numbers(a, [&](auto width, const update_segment &s, int64_t i, elem *packed) {
        adamw_numbers<decltype(width)::value>(a.op, step, s, i, clip, packed);
    });
}

CUDA_OP(adamw_update) {
    launch_update(ctx, adamw_update_kernel, *op, GPT_OPTIMIZER_ADAMW);
}
