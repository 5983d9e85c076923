"""Model files of other programs, and the safetensors container that they and checkpoints share.

The container is an 8-byte little-endian length, that many bytes of JSON (name to dtype, shape and
offsets), and the tensors. It is read and written here a tensor at a time, so that a checkpoint
costs the memory of its largest tensor and not a second copy of the model; NumPy has no bfloat16,
which many published models use, so it is widened here too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptc.errors import GptcError

FloatArray = npt.NDArray[np.float32]

_DTYPES = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}
_MAX_HEADER = 100_000_000  # what the safetensors library allows


class TensorFile:
    """A safetensors file: `shapes` by name, and `read(name)` as float32."""

    def __init__(self, path: Path) -> None:
        """Reads the header; a damaged one is a GptcError."""
        self.path = path
        self._start, self._header = _read_header(path)
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    def read(self, name: str) -> FloatArray:
        """One tensor, widened or narrowed to float32."""
        entry = self._header[name]
        kind = entry["dtype"]
        if kind not in _DTYPES:
            raise GptcError(f"{self.path}: {name} holds {kind}, not floating-point numbers")
        begin, end = entry["data_offsets"]
        shape = self.shapes[name]
        dtype = np.dtype(_DTYPES[kind])
        count = int(np.prod(shape, dtype=np.int64))
        if end - begin != count * dtype.itemsize:
            raise GptcError(f"{self.path}: {name} does not have the size of its shape {shape}")
        values = np.fromfile(self.path, dtype, count, offset=self._start + begin).reshape(shape)
        if kind == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False)


def tensor_chunks(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], FloatArray]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of float32 tensors; each is read when its turn comes."""
    # Readers of PyTorch models ask for this mark.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for name, shape in shapes.items():
        values = np.asarray(read(name), "<f4", order="C")
        assert values.shape == shape, name
        yield values.reshape(-1).view(np.uint8).data
        del values  # before the next one is read: two may be too many


def _read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the tensors start, and the header; every offset lies within the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise GptcError(f"{path} is not a whole safetensors file ({size:,} bytes)")
        text = file.read(length)
    start = 8 + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for entry in header.values():
            begin, end = entry["data_offsets"]
            if not (isinstance(entry["dtype"], str) and 0 <= begin <= end):
                raise ValueError
            if any(type(n) is not int or n < 0 for n in [*entry["shape"], begin, end]):
                raise ValueError
            if start + end > size:
                raise GptcError(
                    f"{path} is truncated: {start + end:,} bytes expected, {size:,} found"
                )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise GptcError(f"{path} has a damaged safetensors header") from None
    return start, header
