/* ops.h: the layers, as a table of functions that every backend fills.
 *
 * csrc/model/ is written once against this table. cpu/ and cuda/ implement it, file by file and
 * name by name: the slot rope_forward takes a struct rope_forward and is CPU_OP(rope_forward) in
 * cpu/rope.c. GPT_OPS, below, is the list of ops from which slots, declarations, tables and the
 * profiler's wrappers are generated.
 *
 * The letters of every shape comment here and in model/:
 *     B    batch                     V    vocab_size
 *     T    time                      Vp   V padded, the rows of the embedding table in memory
 *     N    rows, usually B T         NH   n_head
 *     C    n_embd                    NKV  n_kv_head (NKV divides NH)
 *     F    n_ff                      HS   head size, C / NH unless a model says otherwise
 *     L    n_layer                   QKV  (NH + 2 NKV) HS, packed queries, keys, values
 *     E    n_expert                  K    n_expert_used
 *
 * Conventions
 *  - An op takes its context and one struct, which has the op's name. Its fields are outputs, inputs
 *    (const), sizes, in that order. A field that a call does not name is 0 or NULL. Tensors are
 *    row-major and do not overlap, unless a comment says "in place".
 *  - `d` + name is the gradient of the loss with respect to name. Each backward says whether it
 *    writes (dx =) or adds (dw +=). Weight gradients add, so that micro-batches accumulate; those of
 *    products write where `add` is 0, which spares the first micro-batch clearing and reading them.
 *  - Sizes were validated by the caller: ops cannot fail. A device's error is remembered on the
 *    context and reported by its sync.
 *  - An op is a function of its struct alone: the same inputs give the same bits for a given
 *    number of threads.
 *  - Ops may use the context's workspace, whose contents mean nothing between two ops. */
#ifndef GPT_OPS_H
#define GPT_OPS_H

#include "gpt.h"

#include <math.h>

/* For functions here that a device's compiler compiles for host and device. */
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

/* A dropout as ops receive it: dropout_at makes the key from one in the device's memory, so that a
 * recorded step reads the current one. */
typedef struct gpt_dropout_site {
    float p;
    uint64_t site;       /* which dropout of the model */
    const uint64_t *key; /* (1) from (seed, step, micro-step); not read where p is 0 */
    uint64_t first;      /* element 0 here is this one of a larger batch */
} gpt_dropout_site;

/* The extent of a model's buffers, from which a backend sizes its workspace. */
typedef struct gpt_shape {
    int32_t N, T;        /* the largest number of rows, and the longest sequence, of any call */
    int32_t n_ctx;       /* rows of a session's longest cache; 0: there is none */
    int32_t window_rows; /* rows of the caches that have fewer; 0: there are none */
    int32_t kv_int8;     /* 1: that is int8 */
    int32_t n_draws;     /* rows of logits from which tokens are drawn at once */
    int32_t C, V, Vp, NH, NKV, HS, F;
    int32_t QK; /* numbers that a norm of queries is over; 0: HS */
    int32_t activation;
    int32_t logit_cap; /* 1: logits have a soft cap */
    int32_t head_bias; /* 1: they have a bias */
    int32_t E;         /* experts; 0: none */
    int32_t training;
    int32_t lora_rank; /* 0: there are no adapters */
    int32_t dora;      /* 1: they have magnitudes */
    int32_t muon;      /* 1: some parameters have this optimizer */
    int64_t n_params;  /* numbers in the parameter buffer, padding included */
} gpt_shape;

/* Rows of a matrix that are blocks of one type. */
typedef struct gpt_stack {
    int32_t rows, block; /* enum gpt_block */
} gpt_stack;

/* One tensor of the parameter buffer, as the optimizer sees it. */
typedef struct gpt_segment {
    int64_t offset, size; /* size = rows cols */
    int64_t grad;         /* its offset in the gradients; -1: it is frozen */
    int64_t state;        /* its offset in each state buffer of its optimizer */
    int64_t row_state;    /* that of its (rows) in Muon's buffer; 0: none */
    int32_t optimizer;    /* enum gpt_optimizer_kind; DEFAULT: none */
    float lr_scale;
    int32_t decay;
    int32_t product; /* its gradient comes from a product, and needs no clearing before one */
    int32_t rows, cols;
    int32_t
        parts; /* the rows are this many equal parts, of which row i is read with row i; 0: a bias */
    int32_t n_matrices; /* the rows are matrices of their own, of so many rows each */
    int32_t matrix_rows[GPT_MAX_STACKED];
    int32_t n_stacked; /* runs of its rows that are given as blocks; 0: it is given as floats */
    gpt_stack stacked[GPT_MAX_STACKED];
    weight *packed; /* where the products' form of it is kept; NULL: there is none */
} gpt_segment;

/* Ops that touch activations and parameters, but no weights in the products' form. */
#define GPT_ACT_OPS(X)                                                                             \
    X(embedding_forward)                                                                           \
    X(embedding_backward)                                                                          \
    X(dropout_apply)                                                                               \
    X(residual_norm_forward)                                                                       \
    X(residual_norm_backward)                                                                      \
    X(qk_norm_forward)                                                                             \
    X(qk_norm_backward)                                                                            \
    X(rope_forward)                                                                                \
    X(rope_backward)                                                                               \
    X(attention_forward)                                                                           \
    X(attention_backward)                                                                          \
    X(attention_decode)                                                                            \
    X(sample)                                                                                      \
    X(grad_norm)                                                                                   \
    X(adamw_update)                                                                                \
    X(sgd_update)                                                                                  \
    X(muon_update)
