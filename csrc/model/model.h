/* model.h: what the files of model/ share. The model is written once, over the op table of ops.h:
 * nothing here names a device or a dtype. */
#ifndef MODEL_H
#define MODEL_H

#include "ops.h"

#include <stdbool.h>

/* ---- config.c ---- */

static inline int head_size(const gpt_config *c) {
    return c->head_size ? c->head_size : c->n_embd / c->n_head;
}
/* Outputs of attention, side by side. */
static inline int att_size(const gpt_config *c) {
    return c->n_head * head_size(c);
}
static inline int qkv_size(const gpt_config *c) {
    return (c->n_head + 2 * c->n_kv_head) * head_size(c);
}
/* Numbers that a norm of queries, or of keys, is over. */
static inline int qk_norm_size(const gpt_config *c) {
    return c->qk_norm == GPT_QK_NORM_WIDTH ? att_size(c) : head_size(c);
}
/* Outputs of the first feed-forward layer: SwiGLU has a gate and an up for each hidden channel. */
static inline int fc_size(const gpt_config *c) {
    return is_gated(c->activation) ? 2 * c->n_ff : c->n_ff;
}
/* Whether a layer's branches begin with a norm, and whether they end with one. */
static inline bool norms_before(const gpt_config *c) {
    return c->norm_at != GPT_NORM_AFTER;
}
static inline bool norms_after(const gpt_config *c) {
    return c->norm_at != GPT_NORM_BEFORE;
}
/* Vp: rows of the embedding table in memory. Padding rows are zero and stay zero. */
static inline int padded_vocab_size(const gpt_config *c) {
    return (c->vocab_size + 63) / 64 * 64;
}

/* Logits from one row of a device's to the next. */
static inline int logit_stride(const gpt_config *c, const gpt_ops *ops) {
    return ops->pads_logits ? padded_vocab_size(c) : c->vocab_size;
}

/* The part of a backend's shape that the configuration decides; the caller adds rows and purpose. */
static inline gpt_shape config_shape(const gpt_config *c) {
    return (gpt_shape){.C = c->n_embd,
                       .V = c->vocab_size,
                       .Vp = padded_vocab_size(c),
                       .NH = c->n_head,
                       .NKV = c->n_kv_head,
                       .HS = head_size(c),
                       .QK = qk_norm_size(c),
                       .F = c->n_ff,
                       .activation = c->activation,
                       .logit_cap = c->logit_cap > 0,
                       .head_bias = c->head_bias,
                       .E = c->n_expert};
}

/* Rows of the feed-forward layer for N tokens: one for each expert of a token. */
static inline int64_t fc_rows(const gpt_config *c, int64_t N) {
    return c->n_expert ? N * c->n_expert_used : N;
}

/* The record of layer l. */
gpt_layer config_layer(const gpt_config *c, int l);
/* The factor of its scores. */
float layer_score_scale(const gpt_config *c, int l);
double forward_flops_per_token(const gpt_config *c, int T);

/* ---- lora.c ---- */

/* The matrices of a layer that may have adapters. */
enum { LORA_QKV, LORA_ATT_PROJ, LORA_FC, LORA_MLP_PROJ, LORA_MATRICES };

/* The adapters of one: none, or those of its parts. */
typedef struct lora_shape {
    int n_parts, rows; /* rows of all parts */
    lora_part parts[GPT_MAX_STACKED];
} lora_shape;

lora_shape lora_shape_of(const gpt_config *c, const gpt_lora *o, int matrix);
/* Outputs of u for a row. */
static inline int lora_width(const gpt_config *c, const gpt_lora *o, int matrix) {
    return lora_shape_of(c, o, matrix).n_parts * o->rank;
}
/* Inputs of a matrix of a layer. */
int lora_inputs(const gpt_config *c, int matrix);
/* Whether this model can have them, and how many parameters they are. */
int lora_check(const gpt_config *c, const gpt_lora *o);
int lora_count(const gpt_config *c, const gpt_lora *o);
/* The layer and the matrix of a parameter such as "h.0.attn.qkv.weight", or of an adapter; false for others. */
bool lora_matrix_of(const char *name, int *layer, int *matrix);

