"""Compressed files and archives, unpacked block by block. Damage is named, never passed over."""

from __future__ import annotations

import errno
import gzip
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import IO, Any, TypeAlias, cast

from gptc.errors import GptcError
from gptc.files.limits import limit, refuse
from gptc.files.words import pip_install

Opened: TypeAlias = tuple[str, IO[bytes]]
"""The path of an archive's member and the member, to be read before the next."""

BLOCK_BYTES = 1 << 20  # text in memory at a time
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_STREAM_BITE = 1 << 16  # the rest of it is copied after each stream, which may be very short
_ZSTD_BITE = 1 << 10  # a block of 4 bytes may unpack to 128 KiB
_ZSTD_HEADER = 18  # bytes of a frame's header at most
_ZSTD_WINDOW = 1 << 31  # that of --long=31, the largest
_PACKED_BITE = 64  # in a zip archive, where a bite is unpacked at once: 46 MB from a block of bzip2
_MEMBER = b"PK\3\4"  # begins a member of a zip archive
_DESCRIPTOR_BYTES = 24  # at most, after a member
_DEEPEST = 16  # headers of a tar archive that describe the next header


class _ExceededError(Exception):
    """A file exceeds a limit; the text is the limit's name."""


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
    except _ExceededError as e:
        raise refuse(name, str(e), "unpack it by other means") from None
    except NotImplementedError as e:  # of zipfile: a way of packing that it does not know
        raise GptcError(f"{name} cannot be unpacked ({e}): unpack it by other means") from None
    except (GptcError, MemoryError):
        raise
    except Exception as e:  # of many sorts: the libraries trust the fields of a file
        # Without a number, or with that of a place before a file's begin, it is about its content.
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise
        raise corrupt(name, (str(e).strip() or type(e).__name__).splitlines()[0]) from None


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
            yield from file_blocks(cast("IO[bytes]", gzip.GzipFile(fileobj=file)), name)
        elif suffix == ".bz2":
            yield from _unpack_streams(file, name, _module("bz2", name).BZ2Decompressor)
        else:
            yield from _unpack_xz(file, name)


