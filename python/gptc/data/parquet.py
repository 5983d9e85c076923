"""Parquet files of strangers: what a reader would allocate is checked first.

pyarrow unpacks a page of a column at once, as large as the page's header claims: up to 2 GiB from
a file of a few kB. So the headers are read here before. They are found by the file's list of
contents, which is read here too: pyarrow ends the process at some columns that contradict their
statistics, when it is asked where they begin.

https://github.com/apache/parquet-format: headers are structs of Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

from gptc.data.archives import BLOCK_BYTES, corrupt
from gptc.errors import GptcError
from gptc.files.limits import limit, refuse
from gptc.files.words import pip_install

_END_BYTES = 8  # the size of the list of contents, and a magic number
_DEEPEST = 16  # values inside each other
_WINDOW_BYTES = 1 << 16  # that are read at once


@contextmanager
def open_parquet(path: Path, name: str) -> Iterator[Any]:
    """The file, opened by pyarrow, whose errors become a GptcError within the block."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise GptcError(f"{name} needs a package: {pip_install('pyarrow')}") from None
    with path.open("rb") as stream:  # pyarrow cannot open each name
        n_bytes = stream.seek(0, 2)
        stream.seek(max(0, n_bytes - _END_BYTES))
        if int.from_bytes(stream.read(4), "little") > limit("directory") < n_bytes:
            raise refuse(name, "directory", "write it with fewer row groups or columns")
        stream.seek(0)
        try:
            yield pyarrow.parquet.ParquetFile(stream, buffer_size=BLOCK_BYTES)
        except (GptcError, MemoryError):
            raise
        except Exception as error:  # of many sorts, where a file is damaged
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise corrupt(name, why) from None


def largest_page(path: Path, name: str, column: str) -> int:
    """The bytes of the largest page of a column, unpacked. GptcError when it exceeds the limit."""
    largest, most = 0, limit("page")
    with path.open("rb") as stream:
        data = _Bytes(stream)
        for first, end in _pages(data, name, column):
            at = first
            while at < min(end, len(data)):
                page, begin = _read(data, at, name, _PAGE)
                unpacked, packed = page.get("unpacked", -1), page.get("packed", -1)
                if packed < 0 or unpacked < 0:
                    raise corrupt(name, f"damaged page at byte {at:,}")
                if unpacked > most:
                    raise refuse(name, "page", "write it with smaller pages")
                largest, at = max(largest, unpacked), begin + packed
    return largest


class _Bytes:
    """The bytes of a file, by index. IndexError for those that it does not have."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = file.seek(0, 2)
        self._begin, self._window = 0, b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, at: int) -> int:
        if at < 0:
            raise IndexError
        if not 0 <= at - self._begin < len(self._window):
            self._file.seek(at)
            self._begin, self._window = at, self._file.read(_WINDOW_BYTES)
        return self._window[at - self._begin]

    def cut(self, at: int, n: int) -> bytes:
        """`n` bytes, at most a window's."""
        if at < 0 or n > _WINDOW_BYTES:
            raise IndexError
        self._file.seek(at)
        found = self._file.read(n)
        if len(found) < n:
            raise IndexError
        return found


def _pages(data: _Bytes, name: str, column: str) -> Iterator[tuple[int, int]]:
    """Where the pages of a column begin and end, in each row group."""
    if len(data) < _END_BYTES:
        raise corrupt(name, "no list of contents")
    at = len(data) - _END_BYTES - int.from_bytes(data.cut(len(data) - _END_BYTES, 4), "little")
    contents, _ = _read(data, at, name, _CONTENTS)
    for group in contents.get("groups", ()):
        for chunk in group.get("columns", ()):
            found = chunk.get("about", {})
            if found.get("path", ())[:1] != [column.encode()]:
                continue
            first = found.get("data", -1)
            if found.get("dictionary", 0) > 0:
                first = min(first, found["dictionary"])
            if first < 0:
                raise corrupt(name, f"pages of {column} begin at byte {first:,}")
            yield first, first + found.get("n_bytes", 0)


