/* gpt.h: the whole C interface of libgpt.so.
 *
 * A model is created from a configuration or loaded from a checkpoint folder, trained with backward and
 * update, read and written parameter by parameter, and sampled from through a session (which owns a KV
 * cache).
 *
 *     #include "gpt.h"
 *     #include <stdio.h>
 *     #define TRY(call) if (call) { puts(gpt_last_error()); return 1; }
 *
 *     int main(void) {
 *         gpt_config config;
 *         gpt_options options = {.training = 1, .max_batch = 4, .max_seq = 32};
 *         gpt_optimizer adamw = {.kind = GPT_OPTIMIZER_ADAMW,
 *                                .adamw = {.lr = 1e-3f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f}};
 *         gpt_model *model;
 *         int32_t inputs[4 * 32], targets[4 * 32];
 *         float loss;
 *         for (int i = 0; i < 4 * 32; i++) inputs[i] = i % 7, targets[i] = (i + 1) % 7;
 *         TRY(gpt_config_preset("tiny", &config));
 *         TRY(gpt_model_create(&config, &options, &model));
 *         TRY(gpt_model_init(model, 42));
 *         for (int step = 1; step <= 50; step++) {
 *             TRY(gpt_model_backward(model, inputs, targets, 4, 32, 1.0f, NULL));
 *             TRY(gpt_model_update(model, &adamw, 1, &loss, NULL));
 *             printf("step %d: loss %.4f\n", step, loss);
 *         }
 *         gpt_model_free(model);
 *     }
 *
 * gpt.h and libgpt.so are in the folder of the Python package, which `gptc doctor` names, or where
 * CMake has built the library:
 *
 *     cc example.c -IDIR -LDIR -lgpt -Wl,-rpath,DIR -o example
 *
 * With PKG_CONFIG_PATH=DIR, `pkg-config --cflags --libs gptc` prints these options. Where libgpt.so is
 * copied to, it needs OpenBLAS's library (scipy_openblas32/lib in the Python packages) in the same folder.
 *
 * Rules that hold for every function:
 *  - A function that can fail returns GPT_OK or a GPT_ERR code, and has then changed nothing. The
 *    sentence that says why is gpt_last_error(), one per calling thread, valid until that thread's
 *    next failing call.
 *  - A model and its sessions are used by one thread at a time: they share buffers and a thread pool. The
 *    library has no lock; a program with several threads has one for each model, and holds it as long as its calls
 *    belong together, such as backward and update. Different models are independent. A function without a
 *    model or session may be called by any thread at any time.
 *  - After a fork, the child may use a model on a CPU and its sessions, unless a call with them was under
 *    way. For a model on a GPU it gets GPT_ERR_DEVICE. It may free both.
 *  - All memory is allocated when a handle is created; gpt_plan_memory says how much beforehand.
 *  - Arrays are row-major and belong to the caller. Sizes in comments use B (batch), T (time),
 *    V (vocab_size), C (n_embd).
 *
 * The region between the two fences is plain declarations: the Python package reads it as its
 * binding, so that this header is the only place where the interface is written down. */
#ifndef GPT_H
#define GPT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* ==== binding: begin ==== */

/* Changes with the meaning of any declaration below; gpt_abi_version() returns the library's. */
#define GPT_ABI_VERSION 20

enum gpt_status {
    GPT_OK = 0,
    GPT_ERR_ARGUMENT = 1,    /* a value is out of range, or arguments contradict each other */
    GPT_ERR_MEMORY = 2,      /* an allocation of the planned size failed */
    GPT_ERR_DEVICE = 3,      /* the device is missing, unsupported or failed */
    GPT_ERR_NUMERIC = 4,     /* a gradient norm, or a logit to sample from, is not finite */
    GPT_ERR_INTERRUPTED = 5, /* gpt_set_interrupt's function asked for it */
    GPT_ERR_FILE =
        6, /* a file is missing or damaged, or holds a model that gptc does not compute */
    GPT_ERR_COMM = 7, /* a rank of the job has not answered, or messages failed */
};

/* How the ranks of a job exchange numbers. */
enum gpt_comm_kind { GPT_COMM_NONE = 0, GPT_COMM_MPI = 1 };

/* The form in which ranks send gradients. A rounded one comes with error feedback: a rank adds to its next
 * numbers what rounding has left out (Seide et al. 2014), also of sums (Tang et al. 2019). */
enum gpt_wire {
    GPT_WIRE_FP32 = 0,
    GPT_WIRE_BF16 = 1,
    GPT_WIRE_INT8 = 2, /* 8 bits, and a float32 scale for 256 numbers: their largest / 127 */
};

enum gpt_device { GPT_DEVICE_CPU = 0, GPT_DEVICE_CUDA = 1 };

enum gpt_dtype {
    GPT_DTYPE_FP32 = 0,
    GPT_DTYPE_BF16 = 1, /* float32 parameters; products of bf16 with float32 sums */
    /* Matrices rounded to 8 bits in groups of 32 with a scale each, or to Q4_K's 4 bits in blocks of 256 with
     * a scale and a minimum for each 32, and bf16 activations; for training of adapters alone. */
    GPT_DTYPE_INT8 = 2,
    GPT_DTYPE_INT4 = 3,
    /* Matrices as the blocks that gpt_options.block_rows names, others in bf16, and bf16 activations;
     * for training of adapters alone. */
    GPT_DTYPE_PACKED = 4,
};

/* How a session keeps keys and values. */
enum gpt_kv {
    GPT_KV_ACTIVATIONS = 0, /* in the dtype of activations: float32, or bf16 */
    /* A vector of a head as int8 and one float32 scale, which is its largest number / 127. */
    GPT_KV_INT8 = 1,
};

/* Types of blocks, in which GGUF files store rows of numbers; these are their numbers there. */
enum gpt_block {
    GPT_BLOCK_Q4_0 = 2,
    GPT_BLOCK_Q4_1 = 3,
    GPT_BLOCK_Q5_0 = 6,
    GPT_BLOCK_Q5_1 = 7,
    GPT_BLOCK_Q8_0 = 8,
    GPT_BLOCK_Q2_K = 10,
    GPT_BLOCK_Q3_K = 11,
    GPT_BLOCK_Q4_K = 12,
    GPT_BLOCK_Q5_K = 13,
    GPT_BLOCK_Q6_K = 14,
    GPT_BLOCK_IQ4_NL = 20,
    GPT_BLOCK_IQ4_XS = 23,
};