def _module(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise GptcError(
            f"{name} needs Python's module {module}, which this Python was built without: "
            "use another Python, or unpack the file first"
        ) from None


def _unpack_xz(file: IO[bytes], name: str) -> Iterator[bytes]:
    lzma = _module("lzma", name)
    most = limit("window") + BLOCK_BYTES  # the window, and what the decoder needs besides
    try:
        yield from _unpack_streams(file, name, partial(lzma.LZMADecompressor, memlimit=most))
    except lzma.LZMAError as e:
        if "limit exceeded" in str(e):
            raise _ExceededError("window") from None
        raise


def _unpack_streams(file: IO[bytes], name: str, new_unpacker: Callable[[], Any]) -> Iterator[bytes]:
    """The content of streams, one after another. Zeros may follow each; anything else is damage.

    BZ2File and LZMAFile take a damaged second stream for the end of the file.
    """
    unpacker = None
    while bite := file.read(_STREAM_BITE):
        while bite:
            if unpacker is None and not (bite := bite.lstrip(b"\0")):
                break
            unpacker = unpacker or new_unpacker()
            block = unpacker.decompress(bite, BLOCK_BYTES)
            while block:
                yield block
                done = unpacker.eof or unpacker.needs_input
                block = b"" if done else unpacker.decompress(b"", BLOCK_BYTES)
            bite = unpacker.unused_data
            unpacker = None if unpacker.eof else unpacker
    if unpacker is not None:
        raise corrupt(name, "it ends within a stream")


def _unpack_zstd(file: IO[bytes], name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise GptcError(f"{name} needs a package: {pip_install('zstandard')}") from None
    unpacker, window, n_bytes = None, 0, 0  # of the current frame
    frames = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    try:
        while bite := file.read(_ZSTD_BITE):
            while bite:
                if unpacker is None:
                    bite += file.read(max(0, _ZSTD_HEADER - len(bite)))
                    with suppress(zstandard.ZstdError):  # of which the decoder says more
                        window = zstandard.get_frame_parameters(bite).window_size
                    unpacker, n_bytes = frames.decompressobj(), 0
                if block := unpacker.decompress(bite):
                    yield block
                # The decoder fills the window as far as the frame reaches.
                n_bytes += len(block)
                if min(window, n_bytes) > limit("window"):
                    raise _ExceededError("window")
                bite = unpacker.unused_data
                unpacker = None if unpacker.eof else unpacker
    except zstandard.ZstdError as e:
        if "memory" in str(e):
            raise _ExceededError("window") from None
        raise corrupt(name, str(e)) from None
    if unpacker is not None:
        raise corrupt(name, "it ends within a frame")


def zip_members(file: IO[bytes], name: str, wanted: Callable[[str], bool]) -> Iterator[Opened]:
    """The files in a zip archive whose paths are wanted. Links are left out."""
    with named(name), _Zip(file) as archive:
        _check_listed(file, archive, name)
        for info in archive.infolist():
            path = info.filename.replace("\\", "/")  # of an archive that Windows has made
            if path.endswith("/") or stat.S_ISLNK(info.external_attr >> 16) or not wanted(path):
                continue
            if info.flag_bits & 1:
                raise GptcError(
                    f"{name}:{path} is encrypted: unpack the archive with its password, and give "
                    "the folder"
                )
            if info.compress_type == zipfile.ZIP_LZMA:
                _check_window(file, info)
            with archive.open(info) as inner:
                if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    yield path, inner
                else:
                    blocks = _unpack_bites(inner)
                    yield path, cast("IO[bytes]", io.BufferedReader(_Unpacked(blocks)))


def _unpack_bites(member: Any) -> Iterator[bytes]:
    """A member of a zip archive whose packed bytes are read a bite at a time."""
    member.MIN_READ_SIZE = _PACKED_BITE
    while block := member.read1(_PACKED_BITE):
        yield block
        # It reads no more of the file than a bite, and gives as much; the rest is in its buffer.
        while n_bytes := len(member._readbuffer) - member._offset:
            yield member.read1(min(n_bytes, BLOCK_BYTES))


class _Zip(zipfile.ZipFile):
    """A zip archive whose list of members has a limit."""

    def _RealGetContents(self) -> None:
        end = zipfile._EndRecData(self.fp)  # type: ignore[attr-defined]
        if end and end[5] > limit("directory"):
            raise _ExceededError("directory")
        super()._RealGetContents()  # type: ignore[misc]


def _check_listed(file: IO[bytes], archive: zipfile.ZipFile, name: str) -> None:
    """Refuses an archive with a member that its list does not name, as where two were joined."""
    listed = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [0, *(_end_of_member(file, info) for info in listed)]
    begins = [*(info.header_offset for info in listed), archive.start_dir]
    for end, begin in zip(ends, begins, strict=True):
        if end >= begin:
            continue
        file.seek(end)
        # A descriptor of the member's sizes may follow it.
        if _MEMBER in file.read(min(begin - end, _DESCRIPTOR_BYTES + len(_MEMBER))):
            raise GptcError(
                f"{name} holds a member behind byte {end:,} that its list does not name, as where "
                "archives were joined: give each archive, or unpack it and give the folder"
            )


def _end_of_member(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    file.seek(max(0, info.header_offset) + 26)
    n_name, n_extra = struct.unpack("<HH", file.read(4).ljust(4, b"\0"))
    return info.header_offset + 30 + int(n_name) + int(n_extra) + info.compress_size


def _check_window(file: IO[bytes], info: zipfile.ZipInfo) -> None:
    """Refuses a member with a window beyond the limit, which LZMA takes at once."""
    file.seek(
        max(0, _end_of_member(file, info) - info.compress_size + 4)
    )  # after its version and size
    window = int.from_bytes(file.read(5)[1:], "little")  # after the filter's first byte
    if window > limit("window"):
        raise _ExceededError("window")


# Headers with data that describes the next one; all of it is read at once.
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_ATTRIBUTES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_CONTINUED = b"M"  # the rest of a file
_NOTES = (b"V", b"D", b"N")  # of GNU tar: a label, the names in a folder, long names
_SPARSE = "a file in it has holes (sparse)"


class _Header(tarfile.TarInfo):
    """A header of a tar archive; one that is damaged raises instead of ending the reading."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        state = cast("_Tar", archive)
        if state.depth >= _DEEPEST:
            raise tarfile.ReadError("too many headers describe one file")
        state.depth += 1
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
        finally:
            state.depth -= 1
        state.at_end = False
        return found

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (*_LONG_NAMES, *_ATTRIBUTES) and self.size > limit("header"):
            raise _ExceededError("header")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(_SPARSE)
        return super()._proc_member(archive)  # type: ignore[misc, no-any-return]

    def _refuse_sparse(self, *arguments: object) -> None:
        raise tarfile.ReadError(_SPARSE)

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Tar(tarfile.TarFile):
    tarinfo = _Header
    at_end = False  # the last block was zeros: nothing need follow
    depth = 0  # of a header that describes the next


def tar_members(file: IO[bytes], name: str, wanted: Callable[[str], bool]) -> Iterator[Opened]:
    """The files in a tar archive, or in several that were joined, whose paths are wanted.

    Links are left out: what they lead to is read itself, or GptcError names a hard link to a file
    that is not wanted.
    """
    # Only zeros may follow the end mark, or another archive: hence ignore_zeros.
    with named(name), _Tar.open(fileobj=file, mode="r|", ignore_zeros=True) as archive:
        for info in archive:
            if info.type == _CONTINUED:
                raise tarfile.ReadError(f"{info.name} in it began in another volume")
            known = info.type in (*tarfile.SUPPORTED_TYPES, *_NOTES)
            # POSIX: a type that is not known is that of a file.
            is_file = info.isreg() or not known
            if is_file and wanted(info.name) and (inner := archive.extractfile(info)) is not None:
                yield info.name, inner
            elif info.islnk() and wanted(info.name) and not wanted(info.linkname):
                raise GptcError(
                    f"{name}:{info.name} is a hard link to {info.linkname}, which is hidden or not "
                    "chosen: unpack the archive, and give the folder"
                )
            archive.members = []  # type: ignore[attr-defined]  # it would hold every name