/* Ops that read weights in that form, or make it. Quantized tables differ from bf16's in these alone. */
#define GPT_PRODUCT_OPS(X)                                                                         \
    X(linear_forward)                                                                              \
    X(linear_backward)                                                                             \
    X(head_forward)                                                                                \
    X(classifier_forward)                                                                          \
    X(classifier_backward)
#define GPT_WEIGHT_OPS(X) GPT_PRODUCT_OPS(X) X(weights_pack)
/* Ops of adapters, which touch activations and float32 parameters. */
#define GPT_LORA_OPS(X) X(lora_forward) X(lora_backward)
/* Those of DoRA. */
#define GPT_DORA_OPS(X) X(dora_inputs) X(dora_gain) X(dora_backward)
/* Those of experts: what touches activations and float32 parameters, and the products. A table without
 * those has NULL in their slots. */
#define GPT_ROUTE_OPS(X)  X(route_forward) X(route_backward) X(expert_spread) X(expert_combine)
#define GPT_EXPERT_OPS(X) X(expert_forward) X(expert_backward)
#define GPT_OPS(X)                                                                                 \
    GPT_ACT_OPS(X)                                                                                 \
    GPT_LORA_OPS(X) GPT_DORA_OPS(X) GPT_ROUTE_OPS(X) GPT_EXPERT_OPS(X) GPT_WEIGHT_OPS(X)

/* ---- embedding.c ---- */

/* out[n] = scale wte[tokens[n]] + wpe[position of n], from the float32 parameters. */
typedef struct embedding_forward {
    act *out;                 /* (N, C) = */
    const int32_t *tokens;    /* (N) */
    const int32_t *positions; /* (N), or NULL: row n is at position n % T */
    const float *wte;         /* (Vp, C) */
    const float *wpe;         /* (block_size, C), or NULL: no learned positions */
    float scale;              /* of wte; 0: 1 */
    int N, T, C;
    act *rest; /* (N, C) = what out lacks of the sum, or NULL. On a CPU in bf16. */
} embedding_forward;

/* The order of additions is fixed, so the result is deterministic. */
typedef struct embedding_backward {
    float *dwte;              /* (Vp, C) +=, or NULL */
    float *dwpe;              /* (block_size, C) +=, or NULL */
    const act *dout;          /* (N, C) */
    const int32_t *tokens;    /* (N) */
    const int32_t *positions; /* as in forward */
    float scale;              /* as in forward */
    int N, T, C, V;
} embedding_backward;

/* ---- dropout.c ---- */

/* x = dropout(x). The gradient is the same op on dx, since the key makes the mask. */
typedef struct dropout_apply {
    act *x; /* (n) in place */
    gpt_dropout_site dropout;
    int64_t n;
} dropout_apply;

/* ---- norm.c ---- */

/* No norm: out = resid_out, which it may be, with a mean of 0 and an std of 1. */
enum { NORM_NONE = 2 };

/* The residual stream and the norm that reads it, in one pass:
 *     resid_out = resid + dropout(branch);  out = norm(resid_out)
 * With branch NULL, out = norm(resid) and resid_out is not touched. */
typedef struct residual_norm_forward {
    act *resid_out;    /* (N, C) =; may be resid */
    act *out;          /* (N, C) = */
    float *stats;      /* (N, 2) = (mean, 1/std) of each row for backward, or NULL where there is
                          none; the mean is 0 for RMSNorm */
    const act *resid;  /* (N, C) */
    const act *branch; /* (N, C) or NULL */
    const float *w;    /* (C) or NULL */
    const float *b;    /* (C) or NULL */
    gpt_dropout_site dropout;
    int norm; /* enum gpt_norm, or NORM_NONE */
    float eps;
    int N, C;
    /* (N, C) in place, or NULL: is added to resid, then what resid_out lacks of the sum. On a CPU in bf16. */
    act *rest;
} residual_norm_forward;

/* dresid += the norm's gradient. Then, where dbranch is not NULL, dbranch = dropout(dresid): with
 * p = 0 the caller passes NULL and reads dresid instead. */
typedef struct residual_norm_backward {
    act *dresid;        /* (N, C) += */
    act *dbranch;       /* (N, C) =, or NULL */
    float *dw;          /* (C) +=, or NULL */
    float *db;          /* (C) +=, or NULL */
    float *dbias;       /* (C) += the sums of the branch's gradient, or NULL: see sums_branches */
    const act *dout;    /* (N, C) */
    const act *resid;   /* (N, C): resid_out of forward */
    const float *stats; /* (N, 2) */
    const float *w;     /* (C) or NULL */
    gpt_dropout_site dropout;
    int norm; /* enum gpt_norm, or NORM_NONE */
    int N, C;
} residual_norm_backward;

/* ---- linear.c ---- */

/* Whether an activation multiplies: its input has gates, then as many ups. */
GPT_EVERYWHERE static inline int is_gated(int activation) {
    return activation == GPT_ACT_SWIGLU || activation == GPT_ACT_GEGLU;
}

/* y = in w^T + b, then out = activation(y). For a gated one, as SwiGLU, OC is F and w has 2 F rows: gates, then
 * ups. */
