"""Hugging Face's families: config.json and tensor names, both directions in one table.

Our linear weights are (out, in), as Llama's are; GPT-2's are Conv1D, (in, out). Our query, key and
value rows are packed in one matrix, and so are SwiGLU's gate and up rows; Llama keeps them apart.
families.py has the families. A model of none of them is written under our own names, with
model_type "gptc".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.errors import UPGRADE, GptcError
from gptc.formats import families, hf_rope, layout
from gptc.formats.families import BIASES, Family
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
    "attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "attn.proj": "model.layers.{}.self_attn.o_proj",
    "mlp.fc": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "mlp.proj": "model.layers.{}.mlp.down_proj",
    "wte": "model.embed_tokens",
    "norm_f": "model.norm",
    "lm_head": "lm_head",
}
_GPT2 = Naming(layout.with_leaves(GPT2_STEMS), conv1d=True)
_LLAMA = Naming(layout.with_leaves(_LLAMA_STEMS))

HEAD = "lm_head.weight"

# Tables that some published files carry although they are computed.
_IGNORED = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


def model_type(config: GPTConfig) -> str:
    """The model_type of the Hugging Face class that computes exactly this model, else gptc."""
    family = families.of(config)
    return family.model_type if family else "gptc"


def parts(config: GPTConfig) -> list[Part]:
    """The tensors of this model's file, in order, with their rows of our parameters."""
    family = families.of(config)
    if family is not None:
        return layout.parts(config, _GPT2 if family.model_type == "gpt2" else _LLAMA)
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
    family = families.of(config)
    if family is None:
        return {"model_type": "gptc", "gptc_config_version": VERSION, **config.to_dict()}
    common = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        **(special_ids or {"bos_token_id": None, "eos_token_id": None}),
        "tie_word_embeddings": config.tied,
        "torch_dtype": _TORCH_DTYPES[codec.name],
        "use_cache": True,
    }
    if family.model_type == "gpt2":
        return {
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
    explicit = config.head_dim or "head_dim" in family.defaults
    biases = {key: getattr(config, name) for name in BIASES if (key := _bias_key(family, name))}
    return {
        **common,
        "max_position_embeddings": hf_rope.max_positions(config),
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        **({"head_dim": config.head_size} if explicit else {}),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **hf_rope.to_json(config),
        "attention_dropout": 0.0,
        **biases,
        **_window_to_json(config, family),
    }


def _bias_key(family: Family, name: str) -> str:
    """The key of config.json that decides about a bias; "" where the family does."""
    choice = getattr(family, name)
    return choice if isinstance(choice, str) else ""


def _window_to_json(config: GPTConfig, family: Family) -> dict[str, Any]:
    if not family.window:
        return {}
    values: dict[str, Any] = {"sliding_window": config.window or None}
    if family.window_switch:
        values["use_sliding_window"] = config.window > 0
        values["max_window_layers"] = 0 if config.window else config.n_layer
    return values


def config_from_json(data: Mapping[str, Any], where: str) -> GPTConfig:
    """The model that a config.json describes. `where` names the file in errors."""
    kind = data.get("model_type")
    if kind == "gptc":
        version = data.get("gptc_config_version")
        if version != VERSION:
            raise GptcError(f"{where} has version {version}, this gptc reads {VERSION}: {UPGRADE}")
        known = {"model_type", "gptc_config_version"}
        return checked({k: v for k, v in data.items() if k not in known}, where)
    family = families.by_model_type(kind, data.get("architectures"))
    if family is None:
        names, missing = f"{families.NAMES}, gptc", families.missing_features(data)
        raise GptcError(f"{where}: {families.unknown('model_type', kind, missing, names)}")

    _refuse_quantized(data.get("quantization_config"), where)
    found = _ConfigJson({**family.defaults, **data}, where)
    for key, (plain, _) in families.FEATURES.items():
        found.only(key, *plain)
    values = _gpt2_values(found) if family.model_type == "gpt2" else _llama_values(found, family)
    shape = {"norm": family.norm, "norm_weight": True}
    return checked({**shape, "pos": family.pos, "activation": family.activation, **values}, where)


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

    def flag(self, key: str) -> bool:
        """A value that is true or false, and false if it is not there."""
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise GptcError(f"{self.where}: {key} is {value!r}, not true or false")
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
        "bias": True,
        "tied": data.get("tie_word_embeddings", True),
        "norm_eps": data.get("layer_norm_epsilon", 1e-5),
        "rope_theta": 0.0,  # unused
    }


def _llama_values(found: _ConfigJson, family: Family) -> dict[str, Any]:
    found.only("hidden_act", "silu")
    data, n_embd, n_head = found.data, found.need("hidden_size"), found.need("num_attention_heads")
    if family.divided and n_embd % n_head:  # as the class has it, whatever the head_dim
        raise GptcError(f"{found.where}: n_head {n_head} does not divide n_embd {n_embd}")
    head_dim = found.need("head_dim") if data.get("head_dim") else 0
    parameters = data.get("rope_parameters")
    if isinstance(parameters, dict):
        _ConfigJson(parameters, found.where).only("partial_rotary_factor", 1.0, None)
    return {
        "vocab_size": found.need("vocab_size"),
        "block_size": found.need("max_position_embeddings"),
        "n_layer": found.need("num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": data.get("num_key_value_heads") or n_head,
        "n_embd": n_embd,
        "n_ff": found.need("intermediate_size"),
        "bias": False,
        "tied": data.get("tie_word_embeddings", False),
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "head_dim": 0 if head_dim * n_head == n_embd else head_dim,
        "qk_norm": family.qk_norm,
        "window": _window(found, family),
        **{name: _bias(found, family, name) for name in BIASES},
        **hf_rope.from_json(data, found.where),
    }


def _bias(found: _ConfigJson, family: Family, name: str) -> Any:
    key = _bias_key(family, name)
    return found.data.get(key, False) if key else getattr(family, name)


def _window(found: _ConfigJson, family: Family) -> int:
    """The window of every layer, 0 for none. GptcError where layers differ."""
    data, n_layer = found.data, found.need("num_hidden_layers")
    used = family.window and (not family.window_switch or found.flag("use_sliding_window"))
    window = found.need("sliding_window") if used and data.get("sliding_window") is not None else 0
    kinds = data.get("layer_types")
    if kinds is None:
        first = data.get("max_window_layers", 0) if family.window_switch else 0
        if isinstance(first, bool) or not isinstance(first, int):
            raise GptcError(f"{found.where}: max_window_layers is {first!r}, not a whole number")
        if not window or first >= n_layer:
            return 0
        if first <= 0:
            return window
        key = "max_window_layers"
    else:
        n = len(kinds) if isinstance(kinds, list) else 0
        if n == n_layer and all(kind == "full_attention" for kind in kinds):
            return 0
        if window and n == n_layer and all(kind == "sliding_attention" for kind in kinds):
            return window
        key = "layer_types"
    raise GptcError(
        f"{found.where}: {key} with layers of several kinds is not supported, only layers that all "
        "have the same attention window, or none"
    )
