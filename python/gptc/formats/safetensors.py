"""The safetensors container (https://github.com/huggingface/safetensors), in one file or several.

It is an 8-byte little-endian length, that many bytes of JSON (name to dtype, shape and offsets),
and the tensors. It is written here a tensor at a time, so that a checkpoint costs the memory of its
largest tensor and not a second copy of the model; NumPy has no bfloat16, which many published
models use, so it is widened here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptc.engine.arrays import FloatArray
from gptc.errors import GptcError
from gptc.files.values import check_size, parse_json
from gptc.formats.binary import Binary, is_plain_name, read_json
from gptc.formats.model_file import Entry, TensorTable, same_bytes
from gptc.formats.numbers import BF16, F16, F32, F64, Bytes, Codec, encoded

if TYPE_CHECKING:
    from typing import TypeGuard


INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # what the safetensors library allows


class _Whole(Codec):
    """Numbers that are not weights, such as masks: a file may hold them; they are not read."""

    def __init__(self, name: str, n_bytes: int) -> None:
        super().__init__(name)
        self.block_bytes = n_bytes

    def decode(self, raw: Bytes, shape: tuple[int, ...]) -> FloatArray:
        raise ValueError(f"it holds {self.name}, not floating-point numbers")


_OTHERS = {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_OTHERS |= {f"{kind}{8 * size}": size for kind in "IU" for size in (1, 2, 4, 8)}
_CODECS: dict[str, Codec] = {codec.name: codec for codec in (F32, F64, F16, BF16)}
_CODECS |= {name: _Whole(name, n_bytes) for name, n_bytes in _OTHERS.items()}


class TensorFile(TensorTable):
    """A safetensors file: `shapes` by name, and `read(name)` as float32."""

    def __init__(self, path: Path) -> None:
        """Reads the header; a damaged one is a GptcError."""
        self.path = path
        file = Binary(path)
        super().__init__(file, _read_header(file))


class ShardedTensors:
    """The tensors of several safetensors files, which an index lists."""

    def __init__(self, index: Path, optional: Collection[str] = ()) -> None:
        """GptcError when the index or a file is damaged, or when they contradict each other.

        The index may list the tensors of `optional` although no file holds them.
        """
        self.path = index
        found = read_json(index, unique=True).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(f, str) for f in found.values()):
            raise GptcError(f"{index}: weight_map is not a mapping from tensors to files")
        self._files = {
            name: TensorFile(_shard(index, name)) for name in sorted(set(found.values()))
        }
        self._file_of = {
            tensor: name
            for tensor, name in found.items()
            if tensor not in optional or tensor in self._files[name].entries
        }
        for tensor, name in self._file_of.items():
            if tensor not in self._files[name].entries:
                raise GptcError(f"{index}: weight_map places {tensor} in {name}, which lacks it")
        for name, file in self._files.items():
            for tensor in file.entries:
                if found.get(tensor) != name:
                    raise GptcError(f"{index}: weight_map does not list {tensor} of {name}")

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Where each tensor is in its file."""
        return {name: self._files[f].entries[name] for name, f in self._file_of.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> FloatArray:
        """One tensor, as float32."""
        return self._files[self._file_of[name]].read(name)

    def stored(self, name: str) -> tuple[Binary, int] | None:
        """Where a tensor of float32 begins in its file; None for other numbers."""
        return self._files[self._file_of[name]].stored(name)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are stored as the same bytes."""
        found = [(name, self._files[self._file_of[name]]) for name in (one, other)]
        return same_bytes(*[(file.file, file.entries[name]) for name, file in found])


def has_tensors(folder: Path) -> bool:
    """Whether a folder holds safetensors."""
    return (folder / "model.safetensors").is_file() or (folder / INDEX).is_file()


def open_tensors(
    folder: Path, optional: Collection[str] = ()
) -> TensorFile | ShardedTensors | None:
    """The weights of a Hugging Face folder; None where it holds no safetensors.

    `optional` as for ShardedTensors.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return TensorFile(single)
    return ShardedTensors(folder / INDEX, optional) if (folder / INDEX).is_file() else None


def tensor_chunks(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], FloatArray],
    codec: Codec = F32,
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file; each tensor is read when its turn comes."""
    # Readers of PyTorch models require this mark.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + codec.n_bytes(shape)
        header[name] = {"dtype": codec.name, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for name, shape in shapes.items():
        values = np.asarray(read(name), np.float32, order="C")
        assert values.shape == shape, name
        yield encoded(codec, values, name)
        del values  # before the next one is read: two may be too many


def _shard(index: Path, name: str) -> Path:
    """A file that an index names. It must be in the index's folder, or in the hub's cache.

    There, the folders of snapshots hold links into the folder of all contents.
    """
    folder = index.parent
    if not is_plain_name(name):
        raise GptcError(f"{index}: weight_map names {name!r}, which is not a plain file name")
    path = folder / name
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append((folder.parent.parent / "blobs").resolve())
    if path.is_symlink() and path.resolve().parent not in allowed:
        raise GptcError(f"{index}: {name} is a link that leads out of the folder; copy the file")
    return path


def _read_header(file: Binary) -> dict[str, Entry]:
    """The tensors of a file; they fill it from the header's end to its own without a gap."""
    path, size = file.path, file.size
    length = int.from_bytes(file.peek(0, 8), "little")
    if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise GptcError(
            f"{path} is not a whole safetensors file ({size:,} bytes, "
            f"and a header of {length:,} from byte 8 on)"
        )
    file.at = 8
    header = _parse_header(file, length)
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(file, name, entry, start) for name, entry in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].end)):
        if entry.offset != end:
            raise file.damaged(
                name, f"leaves a gap or overlaps: {end:,} ends the one before it", entry.offset
            )
        end = entry.end
    if end < size:
        raise file.damaged("the end of the tensors", f"is followed by {size - end:,} bytes", end)
    return entries


def _parse_header(file: Binary, length: int) -> dict[str, Any]:
    try:
        where = f"{file.path}: header at byte 8"
        check_size(length, where)
        header = parse_json(file.take(length, "header"), where, True)
    except GptcError as error:
        raise GptcError(f"{file.path} has a damaged safetensors header ({error})") from None
    if not isinstance(header, dict) or "" in header:
        raise GptcError(f"{file.path} has a damaged safetensors header: no names of tensors")
    return header


def _entry(file: Binary, name: str, entry: Any, start: int) -> Entry:
    """A tensor of the header, checked to be within the file."""

    def refuse(field: str, value: object) -> GptcError:
        return GptcError(
            f"{file.path} has a damaged safetensors header: {field} of {name} is {value!r}"
        )

    if not isinstance(entry, dict):
        raise refuse("the entry", entry)
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in _CODECS:
        raise refuse("dtype", kind)
    codec = _CODECS[kind]
    if not _sizes(shape) or len(shape) > 8:
        raise refuse("shape", shape)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("data_offsets", offsets)
    begin, end = offsets
    if start + end > file.size:
        raise GptcError(
            f"{file.path} is truncated: {start + end:,} bytes expected, {file.size:,} found "
            f"({name} ends there)"
        )
    if end - begin != math.prod(shape) * codec.block_bytes:
        raise GptcError(
            f"{file.path}: {name} at byte {start + begin:,} does not have the size of its shape "
            f"{tuple(shape)}"
        )
    return Entry(codec, tuple(shape), start + begin)


def _sizes(values: Any) -> TypeGuard[list[int]]:
    """Whether these are whole numbers that a file's sizes can be."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)
