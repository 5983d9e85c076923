"""Hugging Face's GPT-2 and Llama: config.json and tensor names, both directions in one table.

Our linear weights are (out, in), as Llama's are; GPT-2's are Conv1D, (in, out). Our query, key and
value rows are packed in one matrix, and so are SwiGLU's gate and up rows; Llama keeps them apart.
A model that neither class describes is written under our own names, with model_type "gptc".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.errors import UPGRADE, GptcError
from gptc.formats import layout
from gptc.formats.layout import Naming, Part, Placement, Tensors
from gptc.formats.layout import export_tensor as export_tensor
from gptc.formats.model_file import checked
from gptc.formats.numbers import BF16, F16, F32, Codec

NAME = "hf"
CODECS: dict[str, Codec] = {"fp32": F32, "fp16": F16, "bf16": BF16}
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Increased when an older gptc would misread a "gptc" config.json.
VERSION = 1

GPT2_STEMS = {
    "norm_1": "transformer.h.{}.ln_1",
    "norm_2": "transformer.h.{}.ln_2",
    "attn.qkv": "transformer.h.{}.attn.c_attn",
    "attn.proj": "transformer.h.{}.attn.c_proj",
    "mlp.fc": "transformer.h.{}.mlp.c_fc",
    "mlp.proj": "transformer.h.{}.mlp.c_proj",
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "norm_f": "transformer.ln_f",
    "lm_head": "lm_head",
}
_LLAMA_STEMS: dict[str, str | tuple[str, ...]] = {
    "norm_1": "model.layers.{}.input_layernorm",
    "norm_2": "model.layers.{}.post_attention_layernorm",
    "attn.qkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "attn.proj": "model.layers.{}.self_attn.o_proj",
    "mlp.fc": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "mlp.proj": "model.layers.{}.mlp.down_proj",
    "wte": "model.embed_tokens",
    "norm_f": "model.norm",
    "lm_head": "lm_head",
}
_NAMINGS = {
    "gpt2": Naming(layout.with_leaves(GPT2_STEMS), conv1d=True),
    "llama": Naming(layout.with_leaves(_LLAMA_STEMS)),
}

HEAD = "lm_head.weight"

# Tables that some published files carry although they are computed.
_IGNORED = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


def model_type(config: GPTConfig) -> str:
    """The Hugging Face class that computes exactly this model: gpt2 or llama, else gptc."""
    if config.family == "gpt2" and config.bias:
        return "gpt2"
    return "llama" if config.family == "llama" else "gptc"


def parts(config: GPTConfig) -> list[Part]:
    """The tensors of this model's file, in order, with their rows of our parameters."""
    naming = _NAMINGS.get(model_type(config))
    if naming is not None:
        return layout.parts(config, naming)
    return [Part(name, name, shape, slice(0, shape[0])) for name, shape, _ in config.parameters()]


def embedding_name(config: GPTConfig) -> str:
    """The name of the embedding in a model's file."""
    return parts(config)[0].name


def is_tied(config: GPTConfig, tensors: Tensors) -> bool:
    """Whether the head is the embedding, as `config` says, or another matrix that is stored too.

    transformers does not tie a head that differs.
    """
    full = embedding_name(config)
    names = [name for name in (full, full.partition(".")[2]) if name in tensors.shapes]
    if not config.tied or not names or HEAD not in tensors.shapes:
        return config.tied
    return tensors.same(names[0], HEAD)


def place(config: GPTConfig, tensors: Tensors, where: str) -> Placement:
    """A file's tensors matched with our parameters."""
    # Some published GPT-2 files hold the bare transformer: names without their first part.
    aliases = {}
    for prefix in ("transformer.", "model."):
        aliases.update({prefix + name: name for name in tensors.shapes})
    aliases = {theirs: name for theirs, name in aliases.items() if theirs not in tensors.shapes}
    embedding = embedding_name(config)
    if config.tied and aliases.get(embedding, embedding) not in tensors.shapes:
        aliases[embedding] = HEAD  # one matrix under either of its two names

    def ignored(name: str) -> bool:
        tied_head = config.tied and name == HEAD
        return tied_head or _IGNORED.search(name) is not None

    return Placement(config, parts(config), tensors, where, aliases, ignored)


def import_tensors(
    config: GPTConfig, tensors: Tensors, where: str, store: Callable[[str, FloatArray], None]
) -> None:
    """Reads every parameter from a file's tensors and gives it to `store`, one at a time.

    A tensor that is missing, has another shape, or belongs to no parameter is a GptcError.
    """
    placed = place(config, tensors, where)
    for name, _, _ in config.parameters():
        store(name, placed.read(name))


def config_to_json(
    config: GPTConfig,
    special_ids: Mapping[str, Any] | None = None,
    codec: Codec = F32,
) -> dict[str, Any]:
    """The config.json of this model, whose tensors are stored with `codec`.

    `special_ids` are those of its tokenizer, such as "eos_token_id".
    """
    kind = model_type(config)
    if kind == "gptc":
        return {"model_type": "gptc", "gptc_config_version": VERSION, **config.to_dict()}
    common = {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        **(special_ids or {"bos_token_id": None, "eos_token_id": None}),
        "tie_word_embeddings": config.tied,
        "torch_dtype": _TORCH_DTYPES[codec.name],
        "use_cache": True,
    }
    if kind == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            **common,
            "n_positions": config.block_size,
            "n_ctx": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.n_ff,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        **common,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        **({"head_dim": config.head_dim} if config.head_dim else {}),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **_scaling_to_json(config),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    }


# Ours and theirs, of each way in which rotary frequencies are lowered.
_SCALING = {"none": {}, "linear": {"rope_factor": "factor"}}
_SCALING["llama3"] = {
    **_SCALING["linear"],
    "rope_low_freq": "low_freq_factor",
    "rope_high_freq": "high_freq_factor",
    "rope_original": "original_max_position_embeddings",
}