# ---- Thrift's compact protocol ----

_Value: TypeAlias = Callable[[_Bytes, int, int], tuple[Any, int]]
"""Reads a value at a byte, which is so many values deep; returns it and its end."""
_Fields: TypeAlias = Mapping[int, tuple[str, int, _Value]]
"""The fields of a struct that are wanted, by number: their names, types and readers."""

_I32, _I64, _BYTES, _LIST, _STRUCT = 5, 6, 8, 9, 12


def _read(data: _Bytes, at: int, name: str, fields: _Fields) -> tuple[dict[str, Any], int]:
    """A struct and its end. GptcError when it is damaged."""
    try:
        if at < 0:
            raise IndexError
        return _struct(fields)(data, at, 0)
    except IndexError:
        raise corrupt(name, f"damaged header at byte {at:,}") from None


def _struct(fields: _Fields) -> _Value:
    def read(data: _Bytes, at: int, depth: int) -> tuple[dict[str, Any], int]:
        if depth > _DEEPEST:
            raise IndexError
        found: dict[str, Any] = {}
        number = 0
        while head := data[at]:
            at += 1
            if head >> 4:
                number += head >> 4
            else:
                number, at = _number(data, at, depth)
            field, kind, value = fields.get(number, ("", 0, _number))
            if head & 15 == kind:
                found[field], at = value(data, at, depth + 1)
            else:
                at = _skipped(data, at, head & 15, depth + 1)
        return found, at + 1

    return read


def _list(kind: int, value: _Value) -> _Value:
    def read(data: _Bytes, at: int, depth: int) -> tuple[list[Any], int]:
        n, inner, at = _length(data, at)
        if n and inner != kind:
            raise IndexError
        found = []
        for _ in range(n):
            item, at = value(data, at, depth + 1)
            found.append(item)
        return found, at

    return read


def _length(data: _Bytes, at: int) -> tuple[int, int, int]:
    """The number and type of a list's items, and where they begin."""
    n, inner = data[at] >> 4, data[at] & 15
    if n < 15:
        return n, inner, at + 1
    n, at = _varint(data, at + 1)
    return n, inner, at


def _bytes(data: _Bytes, at: int, depth: int) -> tuple[bytes, int]:
    n, at = _varint(data, at)
    return data.cut(at, n), at + n


def _number(data: _Bytes, at: int, depth: int) -> tuple[int, int]:
    """A whole number in zigzag order."""
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _skipped(data: _Bytes, at: int, kind: int, depth: int) -> int:
    """The end of a value of any type. IndexError for one that no file of Parquet has."""
    if depth > _DEEPEST:
        raise IndexError
    if kind in (1, 2):  # true, false
        return at
    if kind == 3:
        return at + 1
    if kind in (4, _I32, _I64):
        return _varint(data, at)[1]
    if kind == 7:
        return at + 8
    if kind == _BYTES:
        n, at = _varint(data, at)
        return at + n
    if kind == _LIST:
        n, inner, at = _length(data, at)
        for _ in range(n):
            at = at + 1 if inner in (1, 2) else _skipped(data, at, inner, depth + 1)
            if at > len(data):
                raise IndexError
        return at
    if kind == _STRUCT:
        return _struct({})(data, at, depth)[1]
    raise IndexError


def _varint(data: _Bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise IndexError


# Fields of parquet.thrift.
_COLUMN: _Fields = {
    3: ("path", _LIST, _list(_BYTES, _bytes)),
    7: ("n_bytes", _I64, _number),
    9: ("data", _I64, _number),
    11: ("dictionary", _I64, _number),
}
_CHUNK: _Fields = {3: ("about", _STRUCT, _struct(_COLUMN))}
_GROUP: _Fields = {1: ("columns", _LIST, _list(_STRUCT, _struct(_CHUNK)))}
_CONTENTS: _Fields = {4: ("groups", _LIST, _list(_STRUCT, _struct(_GROUP)))}
_PAGE: _Fields = {2: ("unpacked", _I32, _number), 3: ("packed", _I32, _number)}