/* Without training, or with adapters, parameters of the shape are only read. */
static inline bool weights_are_fixed(const gpt_options *o) {
    return !o->training || o->lora.rank > 0;
}

/* ---- params.c ---- */

/* The places of the parameters of a layer, or of the whole model; the gradients have the same view.
 * A tensor that this configuration does not have is NULL. */
typedef struct layer_view {
    float *norm_1_w, *norm_1_b;             /* (C) */
    weight *qkv_w;                          /* (QKV, C) */
    weight *qkv_b;                          /* (QKV) */
    float *q_norm_w, *k_norm_w;             /* (HS), or (NH HS) of a norm over the width */
    weight *att_proj_w;                     /* (C, NH HS) */
    weight *att_proj_b;                     /* (C) */
    float *att_norm_w;                      /* (C) of the norm after the branch */
    float *norm_2_w, *norm_2_b;             /* (C); with one_norm those of norm 1 */
    weight *fc_w;                           /* (F or 2 F, C) */
    weight *fc_b;                           /* (F or 2 F) */
    weight *mlp_proj_w;                     /* (C, F) */
    weight *mlp_proj_b;                     /* (C) */
    float *router_w;                        /* (E, C) */
    weight *expert_fc_w[GPT_MAX_EXPERTS];   /* (E) of (F or 2 F, C), in place of fc_w */
    weight *expert_proj_w[GPT_MAX_EXPERTS]; /* (E) of (C, F) */
    float *mlp_norm_w;                      /* (C) of the norm after the branch */
    float *lora_a[LORA_MATRICES];           /* (parts R, in) */
    float *lora_b[LORA_MATRICES];           /* (rows of parts, R) */
    float *lora_m[LORA_MATRICES];           /* (rows of parts), with DoRA */
} layer_view;

typedef struct params_view {
    float *wte;                 /* (Vp, C) */
    float *wpe;                 /* (block_size, C) */
    float *norm_f_w, *norm_f_b; /* (C) */
    weight *head;               /* (Vp, C); of wte where tied */
    float *head_b;              /* (Vp) */
    layer_view *layers;         /* (L) */
} params_view;

/* One tensor of the parameter buffer. */
typedef struct param_slot {
    gpt_param info;
    int64_t offset, stored; /* in numbers; stored counts padding rows too */
    int layer;              /* -1: before the layers, n_layer: after them */
    bool kept;              /* in the buffer; else in the form that products read alone */
    float init_std;
    float init_bound; /* uniform within */
    bool init_ones;
} param_slot;

/* Optimizers, and the most state slots of one. */
enum { N_OPTIMIZERS = GPT_OPTIMIZER_MUON + 1, MAX_STATES = 2 };

static inline int optimizer_states(int kind) {
    return kind == GPT_OPTIMIZER_ADAMW ? 2 : kind != GPT_OPTIMIZER_DEFAULT ? 1 : 0;
}

typedef struct params_layout {
    param_slot *slots;
    gpt_segment *segments;
    int n_slots;
    gpt_lora lora;
    int64_t n_stored; /* numbers in the buffer, padding included */
    int64_t n_params; /* learned numbers */
    int64_t n_active; /* those that a token reads */
    int64_t n_grads;  /* numbers in the gradients: of parameters that are not frozen */
    int64_t n_states[N_OPTIMIZERS]; /* numbers in each state buffer of an optimizer */
    int moments;                    /* enum gpt_moments, of AdamW's */
    int n_shards;                   /* of the state; at most 1: it is whole */
    int shard;                      /* the part that there is */
    struct bucket *shard_ranges;    /* (n_shard_ranges) by place; each has a piece for each part */
    int64_t *shard_bounds; /* (n_shard_ranges, n_shards + 1) of the pieces, in the gradients */
    int64_t *shard_blocks; /* (n_shard_ranges, n_shards) a piece's first block in shard_squares */
    double *shard_squares; /* (n_shard_blocks) sums for the norm; those of a part are neighbours */
    int n_shard_ranges;
    bool shard_tail; /* backward completes the last range after all others */
    int64_t n_shard_blocks;
    gpt_segment
        *shard_segments; /* (n_shard_segments) what the own pieces update, without packed forms */
    int n_shard_segments;
} params_layout;