def _scaling_to_json(config: GPTConfig) -> dict[str, Any]:
    kind = config.rope_scaling
    if kind == "none":
        return {}
    values = {theirs: getattr(config, ours) for ours, theirs in _SCALING[kind].items()}
    return {"rope_scaling": {"rope_type": kind, **values}}


def _scaling_from_json(rope: Any, where: str) -> dict[str, Any]:
    """`rope` is rope_scaling, or rope_parameters of newer files."""
    if not isinstance(rope, dict):
        raise GptcError(f"{where}: rope_scaling {rope!r} is not supported")
    if kinds := [kind for kind, values in rope.items() if isinstance(values, dict)]:
        raise GptcError(
            f"{where}: rope_parameters by kinds of layers, as of {kinds[0]}, are not supported"
        )
    kind = rope.get("rope_type", rope.get("type", "default" if "factor" not in rope else None))
    kind = "none" if kind == "default" else kind
    if not isinstance(kind, str) or kind not in _SCALING:
        raise GptcError(
            f"{where}: rope_scaling with rope_type {kind!r} is not supported, only linear, llama3"
        )
    missing = [theirs for theirs in _SCALING[kind].values() if theirs not in rope]
    if missing:
        raise GptcError(f"{where}: rope_scaling lacks {missing[0]}")
    values = {ours: rope[theirs] for ours, theirs in _SCALING[kind].items()}
    return {"rope_scaling": kind, **values}


def config_from_json(data: Mapping[str, Any], where: str) -> GPTConfig:
    """The model that a config.json describes. `where` names the file in errors."""
    kind = data.get("model_type")
    if kind == "gptc":
        version = data.get("gptc_config_version")
        if version != VERSION:
            raise GptcError(f"{where} has version {version}, this gptc reads {VERSION}: {UPGRADE}")
        known = {"model_type", "gptc_config_version"}
        return checked({k: v for k, v in data.items() if k not in known}, where)
    if kind not in ("gpt2", "llama"):
        raise GptcError(f"{where}: model_type {kind!r} is not one of gpt2, llama, gptc")

    _refuse_quantized(data.get("quantization_config"), where)
    found = _ConfigJson(data, where)
    values = _gpt2_values(found) if kind == "gpt2" else _llama_values(found)
    return checked({"norm_weight": True, **values}, where)


def _refuse_quantized(how: Any, where: str) -> None:
    """GptcError when the weights of a folder are not plain numbers."""
    if isinstance(how, dict):
        raise GptcError(
            f"{where}: the weights are quantized by {how.get('quant_method', 'another program')}, "
            "and gptc reads plain ones: take the original model, or save it again after "
            "transformers' model.dequantize()"
        )


class _ConfigJson(NamedTuple):
    """A config.json, and the name of its file in errors."""

    data: Mapping[str, Any]
    where: str

    def need(self, key: str) -> Any:
        """A size that must be there. Some are computed with before GPTConfig checks them."""
        value = self.data.get(key)
        if value is None:
            raise GptcError(f"{self.where} lacks {key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise GptcError(f"{self.where}: {key} is {value!r}, not a whole number above 0")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """GptcError when a key is there with a value that gptc does not compute."""
        if key in self.data and self.data[key] not in allowed:
            raise GptcError(
                f"{self.where}: {key} {self.data[key]!r} is not supported, only {allowed[0]!r}"
            )


def _gpt2_values(found: _ConfigJson) -> dict[str, Any]:
    found.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    found.only("scale_attn_weights", True)
    found.only("scale_attn_by_inverse_layer_idx", False)
    found.only("add_cross_attention", False)
    data, n_embd, n_head = found.data, found.need("n_embd"), found.need("n_head")
    return {
        "vocab_size": found.need("vocab_size"),
        "block_size": found.need("n_positions" if "n_positions" in data else "n_ctx"),
        "n_layer": found.need("n_layer"),
        "n_head": n_head,
        "n_kv_head": n_head,
        "n_embd": n_embd,
        "n_ff": data.get("n_inner") or 4 * n_embd,
        "norm": "layernorm",
        "pos": "learned",
        "activation": "gelu",
        "bias": True,
        "tied": data.get("tie_word_embeddings", True),
        "norm_eps": data.get("layer_norm_epsilon", 1e-5),
        "rope_theta": 0.0,  # unused
    }


def _llama_values(found: _ConfigJson) -> dict[str, Any]:
    found.only("hidden_act", "silu")
    found.only("attention_bias", False)
    found.only("mlp_bias", False)
    data, n_embd, n_head = found.data, found.need("hidden_size"), found.need("num_attention_heads")
    found.only("partial_rotary_factor", 1.0, None)
    head_dim = found.need("head_dim") if data.get("head_dim") else 0
    rope = data.get("rope_parameters")  # where newer files keep the base and the scaling
    rope = rope if isinstance(rope, dict) else {}
    _ConfigJson(rope, found.where).only("partial_rotary_factor", 1.0, None)
    return {
        "vocab_size": found.need("vocab_size"),
        "block_size": found.need("max_position_embeddings"),
        "n_layer": found.need("num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": data.get("num_key_value_heads") or n_head,
        "n_embd": n_embd,
        "n_ff": found.need("intermediate_size"),
        "norm": "rmsnorm",
        "pos": "rope",
        "activation": "swiglu",
        "bias": False,
        "tied": data.get("tie_word_embeddings", False),
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", data.get("rope_theta", 10000.0)),
        "head_dim": 0 if head_dim * n_head == n_embd else head_dim,
        **_scaling_from_json(data.get("rope_scaling") or rope, found.where),
    }
