"""The families of models that gptc shares with Hugging Face and llama.cpp: a row of flags each.

A model's config.json and GGUF metadata, written and read, follow from the rows.
To add a family whose layers the engine has, add a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptc.engine.config import Activation, GPTConfig, Layer, Norm, NormAt, Pos
from gptc.formats import family_names
from gptc.formats.family_names import Stems

# Fields of GPTConfig, and of a row, that are the same.
_SAME = ("norm", "pos", "qk_norm", "wide_qk_norm", "norm_at", "one_norm", "head_bias")
BIASES = ("qkv_bias", "attn_proj_bias", "mlp_bias", "norm_bias")
"""Fields of GPTConfig, and of a row."""
SOFT_CAPS = {
    "attn_logit_softcapping": "score_cap",
    "final_logit_softcapping": "logit_cap",
}
"""Keys of config.json and GGUF, and the fields of GPTConfig."""
EXPERTS_KEYS = {"num_experts", "num_local_experts"}  # either, in files of any family with experts
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")


@dataclass(frozen=True)
class Family:
    """What all models of a family have in common. A bias that is a text is the key of config.json
    that decides; in GGUF, the tensors do."""

    model_type: str  # of config.json
    model_class: str  # of config.json's "architectures"
    gguf: str  # general.architecture, and the prefix of its keys; "": llama.cpp has no such model
    paper: str
    norm: Norm = "rmsnorm"
    pos: Pos = "rope"
    # By their names in config.json; the first of each is written. llama.cpp has the first alone.
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "swiglu"})
    activation_key: str = "hidden_act"
    eps_key: str = "rms_norm_eps"
    stems: Stems = field(default_factory=lambda: family_names.LLAMA)
    gguf_stems: Stems = field(default_factory=lambda: family_names.GGUF_SPLIT)
    grouped: bool = True  # queries may share keys, and heads may have a size of their own
    divided: bool = False  # the width is a multiple of the number of heads
    qkv_bias: bool | str = False
    attn_proj_bias: bool | str = False
    mlp_bias: bool | str = False
    norm_bias: bool = False
    free_biases: bool = False  # llama.cpp has them or not, as a file has; else as defaults say
    qk_norm: bool = False
    wide_qk_norm: bool = False  # over all queries, and all keys, of a token
    norm_at: NormAt = "before"
    rotary_key: str = ""  # of the share of a head's channels that turn
    rotary_size_key: str = ""  # or of their number
    theta_key: str = "rope_theta"
    fixed_theta: float = 0.0  # the only rotary base
    longrope: bool = False
    parallel: bool | str = False  # whether branches are, or the key that decides
    one_norm: bool = False  # both of them read norm 1
    head_bias: bool = False
    own_head: bool = False  # llama.cpp wants a head that is stored
    by_layer_key: str = ""  # whether scores are divided by the layer's number
    no_rope: bool = False  # config.json has no_rope_layers, or no_rope_layer_interval
    period: int = 0  # some layers have a window (layer_types), by default not each so-many-th
    local_theta: float = 0.0  # those that have one also have this rotary base
    score_key: str = ""  # scores are divided by the square root of its value
    wide_score_layers: int = 0  # llama.cpp has n_embd / n_head for it in models of so many layers
    soft_caps: bool = False  # of scores and logits; in GGUF always
    scaled_embedding: bool = False  # by the square root of the width
    norms_from_one: bool = False  # a folder has the weights of norms minus 1; a GGUF file has not
    interleaved: bool = False  # a folder has queries, keys and values head by head
    window: bool = False  # config.json may have a sliding_window
    window_switch: bool = False  # but only with use_sliding_window, from max_window_layers on
    paired: bool = False  # in GGUF, rotary channels 2i and 2i + 1 turn together
    paired_folder: bool = False  # and in a folder
    gpt2_keys: bool = False  # sizes in config.json have GPT-2's names
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of a config.json without these keys
    plain: Mapping[str, Any] = field(default_factory=dict)  # keys that must have this value
    experts_key: str = ""  # of the number of experts
    expert_width_key: str = "intermediate_size"
    expert_norm: bool | str = False  # whether their weights add up to 1, or the key that decides
    pad: bool = False  # the class has a pad token, which it does not train, unless a key says null

    def fits(self, config: GPTConfig) -> bool:
        """Whether this family's classes compute exactly this model."""
        if not config.norm_weight or any(
            getattr(config, name) != getattr(self, name) for name in _SAME
        ):
            return False
        if config.activation not in self.activations.values():
            return False
        if not self._branches_fit(config) or not self._layers_fit(config):
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
        return all(len(values) == 1 for values in decided.values())

    def _branches_fit(self, config: GPTConfig) -> bool:
        if not isinstance(self.parallel, str) and config.parallel != self.parallel:
            return False
        if bool(config.n_expert) != bool(self.experts_key):
            return False
        if not isinstance(self.expert_norm, str) and config.expert_norm != self.expert_norm:
            return False
        if config.rope_dim and not (self.rotary_key or self.rotary_size_key):
            return False
        if self.fixed_theta and (config.rope_theta, config.rope_scaling) != (
            self.fixed_theta,
            "none",
        ):
            return False
        if config.score_by_layer and not self.by_layer_key:
            return False
        if config.score_scale and not self.score_key:
            return False
        if (config.score_cap or config.logit_cap) and not self.soft_caps:
            return False
        return math.isclose(
            config.embedding_scale, self.embedding_scale(config.n_embd), rel_tol=1e-6
        )

    @property
    def reads(self) -> set[str]:
        """Keys of FEATURES that a config.json of this family may have."""
        keys = {self.rotary_key, self.score_key}
        if self.rotary_key:
            keys.add("partial_rotary_factor")
        if self.soft_caps:
            keys |= set(SOFT_CAPS)
        keys |= EXPERTS_KEYS if self.experts_key else set()
        return keys | ({"no_rope_layers"} if self.no_rope else set())

    def activation_name(self, activation: Activation) -> str:
        """The first name in config.json of one that the family has."""
        return next(name for name, ours in self.activations.items() if ours == activation)

    def embedding_scale(self, n_embd: int) -> float:
        """The field of a model of this width."""
        return math.sqrt(n_embd) if self.scaled_embedding else 0.0

    def _layers_fit(self, config: GPTConfig) -> bool:
        if not config.layers:
            return True
        if self.period:
            local = Layer(True, self.local_theta or config.rope_theta, config.window)
            full = Layer(True, config.rope_theta, 0)
            return bool(config.window) and set(config.layers) <= {local, full}
        plain = {layer._replace(rope=True) for layer in config.layers}
        return self.no_rope and plain == {Layer(True, config.rope_theta, 0)}

    def _lengths_fit(self, config: GPTConfig) -> bool:
        if config.rope_scaling == "dynamic" and config.block_size != dynamic_length(
            config.rope_original, config.rope_factor
        ):
            return False
        if config.rope_scaling == "longrope" and not self.longrope:
            return False
        if self.period and bool(config.window) != bool(config.layers):
            return False
        return self.window or not config.window


