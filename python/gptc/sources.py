"""Where the bytes of a dataset come from: files, folders, standard input, URLs, known names."""

from __future__ import annotations

import glob
import re
import secrets
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from gptc.errors import GptcError
from gptc.tokenizer import Progress, download

BLOCK_BYTES = 1 << 20  # text in memory at a time

_DOWNLOADS = {
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
KNOWN_DATASETS = ("stories", *_DOWNLOADS)


def is_remote(source: str) -> bool:
    """Whether a source is named by what it is rather than by where it lies on this machine."""
    return source in KNOWN_DATASETS or re.match(r"https?://", source) is not None


@dataclass
class Part:
    """A file that is part of the text, and what to call it."""

    path: Path
    name: str
    n_bytes: int


class Text:
    """Files read as one text, in blocks."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._begins = [0, *accumulate(part.n_bytes for part in parts)]
        self.n_bytes = self._begins[-1]

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end), in blocks of at most BLOCK_BYTES."""
        for part, first in zip(self.parts, self._begins, strict=False):
            at, stop = max(begin, first) - first, min(end, first + part.n_bytes) - first
            if at >= stop:
                continue
            with part.path.open("rb") as file:
                file.seek(at)
                while at < stop:
                    block = file.read(min(BLOCK_BYTES, stop - at))
                    if not block:
                        raise GptcError(f"{part.name} shrank while it was read: prepare again")
                    yield block
                    at += len(block)

    def where(self, offset: int) -> str:
        """A byte offset in words."""
        i = min(bisect_right(self._begins, offset), len(self.parts)) - 1
        return f"{self.parts[i].name}: byte {offset - self._begins[i]}"


def gather(
    source: str, out: Path, spool: Path, stories: tuple[int, int], progress: Progress
) -> list[Part]:
    """The files of a source; what is no file on disk is first stored below `spool`."""
    if source == "stories":
        from gptc.stories import corpus

        return [_spool(corpus(*stories), spool, source, "writing stories", stories[0], progress)]
    if source in _DOWNLOADS or re.match(r"https?://", source):
        url, sha256 = _DOWNLOADS.get(source, (source, None))
        path = spool / secrets.token_hex(8)
        download(url, path, sha256=sha256, progress=progress)
        return [Part(path, source, path.stat().st_size)]
    if source == "-":
        blocks = iter(lambda: sys.stdin.buffer.read(BLOCK_BYTES), b"")
        return [_spool(blocks, spool, "standard input", "reading", None, progress)]
    path = Path(source)
    if path.is_dir():
        if path.resolve() == out.resolve():
            raise GptcError(f"--out {out} is also a source: choose another --out")
        files = list(_walk(path, out.resolve()))
        if not files:
            raise GptcError(f"the folder {path} holds no files: name one that does")
    elif path.is_file():
        files = [path]
    elif path.exists():  # a pipe, such as <(zcat text.gz)
        with path.open("rb") as pipe:
            blocks = iter(lambda: pipe.read(BLOCK_BYTES), b"")
            return [_spool(blocks, spool, source, "reading", None, progress)]
    else:
        # Path.glob takes no absolute pattern.
        found = sorted(glob.glob(source, recursive=True))  # noqa: PTH207
        files = [file for name in found if (file := Path(name)).is_file()]
        if not files:
            raise GptcError(
                f"no file, folder or URL {source!r}, and no dataset of that name: check the path, "
                f"or use one of {', '.join(KNOWN_DATASETS)}"
            )
    return [Part(file, str(file), file.stat().st_size) for file in files]


def _walk(folder: Path, out: Path) -> Iterator[Path]:
    """The files below a folder, sorted; hidden ones and the dataset to be written are left out."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.resolve() == out:
            continue
        if entry.is_dir() and not entry.is_symlink():  # a link could lead in a circle
            yield from _walk(entry, out)
        elif entry.is_file():
            yield entry


def _spool(
    blocks: Iterable[bytes],
    spool: Path,
    name: str,
    action: str,
    n_bytes: int | None,
    progress: Progress,
) -> Part:
    """Stores what can be read only once, since preparing reads it twice."""
    path = spool / secrets.token_hex(8)
    n_done = 0
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            n_done += len(block)
            progress(action, n_done, n_bytes)
    return Part(path, name, n_done)
