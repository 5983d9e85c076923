"""Results of PyTorch and transformers for small random models: the source of the golden files.

A case names a Hugging Face class and its sizes; weights and batches come from numpy's RandomState,
whose stream is frozen, so that a golden file needs to hold results only.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

GOLDEN = Path(__file__).parent.parent / "golden"

STEPS = 10
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
GRAD_CLIP = 1.0

# Families whose config.json has GPT-2's keys, such as n_positions.
GPT2_KEYS = ("gpt2", "gptj")

Array = npt.NDArray[Any]


class Case(NamedTuple):
    """A model of Hugging Face's class `kind`, and the extent of its batches."""

    name: str
    kind: str
    config: dict[str, Any]  # of config.json
    B: int
    T: int


def _gpt2(**sizes: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": 97, "n_inner": None, **sizes}


def _llama(**sizes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 101, "rms_norm_eps": 1e-5, **sizes}


CASES = [
    Case("gpt2", "gpt2", _gpt2(n_positions=24, n_embd=48, n_layer=3, n_head=4), 3, 17),
    # Longer than one tile of queries, with a head size that is not a multiple of a vector.
    Case("gpt2-long", "gpt2", _gpt2(n_positions=160, n_embd=30, n_layer=2, n_head=3), 1, 131),
    Case(
        "llama",
        "llama",
        _llama(
            max_position_embeddings=32,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        ),
        2,
        19,
    ),
    Case(
        "llama-tied",
        "llama",
        _llama(
            max_position_embeddings=96,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
        1,
        71,
    ),
    # Llama 3.1's rotary scaling: of 8 frequencies some are kept, some interpolated.
    Case(
        "llama3",
        "llama",
        _llama(
            max_position_embeddings=128,
            hidden_size=64,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        1,
        90,
    ),
    Case(
        "llama-linear",
        "llama",
        _llama(
            max_position_embeddings=64,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            rope_scaling={"rope_type": "linear", "factor": 2.5},
        ),
        1,
        40,
    ),
    # Heads of another size than width / heads, as in Mistral's Nemo.
    Case(
        "llama-heads",
        "llama",
        _llama(
            max_position_embeddings=48,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=14,
            tie_word_embeddings=False,
        ),
        2,
        33,
    ),
]


def _like_llama(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": 89,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **changes,
    }


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
_WINDOW = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 5}

# The families and what their configs may choose. There are no golden files of them: plain_llama.py
# computes the same without PyTorch.
FAMILIES = [
    Case("mistral", "mistral", _like_llama("mistral", sliding_window=7), 2, 33),
    # A width that heads do not divide, and no window.
    Case(
        "mistral-full",
        "mistral",
        _like_llama("mistral", sliding_window=None, hidden_size=42, head_dim=12),
        1,
        17,
    ),
    Case("smollm2", "llama", _like_llama("llama", tie_word_embeddings=True), 2, 21),
    Case("llama-biases", "llama", _like_llama("llama", attention_bias=True, mlp_bias=True), 2, 13),
    Case("qwen2", "qwen2", _like_llama("qwen2", use_sliding_window=False), 2, 29),
    Case("qwen2-window", "qwen2", _like_llama("qwen2", **_WINDOW, tie_word_embeddings=True), 1, 31),
    Case("qwen3", "qwen3", _like_llama("qwen3", head_dim=16, tie_word_embeddings=True), 2, 27),
    Case(
        "qwen3-biases",
        "qwen3",
        _like_llama("qwen3", head_dim=6, attention_bias=True, num_key_value_heads=1, **_WINDOW),
        1,
        37,
    ),
    Case("llama-yarn", "llama", _like_llama("llama", rope_scaling=_YARN), 1, 41),
    # The spelling of transformers 5, with everything that YaRN may have.
    Case(
        "qwen3-yarn",
        "qwen3",
        _like_llama(
            "qwen3",
            head_dim=16,
            rope_parameters={
                **_YARN,
                "rope_theta": 5000.0,
                "beta_fast": 2.0,
                "beta_slow": 0.25,
                "attention_factor": 1.25,
            },
        ),
        2,
        23,
    ),
    # Sequences beyond the original length, from which on the frequencies are lowered.
    Case(
        "llama-dynamic",
        "llama",
        _like_llama(
            "llama", max_position_embeddings=24, rope_scaling={"type": "dynamic", "factor": 10.0}
        ),
        2,
        40,
    ),
    Case(
        "qwen2-linear",
        "qwen2",
        _like_llama("qwen2", rope_scaling={"type": "linear", "factor": 3.0}),
        1,
        19,
    ),
]


# Families whose layers differ from Llama's; each has a golden file.
_NEOX = {"num_key_value_heads": None, "hidden_size": 48, "layer_norm_eps": 1e-5}
_LONGROPE = {
    "original_max_position_embeddings": 6,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.25, 1.5, 2.0, 3.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0],
    },
}
ARCHITECTURES = [
    Case(
        "cerebras-gpt",
        "gpt2",
        {
            **_gpt2(n_positions=24, n_embd=24, n_layer=3, n_head=2),
            "activation_function": "gelu",
            "scale_attn_by_inverse_layer_idx": True,
        },
        2,
        17,
    ),
    Case(
        "gpt2-relu",
        "gpt2",
        {
            **_gpt2(n_positions=24, n_embd=24, n_layer=2, n_head=2),
            "activation_function": "relu",
        },
        2,
        17,
    ),
    Case(
        "smollm3",
        "smollm3",
        _like_llama("smollm3", num_hidden_layers=5, pad_token_id=None, tie_word_embeddings=True),
        1,
        21,
    ),
    Case(
        "smollm3-list",
        "smollm3",
        _like_llama("smollm3", no_rope_layers=[0, 1], pad_token_id=None),
        2,
        13,
    ),
    Case("pythia", "gpt_neox", _like_llama("gpt_neox", **_NEOX, rotary_pct=0.5), 2, 19),
    Case(
        "neox-in-turn",
        "gpt_neox",
        _like_llama(
            "gpt_neox", **_NEOX, rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu_new"
        ),
        1,
        23,
    ),
    Case(
        "stablelm",
        "stablelm",
        _like_llama("stablelm", hidden_size=64, layer_norm_eps=1e-5, use_qkv_bias=True),
        1,
        25,
    ),
    Case(
        "phi3",
        "phi3",
        _like_llama(
            "phi3",
            hidden_size=64,
            partial_rotary_factor=0.75,
            sliding_window=9,
            pad_token_id=None,
            tie_word_embeddings=True,
        ),
        2,
        26,
    ),
    # A context of 48 tokens, after one of 6; and sequences that fit into the original one.
    Case("phi3-long", "phi3", _like_llama("phi3", **_LONGROPE, pad_token_id=None), 1, 21),
    Case(
        "phi3-short",
        "phi3",
        _like_llama(
            "phi3",
            **{**_LONGROPE, "original_max_position_embeddings": 30},
            partial_rotary_factor=1.0,
            pad_token_id=None,
            tie_word_embeddings=True,
        ),
        2,
        14,
    ),
    Case(
        "phi",
        "phi",
        _like_llama("phi", **_NEOX, hidden_act="gelu_new", partial_rotary_factor=0.5),
        2,
        19,
    ),
    # Shared keys, whole heads that turn, and the embedding as head, which has a bias all the same.
    Case(
        "phi-grouped",
        "phi",
        _like_llama("phi", partial_rotary_factor=1.0, tie_word_embeddings=True),
        1,
        23,
    ),
    Case(
        "gptj",
        "gptj",
        {
            "model_type": "gptj",
            "vocab_size": 83,
            "n_positions": 32,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 56,
            "rotary_dim": 8,
        },
        2,
        21,
    ),
    Case("olmo2", "olmo2", _like_llama("olmo2", num_key_value_heads=4, pad_token_id=None), 2, 22),
    # Small soft caps, so that both bend these scores and logits.
    Case(
        "gemma2",
        "gemma2",
        _like_llama(
            "gemma2",
            num_hidden_layers=3,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=5,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
            pad_token_id=None,
            tie_word_embeddings=True,
        ),
        2,
        27,
    ),
    Case(
        "gemma2-plain",
        "gemma2",
        _like_llama(
            "gemma2",
            head_dim=8,
            query_pre_attn_scalar=20,
            sliding_window=7,
            final_logit_softcapping=None,
            pad_token_id=None,
            layer_types=["full_attention", "sliding_attention"],
            tie_word_embeddings=True,
        ),
        1,
        19,
    ),
    Case(
        "gemma3",
        "gemma3_text",
        _like_llama(
            "gemma3_text",
            num_hidden_layers=7,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=5,
            pad_token_id=None,
            tie_word_embeddings=True,
        ),
        1,
        29,
    ),
    Case(
        "gemma3-types",
        "gemma3_text",
        _like_llama(
            "gemma3_text",
            head_dim=8,
            query_pre_attn_scalar=11,
            sliding_window=4,
            pad_token_id=None,
            layer_types=["full_attention", "sliding_attention"],
            tie_word_embeddings=True,
        ),
        2,
        15,
    ),
    # The load-balance loss is in the gradients, but not in the losses.
    Case(
        "mixtral",
        "mixtral",
        _like_llama(
            "mixtral",
            intermediate_size=24,
            num_local_experts=5,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.7,
        ),
        2,
        23,
    ),
    Case(
        "qwen3-moe",
        "qwen3_moe",
        _like_llama(
            "qwen3_moe",
            head_dim=16,
            moe_intermediate_size=24,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
        ),
        2,
        19,
    ),
    Case(
        "qwen3-moe-odds",
        "qwen3_moe",
        _like_llama(
            "qwen3_moe",
            moe_intermediate_size=20,
            num_experts=4,
            num_experts_per_tok=1,
            norm_topk_prob=False,
            tie_word_embeddings=True,
        ),
        1,
        26,
    ),
]