typedef struct linear_forward {
    act *out;        /* (N, OC) = */
    act *pre;        /* (N, OC), or (N, 2 OC) for SwiGLU, = y for backward; NULL where there will be
                        none, or where activation is NONE */
    const act *in;   /* (N, IC) */
    const weight *w; /* (OC, IC), or (2 OC, IC) for SwiGLU */
    const weight *b; /* as many as w has rows, or NULL */
    int activation;  /* enum gpt_activation */
    int exact;       /* 1: `in` is not rounded to fewer bits, since backward will not either */
    int add;         /* 1: y += what is there, in pre, or in out where activation is NONE. Where the
                        table joins_adapters */
    int N, IC, OC;
    /* Where the table joins_adapters, or NULL: lora_forward's work, in the same products. Without dropout
     * and gain, and exact. */
    const struct lora_forward *lora;
} linear_forward;

/* Where the layer's input is itself activation(pre), din is the gradient of pre; with activation
 * NONE it is the gradient of in. */
typedef struct linear_backward {
    act *din;        /* (N, IC), or (N, 2 IC) for SwiGLU, =; with makes_activations it may be pre */
    float *dw;       /* (OC, IC) +=, or = without add; or NULL */
    float *db;       /* (OC) +=, or NULL */
    const act *dout; /* (N, OC) */
    const act *in;   /* (N, IC); NULL where there is a pre and the table recomputes activations */
    const weight *w; /* (OC, IC) */
    const act *pre;  /* (N, IC), or (N, 2 IC) for SwiGLU; NULL where activation is NONE */
    int activation;  /* enum gpt_activation, of the layer's input */
    int add;
    int N, IC, OC;
    const struct lora_backward *lora; /* as in forward */
    /* (N, IC) = activation(pre), with a pre and without in: room for the layer's input, made with din
     * and read for dw and the adapter; or NULL. */
    act *made;
} linear_backward;

/* ---- route.c ---- */

/* The experts of each token (Shazeer et al. 2017, section 2.1): with p = softmax(in w^T) over E experts, the K
 * likeliest, the first of equal ones first. Choices are then ordered by expert, and those of one by token: a choice
 * has a row there, of N K. */
typedef struct route_forward {
    float *probs;     /* (N, E) = p */
    float *gates;     /* (N, K) = p of the chosen, with `norm` divided by their sum */
    int32_t *choices; /* (N, K) = their experts, the likeliest first */
    int32_t *places;  /* (N, K) = their rows */
    int32_t *begins;  /* (E + 1) = the first row of each expert, and N K */
    const act *in;    /* (N, C) */
    const float *w;   /* (E, C) */
    int norm;
    int N, C, E, K;
} route_forward;

/* The gradient of the logits, from that of the gates and from the load-balance loss E sum(f P): f is the number of an
 * expert's tokens, P the sum of its probabilities, in all layers, each divided by N L. f has no gradient. */
typedef struct route_backward {
    act *din;                   /* (N, C) += */
    float *dw;                  /* (E, C) +=, or NULL */
    const float *dgates;        /* (N, K) */
    const act *in;              /* (N, C) */
    const float *w;             /* (E, C) */
    const float *probs, *gates; /* of forward */
    const int32_t *choices;
    const int32_t *begins; /* (L, E + 1) of all layers */
    float balance;         /* factor of that loss */
    int norm;
    int N, C, E, K, L;
} route_backward;

/* out[places[n][k]] = gates[n][k] in[n]; and dgates[n][k] = in[n] . values[places[n][k]], where those are asked for. */
typedef struct expert_spread {
    act *out;              /* (N K, C) = */
    float *dgates;         /* (N, K) =, or NULL */
    const act *in;         /* (N, C) */
    const act *values;     /* (N K, C), or NULL without dgates */
    const float *gates;    /* (N, K); NULL: each is 1 */
    const int32_t *places; /* (N, K) */
    int N, C, K;
} expert_spread;

/* out[n] = sum over k of gates[n][k] in[places[n][k]], in the order of k. */
typedef struct expert_combine {
    act *out;              /* (N, C) = */
    const act *in;         /* (N K, C) */
    const float *gates;    /* (N, K); NULL: each is 1 */
    const int32_t *places; /* (N, K) */
    int N, C, K;
} expert_combine;

/* ---- experts.c ---- */

/* linear_forward without a bias, of rows begins[e] to begins[e + 1] - 1 with w[e]. The weights of an expert without
 * rows are not read. */
typedef struct expert_forward {
    act *out;              /* (R, OC) = */
    act *pre;              /* as in linear_forward */
    const act *in;         /* (R, IC) */
    weight *const *w;      /* (E), on the host */
    const int32_t *begins; /* (E + 1) */
    int activation, exact; /* as in linear_forward */
    int R, E, IC, OC;
} expert_forward;

/* Likewise linear_backward. Without add, the gradient of an expert without rows is 0. */
typedef struct expert_backward {
    act *din;          /* (R, IC), or (R, 2 IC) for SwiGLU, = */
    weight *const *dw; /* (E), on the host, of float (OC, IC) +=, or = without add; or NULL each */
    const act *dout;   /* (R, OC) */
    const act *in;     /* as in linear_backward */
    weight *const *w;  /* (E), on the host */
    const act *pre;    /* as in linear_backward */
    const int32_t *begins; /* (E + 1) */
    int activation;        /* as in linear_backward */
    int add;
    int R, E, IC, OC;
} expert_backward;

