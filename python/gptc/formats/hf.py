"""Hugging Face's families: config.json and tensor names, both directions in one table.

Our linear weights are (out, in), as Llama's are; GPT-2's are Conv1D, (in, out). Our query, key and
value rows are packed in one matrix, and so are SwiGLU's gate and up rows; Llama keeps them apart.
families.py has the families. A model of none of them is written under our own names, with
model_type "gptc".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.errors import UPGRADE, GptcError
from gptc.formats import families, family_layers, hf_rope, layout
from gptc.formats.config_json import ConfigJson
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

HEAD = "lm_head.weight"

# Tables that some published files carry although they are computed.
_IGNORED = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


def model_type(config: GPTConfig) -> str:
    """The model_type of the Hugging Face class that computes exactly this model, else gptc."""
    family = families.of(config)
    return family.model_type if family else "gptc"


def naming(family: Family) -> Naming:
    """The names of a family's tensors, and how they are stored."""
    return Naming(
        layout.with_leaves(family.stems),
        conv1d=family.model_type == "gpt2",
        paired=family.paired_folder,
        interleaved=family.interleaved,
        norms_from_one=family.norms_from_one,
    )


def parts(config: GPTConfig, family: Family | None = None) -> list[Part]:
    """The tensors of a model's file, in order, with their rows of our parameters.

    `family` is that of the file; without it, the one as which the model is written. They differ
    where two families compute the same: a Phi-3 may be a Mistral.
    """
    family = family or families.of(config)
    if family is not None:
        return layout.parts(config, naming(family))
    return [Part(name, name, shape, slice(0, shape[0])) for name, shape, _ in config.parameters()]


def head_name(family: Family | None) -> str:
    """The name of the matrix of the logits in a model's file, which may be the embedding's."""
    return f"{family.stems['lm_head'] if family else 'lm_head'}.weight"


def is_tied(config: GPTConfig, family: Family | None, tensors: Tensors) -> bool:
    """Whether the head is the embedding, as `config` says, or another matrix that is stored too.

    transformers does not tie a head that differs.
    """
    full = parts(config, family)[0].name
    names = [name for name in (full, full.partition(".")[2]) if name in tensors.shapes]
    head = head_name(family)
    if not config.tied or not names or head not in tensors.shapes:
        return config.tied
    return tensors.same(names[0], head)


def place(config: GPTConfig, family: Family | None, tensors: Tensors, where: str) -> Placement:
    """The tensors of a file of a family, or under our own names, matched with our parameters."""
    # Some published GPT-2 files hold the bare transformer: names without their first part.
    aliases = {}
    for prefix in ("transformer.", "model."):
        aliases.update({prefix + name: name for name in tensors.shapes})
    aliases = {theirs: name for theirs, name in aliases.items() if theirs not in tensors.shapes}
    found, head = parts(config, family), head_name(family)
    embedding = found[0].name
    if config.tied and aliases.get(embedding, embedding) not in tensors.shapes:
        aliases[embedding] = head  # one matrix under either of its two names

    def ignored(name: str) -> bool:
        return (config.tied and name == head) or _IGNORED.search(name) is not None

    return Placement(config, found, tensors, where, aliases, ignored)


