"""Where the bytes of a dataset come from: files, folders, standard input, URLs, known names.

`gather` turns a source into files, `Text` reads the files of all sources as one text.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import secrets
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gptc.data import stories
from gptc.data.known import KNOWN_DATASETS, STORIES, fetch
from gptc.data.options import Errors
from gptc.data.readers import BLOCK_BYTES, Reading, check_utf8, is_plain, members
from gptc.errors import GptcError
from gptc.files.download import ProgressCallback, download
from gptc.files.paths import cache_folder

_MAX_LISTED = 10  # files that an error lists


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
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    """Globs of the files of a folder that are taken, and of those that are not."""
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
        return [SourceFile.of(path, re.split("[?#]", source)[0])]
    if source == "-":
        blocks = iter(lambda: sys.stdin.buffer.read(BLOCK_BYTES), b"")
        return [_spool(blocks, how, "standard input", "reading", None)]
    path = Path(source)
    if path.is_dir():
        if path.resolve() == how.out.resolve():
            raise GptcError(f"--out {how.out} is also a source: choose another --out")
        unreadable: list[str] = []
        files = [
            file for file in _walk(path, how.out.resolve(), unreadable) if _chosen(file, path, how)
        ]
        if not files and not unreadable:
            chosen = " that --include and --exclude leave" if how.include or how.exclude else ""
            raise GptcError(f"the folder {path} holds no files{chosen}: name one that does")
        return _readable(files, unreadable)
    if path.is_file():
        return _readable([path], [])
    if path.exists():  # a pipe, such as <(zcat text.gz)
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


def url_file(url: str) -> Path:
    """The file that keeps a download until its dataset is finished."""
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-80:]
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder() / "downloads" / f"{digest}-{name}"


def _chosen(file: Path, folder: Path, how: Gathering) -> bool:
    """Whether the globs take a file: they are compared with its name and its path in the folder."""
    names = (file.name, file.relative_to(folder).as_posix())

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in patterns for name in names)

    return (not how.include or matches(how.include)) and not matches(how.exclude)


def _walk(folder: Path, out: Path, unreadable: list[str]) -> Iterator[Path]:
    """The files below a folder, sorted; hidden ones and the dataset to be written are left out."""
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as e:
        unreadable.append(f"{folder} ({e.strerror})")
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):  # a link could lead in a circle
            if path.resolve() != out:
                yield from _walk(path, out, unreadable)
        elif entry.is_file():
            yield path


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


def _spool(
    blocks: Iterable[bytes], how: Gathering, name: str, action: str, n_bytes: int | None
) -> SourceFile:
    """Stores a source that can be read only once: preparing reads it twice."""
    path = how.spool / secrets.token_hex(8)
    n_done = 0
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            n_done += len(block)
            how.progress(action, n_done, n_bytes)
    return SourceFile.of(path, name)


class Text:
    """Files read as one text, in blocks.

    An end-of-text mark goes before a file that follows another, where `between` is one. A text is
    read once with `documents`, which finds its size; then any range of it can be read.
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
            n_bytes = 0
            for block in self._blocks(i, file):
                n_bytes += len(block)
                yield i, block
            self._begins.append(self._begins[-1] + n_bytes)

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
            if plain and not (self._between and i):  # checked before, and can be sought in
                at = max(begin, first)
                blocks = _file_blocks(file.path, at - first)
            else:
                blocks = self._blocks(i, file)
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

    def where(self, offset: int) -> str:
        """A byte offset in words."""
        i = min(bisect_right(self._begins, offset), len(self.files)) - 1
        return f"{self.files[i].name}: byte {offset - self._begins[i]}"

    def _blocks(self, i: int, file: SourceFile) -> Iterator[bytes]:
        """The blocks of a file, with an empty one and `between` before a file after the first."""
        follows = i > 0
        for name, blocks in members(file.path, file.name, self._reading):
            checked = check_utf8(blocks, f"{name}: byte {{}}".format, self._errors)
            first = next(checked, b"")
            if not first:
                continue
            if follows:
                yield b""
                if self._between and not first.startswith(self._between):
                    yield self._between
            follows = True
            yield first
            yield from checked


def _file_blocks(path: Path, begin: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while block := file.read(BLOCK_BYTES):
            yield block