enum gpt_norm {
    GPT_NORM_LAYERNORM = 0, /* (x - mean) / sqrt(var + eps): Ba et al. 2016 */
    GPT_NORM_RMSNORM = 1,   /* x / sqrt(mean(x^2) + eps): Zhang and Sennrich 2019 */
};

enum gpt_pos {
    GPT_POS_LEARNED = 0, /* a table of block_size rows, added to the token embedding */
    GPT_POS_ROPE =
        1, /* rotary, channels (i, i + HS/2) of each head: Su et al. 2021, as in Llama weights */
    GPT_POS_ROPE_WIDE =
        2, /* rotary, channels (2i, 2i + 1), frequency index i over the whole width */
};

enum gpt_activation {
    GPT_ACT_NONE = 0,
    GPT_ACT_GELU = 1,  /* tanh approximation: Hendrycks and Gimpel 2016 */
    GPT_ACT_SWISH = 2, /* x * sigmoid(x) */
    GPT_ACT_SWIGLU =
        3, /* swish(gate) * up: Shazeer 2020; the first layer then has 2 n_ff outputs */
    GPT_ACT_GELU_ERF = 4, /* x Phi(x), Phi of the normal distribution: Hendrycks and Gimpel 2016 */
    GPT_ACT_RELU = 5,     /* max(x, 0) */
    GPT_ACT_GEGLU = 6,    /* gelu(gate) * up, by the tanh approximation: Shazeer 2020 */
};

/* How rotary frequencies are lowered for sequences longer than a model was first trained on. */
enum gpt_rope_scaling {
    GPT_ROPE_NONE = 0,
    GPT_ROPE_LINEAR = 1, /* all divided by rope_factor: Chen et al. 2023 */
    GPT_ROPE_LLAMA3 = 2, /* the slow ones only, those in between by less: Llama 3.1 */
    /* The slow ones only, by a ramp over their indices: Peng et al. 2023, section 3.2. Queries and keys
     * are also multiplied by rope_attention: section 3.4. */
    GPT_ROPE_YARN = 3,
    /* In a sequence of T > rope_original tokens the base is rope_theta times
     * (rope_factor T / rope_original - rope_factor + 1)^(HS / (HS - 2)): section 3.3, as in transformers.
     * A call has the T of its longest sequence; keys that a session holds stay as they are. */
    GPT_ROPE_DYNAMIC = 4,
    /* Each frequency is divided by a number, another one in contexts of more than rope_original
     * tokens: Ding et al. 2024, section 3. The context is a session's n_ctx, or a model's max_seq. Queries and
     * keys are also multiplied by rope_attention. */
    GPT_ROPE_LONGROPE = 5,
};

/* The layers that have a bias; they add up. */
enum gpt_bias_of {
    GPT_BIAS_QKV = 1,
    GPT_BIAS_ATT_PROJ = 2,
    GPT_BIAS_FC = 4,
    GPT_BIAS_MLP_PROJ = 8,
    GPT_BIAS_NORM = 16, /* LayerNorms that have a weight */
    GPT_BIAS_ALL = 31,
};

/* The place of a layer's norms. */
enum gpt_norm_at {
    GPT_NORM_BEFORE = 0, /* of each branch: x + f(norm(x)) */
    GPT_NORM_AFTER = 1,  /* x + norm(f(x)): Liu et al. 2022, as in OLMo 2 (2024), section 3.2 */
    GPT_NORM_BOTH = 2,   /* x + norm(f(norm(x))): Gemma 2 (2024), section 2 */
};

/* RMSNorm of queries and keys, before the rotation. */
enum gpt_qk_norm {
    GPT_QK_NORM_NONE = 0,
    GPT_QK_NORM_HEADS =
        1, /* over each head, of which all have the same scales: Henry et al. 2020 */
    GPT_QK_NORM_WIDTH = 2, /* over all queries, and all keys, of a token: Dehghani et al. 2023 */
};

/* One layer of a model whose layers differ. */
typedef struct gpt_layer {
    int32_t norm;     /* enum gpt_norm, of both norms */
    int32_t rope;     /* 1: queries and keys are rotated, as pos says; 0: they are not */
    float rope_theta; /* base of the rotary frequencies; unused where rope is 0 */
    int32_t window;   /* keys that a query sees: its own and those just before it; 0: all */
} gpt_layer;

/* The shape of a model. Every family (byte, gpt2, llama) is a point in this space. */
typedef struct gpt_config {
    int32_t vocab_size; /* V */
    int32_t block_size; /* the longest sequence */
    int32_t n_layer;
    int32_t n_head;      /* divides n_embd, unless there is a head_size */
    int32_t n_kv_head;   /* divides n_head; fewer means grouped queries (Ainslie et al. 2023) */
    int32_t n_embd;      /* C */
    int32_t n_ff;        /* hidden width of the feed-forward layer */
    int32_t norm;        /* enum gpt_norm */
    int32_t norm_weight; /* 1: norms have a learned scale (and, for LayerNorm with bias, a shift) */
    int32_t pos;         /* enum gpt_pos */
    int32_t activation;  /* enum gpt_activation, not NONE */
    int32_t bias;        /* sum of enum gpt_bias_of */
    int32_t tied;        /* 1: the output head is the token embedding */
    float norm_eps;
    float rope_theta;     /* base of the rotary frequencies; unused with learned positions */
    int32_t rope_scaling; /* enum gpt_rope_scaling; NONE unless pos is GPT_POS_ROPE */
    float
        rope_factor; /* at least 1; this and the next are unused where scaling does not read them */
    /* LLAMA3, YARN: turns within rope_original below which it applies in full, */
    float rope_low_freq;
    float rope_high_freq; /* and above which it does not apply; greater than rope_low_freq */
    int32_t
        rope_original; /* the longest sequence before the frequencies were lowered; not LINEAR */
    float
        rope_attention; /* YARN, LONGROPE: factor of queries and keys; 0, of YARN alone: 0.1 log(rope_factor) + 1 */
    int32_t head_size; /* 0: n_embd / n_head */
    int32_t qk_norm;   /* enum gpt_qk_norm; WIDTH needs n_kv_head equal to n_head */
    int32_t window;    /* of every layer: see gpt_layer */
    /* (n_layer), or NULL: every layer has the norm, pos, rope_theta and window above. A model
     * keeps its own copy. */
    const gpt_layer *layers;
    /* Rotated channels of each head, the first of them; 0: all. An even number. */
    int32_t rope_dim;
    /* 1: both branches of a layer read its input: x + attention(norm_1(x)) + mlp(norm_2(x)), as in
     * GPT-NeoX (Black et al. 2022, section 2.1). Both have one dropout of the residual stream. */
    int32_t parallel;
    int32_t norm_at;        /* enum gpt_norm_at; BEFORE where parallel is 1 */
    float score_scale;      /* factor of the scores; 0: 1 / sqrt(head size) */
    int32_t score_by_layer; /* 1: that of layer l, from 0 on, is also divided by l + 1 */
    float embedding_scale;  /* factor of the token embedding as layers read it; 0: 1 */
    /* Soft caps: a number x becomes cap tanh(x / cap), as in Gemma 2 (2024), section 2. 0: none. */
    float score_cap; /* of scores, after their factor */
    float logit_cap;
    /* Experts of each feed-forward layer, each n_ff wide and without biases: Shazeer et al. 2017; 0: one
     * layer for all tokens. On a CPU. */
    int32_t n_expert;
    int32_t n_expert_used; /* experts of a token, the likeliest by a softmax over all; 0 without */
    /* 1: their weights are divided by their sum, as in Mixtral (Jiang et al. 2024, section 2.1) */
    int32_t expert_norm;
    /* Factor of the load-balance loss in the gradient: Fedus et al. 2021, equations 4 to 6, with all
     * layers' tokens together, as in transformers. Losses stay cross-entropy. Not for weighted losses. */
    float router_loss;
    /* 1: parallel layers lack norm_2, and both branches read norm_1, as in GPT-J (Wang and Komatsuzaki
     * 2021). */
    int32_t one_norm;
    int32_t head_bias; /* 1: logits have a bias */
    /* (2, pairs of rotated channels) LONGROPE: divisors in short contexts, then in long ones. Read when a
     * model is created. */
    const float *rope_divisors;
} gpt_config;

