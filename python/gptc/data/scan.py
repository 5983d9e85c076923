"""The first reading of a text: sizes, checksums, document borders and characters."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gptc.data.sources import Text, end_of, without_space
from gptc.errors import GptcError
from gptc.files.checksum import Checksum
from gptc.files.download import ProgressCallback
from gptc.tokenizer.absent import Absent
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer
from gptc.tokenizer.native import ByteTokenizer, CharTokenizer
from gptc.tokenizer.utf8 import Utf8Decoder

_MAX_BORDERS = 1 << 20  # of documents that are remembered; of more, every second one, and so on


@dataclass
class Scan:
    """The results of the first reading of a text."""

    sizes: list[int] = field(default_factory=list)  # of each source in bytes of text
    checksums: list[str] = field(default_factory=list)  # of each source
    marked: bool = False  # END_OF_TEXT occurs
    borders: _Borders = field(default_factory=lambda: _Borders())
    characters: list[str] = field(default_factory=list)  # that occur, for a new char tokenizer
    n_characters: int = 0
    documents: list[int] = field(default_factory=list)  # number in each source
    absent: Absent = field(default_factory=lambda: Absent(None))  # bytes without a token
    blocks: list[tuple[int, int]] = field(default_factory=list)  # (first byte, characters before)


class _Borders:
    """The bytes at which documents begin, but the first: all of them, or evenly thinned out."""

    def __init__(self) -> None:
        self.kept = array("q")
        self.n_seen = 0
        self.last = 0  # the border added last
        self.stride = 1  # of so many documents one is kept

    def add(self, at: int) -> None:
        if self.n_seen % self.stride == 0:
            self.kept.append(at)
            if len(self.kept) > _MAX_BORDERS:
                self.kept = self.kept[::2]
                self.stride *= 2
        self.n_seen += 1
        self.last = at

    def pop(self, at: int) -> None:
        """Forgets the last border, which separates nothing."""
        self.n_seen -= 1
        if self.kept[-1] == at:
            self.kept.pop()

    def nearest(self, at: float) -> int:
        """The border next to a byte."""
        i = bisect_right(self.kept, at)
        return min(self.kept[max(0, i - 1) : i + 1], key=lambda border: abs(border - at))


def scan_text(
    text: Text,
    source_of: Sequence[int],
    given: Tokenizer | None,
    collects: bool,
    report: ProgressCallback,
    algorithm: str = "xxh3_128",
) -> Scan:
    """Reads the text once. `source_of` has the source of each part, `algorithm` is of checksums.

    `collects`: the characters that occur are needed. GptcError where a char tokenizer refuses one.
    """
    scan = Scan(absent=Absent(given))
    mark = END_OF_TEXT.encode()
    known = np.zeros(sys.maxunicode + 1, dtype=np.bool_)  # code points that occur
    decoder = Utf8Decoder() if collects or isinstance(given, CharTokenizer) else None
    by_character = not isinstance(given, ByteTokenizer)
    n_tail = len(mark) - 1
    tail = b""  # of the block before: a mark may cross the border
    n_done, file_begin = 0, 0
    last_border, last_mark = 0, -1
    source, end = 0, b""
    opening = -1  # a mark there, with which a file begins, separates nothing
    checksums = [Checksum(algorithm) for _ in range(max(source_of) + 1)]
    scan.sizes, scan.documents = [0] * len(checksums), [0] * len(checksums)
    for i, block in text.documents():
        if not block:
            file_begin = n_done
            if end.rstrip().endswith(mark):  # the document has begun with this mark
                scan.documents[source] -= last_border == last_mark
                scan.documents[source_of[i]] += last_border == last_mark
            elif last_border < n_done:  # files without a mark between them
                scan.borders.add(n_done)
                last_border = n_done
                scan.documents[source_of[i]] += 1
            continue
        if file_begin == n_done:
            opening = n_done + len(block) - len(without_space(block))
        source, end = source_of[i], end_of(end, block)
        scan.documents[source] = scan.documents[source] or 1
        checksums[source].update(block)
        scan.sizes[source] += len(block)
        scan.absent.see(block)
        joint = _marks(tail + block[:n_tail], n_done - len(tail))
        for last_mark in (*joint, *_marks(block, n_done)):
            scan.marked = True
            if last_border < last_mark != opening:
                scan.borders.add(last_mark)
                scan.documents[source] += 1
                last_border = last_mark
        tail = (tail + block[-n_tail:])[-n_tail:]
        if by_character:
            scan.blocks.append((n_done, scan.n_characters))
            scan.n_characters += int(np.count_nonzero(begins_character(block)))
        if decoder is not None:
            begin = decoder.n_done
            characters = decoder.push(block)
            if collects:
                known[np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")] = True
            elif isinstance(given, CharTokenizer):
                at = given.unknown(characters)
                if at is not None:
                    offset = begin + len(characters[:at].encode()) - file_begin
                    name = text.files[i].name
                    raise GptcError(f"{name}: byte {offset}: {given.refusal(characters[at])}")
        n_done += len(block)
        report("reading", n_done, text.n_bytes_known)
    scan.checksums = [checksum.value() for checksum in checksums]
    scan.characters = [chr(code) for code in np.flatnonzero(known)]
    if scan.borders.last == last_mark:
        rest = text.read(last_mark + len(mark), text.n_bytes)
        if not any(block.strip() for block in rest):  # a mark at the very end separates nothing
            scan.borders.pop(last_mark)
            scan.documents[source] -= 1
    return scan


def _marks(data: bytes, begin: int) -> Iterator[int]:
    """The positions of END_OF_TEXT in `data`, whose first byte is at `begin`."""
    mark = END_OF_TEXT.encode()
    # Most text lacks even its first byte, whose search is several times as fast.
    found = data.find(mark) if mark[:1] in data else -1
    while found >= 0:
        yield begin + found
        found = data.find(mark, found + len(mark))


def begins_character(block: bytes) -> npt.NDArray[np.bool_]:
    """Which bytes of UTF-8 text are the first of a character."""
    begins: npt.NDArray[np.bool_] = np.frombuffer(block, dtype=np.uint8) & 0xC0 != 0x80
    return begins
