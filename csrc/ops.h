/* ops.h: the layers, as a table of functions that every backend fills.
 *
 * csrc/model/ is written once against this table. cpu/ and cuda/ implement it, file by file and
 * name by name: the slot norm_forward is cpu_norm_forward in cpu/norm.c.
 *
 * The letters of every shape comment here and in model/:
 *     B    batch                     V    vocab_size
 *     T    time                      Vp   V padded, the rows of the embedding table in memory
 *     N    rows, usually B T         NH   n_head
 *     C    n_embd                    NKV  n_kv_head (NKV divides NH)
 *     F    n_ff                      HS   head size, C / NH
 *     L    n_layer                   QKV  (NH + 2 NKV) HS, packed queries, keys, values
 *
 * Conventions
 *  - Arguments: context, outputs, inputs, sizes. Tensors are row-major and do not overlap, unless a
 *    comment says "in place".
 *  - `d` + name is the gradient of the loss with respect to name. Each backward says whether it
 *    writes (dx =) or adds (dw +=). Weight gradients add, so that micro-batches accumulate; those of
 *    products write where `add` is 0, which spares the first micro-batch clearing and reading them.
 *  - Sizes were validated by the caller: ops cannot fail. A device's error is remembered on the
 *    context and reported by its sync.
 *  - An op is a function of its arguments alone: the same inputs give the same bits for a given
 *    number of threads.
 *  - Ops may use the context's workspace, whose contents mean nothing between two ops. */
#ifndef GPT_OPS_H
#define GPT_OPS_H

#include "gpt.h"

/* Functions here that a device's compiler must have on both sides. */
#ifdef __CUDACC__
#define GPT_EVERYWHERE __host__ __device__
#else
#define GPT_EVERYWHERE
#endif

/* The device, its threads or streams, its workspace. Each backend defines its own. */
typedef struct gpt_ctx gpt_ctx;

/* Element types that depend on the backend's dtype. `float` and `int32_t` are what they say.
 * `const` belongs to what is pointed at; the types are void so that model/ cannot index them. */
typedef void act;    /* activations and their gradients */
typedef void weight; /* weights as the products read them: packed, or the parameters themselves */

/* A dropout. Element i is dropped where uniform(key, i) < p, and scaled by 1/(1-p) elsewhere;
 * backward asks for the same elements again, so that no mask is ever stored. p = 0: nothing. */
typedef struct gpt_dropout {
    float p;
    uint64_t key;
} gpt_dropout;

/* What ops are given of it: dropout_at makes the key. It comes from the device's memory, so that a
 * recorded step reads the present one. */
typedef struct gpt_dropout_site {
    float p;
    uint64_t site;       /* which dropout of the model */
    const uint64_t *key; /* (1) from (seed, step, micro-step); not read where p is 0 */
} gpt_dropout_site;

/* The extent of a model's buffers, from which a backend sizes its workspace. */
typedef struct gpt_shape {
    int32_t N, T; /* the largest number of rows, and the longest sequence, of any call */
    int32_t C, V, Vp, NH, NKV, HS, F;
    int32_t activation;
    int32_t training;
    int64_t n_params; /* numbers in the parameter buffer, padding included */
} gpt_shape;

/* One tensor of the parameter buffer, as the optimizer sees it. */
typedef struct gpt_segment {
    int64_t offset, size; /* size = rows cols */
    int32_t decay;
    int32_t product; /* its gradient comes from a product, and needs no clearing before one */
    int32_t rows, cols;
    int32_t parts;  /* rows come in this many equal parts, whose outputs stand side by side */
    weight *packed; /* where the products' form of it is kept; NULL: there is none */
} gpt_segment;

/* ---- embedding.c ---- */

/* out[n] = wte[tokens[n]] + wpe[position of n], from the float32 parameters. positions NULL: row n
 * stands at n % T. wpe NULL: no learned positions. */
typedef void embedding_forward_fn(gpt_ctx *ctx, act *out /* (N, C) */,
                                  const int32_t *tokens /* (N) */,
                                  const int32_t *positions /* (N) or NULL */,
                                  const float *wte /* (Vp, C) */,
                                  const float *wpe /* (block_size, C) or NULL */, int N, int T,
                                  int C);
/* dwte +=, dwpe +=. The order of additions is fixed, so the result is deterministic. */
typedef void embedding_backward_fn(gpt_ctx *ctx, float *dwte /* (Vp, C) */,
                                   float *dwpe /* (block_size, C) or NULL */,
                                   const act *dout /* (N, C) */, const int32_t *tokens /* (N) */,
                                   int N, int T, int C, int V);