def import_tensors(
    config: GPTConfig, tensors: Tensors, where: str, store: Callable[[str, FloatArray], None]
) -> None:
    """Reads every parameter from a file's tensors and gives it to `store`, one at a time.

    A tensor that is missing, has another shape, or belongs to no parameter is a GptcError.
    """
    placed = place(config, families.of(config), tensors, where)
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
        **({"pad_token_id": None} if family.pad else {}),
        **(special_ids or {"bos_token_id": None, "eos_token_id": None}),
        "tie_word_embeddings": config.tied,
        "torch_dtype": _TORCH_DTYPES[codec.name],
        "use_cache": True,
    }
    if family.gpt2_keys:
        return {
            **common,
            "n_positions": config.block_size,
            "n_ctx": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.n_ff,
            family.activation_key: family.activation_name(config.activation),
            **({family.by_layer_key: True} if config.score_by_layer else {}),
            **(
                {key: config.rope_dim or config.head_size}
                if (key := family.rotary_size_key)
                else {}
            ),
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    explicit = config.head_dim or "head_dim" in family.defaults
    biases = {
        key: config.bias or getattr(config, name)
        for name in BIASES
        if isinstance(key := getattr(family, name), str)
    }
    return {
        **common,
        "max_position_embeddings": hf_rope.max_positions(config),
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        **({"num_key_value_heads": config.n_kv_head} if family.grouped else {}),
        **({"head_dim": config.head_size} if explicit else {}),
        family.activation_key: family.activation_name(config.activation),
        family.eps_key: config.norm_eps,
        "attention_dropout": 0.0,
        **biases,
        **({family.parallel: config.parallel} if isinstance(family.parallel, str) else {}),
        **family_layers.to_json(config, family),
    }


def family_of(data: Mapping[str, Any]) -> Family | None:
    """The family of a config.json; None for our own names, and for one that gptc lacks."""
    return families.by_model_type(data.get("model_type"), data.get("architectures"))


def config_from_json(data: Mapping[str, Any], where: str) -> GPTConfig:
    """The model that a config.json describes. `where` names the file in errors."""
    if data.get("model_type") == "gptc":
        version = data.get("gptc_config_version")
        if version != VERSION:
            raise GptcError(f"{where} has version {version}, this gptc reads {VERSION}: {UPGRADE}")
        known = {"model_type", "gptc_config_version"}
        return checked({k: v for k, v in data.items() if k not in known}, where)
    family = family_of(data)
    if family is None:
        kind, names = data.get("model_type"), f"{families.NAMES}, gptc"
        missing = families.missing_features(data)
        raise GptcError(f"{where}: {families.unknown('model_type', kind, missing, names)}")

    _refuse_quantized(data.get("quantization_config"), where)
    found = ConfigJson({**family.defaults, **data}, where)
    for key, (plain, _) in families.FEATURES.items():
        if key not in family.reads:
            found.only(key, *plain)
    for key, value in family.plain.items():
        found.only(key, value)
    values = _gpt2_values(found, family) if family.gpt2_keys else _llama_values(found, family)
    shape = {"norm": family.norm, "norm_weight": True, "pos": family.pos}
    shape |= {"one_norm": family.one_norm, "head_bias": family.head_bias}
    return checked({**shape, "activation": _activation(found, family), **values}, where)


def _activation(found: ConfigJson, family: Family) -> str:
    first = next(iter(family.activations))
    kind = found.data.get(family.activation_key, first)
    if not isinstance(kind, str) or kind not in family.activations:
        raise GptcError(
            f"{found.where}: {family.activation_key} {kind!r} is not supported, only {first!r}"
        )
    return family.activations[kind]


def _refuse_quantized(how: Any, where: str) -> None:
    """GptcError when the weights of a folder are not plain numbers."""
    if isinstance(how, dict):
        raise GptcError(
            f"{where}: the weights are quantized by {how.get('quant_method', 'another program')}, "
            "and gptc reads plain ones: take the original model, or save it again after "
            "transformers' model.dequantize()"
        )


def _gpt2_values(found: ConfigJson, family: Family) -> dict[str, Any]:
    found.only("scale_attn_weights", True)
    found.only("add_cross_attention", False)
    data, n_embd, n_head = found.data, found.need("n_embd"), found.need("n_head")
    _check_width(found, family, n_embd, n_head)
    return {
        "vocab_size": found.need("vocab_size"),
        "block_size": found.need("n_positions" if "n_positions" in data else "n_ctx"),
        "n_layer": found.need("n_layer"),
        "n_head": n_head,
        "n_kv_head": n_head,
        "n_embd": n_embd,
        "n_ff": data.get("n_inner") or 4 * n_embd,
        **_biases(found, family),
        "tied": data.get("tie_word_embeddings", False),
        "norm_eps": data.get("layer_norm_epsilon", 1e-5),
        "rope_theta": family.fixed_theta,
        "parallel": family.parallel,
        "rope_dim": family_layers.rotary_size(found, family, n_embd // n_head),
        "score_by_layer": bool(family.by_layer_key) and found.flag(family.by_layer_key),
    }


def _llama_values(found: ConfigJson, family: Family) -> dict[str, Any]:
    data, n_embd, n_head = found.data, found.need("hidden_size"), found.need("num_attention_heads")
    _check_width(found, family, n_embd, n_head)
    head_dim = found.need("head_dim") if data.get("head_dim") else 0
    n_kv_head = (data.get("num_key_value_heads") or n_head) if family.grouped else n_head
    values = {
        "vocab_size": found.need("vocab_size"),
        "block_size": found.need("max_position_embeddings"),
        "n_layer": found.need("num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "n_embd": n_embd,
        "n_ff": found.need(family.expert_width_key),
        "tied": data.get("tie_word_embeddings", False),
        "norm_eps": data.get(family.eps_key, 1e-6),
        "head_dim": 0 if head_dim * n_head == n_embd else head_dim,
        "qk_norm": family.qk_norm,
        "wide_qk_norm": family.wide_qk_norm,
        "norm_at": family.norm_at,
        "parallel": found.choice(family.parallel),
        "embedding_scale": family.embedding_scale(n_embd),
        **_biases(found, family),
        **(family_layers.experts(found, family) if family.experts_key else {}),
    }
    return values | family_layers.read(found, family, head_dim or n_embd // n_head)


def _check_width(found: ConfigJson, family: Family, n_embd: int, n_head: int) -> None:
    """As the family's class has it, whatever the head_dim."""
    if family.divided and n_embd % n_head:
        raise GptcError(f"{found.where}: n_head {n_head} does not divide n_embd {n_embd}")


def _biases(found: ConfigJson, family: Family) -> dict[str, Any]:
    values = {name: found.choice(getattr(family, name)) for name in BIASES}
    if all(values.values()):
        return {"bias": True}
    return {"bias": False, **values}
