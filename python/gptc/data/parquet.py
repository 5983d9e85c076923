"""Parquet files of strangers: what a reader would allocate is checked first.

pyarrow unpacks a page of a column at once, as large as the page's header claims: up to 2 GiB from
a file of a few kB. So the headers are read here before, from the file's own list of columns.

https://github.com/apache/parquet-format: headers are structs of Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gptc.data.archives import BLOCK_BYTES, corrupt
from gptc.errors import GptcError
from gptc.files.limits import limit, refuse
from gptc.files.words import pip_install

_END_BYTES = 8  # the size of the list of contents, and a magic number
_UNPACKED, _PACKED = 2, 3  # fields of a page's header
_WINDOW_BYTES = 1 << 16  # that are read at once
_DEEPEST = 16  # structs in a header


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


def largest_page(file: Any, path: Path, name: str, column: str) -> int:
    """The bytes of the largest page of a column, unpacked. GptcError when it exceeds the limit."""
    largest, most = 0, limit("page")
    n_bytes = path.stat().st_size
    with path.open("rb") as stream:
        data = _Bytes(stream)
        for first, end in _chunks(file.metadata, column):
            at = first
            while at < min(end, n_bytes):
                try:
                    begin, sizes = _header(data, at)
                    unpacked, packed = sizes[_UNPACKED], sizes[_PACKED]
                except (IndexError, KeyError):
                    raise corrupt(name, f"damaged page at byte {at:,}") from None
                if packed < 0 or unpacked < 0:
                    raise corrupt(name, f"damaged page at byte {at:,}")
                if unpacked > most:
                    raise refuse(name, "page", "write it with smaller pages")
                largest, at = max(largest, unpacked), begin + packed
    return largest


class _Bytes:
    """The bytes of a file, by index. IndexError for one that it does not have."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._begin, self._window = 0, b""

    def __getitem__(self, at: int) -> int:
        if at < 0:
            raise IndexError
        if not 0 <= at - self._begin < len(self._window):
            self._file.seek(at)
            self._begin, self._window = at, self._file.read(_WINDOW_BYTES)
        return self._window[at - self._begin]


def _chunks(metadata: Any, column: str) -> Iterator[tuple[int, int]]:
    """Where the pages of a column begin and end, in each row group."""
    wanted = None
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        if wanted is None:
            paths = [row_group.column(i).path_in_schema for i in range(row_group.num_columns)]
            wanted = [i for i, path in enumerate(paths) if path.split(".")[0] == column]
        for i in wanted:
            chunk = row_group.column(i)
            first = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                first = min(first, chunk.dictionary_page_offset)
            yield first, first + chunk.total_compressed_size


def _header(data: _Bytes, at: int, depth: int = 0) -> tuple[int, dict[int, int]]:
    """The end of a struct, and its numbers by field. IndexError when it is damaged."""
    if depth > _DEEPEST:
        raise IndexError
    numbers: dict[int, int] = {}
    field = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            field, at = _number(data, at)
        if head & 15 in (4, 5, 6):  # whole numbers
            numbers[field], at = _number(data, at)
        else:
            at = _skipped(data, at, head & 15, depth)
    return at + 1, numbers


def _skipped(data: _Bytes, at: int, kind: int, depth: int) -> int:
    """The end of a value of another type. IndexError for one that no header of a page has."""
    if kind in (1, 2):  # true, false
        return at
    if kind == 3:
        return at + 1
    if kind == 7:
        return at + 8
    if kind == 8:  # bytes
        length, at = _varint(data, at)
        return at + length
    if kind == 12:
        return _header(data, at, depth + 1)[0]
    raise IndexError


def _number(data: _Bytes, at: int) -> tuple[int, int]:
    """A whole number in zigzag order, and its end."""
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: _Bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise IndexError