# Heads of an odd size, which only learned positions allow. It has no golden file.
OTHERS = [
    Case("gpt2-odd-heads", "gpt2", _gpt2(n_positions=20, n_embd=45, n_layer=2, n_head=3), 2, 15)
]


def batches(case: Case) -> Array:
    """Tokens (STEPS, B, T + 1) of every training step."""
    random = np.random.RandomState(1234)
    return random.randint(0, case.config["vocab_size"], (STEPS, case.B, case.T + 1))


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Random weights for these tensors, large enough that each affects the results."""
    random = np.random.RandomState(4321)
    out = {}
    centre = 0 if any("pre_feedforward" in name for name in shapes) else 1  # Gemma adds 1 to norms
    for name in sorted(shapes):
        values = random.standard_normal(shapes[name])
        is_norm = len(shapes[name]) == 1 and name.endswith("weight")
        out[name] = (centre + 0.2 * values if is_norm else 0.15 * values).astype(np.float32)
    return out


# Of a layer with experts: tensors in memory, and the names of their halves in files.
_EXPERTS = {
    "mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.experts.down_proj": ("down_proj",),
}
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def as_stored(tensors: dict[str, Any], is_mixtral: bool) -> dict[str, Any]:
    """The tensors by their names in files: transformers 5 joins a layer's experts in memory."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".mlp.")
        block = "block_sparse_moe" if is_mixtral else "mlp"
        halves = _EXPERTS.get(f"mlp.{rest}")
        if rest == "gate.weight":
            found[f"{layer}.{block}.gate.weight"] = tensor
        elif halves is None:
            found[name] = tensor
        else:
            for i, expert in enumerate(tensor):
                for half, rows in zip(halves, expert.chunk(len(halves)), strict=True):
                    half = _MIXTRAL[half] if is_mixtral else half
                    found[f"{layer}.{block}.experts.{i}.{half}.weight"] = rows
    return found


