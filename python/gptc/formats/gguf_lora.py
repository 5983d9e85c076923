"""Adapters in GGUF files, as llama.cpp reads them: general.type "adapter", adapter.type "lora".

A matrix NAME has the tensors NAME.lora_a (rank, in) and NAME.lora_b (out, rank), in the order of
rows that the file of its model has. Their product is scaled by adapter.lora.alpha / rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptc._version import __version__
from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.engine.lora import Lora, adapters_of
from gptc.errors import GptcError
from gptc.formats import families, layout, peft
from gptc.formats.families import Family
from gptc.formats.gguf_container import ALIGNMENT, MAGIC, header
from gptc.formats.gguf_names import naming
from gptc.formats.gguf_split import read_parts
from gptc.formats.numbers import F32
from gptc.formats.peft import Place

_ALPHA = "adapter.lora.alpha"


def is_adapter(path: Path) -> bool:
    """Whether a path is that of a GGUF file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _places(config: GPTConfig, lora: Lora, family: Family) -> list[Place]:
    return peft.places(config, lora, layout.parts(config, naming(family)))


def _family(config: GPTConfig) -> Family:
    family = families.of(config)
    if family is None:
        raise GptcError(f"llama.cpp has no models of the {config.family} family with these layers")
    return family


def _names(place: Place) -> tuple[str, str]:
    return f"{place.module}.weight.lora_a", f"{place.module}.weight.lora_b"


def chunks(
    config: GPTConfig, lora: Lora, read: Callable[[str], FloatArray]
) -> Iterator[bytes | memoryview]:
    """The bytes of a file of these adapters; `read` gives our parameters."""
    family = _family(config)
    if lora.dora:
        raise GptcError(
            "a GGUF adapter has no place for the magnitudes of DoRA: use --to hf, or --merge"
        )
    values = {
        "general.architecture": family.gguf,
        "general.type": "adapter",
        "general.alignment": ALIGNMENT,
        "gptc.version": __version__,
        "adapter.type": "lora",
        _ALPHA: float(lora.scale * lora.rank),
    }
    tensors: dict[str, FloatArray] = {}
    for place in _places(config, lora, family):
        a, b = (read(f"{place.ours}.lora_{kind}") for kind in "ab")
        rows = b[place.b]
        in_order = layout.halves_to_pairs(rows, place.heads) if place.heads else rows
        tensors |= dict(zip(_names(place), (a[place.a], in_order), strict=True))
    yield header(values, [(name, F32, array.shape) for name, array in tensors.items()])
    for array in tensors.values():
        yield np.ascontiguousarray(array, np.float32).tobytes()
        yield bytes(-array.nbytes % ALIGNMENT)


class GgufAdapter:
    """The adapters of a GGUF file, for a base of some shape."""

    def __init__(self, path: Path, config: GPTConfig) -> None:
        """GptcError for another kind of file, or an adapter of another model."""
        self.path = path
        _, metadata, self._table = read_parts(path)
        kind = (metadata.get("general.type"), metadata.get("adapter.type"))
        if kind != ("adapter", "lora"):
            raise GptcError(f"{path} is a model, not an adapter (LoRA)")
        family = _family(config)
        if metadata.get("general.architecture") != family.gguf:
            raise GptcError(
                f"{path} is an adapter of the architecture {metadata.get('general.architecture')}, "
                f"and its base has {family.gguf}"
            )
        alpha = metadata.get(_ALPHA)
        if type(alpha) is not float or not np.isfinite(alpha):
            raise GptcError(f"{path}: {_ALPHA} is {alpha!r}; it must be a number")
        self.lora = self._settings(config, family, alpha)
        self._by_matrix: dict[str, list[Place]] = {}
        for place in _places(config, self.lora, family):
            self._by_matrix.setdefault(place.ours, []).append(place)
        self._check(config)

    def _settings(self, config: GPTConfig, family: Family, alpha: float) -> Lora:
        shapes = self._table.shapes
        first = [
            (place.target, shapes[_names(place)[0]])
            for place in _places(config, Lora(1, 1.0, adapters_of(config)), family)
            if place.ours.startswith("h.0.") and _names(place)[0] in shapes
        ]
        ranks = {shape[0] for _, shape in first}
        if len(ranks) != 1:
            raise GptcError(f"{self.path} has no adapters of one rank in the model's first layer")
        rank = ranks.pop()
        if not 1 <= rank <= peft.MOST_RANK:
            raise GptcError(f"{self.path} has adapters of rank {rank:,}, out of range")
        return Lora(rank, alpha or float(rank), tuple(target for target, _ in first))

    def _check(self, config: GPTConfig) -> None:
        inputs = {name: shape[-1] for name, shape, _ in config.parameters()}
        wanted: dict[str, tuple[int, ...]] = {}
        for place in (place for places in self._by_matrix.values() for place in places):
            a, b = _names(place)
            wanted[a] = (self.lora.rank, inputs[f"{place.ours}.weight"])
            wanted[b] = (place.b.stop - place.b.start, self.lora.rank)
        for name, shape in wanted.items():
            if self._table.shapes.get(name) != shape:
                raise GptcError(
                    f"{self.path}: {name} has the shape {self._table.shapes.get(name)}, its base "
                    f"needs {shape}: the adapter is of another model"
                )
        for name in self._table.shapes:
            if name not in wanted:
                raise GptcError(f"{self.path} holds {name}, which gptc does not compute")

    def read(self, name: str) -> FloatArray:
        """One of our parameters, such as "h.0.attn.qkv.lora_a"."""
        ours, _, kind = name.rpartition(".")
        found = []
        for place in self._by_matrix[ours]:
            values = self._table.read(_names(place)[kind == "lora_b"])
            if kind == "lora_b" and place.heads:
                values = layout.pairs_to_halves(values, place.heads)
            found.append(values)
        return np.concatenate(found)
