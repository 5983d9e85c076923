"""Files of any format as bytes: unpacked, and with rows and members told apart as documents.

`members` is the entry point. A file's name tells its format: compressed (.gz .bz2 .xz .zst),
an archive (.zip .tar and its compressed forms), rows with a field of text (.jsonl .ndjson .csv
.tsv .parquet), else the bytes themselves. Nothing is ever held whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

from gptc.data import archives
from gptc.data.archives import COMPRESSED, file_blocks
from gptc.data.choice import Choice
from gptc.data.options import Errors
from gptc.data.rows import Tally, csv_rows, json_rows, parquet_rows, tsv_rows
from gptc.errors import GptcError
from gptc.files.pointers import refuse_pointer
from gptc.tokenizer.base import END_OF_TEXT

Member: TypeAlias = tuple[str, Iterator[bytes]]
"""The name of a document or a file of rows, and its bytes in blocks."""

VERSION = 3
"""Raised with each change of the text that a file gives, so that cached datasets are not reused."""

_TARS = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
_JSON = (".jsonl", ".ndjson")
_ROWS = (*_JSON, ".csv", ".tsv", ".parquet")
_ARCHIVES = (".tar", ".zip")
_ROW_READERS = {".jsonl": json_rows, ".ndjson": json_rows, ".csv": csv_rows, ".tsv": tsv_rows}
_MARK = END_OF_TEXT.encode()

_BEGIN_BYTES = 64
# How files begin. LZMA's older format is one of .xz too, zstd may begin with a frame to be skipped.
_BZ2_FIRST = (b"1AY&SY", b"\x17rE8P\x90")  # of a block, and of the end
_BEGINS = {
    ".gz": (b"\x1f\x8b",),
    ".bz2": tuple(b"BZh%d" % i + first for i in range(1, 10) for first in _BZ2_FIRST),
    ".xz": (b"\xfd7zXZ\0", b"]\0\0"),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16))),
    ".zip": (b"PK\3\4", b"PK\5\6"),
    ".parquet": (b"PAR1\x15",),
}


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text_field: str = "text"
    """The field or column that holds the text of a row."""
    raw: bool = False
    """Take the bytes of every file as they are, whatever its name."""
    choice: Choice = Choice()  # noqa: RUF009  # it cannot be changed
    """The members of archives that are read."""
    before_row: bytes = b""
    after_row: bytes = b""

    def takes(self, path: str) -> bool:
        """Whether the member of an archive at `path` is read, or may hold one that is."""
        if self.choice.leaves_out(path):
            return False
        return is_archive(path) or self.choice.includes(path)


def suffixes(name: str) -> tuple[str, ...]:
    """The suffixes of a name that tell how its file is read, such as (".jsonl", ".gz")."""
    lower = name.lower()
    for suffix, long in _TARS.items():
        lower = lower.removesuffix(suffix) + long if lower.endswith(suffix) else lower
    packed = next((s for s in COMPRESSED if lower.endswith(s)), "")
    lower = lower.removesuffix(packed) if packed else lower
    inner = next((s for s in (*_ROWS, *_ARCHIVES) if lower.endswith(s)), "")
    return tuple(s for s in (inner, packed) if s)


def is_plain(name: str, reading: Reading) -> bool:
    """Whether the bytes of a file of that name are read as they are."""
    return reading.raw or not suffixes(name)


def is_archive(name: str) -> bool:
    """Whether a file of that name holds files."""
    return suffixes(name)[:1] in ((".tar",), (".zip",))


class OpenFile(NamedTuple):
    """A file, or a member of an archive, while it is read."""

    name: str
    format: str
    """The suffix of a file of rows, such as ".jsonl"; "" for bytes that are read as they are."""
    file: IO[bytes]
    path: Path
    """The file itself, or the archive that holds it."""


def members(path: Path, name: str, reading: Reading, tally: Tally) -> Iterator[Member]:
    """The members of the file at `path`, called `name`. Each is to be read before the next.

    GptcError names what is corrupt, lacks the field of text, or needs a package that is not there.
    """
    field = reading.text_field
    for found in opened(path, name, reading, tally):
        if found.format == ".parquet":
            rows = parquet_rows(found.path, found.name, field, tally)
            yield found.name, _joined(rows, reading)
        elif found.format:
            rows = _ROW_READERS[found.format](found.file, found.name, field, tally)
            yield found.name, _joined(rows, reading)
        else:
            yield found.name, file_blocks(found.file, found.name)


def opened(path: Path, name: str, reading: Reading, tally: Tally) -> Iterator[OpenFile]:
    """The file at `path`, or its members if it is an archive, unpacked. See `members`."""
    with path.open("rb") as file:
        if not reading.raw:
            begin = file.read(_BEGIN_BYTES)
            refuse_pointer(name, begin)
            _refuse_misnamed(name, begin)
            file.seek(0)
        if is_plain(name, reading):
            tally.n_files += 1
            yield OpenFile(name, "", file, path)
        elif suffixes(name) == (".parquet",):
            tally.n_files += 1
            yield OpenFile(name, ".parquet", file, path)
        elif suffixes(name) == (".zip",):
            found = archives.zip_members(file, name, reading.takes)
            yield from _inside(found, path, name, reading, tally)
        else:
            yield from _unpacked(file, path, name, reading, tally)


def _refuse_misnamed(name: str, begin: bytes) -> None:
    """GptcError if a file that begins so is not what its name says, though it may be whole."""
    said = suffixes(name)[-1:]
    if not said or (said[0] in _BEGINS and begin.startswith(_BEGINS[said[0]])):
        return
    found = next((suffix for suffix, begins in _BEGINS.items() if begin.startswith(begins)), "")
    raw = "take its bytes as they are with --raw"
    if found:
        raise GptcError(
            f"{name} begins as a {found} file does: give it a name that ends in {found}, or {raw}"
        )
    if said[0] in COMPRESSED and begin:
        raise GptcError(
            f"{name} does not begin as a {said[0]} file does: rename it if it is unpacked already, "
            f"copy or download it again if not, or {raw}"
        )


def _unpacked(
    file: IO[bytes], path: Path, name: str, reading: Reading, tally: Tally
) -> Iterator[OpenFile]:
    """The members of a file that is read from beginning to end."""
    inner, packed = suffixes(name)[:1], suffixes(name)[-1:]
    if packed and packed[0] in COMPRESSED:
        file = archives.unpacked(file, name, packed[0])
    if inner == (".tar",):
        found = archives.tar_members(file, name, reading.takes)
        yield from _inside(found, path, name, reading, tally)
        return
    if inner in ((".parquet",), (".zip",)):
        raise GptcError(
            f"{name} cannot be read inside another file: unpack it first, and give the folder"
        )
    tally.n_files += 1
    rows = inner[0] if inner and inner[0] in _ROW_READERS else ""
    yield OpenFile(name, rows, file, path)


def _inside(
    found: Iterator[archives.Opened], archive: Path, name: str, reading: Reading, tally: Tally
) -> Iterator[OpenFile]:
    """The members of an archive and of those inside it."""
    for path, file in found:
        yield from _unpacked(file, archive, f"{name}:{path}", reading, tally)


def _joined(rows: Iterable[bytes], reading: Reading) -> Iterator[bytes]:
    """Rows with their marks, in blocks: a row alone may be very short.

    Marks with which a row begins or ends are not doubled.
    """
    block = bytearray()
    for row in rows:
        text = row
        while (rest := text.lstrip()).startswith(_MARK):
            text = rest.removeprefix(_MARK)
        while (rest := text.rstrip()).endswith(_MARK):
            text = rest.removesuffix(_MARK)
        if text is not row and not text.strip():
            continue
        block += reading.before_row
        block += text
        block += reading.after_row
        if len(block) >= archives.BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


# ---- UTF-8 ----


def check_utf8(
    blocks: Iterator[bytes], where: Callable[[int], str], errors: Errors
) -> Iterator[bytes]:
    """The same blocks as text: bytes that are not UTF-8 are refused, replaced by U+FFFD or kept.

    `where` puts an offset into words.
    """
    if errors == "bytes":
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    n_done = 0
    block, final = b"", False
    while not final:
        following = next(blocks, None)
        block, final = following or b"", following is None
        n_held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final)
        except UnicodeDecodeError as e:
            at = n_done - n_held + e.start
            raise GptcError(
                f"{where(at)} (0x{e.object[e.start]:02x}) is not UTF-8 text: convert it, choose "
                "--errors replace, or use --tokenizer bytes, which takes any data"
            ) from None
        n_done += len(block)
        if errors == "strict":
            if block:
                yield block
        elif text:
            yield text.encode()
