"""What a file from a stranger may make this process hold or write: one table, and its override.

    GPTC_LIMITS="row=64M,window=2G" gptc prepare crawl.jsonl.zst --out data/crawl

Each reader asks `limit` before it allocates. Nothing here depends on what a file claims.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO, NamedTuple

from gptc.errors import GptcError, UsageError
from gptc.files.sizes import parse_size

VARIABLE = "GPTC_LIMITS"
_PIECE = 1 << 20  # bytes


class Limit(NamedTuple):
    """The largest value without an override; its unit and use."""

    default: int
    what: str


LIMITS = {
    "row": Limit(32 << 20, "bytes for a row of JSON, CSV or TSV, or a text in Parquet"),
    "fields": Limit(1_000_000, "values for a row: nested lists, columns"),
    "page": Limit(128 << 20, "bytes for an unpacked page of Parquet"),
    "window": Limit(256 << 20, "bytes for the window (dictionary) of a compressed file"),
    "header": Limit(1 << 20, "bytes for a header of a tar archive, or a configuration"),
    "directory": Limit(24 << 20, "bytes for the contents list of a zip archive or Parquet file"),
    "stream": Limit(1 << 40, "bytes for standard input, a pipe or a download"),
    "prompt": Limit(64 << 20, "bytes for a prompt"),
    "template": Limit(1 << 20, "bytes for a chat template"),
    # A prompt of as many tokens takes 36 times as much memory.
    "line": Limit(8 << 20, "bytes for a line of --prompts"),
    "pattern": Limit(128 << 10, "bytes for a regex, a grammar or a JSON schema"),
    "request": Limit(8 << 20, "bytes for a request to a server"),
    "values": Limit(500_000, "JSON values for a file of a model or dataset"),
    # A text with one emoji takes 4 times as much memory, and its strings again.
    "json": Limit(24 << 20, "bytes for JSON of a model or dataset"),
    "tokenizer": Limit(64 << 20, "bytes for a file of a tokenizer"),
    "entries": Limit(1 << 22, "JSON values for a file of a tokenizer"),
    "links": Limit(10_000, "followed links that leave a folder of sources"),
}


def limit(name: str) -> int:
    """The limit of that name in LIMITS, or in the variable GPTC_LIMITS.

    UsageError when the variable is not a list of names and sizes.
    """
    found = LIMITS[name].default
    for part in filter(None, os.environ.get(VARIABLE, "").split(",")):
        key, _, size = part.strip().partition("=")
        try:
            value = parse_size(size)
        except ValueError as error:
            raise UsageError(f"{VARIABLE}: {part!r}: {error}") from None
        if key not in LIMITS:
            raise UsageError(f"{VARIABLE}: {key!r} is not one of {', '.join(LIMITS)}")
        found = value if key == name else found
    return found


def refuse(where: str, name: str, advice: str) -> GptcError:
    """The error for a file that exceeds a limit."""
    return GptcError(
        f"{where} exceeds the limit of {limit(name):,} {LIMITS[name].what}: {advice}, or raise it "
        f"with {VARIABLE}={name}=SIZE"
    )


def read_any(file: IO[bytes], where: str, name: str) -> bytes:
    """The rest of an open file, which may be a pipe or a device."""
    most = limit(name)
    data = bytearray()  # grows with what there is: read(most) would take it all
    while len(data) <= most and (piece := file.read(min(_PIECE, most + 1 - len(data)))):
        data += piece
    if len(data) > most:
        raise refuse(where, name, "give a smaller one")
    return bytes(data)


def read_file(path: Path, name: str = "tokenizer", advice: str = "give a smaller file") -> bytes:
    """The content of a regular file. OSError when it cannot be read.

    GptcError for a device, a pipe, or more bytes than the limit `name`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit(name):
            raise refuse(str(path), name, advice)
        return file.read(size)


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, open. OSError when it cannot be, GptcError for a device or a pipe."""
    # A pipe would be waited for, and a device has no end.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISREG(mode):
        return file
    file.close()
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(21, "Is a directory", str(path))
    raise GptcError(f"{path} is not a regular file: copy its content to one")