enum { EMBEDDING = 0 }; /* wte is the first tensor */

int params_count(const gpt_config *c);
/* The i-th tensor; false past the last. */
bool params_slot(const gpt_config *c, int i, param_slot *out);
/* The i-th of the adapters, which follow those; and its layer and matrix: see layer_view. */
bool lora_slot(const gpt_config *c, const gpt_lora *o, int i, param_slot *out);
float **lora_field(const gpt_config *c, const gpt_lora *o, int i, layer_view *layers);
/* Where weights are fixed, a matrix that has a form for products is kept in the buffer only where something
 * else reads it too, or where the backend cannot make that form of the host's memory. */
int params_layout_create(const gpt_config *c, const gpt_ops *ops, const gpt_options *o,
                         params_layout *out);
void params_layout_free(params_layout *layout);
/* Gives the matrices of products their places for the packed form, from base on (NULL: only
 * counts). Returns the bytes: 0 where products read the parameters themselves. */
size_t params_plan_packed(const gpt_ops *ops, bool training, char *base, params_layout *layout);
/* Points view (whose layers have room for n_layer) into the parameters, products to the packed form;
 * or into the gradients, where a frozen parameter is NULL. */
void params_view_set(const gpt_config *c, const params_layout *layout, float *params,
                     params_view *view);
void grads_view_set(const gpt_config *c, const params_layout *layout, float *grads,
                    params_view *view);
/* Values of one tensor, as stored. A function of (seed, tensor, element). */
void params_init(const param_slot *slot, int i, uint64_t seed, float *out);

/* ---- acts.c ---- */

