"""Writes GGUF files, in a type for each --dtype or in those of the model's own file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from gptc._version import __version__
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats import families, gguf_rope, gguf_tokenizer, layout
from gptc.formats.families import BIASES, SOFT_CAPS, Family
from gptc.formats.format import Export, Output
from gptc.formats.gguf_container import ALIGNMENT, header
from gptc.formats.gguf_names import naming, stacked
from gptc.formats.gguf_rope import YARN_BETAS
from gptc.formats.gguf_types import FILE_TYPES, MIXES, PACKED, codec_of
from gptc.formats.layout import Part
from gptc.formats.model_file import ModelFile, StoredRows
from gptc.formats.numbers import F32, Codec, encoded, to_bytes
from gptc.tokenizer.base import Tokenizer


def write(export: Export) -> list[Output]:
    """One file; without a tokenizer, and with a note, when llama.cpp has none like it."""
    tokenizer = expressible(export.tokenizer, export.model.config, export.notes)
    export.notes.extend(_lost(export.model.config))
    return [Output(export.path, model_chunks(export.model, tokenizer, export.dtype))]


def expressible(
    tokenizer: Tokenizer | None, config: GPTConfig, notes: list[str]
) -> Tokenizer | None:
    """A tokenizer that llama.cpp has one like; None, with a note, where it has not."""
    if tokenizer is not None:
        try:
            gguf_tokenizer.to_gguf(tokenizer, config.vocab_size)
        except GptcError as error:
            notes.append(f"without a tokenizer: {error}")
            return None
    return tokenizer


def _lost(config: GPTConfig) -> list[str]:
    """Notes on what llama.cpp does not compute as gptc does."""
    notes = []
    if config.window and config.window < config.block_size and not config.layers:
        notes.append(
            f"llama.cpp computes these models without attention windows: texts of more than "
            f"{config.window:,} tokens differ there"
        )
    if (
        config.rope_scaling == "yarn"
        and (config.rope_high_freq, config.rope_low_freq) != YARN_BETAS
    ):
        notes.append(
            f"llama.cpp computes these models with beta_fast {YARN_BETAS[0]:g} and beta_slow "
            f"{YARN_BETAS[1]:g}, this one has {config.rope_high_freq:g} and "
            f"{config.rope_low_freq:g}: texts differ there"
        )
    if config.rope_scaling == "dynamic":
        notes.append(
            f"llama.cpp has no dynamic rotary scaling: the context is the original one of "
            f"{config.rope_original:,} tokens"
        )
    return notes


def model_chunks(
    model: ModelFile, tokenizer: Tokenizer | None, dtype: str = "fp32"
) -> Iterator[bytes | memoryview]:
    """The bytes of a GGUF file. GptcError for a model or tokenizer that llama.cpp lacks.

    `dtype` is one of MIXES, or PACKED: each tensor in the type that the model's own file has it in.
    """
    config, family = model.config, families.of(model.config)
    if family is None:
        raise GptcError(
            f"llama.cpp computes no model of the {config.family} family with these biases, norms "
            "and windows; export it with --to hf"
        )
    _check_expressible(config, family)
    tensors = _stacked(_tensor(model, part, dtype) for part in layout.parts(config, naming(family)))
    for name, divisors in gguf_rope.tensors_of(config).items():
        part = Part(name, "", divisors.shape, slice(0, divisors.shape[0]))
        tensors.append(_Tensor(part, F32, partial(F32.encode, divisors)))
    mix = MIXES.get(dtype)
    values = _metadata(model, family, mix.file_type if mix else _file_type(tensors))
    if tokenizer is None:
        values["tokenizer.ggml.model"] = "no_vocab"
    else:
        found = gguf_tokenizer.to_gguf(tokenizer, config.vocab_size)
        values |= {f"tokenizer.ggml.{key}": value for key, value in found.items()}
        values |= gguf_tokenizer.chat_template_keys(tokenizer)
    yield header(values, [(part.name, codec, part.shape) for part, codec, _ in tensors])
    for part, codec, encode in tensors:
        yield encode()
        yield bytes(-codec.n_bytes(part.shape) % ALIGNMENT)


def _check_expressible(config: GPTConfig, family: Family) -> None:
    """GptcError for a model of a family of which llama.cpp computes others only."""
    for lacks in _lacking(config, family):
        raise GptcError(f"llama.cpp lacks {lacks}; export it with --to hf")


def _lacking(config: GPTConfig, family: Family) -> Iterator[str]:
    if not family.gguf:
        yield f"models of the family {family.model_type}"
    first = next(iter(family.activations.values()))
    if config.activation != first:
        yield f"the activation {config.activation} in {family.model_type}, only {first}"
    if isinstance(family.expert_norm, str) and not config.expert_norm:
        yield f"{family.model_type} with {family.expert_norm} false"
    if family.own_head and config.tied:
        yield f"{family.model_type} with tie_word_embeddings true"
    if config.score_by_layer:
        yield f"scores divided by the layer's number ({family.by_layer_key})"
    usual_scale = families.usual_score_scale(family, vars(config))
    if not math.isclose(config.score_scale, usual_scale, rel_tol=1e-6):
        yield f"another scale of scores ({family.score_key} other than the head size)"
    if family.soft_caps and not (config.score_cap and config.logit_cap):
        yield f"{family.model_type} without soft caps of scores and logits"
    if family.no_rope or config.layers:
        usual = families.records(family, config.n_layer, config.rope_theta, config.window)
        if [layer._asdict() for layer in config.layers] != usual:
            key = "no_rope_layers" if family.no_rope else "layer_types"
            yield f"these {key}, only each {family.period or families.NO_ROPE_INTERVAL}th layer"
    for name in () if family.free_biases else BIASES:
        key = getattr(family, name)
        usual_bias = isinstance(key, str) and bool(family.defaults.get(key, False))
        if isinstance(key, str) and (config.bias or getattr(config, name)) != usual_bias:
            yield f"{family.model_type} with {key} {str(not usual_bias).lower()}"


class _Tensor(NamedTuple):
    """A tensor to write; its bytes are made when its turn comes."""

    part: Part
    codec: Codec
    encode: Callable[[], memoryview]


def _tensor(model: ModelFile, part: Part, dtype: str) -> _Tensor:
    if dtype == PACKED:
        stored = model.stored_rows(part)
        if stored is None:
            raise GptcError(
                f"{model.path} does not have {part.name} as one tensor: choose another --dtype"
            )
        return _Tensor(part, stored.codec, partial(_copied, stored, part))
    codec = codec_of(part, MIXES[dtype], model.config)

    def encode() -> memoryview:
        return encoded(codec, layout.export_tensor(part, model.read(part.ours)), part.name)

    return _Tensor(part, codec, encode)


def _stacked(tensors: Iterable[_Tensor]) -> list[_Tensor]:
    """The matrices of a layer's experts as one tensor each."""
    by_name: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        by_name.setdefault(stacked(tensor.part.name), []).append(tensor)
    found = []
    for name, members in by_name.items():
        part, codec, encode = members[0]
        if name != part.name:
            if any(member.codec is not codec for member in members):
                raise GptcError(f"{name} has experts of several types: choose another --dtype")
            part = part._replace(name=name, shape=(len(members), *part.shape))
            encode = partial(_joined, [member.encode for member in members])
        found.append(_Tensor(part, codec, encode))
    return found


