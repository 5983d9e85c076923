"""Weights in PyTorch's pickles, by `torch.load(weights_only=True)`, which runs no code of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.errors import GptcError
from gptc.files.words import pip_install
from gptc.formats.binary import is_plain_name, read_json

WEIGHTS, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PickledTensors:
    """The tensors of a state dictionary of PyTorch, mapped from the file if it can be."""

    def __init__(self, path: Path, found: Mapping[Any, Any]) -> None:
        """GptcError when there are other values than tensors."""
        if not all(isinstance(n, str) and hasattr(t, "shape") for n, t in found.items()):
            raise GptcError(f"{path} holds more than tensors")
        self.path = path
        self._found = found
        self.shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}

    def read(self, name: str) -> FloatArray:
        """One tensor, as float32."""
        return np.asarray(self._found[name].float().numpy())

    def stored(self, name: str) -> None:
        """No tensor is read in place."""

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        return np.array_equal(self.read(one), self.read(other))


def has_tensors(folder: Path) -> bool:
    """Whether a folder holds such weights."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def is_available() -> bool:
    """Whether PyTorch is installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def open_tensors(folder: Path, optional: Collection[str] = ()) -> PickledTensors | None:
    """The weights of a Hugging Face folder, in one file or several; None where there are none.

    An index may list the tensors of `optional` although no file holds them.
    """
    if (folder / WEIGHTS).is_file():
        return PickledTensors(folder / WEIGHTS, load(folder / WEIGHTS))
    index = folder / INDEX
    if not index.is_file():
        return None
    weight_map = read_json(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise GptcError(f"{index}: weight_map is not a mapping from tensors to files")
    found: dict[Any, Any] = {}
    for name in sorted(set(weight_map.values())):
        found |= load(folder / name)
    for tensor, name in weight_map.items():
        if tensor not in found and tensor not in optional:
            raise GptcError(f"{index}: weight_map places {tensor} in {name}, which lacks it")
    return PickledTensors(index, found)


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and is_plain_name(name)


def load(path: Path) -> dict[Any, Any]:
    """The dictionary in a file: tensors and plain values."""
    try:
        import torch
    except ImportError:
        raise GptcError(
            f"{path} is a pickle, which only PyTorch reads safely: {pip_install('torch')}, or "
            "convert it where PyTorch is"
        ) from None
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"  # only PyTorch's newer files can be mapped
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # whatever a damaged archive makes PyTorch raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise GptcError(f"{path}: PyTorch does not load it ({lines[0][:200]})") from None
    if not isinstance(saved, dict):
        raise GptcError(f"{path} does not hold a dictionary of tensors")
    return saved