enum { GPT_MAX_EXPERTS = 128 };

/* The optimizer of a parameter. */
enum gpt_optimizer_kind {
    GPT_OPTIMIZER_DEFAULT = 0, /* of a group: gpt_options.optimizer; there: AdamW */
    GPT_OPTIMIZER_ADAMW = 1,   /* two state slots: the moments */
    GPT_OPTIMIZER_SGD = 2,     /* one state slot: the momentum buffer */
    /* Matrices of layers; state slots: the momentum buffer, and with muon_rows (rows). Other parameters have
     * AdamW instead. */
    GPT_OPTIMIZER_MUON = 3,
};

enum gpt_decay {
    GPT_DECAY_DEFAULT = 0, /* as gpt_param.decay says */
    GPT_DECAY_OFF = 1,
    GPT_DECAY_ON = 2,
};

/* How parameters are trained whose names match a pattern. */
typedef struct gpt_group {
    const char *pattern; /* of a whole name: * matches any text, ? any character */
    int32_t frozen;      /* 1: never updated; without gradient and optimizer state */
    int32_t optimizer;   /* enum gpt_optimizer_kind */
    int32_t decay;       /* enum gpt_decay */
    float lr_scale;      /* multiplies the learning rate; 0: 1 */
} gpt_group;

/* Rows of a matrix that are given as blocks of one type, by gpt_model_write_blocks. */
typedef struct gpt_block_rows {
    int32_t param;
    int32_t rows;  /* those after the rows of entries before; together all that it has */
    int32_t block; /* enum gpt_block */
} gpt_block_rows;

enum { GPT_MAX_STACKED = 3 }; /* entries for a parameter: queries, keys and values */

/* What an adapter changes; they add up. A matrix has one adapter, or its rows of queries, keys and values, or
 * of gates and ups, have one each. */
enum gpt_lora_target {
    GPT_LORA_QKV = 1, /* as one matrix, as in GPT-2; not with the three of its rows */
    GPT_LORA_Q = 2,
    GPT_LORA_K = 4,
    GPT_LORA_V = 8,
    GPT_LORA_ATT_PROJ = 16,
    GPT_LORA_FC = 32,   /* as one matrix; not with the two of its rows */
    GPT_LORA_GATE = 64, /* of SwiGLU */
    GPT_LORA_UP = 128,  /* of SwiGLU */
    GPT_LORA_MLP_PROJ = 256,
};

/* Low-rank adapters: Hu et al. 2021. A linear layer with one computes x W^T + scale dropout(x) A^T B^T, with A
 * (rank, in) and B (out, rank) in float32. With adapters all other parameters are frozen, in training too. */
typedef struct gpt_lora {
    int32_t rank;    /* 0: there are none; the rest is then unused */
    int32_t targets; /* sum of enum gpt_lora_target, not 0 */
    float scale;     /* usually alpha / rank; alpha / sqrt(rank): Kalajdzievski 2023 */
    float dropout;   /* probability, in backward only; 0 <= dropout < 1 */
    /* 1: DoRA (Liu et al. 2024): each adapted row of W + scale B A is scaled to a learned length. Its gradient
     * takes the length before for a constant (section 4.3). Dropout is of the adapter's input alone. */
    int32_t dora;
} gpt_lora;

/* What a training step computes again in its backward pass, to keep less; the results are the same bits. */
enum gpt_recompute {
    GPT_RECOMPUTE_NONE = 0,
    GPT_RECOMPUTE_MLP = 1,   /* the norms and the first feed-forward layer */
    GPT_RECOMPUTE_BLOCK = 2, /* all of a layer from the residual stream: Chen et al. 2016 */
};

/* The form in which AdamW's moments are kept. They are read and written as float32. */
enum gpt_moments {
    GPT_MOMENTS_FP32 = 0,
    GPT_MOMENTS_BF16 = 1, /* rounded at random, by step and place, so that small changes count */
    GPT_MOMENTS_INT8 = 2, /* the same, of 8 bits with a scale for each 256: Dettmers et al. 2021 */
};