/* The room of a buffer in an arena: products choose by alignment, and tell up to 256 bytes apart. */
static inline size_t align_buffer(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

/* The activations of one layer that backward reads again. */
typedef struct layer_acts {
    act *resid_1;     /* (N, C) the residual stream as norm 1 reads it */
    act *norm_1;      /* (N, C); resid_1 where no norm is before the branches */
    float *stats_1;   /* (N, 2) */
    act *qkv;         /* (N, QKV), normalised and rotated in place */
    act *qk;          /* (N, (NH + NKV) HS) queries and keys as their norm reads them */
    float *stats_qk;  /* (N, NH + NKV) */
    act *att;         /* (N, NH HS) */
    float *lse;       /* (B, NH, T) */
    act *att_out;     /* (N, C) as the norm after the branch reads it; else acts.branch */
    float *stats_att; /* (N, 2) of that norm */
    act *resid_2;     /* (N, C) the residual stream as norm 2 reads it */
    act *norm_2;    /* (N, C); resid_2 where no norm is before the branches, norm_1 with one_norm */
    float *stats_2; /* (N, 2) */
    float *probs;   /* (N, E) of experts */
    float *gates;   /* (N, K) */
    int32_t *choices; /* (N, K) */
    int32_t *places;  /* (N, K) */
    int32_t *begins;  /* (E + 1); those of all layers one after the other */
    act *expert_out;  /* (N K, C) */
    act *fc_pre;      /* (N, F or 2 F), with experts (N K, F or 2 F); dfc may be its place */
    act *fc;          /* as many rows of F; shared by all layers where backward recomputes it */
    act *mlp_out;     /* (N, C) as the norm after the branch reads it; else acts.branch */
    float *stats_mlp; /* (N, 2) of that norm */
    float *lora_u[LORA_MATRICES]; /* (N, parts R) */
    act *lora_v[LORA_MATRICES];   /* (N, rows of parts), with DoRA */
    int cache_rows;               /* of a sequence: see cache_rows() */
    void *cache_k;                /* (n_seq, NKV, cache_rows, HS) act, or int8 with scales */
    void *cache_v;                /* the same */
    float *scale_k, *scale_v;     /* (n_seq, NKV, cache_rows), or NULL */
} layer_acts;

/* Every buffer of a forward and backward pass. Without training all layers share one set, and the
 * gradients are absent; without a session there is no cache. */
typedef struct acts {
    int32_t *tokens, *targets; /* (N) */
    int32_t *positions; /* (N) in a step of a session, or `documents`; NULL: row n is at n % T */
    int32_t *seqs;      /* (N) in a step of a session */
    int32_t *documents; /* (N) positions in documents, for a batch that has several in a sequence */
    float *losses;      /* (N) */
    float *weights;     /* (N) of the losses, in training */
    float *wte_rows;    /* (N, C) of an embedding that is not kept as floats, for the tokens */
    float *rope;        /* (number of tables, rope_rows, pairs, 2), as rope_forward reads them */
    int rope_rows;      /* positions that there is room for */
    int rope_filled;    /* and those that are filled for sequences of any length */
    const int32_t
        *cache_positions; /* (N) of a session's rows in caches with fewer rows than n_ctx */
    act *branch;          /* (N, C) to be added to the residual stream */
    act *rest;            /* (N, C) what that stream lacks, or NULL: see ops.h */
    act *expert_in;       /* (N K, C) */
    act *resid_f;         /* (N, C) as the final norm reads it */
    act *norm_f;          /* (N, C) */
    float *stats_f;       /* (N, 2) */
    float *logits;        /* (logit_rows, V), or Vp where the table pads them */
    int logit_rows;
    /* of a session, for rows of logits that a token is drawn from */
    sample_row *draws;              /* (logit_rows) */
    sample_adjustment *adjustments; /* (n_adjustments) */
    sample_result *results;         /* (logit_rows) */
    int64_t n_adjustments;
    /* gradients, used by one layer after the other */
    act *dresid;        /* (N, C) of the residual stream, growing as backward goes down */
    act *dbranch;       /* (N, C) of a branch; dresid, but with dropout and in parallel layers */
    act *dunnormed;     /* (N, C) of a branch before the norm after it */
    act *dnorm;         /* (N, C) */
    act *dqkv;          /* (N, QKV) */
    act *datt;          /* (N, NH HS) */
    act *dfc;           /* (N, F or 2 F), with experts (N K, F or 2 F); NULL: in fc_pre */
    act *dexperts;      /* (N K, C) */
    float *dgates;      /* (N, K) */
    act *dv;            /* (N, the widest of a layer's products), with DoRA */
    layer_acts *layers; /* (L) */
} acts;

/* Of a row: its token, position and sequence, and its position in caches that have fewer rows. */
enum { STEP_TOKEN, STEP_POSITION, STEP_SEQ, STEP_CACHE_POSITION, STEP_INTS };

/* The purpose of a set of activations. */
typedef struct acts_shape {
    int N, T; /* rows, and the longest sequence */
    bool training, dropout;
    int recompute;        /* enum gpt_recompute */
    int recompute_layers; /* as in gpt_options */
    gpt_lora lora;
    int n_seq, n_ctx; /* of the cache; 0: none */
    int kv;           /* enum gpt_kv, its dtype */
    int logit_rows;
} acts_shape;

/* Whether layer l computes more than norms again in backward. */
static inline bool recomputes_layer(int recompute, int n_layers, int l) {
    return recompute != GPT_RECOMPUTE_NONE && (n_layers == 0 || l < n_layers);
}

/* Lays the buffers out from base (NULL: only counts). layers of out must have room for L, or be
 * NULL when counting. Returns the bytes. */
size_t acts_plan(const gpt_config *c, const gpt_ops *ops, const acts_shape *shape, char *base,
                 acts *out);

/* ---- the model ---- */

/* The settings and results of one step, in the device's memory. */
typedef struct step_report {
    float loss; /* of the micro-batches so far, each times its scale */
    float grad_norm;
} step_report;

typedef struct step_state {
    gpt_adamw_step adamw;
    gpt_sgd sgd;
    gpt_muon muon;
    uint64_t dropout_key;
    step_report report;
} step_state;

/* The adapted rows of a matrix, with DoRA. */
typedef struct dora_rows_of {
    float *squares;  /* (rows of parts) of the model's rows */
    float *gain;     /* (rows of parts) as dora_gain makes it */
    float *per_norm; /* the same */
} dora_rows_of;

typedef struct dora_state {
    dora_rows_of *of; /* (L, LORA_MATRICES); NULL without DoRA */
    act *in;          /* (dora_rows, the widest input) */
    act *products;    /* (dora_rows, the widest output) */
    act *hidden;      /* (dora_rows, F) */
    bool stale;       /* parameters were written since */
} dora_state;

/* The rows of an embedding in a file, as float32. */
typedef struct lent_file {
    bool is_open;
    int descriptor; /* a duplicate of the caller's */
    int64_t offset; /* in bytes, of the first row */
} lent_file;

/* The rows of the next batch in a larger one of the step. */
typedef struct batch_place {
    bool given;
    int64_t micro, row; /* number of that batch, and its first row here */
} batch_place;

/* A range of the gradients that ranks add at once. */
typedef struct bucket {
    int64_t begin, end;
    int layer; /* backward has them when it has ended this layer; -1: when it has ended */
} bucket;

/* Gradients that are added while backward computes others. */
typedef struct gradient_sums {
    gpt_comm *comm; /* NULL: none are */
    /* In backward, after a layer, n_layer: after the head, -1: after all. */
    void (*advance)(gpt_model *m, int layer);
    bucket next;    /* the first that is not being added */
    int next_range; /* the same of a sharded state: see shard_range_at */
    bool had_pass;  /* the one of which they are */
} gradient_sums;

struct gpt_model {
    gpt_config config;
    gpt_layer *layers;        /* (L) config.layers */
    int *rope;                /* (L) the index of a layer's rotary table, -1 where it has none */
    double *rope_frequencies; /* (rope_sets, number of tables, pairs) radians a position */
    gpt_options options;      /* with defaults in place of 0 */
    const gpt_ops *ops;
    gpt_ctx *ctx;
    bool profiled; /* ops and ctx are those of profile.c */
    int layer;     /* the one that is computed; -1: none */
    params_layout layout;

    void *arena; /* one allocation: everything below */
    size_t arena_bytes;
    float *params, *grads; /* (n_stored), (n_grads) */
    float *residual;       /* (n_grads) of gradients that this rank has not sent; NULL */
    void *optimizer_state[N_OPTIMIZERS]
                         [MAX_STATES]; /* (state_bytes of the optimizer) each, or NULL */
    step_state *state;                 /* (1) */
    void *workspace;
    acts acts;
    params_view w, dw;
    lent_file lent;     /* the embedding, in place of w.wte where it is open */
    float *host_losses; /* (max_batch max_seq) on the host */
    bool pack_stale;    /* parameters were written since they were packed */
    dora_state dora;

    int64_t step;                 /* updates done */
    int64_t n_micro;              /* backward calls since the last update */
    int documents_B, documents_T; /* the next batch, which is of several documents; 0: it is not */
    int documents_longest;        /* tokens of the longest of them */
    batch_place place;
    gradient_sums sums;
    int forward_B, forward_T; /* the batch of a forward pass that waits for its weights; 0: none */
    bool grads_stale;         /* the next backward starts from zero */
    bool
        shard_summed; /* the gradients of the own part are sums of all ranks, and shard_norm theirs */
    bool shard_updated; /* parameters of other parts are those before the update */
    float shard_norm;
    bool interrupted; /* the computation under way has stopped between two layers */
    bool lost_rows;   /* because rows of a lent embedding could not be read */
    int forks;        /* fork_count() of the process that made it */
};

/* The kind of the norms before the branches. */
static inline int norm_before(const gpt_model *m, int l) {
    return norms_before(&m->config) ? m->layers[l].norm : NORM_NONE;
}

/* The numbers of a matrix's adapters; a is NULL where it has none. */
typedef struct adapter_numbers {
    const float *a, *b, *gain;
} adapter_numbers;

struct gpt_adapter {
    gpt_model *model;
    void *arena; /* NULL: it changes nothing */
    size_t arena_bytes;
    adapter_numbers *of; /* (L, LORA_MATRICES) */
};

struct gpt_session {
    gpt_model *model;
    void *arena;
    size_t arena_bytes;
    void *workspace;
    acts acts;
    int n_seq, n_ctx, max_rows;
    int window, window_rows;      /* cache_window(), and the rows of such caches */
    int32_t *first;               /* (n_seq) the position of their first row */
    int kv;                       /* enum gpt_kv */
    int32_t *length;              /* (n_seq) tokens in the cache */
    const gpt_adapter **adapters; /* (n_seq) NULL: the model's parameters */
    int32_t *rows;     /* (STEP_INTS, max_rows at most) of a step, to be uploaded as one */
    sample_row *draws; /* (acts.logit_rows) */
};

/* The rows that go through the model together. */
typedef struct batch {
    int B, T, N;          /* N = B T, or the rows of a decoding step */
    gpt_session *session; /* NULL: B sequences of T; else rows with positions and seqs */
    bool training;        /* dropout, and what backward needs */
    bool first;           /* its gradients replace what is in the buffer */
    bool weighted;        /* its losses have the weights of acts.weights */
    int64_t row;          /* its first row in the batch that dropout is of */
    float balance;        /* factor of its load-balance loss */
} batch;

/* ---- arena.c ---- */

/* Sizes of the parts of the arena, in their order. */
typedef struct arena_plan {
    size_t params, packed, grads, residual, states, state, dora, acts, workspace, total;
} arena_plan;

arena_plan arena_plan_of(const gpt_config *c, const gpt_options *o, const gpt_ops *ops,
                         const gpt_ctx *ctx, params_layout *layout);
/* The largest batch with which the model would fit into so many bytes; 0 where none does. */
int arena_largest_batch(gpt_model *m, size_t bytes);
/* Points the model's buffers and views into m->arena. */
void arena_lay_out(gpt_model *m, const arena_plan *p);

/* ---- forward.c, backward.c, decode.c, optim.c ---- */

/* Brings the packed weights up to date with the parameters, where those were written. */
void model_pack(gpt_model *m);
/* Whether the caller wants the computation under way to end; asked between layers, on a CPU. */
bool model_stops(gpt_model *m);
/* From acts.tokens to acts.norm_f, unless m->interrupted. */
void model_forward(gpt_model *m, const acts *a, const batch *x);
/* The activations of a layer again that backward reads and forward has not kept. */
void model_remake(gpt_model *m, const acts *a, const batch *x, int l);
/* From acts.targets to the gradients of every parameter, and acts.losses, unless m->interrupted. */
void model_backward(gpt_model *m, const acts *a, const batch *x, float scale);
/* Makes the key of this step and micro-step that all dropouts share. */
void dropout_draw(gpt_model *m, int64_t micro);
/* The dropout of one site. */
enum { SITE_ATTENTION, SITE_ATT_PROJ, SITE_MLP_PROJ, SITES_PER_LAYER };
gpt_dropout_site dropout_of(const gpt_model *m, const batch *x, int layer, int site);
gpt_dropout_site dropout_of_embedding(const gpt_model *m, const batch *x);
gpt_dropout_site dropout_of_adapter(const gpt_model *m, const batch *x, int layer, int matrix);

/* The adapters of a matrix of a layer; a is NULL where it has none. */
typedef struct adapter {
    lora_shape shape;
    int index; /* of the matrix, as in gpt_adapter.of */
    const float *a, *b, *gain, *per_norm;
    float *da, *db, *dm, *u;
    act *v;
    gpt_dropout_site dropout;
} adapter;
adapter adapter_of(const gpt_model *m, const acts *a, const batch *x, int l, int matrix);
/* Whether a training step's products of the layer take it along. */
bool adapter_joins(const gpt_model *m, adapter r);
/* Runs the op: in a session, row by row with the adapters of the rows' sequences, neighbours together. */
void adapter_run(gpt_model *m, const batch *x, int index, const lora_forward *op);

/* ---- experts.c: the feed-forward branch where there are experts, as expand and contract of forward.c ---- */

void experts_route(gpt_model *m, const acts *a, const batch *x, int l);
void experts_expand(gpt_model *m, const acts *a, const batch *x, int l);
void experts_contract(gpt_model *m, const acts *a, const batch *x, int l);
/* From the branch's gradient to a->dnorm. */
void experts_backward(gpt_model *m, const acts *a, const batch *x, int l, const act *dbranch);

/* ---- adapters.c ---- */

/* Bytes of a copy of the model's adapters; with a base, points out->of into it. */
size_t adapter_plan(const gpt_model *m, char *base, gpt_adapter *out);
/* Copies them. */
void adapter_copy(gpt_model *m, gpt_adapter *to);
/* The adapter that all of n sequences have, where they have the same: *same. */
const gpt_adapter *adapter_of_all(const gpt_session *s, const int32_t *seqs, int n, bool *same);

/* ---- dora.c ---- */

/* The most rows of A in a matrix; 0 without DoRA. */
int dora_rows(const gpt_lora *o);
/* Lays the state out from base (NULL: only counts). out may be NULL when counting. Returns the bytes. */
size_t dora_plan(const gpt_config *c, const gpt_options *o, const gpt_ops *ops, char *base,
                 dora_state *out);
dora_rows_of dora_of(const gpt_model *m, int l, int matrix);
/* After parameter i, or entry `part` of its blocks, was given values. */
void dora_written(gpt_model *m, int i, const float *values, int64_t n);
int dora_written_blocks(gpt_model *m, int i, int part);
/* Initial magnitudes, where parameter i has some. */
void dora_init(gpt_model *m, int i, float *values);
/* Brings the gains up to date with the parameters, where those were written. Uses the workspace. */
void dora_measure(gpt_model *m);
/* Bytes of a workspace for that; 0 without DoRA. */
size_t dora_workspace(const gpt_model *m);

/* What a step gives for each wanted token, in order: its state, its logits, or a draw by its settings. */
typedef struct step_output {
    act *states;                    /* (number wanted, C) on the host, or NULL: logits */
    float *logits;                  /* (number wanted, V), or NULL: results */
    sample_result *results;         /* (number wanted) */
    const sample_row *draws;        /* (number wanted) */
    sample_adjustment *adjustments; /* of all draws, in order */
} step_output;

/* ---- window.c ---- */

/* The widest window of layers whose caches have fewer rows than n_ctx; 0: there are none. */
int cache_window(const gpt_config *c, int n_seq, int n_ctx);
/* Rows of a sequence in the cache of layer l. */
int cache_rows(const gpt_config *c, int l, int n_seq, int n_ctx);
/* Whether the caches have all that a token sees which follows the first `length`. */
bool window_reaches(const gpt_session *s, int seq, int length);
/* Forgets all but the first `length`, which are reached. */
void window_rewind(gpt_session *s, int seq, int length);
/* Moves rows so that n tokens, at most max_rows, can be appended. */
void window_make_room(gpt_session *s, int seq, int n);
/* Bytes of a row of a cache. */
static inline size_t cache_row_bytes(const gpt_session *s) {
    size_t number = s->kv == GPT_KV_INT8 ? 1 : s->model->ops->act_bytes;
    return (size_t)head_size(&s->model->config) * number;
}

/* ---- decode.c ---- */

/* The number of rows that a session of this size takes at once. */
int session_max_rows(int n_seq, int n_ctx);
size_t session_plan(const gpt_model *m, int n_seq, int n_ctx, int kv, char *base, gpt_session *s);
void session_step(gpt_session *s, const int32_t *tokens, const int32_t *seqs, const uint8_t *want,
                  int n, const step_output *out);
void session_fork(gpt_session *s, int from, int to, int length);

/* By the settings of each optimizer, NULL where it has no parameters. */
void model_update(gpt_model *m, const gpt_optimizer *const settings[N_OPTIMIZERS]);
/* Of the products of an update. */
double update_flops(const params_layout *layout);

/* ---- buckets.c ---- */

/* The first range of the gradients of which ranks make a sum, of at least so many numbers unless the next ones
 * come later; and the one after another, or an empty one. They follow from the layout alone. */
bucket bucket_first(const params_layout *layout, int64_t least);
bucket bucket_after(const params_layout *layout, int64_t least, bucket b);

/* ---- shard.c ---- */

static inline bool is_sharded(const params_layout *layout) {
    return layout->n_shards > 1;
}
/* Bounds (n_shards + 1) of the pieces of range i: those of part r are gradients [r] to [r + 1]. */
static inline const int64_t *shard_bounds_of(const params_layout *layout, int i) {
    return layout->shard_bounds + (ptrdiff_t)i * (layout->n_shards + 1);
}
/* The k-th range in the order in which backward completes them. */
static inline int shard_range_at(const params_layout *layout, int k) {
    int n = layout->n_shard_ranges - layout->shard_tail;
    return k < n ? n - 1 - k : k;
}
/* The blocks of squares of a piece. */
int64_t shard_blocks_in(const params_layout *layout, int i, int shard);
/* Cuts the gradients, and gives the state of the part that options name its place. After the gradients have
 * theirs. */
int shard_lay_out(const gpt_options *o, params_layout *layout);
void shard_layout_free(params_layout *layout);
/* Gradients begin to end = parameters, and the reverse. On a CPU. */
void shard_export(gpt_model *m, int64_t begin, int64_t end);
void shard_import(gpt_model *m, int64_t begin, int64_t end);
/* State slot k of parameter i (n) = that of the own pieces, or the reverse; other numbers stay. On a CPU. */
void shard_state_get(gpt_model *m, int i, int k, float *out, int64_t n);
void shard_state_set(gpt_model *m, int i, int k, const float *values, int64_t n);
/* bounds (n_shards + 1) = where the pieces of range i are in state slot k of a parameter, in numbers (n). */
void shard_state_bounds(const params_layout *layout, int i, int param, int k, int64_t n,
                        int64_t *bounds);

/* ---- moments.c ---- */

/* Numbers of which a tensor's state has a multiple. */
int64_t state_unit(const params_layout *layout);
/* Bytes of each state buffer of an optimizer. */
size_t state_bytes(const params_layout *layout, int kind);
/* The scales in one of AdamW's buffers; NULL where there are none. */
float *moment_scales(const params_layout *layout, void *buffer);
/* n numbers of state slot k of an optimizer, from the border `at` of a tensor on. A number that was read and is
 * written has the same bits again; others are rounded to nearest. Waits for the device. */
int state_read(gpt_model *m, int kind, int k, int64_t at, int64_t n, float *out);
int state_write(gpt_model *m, int kind, int k, int64_t at, int64_t n, const float *values);

/* ---- rows.c ---- */

/* Whether the rows of tokens are looked up on the host, for embedding_forward to read in their order:
 * the embedding is lent, or was given as blocks. */
bool rows_are_looked_up(const gpt_model *m);
/* Those of n tokens, to a->wte_rows. */
int rows_look_up(const gpt_model *m, const acts *a, const int32_t *tokens, int n);
/* Rows first to first + n - 1 of a matrix that is kept as blocks, to the host. */
int rows_read(const gpt_model *m, const gpt_segment *s, int first, int n, float *out);

/* (rows, cols) numbers of a file from byte `offset` on, which has them as (cols, rows) with
 * `transposed`. GPT_ERR_FILE where the file ends before. */
int lent_fetch(int descriptor, int64_t offset, int64_t rows, int64_t cols, bool transposed,
               float *out);
/* Keeps a duplicate of the descriptor. GPT_ERR_ARGUMENT where it is not open. */
int lent_open(gpt_model *m, int descriptor, int64_t offset);
void lent_close(gpt_model *m);
/* Numbers first to first + n of the embedding. GPT_ERR_FILE where the file has lost them. */
int lent_read(const gpt_model *m, int64_t first, int64_t n, float *out);

/* ---- rope.c ---- */

/* Layers with one rope_theta share a table. The index of layer l's table; -1: it has none. */
int rope_index(const gpt_config *c, int l);
int rope_table_count(const gpt_config *c);
/* Pairs of channels that a table turns: 0 with learned positions. */
int64_t rope_pairs(const gpt_config *c);
/* Sets of frequencies: for short and for long contexts, or one. */
int rope_sets(const gpt_config *c);
/* Radians a position: (rope_sets, number of tables, pairs). */
void rope_frequencies(const gpt_config *c, double *out);
/* The table of layer l, NULL where it has none. */
const float *rope_table(const gpt_model *m, const acts *a, int l);
/* Fills the tables for positions first to end at least, in sequences the longest of which ends at length. */
void rope_reach(const gpt_model *m, acts *a, int first, int end, int length);

#endif
