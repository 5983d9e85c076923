"""Files from strangers, read within their bounds only.

Each number of a file is compared with the file's size before it is used, and an error
names the file, the field and its byte. Files are not mapped: one that becomes shorter while it is
read would end the process.
"""

from __future__ import annotations

import os
import stat
import struct
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptc.errors import GptcError, Uncopied
from gptc.files.pointers import refuse_pointer
from gptc.files.values import check_size, parse_json

INT32 = "i"  # codes of `struct`, for Binary.number
UINT32 = "I"
UINT64 = "Q"
_WINDOW = 1 << 16  # bytes read at once, of which small fields are taken


@lru_cache(maxsize=64)
def _layout(code: str, count: int) -> struct.Struct:
    return struct.Struct(f"<{count}{code}")


class Binary(Uncopied):
    """An open file, read from `at` on. Garbage collection closes it."""

    def __init__(self, path: Path) -> None:
        """GptcError when it cannot be read or is not a regular file."""
        self.path = path
        self.at = 0
        try:
            # A pipe or a device would be waited for.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            weakref.finalize(self, os.close, self.descriptor)
            status = os.fstat(self.descriptor)
        except OSError as error:
            raise GptcError(f"cannot read {path}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise GptcError(f"{path} is not a file; give the path of a model file")
        self.size = status.st_size
        self._window = (0, memoryview(b""), 0)  # between its first and last byte in the file
        refuse_pointer(path, self.peek(0, _WINDOW))

    def take(self, n_bytes: int, field: str) -> memoryview:
        """The next bytes. GptcError when the file ends before."""
        begin = self.at
        self.skip(n_bytes, field)
        return self.peek(begin, self.at)

    def skip(self, n_bytes: int, field: str) -> None:
        """Passes over the next bytes. GptcError when the file ends before."""
        if n_bytes < 0 or n_bytes > self.size - self.at:
            raise self.damaged(
                field, f"takes {n_bytes:,} bytes, and the file has {self.size - self.at:,} more"
            )
        self.at += n_bytes

    def peek(self, begin: int, end: int) -> memoryview:
        """Bytes begin to end, as far as the file has them."""
        if end > self.size:
            end = self.size
        if end - begin > _WINDOW:
            return self.raw(begin, end - begin).data
        first, window, last = self._window
        if not first <= begin <= end <= last:
            first, window = begin, self.raw(begin, min(_WINDOW, self.size - begin)).data
            self._window = first, window, first + len(window)
        return window[begin - first : end - first]

    def ahead(self) -> memoryview:
        """The next bytes that are in memory; some, where the file has more."""
        self.peek(self.at, min(self.at + 1, self.size))
        first, window, _ = self._window
        return window[self.at - first :]

    def number(self, code: str, field: str) -> Any:
        """The next number: `code` is a letter of the module struct."""
        return self.numbers(code, 1, field)[0]

    def numbers(self, code: str, count: int, field: str) -> tuple[Any, ...]:
        """The next `count` numbers."""
        layout = _layout(code, count)
        return layout.unpack(self.take(layout.size, field))

    def skip_strings(self, count: int, field: str) -> None:
        """Skips strings that begin with their length as 8 bytes."""
        at, size, length_at = self.at, self.size, struct.Struct("<Q").unpack_from
        first, window, last = self._window
        for i in range(count):
            self.at = at
            if not first <= at <= last - 8:
                if at > size - 8:
                    raise self.damaged(f"string {i} of {field}", "ends past the end of the file")
                self.peek(at, at + 8)
                first, window, last = self._window
            at += 8 + length_at(window, at - first)[0]
            if at > size:
                raise self.damaged(f"string {i} of {field}", "ends past the end of the file")
        self.at = at

    def raw(self, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes that were checked to be within the file. GptcError if it has become shorter."""
        out = np.empty(n_bytes, np.uint8)
        done = 0
        while done < n_bytes:
            try:
                n = os.preadv(self.descriptor, [out.data[done:]], offset + done)
            except OSError as error:
                raise GptcError(f"cannot read {self.path}: {error.strerror}") from None
            if n == 0:
                raise GptcError(
                    f"{self.path} became shorter while it was read, and has no byte "
                    f"{offset + done:,} now; copy the file again"
                )
            done += n
        out.flags.writeable = False
        return out

    def damaged(self, field: str, why: str, offset: int | None = None) -> GptcError:
        """The error about a field, at `offset` or else at the current position."""
        at = self.at if offset is None else offset
        return GptcError(f"{self.path}: {field} at byte {at:,} {why}; copy the file again")

    def unknown(self, field: str, why: str, offset: int) -> GptcError:
        """The error about a field of a file that may be whole, and that gptc does not read."""
        return GptcError(f"{self.path}: {field} at byte {offset:,} {why}")

    def within(self, field: str, value: int, least: int, most: int, offset: int) -> int:
        """`value`. GptcError when it is out of range."""
        if not least <= value <= most:
            why = f"is {value:,}; it must be between {least:,} and {most:,}"
            raise self.damaged(field, why, offset)
        return value

    def end(self) -> None:
        """GptcError when there is more in the file than was read."""
        if self.at != self.size:
            raise self.damaged("the end", f"is followed by {self.size - self.at:,} bytes more")


def read_json(path: Path, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file."""
    file = Binary(path)
    check_size(file.size, str(path))
    data = parse_json(file.peek(0, file.size), str(path), unique)
    if not isinstance(data, dict):
        raise GptcError(f"{path} is damaged: not a JSON object; copy it again")
    return data


def is_plain_name(name: str) -> bool:
    """Whether a name from a file can only be that of a file in the same folder."""
    plain = name.isprintable() and "\\" not in name and len(name.encode()) < 256
    return plain and name not in ("", ".", "..") and Path(name).name == name
