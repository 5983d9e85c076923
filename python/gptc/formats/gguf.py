"""GGUF models, the files of llama.cpp: their names, their metadata, their tokenizer.

A matrix is (out, in) as ours. Llama's rotary channels are paired. gguf_container.py has the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptc._version import __version__
from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.engine.model import Model
from gptc.engine.options import BlockRows
from gptc.errors import GptcError
from gptc.formats import gguf_tokenizer, hf, layout
from gptc.formats.blocks import Q4_0, Q8_0, Blocks
from gptc.formats.format import Export, Format, Output
from gptc.formats.gguf_container import (
    ALIGNMENT,
    CODES,
    MAGIC,
    STRING,
    Array,
    header,
    read_text,
)
from gptc.formats.gguf_split import SplitTable, read_parts
from gptc.formats.layout import Naming, Part, Placement
from gptc.formats.model_file import ModelFile, TensorTable, checked, give, import_with_another
from gptc.formats.numbers import BF16, F16, F32, Codec, encoded
from gptc.tokenizer.base import Tokenizer

CODECS: dict[str, Codec] = {"fp32": F32, "fp16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}

# general.file_type: "mostly" of such a type
_FILE_TYPE = {F32: 0, F16: 1, Q4_0: 2, Q8_0: 7, BF16: 32}


_GPT2 = Naming(
    layout.with_leaves(
        {
            "norm_1": "blk.{}.attn_norm",
            "norm_2": "blk.{}.ffn_norm",
            "attn.qkv": "blk.{}.attn_qkv",
            "attn.proj": "blk.{}.attn_output",
            "mlp.fc": "blk.{}.ffn_up",
            "mlp.proj": "blk.{}.ffn_down",
            "wte": "token_embd",
            "wpe": "position_embd",
            "norm_f": "output_norm",
            "lm_head": "output",
        }
    )
)
_LLAMA = Naming(
    layout.with_leaves(
        {
            "norm_1": "blk.{}.attn_norm",
            "norm_2": "blk.{}.ffn_norm",
            "attn.qkv": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
            "attn.proj": "blk.{}.attn_output",
            "mlp.fc": ("blk.{}.ffn_gate", "blk.{}.ffn_up"),
            "mlp.proj": "blk.{}.ffn_down",
            "wte": "token_embd",
            "norm_f": "output_norm",
            "lm_head": "output",
        }
    ),
    paired=True,
)
# The divisor of each rotary frequency, for Llama 3's scaling. The file does not store how they were
# computed; published models have one of these original contexts, and factors of 1 and 4.
_FREQUENCIES = "rope_freqs.weight"
_LLAMA3_ORIGINALS = tuple(1 << n for n in range(13, 4, -1))
_NAMINGS = {"gpt2": _GPT2, "llama": _LLAMA}
# Keys that make another model of a Llama, and the values with which they do not.
_PLAIN = {"expert_count": 0, "rope.scaling.attn_factor": 1.0, "attention.causal": True}


class GgufModel(ModelFile):
    """A GGUF file of a GPT-2 or Llama, or any part of one in several files."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        """GptcError when the file is damaged, or holds another kind of model."""
        self.path = path
        self._file, self.metadata, self._table = read_parts(path)
        self.config = checked(self._config(), f"{path}: its metadata")

    @property
    def tensors(self) -> TensorTable | SplitTable:
        return self._table

    def parts(self) -> list[Part]:
        return layout.parts(self.config, _NAMINGS[hf.model_type(self.config)])

    @cached_property
    def placement(self) -> Placement:
        def ignored(name: str) -> bool:
            tied_head = name == "output.weight" and self.config.tied
            return tied_head or name == _FREQUENCIES

        where = str(self.path)
        return Placement(self.config, self.parts(), self.tensors, where, ignored=ignored)

    @cached_property
    def _packed(self) -> dict[str, list[tuple[Part, str, Blocks]]]:
        """Matrices whose tensors are all blocks: their parts, names in the file and types."""
        found = {}
        for ours, shape, _ in self.config.parameters():
            parts = self.placement.parts(ours)
            codecs = [self._table.entries[name].codec for _, name in parts]
            if len(shape) == 2 and ours != "wpe.weight":
                kinds = [codec for codec in codecs if isinstance(codec, Blocks)]
                if len(kinds) == len(parts):
                    found[ours] = [(*part, kind) for part, kind in zip(parts, kinds, strict=True)]
        return found

    def packing(self) -> tuple[BlockRows, ...]:
        return tuple(
            BlockRows(i, part.rows.stop - part.rows.start, kind.number)
            for i, (ours, _, _) in enumerate(self.config.parameters())
            for part, _, kind in self._packed.get(ours, ())
        )

    def load_into(self, model: Model) -> None:
        """Gives the weights to a model; to one that is packed, blocks as they are."""
        for ours, _, _ in self.config.parameters():
            if model.dtype != "packed" or ours not in self._packed:
                give(model, ours, self.read(ours), self.placement)
                continue
            for i, (part, name, _) in enumerate(self._packed[ours]):
                rows = self._table.blocks(name)
                rows = layout.pairs_to_halves(rows, part.heads) if part.heads else rows
                model.write_blocks(ours, i, rows)

    def types(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for codec, shape, _ in self._table.entries.values():
            count, size = found.get(codec.name, (0, 0))
            found[codec.name] = (count + 1, size + codec.n_bytes(shape))
        return found

    def tokenizer(self) -> Tokenizer:
        values = {
            key.removeprefix("tokenizer.ggml."): self._strings_or_numbers(value)
            for key, value in self.metadata.items()
            if key.startswith("tokenizer.ggml.")
        }
        values["chat_template"] = self.metadata.get("tokenizer.chat_template")
        tokenizer = gguf_tokenizer.from_gguf(values, str(self.path))
        if tokenizer.vocab_size > self.config.vocab_size:
            raise GptcError(
                f"{self.path} has {tokenizer.vocab_size:,} tokens, and a model of "
                f"{self.config.vocab_size:,}; {import_with_another(self.path)}"
            )
        return tokenizer

    def _strings_or_numbers(self, value: Any) -> Any:
        """The value of a key: arrays as lists."""
        if not isinstance(value, Array):
            return value
        file, (kind, count, file.at) = self._file, value
        if kind == STRING:
            return [read_text(file, f"string {i} of an array") for i in range(count)]
        return list(file.numbers(CODES[kind], count, "an array"))

    def _config(self) -> dict[str, Any]:
        family = self.metadata.get("general.architecture")
        if family not in _NAMINGS:
            raise GptcError(
                f"{self.path}: general.architecture is {family!r}, not one of gpt2, llama"
            )
        embedding = self._table.entries.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise GptcError(f"{self.path} lacks the tensor token_embd.weight")
        n_head = self._size(f"{family}.attention.head_count")
        values = {
            "vocab_size": embedding.shape[0],
            "block_size": self._size(f"{family}.context_length"),
            "n_layer": self._size(f"{family}.block_count"),
            "n_head": n_head,
            "n_kv_head": self._size(f"{family}.attention.head_count_kv", n_head),
            "n_embd": self._size(f"{family}.embedding_length"),
            "n_ff": self._size(f"{family}.feed_forward_length"),
            "norm_weight": True,
            "tied": self._is_tied(),
        }
        if family == "gpt2":
            return values | {
                "norm": "layernorm",
                "pos": "learned",
                "activation": "gelu",
                "bias": True,
                "norm_eps": self._float("gpt2.attention.layer_norm_epsilon", 1e-5),
                "rope_theta": 0.0,
            }
        head_size = self._head_size(values["n_embd"], n_head)
        self._refuse_other_llamas(head_size)
        return values | {
            "norm": "rmsnorm",
            "pos": "rope",
            "activation": "swiglu",
            "bias": False,
            "norm_eps": self._float("llama.attention.layer_norm_rms_epsilon", 1e-5),
            "rope_theta": self._float("llama.rope.freq_base", 10000.0),
            "head_dim": 0 if head_size * n_head == values["n_embd"] else head_size,
            **self._scaling(head_size),
        }

    def _head_size(self, n_embd: int, n_head: int) -> int:
        """The channels of a head. GptcError where those of keys and values differ."""
        usual = max(1, n_embd // n_head)
        found = [self._size(f"llama.attention.{part}_length", usual) for part in ("key", "value")]
        if found[0] != found[1]:
            raise GptcError(
                f"{self.path}: keys of {found[0]} and values of {found[1]} channels are not "
                "supported, only heads of one size"
            )
        return found[0]

    def _scaling(self, head_size: int) -> dict[str, Any]:
        """How rotary frequencies are lowered: all by a factor, or each by one of rope_freqs."""
        factor = self._linear_factor()
        if _FREQUENCIES not in self._table.entries:
            return {} if factor == 1 else {"rope_scaling": "linear", "rope_factor": factor}
        if factor != 1:
            raise GptcError(
                f"{self.path} scales its rotary frequencies by {_FREQUENCIES} and by a factor of "
                f"{factor:g}; only one of them is supported"
            )
        shape = self._table.entries[_FREQUENCIES].shape
        if shape != (head_size // 2,):  # before anything is allocated for what the header claims
            raise GptcError(
                f"{self.path}: {_FREQUENCIES} has the shape {shape}, and a head of {head_size} "
                f"needs ({head_size // 2},)"
            )
        stored = self._table.read(_FREQUENCIES)
        theta = self._float("llama.rope.freq_base", 10000.0)
        if not (np.isfinite(stored).all() and (stored > 0).all() and 0 < theta < np.inf):
            raise GptcError(
                f"{self.path}: {_FREQUENCIES} and llama.rope.freq_base have to be finite and "
                "positive: copy the file again"
            )
        for original in _LLAMA3_ORIGINALS:
            values: dict[str, Any] = {"rope_factor": float(f"{stored.max():.7g}")}
            values |= {"rope_low_freq": 1.0, "rope_high_freq": 4.0, "rope_original": original}
            expected = _divisors(theta, head_size, **values)
            if stored.shape == expected.shape and np.allclose(stored, expected, rtol=1e-4):
                return {"rope_scaling": "llama3", **values}
        raise GptcError(
            f"{self.path}: {_FREQUENCIES} is not as in Llama 3 with an original context of one of "
            f"{', '.join(map(str, _LLAMA3_ORIGINALS))}: import the model from its original folder"
        )

    def _linear_factor(self) -> float:
        """The factor that lowers all rotary frequencies; 1 for none.

        As in llama.cpp, scaling without a type is linear, a factor may have its old key, and 0
        means none.
        """
        if self.metadata.get("llama.rope.scaling.type", "linear") == "none":
            return 1.0
        old = self._float("llama.rope.scale_linear", 0.0)
        return self._float("llama.rope.scaling.factor", old) or 1.0

    def _refuse_other_llamas(self, head_size: int) -> None:
        """GptcError when a key asks for a Llama that gptc does not compute."""
        n_rotated = self.metadata.get("llama.rope.dimension_count", head_size)
        scaling = self.metadata.get("llama.rope.scaling.type", "linear")
        if n_rotated != head_size:
            raise GptcError(
                f"{self.path}: llama.rope.dimension_count is {n_rotated!r}, and only "
                f"the head size {head_size} is supported"
            )
        if scaling not in ("none", "linear"):
            raise GptcError(f"{self.path}: llama.rope.scaling.type {scaling!r} is not supported")
        for key, plain in _PLAIN.items():
            value = self.metadata.get(f"llama.{key}", plain)
            if value != plain:
                raise GptcError(
                    f"{self.path}: llama.{key} is {value!r}, and only {plain!r} is supported"
                )

    def _size(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if type(value) is not int or value < 1:
            raise GptcError(f"{self.path}: {key} is {value!r}, not a whole number above 0")
        return value

    def _float(self, key: str, default: float) -> float:
        value = self.metadata.get(key, default)
        if not isinstance(value, float):
            raise GptcError(f"{self.path}: {key} is {value!r}, not a number")
        return float(f"{value:.7g}")  # 1e-05, where the float32 reads 9.99999974e-06

    def _is_tied(self) -> bool:
        """Whether the head is the embedding: not stored, or stored as the same bytes."""
        entries = self._table.entries
        if "output.weight" not in entries:
            return True
        return self._table.same("output.weight", "token_embd.weight")


# ---- reading ----


def _divisors(
    theta: float,
    head_size: int,
    rope_factor: float,
    rope_original: int,
    rope_low_freq: float,
    rope_high_freq: float,
) -> FloatArray:
    """The divisors of Llama 3's frequencies (HS/2), as in csrc/model/config.c."""
    half = head_size // 2
    turns = rope_original * theta ** (-np.arange(half) / half) / (2 * np.pi)
    kept = np.clip((turns - rope_low_freq) / (rope_high_freq - rope_low_freq), 0, 1)
    return (1 / ((1 - kept) / rope_factor + kept)).astype(np.float32)