typedef struct gpt_options {
    int32_t device;      /* enum gpt_device */
    int32_t dtype;       /* enum gpt_dtype */
    int32_t n_threads;   /* 0: one for each core this process may use */
    int32_t pin_threads; /* 1: the library's own threads each stay on one core */
    int32_t training;    /* 1: also allocate gradients and optimizer state */
    int32_t max_batch; /* largest B of logits, loss and backward; 0: none of them will be called */
    int32_t max_seq;   /* largest T of the same; 0: block_size */
    float dropout;     /* probability, in backward only; 0 <= dropout < 1 */
    uint64_t seed;     /* of dropout */
    int32_t optimizer; /* enum gpt_optimizer_kind, for parameters without another */
    int32_t n_groups;
    /* (n_groups) or NULL. The first group that matches a parameter holds for it. Each must match one.
     * Unused without training. */
    const gpt_group *groups;
    /* (n_block_rows) or NULL: of GPT_DTYPE_PACKED. The embedding, and matrices that products read, may
     * be given as blocks; gates and ups of SwiGLU in two entries. */
    int32_t n_block_rows;
    const gpt_block_rows *block_rows;
    gpt_lora lora;
    int32_t recompute; /* enum gpt_recompute; unused without training */
    /* Of the gradient alone: losses stay cross-entropy. The share of a target that all tokens get
     * alike, 0 <= label_smoothing < 1; and the factor of the squared logarithm of the softmax's sum. */
    float label_smoothing, z_loss;
    /* The optimizer's state is of part `shard` of n_shards alone, on a CPU: ZeRO-1 (Rajbhandari et al. 2020).
     * Matrices of Muon are in one part each. Each rank of a job has one part, that of its number. 0 or 1: of all. */
    int32_t n_shards, shard;
    /* 1: matrices with Muon have a second state slot, (rows), by which each row of a step is scaled: see
     * gpt_muon. */
    int32_t muon_rows;
    int32_t wire; /* enum gpt_wire, of gpt_model_all_reduce; on a CPU where it is not fp32 */
    int32_t recompute_layers; /* the first so many compute more than norms again; 0: all layers */
    int32_t moments;          /* enum gpt_moments, of AdamW's; on a CPU where it is not fp32 */
} gpt_options;

/* The memory and work of a model, before anything is allocated. Bytes are exact, but for library_bytes. */
typedef struct gpt_plan {
    int64_t n_params;        /* learned numbers, tied ones once, without padding rows */
    int64_t n_active_params; /* those that a token reads: fewer where there are experts */
    uint64_t param_bytes;
    uint64_t grad_bytes;
    uint64_t optimizer_bytes;
    uint64_t activation_bytes;
    uint64_t workspace_bytes;
    uint64_t total_bytes;           /* of the parts above: one allocation */
    uint64_t library_bytes;         /* what the matrix library allocates in addition, as measured */
    double forward_flops_per_token; /* at T = max_seq, causal attention counted once, not twice */
    double train_flops_per_token;   /* three times that: forward, and two products in backward */
    double update_flops;            /* of the products of one update: Muon has them */
} gpt_plan;

/* One parameter tensor. Linear weights are (out, in). */
typedef struct gpt_param {
    char name[64];    /* such as "h.0.attn.qkv.weight" */
    int32_t n_dim;    /* 1 or 2 */
    int32_t decay;    /* 1: AdamW's weight decay applies (matrices, not norms and biases) */
    int64_t shape[2]; /* shape[1] is 1 where n_dim is 1 */
    int64_t size;     /* shape[0] * shape[1] */
} gpt_param;

/* AdamW: Loshchilov and Hutter 2019, with PyTorch's conventions. */
typedef struct gpt_adamw {
    float lr;
    float beta1;
    float beta2;
    float eps;
    float weight_decay;
    float grad_clip; /* largest global gradient norm; 0: no clipping */
} gpt_adamw;

/* Stochastic gradient descent with momentum, with PyTorch's conventions: weight decay joins the
 * gradient. */
typedef struct gpt_sgd {
    float lr;
    float momentum;
    float weight_decay;
    float grad_clip; /* largest global gradient norm; 0: no clipping */
} gpt_sgd;

/* Muon: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". A step is the orthogonal
 * matrix nearest to the momentum (Nesterov's), nearly: five products of Amsel et al. 2025. It is scaled to
 * 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, section 2.2), so that its numbers are as large as AdamW's, and rate
 * and decay can be the same. Queries, keys and values, gates and ups are matrices each.
 * With gpt_options.muon_rows it is NorMuon (Li et al. 2025, algorithm 1): a row of the orthogonal matrix is divided by
 * the root of a moving average of its mean square, and the whole scaled to the same mean square as before. */
typedef struct gpt_muon {
    float lr;
    float momentum;
    float weight_decay; /* decoupled, as AdamW's */
    float grad_clip;    /* largest global gradient norm; 0: no clipping */
    float beta2;        /* decay rate of the averages of muon_rows */
    int32_t
        cautious; /* 1: a number decays only where the step does not make it larger (Chen et al. 2025,
                         * "Cautious Weight Decay") */
} gpt_muon;

/* The settings of one optimizer for one update. */
typedef struct gpt_optimizer {
    int32_t kind; /* enum gpt_optimizer_kind, not DEFAULT: which of these there is */
    union {
        gpt_adamw adamw;
        gpt_sgd sgd;
        gpt_muon muon;
    };
} gpt_optimizer;

/* A number added to one token's logit; -INFINITY: the token is never drawn. */
typedef struct gpt_bias {
    int32_t token;
    float value;
} gpt_bias;

/* How the next token is drawn, in this order: biases, penalties (for tokens of the history),
 * temperature, and the filters, each of what the one before has left. All 0 but for
 * repetition_penalty, typical_p and top_p, which are 1: the most likely token. */
typedef struct gpt_sampling {
    const gpt_bias *bias; /* (n_bias) or NULL */
    int32_t n_bias;
    float repetition_penalty; /* divides logits above 0 and multiplies others: Keskar et al. 2019 */
    float presence_penalty;   /* subtracted from the logit, */
    float frequency_penalty;  /* and this for each time that the token appears */
    float temperature;        /* 0: the most likely token */
    int32_t top_k;            /* keep the k most likely; 0: all */
    float typical_p; /* keep the tokens whose surprise is nearest to the entropy, with this much
                      * probability: Meister et al. 2023; 1: all */
    float top_p;     /* keep the fewest tokens with this much probability: Holtzman et al. 2020 */
    float min_p;     /* drop tokens less likely than min_p times the most likely; 0: none */
    uint64_t seed;
} gpt_sampling;

enum { GPT_MAX_TOP = 32 };

