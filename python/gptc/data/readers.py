"""Files of any format as bytes: unpacked, and with rows and members told apart as documents.

`members` is the entry point. A file's name tells its format: compressed (.gz .bz2 .xz .zst),
an archive (.zip .tar and its compressed forms), rows with a field of text (.jsonl .ndjson .csv
.tsv .parquet), else the bytes themselves. Nothing is ever held whole.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from gptc.data.options import Errors
from gptc.errors import GptcError

Member: TypeAlias = tuple[str, Iterator[bytes]]
"""The name of a document or a file of rows, and its bytes in blocks."""

BLOCK_BYTES = 1 << 20  # text in memory at a time
LONGEST_ROW_BYTES = 32 << 20

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_TARS = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text_field: str = "text"
    """The field or column that holds the text of a row."""
    raw: bool = False
    """Take the bytes of every file as they are, whatever its name."""
    before_row: bytes = b""
    after_row: bytes = b""


def is_plain(name: str, reading: Reading) -> bool:
    """Whether the bytes of a file of that name are read as they are."""
    lower = name.lower()
    return reading.raw or not lower.endswith((*_COMPRESSED, *_TARS, *_ROWS, ".tar", ".zip"))


def members(path: Path, name: str, reading: Reading) -> Iterator[Member]:
    """The members of the file at `path`, called `name`. Each is to be read before the next.

    GptcError names what is corrupt, lacks the field of text, or needs a package that is not there.
    """
    with path.open("rb") as file:
        if is_plain(name, reading):
            yield name, _blocks(file, name)
        elif name.lower().endswith(".parquet"):
            yield name, _parquet_rows(path, name, reading)
        elif name.lower().endswith(".zip"):
            yield from _zip_members(file, name, reading)
        else:
            yield from _members(file, name, reading)


def _members(file: IO[bytes], name: str, reading: Reading) -> Iterator[Member]:
    """The members of a file that is read from beginning to end."""
    lower = name.lower()
    for suffix, long in _TARS.items():
        lower = lower.removesuffix(suffix) + long if lower.endswith(suffix) else lower
    if lower.endswith(_COMPRESSED):
        suffix = lower[lower.rindex(".") :]
        unpacked = cast("IO[bytes]", io.BufferedReader(_Unpacked(_unpack(file, name, suffix))))
        yield from _inner(unpacked, name, lower.removesuffix(suffix), reading)
    else:
        yield from _inner(file, name, lower, reading)


def _inner(file: IO[bytes], name: str, lower: str, reading: Reading) -> Iterator[Member]:
    """`lower` is the name without the suffix of a compression."""
    if lower.endswith(".tar"):
        yield from _tar_members(file, name, reading)
    elif lower.endswith((".jsonl", ".ndjson")):
        yield name, _joined(_jsonl_rows(file, name, reading.text_field), reading)
    elif lower.endswith((".csv", ".tsv")):
        separator = "\t" if lower.endswith(".tsv") else ","
        yield name, _joined(_csv_rows(file, name, reading.text_field, separator), reading)
    elif lower.endswith((".parquet", ".zip")):
        raise GptcError(
            f"{name} cannot be read inside another file: unpack it first, and give the folder"
        )
    else:
        yield name, _blocks(file, name)


# ---- compression and archives ----


class _Unpacked(io.RawIOBase):
    """Blocks as a file that can be read but not sought in."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._iterator = blocks
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._block:
            block = next(self._iterator, None)
            if block is None:
                return 0
            self._block = memoryview(block)
        n = min(len(buffer), len(self._block))
        buffer[:n] = self._block[:n]
        self._block = self._block[n:]
        return n


