"""Where the bytes of a dataset come from: files, folders, standard input, URLs, known names.

`gather` turns a source into files, `Text` reads the files of all sources as one text.
"""

from __future__ import annotations

import codecs
import errno
import glob
import hashlib
import os
import re
import secrets
import stat
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from gptc.data import stories
from gptc.data.archives import BLOCK_BYTES
from gptc.data.choice import Choice
from gptc.data.known import KNOWN_DATASETS, STORIES, fetch
from gptc.data.options import Errors
from gptc.data.readers import Reading, check_utf8, is_archive, is_plain, members
from gptc.data.rows import Tally
from gptc.errors import GptcError, without_secrets
from gptc.files.download import ProgressCallback, download
from gptc.files.limits import limit, refuse
from gptc.files.paths import cache_folder
from gptc.tokenizer.base import END_OF_TEXT

_MAX_LISTED = 10  # files that an error lists
_END_BYTES = 64
_SPACE = b" \t\r\n\v\f" + codecs.BOM_UTF8


def is_url(source: str) -> bool:
    """Whether a source is an http(s) address."""
    return re.match(r"https?://", source) is not None


def is_remote(source: str) -> bool:
    """Whether a source is a known name or an address, and not a path on this machine."""
    return source in KNOWN_DATASETS or is_url(source)


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, with the name that errors call it by; the name's suffix is its format."""

    path: Path
    name: str
    n_bytes: int
    changed_ns: int
    whole: bool = field(default=False, compare=False)
    """--include names the file itself: every member is taken if it is an archive."""

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> SourceFile:
        """The source file at `path`."""
        status = path.stat()
        return cls(path, name or str(path), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Gathering:
    """Options of `gather`."""

    out: Path
    spool: Path
    """A folder for copies of sources that can be read only once."""
    choice: Choice = Choice()  # noqa: RUF009  # it cannot be changed
    """The files of a folder that are taken."""
    raw: bool = False
    """Archives are taken as files."""
    stories: tuple[int, int] = (0, 0)
    """Size in bytes and seed of the text named stories."""
    progress: ProgressCallback = field(default=lambda action, n_done, n_bytes: None)
    notify: Callable[[str], None] = field(default=lambda line: None)


def gather(source: str, how: Gathering) -> list[SourceFile]:
    """The files of a source. GptcError when there are none, or when some cannot be read."""
    if source in STORIES:
        n_bytes, seed = how.stories
        texts = stories.corpus(n_bytes, seed, wide=source == "stories-wide")
        return [_spool(texts, how, source, "writing stories", n_bytes)]
    if source in KNOWN_DATASETS:
        paths = fetch(source, how.progress, how.notify)
        return [SourceFile.of(path, f"{source}/{path.name}") for path in paths]
    if is_url(source):
        path = url_file(source)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            download(source, path, progress=how.progress)
        return [SourceFile.of(path, re.split("[?#]", without_secrets(source))[0])]
    if source == "-":
        with suppress(OSError):  # without a descriptor
            descriptor = sys.stdin.buffer.fileno()
            if not os.isatty(descriptor):
                _refuse_device(os.fstat(descriptor), "standard input")
        blocks = iter(lambda: sys.stdin.buffer.read(BLOCK_BYTES), b"")
        return [_spool(blocks, how, "standard input", "reading", None)]
    path = Path(source)
    if path.is_dir():
        return _folder(path, how)
    if path.is_file():
        return _readable([path], [])
    if path.exists():  # a pipe, such as <(zcat text.gz)
        _refuse_device(path.stat(), source)
        with path.open("rb") as pipe:
            blocks = iter(lambda: pipe.read(BLOCK_BYTES), b"")
            return [_spool(blocks, how, source, "reading", None)]
    # Path.glob takes no absolute pattern.
    found = sorted(glob.glob(source, recursive=True))  # noqa: PTH207
    files = [file for name in found if (file := Path(name)).is_file()]
    if not files:
        raise GptcError(
            f"no file, folder or URL {source!r}, and no dataset of that name: check the path, "
            f"or use one of {', '.join(KNOWN_DATASETS)}"
        )
    return _readable(files, [])


def identity(source: str) -> dict[str, str]:
    """The name of a source in dataset.json; for an address with a hidden part, also its hash."""
    if not is_url(source):
        return {"source": source}
    shown = without_secrets(source)
    if shown == source:
        return {"source": source}
    hidden = re.split("[?#]", source, maxsplit=1)[1:]  # without a password, which can be guessed
    without_user = "".join([re.split("[?#]", shown)[0], *hidden])
    return {"source": shown, "address": hashlib.sha256(without_user.encode()).hexdigest()[:16]}


def url_file(url: str) -> Path:
    """The file that keeps a download until its dataset is finished."""
    name = re.sub(r"[^\w.-]", "_", unquote(re.split("[?#]", url)[0]).rpartition("/")[2])[-40:]
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder() / "downloads" / f"{digest}-{name}"


def _folder(folder: Path, how: Gathering) -> list[SourceFile]:
    """The files below a folder."""
    out = os.path.realpath(how.out)
    if os.path.realpath(folder) == out:
        raise GptcError(f"--out {how.out} is also a source: choose another --out")
    unreadable: list[str] = []
    named: dict[Path, bool] = {}  # whether --include takes a file, or perhaps its members only
    links = _Links(folder)
    for file, path in _walk(folder, "", how.choice, {_identity(out)}, unreadable, links):
        included = how.choice.includes(path)
        if included or (is_archive(path) and not how.raw):
            named[file] = included
    if not named and not unreadable:
        chosen = " that --include and --exclude leave" if how.choice else ""
        raise GptcError(f"the folder {folder} holds no files{chosen}: name one that does")
    files = _readable(list(named), unreadable)
    return [
        replace(file, whole=included) for file, included in zip(files, named.values(), strict=True)
    ]


class _Links:
    """The links below a folder: those that leave it have a limit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inside = os.path.join(os.path.realpath(folder), "")  # noqa: PTH118
        self._n_left = limit("links")

    def check(self, link: str) -> None:
        """GptcError for a link that leaves the folder, beyond the limit."""
        target = os.path.realpath(link)
        if f"{target}/".startswith(self._inside):
            return
        self._n_left -= 1
        if self._n_left < 0:
            raise refuse(
                f"{link} is a link to {target}, outside of {self._folder}, which",
                "links",
                "name that path as a source too, leave the link out with --exclude",
            )


def _walk(
    folder: Path,
    path: str,
    choice: Choice,
    seen: set[object],
    unreadable: list[str],
    links: _Links,
) -> Iterator[tuple[Path, str]]:
    """The files below a folder, sorted, with their paths in it.

    Hidden files and those of --exclude are left out. Links are followed; a folder is read once, and
    one in `seen` never.
    """
    try:
        if (identity := _identity(folder)) in seen:
            return
        seen.add(identity)
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as e:
        unreadable.append(f"{folder} ({e.strerror})")
        return
    for entry in entries:
        inner = f"{path}/{entry.name}" if path else entry.name
        if choice.leaves_out(inner):
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as e:
            if e.errno != errno.ELOOP:  # a link to itself leads nowhere
                unreadable.append(f"{entry.path} ({e.strerror})")
            continue
        if entry.is_symlink() and (is_folder or is_file):
            links.check(entry.path)
        if is_folder:
            yield from _walk(Path(entry.path), inner, choice, seen, unreadable, links)
        elif is_file:
            yield Path(entry.path), inner


def _identity(folder: Path | str) -> object:
    """A value that is the same for all names of a folder; None for one that is missing."""
    try:
        status = os.stat(folder)  # noqa: PTH116
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _readable(files: Sequence[Path], unreadable: list[str]) -> list[SourceFile]:
    """The source files at these paths. GptcError lists those that cannot be read."""
    for file in files:
        try:
            os.close(os.open(file, os.O_RDONLY))
        except OSError as e:
            unreadable.append(f"{file} ({e.strerror})")
    if unreadable:
        more = len(unreadable) - _MAX_LISTED
        raise GptcError(
            f"cannot read {', '.join(unreadable[:_MAX_LISTED])}"
            f"{f' and {more} more' if more > 0 else ''}: permit it, or leave them out with "
            "--exclude GLOB"
        )
    return [SourceFile.of(file) for file in files]


def _refuse_device(status: os.stat_result, name: str) -> None:
    """GptcError for a device such as /dev/zero, which has no end; /dev/null has one."""
    is_device = stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)
    if is_device and status.st_rdev != os.stat(os.devnull).st_rdev:  # noqa: PTH116
        raise GptcError(f"{name} is a device, and may have no end: copy what is needed to a file")


def _spool(
    blocks: Iterable[bytes], how: Gathering, name: str, action: str, n_bytes: int | None
) -> SourceFile:
    """Stores a source that can be read only once: preparing reads it twice."""
    path = how.spool / secrets.token_hex(8)
    n_done, most = 0, limit("stream")
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            n_done += len(block)
            how.progress(action, n_done, n_bytes)
            if n_done > most:
                raise refuse(name, "stream", "give a file")
    return SourceFile.of(path, name)


class Readable(Protocol):
    """A text of which any range can be read."""

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end), in blocks."""


class Text:
    """Files read as one text, in blocks.

    An end-of-text mark goes before a file that follows another, where `between` is one, and none
    is there. A text is read once with `documents`, which finds its size; then any range of it can
    be read.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        reading: Reading | None = None,
        errors: Errors = "bytes",
        between: bytes = b"",
    ) -> None:
        self.files = files
        self._reading = reading or Reading()
        self._errors = errors
        self._between = between
        self._begins = [0]
        self._ends = [b""]  # the last bytes before each file
        self.tallies: list[Tally] = []  # of each file, once it has been read
        self.n_bytes_known = (
            sum(file.n_bytes for file in files)
            if all(is_plain(file.name, self._reading) for file in files) and errors != "replace"
            else None
        )

    @property
    def n_bytes(self) -> int:
        """The bytes of the text, once it has been read."""
        return self._begins[-1]

    def begin(self, i: int) -> int:
        """The byte at which a file begins, or behind the last ends, once the text has been read."""
        return self._begins[i]

    def documents(self) -> Iterator[tuple[int, bytes]]:
        """The index of each file and its blocks, of which an empty one begins another file."""
        for i, file in enumerate(self.files):
            n_bytes, end = 0, self._ends[-1]
            self.tallies.append(Tally())
            for block in self._blocks(i, file, self.tallies[-1]):
                n_bytes += len(block)
                end = end_of(end, block)
                yield i, block
            self._begins.append(self._begins[-1] + n_bytes)
            self._ends.append(end)

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end), in blocks."""
        for i in range(max(0, bisect_right(self._begins, begin) - 1), len(self.files)):
            first, after = self._begins[i], self._begins[i + 1]
            if first >= end:
                return
            if begin >= after:
                continue
            file, at = self.files[i], first
            plain = is_plain(file.name, self._reading) and self._errors != "replace"
            if plain and not (self._between and first):  # checked before, and can be sought in
                at = max(begin, first)
                blocks = _file_blocks(file.path, at - first)
            else:
                blocks = self._blocks(i, file, Tally())
            for block in blocks:
                stop = at + len(block)
                if stop > begin and at < end:
                    yield block[max(0, begin - at) : end - at]
                at = stop
                if at >= min(end, after):
                    break
            if at < min(end, after):
                raise GptcError(f"{file.name} changed while it was read: prepare again")

    def check_unchanged(self) -> None:
        """GptcError when a file has changed since the beginning."""
        for file in self.files:
            if SourceFile.of(file.path, file.name) != file:
                raise GptcError(f"{file.name} changed while it was read: prepare again")

    def file_at(self, offset: int) -> int:
        """The index of the file that holds a byte, once the text has been read."""
        return min(bisect_right(self._begins, offset), len(self.files)) - 1

    def where(self, offset: int) -> str:
        """A byte offset in words."""
        i = self.file_at(offset)
        return f"{self.files[i].name}: byte {offset - self._begins[i]}"

    def _blocks(self, i: int, file: SourceFile, tally: Tally) -> Iterator[bytes]:
        """The blocks of a file, with an empty one and `between` before a file after the first."""
        follows, end = self._begins[i] > 0, self._ends[i]
        reading = self._reading
        if file.whole and reading.choice.include:
            reading = replace(reading, choice=Choice(exclude=reading.choice.exclude))
        for name, blocks in members(file.path, file.name, reading, tally):
            checked = check_utf8(blocks, f"{name}: byte {{}}".format, self._errors)
            first = next(checked, b"")
            if not first:
                continue
            if follows:
                yield b""
                marked = without_space(first).startswith(self._between)
                marked = marked or end.rstrip().endswith(self._between)
                if self._between and not marked:
                    yield self._between
            follows = True
            for block in chain((first,), checked):
                end = end_of(end, block)
                yield block


def without_space(block: bytes) -> bytes:
    """The bytes of a block after white space and a byte order mark."""
    return block.lstrip(_SPACE)


def end_of(end: bytes, block: bytes) -> bytes:
    """The last bytes of a text that ends with `end` and `block`: of white space, one."""
    last = block[-_END_BYTES:]
    if len(last.rstrip()) < len(END_OF_TEXT):  # short, or much white space
        last = end + block
    text = last.rstrip()
    return text[-len(END_OF_TEXT) :] + last[len(text) :][:1]


def _file_blocks(path: Path, begin: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while block := file.read(BLOCK_BYTES):
            yield block