/* A token to be drawn by gpt_session_sample, and what was drawn. */
typedef struct gpt_draw {
    gpt_sampling sampling;
    const int32_t *history; /* (n_history), NULL: none; gpt_sample says what for */
    int32_t n_history;
    int32_t vocab_size; /* draws from the first so many tokens; 0: from all */
    uint64_t position;  /* the draw is a function of the seed and this */
    int32_t n_top; /* also the log-probability of the token, and so many of the likeliest, at most
                    * GPT_MAX_TOP; -1: neither */
    /* results */
    int32_t token;
    float logprob;
    int32_t top_tokens[GPT_MAX_TOP]; /* in falling order */
    float top_logprobs[GPT_MAX_TOP];
} gpt_draw;

/* The tensors of a parameter that gpt_model_read and gpt_model_write reach. */
enum gpt_tensor {
    GPT_TENSOR_VALUE = 0,
    GPT_TENSOR_GRAD = 1,
    GPT_TENSOR_STATE0 = 2,    /* + k: state slot k of the parameter's optimizer */
    GPT_TENSOR_RESIDUAL = 16, /* gradients that this rank has not sent: with gpt_options.wire */
};

/* An op of csrc/ops.h at one shape, on a CPU with AMX. */
typedef struct gpt_level_times {
    char op[24];         /* such as "linear_forward" */
    int32_t dtype, a, b; /* enum gpt_dtype; the numbers of its shape, such as 768 and 3072 */
    int32_t rows;        /* a power of two: of so many rows, up to twice as many */
    double seconds[2];   /* of the fastest call on level "avx512bf16", and on "amx" */
} gpt_level_times;

/* The cost so far of one kind of call: an op of csrc/ops.h at one shape. */
typedef struct gpt_op_time {
    char name[48]; /* such as "linear_forward 768 x 3072" */
    int64_t calls;
    double seconds;
    double flops; /* of its products, two for each multiply-add */
    double bytes; /* that must at least be read and written */
} gpt_op_time;

/* A number that is not finite, in an output of an op. */
typedef struct gpt_not_finite {
    char op[32];     /* such as "attention_forward" */
    char tensor[16]; /* the field of csrc/ops.h */
    int32_t layer;   /* from 0; -1: the embedding, the last norm, the head or an update */
    int64_t index;   /* of the number in the tensor */
    double value;
} gpt_not_finite;

/* A matrix product of the device's library at one shape: its plan, and its cost so far. */
typedef struct gpt_product_time {
    char name[64];     /* such as "a b^T 65536 x 2304 x 768": rows, columns, terms of a sum */
    char epilogue[24]; /* what the product ends with, such as "gelu" */
    char plan[96];     /* the library's algorithm and its settings */
    char problem[64];  /* why it may be slow: an epilogue or an algorithm is missing; else empty */
    int64_t calls;
    double seconds;
    double flops; /* two for each multiply-add */
    double bytes; /* that must at least be read and written */
} gpt_product_time;

/* A GPU, and the libraries that compute on it. CUDA's versions are 1000 major + 10 minor, 0: not installed. */
typedef struct gpt_device_info {
    char name[128];
    char products[512];   /* version and file of the matrix library, cuBLASLt */
    int32_t major, minor; /* compute capability */
    int32_t multiprocessors;
    int32_t driver;  /* the newest CUDA that the driver supports */
    int32_t runtime; /* the CUDA that this library is built with */
    uint64_t memory_bytes;
    uint64_t free_bytes;
} gpt_device_info;

typedef struct gpt_model gpt_model;
typedef struct gpt_session gpt_session;
typedef struct gpt_adapter gpt_adapter;
typedef struct gpt_comm gpt_comm;

/* A sum of gradients, n from `first` on, in seconds since gpt_model_begin_all_reduce: the rank had computed
 * them, their exchange began, and it ended. The last sum is ready when backward ends. */
typedef struct gpt_sum_span {
    int64_t first, n;
    double ready_s, begin_s, end_s;
} gpt_sum_span;

/* ---- library ---- */

int gpt_abi_version(void);
const char *gpt_version(void);
/* The calling thread's last error, one sentence without a newline; "" when there was none. */
const char *gpt_last_error(void);
/* The CPU's instruction-set level in use: "portable", "avx2", "avx512", "avx512vnni", "avx512bf16" or "amx".
 * GPTC_CPU_LEVEL caps it. */
const char *gpt_cpu_level(void);
/* On level "amx", unless GPTC_CPU_LEVEL names it, an op uses AMX where that was measured to be faster, and is
 * "avx512bf16"'s elsewhere. A shape without times is as those of the same op together, or as all; without any times, AMX
 * is not used. For all models: gpt_cpu_measure(1) begins to measure: calls of a shape without times take both levels in
 * turn, until each has been timed a few times. Results differ in their rounding meanwhile. gpt_cpu_measure(0) ends that.
 * gpt_cpu_times gives the i-th measurement, GPT_ERR_ARGUMENT past the last; gpt_cpu_set_times one that was kept. On
 * other levels there is nothing to measure, and measurements are ignored. */
int gpt_cpu_measure(int on);
int gpt_cpu_times(int i, gpt_level_times *out);
int gpt_cpu_set_times(const gpt_level_times *times);
/* 1 where that level multiplies bf16 as such, so that GPT_DTYPE_BF16 is the faster dtype. With "avx2" it is 0, and
 * bf16 is the faster dtype for text: less memory is read. */
int gpt_cpu_has_bf16(void);
/* One line where the CPU could do more than the system lets it; else "". */
const char *gpt_cpu_notice(void);
/* Cores this process may run on. */
int gpt_cpu_count(void);
/* Between the layers of a computation on a CPU, but at most once in so many seconds, the library calls
 * this function, in the thread that computes. If it returns other than 0, the call under way fails with
 * GPT_ERR_INTERRUPTED: a session is as before, and the gradients of a model are dropped. For all
 * models; NULL: none. */
void gpt_set_interrupt(int (*interrupted)(void), double seconds);
/* GPT_OK where GPT_DEVICE_CUDA works; else gpt_last_error() says what is missing. out holds what was found
 * until then either way: with a name but no products, only cuBLASLt is missing. */
int gpt_cuda_info(gpt_device_info *out);

/* ---- configuration ---- */

