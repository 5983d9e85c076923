"""Compressed files and archives, unpacked block by block. Damage is named, never passed over."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import IO, Any, TypeAlias, cast

from gptc.errors import GptcError
from gptc.files.words import pip_install

Opened: TypeAlias = tuple[str, IO[bytes]]
"""The path of an archive's member and the member, to be read before the next."""

BLOCK_BYTES = 1 << 20  # text in memory at a time
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_LONGEST_ZSTD_WINDOW = 1 << 31  # that zstd writes with --long=31


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


def file_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The bytes of a file in blocks."""
    with named(name):
        while block := file.read(BLOCK_BYTES):
            yield block


@contextmanager
def named(name: str) -> Iterator[None]:
    """Turns what the unpackers raise into an error that names the file."""
    try:
        yield
    except NotImplementedError as e:  # of zipfile: a way of packing that it does not know
        raise GptcError(f"{name} cannot be unpacked ({e}): unpack it by other means") from None
    except (EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError) as e:
        raise corrupt(name, str(e)) from None
    except OSError as e:
        if e.errno is None:  # "Invalid data stream" of bz2, and gzip's errors
            raise corrupt(name, str(e)) from None
        raise
    except Exception as e:
        if type(e).__name__ == "LZMAError":  # its module may be missing
            raise corrupt(name, str(e)) from None
        raise


def corrupt(name: str, why: str) -> GptcError:
    """The error for a damaged file."""
    return GptcError(
        f"{name} cannot be unpacked ({why.rstrip('.')}): copy or download it again, or take its "
        "bytes as they are with --raw"
    )


def unpacked(file: IO[bytes], name: str, suffix: str) -> IO[bytes]:
    """What a compressed file holds; `suffix` is one of COMPRESSED."""
    blocks = _unpack_zstd(file, name) if suffix == ".zst" else _unpack(file, name, suffix)
    return cast("IO[bytes]", io.BufferedReader(_Unpacked(blocks)))


def _unpack(file: IO[bytes], name: str, suffix: str) -> Iterator[bytes]:
    with named(name):
        if suffix == ".gz":
            packed = cast("IO[bytes]", gzip.GzipFile(fileobj=file))
        else:
            module, opener = {".bz2": ("bz2", "BZ2File"), ".xz": ("lzma", "LZMAFile")}[suffix]
            try:
                packed = getattr(import_module(module), opener)(file)
            except ImportError:
                raise GptcError(
                    f"{name} needs Python's module {module}, which this Python was built without: "
                    "use another Python, or unpack the file first"
                ) from None
        yield from file_blocks(packed, name)


def _unpack_zstd(file: IO[bytes], name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise GptcError(f"{name} needs a package: {pip_install('zstandard')}") from None
    unpacker = None
    frames = zstandard.ZstdDecompressor(max_window_size=_LONGEST_ZSTD_WINDOW)
    try:
        # Small bites: a bite of zeros may unpack to thousands of times its size.
        while bite := file.read(1 << 13):
            while bite:
                unpacker = unpacker or frames.decompressobj()
                if block := unpacker.decompress(bite):
                    yield block
                bite = unpacker.unused_data
                unpacker = None if unpacker.eof else unpacker
    except zstandard.ZstdError as e:
        raise corrupt(name, str(e)) from None
    if unpacker is not None:
        raise corrupt(name, "it ends within a frame")


def zip_members(file: IO[bytes], name: str) -> Iterator[Opened]:
    """The files in a zip archive."""
    with named(name), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise GptcError(
                    f"{name}:{info.filename} is encrypted: unpack the archive with its password, "
                    "and give the folder"
                )
            with archive.open(info) as inner:
                yield info.filename, inner


class _Header(tarfile.TarInfo):
    """A header of a tar archive; one that is damaged raises instead of ending the reading."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        state = cast("_Tar", archive)
        try:
            found = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            state.at_end = True
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            if not state.at_end:
                raise tarfile.ReadError("it ends without an end mark") from None
            raise
        except tarfile.HeaderError as e:
            where = "after its end mark" if state.at_end else f"at byte {archive.offset}"
            raise tarfile.ReadError(f"bad header {where}: {e}") from None
        state.at_end = False
        return found


class _Tar(tarfile.TarFile):
    tarinfo = _Header
    at_end = False  # the last block was zeros: nothing need follow


def tar_members(file: IO[bytes], name: str) -> Iterator[Opened]:
    """The files in a tar archive, or in several that were joined. Links are left out."""
    # Only zeros may follow the end mark, or another archive: hence ignore_zeros.
    with named(name), _Tar.open(fileobj=file, mode="r|", ignore_zeros=True) as archive:
        for info in archive:
            inner = archive.extractfile(info) if info.isreg() else None
            if inner is not None:
                yield info.name, inner
            archive.members = []  # type: ignore[attr-defined]  # it would hold every name