/* ---- lora.c ---- */

/* Outputs of a linear layer that have an adapter: A is R rows of a, B so many rows of b. */
typedef struct lora_part {
    int first, rows;
} lora_part;

/* The adapters of a linear layer (Hu et al. 2021), after linear_forward with the same fields:
 * u = dropout(in) a^T; then for each part y += scale u b^T in its columns, and out = activation(y). With a gain,
 * v = y - bias after that addition, and y = gain v + bias. */
typedef struct lora_forward {
    act *out;           /* (N, OC) +=; where there is an activation = activation(pre) */
    act *pre;           /* (N, OC), or (N, 2 OC) for SwiGLU, +=; NULL where activation is NONE */
    float *u;           /* (N, n_parts R) =, for backward */
    act *v;             /* (N, rows of all parts) =, for dora_backward; or NULL */
    const act *in;      /* (N, IC) */
    const float *a;     /* (n_parts R, IC) */
    const float *b;     /* (rows of all parts, R) */
    const float *gain;  /* (rows of all parts) of dora_gain, or NULL */
    const weight *bias; /* as linear_forward's b; unused without a gain */
    lora_part parts[GPT_MAX_STACKED];
    gpt_dropout_site dropout;
    float scale;
    int activation; /* enum gpt_activation */
    int n_parts;
    int N, IC, OC, R;
} lora_forward;

/* After linear_backward with the same fields: du = scale dout b, of each part's columns of dout; then
 * din += du a, where in is activation(pre) through that to the gradient of pre. */
typedef struct lora_backward {
    act *din;        /* (N, IC), or (N, 2 IC) for SwiGLU, += */
    float *da;       /* (n_parts R, IC) +=, or NULL */
    float *db;       /* (rows of all parts, R) +=, or NULL */
    const act *dout; /* (N, OC) */
    const act *in;   /* (N, IC); NULL where there is a pre and the table recomputes activations */
    const act *pre;  /* (N, IC), or (N, 2 IC) for SwiGLU; NULL where activation is NONE */
    const float *u;  /* (N, n_parts R) of forward */
    const float *a;  /* (n_parts R, IC) */
    const float *b;  /* (rows of all parts, R) */
    lora_part parts[GPT_MAX_STACKED];
    gpt_dropout_site dropout;
    float scale;
    int activation; /* enum gpt_activation, of the layer's input */
    int n_parts;
    int N, IC, OC, R;
} lora_backward;

/* ---- dora.c ---- */

/* out = a, as a product reads it. */
typedef struct dora_inputs {
    act *out;       /* (n) = */
    const float *a; /* (n) */
    int64_t n;
} dora_inputs;

/* gain = m / |W + scale B A| of each adapted row: Liu et al. 2024, equation 5. The squared length is
 * |W|^2 + 2 scale B (A W^T) + scale^2 B (A A^T) B^T, so that W + scale B A never exists. A row of zeros has 0. */
typedef struct dora_gain {
    float *gain;          /* (rows of all parts) = */
    float *per_norm;      /* (rows of all parts) = 1 / |W + scale B A| */
    const float *m;       /* (rows of all parts) */
    const float *squares; /* (rows of all parts) |W|^2 */
    const act *aw;        /* (n_parts R, OC) A W^T */
    const float *a;       /* (n_parts R, IC) */
    const float *b;       /* (rows of all parts, R) */
    lora_part parts[GPT_MAX_STACKED];
    float scale;
    int n_parts;
    int IC, OC, R;
} dora_gain;

/* The gradient of v, where y = gain v + bias, before linear_backward. The gain's dependence on A and B is left
 * out: section 4.3. */
typedef struct dora_backward {
    act *dv;               /* (N, OC) = gain dout in the columns of parts, dout in others */
    float *dm;             /* (rows of all parts) += per_norm v dout, summed over rows; or NULL */
    const act *dout;       /* (N, OC) */
    const act *v;          /* (N, rows of all parts) */
    const float *gain;     /* (rows of all parts) */
    const float *per_norm; /* (rows of all parts) */
    lora_part parts[GPT_MAX_STACKED];
    int n_parts;
    int N, OC;
} dora_backward;

/* ---- head.c ---- */

/* logits = x wte^T + b in float32, the first V rows of wte only; with a cap then cap tanh(logits / cap). */
typedef struct head_forward {
    float *logits;     /* (N, V) =, or the first V columns of (N, Vp) where the table pads logits */
    const act *x;      /* (N, C) */
    const weight *wte; /* (Vp, C) */
    float cap;         /* 0: none */
    int N, C, V, Vp;
    const float *b; /* (Vp) or NULL */
} head_forward;

/* ---- qk_norm.c ---- */

/* RMSNorm (Zhang and Sennrich 2019) of each head of the queries and keys: x / sqrt(mean(x^2) + eps) w,
 * as in Qwen3: Henry et al. 2020, and Dehghani et al. 2023, section 2.1. For a norm over all queries of a token, and
 * all keys, HS is their width, and NH and NKV are 1. */
typedef struct qk_norm_forward {
    act *qkv;         /* (N, QKV) in place */
    act *in;          /* (N, (NH + NKV) HS) = what was normalised, for backward; or NULL */
    float *stats;     /* (N, NH + NKV) = 1/std of each head, for backward; or NULL */
    const float *q_w; /* (HS) */
    const float *k_w; /* (HS) */
    float eps;
    int N, NH, NKV, HS;
} qk_norm_forward;