/* The name of the i-th preset, NULL past the last. */
const char *gpt_preset_name(int i);
int gpt_config_preset(const char *name, gpt_config *out);
/* GPT_OK when a model of this shape can exist; else gpt_last_error() names the field. */
int gpt_config_check(const gpt_config *config);
/* The record of layer l: config->layers[l], or its equal where that is NULL. */
int gpt_config_layer(const gpt_config *config, int l, gpt_layer *out);
/* The number of parameter tensors (-1 for an impossible shape), and the i-th of them. */
int gpt_config_param_count(const gpt_config *config);
int gpt_config_param(const gpt_config *config, int i, gpt_param *out);
/* The same of adapters, which are parameters of a model after those of its shape: "h.0.attn.qkv.lora_a"
 * (R, in), with the rank for each adapter of the matrix, and "h.0.attn.qkv.lora_b" (rows that have one, rank).
 * With DoRA, "h.0.attn.qkv.lora_m" (rows that have one) follows. */
int gpt_lora_param_count(const gpt_config *config, const gpt_lora *lora);
int gpt_lora_param(const gpt_config *config, const gpt_lora *lora, int i, gpt_param *out);
int gpt_plan_memory(const gpt_config *config, const gpt_options *options, gpt_plan *out);
/* The shape of the model in a checkpoint folder: gpt_model_load says which. Its files are opened and
 * checked, but for the weights. out->layers is NULL. */
int gpt_config_load(const char *folder, gpt_config *out);

/* ---- model ---- */

/* Parameters are zero until gpt_model_init or gpt_model_write. */
int gpt_model_create(const gpt_config *config, const gpt_options *options, gpt_model **out);
/* Creates the model of a checkpoint folder, and gives it the weights: RUN/ckpt-STEP or RUN/best of
 * `gptc train`, a folder of `gptc import` or `gptc export --to hf`, or of Python's model.save. Read
 * are config.json and model.safetensors, with weights in F32, BF16 or F16; not the optimizer's state,
 * and not checksums.json, which `gptc verify` compares. Needs memory for the largest parameter in
 * float32 in addition, until it returns. Adapters, where the options have some, begin as gpt_model_init_lora
 * makes them. GPT_ERR_FILE names the file. */
int gpt_model_load(const char *folder, const gpt_options *options, gpt_model **out);
void gpt_model_free(gpt_model *model); /* NULL is harmless; free its sessions first */
/* Random weights as GPT-2's: normal(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer). */
int gpt_model_init(gpt_model *model, uint64_t seed);
/* Adapters alone: A uniform within 1/sqrt(in), B zero, as peft begins. With DoRA, magnitudes are the lengths of
 * the model's rows, which must be there. */
int gpt_model_init_lora(gpt_model *model, uint64_t seed);
int gpt_model_threads(const gpt_model *model);

/* Copy parameter i out of, or into, the model; n is its size in numbers. Gradients may be written
 * too, in place of a backward: the first one written after an update sets all others to zero. On a
 * CPU, a model that is not for training keeps matrices that only products read as its dtype has them
 * and in no other form: they can be written, and read in fp32 alone (else GPT_ERR_ARGUMENT). */
int gpt_model_read(gpt_model *model, int i, int tensor, float *out, int64_t n);
int gpt_model_write(gpt_model *model, int i, int tensor, const float *values, int64_t n);
/* Gives rows of parameter i, entry `part` of its entries in gpt_options.block_rows, as blocks: n_bytes, row
 * by row. They are kept without rounding; gpt_model_read gives their numbers, and gpt_model_write is an
 * error. */
int gpt_model_write_blocks(gpt_model *model, int i, int part, const void *blocks, uint64_t n_bytes);
/* Gives parameter i the value in an open file, which descriptor has as n little-endian float32 from byte
 * `offset` on: (rows, columns), or with `transposed` 1 (columns, rows). No copy is made on the way where
 * that can be. GPT_ERR_FILE where the file ends before; the value is undefined then.
 *
 * kept may be NULL. Otherwise *kept 1 on return means that the model keeps a duplicate of the descriptor and
 * no copy, and reads the rows of tokens from the file as they occur. The file must not change until the
 * parameter is written or the model freed; a row that is missing there is GPT_ERR_FILE. So it is on a CPU,
 * for the token embedding of a model that is not for training, unless its products read that in fp32. */
int gpt_model_lend(gpt_model *model, int i, int64_t n, int descriptor, int64_t offset,
                   int transposed, int *kept);

/* The next call of gpt_model_logits, _loss, _backward or _forward has sequences that are made of
 * documents: positions (B, T) of the tokens in theirs, 0 where one begins and else 1 more than before. A
 * token attends to its own document alone, and has its position there. A call that is refused counts. */
int gpt_model_documents(gpt_model *model, const int32_t *positions, int B, int T);
/* logits (B, T, V) of tokens (B, T). */
int gpt_model_logits(gpt_model *model, const int32_t *tokens, int B, int T, float *logits);
/* Mean cross-entropy in nats over the targets (B, T) that are not -1. losses (B, T) may be NULL. */
int gpt_model_loss(gpt_model *model, const int32_t *tokens, const int32_t *targets, int B, int T,
                   float *loss, float *losses);
/* The same loss, and its gradient times scale added to the gradients. The first call after an update
 * starts from zero (until then the old ones can be read). With k calls a step, scale is 1/k. With
 * loss NULL nothing waits for the device, and a failure of it is the next call's. */
int gpt_model_backward(gpt_model *model, const int32_t *tokens, const int32_t *targets, int B,
                       int T, float scale, float *loss);
/* A training step whose gradient depends on the losses, in two calls: the forward pass of training gives
 * the losses (B, T), 0 where the target is -1; then the gradient of the sum of weights (B, T) times losses is
 * added to the gradients, as gpt_model_backward adds it, without label_smoothing, z_loss and router_loss.
 * Weights are finite. The second call belongs to the last call of the model, which must be the first with
 * the same B and T; no parameter is written between. */
int gpt_model_forward(gpt_model *model, const int32_t *tokens, const int32_t *targets, int B, int T,
                      float *losses);
int gpt_model_backward_weighted(gpt_model *model, const float *weights, int B, int T);
/* After gpt_model_begin_all_reduce, its ranks are apart: their later calls fail. */
int gpt_model_zero_grads(gpt_model *model);
/* The gradients of all parameters that are not frozen as one array of n numbers: of matrices that
 * products read, then of the others, each in the order of parameters, with zeros between them, so that
 * a sum over several models needs one call. It is memory of the model's device: on a GPU, a device
 * pointer. It stays where it is until the model is freed, and holds gradients from a backward to the
 * next update. Waits for the device. */
