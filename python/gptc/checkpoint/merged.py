"""Several adapters in a model that switches between them, and a base merged with one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np

from gptc.checkpoint.adapter import AdapterCheckpoint
from gptc.checkpoint.find import find_checkpoint, open_folder
from gptc.checkpoint.names import adapter_name
from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.engine.lora import Lora, adapters_of
from gptc.engine.model import Model
from gptc.errors import UsageError
from gptc.files.whole import restore
from gptc.formats import gguf_lora, peft
from gptc.formats.layout import Part, Placement, Tensors
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.base import Tokenizer


class Adapters(Protocol):
    """The numbers of adapters, in a folder of peft's or in a GGUF file."""

    lora: Lora

    def read(self, name: str, /) -> FloatArray: ...


def open_adapters(path: Path, base: ModelFile) -> Adapters:
    """The adapters in a folder or a GGUF file. GptcError where they are of another base."""
    if base.lora is not None:
        raise UsageError(f"{base.path} holds adapters itself: name the model that they are of")
    restore(path)
    if not path.exists() and not path.is_symlink():
        raise UsageError(
            f"the adapter {path} does not exist: check the path; gptc finetune --out makes one"
        )
    if gguf_lora.is_adapter(path):
        return gguf_lora.GgufAdapter(path, base.config)
    file = open_folder(find_checkpoint(path), base)
    if not isinstance(file, AdapterCheckpoint):
        raise UsageError(f"{path} is a model, not an adapter: it has no {peft.CONFIG}")
    return file


class AdapterSet:
    """Adapters by name. A model computes with one of them, or with none."""

    def __init__(
        self, base: ModelFile, folders: Sequence[str | Path], names: Sequence[str | None] = ()
    ) -> None:
        """Opens them; GptcError where one is of another base. Without a name: `adapter_name`."""
        self._files: dict[str, Adapters] = {}
        for path, given in zip_longest(folders, names):
            folder = Path(path)
            file = open_adapters(folder, base)
            name = given or adapter_name(folder)
            if name in self._files:
                raise UsageError(f"two adapters are named {name}: give one as NAME=PATH")
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
        if len({lora.dora for lora in each}) > 1:
            raise UsageError(
                f"{', '.join(self.names)}: a model switches between adapters with DoRA, or between "
                "others; merge some of them with gptc export --merge"
            )
        return Lora(rank, float(rank), tuple(t for t in known if t in targets), dora=each[0].dora)

    def tokenizer(self, base: Tokenizer, *names: str) -> Tokenizer:
        """The tokenizer that was trained with the first adapter, or the first of `names`.

        It tells of the chat template and the ends that the adapter was taught. That of `base` for
        an adapter without one, or with another vocabulary.
        """
        file = self._files[(names or self.names)[0]]
        if not isinstance(file, AdapterCheckpoint) or not file.has_tokenizer:
            return base
        own = file.tokenizer()
        return own if own.fingerprint() == base.fingerprint() else base

    def talking(self, base: Tokenizer) -> Tokenizer:
        """The tokenizer of the base, or of the first adapter where only that has a template."""
        own = [base, *(self.tokenizer(base, name) for name in self.names)]
        return next((one for one in own if one.marks.templates), base)

    def use(self, model: Model, name: str | None) -> None:
        """Lets a model of `self.lora` compute with an adapter, or with none.

        UsageError for an unknown name. What sessions hold is of the adapter before.
        """
        if name is not None and name not in self._files:
            raise UsageError(f"adapter is {name!r}; it must be one of {', '.join(self.names)}")
        file = None if name is None else self._files[name]
        given = {} if file is None else _numbers(file, self._config)  # before anything is changed
        values = {p.name: np.zeros(p.shape, np.float32) for p in model.trained}
        if self.lora.dora:
            model.init_adapters(0)
            values |= {ours: model.get(ours) for ours in values if ours.endswith(".lora_m")}
        if file is not None:
            self._fill(values, file.lora, given)
        for ours, array in values.items():
            model.set(ours, array)

    def _fill(
        self, values: dict[str, FloatArray], lora: Lora, given: dict[str, FloatArray]
    ) -> None:
        room = {(p.ours, p.target): p for p in peft.places(self._config, self.lora)}
        scale, rank = np.float32(lora.scale), lora.rank
        for place in peft.places(self._config, lora):
            to = room[place.ours, place.target]
            a, b = (given[f"{place.ours}.lora_{kind}"] for kind in "ab")
            values[f"{place.ours}.lora_a"][to.a][:rank] = a[place.a]
            values[f"{place.ours}.lora_b"][to.b, :rank] = scale * b[place.b]
            if lora.dora:
                values[f"{place.ours}.lora_m"][to.b] = given[f"{place.ours}.lora_m"][place.b]


def _numbers(file: Adapters, config: GPTConfig) -> dict[str, FloatArray]:
    """All numbers of adapters by name."""
    return {p.name: file.read(p.name) for p in file.lora.parameters(config)}


class MergedModel(ModelFile):
    """A base whose matrices have the adapters' products added."""

    def __init__(self, path: Path, base: ModelFile, adapters: Adapters) -> None:
        self.path, self.config, self.format = path, base.config, base.format
        self._base, self._adapters = base, adapters
        self._places: dict[str, list[peft.Place]] = {}
        for place in peft.places(base.config, adapters.lora):
            self._places.setdefault(f"{place.ours}.weight", []).append(place)

    @property
    def tensors(self) -> Tensors:
        return self._base.tensors

    def parts(self) -> list[Part]:
        return self._base.parts()

    @cached_property
    def placement(self) -> Placement:
        return self._base.placement

    def tokenizer(self) -> Tokenizer:
        return self._base.tokenizer()

    def read(self, name: str) -> FloatArray:
        values, places = self._base.read(name), self._places.get(name, ())
        if places:
            values = values.copy()
        for place in places:
            a, b = (self._adapters.read(f"{place.ours}.lora_{kind}") for kind in "ab")
            rows = values[place.weight]
            rows += np.float32(self._adapters.lora.scale) * (b[place.b] @ a[place.a])
            if self._adapters.lora.dora:
                lengths = np.linalg.norm(rows, axis=1)
                m = self._adapters.read(f"{place.ours}.lora_m")[place.b]
                rows *= np.divide(m, lengths, out=np.zeros_like(m), where=lengths > 0)[:, None]
        return values

    def load_into(self, model: Model) -> None:
        for name, _, _ in self.config.parameters():
            model.set(name, self.read(name))


def parse_adapters(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The paths and names of `NAME=PATH`, or of paths alone, which may have a = in them."""
    paths: list[Path] = []
    names: list[str] = []
    for text in given:
        name, sign, path = text.partition("=")
        named = bool(sign and name and path) and not Path(text).exists()
        paths.append(Path(path if named else text))
        names.append(name if named else adapter_name(paths[-1]))
    return paths, names


def adapted(file: ModelFile, adapter: str | Path | None) -> tuple[ModelFile, Adapters | None]:
    """A model, and its adapters: those at `adapter`, or the ones that `file` has with its base."""
    if adapter is not None:
        return file, open_adapters(Path(adapter), file)
    return (file.base, file) if isinstance(file, AdapterCheckpoint) else (file, None)


def merged(file: ModelFile, adapter: str | Path | None = None) -> MergedModel:
    """A base with its adapters added. UsageError for a model without any."""
    base, adapters = adapted(file, adapter)
    if adapters is None:
        raise UsageError(f"{file.path} has no adapters to merge: leave out --merge")
    return MergedModel(file.path, base, adapters)