/* The gradient of what was normalised, in place of that of the result. */
typedef struct qk_norm_backward {
    act *dqkv;          /* (N, QKV) in place */
    float *dq_w;        /* (HS) +=, or NULL */
    float *dk_w;        /* (HS) +=, or NULL */
    const act *in;      /* (N, (NH + NKV) HS) */
    const float *stats; /* (N, NH + NKV) */
    const float *q_w;   /* (HS) */
    const float *k_w;   /* (HS) */
    int N, NH, NKV, HS;
} qk_norm_backward;

/* ---- rope.c ---- */

/* Rotates the queries and keys of qkv by their positions: Su et al. 2021, equation 34. */
typedef struct rope_forward {
    act *qkv;                 /* (N, QKV) in place */
    const float *table;       /* of (cos, sin): (positions, turned/2, 2) for GPT_POS_ROPE,
                                 (positions, NH HS/2, 2) for GPT_POS_ROPE_WIDE */
    const int32_t *positions; /* (N), or NULL: row n is at position n % T */
    int pos;                  /* enum gpt_pos */
    int turned;               /* channels of a head that GPT_POS_ROPE rotates, the first; 0: HS */
    int N, T, NH, NKV, HS;
} rope_forward;

/* The inverse rotation, which is the transpose. */
typedef struct rope_backward {
    act *dqkv;                /* (N, QKV) in place */
    const float *table;       /* as in forward */
    const int32_t *positions; /* as in forward */
    int pos;                  /* enum gpt_pos */
    int turned;               /* as in forward */
    int N, T, NH, NKV, HS;
} rope_backward;

/* ---- attention.c ---- */

/* The scale of an op's scores. */
GPT_EVERYWHERE static inline float score_scale(float scale, int HS) {
    return scale > 0 ? scale : 1.0f / sqrtf((float)HS);
}

/* Causal softmax(scale q k^T) v in tiles, with the running maximum of Milakov and
 * Gimelshein 2018; query head h reads key head h / (NH / NKV). Dropout acts on the probabilities.
 * With a window, a query sees its own key and the window - 1 before it: Beltagy et al. 2020. With
 * positions, a sequence is several documents, and a query sees only keys of the same one. */
typedef struct attention_forward {
    act *out;   /* (B, T, NH HS) = */
    float *lse; /* (B, NH, T) = log of the sum of exponentials of each row, for backward; or NULL */
    const act *qkv;           /* (B, T, QKV) */
    const int32_t *positions; /* (B, T) of a row in its document, or NULL: a sequence is one */
    gpt_dropout_site dropout;
    int window;  /* 0: all keys up to the query's */
    float scale; /* of the scores; 0: 1 / sqrt(HS) */
    int B, T, NH, NKV, HS;
    float cap; /* a scaled score x becomes cap tanh(x / cap): Gemma 2 (2024), section 2; 0: none */
} attention_forward;

/* Recomputes the probabilities from lse: Dao et al. 2022, algorithm 4. */
typedef struct attention_backward {
    act *dqkv;                /* (B, T, QKV) = */
    float *db;                /* (QKV) += the sums of dqkv's rows, or NULL: see sums_attention */
    const act *dout;          /* (B, T, NH HS) */
    const act *qkv;           /* (B, T, QKV) */
    const act *out;           /* (B, T, NH HS) */
    const float *lse;         /* (B, NH, T) */
    const int32_t *positions; /* as in forward */
    gpt_dropout_site dropout;
    int window;  /* as in forward */
    float scale; /* as in forward */
    int B, T, NH, NKV, HS;
    float cap; /* as in forward */
} attention_backward;

/* Decoding: first stores the keys and values of each row n in the cache at (seqs[n], positions[n]),
 * then lets its queries attend to positions 0..positions[n] of its sequence, or the last of these. Rows of a sequence are
 * neighbours, their positions consecutive. With scales, a key or value of a head is int8 in -127 to 127 times its scale,
 * which is largest / 127. */
typedef struct attention_decode {
    act *out; /* (N, NH HS) = */
    void *
        cache_k; /* (n_seq, NKV, n_ctx, HS) act, or int8 where there are scales; the rows' places = */
    void *cache_v;            /* the same */
    float *scale_k;           /* (n_seq, NKV, n_ctx), the rows' places =; or NULL */
    float *scale_v;           /* the same */
    const act *qkv;           /* (N, QKV) */
    const int32_t *seqs;      /* (N) */
    const int32_t *positions; /* (N) */
    int window;               /* as in forward */
    float scale;              /* as in forward */
    float cap;                /* as in forward */
    int N, n_ctx, NH, NKV, HS;
} attention_decode;

/* ---- classifier.c ---- */

/* losses[n] = -log softmax(x[n] wte^T + b)[targets[n]]; 0 where targets[n] is -1. With a cap, a logit is
 * cap tanh(z / cap) of that z. Works through the rows in chunks: neither logits nor probabilities of
 * all rows ever exist. */