int gpt_model_grads(gpt_model *model, float **grads, int64_t *n);
/* State slots of parameter i, which GPT_TENSOR_STATE0 + k reaches; 0 where it is not trained, -1 where
 * there is no such parameter. */
int gpt_model_state_count(const gpt_model *model, int i);
/* Numbers of state slot k of parameter i; 0 without that slot, -1 without that parameter. */
int64_t gpt_model_state_size(const gpt_model *model, int i, int k);
/* Clips and applies the gradients, by optimizers (n_optimizers): one for each kind that has parameters.
 * loss is the sum of the losses of the backward calls since the last
 * update, each times its scale; grad_norm is the norm before clipping; either may be NULL. When the
 * norm is not finite GPT_ERR_NUMERIC is returned, the gradients are dropped and everything else is as
 * it was. */
int gpt_model_update(gpt_model *model, const gpt_optimizer *optimizers, int n_optimizers,
                     float *loss, float *grad_norm);
/* Updates done so far: AdamW's bias correction and dropout depend on it. */
int64_t gpt_model_step(const gpt_model *model);
int gpt_model_set_step(gpt_model *model, int64_t step);

/* ---- measuring ---- */

/* The peak of this machine in the model's dtype and on its threads: operations a second of
 * multiply-adds in registers, and bytes a second (read and written) of copying memory, for which
 * it takes 128 MB for a moment; bytes may be NULL. */
int gpt_model_peak(gpt_model *model, double *flops, double *bytes);
/* From now on (on: 1), or no longer (0), every op is timed. Turning it on starts from nothing. With
 * GPT_PROFILE_CHECKED outputs of ops are looked at, too: of the logits the first row, and no drawn tokens, updated
 * parameters or caches. */
enum { GPT_PROFILE_CHECKED = 2 };
int gpt_model_profile(gpt_model *model, int on);
/* The first number that was not finite since then; GPT_ERR_ARGUMENT where there is none. */
int gpt_model_not_finite(const gpt_model *model, gpt_not_finite *out);
/* The i-th kind of call timed so far; GPT_ERR_ARGUMENT past the last. */
int gpt_model_profile_read(const gpt_model *model, int i, gpt_op_time *out);
/* The i-th product of the device's library since then; GPT_ERR_ARGUMENT past the last, and where the
 * device has none. */
int gpt_model_profile_product(const gpt_model *model, int i, gpt_product_time *out);
/* Seconds that one of the model's threads has been at work since then. */
int gpt_model_profile_busy(const gpt_model *model, int thread, double *seconds);

/* ---- session: decoding with a KV cache ---- */

/* Room for n_seq sequences of at most n_ctx tokens each (0: block_size); kv is an enum gpt_kv. Layers with a
 * window keep only the keys and values that later tokens see, and some before them. */
int gpt_session_create(gpt_model *model, int n_seq, int n_ctx, int kv, gpt_session **out);
void gpt_session_free(gpt_session *session);
/* Bytes that a session of this size allocates. */
int gpt_session_bytes(const gpt_model *model, int n_seq, int n_ctx, int kv, uint64_t *out);
/* Appends n tokens, tokens[i] to sequence seqs[i]; the tokens of one sequence are neighbours. logits
 * (number wanted, V) receives, in order, what follows each token i with want[i] != 0; want NULL: the
 * last of each sequence. logits may be NULL where none is wanted. */
int gpt_session_decode(gpt_session *session, const int32_t *tokens, const int32_t *seqs,
                       const uint8_t *want, int n, float *logits);
/* The same, but each wanted token is followed by a draw (number wanted) in place of logits: where the
 * model is, so that no logits leave a GPU. The token is gpt_sample's of the same logits, and the
 * log-probabilities are gpt_logprobs' but for rounding. GPT_ERR_NUMERIC where a logit is not finite, GPT_ERR_ARGUMENT
 * where biases leave nothing to draw: the tokens are then in the session all the same. */
int gpt_session_sample(gpt_session *session, const int32_t *tokens, const int32_t *seqs,
                       const uint8_t *want, int n, gpt_draw *draws);
/* The same, but each wanted token is followed by its state in place of logits: states (number wanted, C) are
 * the output of the final norm, which the head multiplies, as float32 of any dtype. No head is computed.
 * They are last_hidden_state of transformers' models. */
int gpt_session_states(gpt_session *session, const int32_t *tokens, const int32_t *seqs,
                       const uint8_t *want, int n, float *states);
/* Tokens held for a sequence, or -1 for a sequence that does not exist. */
int gpt_session_length(const gpt_session *session, int seq);
/* 1 where gpt_session_rewind and gpt_session_fork can keep the first length tokens of a sequence. 0 where
 * there are fewer, or where layers with a window no longer have what the next token would see: all but 0 tokens can
 * be kept until a sequence is longer than the window, and after that the last 64 can be dropped at least. */
int gpt_session_reaches(const gpt_session *session, int seq, int length);
/* Forgets all but the first length tokens of a sequence. GPT_ERR_ARGUMENT where these are not reached. */
int gpt_session_rewind(gpt_session *session, int seq, int length);
/* Sequence `to` becomes a copy of the first length tokens of `from`; what it held is forgotten. GPT_ERR_ARGUMENT
 * where these are not reached. */
int gpt_session_fork(gpt_session *session, int from, int to, int length);

/* ---- several adapters in one step of a session ---- */

/* The numbers that the model's adapters have now, as a copy on its device; or with `none` 1, an adapter that
 * changes nothing. For a model with gpt_options.lora, whose other parameters then stay as they are. */
int gpt_adapter_create(gpt_model *model, int none, gpt_adapter **out);
/* NULL is harmless; free it before its model, and after sequences that have it were given another one. */
void gpt_adapter_free(gpt_adapter *adapter);
/* Tokens that are appended to sequence seq from now on go through this adapter of the session's model; NULL, as
 * at first: through the parameters of the model. What the sequence holds stays. A step may have sequences
 * of several adapters; their logits are those of a step with one. It is fastest if sequences of the same adapter
 * are neighbours. gpt_session_fork copies no adapter. */
int gpt_session_adapt(gpt_session *session, int seq, const gpt_adapter *adapter);

/* ---- sampling ---- */

/* Draws a token from logits (V), as a function of (seed, position). history (n_history), which
 * penalties look at, may be NULL; tokens outside the vocabulary count for nothing there. */
