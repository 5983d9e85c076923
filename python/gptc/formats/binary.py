"""Files from strangers: mapped, and read within their bounds only.

Each number of a file is compared with the file's size before it is used, and an error
names the file, the field and its byte.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptc.errors import GptcError
from gptc.files.pointers import refuse_pointer
from gptc.files.values import parse_json

INT32 = "i"  # codes of `struct`, for Binary.number
UINT32 = "I"
UINT64 = "Q"


class Binary:
    """A file mapped into memory and read from `at` on; nothing is copied before it is used."""

    def __init__(self, path: Path) -> None:
        """GptcError when it cannot be read or is not a regular file."""
        self.path = path
        self.at = 0
        try:
            # A pipe or a device would be waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise GptcError(f"{path} is not a file; give the path of a model file")
                self.size = status.st_size
                data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if self.size else b""
            finally:
                os.close(descriptor)
        except OSError as error:
            raise GptcError(f"cannot read {path}: {error.strerror}") from None
        self.view = memoryview(data)
        refuse_pointer(path, self.view)

    def take(self, n_bytes: int, field: str) -> memoryview:
        """The next bytes. GptcError when the file ends before."""
        begin = self.at
        if n_bytes < 0 or n_bytes > self.size - begin:
            raise self.damaged(
                field, f"takes {n_bytes:,} bytes, and the file has {self.size - begin:,} more"
            )
        self.at = begin + n_bytes
        return self.view[begin : self.at]

    def number(self, code: str, field: str) -> Any:
        """The next number: `code` is a letter of the module struct."""
        return self.numbers(code, 1, field)[0]

    def numbers(self, code: str, count: int, field: str) -> tuple[Any, ...]:
        """The next `count` numbers."""
        layout = struct.Struct(f"<{count}{code}")
        return layout.unpack(self.take(layout.size, field))

    def skip_strings(self, count: int, field: str) -> None:
        """Skips strings that begin with their length as 8 bytes."""
        at, size, length = self.at, self.size, struct.Struct("<Q")
        for i in range(count):
            if at + 8 <= size:
                at += 8 + length.unpack_from(self.view, at)[0]
            if at > size or at == self.at:
                raise self.damaged(f"string {i} of {field}", "ends past the end of the file")
            self.at = at

    def raw(self, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes that were checked to be within the file."""
        return np.frombuffer(self.view[offset : offset + n_bytes], np.uint8)

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
    data = parse_json(Binary(path).view, str(path), unique)
    if not isinstance(data, dict):
        raise GptcError(f"{path} is damaged: not a JSON object; copy it again")
    return data


def is_plain_name(name: str) -> bool:
    """Whether a name from a file can only be that of a file in the same folder."""
    plain = name.isprintable() and "\\" not in name and len(name.encode()) < 256
    return plain and name not in ("", ".", "..") and Path(name).name == name
