"""Token shards in llm.c's format: a header of 256 int32, then uint16 or uint32 tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.data.options import MAX_SHARD_TOKENS
from gptc.errors import GptcError
from gptc.files.checksum import Checksum, file_checksum
from gptc.files.whole import write_file

Shard: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

HEADER_BYTES = 1024  # 256 int32
_Format: TypeAlias = tuple[int, int, np.dtype[np.unsignedinteger[Any]]]  # magic, version, token
_NARROW: _Format = (20240520, 1, np.dtype("<u2"))
_WIDE: _Format = (20240801, 7, np.dtype("<u4"))
_BLOCK_TOKENS = 1 << 17  # that are read at once
_MAX_CACHED_BYTES = 16 << 20  # of a shard that is written


def shard_format(vocab_size: int) -> _Format:
    return _NARROW if vocab_size <= 65536 else _WIDE


def _header(format: _Format, n_tokens: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = *format[:2], n_tokens
    return header.tobytes()


class ShardFile:
    """A shard while it is written: tokens are appended, and the header is completed at the end."""

    def __init__(self, path: Path, vocab_size: int, n_planned: int = 0) -> None:
        """`n_planned` tokens are expected: with other numbers the file is read again to sum it."""
        self.path = path
        self.n_tokens = 0
        self._n_planned = n_planned
        self._format = shard_format(vocab_size)
        self._n_cached = 0
        self._checksum = Checksum()
        header = _header(self._format, n_planned)
        self._checksum.update(header)
        self._file = path.open("wb")
        self._file.write(header)

    def append(self, tokens: npt.NDArray[np.integer[Any]]) -> None:
        """Writes tokens (n,)."""
        data = tokens.astype(self._format[2], copy=False).data
        self._file.write(data)
        self._checksum.update(data)
        self.n_tokens += len(tokens)
        self._n_cached += data.nbytes
        if self._n_cached >= _MAX_CACHED_BYTES:
            # Begins to write what is not on disk, and gives memory back where it is: a disk takes
            # in a file of any size faster than a kernel finds memory to cache it all.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._n_cached = 0

    def close(self) -> str:
        """Completes the file; returns its checksum."""
        with self._file as file:
            if self.n_tokens != self._n_planned:
                file.seek(0)
                file.write(_header(self._format, self.n_tokens))
        if self.n_tokens == self._n_planned:
            return self._checksum.value()
        return file_checksum(self.path)

    def abandon(self) -> None:
        """Closes a file that will not be completed; harmless after close."""
        with suppress(OSError):  # a full disk, which the first error names
            self._file.close()


def write_shard(path: Path, tokens: npt.ArrayLike, vocab_size: int) -> None:
    """Writes `tokens` (N,) as one shard, whole or not at all.

    GptcError when an id is outside [0, vocab_size), or when there are more than 2^31 - 1 tokens.
    """
    ids = np.asarray(tokens).reshape(-1)
    if len(ids) > MAX_SHARD_TOKENS:
        raise GptcError(f"{len(ids)} tokens are too many for one shard: write several")
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise GptcError(
            f"cannot write {path}: the tokens {ids.min()} to {ids.max()} do not fit a vocabulary "
            f"of {vocab_size}"
        )
    format = shard_format(vocab_size)
    write_file(
        Path(path), [_header(format, len(ids)), ids.astype(format[2], order="C", copy=False).data]
    )


def is_shard(path: Path) -> bool:
    """Whether a file begins as a shard does."""
    if not path.is_file():  # opening a pipe would wait for its writer
        return False
    with path.open("rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    return magic in (_NARROW[0], _WIDE[0])


def read_shard(path: Path) -> Shard:
    """The tokens of a shard, uint16 or uint32 (N,), read-only. See `open_shard` for parts of it.

    GptcError names the file and what is wrong with it.
    """
    shard = open_shard(Path(path))
    tokens = shard.read(0, shard.n_tokens)
    tokens.flags.writeable = False
    return tokens


class OpenShard(NamedTuple):
    """A shard whose header was checked. Tokens are read, not mapped: see formats/binary.py."""

    path: Path
    header: bytes
    dtype: np.dtype[np.unsignedinteger[Any]]
    n_tokens: int

    def read(self, begin: int, end: int) -> Shard:
        """The tokens [begin, end), which the shard has.

        GptcError if the file has become shorter.
        """
        out = np.empty(end - begin, self.dtype)
        data, at, done = out.view(np.uint8), HEADER_BYTES + begin * self.dtype.itemsize, 0
        try:
            file = os.open(self.path, os.O_RDONLY)  # a batch reads many short rows
            try:
                while done < out.nbytes and (n := os.preadv(file, [data[done:].data], at + done)):
                    done += n
            finally:
                os.close(file)
        except OSError as e:
            raise GptcError(f"cannot read the shard {self.path}: {e.strerror}") from None
        if done < out.nbytes:
            raise GptcError(
                f"the shard {self.path} became shorter while it was in use; prepare it again"
            )
        return out

    def blocks(self) -> Iterator[Shard]:
        """All tokens, in blocks."""
        for begin in range(0, self.n_tokens, _BLOCK_TOKENS):
            yield self.read(begin, min(begin + _BLOCK_TOKENS, self.n_tokens))

    def largest(self) -> int:
        """The largest token; -1 where there is none."""
        return max((int(tokens.max()) for tokens in self.blocks()), default=-1)

    def measured(self, algorithm: str) -> tuple[int, str]:
        """The largest token, or -1, and the checksum of the file, in one reading."""
        largest, checksum = -1, Checksum(algorithm)
        checksum.update(self.header)
        for tokens in self.blocks():
            largest = max(largest, int(tokens.max()))
            checksum.update(tokens.data)
        return largest, checksum.value()


def open_shard(path: Path) -> OpenShard:
    """A shard whose header is right. GptcError names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            n_bytes = os.fstat(file.fileno()).st_size
    except OSError as e:
        raise GptcError(f"cannot read the shard {path}: {e.strerror}") from None
    if len(header) < HEADER_BYTES:
        raise GptcError(f"{path} is not a token shard: it has {n_bytes} bytes, fewer than a header")
    magic, version, n_tokens = (int(n) for n in np.frombuffer(header, "<i4")[:3])
    formats = {known: (number, dtype) for known, number, dtype in (_NARROW, _WIDE)}
    if magic not in formats:
        raise GptcError(
            f"{path} is not a token shard: it begins with {magic}, not with {_NARROW[0]}"
        )
    number, dtype = formats[magic]
    if version != number:
        raise GptcError(f"{path} is a token shard of version {version}; only {number} is known")
    expected = HEADER_BYTES + n_tokens * dtype.itemsize
    if n_tokens < 0 or n_bytes != expected:
        raise GptcError(
            f"{path} is damaged: its header promises {n_tokens} tokens, {expected} bytes, and it "
            f"has {n_bytes} bytes: copy it again, or prepare the dataset again"
        )
    return OpenShard(path, header, dtype, n_tokens)