def _joined(parts: list[Callable[[], memoryview]]) -> memoryview:
    return memoryview(b"".join(encode() for encode in parts))


def _copied(stored: StoredRows, part: Part) -> memoryview:
    rows = stored.read()
    return to_bytes(layout.halves_to_pairs(rows, part.heads) if part.heads else rows)


def _file_type(tensors: Iterable[_Tensor]) -> int:
    """llama.cpp's number of a file in which most bytes are of one type."""
    sizes: dict[str, int] = {}
    for part, codec, _ in tensors:
        sizes[codec.name] = sizes.get(codec.name, 0) + codec.n_bytes(part.shape)
    return FILE_TYPES[max(sizes, key=sizes.__getitem__)]


def _metadata(model: ModelFile, family: Family, file_type: int) -> dict[str, Any]:
    config, prefix = model.config, family.gguf
    dynamic = config.rope_scaling == "dynamic"
    values: dict[str, Any] = {
        "general.architecture": prefix,
        "general.name": model.path.name,
        "general.file_type": file_type,
        "general.alignment": ALIGNMENT,
        "general.quantization_version": 2,
        "gptc.version": __version__,
        f"{prefix}.context_length": config.rope_original if dynamic else config.block_size,
        f"{prefix}.embedding_length": config.n_embd,
        f"{prefix}.block_count": config.n_layer,
        f"{prefix}.feed_forward_length": config.n_ff,
        f"{prefix}.attention.head_count": config.n_head,
        f"{prefix}.vocab_size": config.vocab_size,
    }
    if config.n_expert:
        values[f"{prefix}.expert_count"] = config.n_expert
        values[f"{prefix}.expert_used_count"] = config.n_expert_used
        values[f"{prefix}.expert_feed_forward_length"] = config.n_ff
    kind = "layer_norm_epsilon" if family.norm == "layernorm" else "layer_norm_rms_epsilon"
    values[f"{prefix}.attention.{kind}"] = config.norm_eps
    if family.pos == "learned":
        return values
    if isinstance(family.parallel, str):
        values[f"{prefix}.use_parallel_residual"] = config.parallel
    if config.head_dim or "head_dim" in family.defaults:
        values[f"{prefix}.attention.key_length"] = config.head_size
        values[f"{prefix}.attention.value_length"] = config.head_size
    if family.soft_caps:
        values |= {f"{prefix}.{key}": getattr(config, field) for key, field in SOFT_CAPS.items()}
    if config.window:
        values[f"{prefix}.attention.sliding_window"] = config.window
    return values | {
        f"{prefix}.attention.head_count_kv": config.n_kv_head,
        **gguf_rope.write(config, prefix),
    }