def dynamic_length(original: int, factor: float) -> int:
    """The longest sequence of a model whose rotary frequencies are lowered as it grows."""
    return int(min(original, 1 << 32) * factor)  # gpt_config_check refuses those that are longer


NO_ROPE_INTERVAL = 4  # llama.cpp has no other
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

_ALL_BIASES: dict[str, Any] = dict.fromkeys(BIASES, True)

FAMILIES = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        "Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
        norm="layernorm",
        pos="learned",
        activations={
            "gelu_new": "gelu",
            "gelu_pytorch_tanh": "gelu",
            "gelu_fast": "gelu",
            "gelu": "gelu_erf",
            "relu": "relu",
        },
        activation_key="activation_function",
        stems=family_names.GPT2,
        gguf_stems=family_names.GGUF_JOINED,
        grouped=False,
        by_layer_key="scale_attn_by_inverse_layer_idx",
        gpt2_keys=True,
        defaults={"tie_word_embeddings": True},
        **_ALL_BIASES,
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
        free_biases=True,
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
        "mixtral",
        "MixtralForCausalLM",
        "llama",
        "Jiang et al. 2024, arXiv 2401.04088",
        stems=family_names.MIXTRAL,
        gguf_stems=family_names.GGUF_EXPERTS,
        window=True,
        paired=True,
        experts_key="num_local_experts",
        expert_norm=True,
        defaults={
            "num_key_value_heads": 8,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        plain={"router_jitter_noise": 0.0},
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
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        "Yang et al. 2025, arXiv 2505.09388",
        stems=family_names.QWEN3_MOE,
        gguf_stems=family_names.GGUF_EXPERTS,
        qkv_bias="attention_bias",
        attn_proj_bias="attention_bias",
        qk_norm=True,
        window=True,
        window_switch=True,
        experts_key="num_experts",
        expert_width_key="moe_intermediate_size",
        expert_norm="norm_topk_prob",
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "router_aux_loss_coef": 0.001,
        },
        plain={"decoder_sparse_step": 1},
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        "Bakouch et al. 2025, SmolLM3 (huggingface.co/blog/smollm3); layers without rotation: "
        "Yang et al. 2025, arXiv 2501.18795",
        divided=True,
        qkv_bias="attention_bias",
        attn_proj_bias="attention_bias",
        mlp_bias="mlp_bias",
        no_rope=True,
        paired=True,
        pad=True,
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "no_rope_layer_interval": NO_ROPE_INTERVAL,
            "tie_word_embeddings": True,
        },
    ),
    Family(  # also Pythia: Biderman et al. 2023, arXiv 2304.01373
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "gptneox",
        "Black et al. 2022, arXiv 2204.06745",
        norm="layernorm",
        activations={"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_fast": "gelu", "relu": "relu"},
        eps_key="layer_norm_eps",
        stems=family_names.GPT_NEOX,
        gguf_stems=family_names.GGUF_JOINED,
        grouped=False,
        divided=True,
        qkv_bias="attention_bias",
        attn_proj_bias="attention_bias",
        mlp_bias=True,
        norm_bias=True,
        rotary_key="rotary_pct",
        theta_key="rotary_emb_base",
        parallel="use_parallel_residual",
        interleaved=True,
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rotary_pct": 0.25,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
    ),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        "stablelm",
        "Bellagente et al. 2024, arXiv 2402.17834",
        norm="layernorm",
        eps_key="layer_norm_eps",
        divided=True,
        qkv_bias="use_qkv_bias",
        free_biases=True,
        norm_bias=True,
        rotary_key="partial_rotary_factor",
        defaults={
            "num_key_value_heads": 32,
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
        },
        plain={"use_parallel_residual": False, "qk_layernorm": False},
    ),
    Family(  # Phi-1, Phi-1.5 and Phi-2
        "phi",
        "PhiForCausalLM",
        "phi2",
        "Gunasekar et al. 2023, arXiv 2306.11644; Phi-1.5: Li et al. 2023, arXiv 2309.05463",
        norm="layernorm",
        activations={"gelu_new": "gelu", "gelu": "gelu_erf", "relu": "relu"},
        eps_key="layer_norm_eps",
        stems=family_names.PHI,
        gguf_stems=family_names.GGUF_PLAIN,
        divided=True,
        rotary_key="partial_rotary_factor",
        parallel=True,
        one_norm=True,
        head_bias=True,
        own_head=True,
        defaults={
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
        },
        plain={"qk_layernorm": False},
        **_ALL_BIASES,
    ),
    Family(
        "gptj",
        "GPTJForCausalLM",
        "",
        "Wang and Komatsuzaki 2021, GPT-J-6B (github.com/kingoflolz/mesh-transformer-jax); "
        "rotation: Su et al. 2021, arXiv 2104.09864",
        norm="layernorm",
        activations={"gelu_new": "gelu", "gelu": "gelu_erf", "relu": "relu"},
        activation_key="activation_function",
        stems=family_names.GPTJ,
        grouped=False,
        divided=True,
        mlp_bias=True,
        norm_bias=True,
        rotary_size_key="rotary_dim",
        fixed_theta=10000.0,
        parallel=True,
        one_norm=True,
        head_bias=True,
        paired_folder=True,
        gpt2_keys=True,
        defaults={"rotary_dim": 64},
    ),
    # Also Phi-4 mini. One that turns whole heads computes as a Llama or Mistral, and is written so.
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        "Abdin et al. 2024, arXiv 2404.14219; Phi-4 mini: Abouelenin et al. 2025, arXiv 2503.01743",
        stems=family_names.PHI3,
        gguf_stems=family_names.GGUF_JOINED,
        divided=True,
        rotary_key="partial_rotary_factor",
        longrope=True,
        window=True,
        pad=True,
        defaults={"rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0},
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        "olmo2",
        "OLMo et al. 2025, arXiv 2501.00656",
        stems=family_names.OLMO2,
        divided=True,
        qkv_bias="attention_bias",
        attn_proj_bias="attention_bias",
        wide_qk_norm=True,
        norm_at="after",
        pad=True,
        defaults={"rms_norm_eps": 1e-5},
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        "Gemma Team 2024, arXiv 2408.00118",
        activations={"gelu_pytorch_tanh": "geglu"},
        activation_key="hidden_activation",
        stems=family_names.GEMMA3,
        qkv_bias="attention_bias",
        attn_proj_bias="attention_bias",
        norm_at="both",
        window=True,
        period=2,
        score_key="query_pre_attn_scalar",
        wide_score_layers=46,
        soft_caps=True,
        scaled_embedding=True,
        norms_from_one=True,
        pad=True,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    ),
    Family(  # of text alone
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3",
        "Kamath et al. 2025, arXiv 2503.19786",
        activations={"gelu_pytorch_tanh": "geglu"},
        activation_key="hidden_activation",
        stems=family_names.GEMMA3,
        qkv_bias="attention_bias",
        attn_proj_bias="attention_bias",
        qk_norm=True,
        norm_at="both",
        window=True,
        local_theta=10000.0,
        period=6,
        score_key="query_pre_attn_scalar",
        wide_score_layers=62,
        scaled_embedding=True,
        norms_from_one=True,
        pad=True,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rope_theta": 1000000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
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


def usual_score_scale(family: Family, config: Mapping[str, Any]) -> float:
    """The field score_scale of a GGUF file, which has none: llama.cpp goes by the layers.

    `config` has n_layer, n_embd, n_head and head_dim.
    """
    n_layer, n_embd, n_head = (config[key] for key in ("n_layer", "n_embd", "n_head"))
    if not config["head_dim"] or n_layer != family.wide_score_layers:
        return 0.0
    return math.sqrt(n_head / n_embd)


def records(family: Family, n_layer: int, theta: float, window: int) -> list[dict[str, Any]]:
    """The layers of a GGUF file of a family whose layers differ: llama.cpp has one pattern each."""
    period = family.period or NO_ROPE_INTERVAL
    found = []
    for i in range(n_layer):
        last = (i + 1) % period == 0  # of its period
        local = Layer(True, family.local_theta or theta, window)
        layer = Layer(True, theta, 0) if last else local
        if family.no_rope:
            layer = Layer(not last, theta, 0)
        found.append(layer._asdict())
    return found


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


def by_gguf(architecture: Any, experts: bool = False) -> Family | None:
    """The family of a GGUF file, if it has one with experts, or without."""
    named = [family for family in FAMILIES if family.gguf and family.gguf == architecture]
    fitting = [family for family in named if bool(family.experts_key) == experts]
    return next(iter(fitting or named), None)


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
    known = {name for family in FAMILIES for name in family.activations}
    for key in ACTIVATION_KEYS:
        kind = data.get(key)
        if kind is not None and str(kind) not in known:
            yield f"the activation {kind}" if str(kind).isidentifier() else "its activation"
    if (
        isinstance(kinds := data.get("layer_types"), list)
        and len({str(kind) for kind in kinds}) > 1
    ):
        yield "layers of several kinds"