int gpt_sample(const float *logits, int32_t vocab_size, const gpt_sampling *sampling,
               const int32_t *history, int32_t n_history, uint64_t position, int32_t *token);
/* log softmax of logits (V), without bias, penalty or temperature: of token, in *logprob (NULL: not
 * wanted), and of the n_top most likely, in falling order. */
int gpt_logprobs(const float *logits, int32_t vocab_size, int32_t token, float *logprob,
                 int32_t n_top, int32_t *top_tokens, float *top_logprobs);

/* ---- several processes: the ranks of a job ---- */

/* Joins the other ranks of this job, which all do. kind is an enum gpt_comm_kind: with GPT_COMM_NONE there is
 * one rank. For GPT_COMM_MPI, library names libmpi.so of Open MPI or of a library with MPICH's ABI; NULL: the
 * linker's. It is initialised here, and ended by gpt_comm_free, unless the program has done that before; a
 * process can join only once. A rank that has not answered for timeout_s seconds is lost (0: never), and
 * the call under way, and all after it, return GPT_ERR_COMM. GPT_ERR_DEVICE where the library does not load.
 *
 * All ranks make the same calls in the same order, with the same sizes. */
int gpt_comm_create(int kind, const char *library, double timeout_s, gpt_comm **out);
/* The same for a job whose ranks have connected themselves: sockets[r] is a stream socket to rank r, which has the
 * other end; that of this rank is not read. The sockets are the library's from here on, also after an error of
 * any kind but GPT_ERR_ARGUMENT. gpt_comm_abort ends the connections, so that calls of other ranks fail. */
int gpt_comm_connect(const int *sockets, int rank, int size, double timeout_s, gpt_comm **out);
/* Lets gpt_model_all_reduce add gradients on GPUs, one a rank, by NCCL. Each rank opens the library: libnccl.so.2 by
 * its name, NULL: the linker's. GPT_ERR_DEVICE where it does not load. If all ranks have it, they then join
 * together, which has no time limit; CUDA_VISIBLE_DEVICES gives a rank its GPU. Without these calls gradients of
 * GPUs are added by the hosts. */
int gpt_comm_open_nccl(gpt_comm *comm, const char *library);
int gpt_comm_join_gpus(gpt_comm *comm);
/* NULL is harmless. Where a call has failed, a receive that does not end when it is cancelled keeps the memory that
 * is the library's; what was given to that call has to stay valid until the process ends. */
void gpt_comm_free(gpt_comm *comm);
int gpt_comm_rank(const gpt_comm *comm);
int gpt_comm_size(const gpt_comm *comm);
/* The host of a rank; "" for a number of none. */
const char *gpt_comm_host(const gpt_comm *comm, int rank);
/* 1 where a call has waited for this rank in vain. */
int gpt_comm_lost(const gpt_comm *comm, int rank);
int gpt_comm_set_timeout(gpt_comm *comm, double timeout_s);
/* x (n) becomes the sum over ranks, added in the order of ranks: the same bits on all, and in every run. */
int gpt_comm_all_reduce(gpt_comm *comm, float *x, int64_t n);
/* The same, with numbers and sums in the form of wire, an enum gpt_wire. residual (n) is what this rank has
 * not sent in earlier calls with the same n, zero at first; unused for fp32. */
int gpt_comm_all_reduce_coded(gpt_comm *comm, int wire, float *x, float *residual, int64_t n);
/* gpt_comm_all_reduce for the slice of this rank; the rest of x keeps its numbers. */
int gpt_comm_reduce_scatter(gpt_comm *comm, float *x, int64_t n);
/* The first of n numbers in the slice of a rank; with the number of ranks, n. */
int64_t gpt_comm_slice(const gpt_comm *comm, int64_t n, int rank);
/* x holds a part of each rank, bytes offsets[r] to offsets[r + 1], of which this rank's is given. */
int gpt_comm_all_gather(gpt_comm *comm, void *x, const int64_t *offsets);
/* Part r of root's x, bytes offsets[r] to offsets[r + 1], goes to rank r, or comes from it. The x of another rank than
 * root holds its own part alone. All ranks have the same offsets (size + 1). */
int gpt_comm_scatter(gpt_comm *comm, void *x, const int64_t *offsets, int root);
int gpt_comm_gather(gpt_comm *comm, void *x, const int64_t *offsets, int root);
/* x (n_bytes) becomes that of rank root. */
int gpt_comm_broadcast(gpt_comm *comm, void *x, int64_t n_bytes, int root);
/* Ends all processes of the job with this exit code. Returns where there is one rank. */
void gpt_comm_abort(gpt_comm *comm, int code);

/* The next gpt_model_backward has rows of a larger batch, which is number `micro` of the step: those from
 * `row` on. They are dropped out as in that batch. A call that is refused counts. */
int gpt_model_place(gpt_model *model, int64_t micro, int64_t row);
/* The next gpt_model_backward is the last one of this rank before gpt_model_all_reduce, which has to follow. A
 * thread then adds the gradients of layers while those below are computed; until gpt_model_all_reduce has
 * returned, no other call may use comm. The sums have the same bits without this call. On a GPU it changes
 * nothing; with n_shards and Muon the thread begins after all layers. */
int gpt_model_begin_all_reduce(gpt_model *model, gpt_comm *comm);
/* Adds the gradients of all ranks, and their losses since the last update. Before gpt_model_update; a rank
 * that had no backward adds zero. Where NCCL adds, the order of additions is its own. After an error the
 * gradients are gone. A model with n_shards gets the sums of its part, and the norm of all. */
int gpt_model_all_reduce(gpt_model *model, gpt_comm *comm);
/* The i-th sum of the last gpt_model_all_reduce that gpt_model_begin_all_reduce came before. GPT_ERR_ARGUMENT
 * past the last one, without a sentence. */
int gpt_comm_sum_span(const gpt_comm *comm, int i, gpt_sum_span *out);
/* With n_shards: after gpt_model_update, which has changed the parameters of the own part, those of all ranks
 * come to each. Until then the model computes nothing, and its parameters are not read or written. The
 * gradients are gone. */
int gpt_model_gather(gpt_model *model, gpt_comm *comm);
/* With n_shards: state slot k of parameter i (n), of which each rank has a part, on all of them.
 * gpt_model_read fails for it, and gpt_model_write keeps this rank's part. */
int gpt_model_gather_state(gpt_model *model, gpt_comm *comm, int i, int k, float *out, int64_t n);

/* ==== binding: end ==== */

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