/* ---- dropout.c ---- */

/* In place: x = dropout(x), over n numbers; and its gradient, dx = dropout(dx), the same key. */
typedef void dropout_forward_fn(gpt_ctx *ctx, act *x, int64_t n, gpt_dropout_site dropout);
typedef dropout_forward_fn dropout_backward_fn;

/* ---- norm.c ---- */

/* The residual stream and the norm that reads it, in one pass (resid_out may be resid):
 *     resid_out = resid + dropout(branch);  out = norm(resid_out)
 * With branch NULL, out = norm(resid) and resid_out is not touched. stats keeps (mean, 1/std) of
 * each row for backward (mean is 0 for RMSNorm); NULL where there is none. w and b may be NULL. */
typedef void residual_norm_forward_fn(gpt_ctx *ctx, act *resid_out /* (N, C) */,
                                      act *out /* (N, C) */, float *stats /* (N, 2) or NULL */,
                                      const act *resid /* (N, C) */,
                                      const act *branch /* (N, C) or NULL */,
                                      const float *w /* (C) or NULL */,
                                      const float *b /* (C) or NULL */, gpt_dropout_site dropout,
                                      int norm, float eps, int N, int C);
/* dresid += the norm's gradient, dw +=, db +=. Then, where dbranch is not NULL,
 * dbranch = dropout(dresid): with p = 0 the caller passes NULL and reads dresid instead. */
typedef void residual_norm_backward_fn(gpt_ctx *ctx, act *dresid /* (N, C) */,
                                       act *dbranch /* (N, C) or NULL */, float *dw /* or NULL */,
                                       float *db /* or NULL */, const act *dout /* (N, C) */,
                                       const act *resid /* (N, C): resid_out of forward */,
                                       const float *stats /* (N, 2) */, const float *w,
                                       gpt_dropout_site dropout, int norm, int N, int C);

/* ---- linear.c ---- */

/* y = in w^T + b, then out = activation(y). pre keeps y for backward; NULL where there will be
 * none, or where activation is NONE. For SwiGLU, OC is F, w has 2 F rows (gates, then ups), pre is
 * (N, 2 F) and out (N, F). */
typedef void linear_forward_fn(gpt_ctx *ctx, act *out /* (N, OC) */, act *pre, const act *in,
                               /* (N, IC) */ const weight *w /* (OC, IC) */,
                               const float *b /* (OC) or NULL */, int activation, int N, int IC,
                               int OC);
/* din =, dw += (or = without add), db +=. When the layer's input is itself activation(pre), din is the gradient of pre
 * (for SwiGLU din is then (N, 2 IC)); with activation NONE it is the gradient of in. Tables that
 * make activations anew take in NULL where there is a pre. */
typedef void linear_backward_fn(gpt_ctx *ctx, act *din /* (N, IC) */, float *dw /* (OC, IC) */,
                                float *db /* (OC) or NULL */, const act *dout /* (N, OC) */,
                                const act *in /* (N, IC) */, const weight *w /* (OC, IC) */,
                                const act *pre, int activation, int add, int N, int IC, int OC);
/* logits = x wte^T in float32, the first V rows of wte only. */
typedef void head_forward_fn(gpt_ctx *ctx, float *logits /* (N, V) */, const act *x /* (N, C) */,
                             const weight *wte /* (Vp, C) */, int N, int C, int V, int Vp);

/* ---- rope.c ---- */

/* In place: rotates the queries and keys of qkv by their positions. table holds (cos, sin):
 * (block_size, HS/2, 2) for GPT_POS_ROPE, (block_size, C/2, 2) for GPT_POS_ROPE_WIDE.
 * Su et al. 2021, equation 34. */
typedef void rope_forward_fn(gpt_ctx *ctx, act *qkv /* (N, QKV) */, const float *table,
                             const int32_t *positions /* (N) or NULL: n % T */, int pos, int N,
                             int T, int NH, int NKV, int HS);
/* In place: the inverse rotation, which is the transpose. */
typedef void rope_backward_fn(gpt_ctx *ctx, act *dqkv /* (N, QKV) */, const float *table, int pos,
                              int N, int T, int NH, int NKV, int HS);

/* ---- attention.c ---- */

/* Causal softmax(q k^T / sqrt(HS)) v in tiles, with the running maximum of Milakov and
 * Gimelshein 2018; query head h reads key head h / (NH / NKV). lse (log of the sum of exponentials
 * of each row) is kept for backward. Dropout acts on the probabilities. */
