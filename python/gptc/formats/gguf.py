"""GGUF models, the files of llama.cpp: their names, their metadata, their tokenizer.

A matrix is (out, in) as ours. families.py has the architectures, gguf_rope.py the scaling of their
rotary positions. gguf_container.py has the layout.
"""

from __future__ import annotations

import math
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gptc.engine.model import Model
from gptc.engine.options import BlockRows
from gptc.errors import GptcError
from gptc.formats import families, gguf_rope, gguf_tokenizer, layout
from gptc.formats.blocks import Blocks
from gptc.formats.families import BIASES, SOFT_CAPS, Family
from gptc.formats.format import Format
from gptc.formats.gguf_container import (
    CODES,
    LONGEST_TEXT,
    MAGIC,
    MAX_STRINGS,
    STRING,
    Array,
    read_texts,
)
from gptc.formats.gguf_names import naming
from gptc.formats.gguf_split import SplitTable, read_parts
from gptc.formats.gguf_types import MIXES, PACKED
from gptc.formats.gguf_write import model_chunks as model_chunks
from gptc.formats.gguf_write import write
from gptc.formats.layout import Part, Placement
from gptc.formats.model_file import (
    ModelFile,
    StoredRows,
    TensorTable,
    checked,
    import_with_another,
    name_base,
)
from gptc.formats.numbers import Bytes
from gptc.tokenizer.base import Tokenizer

# A tensor of the first layer, which is there if a family that may have these biases has them.
_BIAS_TENSORS = dict(zip(BIASES, ("attn_q", "attn_output", "ffn_up", "attn_norm"), strict=True))
# Keys that make another model of a family, what they ask for, and values with which they do not.
_PLAIN = {
    "expert_count": (0, "experts"),
    "attention.causal": (True, "attention to later tokens"),
    "attn_logit_softcapping": (0.0, "soft caps on scores"),
    "final_logit_softcapping": (0.0, "a soft cap on logits"),
    "attention.max_alibi_bias": (0.0, "biases by distance"),
    "attention.clamp_kqv": (0.0, "clipped queries, keys and values"),
    "attention.scale": (0.0, "another scale of scores"),
    "attention.kv_lora_rank": (0, "latent attention"),
    "embedding_scale": (0.0, "a factor of the embedding"),
    "residual_scale": (0.0, "a factor of the branches"),
    "logit_scale": (0.0, "a factor of the logits"),
}


_MOST_UNREAD = 64  # numbers or texts of an array that an error may show


