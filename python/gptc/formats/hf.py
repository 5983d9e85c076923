"""Hugging Face's GPT-2 and Llama: config.json and tensor names, both directions in one table.

Our linear weights are (out, in), as Llama's are; GPT-2's are Conv1D, (in, out). Our query, key and
value rows are packed in one matrix, and so are SwiGLU's gate and up rows; Llama keeps them apart.
A model that neither class describes is written under our own names, with model_type "gptc".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gptc.config import GPTConfig
from gptc.errors import GptcError, UsageError

FloatArray = npt.NDArray[np.float32]

# Raised when a reader of an older gptc would misunderstand a "gptc" config.json.
VERSION = 1


class Part(NamedTuple):
    """A tensor of the file, and the rows of our parameter that it holds."""

    name: str
    ours: str
    shape: tuple[int, ...]  # in the file
    rows: slice
    transposed: bool


class Tensors(Protocol):
    """Named tensors to read: a safetensors file, or several as one."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> FloatArray: ...


_GPT2 = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}
_GPT2_OUTSIDE = {
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "norm_f": "transformer.ln_f",
    "lm_head": "lm_head",
}
_LLAMA = {
    "norm_1": ("input_layernorm",),
    "norm_2": ("post_attention_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.proj": ("mlp.down_proj",),
}
_LLAMA_OUTSIDE = {"wte": "model.embed_tokens", "norm_f": "model.norm", "lm_head": "lm_head"}

# Tables that some published files carry although they are computed.
_IGNORED = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


def model_type(config: GPTConfig) -> str:
    """The Hugging Face class that computes exactly this model: gpt2 or llama, else gptc."""
    if config.family == "gpt2" and config.bias:
        return "gpt2"
    return "llama" if config.family == "llama" else "gptc"


def parts(config: GPTConfig) -> list[Part]:
    """The tensors of this model's file, in order, with where they stand in ours."""
    kind = model_type(config)
    found = []
    for name, shape, _ in config.parameters():
        if kind == "gptc":
            found.append(Part(name, name, shape, slice(0, shape[0]), False))
            continue
        stem, _, leaf = name.rpartition(".")
        layer = re.match(r"h\.(\d+)\.(.*)", stem)
        if kind == "gpt2":
            theirs = f"transformer.h.{layer[1]}.{_GPT2[layer[2]]}" if layer else _GPT2_OUTSIDE[stem]
            turned = layer is not None and len(shape) == 2
            file_shape = shape[::-1] if turned else shape
            part = Part(f"{theirs}.{leaf}", name, file_shape, slice(0, shape[0]), turned)
            found.append(part)
        elif not layer:
            whole = slice(0, shape[0])
            found.append(Part(f"{_LLAMA_OUTSIDE[stem]}.{leaf}", name, shape, whole, False))
        else:
            start = 0
            several = _LLAMA[layer[2]]
            kv = config.n_kv_head * config.head_size
            sizes = {1: [shape[0]], 2: [config.n_ff] * 2, 3: [shape[0] - 2 * kv, kv, kv]}
            for theirs, size in zip(several, sizes[len(several)], strict=True):
                rows = slice(start, start + size)
                full = f"model.layers.{layer[1]}.{theirs}.{leaf}"
                found.append(Part(full, name, (size, *shape[1:]), rows, False))
                start += size
    return found


def export_tensor(part: Part, parameter: FloatArray) -> FloatArray:
    """The file's tensor, from our whole parameter."""
    rows = parameter[part.rows]
    return np.ascontiguousarray(rows.T) if part.transposed else rows


def import_tensors(
    config: GPTConfig, tensors: Tensors, where: str, store: Callable[[str, FloatArray], None]
) -> None:
    """Reads every parameter from a file's tensors and gives it to `store`, one at a time.

    A tensor that is missing, has another shape, or belongs to no parameter is a GptcError.
    """
    shapes = dict(tensors.shapes)
    # Some published GPT-2 files hold the bare transformer: names without their first part.
    stored = {name: name for name in shapes}
    for prefix in ("transformer.", "model."):
        stored.update({prefix + name: name for name in shapes if prefix + name not in stored})

    by_parameter: dict[str, list[Part]] = defaultdict(list)
    used = set()
    for part in parts(config):
        name = stored.get(part.name)
        if name is None:
            raise GptcError(f"{where} lacks the tensor {part.name}")
        if shapes[name] != part.shape:
            raise GptcError(f"{where}: {name} has the shape {shapes[name]}, not {part.shape}")
        used.add(name)
        by_parameter[part.ours].append(part)
    for name in shapes:
        tied_head = config.tied and name == "lm_head.weight"
        if name not in used and not tied_head and not _IGNORED.search(name):
            raise GptcError(f"{where} holds {name}, which the model of its config.json lacks")

    for parameter, shape, _ in config.parameters():
        values = np.empty(shape, np.float32)
        for part in by_parameter[parameter]:
            tensor = tensors.read(stored[part.name])
            values[part.rows] = tensor.T if part.transposed else tensor
        store(parameter, values)


def config_to_json(config: GPTConfig, end_of_text: int | None = None) -> dict[str, Any]:
    """The config.json of this model."""
    kind = model_type(config)
    if kind == "gptc":
        return {"model_type": "gptc", "gptc_config_version": VERSION, **config.to_dict()}
    common = {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "float32",
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
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    }


def config_from_json(data: Mapping[str, Any], where: str) -> GPTConfig:
    """The model that a config.json describes. `where` names the file in errors."""
    kind = data.get("model_type")
    if kind == "gptc":
        version = data.get("gptc_config_version")
        if version != VERSION:
            raise GptcError(
                f"{where} has version {version}, this gptc reads {VERSION}: "
                "upgrade with pip install -U gptc"
            )
        known = {"model_type", "gptc_config_version"}
        return _valid({k: v for k, v in data.items() if k not in known}, where)
    if kind not in ("gpt2", "llama"):
        raise GptcError(f"{where}: model_type {kind!r} is not one of gpt2, llama, gptc")

    def need(key: str) -> Any:
        value = data.get(key)
        if value is None:
            raise GptcError(f"{where} lacks {key}")
        # All that is needed are sizes; some are computed with before GPTConfig looks at them.
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise GptcError(f"{where}: {key} is {value!r}, not a whole number above 0")
        return value

    def only(key: str, *allowed: Any) -> None:
        if key in data and data[key] not in allowed:
            raise GptcError(f"{where}: {key} {data[key]!r} is not supported, only {allowed[0]!r}")

    values: dict[str, Any] = {"norm_weight": True}
    if kind == "gpt2":
        only("activation_function", "gelu_new", "gelu_pytorch_tanh")
        only("scale_attn_weights", True)
        only("scale_attn_by_inverse_layer_idx", False)
        only("add_cross_attention", False)
        n_embd, n_head = need("n_embd"), need("n_head")
        values |= {
            "vocab_size": need("vocab_size"),
            "block_size": need("n_positions") if "n_positions" in data else need("n_ctx"),
            "n_layer": need("n_layer"),
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
    else:
        only("hidden_act", "silu")
        only("attention_bias", False)
        only("mlp_bias", False)
        only("rope_scaling", None)
        rope = data.get("rope_parameters")  # where newer files keep the base
        rope = rope if isinstance(rope, dict) else {}
        if rope.get("rope_type", "default") != "default":
            raise GptcError(f"{where}: rope_type {rope['rope_type']!r} is not supported")
        n_embd, n_head = need("hidden_size"), need("num_attention_heads")
        only("head_dim", n_embd // n_head, None)
        values |= {
            "vocab_size": need("vocab_size"),
            "block_size": need("max_position_embeddings"),
            "n_layer": need("num_hidden_layers"),
            "n_head": n_head,
            "n_kv_head": data.get("num_key_value_heads") or n_head,
            "n_embd": n_embd,
            "n_ff": need("intermediate_size"),
            "norm": "rmsnorm",
            "pos": "rope",
            "activation": "swiglu",
            "bias": False,
            "tied": data.get("tie_word_embeddings", False),
            "norm_eps": data.get("rms_norm_eps", 1e-6),
            "rope_theta": rope.get("rope_theta", data.get("rope_theta", 10000.0)),
        }
    return _valid(values, where)


def _valid(values: Mapping[str, Any], where: str) -> GPTConfig:
    try:
        config = GPTConfig.from_dict(values)
        config.check()
    except UsageError as error:
        raise GptcError(f"{where}: {error}") from error
    return config