typedef void attention_forward_fn(gpt_ctx *ctx, act *out /* (B, T, NH HS) */,
                                  float *lse /* (B, NH, T) or NULL */,
                                  const act *qkv /* (B, T, QKV) */, gpt_dropout_site dropout, int B,
                                  int T, int NH, int NKV, int HS);
/* dqkv =. Recomputes the probabilities from lse: Dao et al. 2022, algorithm 4. */
typedef void attention_backward_fn(gpt_ctx *ctx, act *dqkv /* (B, T, QKV) */,
                                   const act *dout /* (B, T, NH HS) */,
                                   const act *qkv /* (B, T, QKV) */,
                                   const act *out /* (B, T, NH HS) */,
                                   const float *lse /* (B, NH, T) */, gpt_dropout_site dropout,
                                   int B, int T, int NH, int NKV, int HS);
/* Decoding: first stores the keys and values of each row n in the cache at (seqs[n], positions[n]),
 * then lets its queries attend to positions 0..positions[n] of its sequence. Rows of a sequence stand
 * together, their positions one after the other. */
typedef void attention_decode_fn(gpt_ctx *ctx, act *out /* (N, NH HS) */,
                                 act *cache_k /* (n_seq, NKV, n_ctx, HS) */,
                                 act *cache_v /* (n_seq, NKV, n_ctx, HS) */,
                                 const act *qkv /* (N, QKV) */, const int32_t *seqs /* (N) */,
                                 const int32_t *positions /* (N) */, int N, int n_ctx, int NH,
                                 int NKV, int HS);

/* ---- loss.c ---- */

/* losses[n] = -log softmax(x[n] wte^T)[targets[n]]; 0 where targets[n] is -1. Works through the
 * rows in chunks: neither logits nor probabilities of all rows ever exist. */
typedef void classifier_forward_fn(gpt_ctx *ctx, float *losses /* (N) */, const act *x /* (N, C) */,
                                   const weight *wte /* (Vp, C) */,
                                   const int32_t *targets /* (N) */, int N, int C, int V, int Vp);
/* The same losses, total += scale * sum(losses) in a fixed order and, while a chunk's logits are
 * there, the gradient of that: dx =, dwte +=. Without add it is total =, and dwte = for its first V
 * rows. A training step calls this one only. */
typedef void classifier_backward_fn(gpt_ctx *ctx, float *losses /* (N) */, float *total /* (1) */,
                                    act *dx /* (N, C) */, float *dwte /* (Vp, C) */,
                                    const act *x /* (N, C) */, const weight *wte /* (Vp, C) */,
                                    const int32_t *targets /* (N) */, float scale, int add, int N,
                                    int C, int V, int Vp);

/* ---- weights.c ---- */

/* Bytes of the products' form of a matrix (rows, cols); 0 where products read the parameters as
 * they are. Without training it leaves out what only backward reads. */
typedef size_t weights_bytes_fn(int rows, int cols, int parts, int training);
/* Makes that form of a segment that has a place for it. */
typedef void weights_pack_fn(gpt_ctx *ctx, const float *w /* (rows, cols) */,
                             const gpt_segment *segment, int training);

/* ---- adamw.c ---- */

/* norm = sqrt(sum of squares) of n gradients, in a fixed order. */
typedef void grad_norm_fn(gpt_ctx *ctx, float *norm /* (1) */, const float *grads /* (n) */,
                          int64_t n);
/* What differs from one update to the next. It lies in the device's memory, so that a recorded
 * update reads the present one. */
typedef struct gpt_adamw_step {
    gpt_adamw adamw;
    float correction1, correction2; /* 1 - beta^step, step counted from 1 */
} gpt_adamw_step;
/* One AdamW update: w, m, v in place, and the packed form of each segment that has one, in the same
 * pass. Gradients are scaled by grad_clip / norm where norm exceeds it. Nothing is changed where
 * norm is not finite. */
typedef void adamw_update_fn(gpt_ctx *ctx, float *w, float *m, float *v,
                             const float *grads /* each (n_params) */, const float *norm /* (1) */,
                             const gpt_adamw_step *step /* (1) */, const gpt_segment *segments,
                             int n_segments);

/* ---- context.c, table.c ---- */