class GgufModel(ModelFile):
    """A GGUF file of one of the families, or any part of one in several files."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        """GptcError when the file is damaged, or holds another kind of model."""
        self.path = path
        self._file, self.metadata, self._table = read_parts(path)
        if self.metadata.get("general.type") == "adapter":
            raise GptcError(f"{path} is an adapter, not a model: {name_base(path)}")
        self.config = checked(self._config(), f"{path}: its metadata")

    @property
    def tensors(self) -> TensorTable | SplitTable:
        return self._table

    def parts(self) -> list[Part]:
        joined = "blk.0.attn_qkv.weight" in self._table.entries
        return layout.parts(self.config, naming(self._family, joined))

    @cached_property
    def placement(self) -> Placement:
        def ignored(name: str) -> bool:
            tied_head = name == "output.weight" and self.config.tied
            return tied_head or name in (gguf_rope.FREQUENCIES, *gguf_rope.LONGROPE)

        where = str(self.path)
        return Placement(self.config, self.parts(), self.tensors, where, ignored=ignored)

    @cached_property
    def _packed(self) -> dict[str, list[tuple[Part, str, Blocks]]]:
        """Matrices whose tensors are all blocks: their parts, names in the file and types."""
        found = {}
        for ours, shape, _ in self.config.parameters():
            parts = self.placement.parts(ours)
            codecs = [self._table.entries[name].codec for _, name in parts]
            if len(shape) == 2 and not ours.endswith(("wpe.weight", "router.weight")):
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

    def stored_rows(self, part: Part) -> StoredRows | None:
        """One tensor that holds the rows of `part`, or None; queries and keys are cut by heads."""
        for theirs, name in self.placement.parts(part.ours):
            if theirs.rows == part.rows:
                return StoredRows(
                    self._table.entries[name].codec, partial(self._rows, theirs, name)
                )
        return None

    def _rows(self, part: Part, name: str) -> Bytes:
        """The bytes of a tensor's rows, in the order of ours."""
        rows = self._table.blocks(name).reshape(part.shape[0], -1)
        return layout.pairs_to_halves(rows, part.heads) if part.heads else rows

    def load_into(self, model: Model) -> None:
        """Gives the weights to a model; to one that is packed, blocks as they are."""
        packed = self._packed if model.dtype == "packed" else {}
        self.give(model, [name for name, _, _ in self.config.parameters() if name not in packed])
        for ours, tensors in packed.items():
            for i, (part, name, _) in enumerate(tensors):
                model.write_blocks(ours, i, self._rows(part, name))

    def tokenizer(self) -> Tokenizer:
        values = {
            name: self._strings_or_numbers(value, key, name in gguf_tokenizer.LISTS)
            for key, value in self.metadata.items()
            if (name := key.removeprefix("tokenizer.ggml.")) != key
        }
        values["chat_template"] = gguf_tokenizer.chat_templates(self.metadata)
        tokenizer = gguf_tokenizer.from_gguf(values, str(self.path))
        if tokenizer.vocab_size > self.config.vocab_size:
            raise GptcError(
                f"{self.path} has {tokenizer.vocab_size:,} tokens, and a model of "
                f"{self.config.vocab_size:,}; {import_with_another(self.path)}"
            )
        return tokenizer

    def _strings_or_numbers(self, value: Any, key: str, is_list: bool) -> Any:
        """The value of a key: an array as a list, which is empty for a long one that nobody reads.

        A list takes up to 40 times as much memory as the array.
        """
        if not isinstance(value, Array):
            return value
        file, (kind, count, file.at) = self._file, value
        if not is_list and count > _MOST_UNREAD:
            return []
        file.within(f"count of {key}", count, 0, MAX_STRINGS, file.at)
        if kind == STRING:
            return read_texts(file, count, LONGEST_TEXT)
        return list(file.numbers(CODES[kind], count, "an array"))

    def _config(self) -> dict[str, Any]:
        family, prefix = self._family, self._family.gguf
        embedding = self._table.entries.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise GptcError(f"{self.path} lacks the tensor token_embd.weight")
        n_head = self._size(f"{prefix}.attention.head_count")
        n_embd = self._size(f"{prefix}.embedding_length")
        context = self._size(f"{prefix}.context_length")
        values: dict[str, Any] = {
            "vocab_size": embedding.shape[0],
            "block_size": context,
            "n_layer": self._size(f"{prefix}.block_count"),
            "n_head": n_head,
            "n_kv_head": self._size(f"{prefix}.attention.head_count_kv", n_head),
            "n_embd": n_embd,
            "n_ff": self._size(f"{prefix}.feed_forward_length"),
            "norm": family.norm,
            "norm_weight": True,
            "pos": family.pos,
            "activation": next(iter(family.activations.values())),
            "tied": self._is_tied(),
        }
        key = "layer_norm_epsilon" if family.norm == "layernorm" else "layer_norm_rms_epsilon"
        values |= {"norm_eps": self._float(f"{prefix}.attention.{key}", 1e-5), **self._biases()}
        if family.pos == "learned":
            return values | {"rope_theta": 0.0}
        head_size = self._head_size(n_embd, n_head)
        self._refuse_others(head_size)
        rope = gguf_rope.RopeReader(prefix, self.metadata, self._float)
        if family.soft_caps:
            values |= {field: self._soft_cap(key) for key, field in SOFT_CAPS.items()}
        values |= {
            "head_dim": 0 if head_size * n_head == n_embd else head_size,
            "qk_norm": family.qk_norm,
            "wide_qk_norm": family.wide_qk_norm,
            "norm_at": family.norm_at,
            "parallel": self._parallel(),
            "one_norm": family.one_norm,
            "head_bias": family.head_bias,
            "rope_dim": self._rope_dim(head_size),
            "embedding_scale": family.embedding_scale(n_embd),
            **self._experts(),
            **rope.read(self._table, head_size, context, str(self.path)),
        }
        values["score_scale"] = families.usual_score_scale(family, values)
        return values | self._layers(values)

    @cached_property
    def _family(self) -> Family:
        name = self.metadata.get("general.architecture")
        family = families.by_gguf(name, bool(self.metadata.get(f"{name}.expert_count")))
        if family is None:
            missing = self._other_features(name) if isinstance(name, str) else ()
            names = ", ".join(dict.fromkeys(f.gguf for f in families.FAMILIES if f.gguf))
            found = families.unknown("general.architecture is", name, missing, names)
            raise GptcError(f"{self.path}: {found.replace(' is not one of', ', not one of', 1)}")
        return family

    def _other_features(self, prefix: str) -> list[str]:
        return [
            name
            for key, (plain, name) in _PLAIN.items()
            if self.metadata.get(f"{prefix}.{key}", plain) != plain
        ]

    def _layers(self, values: dict[str, Any]) -> dict[str, Any]:
        """The window, and the records of layers that differ as llama.cpp has them."""
        family, n_layer, theta = self._family, values["n_layer"], values["rope_theta"]
        window = self._window()
        if n_layer > 1 << 12:  # before records are made for what the header claims
            raise GptcError(f"{self.path}: {family.gguf}.block_count is {n_layer}, above 4,096")
        if family.no_rope:
            return {"layers": families.records(family, n_layer, theta, window)}
        if family.period and window:
            return {"layers": families.records(family, n_layer, theta, window), "window": window}
        return {"window": window}

    def _experts(self) -> dict[str, Any]:
        """llama.cpp divides the weights of these families' experts by their sum."""
        family, prefix = self._family, self._family.gguf
        if not family.experts_key:
            return {}
        number, used = (self._size(f"{prefix}.expert_{kind}") for kind in ("count", "used_count"))
        if used > number:
            raise GptcError(
                f"{self.path}: {prefix}.expert_used_count is {used}, and there are {number} experts"
            )
        values = {"n_expert": number, "n_expert_used": used, "expert_norm": True}
        if family.expert_width_key != "intermediate_size":
            values["n_ff"] = self._size(f"{prefix}.expert_feed_forward_length")
        return values

    def _parallel(self) -> bool:
        choice = self._family.parallel
        if not isinstance(choice, str):
            return choice
        value = self.metadata.get(f"{self._family.gguf}.use_parallel_residual", True)
        if not isinstance(value, bool):
            raise GptcError(f"{self.path}: use_parallel_residual is {value!r}, not true or false")
        return value

    def _rope_dim(self, head_size: int) -> int:
        if not self._family.rotary_key:
            return 0
        turned = self._size(f"{self._family.gguf}.rope.dimension_count", head_size)
        return 0 if turned == head_size else turned

    def _biases(self) -> dict[str, Any]:
        values = {name: self._has_bias(name) for name in BIASES}
        return {"bias": True} if all(values.values()) else {"bias": False, **values}

    def _has_bias(self, name: str) -> bool:
        choice, stem = getattr(self._family, name), _BIAS_TENSORS[name]
        if stem == "attn_q" and self._family.gguf_stems["attn.qkv"] == "blk.{}.attn_qkv":
            stem = "attn_qkv"
        tensor = f"blk.0.{stem}.bias"
        return choice if isinstance(choice, bool) else tensor in self._table.entries

    def _window(self) -> int:
        """The attention window of all layers, 0 for none: an array of one for each is refused."""
        key = f"{self._family.gguf}.attention.sliding_window"
        return self._size(key) if self.metadata.get(key) else 0

    def _head_size(self, n_embd: int, n_head: int) -> int:
        """The channels of a head. GptcError where those of keys and values differ."""
        usual, prefix = max(1, n_embd // n_head), self._family.gguf
        parts = ("key", "value")
        found = [self._size(f"{prefix}.attention.{part}_length", usual) for part in parts]
        if found[0] != found[1]:
            raise GptcError(
                f"{self.path}: keys of {found[0]} and values of {found[1]} channels are not "
                "supported, only heads of one size"
            )
        return found[0]

    def _refuse_others(self, head_size: int) -> None:
        """GptcError when a key asks for a model of the family that gptc does not compute."""
        prefix = self._family.gguf
        n_rotated = self.metadata.get(f"{prefix}.rope.dimension_count", head_size)
        if n_rotated != head_size and not self._family.rotary_key:
            raise GptcError(
                f"{self.path}: {prefix}.rope.dimension_count is {n_rotated!r}, and only "
                f"the head size {head_size} is supported"
            )
        for key, (plain, _) in _PLAIN.items():
            if self._family.soft_caps and key in SOFT_CAPS:
                continue
            value = self.metadata.get(f"{prefix}.{key}", plain)
            if value != plain and not (self._family.experts_key and key == "expert_count"):
                raise GptcError(
                    f"{self.path}: {prefix}.{key} is {value!r}, and only {plain!r} is supported"
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

    def _soft_cap(self, key: str) -> float:
        """As the family has it, where a file does not say."""
        name = f"{self._family.gguf}.{key}"
        value = self._float(name, self._family.defaults[key])
        if not 0 < value < math.inf:
            raise GptcError(f"{self.path}: {name} is {value!r}, not a number above 0")
        return value

    def _is_tied(self) -> bool:
        """Whether the head is the embedding: not stored, or stored as the same bytes."""
        entries = self._table.entries
        if "output.weight" not in entries:
            return True
        return self._table.same("output.weight", "token_embd.weight")


FORMAT = Format(
    GgufModel.format,
    "GGUF",
    detect=lambda path, begin: begin.startswith(MAGIC),
    open=GgufModel,
    write=write,
    dtypes=(*MIXES, PACKED),
)
