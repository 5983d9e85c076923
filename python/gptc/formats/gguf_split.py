"""A GGUF model in several files, NAME-00001-of-00003.gguf: the first has the metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from gptc.engine.arrays import FloatArray
from gptc.errors import GptcError
from gptc.formats.binary import Binary
from gptc.formats.gguf_container import ALIGNMENT, read_header, read_metadata, read_tensors
from gptc.formats.gguf_names import split_experts
from gptc.formats.model_file import Entry, TensorTable, same_bytes
from gptc.formats.numbers import Bytes

_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"
_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Part(NamedTuple):
    """A file of a model."""

    file: Binary
    metadata: dict[str, Any]
    table: TensorTable


class SplitTable:
    """The tensors of several files by name."""

    def __init__(self, tables: list[TensorTable]) -> None:
        """GptcError when two files hold a tensor."""
        self._tables = {name: table for table in tables for name in table.entries}
        self.entries: dict[str, Entry] = {n: t.entries[n] for n, t in self._tables.items()}
        for table in tables:
            for name in table.entries:
                if self._tables[name] is not table:
                    raise GptcError(f"{table.file.path}: {name} is also in another part")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> FloatArray:
        """One tensor, as float32."""
        return self._tables[name].read(name)

    def blocks(self, name: str) -> Bytes:
        """The bytes of a tensor of blocks: (rows, bytes of a row)."""
        return self._tables[name].blocks(name)

    def stored(self, name: str) -> tuple[Binary, int] | None:
        """Where a tensor of float32 begins in its file; None for other numbers."""
        return self._tables[name].stored(name)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are stored as the same bytes."""
        found = [(self._tables[name].file, self.entries[name]) for name in (one, other)]
        return same_bytes(*found)


def read_parts(path: Path) -> tuple[Binary, dict[str, Any], TensorTable | SplitTable]:
    """The first file of a model, its metadata, and the tensors of all. `path` is any of them."""
    opened = _read(path)
    count = opened.metadata.get(_COUNT, 1)
    if type(count) is not int or count <= 1:
        return opened
    name = _NAME.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise GptcError(
            f"{path} is a part of a model in {count:,} files, and is not named as one, such as "
            f"NAME-00001-of-{count:05}.gguf: give it back its name, and all parts one folder"
        )
    parts = []
    for i in range(count):
        part_path = path.with_name(f"{name[1]}-{i + 1:05}-of-{name[3]}.gguf")
        if not part_path.is_file():
            raise GptcError(
                f"{path} is a part of a model in {count:,} files: {part_path} is missing; put all "
                "parts into one folder"
            )
        parts.append(_read(part_path))
        found = [parts[-1].metadata.get(key) for key in (_NUMBER, _COUNT)]
        if found != [i, count]:
            raise GptcError(f"{part_path}: {_NUMBER} and {_COUNT} are {found}, not {[i, count]}")
    tables = SplitTable([part.table for part in parts])
    promised = parts[0].metadata.get(_TENSORS, len(tables.entries))
    if promised != len(tables.entries):
        raise GptcError(
            f"{path}: {_TENSORS} is {promised!r}, and its parts hold {len(tables.entries):,}"
        )
    return parts[0].file, parts[0].metadata, tables


def _read(path: Path) -> Part:
    file = Binary(path)
    n_tensors, n_keys = read_header(file)
    metadata = read_metadata(file, n_keys)
    entries = read_tensors(file, n_tensors, _alignment(file, metadata))
    return Part(file, metadata, TensorTable(file, split_experts(entries)))


def _alignment(file: Binary, metadata: dict[str, Any]) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if type(found) is not int or not 1 <= found <= 1 << 20 or found & (found - 1):
        raise GptcError(f"{file.path}: general.alignment is {found!r}, not a power of two")
    return found