typedef struct classifier_forward {
    float *losses;          /* (N) = */
    const act *x;           /* (N, C) */
    const weight *wte;      /* (Vp, C) */
    const int32_t *targets; /* (N) */
    float cap;              /* of logits; 0: none */
    int exact;              /* as in linear_forward */
    int N, C, V, Vp;
    const float *b; /* (Vp) or NULL */
} classifier_forward;

/* The same losses, total += scale * sum(weights * losses) in a fixed order and, while a chunk's logits
 * are there, the gradient of that. A training step calls this one only, unless its weights depend on
 * the losses.
 *
 * The gradient may be that of a regularised loss, while `losses` stay cross-entropy. With l = log sum exp of
 * the V logits z and the target t,
 *     (1 - e) (l - z[t]) + e (l - mean z) + c l^2
 * has the gradient (1 + 2 c l) softmax - (1 - e) onehot - e / V. Label smoothing: Szegedy et al. 2016,
 * section 7. z-loss: Chowdhery et al. 2022, section 5. */
typedef struct classifier_backward {
    float *losses;          /* (N) = */
    float *total;           /* (1) +=, or = without add */
    act *dx;                /* (N, C) = */
    float *dwte;            /* (Vp, C) +=; without add = for the first V rows at least; or NULL */
    const act *x;           /* (N, C) */
    const weight *wte;      /* (Vp, C) */
    const int32_t *targets; /* (N) */
    const float *weights;   /* (N) of the losses; NULL: each is 1 */
    float scale;
    float label_smoothing, z_loss; /* e and c */
    float cap;                     /* as in forward */
    int add;
    int N, C, V, Vp;
    const float *b; /* (Vp) or NULL */
    float *db;      /* (Vp) +=, or NULL */
} classifier_backward;

/* ---- weights.c ---- */

/* Makes the products' form of a segment that has a place for it. */
typedef struct weights_pack {
    const float *w;             /* (rows, cols) */
    const gpt_segment *segment; /* (1); segment->packed = */
    int given;                  /* rows of w that are there, others are zero; 0: all */
    int training;               /* 1: also what only backward reads */
} weights_pack;

/* ---- sample.c ---- */

/* How a row's token is drawn: gpt_sampling, with what the host knows worked in. */
typedef struct sample_row {
    float steepness; /* how often a chance is halved while its logit falls by 1; 0: draw the
                        most likely token */
    float typical_p, top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    int32_t top_k;
    int32_t vocab_size;                 /* the tokens to draw from: the first of V */
    int32_t adjustments, n_adjustments; /* the row's part of the list */
    uint32_t number;                    /* 32 random bits */
    int32_t n_top; /* so many likeliest tokens are listed; -1: nor is there a logprob */
} sample_row;

/* What biases and penalties do to a token. A row has one for a token. */
typedef struct sample_adjustment {
    int32_t token, count; /* how often it is in the history */
    float bias;
    float raw; /* its logit before */
} sample_adjustment;

/* What a result's token says where none could be drawn. */
enum { SAMPLE_NOT_FINITE = -1, SAMPLE_TOO_LARGE = -2, SAMPLE_NOTHING_LEFT = -3 };

typedef struct sample_result {
    int32_t token;
    float logprob; /* of the token, by the logits before adjustments */
    int32_t top_tokens[GPT_MAX_TOP];
    float top_logprobs[GPT_MAX_TOP];
} sample_result;

/* Draws a token from each row of logits: gpt_sample, and gpt_logprobs. */
typedef struct sample {
    sample_result *results;         /* (N) = */
    float *logits;                  /* (N, V), rows stride apart; adjusted in place */
    const sample_row *rows;         /* (N) */
    sample_adjustment *adjustments; /* of all rows; raw = */
    int N, V;
    int stride; /* V, or Vp where the table pads logits */
} sample;

/* ---- grad_norm.c ---- */

enum { GRAD_BLOCK = 1 << 15 }; /* numbers whose squares are added apart on a CPU */

/* norm = sqrt(sum of squares), in a fixed order. */
typedef struct grad_norm {
    float *norm; /* (1) =, unless there are squares */
    double *
        squares; /* (n / GRAD_BLOCK, rounded up) = the sum of each block; NULL: the norm; on a CPU */
    const float *grads; /* (n) */
    int64_t n;
} grad_norm;

/* ---- adamw.c ---- */

/* The settings of one update, in the device's memory, so that a recorded update reads the current
 * ones. */
typedef struct gpt_adamw_step {
    gpt_adamw adamw;
    float correction1, correction2; /* 1 - beta^step, step counted from 1 */
    uint32_t key;                   /* of the rounding of moments: moment_key */
} gpt_adamw_step;

enum { MOMENT_BLOCK = 256 }; /* numbers that have a scale, of moments of 8 bits */

/* One AdamW update of the segments that have this optimizer, and of the packed form of each that has
 * one, in the same pass. Gradients are scaled by grad_clip / norm where norm exceeds it. Nothing is
 * changed where norm is not finite. The moments are float32 or, on a CPU, bfloat16, or codes of 8 bits with scales: see
 * moments.h. w is updated by the moments of this step before they are rounded. */
typedef struct adamw_update {
    float *w;                    /* at each segment's offset, in place */
    void *m, *v;                 /* at its state, in place; of `moments` */
    float *m_scales, *v_scales;  /* one for each MOMENT_BLOCK of them, where they have 8 bits */
    const float *grads;          /* at its grad */
    const float *norm;           /* (1) */
    const gpt_adamw_step *step;  /* (1) */
    const gpt_segment *segments; /* (n_segments), on the host; segments[i].packed = */
    int n_segments;
    int moments; /* enum gpt_moments; of 8 bits: a segment's state is a multiple of MOMENT_BLOCK */
} adamw_update;