# ---- writing ----


def write(export: Export) -> list[Output]:
    """One file; without a tokenizer, and with a note, when llama.cpp has none like it."""
    tokenizer = export.tokenizer
    if tokenizer is not None:
        try:
            gguf_tokenizer.to_gguf(tokenizer, export.model.config.vocab_size)
        except GptcError as error:
            export.notes.append(f"without a tokenizer: {error}")
            tokenizer = None
    return [Output(export.path, model_chunks(export.model, tokenizer, export.dtype))]


def model_chunks(
    model: ModelFile, tokenizer: Tokenizer | None, dtype: str = "fp32"
) -> Iterator[bytes | memoryview]:
    """The bytes of a GGUF file. GptcError for a model or tokenizer that llama.cpp lacks.

    As in llama.cpp, vectors and positions stay float32, and so do matrices whose rows are not whole
    blocks.
    """
    config, family = model.config, hf.model_type(model.config)
    if family not in _NAMINGS:
        raise GptcError(
            f"llama.cpp computes no model of the {config.family} family without "
            "biases or learned norms; export it with --to hf"
        )
    wanted = CODECS[dtype]
    values = _metadata(model, family, wanted)
    if tokenizer is None:
        values["tokenizer.ggml.model"] = "no_vocab"
    else:
        found = gguf_tokenizer.to_gguf(tokenizer, config.vocab_size)
        values |= {f"tokenizer.ggml.{key}": value for key, value in found.items()}
        if tokenizer.marks.chat_template:
            values["tokenizer.chat_template"] = tokenizer.marks.chat_template
    slots = [(part, _codec_for(part, wanted)) for part in layout.parts(config, _NAMINGS[family])]
    if config.rope_scaling == "llama3":
        half = config.head_size // 2
        slots.append((Part(_FREQUENCIES, "", (half,), slice(0, half)), F32))
    yield header(values, [(part.name, codec, part.shape) for part, codec in slots])
    for part, codec in slots:
        if part.name == _FREQUENCIES:
            yield codec.encode(_divisors(config.rope_theta, config.head_size, **_llama3(config)))
        else:
            yield encoded(codec, layout.export_tensor(part, model.read(part.ours)), part.name)
        yield bytes(-codec.n_bytes(part.shape) % ALIGNMENT)


