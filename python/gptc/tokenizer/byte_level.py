"""Byte-level vocabularies, as of GPT-2 and Llama 3: pieces of bytes, joined by merges.

Patterns cut the text; within each cut, merges join bytes to pieces. GPT-2's files write bytes as
characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from gptc.errors import GptcError
from gptc.tokenizer.native import byte_characters
from gptc.tokenizer.patterns import Cut

_MAX_MERGING = 1 << 25  # steps; the largest vocabularies take a few times fewer

_CHARACTER_OF = {byte: char for char, byte in byte_characters().items()}
# Latin-1 has no code for what no byte is written as.
_LATIN_1_OF = dict.fromkeys(range(256), "\u0100") | {
    ord(char): chr(byte) for char, byte in byte_characters().items()
}


class ByteLevel(NamedTuple):
    """A byte-level vocabulary: the bytes of each token, and how text becomes them."""

    pieces: list[bytes]
    special: dict[str, int]  # tokens that no merge makes
    cut: Cut
    merges: list[tuple[bytes, bytes]] | None = None  # None: pieces are merged in order
    text: frozenset[int] = frozenset()  # tokens of `special` that are text, such as added words


def takes_whole(vocabulary: ByteLevel) -> bool:
    """Whether a cut that is a piece is that token, even if no merges make it."""
    return vocabulary.cut.whole or vocabulary.merges is None


def merges_of(vocabulary: ByteLevel) -> list[tuple[bytes, bytes]]:
    """The pair of pieces that each longer piece is merged from, in order.

    GptcError when the pieces are so long that the search would take minutes.
    """
    if vocabulary.merges is not None:
        return vocabulary.merges
    others = set(vocabulary.special.values())
    return _merges(tuple(p for i, p in enumerate(vocabulary.pieces) if i not in others and p))


@lru_cache(maxsize=1)  # the files of one export ask several times, which takes seconds
def _merges(pieces: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
    ranks = {piece: i for i, piece in enumerate(pieces)}
    if sum(len(piece) ** 2 for piece in ranks) > _MAX_MERGING:
        raise GptcError("the vocabulary has tokens that are too long to find their merges")
    return [_last_merge(piece, ranks) for piece in ranks if len(piece) > 1]


def _last_merge(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces that byte-pair encoding joins last on its way to `piece`."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def unmerged(vocabulary: ByteLevel) -> Iterator[bytes]:
    """The pieces that merges of their bytes do not make."""
    merges = merges_of(vocabulary)
    ranks = {pair: i for i, pair in enumerate(merges)}
    others = set(vocabulary.special.values())
    pieces = [p for i, p in enumerate(vocabulary.pieces) if i not in others and len(p) > 1]
    if vocabulary.merges is None:  # the last merge of each piece
        known = set(vocabulary.pieces)
        yield from (a + b for a, b in merges if a not in known or b not in known)
        return
    if sum(len(piece) ** 2 for piece in pieces) > _MAX_MERGING:
        raise GptcError("the vocabulary has tokens that are too long to try their merges")
    for piece in pieces:
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 1:
            found = [ranks.get(pair, len(ranks)) for pair in pairwise(parts)]
            if (first := min(found)) == len(ranks):
                yield piece
                break
            i = found.index(first)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


def vocab_bpe(vocabulary: ByteLevel) -> bytes:
    """The file vocab.bpe of a vocabulary."""
    lines = [f"{to_characters(a)} {to_characters(b)}\n" for a, b in merges_of(vocabulary)]
    return ("#version: 0.2\n" + "".join(lines)).encode()


def to_characters(piece: bytes) -> str:
    """A piece as GPT-2's files write it."""
    return piece.decode("latin-1").translate(_CHARACTER_OF)


def to_bytes(text: str) -> bytes:
    """The inverse of `to_characters`. ValueError for a text that it cannot make."""
    try:
        return text.translate(_LATIN_1_OF).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(text) from None