typedef struct gpt_ops {
    const char *name;      /* such as "cpu fp32 avx512" */
    size_t act_bytes;      /* one element of act */
    int makes_activations; /* 1: linear_backward needs no in where it has pre */
    /* 1: weights_pack reads the host's memory, so that without training what only products read has
     * to be kept in their form alone. */
    int packs_host_memory;
    size_t thread_library_bytes; /* what the matrix library keeps for each thread, as measured */

    int (*ctx_create)(gpt_ctx **out, int n_threads, int pin); /* pin: see gpt_options */
    void (*ctx_free)(gpt_ctx *ctx);
    int (*ctx_threads)(const gpt_ctx *ctx);
    /* From now on, or no longer, adds up how long each thread is at work, from 0; and that time. */
    void (*ctx_measure)(gpt_ctx *ctx, int on);
    double (*ctx_busy_seconds)(const gpt_ctx *ctx, int thread);
    /* Measures multiply-adds (two operations each) and, unless bytes is NULL, bytes copied (read and
     * written) a second; 0 where there is no memory for it. */
    int (*peak)(gpt_ctx *ctx, double *flops, double *bytes);
    /* Running a sequence of ops again in one go; NULL where there is nothing to gain. Ops are run
     * between `begin`, unless that has run them and returns 1, and `end`, and again where `end`
     * returns 0. The same key (n numbers) must mean the same ops with the same arguments. */
    int (*replay_begin)(gpt_ctx *ctx, const int64_t *key, int n);
    int (*replay_end)(gpt_ctx *ctx);
    /* Bytes of workspace that ops on this shape need, and the workspace itself. */
    size_t (*workspace_bytes)(const gpt_ctx *ctx, const gpt_shape *shape);
    void (*ctx_set_workspace)(gpt_ctx *ctx, void *workspace);
    /* Waits for all ops; a device's remembered error. */
    int (*sync)(gpt_ctx *ctx);

    /* Bytes that buffer_alloc has left to give; SIZE_MAX where that is not known. */
    size_t (*memory_free)(void);
    /* Device memory, zero-filled, aligned to 64 bytes or better; NULL when there is none. */
    void *(*buffer_alloc)(gpt_ctx *ctx, size_t bytes);
    void (*buffer_free)(gpt_ctx *ctx, void *buffer, size_t bytes);
    void (*upload)(gpt_ctx *ctx, void *device, const void *host, size_t bytes);
    void (*download)(gpt_ctx *ctx, void *host, const void *device, size_t bytes);
    void (*copy)(gpt_ctx *ctx, void *to, const void *from, size_t bytes); /* within the device */
    void (*zero)(gpt_ctx *ctx, void *device, size_t bytes);

    embedding_forward_fn *embedding_forward;
    embedding_backward_fn *embedding_backward;
    dropout_forward_fn *dropout_forward;
    dropout_backward_fn *dropout_backward;
    residual_norm_forward_fn *residual_norm_forward;
    residual_norm_backward_fn *residual_norm_backward;
    linear_forward_fn *linear_forward;
    linear_backward_fn *linear_backward;
    head_forward_fn *head_forward;
    rope_forward_fn *rope_forward;
    rope_backward_fn *rope_backward;
    attention_forward_fn *attention_forward;
    attention_backward_fn *attention_backward;
    attention_decode_fn *attention_decode;
    classifier_forward_fn *classifier_forward;
    classifier_backward_fn *classifier_backward;
    weights_bytes_fn *weights_bytes;
    weights_pack_fn *weights_pack;
    grad_norm_fn *grad_norm;
    adamw_update_fn *adamw_update;
} gpt_ops;

/* The dropout decision, the same on every backend: 32 bits from (key, i), a hash of the counter
 * (the finaliser of Steele, Lea and Flood's SplitMix, 2014, folded to 32 bits). */
GPT_EVERYWHERE static inline uint32_t dropout_bits(uint64_t key, uint64_t i) {
    uint64_t z = key + i * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (uint32_t)(z >> 32);
}

/* What a site drops. */
GPT_EVERYWHERE static inline gpt_dropout dropout_at(gpt_dropout_site s) {
    gpt_dropout dropout = {s.p, 0};
    if (s.p > 0) {
        uint64_t key = *s.key + s.site;
        dropout.key = (uint64_t)dropout_bits(key, 5) << 32 | dropout_bits(key, 6);
    }
    return dropout;
}

/* The factor that dropout multiplies element i by: 0, or 1/(1-p). */
GPT_EVERYWHERE static inline float dropout_factor(gpt_dropout dropout, uint64_t i) {
    float u = (float)(dropout_bits(dropout.key, i) >> 8) * 0x1p-24f;
    return u < dropout.p ? 0.0f : 1.0f / (1.0f - dropout.p);
}

#endif