/* ---- sgd.c ---- */

/* The same by SGD: momentum = sgd.momentum momentum + grad + weight_decay w;  w -= lr momentum. */
typedef struct sgd_update {
    float *w;                    /* at each segment's offset, in place */
    float *momentum;             /* at its state, in place */
    const float *grads;          /* at its grad */
    const float *norm;           /* (1) */
    const gpt_sgd *step;         /* (1), in the device's memory */
    const gpt_segment *segments; /* (n_segments), on the host; segments[i].packed = */
    int n_segments;
} sgd_update;

/* ---- muon.c ---- */

/* The same by Muon, of each matrix X (rows, columns) of the segments, with m its momentum buffer:
 *     m = momentum m + (1 - momentum) grad;  u = (1 - momentum) grad + momentum m
 *     X = u / |u|, then five times X = a X + (b A + c A^2) X with A = X X^T (or X^T X from the right)
 *     w = (1 - lr weight_decay) w - lr 0.2 sqrt(max(rows, columns)) X
 * With v (rows) in the state, of row r of X the last line has, before (Li et al. 2025, "NorMuon", algorithm 1):
 *     v[r] = beta2 v[r] + (1 - beta2) |X[r]|^2 / columns;  X[r] = X[r] / (sqrt(v[r]) + 1e-8)
 *     X = X sqrt(rows columns / max(rows, columns)) / |X|
 * With cautious, a number whose X has the other sign does not decay (Chen et al. 2025, "Cautious Weight Decay").
 * Products are in the table's dtype. A matrix of zeros has a step of zeros. */
typedef struct muon_update {
    float *w;                    /* at each segment's offset, in place */
    float *momentum;             /* at its state, in place; v at its row_state */
    const float *grads;          /* at its grad */
    const float *norm;           /* (1) */
    const gpt_muon *step;        /* (1), in the device's memory */
    const gpt_segment *segments; /* (n_segments), on the host; segments[i].packed = */
    int n_segments;
} muon_update;

enum { MUON_ITERATIONS = 5 };

/* The polynomials that bring singular values from 1e-3 to 1 near to 1 in the fewest products: Amsel et al. 2025,
 * "The Polar Express", algorithm 1, with the margin of 2 % for rounding by which MUON_MARGIN divides first. */
#define MUON_MARGIN 1.02f
/* A matrix whose mean square is smaller is taken as zeros: float32 cannot hold such squares. */
#define MUON_LEAST 1e-36
#define MUON_POLYNOMIALS                                                                           \
    {                                                                                              \
        {8.156554524902461f, -22.48329292557795f, 15.878769915207462f},                            \
            {4.042929935166739f, -2.808917465908714f, 0.5000178451051316f},                        \
            {3.8916678022926607f, -2.772484153217685f, 0.5060648178503393f},                       \
            {3.285753657755655f, -2.3681294933425376f, 0.46449024233003106f}, {                    \
            2.3465413258596377f, -1.7097828382687081f, 0.42323551169305323f                        \
        }                                                                                          \
    }

#define MUON_ROW_EPS 1e-8f

/* The factor of the step. */
static inline float muon_scale(int rows, int cols) {
    return 0.2f * sqrtf((float)(rows > cols ? rows : cols));
}

/* Of its products: A, its square, and one with X in each iteration. */
static inline double muon_flops(int rows, int cols) {
    double least = rows < cols ? rows : cols, most = rows < cols ? cols : rows;
    return MUON_ITERATIONS * 2 * least * least * (2 * most + least);
}

/* ---- context.c, table.c ---- */

enum { GPT_REPLAY_KEY = 8 }; /* numbers in a key of replay_begin */

/* Whether a buffer is used whole, or in parts, more of them as a text gets longer. */
typedef enum buffer_use { BUFFER_WHOLE, BUFFER_IN_PARTS } buffer_use;