def _blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    with _named(name):
        while block := file.read(BLOCK_BYTES):
            yield block


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns what the unpackers raise into an error that names the file."""
    damaged = (
        *(EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile),
        *(gzip.BadGzipFile, NotImplementedError, RuntimeError),  # the last: an encrypted zip
    )
    try:
        yield
    except damaged as e:
        raise _corrupt(name, str(e)) from None
    except OSError as e:
        if e.errno is None:  # bz2's "Invalid data stream"
            raise _corrupt(name, str(e)) from None
        raise


def _corrupt(name: str, why: str) -> GptcError:
    return GptcError(
        f"{name} cannot be unpacked ({why.rstrip('.')}): copy or download it again, or take its "
        "bytes as they are with --raw"
    )


def _unpack(file: IO[bytes], name: str, suffix: str) -> Iterator[bytes]:
    if suffix == ".zst":
        yield from _unpack_zstd(file, name)
        return
    opener = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}[suffix]
    with _named(name):
        packed = opener(fileobj=file) if suffix == ".gz" else opener(file)
        yield from _blocks(packed, name)


def _unpack_zstd(file: IO[bytes], name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise GptcError(f"{name} needs a package: pip install zstandard") from None
    unpacker = None
    try:
        # Small bites: a bite of zeros may unpack to thousands of times its size.
        while bite := file.read(1 << 13):
            while bite:
                unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
                if block := unpacker.decompress(bite):
                    yield block
                bite = unpacker.unused_data
                unpacker = None if unpacker.eof else unpacker
    except zstandard.ZstdError as e:
        raise _corrupt(name, str(e)) from None
    if unpacker is not None:
        raise _corrupt(name, "it ends within a frame")


def _zip_members(file: IO[bytes], name: str, reading: Reading) -> Iterator[Member]:
    with _named(name), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                with archive.open(info) as inner:
                    yield from _members(inner, f"{name}:{info.filename}", reading)


def _tar_members(file: IO[bytes], name: str, reading: Reading) -> Iterator[Member]:
    with _named(name), tarfile.open(fileobj=file, mode="r|") as archive:
        for info in archive:
            inner = archive.extractfile(info) if info.isreg() else None
            if inner is not None:
                yield from _members(inner, f"{name}:{info.name}", reading)
            archive.members = []  # type: ignore[attr-defined]  # it would hold every name


# ---- rows ----


def _joined(rows: Iterable[bytes], reading: Reading) -> Iterator[bytes]:
    """Rows with their marks, in blocks: a row alone may be very short."""
    block = bytearray()
    for row in rows:
        block += reading.before_row
        block += row
        block += reading.after_row
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The lines of a file without their ends. GptcError for one too long to be held."""
    with _named(name):
        number = 0
        while line := file.readline(LONGEST_ROW_BYTES + 1):
            number += 1
            if len(line) > LONGEST_ROW_BYTES:
                raise GptcError(
                    f"{name}: line {number} is longer than the {LONGEST_ROW_BYTES >> 20} MiB that "
                    "a row may have: cut it into several rows, or take the file as it is with --raw"
                )
            yield line.rstrip(b"\r\n")


def _jsonl_rows(file: IO[bytes], name: str, text_field: str) -> Iterator[bytes]:
    for number, line in enumerate(_lines(file, name), 1):
        if not line.strip():
            continue
        try:
            # Bytes that are not UTF-8 are kept: --errors decides about them later.
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            raise GptcError(
                f"{name}: line {number} is not JSON: repair it, or take the file as it is with "
                "--raw"
            ) from None
        if not isinstance(row, dict):
            raise GptcError(
                f"{name}: line {number} is not a JSON object: give one object with a field of text "
                "a line, or take the file as it is with --raw"
            )
        yield _field(row.get(text_field), row, f"{name}: line {number}", text_field)


def _csv_rows(file: IO[bytes], name: str, text_field: str, separator: str) -> Iterator[bytes]:
    csv.field_size_limit(LONGEST_ROW_BYTES)
    lines = (line.decode("utf-8", "surrogateescape") + "\n" for line in _lines(file, name))
    rows = csv.DictReader(lines, delimiter=separator, strict=True)
    try:
        if rows.fieldnames:
            rows.fieldnames = [rows.fieldnames[0].removeprefix("\ufeff"), *rows.fieldnames[1:]]
        for row in rows:
            yield _field(row.get(text_field), row, f"{name}: line {rows.line_num}", text_field)
    except csv.Error as e:
        raise GptcError(
            f"{name}: line {rows.line_num} is not a row ({e}): repair it, or take the file as it "
            "is with --raw"
        ) from None


def _parquet_rows(path: Path, name: str, reading: Reading) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise GptcError(f"{name} needs a package: pip install pyarrow") from None

    def rows() -> Iterator[bytes]:
        try:
            with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES) as file:
                fields = file.schema_arrow.names
                if reading.text_field not in fields:
                    raise _no_field(name, reading.text_field, fields)
                number = 0
                for batch in file.iter_batches(
                    batch_size=256, columns=[reading.text_field], use_threads=False
                ):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        where = f"{name}: row {number}"
                        yield _field(value, fields, where, reading.text_field)
        except (pyarrow.ArrowException, OSError) as e:
            raise _corrupt(name, str(e).splitlines()[0]) from None

    return _joined(rows(), reading)


def _field(value: Any, fields: Iterable[str], where: str, text_field: str) -> bytes:
    """The bytes of a row's text."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        if value is None:
            raise _no_field(where, text_field, fields)
        raise GptcError(
            f"{where}: the field {text_field} is not text but {value!r:.40}: choose another with "
            "--text-field NAME"
        )
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        return value.encode("utf-8", "replace")


def _no_field(where: str, text_field: str, fields: Iterable[str]) -> GptcError:
    names = [str(field) for field in fields]
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return GptcError(
        f"{where} has no field {text_field}, only {listed or 'none'}: choose one with "
        "--text-field NAME, or take the file as it is with --raw"
    )


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
