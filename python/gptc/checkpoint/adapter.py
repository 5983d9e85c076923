"""A checkpoint of adapters: a folder of peft's, whose base is another model.

adapter_config.json        rank, targets, and the base's path, as peft has them
adapter_model.safetensors  the adapters
base.json                  the base's fingerprint
gptc_tokenizer.json, trainer.json, optimizer.safetensors, checksums.json: as in reader.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from gptc.checkpoint.names import ADAPTER, ADAPTER_WEIGHTS, BASE, logger
from gptc.checkpoint.reader import Checkpoint, read_json_object
from gptc.checkpoint.writer import MoreState, write_folder
from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig, Parameter
from gptc.engine.lora import Lora
from gptc.engine.model import Model
from gptc.engine.options import BlockRows
from gptc.engine.snapshot import Snapshot
from gptc.errors import GptcError
from gptc.formats import peft
from gptc.formats.layout import Part, Placement, Tensors
from gptc.formats.model_file import ModelFile, name_base
from gptc.formats.numbers import F32
from gptc.formats.safetensors import tensor_chunks
from gptc.tokenizer.base import FILE_NAME, Tokenizer

_SMALL = 1 << 16  # numbers of a parameter that is part of a fingerprint


class AdapterCheckpoint(Checkpoint):
    """The base model with adapters: its parameters, then theirs."""

    lora: Lora

    def __init__(self, path: Path, base: ModelFile) -> None:
        self.path, self.base = path, base
        if base.lora is not None:
            raise GptcError(f"{path} is an adapter of {base.path}, which is an adapter itself")
        self.config: GPTConfig = base.config
        self._open(ADAPTER)
        self._adapters = peft.AdapterFile(path, base.config)
        self.lora = self._adapters.lora
        self._check_base()

    def _check_base(self) -> None:
        """Notes a base that is another than the adapters were trained with."""
        file = self.path / BASE
        if not file.is_file():
            return
        self._verify(BASE)
        if read_json_object(file).get("fingerprint") != fingerprint(self.base):
            logger.warning(
                "warning: %s was trained with another model than %s: its results will differ",
                self.path,
                self.base.path,
            )

    @property
    def tensors(self) -> Tensors:  # type: ignore[override]
        return self.base.tensors

    def parts(self) -> list[Part]:
        return self.base.parts()

    @property
    def placement(self) -> Placement:
        return self.base.placement

    @cached_property
    def _weights_are_whole(self) -> bool:
        self._verify(ADAPTER_WEIGHTS)
        return True

    def trained(self) -> tuple[Parameter, ...]:
        return self.lora.parameters(self.config)

    def packing(self) -> tuple[BlockRows, ...]:
        return self.base.packing()

    def read(self, name: str) -> FloatArray:
        if ".lora_" not in name:
            return self.base.read(name)
        _ = self._weights_are_whole
        return self._adapters.read(name)

    def load_into(self, model: Model) -> None:
        """Gives the base's weights and the adapters to a model."""
        self.base.load_into(model)
        for parameter in self.trained():
            model.set(parameter.name, self.read(parameter.name))

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved with the adapters."""
        return (self.path / FILE_NAME).is_file()

    def tokenizer(self) -> Tokenizer:
        return super().tokenizer() if self.has_tokenizer else self.base.tokenizer()

    def check(self) -> list[str]:
        found = [f"{name}: its checksum is right" for name in self.verify()]
        self._adapters.check()
        found.append(f"{len(self._adapters.tensors.shapes)} tensors, every number finite")
        return [*found, *self._check_moments()]


def fingerprint(file: ModelFile) -> str:
    """What tells a model from others of its shape: a hash of its config and of some weights."""
    digest = hashlib.sha256(json.dumps(file.config.to_dict(), sort_keys=True).encode())
    for name, shape, _ in file.config.parameters():
        size = shape[0] * (shape[1] if len(shape) == 2 else 1)
        if size <= _SMALL or name == "h.0.attn.qkv.weight":
            digest.update(file.read(name).astype("<f4").tobytes())
    return digest.hexdigest()


def save_adapter(
    path: str | Path,
    model: Model | Snapshot,
    base: ModelFile,
    *,
    tokenizer: Tokenizer | None = None,
    trainer: Mapping[str, Any] | None = None,
    replace: bool = False,
    own: Mapping[str, FloatArray] | None = None,
    more: MoreState | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Writes the adapters of a model as a folder; as `save`, it appears whole or not at all."""
    lora = model.options.lora
    if lora is None:
        raise GptcError(f"cannot save {path}: the model has no adapters")
    name = str(base.path.resolve()) if base.path.exists() else str(base.path)
    origin = {"path": name, "fingerprint": fingerprint(base)}

    def files() -> Iterator[tuple[str, Any]]:
        yield ADAPTER, _json(peft.config_to_json(model.config, lora, name))
        yield BASE, _json(origin)
        shapes = peft.tensor_shapes(model.config, lora)
        read = peft.tensor_reader(model.config, lora, model.get)
        yield ADAPTER_WEIGHTS, tensor_chunks(shapes, read, F32)

    also: dict[str, Any] = {"trainer": trainer, "replace": replace, "own": own, "more": more}
    write_folder(path, model, files, tokenizer=tokenizer, check=check, **also)


def _json(data: Mapping[str, Any]) -> list[bytes]:
    return [(json.dumps(data, indent=2) + "\n").encode()]


def missing_base(folder: Path, base: str) -> GptcError:
    """The error about an adapter whose base is not where it says."""
    return GptcError(f"{folder} is an adapter of {base}, which is not there: {name_base(folder)}")
