"""Weights in PyTorch's pickles, by `torch.load(weights_only=True)`, which runs no code of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.errors import GptcError
from gptc.files.words import pip_install
from gptc.formats.binary import is_plain_name, read_json

WEIGHTS, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MOST_TIMES = 2  # the bytes of a file: an embedding may be the head, too


class PickledTensors:
    """The tensors of a state dictionary of PyTorch, mapped from the file if it can be."""

    def __init__(self, path: Path, found: Mapping[Any, Any], files: Sequence[Path] = ()) -> None:
        """The tensors of `files`, or of the one at `path`.

        GptcError when there are other values than tensors, or tensors that are larger than the
        files: one number may be a tensor of any size, with strides of 0.
        """
        if not all(isinstance(n, str) and hasattr(t, "shape") for n, t in found.items()):
            raise GptcError(f"{path} holds more than tensors")
        n_stored = sum(file.stat().st_size for file in files or (path,))
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        if n_bytes > _MOST_TIMES * n_stored:
            raise GptcError(
                f"{path}: its tensors have {n_bytes:,} bytes, and the file {n_stored:,}: save them "
                "whole, with contiguous()"
            )
        self.path = path
        self._found = found
        self.shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}

    def read(self, name: str) -> FloatArray:
        """One tensor, as float32."""
        try:
            return np.asarray(self._found[name].detach().float().numpy())
        except (RuntimeError, TypeError, NotImplementedError) as error:
            why = str(error).splitlines()[0]
            raise GptcError(
                f"{self.path}: {name} is not a plain tensor ({why:.200}): save it as one"
            ) from None

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
    names = sorted(set(weight_map.values()))
    for name in names:
        found |= load(folder / name)
    for tensor, name in weight_map.items():
        if tensor not in found and tensor not in optional:
            raise GptcError(f"{index}: weight_map places {tensor} in {name}, which lacks it")
    return PickledTensors(index, found, [folder / name for name in names])


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
