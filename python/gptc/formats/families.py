"""The families of models that gptc shares with Hugging Face and llama.cpp: a row of flags each.

A model's config.json and GGUF metadata, written and read, follow from the rows.
To add a family whose layers the engine has, add a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptc.engine.config import Activation, GPTConfig, Norm, Pos

BIASES = ("qkv_bias", "attn_proj_bias", "mlp_bias")
"""Fields of GPTConfig, and of a row."""


@dataclass(frozen=True)
class Family:
    """What all models of a family have in common. A bias that is a text is the key of config.json
    that decides; in GGUF, the tensors do."""

    model_type: str  # of config.json
    model_class: str  # of config.json's "architectures"
    gguf: str  # general.architecture, and the prefix of its keys
    paper: str
    norm: Norm = "rmsnorm"
    pos: Pos = "rope"
    activation: Activation = "swiglu"
    grouped: bool = True  # queries may share keys, and heads may have a size of their own
    divided: bool = False  # the width is a multiple of the number of heads
    qkv_bias: bool | str = False
    attn_proj_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window: bool = False  # config.json may have a sliding_window
    window_switch: bool = False  # but only with use_sliding_window, from max_window_layers on
    paired: bool = False  # in GGUF, rotary channels 2i and 2i + 1 turn together
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of a config.json without these keys

    def fits(self, config: GPTConfig) -> bool:
        """Whether this family's classes compute exactly this model."""
        shape = (config.norm, config.pos, config.activation, config.norm_weight, config.qk_norm)
        if shape != (self.norm, self.pos, self.activation, True, self.qk_norm):
            return False
        if not self.grouped and (config.n_kv_head != config.n_head or config.head_dim):
            return False
        if self.divided and config.n_embd % config.n_head:
            return False
        return self._biases_fit(config) and self._lengths_fit(config)

    def _biases_fit(self, config: GPTConfig) -> bool:
        decided: dict[str | bool, set[bool]] = {True: {True}, False: {False}}
        for name in BIASES:
            has = config.bias or bool(getattr(config, name))
            decided.setdefault(getattr(self, name), set()).add(has)
        norms = config.bias == (self.norm == "layernorm")  # all layers with biases, norms included
        return norms and all(len(values) == 1 for values in decided.values())

    def _lengths_fit(self, config: GPTConfig) -> bool:
        if config.rope_scaling == "dynamic" and config.block_size != dynamic_length(
            config.rope_original, config.rope_factor
        ):
            return False
        return self.window or not config.window


def dynamic_length(original: int, factor: float) -> int:
    """The longest sequence of a model whose rotary frequencies are lowered as it grows."""
    return int(min(original, 1 << 32) * factor)  # gpt_config_check refuses those that are longer


_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        "Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
        norm="layernorm",
        pos="learned",
        activation="gelu",
        grouped=False,
        qkv_bias=True,
        attn_proj_bias=True,
        mlp_bias=True,
    ),
    Family(  # also TinyLlama and SmolLM2
        "llama",
        "LlamaForCausalLM",
        "llama",
        "Touvron et al. 2023, arXiv 2302.13971; Grattafiori et al. 2024, arXiv 2407.21783; "
        "SmolLM2: Ben Allal et al. 2025, arXiv 2502.02737",
        divided=True,
        qkv_bias="attention_bias",
        attn_proj_bias="attention_bias",
        mlp_bias="mlp_bias",
        paired=True,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        "llama",
        "Jiang et al. 2023, arXiv 2310.06825",
        window=True,
        paired=True,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        "Yang et al. 2024, arXiv 2407.10671",
        qkv_bias=True,
        window=True,
        window_switch=True,
        defaults=_QWEN,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        "Yang et al. 2025, arXiv 2505.09388; norm of heads: Henry et al. 2020, arXiv 2010.04245",
        qkv_bias="attention_bias",
        attn_proj_bias="attention_bias",
        qk_norm=True,
        window=True,
        window_switch=True,
        defaults={**_QWEN, "head_dim": 128},
    ),
)

NAMES = ", ".join(family.model_type for family in FAMILIES)

# Keys of config.json that ask for what the engine does not compute, unless they have such a value;
# and what that is. The same list is in csrc/files/config_json.c.
FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_experts": ((None, 0), "experts"),
    "num_local_experts": ((None, 0), "experts"),
    "n_routed_experts": ((None, 0), "experts"),
    "kv_lora_rank": ((None, 0), "latent attention"),
    "partial_rotary_factor": ((1.0, None), "rotation of a part of each head"),
    "rotary_pct": ((1.0, None), "rotation of a part of each head"),
    "no_rope_layers": ((None, []), "layers without rotation"),
    "attention_chunk_size": ((None, 0), "attention in chunks"),
    "attn_logit_softcapping": ((None,), "soft caps on scores"),
    "final_logit_softcapping": ((None,), "a soft cap on logits"),
    "query_pre_attn_scalar": ((None,), "another scale of scores"),
    "attention_multiplier": ((None,), "another scale of scores"),
    "embedding_multiplier": ((None, 1.0), "a factor of the embedding"),
    "residual_multiplier": ((None, 1.0), "a factor of the branches"),
    "logits_scaling": ((None, 1.0), "a factor of the logits"),
    "logit_scale": ((None, 1.0), "a factor of the logits"),
    "clip_qkv": ((None, 0), "clipped queries, keys and values"),
    "alibi": ((None, False), "biases by distance"),
    "is_encoder_decoder": ((False, None), "an encoder"),
    "vision_config": ((None,), "images"),
}


def of(config: GPTConfig) -> Family | None:
    """The first family whose classes compute exactly this model."""
    return next((family for family in FAMILIES if family.fits(config)), None)


def name(config: GPTConfig) -> str:
    """The family of a model: one of this table, else one of the engine's."""
    family = of(config)
    return family.model_type if family else config.family


def by_model_type(kind: Any, classes: Any = None) -> Family | None:
    """The family of a config.json, by its model_type, else by its architectures."""
    if kind is None and isinstance(classes, list) and len(classes) == 1:
        return next((f for f in FAMILIES if f.model_class == classes[0]), None)
    return next((family for family in FAMILIES if family.model_type == kind), None)


def by_gguf(architecture: Any) -> Family | None:
    """The family of a GGUF file."""
    return next((family for family in FAMILIES if family.gguf == architecture), None)


def unknown(key: str, kind: Any, missing: Iterable[str], names: str = NAMES) -> str:
    """The error for another family, and what of it is known to be missing."""
    found = ", ".join(dict.fromkeys(missing))
    lacks = f" (gptc lacks {found})" if found else ""
    return f"{key} {kind!r} is not one of {names}{lacks}"


def missing_features(data: Mapping[str, Any]) -> Iterator[str]:
    """What a config.json asks for that the engine does not compute."""
    for key, (plain, name) in FEATURES.items():
        if key in data and data[key] not in plain:
            yield name
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        kind = data.get(key)
        if kind not in (None, "silu", "swiglu", "gelu_new", "gelu_pytorch_tanh"):
            yield f"the activation {kind}" if str(kind).isidentifier() else "its activation"
    if (
        isinstance(kinds := data.get("layer_types"), list)
        and len({str(kind) for kind in kinds}) > 1
    ):
        yield "layers of several kinds"