def run(case: Case) -> dict[str, Array]:
    """logits (B, T, V), loss, `grad.<name>` of the first batch, and the losses of STEPS updates."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Copies, since transformers writes to what it is given.
    settings = {k: deepcopy(v) for k, v in case.config.items() if k != "model_type"}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = AutoConfig.for_model(
        case.kind, **settings, **(dropouts if case.kind in GPT2_KEYS else {})
    )
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double()
    model.train()

    # transformers 5 renames a matrix when it saves it.
    stored = {"lm_head.weight": "embed_out.weight"} if case.kind == "gpt_neox" else {}
    parameters = {stored.get(name, name): p for name, p in model.named_parameters()}
    named = as_stored(parameters, case.kind == "mixtral")
    values = weights({name: tuple(p.shape) for name, p in named.items()})
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(values[name]))
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": ADAMW["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=ADAMW["lr"],
        betas=(ADAMW["beta1"], ADAMW["beta2"]),
        eps=ADAMW["eps"],
    )

    out: dict[str, Array] = {}
    losses = []
    for step, tokens in enumerate(torch.from_numpy(batches(case))):
        outputs = model(tokens[:, :-1])
        logits = outputs.logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        balance = 0.0
        if case.config.get("output_router_logits"):
            balance = case.config["router_aux_loss_coef"] * outputs.aux_loss
        optimizer.zero_grad()
        (loss + balance).backward()
        if step == 0:
            out["logits"] = logits.detach().numpy().astype(np.float32)
            grads = {name: p.grad for name, p in parameters.items()}
            for name, grad in as_stored(grads, case.kind == "mixtral").items():
                out[f"grad.{name}"] = grad.numpy().astype(np.float32)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        losses.append(loss.item())
    out["losses"] = np.array(losses)
    return out


def golden_path(case: Case) -> Path:
    """The golden file of a case."""
    return GOLDEN / f"{case.name}.npz"