typedef struct gpt_ops {
    const char *name;      /* such as "cpu fp32 avx512" */
    size_t act_bytes;      /* one element of act */
    int makes_activations; /* 1: linear_backward needs no in where it has pre */
    int keeps_rest; /* 1: without training the residual stream is two numbers of type act each */
    int joins_adapters; /* 1: linear_forward and linear_backward take an adapter along */
    /* 1: weights_pack reads the host's memory, so that without training what only products read has
     * to be kept in their form alone. */
    int packs_host_memory;
    /* 1: residual_norm_backward, which has a branch's gradient at hand, sums it for the bias of the
     * layer that made the branch, and linear_backward of that layer has no db to make. */
    int sums_branches;
    /* 1: so does attention_backward for the bias of queries, keys and values that it has the gradient of. */
    int sums_attention;
    int pads_logits;  /* 1: head_forward writes whole rows of Vp logits */
    int packs_biases; /* 1: products read their biases packed as well; 0: the parameters */
    size_t thread_library_bytes; /* what the matrix library keeps for each thread, as measured */

    int (*ctx_create)(gpt_ctx **out, int n_threads, int pin); /* pin: see gpt_options */
    void (*ctx_free)(gpt_ctx *ctx);
    int (*ctx_threads)(const gpt_ctx *ctx);
    /* From now on, or no longer, adds up how long each thread is at work, from 0; and that time. */
    void (*ctx_measure)(gpt_ctx *ctx, int on);
    double (*ctx_busy_seconds)(const gpt_ctx *ctx, int thread);
    /* The i-th product of a library since ctx_measure; 0 past the last. NULL where there is none. */
    int (*product)(const gpt_ctx *ctx, int i, gpt_product_time *out);
    /* Measures multiply-adds (two operations each) and, unless bytes is NULL, bytes copied (read and
     * written) a second; 0 where there is no memory for it. */
    int (*peak)(gpt_ctx *ctx, double *flops, double *bytes);
    /* Running a sequence of ops again in one go; NULL where there is nothing to gain. Ops are run
     * between `begin`, unless that has run them and returns 1, and `end`, and again where `end`
     * returns 0. The same key (n numbers, at most GPT_REPLAY_KEY) must mean the same ops with the
     * same arguments. */
    int (*replay_begin)(gpt_ctx *ctx, const int64_t *key, int n);
    int (*replay_end)(gpt_ctx *ctx);
    /* Bytes of workspace that ops on this shape need, and the workspace itself. */
    size_t (*workspace_bytes)(const gpt_ctx *ctx, const gpt_shape *shape);
    void (*ctx_set_workspace)(gpt_ctx *ctx, void *workspace);
    /* Waits for all ops; a device's remembered error. */
    int (*sync)(gpt_ctx *ctx);
    /* A device's queue of work for a library that adds to it (a cudaStream_t), and whether it has work that
     * has not ended. NULL where the host computes. */
    void *(*stream)(gpt_ctx *ctx);
    int (*is_busy)(gpt_ctx *ctx);

    /* Bytes that buffer_alloc has left to give; SIZE_MAX where that is not known. */
    size_t (*memory_free)(void);
    /* Device memory, zero-filled, aligned to 64 bytes or better; NULL when there is none. */
    void *(*buffer_alloc)(gpt_ctx *ctx, size_t bytes, buffer_use use);
    void (*buffer_free)(gpt_ctx *ctx, void *buffer, size_t bytes);
    void (*upload)(gpt_ctx *ctx, void *device, const void *host, size_t bytes);
    void (*download)(gpt_ctx *ctx, void *host, const void *device, size_t bytes);
    /* Rows of so many bytes, one after the other on the host, `stride` apart on the device. */
    void (*download_rows)(gpt_ctx *ctx, void *host, const void *device, int rows, size_t bytes,
                          size_t stride);
    void (*copy)(gpt_ctx *ctx, void *to, const void *from, size_t bytes); /* within the device */
    void (*zero)(gpt_ctx *ctx, void *device, size_t bytes);

    /* Bytes of the products' form of a matrix (rows, cols), or with no parts of a bias; 0 where products
     * read the parameters as they are. Without training it leaves out what only backward reads. */
    size_t (*weights_bytes)(int rows, int cols, int parts, int training);
    /* Those of a matrix that is there; NULL where they follow from its shape. */
    size_t (*weight_bytes)(gpt_ctx *ctx, const weight *w);
    /* Matrices that are given as blocks; NULL where the table has none. Bytes of the products' form, 0
     * where a type is not known or its blocks do not fill rows; that form of run `part` of the rows,
     * whose blocks are row by row; and the float32 numbers of some rows
     * (n, cols), NULL: of the first, in the device's memory. Blocks and the rows' numbers are the host's. */
    size_t (*blocks_bytes)(const gpt_segment *segment);
    void (*blocks_pack)(gpt_ctx *ctx, const gpt_segment *segment, int part, const void *blocks);
    void (*blocks_unpack)(gpt_ctx *ctx, float *out, const gpt_segment *segment, const int32_t *rows,
                          int n);

#define GPT_SLOT(name) void (*name)(gpt_ctx * ctx, const struct name *op);
    GPT_OPS(GPT_SLOT)
#undef GPT_SLOT
} gpt_ops;

/* The dropout decision, the same on every backend: 32 bits from (key, i), a hash of the counter
 * (the finaliser of Steele, Lea and Flood's SplitMix, 2014, folded to 32 bits). */
#define GPT_COUNTER_STEP 0x9e3779b97f4a7c15ull
GPT_EVERYWHERE static inline uint32_t counter_bits(uint64_t key, uint64_t i) {
    uint64_t z = key + i * GPT_COUNTER_STEP;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (uint32_t)(z >> 32);
}

/* The dropout of a site. */
GPT_EVERYWHERE static inline gpt_dropout dropout_at(gpt_dropout_site s) {
    gpt_dropout dropout = {s.p, 0};
    if (s.p > 0) {
        uint64_t key = *s.key + s.site;
        dropout.key = (uint64_t)counter_bits(key, 5) << 32 | counter_bits(key, 6);
        dropout.key += s.first * GPT_COUNTER_STEP; /* bits of i are now those of first + i */
    }
    return dropout;
}

/* The factor that dropout multiplies element i by: 0, or 1/(1-p). */
GPT_EVERYWHERE static inline float dropout_factor(gpt_dropout dropout, uint64_t i) {
    float u = (float)(counter_bits(dropout.key, i) >> 8) * 0x1p-24f;
    return u < dropout.p ? 0.0f : 1.0f / (1.0f - dropout.p);
}

#endif