def _llama3(config: GPTConfig) -> dict[str, Any]:
    names = ("rope_factor", "rope_original", "rope_low_freq", "rope_high_freq")
    return {name: getattr(config, name) for name in names}


def _codec_for(part: Part, wanted: Codec) -> Codec:
    vector = len(part.shape) == 1 or part.name == "position_embd.weight"
    return F32 if vector or not wanted.fits(part.shape) else wanted


def _metadata(model: ModelFile, family: str, codec: Codec) -> dict[str, Any]:
    config = model.config
    values: dict[str, Any] = {
        "general.architecture": family,
        "general.name": model.path.name,
        "general.file_type": _FILE_TYPE[codec],
        "general.alignment": ALIGNMENT,
        "general.quantization_version": 2,
        "gptc.version": __version__,
        f"{family}.context_length": config.block_size,
        f"{family}.embedding_length": config.n_embd,
        f"{family}.block_count": config.n_layer,
        f"{family}.feed_forward_length": config.n_ff,
        f"{family}.attention.head_count": config.n_head,
        f"{family}.vocab_size": config.vocab_size,
    }
    if family == "gpt2":
        values["gpt2.attention.layer_norm_epsilon"] = config.norm_eps
        return values
    if config.rope_scaling == "linear":
        values["llama.rope.scaling.type"] = "linear"
        values["llama.rope.scaling.factor"] = config.rope_factor
    if config.head_dim:
        values["llama.attention.key_length"] = config.head_size
        values["llama.attention.value_length"] = config.head_size
    return values | {
        "llama.attention.head_count_kv": config.n_kv_head,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_size,
        "llama.rope.freq_base": config.rope_theta,
    }


FORMAT = Format(
    GgufModel.format,
    "GGUF",
    detect=lambda path, begin: begin.startswith(MAGIC),
    open=GgufModel,
    write=write,
    dtypes=tuple(CODECS),
)
