"""Which documents of a text train and which validate."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptc.data.archives import BLOCK_BYTES
from gptc.data.loader import mix
from gptc.data.scan import Scan, begins_character
from gptc.data.sources import Text

Range = tuple[int, int]


@dataclass
class Division:
    """The ranges of a text that train, and those that validate, each in the text's order."""

    train: Sequence[Range]
    val: Sequence[Range]
    n_held_out: int | None = None
    """Documents that were drawn at random to validate; None: they are the end of the text."""


class DividedText:
    """The ranges of a division one after another: those that train, then those that validate."""

    def __init__(self, text: Text, division: Division) -> None:
        self._text = text
        self._ranges = [*division.train, *division.val]
        self._begins = [0]
        for begin, end in self._ranges:
            self._begins.append(self._begins[-1] + end - begin)
        self.n_train = self._begins[len(division.train)]
        self.n_bytes = self._begins[-1]

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end), in blocks."""
        ranges = []
        for i in range(max(0, bisect_right(self._begins, begin) - 1), len(self._ranges)):
            first = self._begins[i]
            if first >= end:
                break
            at = self._ranges[i][0] - first
            ranges.append((max(begin, first) + at, min(end, self._begins[i + 1]) + at))
        # What trains and what validates: each in the order of the text.
        for some in _ascending(ranges):
            yield from self._text.read(*some[0]) if len(some) == 1 else self._several(some)

    def _several(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """The bytes of ascending ranges. A file is read once: it may be possible only that way."""
        waiting: list[bytes] = []
        n_waiting = 0
        blocks: Iterator[bytes] = iter(())
        block, at, file = memoryview(b""), 0, -1  # `block` begins at byte `at` of the text
        for begin, end in ranges:
            if self._text.file_at(begin) != file:
                blocks = self._text.read(begin, ranges[-1][1])
                block, at = memoryview(b""), begin
            while at < end:
                if not block or at + len(block) <= begin:
                    at += len(block)
                    block = memoryview(next(blocks))
                    continue
                some = block[max(0, begin - at) : end - at]
                waiting.append(bytes(some))
                n_waiting += len(some)
                rest = block[end - at :]
                at, block = at + len(block) - len(rest), rest
                if n_waiting >= BLOCK_BYTES:
                    yield b"".join(waiting)
                    waiting, n_waiting = [], 0
            file = self._text.file_at(end - 1)
        if waiting:
            yield b"".join(waiting)


def _ascending(ranges: Sequence[Range]) -> Iterator[Sequence[Range]]:
    """The ranges in runs, of which each ascends."""
    first = 0
    for i in range(1, len(ranges) + 1):
        if i == len(ranges) or ranges[i][0] < ranges[i - 1][1]:
            yield ranges[first:i]
            first = i


def at_end(text: Text, begin: int) -> Division:
    """The division of a text whose bytes from `begin` on validate."""
    return Division([(0, begin)], [(begin, text.n_bytes)])


def held_out(text: Text, scan: Scan, val_fraction: float, seed: int) -> Division | None:
    """A division whose validation documents are drawn at random, as a function of the seed.

    None when whole documents cannot make up the fraction: one split would be less than half as
    long as asked for. With very many documents, neighbours are drawn together.
    """
    if not val_fraction or not scan.borders.kept:
        return None
    bounds = np.array([0, *scan.borders.kept, text.n_bytes], dtype=np.int64)
    sizes = np.diff(bounds)
    wanted = text.n_bytes * val_fraction
    drawn = drawn_documents(sizes, wanted, seed)
    n_val = int(sizes[drawn].sum())
    if n_val < wanted / 2 or text.n_bytes - n_val < (text.n_bytes - wanted) / 2:
        return None
    n_documents = sum(scan.documents)
    count = min(int(drawn.sum()) * scan.borders.stride, n_documents - 1)
    return Division(_ranges(bounds, ~drawn), _ranges(bounds, drawn), count)


def drawn_documents(
    sizes: npt.NDArray[np.int64], wanted: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Documents in random order, until they have about `wanted` bytes; too long ones are not."""
    keys = mix(
        np.full(len(sizes), seed % 2**64, dtype=np.uint64), np.arange(len(sizes), dtype=np.uint64)
    )
    drawn = np.zeros(len(sizes), dtype=np.bool_)
    for i in np.argsort(keys, kind="stable").tolist():
        if sizes[i] < 2 * wanted:  # nearer than without it
            drawn[i] = True
            wanted -= int(sizes[i])
        if wanted <= 0:
            break
    return drawn


def _ranges(bounds: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_]) -> list[Range]:
    """The ranges of the chosen documents; neighbours are one range."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
    places: list[int] = bounds[edges].tolist()
    return list(zip(places[::2], places[1::2], strict=True))


def val_begin(text: Text, scan: Scan, val_fraction: float, by_byte: bool) -> int:
    """The byte at which the last `val_fraction` of the text begins.

    A document begins there, unless one split would then be less than half as long as asked for:
    with two documents of which one is long.
    """
    if val_fraction == 0:
        return text.n_bytes
    n_train_bytes = text.n_bytes * (1 - val_fraction)
    if scan.borders.kept:
        at = scan.borders.nearest(n_train_bytes)
        if at >= n_train_bytes / 2 and text.n_bytes - at >= text.n_bytes * val_fraction / 2:
            return at
    if by_byte:
        return int(n_train_bytes)
    n_train = int(scan.n_characters * (1 - val_fraction))
    if n_train == scan.n_characters:
        return text.n_bytes
    first, n_before = scan.blocks[
        bisect_right(scan.blocks, n_train, key=lambda block: block[1]) - 1
    ]
    for block in text.read(first, text.n_bytes):
        begins = np.flatnonzero(begins_character(block))
        if n_train - n_before < len(begins):
            return first + int(begins[n_train - n_before])
        first, n_before = first + len(block), n_before + len(begins)
    return text.n_bytes
