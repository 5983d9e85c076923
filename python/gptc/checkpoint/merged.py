"""Several adapters in a model that switches between them, and a base merged with one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from gptc.checkpoint.adapter import AdapterCheckpoint
from gptc.checkpoint.find import open_folder
from gptc.engine.arrays import FloatArray
from gptc.engine.lora import Lora, adapters_of
from gptc.engine.model import Model
from gptc.errors import GptcError, UsageError
from gptc.formats import peft
from gptc.formats.layout import Part, Placement, Tensors
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.base import Tokenizer


class AdapterSet:
    """Adapters by the names of their folders. A model computes with one of them, or with none."""

    def __init__(self, base: ModelFile, folders: Sequence[str | Path]) -> None:
        """Opens them; GptcError where one is of another base."""
        self._files: dict[str, AdapterCheckpoint] = {}
        for folder in map(Path, folders):
            file = open_folder(folder, base)
            if not isinstance(file, AdapterCheckpoint):
                raise UsageError(f"{folder} is a model, not an adapter: it has no {peft.CONFIG}")
            name = folder.resolve().name
            if name in self._files:
                raise UsageError(f"two adapters are named {name}: give their folders other names")
            self._files[name] = file
        self._config = base.config

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    @cached_property
    def lora(self) -> Lora:
        """Adapters that have room for each of these; their scale is 1."""
        each = [file.lora for file in self._files.values()]
        rank = max(lora.rank for lora in each)
        targets = {target for lora in each for target in lora.targets}
        known = adapters_of(self._config)
        return Lora(rank, float(rank), tuple(t for t in known if t in targets))

    def use(self, model: Model, name: str | None) -> None:
        """Lets a model of `self.lora` compute with an adapter, or with none.

        UsageError for an unknown name. What sessions hold is of the adapter before.
        """
        if name is not None and name not in self._files:
            raise UsageError(f"adapter is {name!r}; it must be one of {', '.join(self.names)}")
        values = {p.name: np.zeros(p.shape, np.float32) for p in model.trained}
        if name is not None:
            self._fill(values, self._files[name])
        for ours, array in values.items():
            model.set(ours, array)

    def _fill(self, values: dict[str, FloatArray], file: AdapterCheckpoint) -> None:
        room = {(p.ours, p.target): p for p in peft.places(self._config, self.lora)}
        scale, rank = np.float32(file.lora.scale), file.lora.rank
        for place in peft.places(self._config, file.lora):
            to = room[place.ours, place.target]
            a, b = (file.read(f"{place.ours}.lora_{kind}") for kind in "ab")
            values[f"{place.ours}.lora_a"][to.a][:rank] = a[place.a]
            values[f"{place.ours}.lora_b"][to.b, :rank] = scale * b[place.b]


class MergedModel(ModelFile):
    """A base whose matrices have the adapters' products added."""

    def __init__(self, file: AdapterCheckpoint) -> None:
        self.path, self.config, self.format = file.path, file.config, file.base.format
        self._file = file
        self._places: dict[str, list[peft.Place]] = {}
        for place in peft.places(file.config, file.lora):
            self._places.setdefault(f"{place.ours}.weight", []).append(place)

    @property
    def tensors(self) -> Tensors:
        return self._file.tensors

    def parts(self) -> list[Part]:
        return self._file.parts()

    @cached_property
    def placement(self) -> Placement:
        return self._file.placement

    def tokenizer(self) -> Tokenizer:
        return self._file.tokenizer()

    def read(self, name: str) -> FloatArray:
        values = self._file.base.read(name)
        for place in self._places.get(name, ()):
            if place is self._places[name][0]:
                values = values.copy()
            a, b = (self._file.read(f"{place.ours}.lora_{kind}") for kind in "ab")
            values[place.weight] += np.float32(self._file.lora.scale) * (b[place.b] @ a[place.a])
        return values

    def load_into(self, model: Model) -> None:
        for name, _, _ in self.config.parameters():
            model.set(name, self.read(name))


def merged(file: ModelFile) -> MergedModel:
    """A base with its adapters added. GptcError for a model without any."""
    if not isinstance(file, AdapterCheckpoint):
        raise GptcError(f"{file.path} has no adapters to merge: leave out --merge")
    return MergedModel(file)
