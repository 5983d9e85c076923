"""Places where a text can be cut so that the tokens of its parts are those of the whole.

A border between two tokens is exact if the tokens around it are the same with and without it:
byte-pair encoding, a pattern and Viterbi's search let distant text act on a border only through
the tokens next to it. So a place is compared with a little text around it. A pattern that counts,
such as one of eight characters a piece, fits by chance where that text begins at a border: so it
is compared from several beginnings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice

import numpy as np

from gptc.tokenizer.base import END_OF_TEXT, Tokenizer, Tokens

_BEFORE, _AFTER = 1024, 256  # bytes around a cut that are compared
_BEGINNINGS = (0, -64, -63)  # characters of those before it
_WORD = re.compile(rb"[^ \n\t\r]")
_N_PLACES = 64  # spaces that are tried, from the last
_N_INSIDE = 512  # characters that are tried in text without a space; tokens are shorter
_INSIDE_NEAR = 64


def before_space(data: bytes | bytearray) -> Iterator[int]:
    """The places where whitespace begins after another character, from the last."""
    end = len(data)
    while (space := max(data.rfind(b" ", 0, end), data.rfind(b"\n", 0, end))) > 0:
        end = len(data[:space].rstrip(b" \n\t\r"))
        before = data[max(0, end - 4) : end].decode("utf-8", errors="ignore")[-1:]
        if before and not before.isspace():
            yield end


def checked_cut(tokenizer: Tokenizer, data: bytes | bytearray) -> int:
    """The last place before whitespace, or before a mark, with the same tokens on both sides."""
    # It is known which token begins at a place if the text reaches a token further; more is better.
    known = max(0, len(data) - max(tokenizer.longest, min(_AFTER, len(data) // 4)))
    for at in islice(before_space(data[:known]), _N_PLACES):
        word = _WORD.search(data, at, known)
        if word is None:
            continue
        near = data[max(0, at - _BEFORE) : at], data[at : word.start() + _AFTER]
        before, after = (part.decode("utf-8", errors="ignore") for part in near)
        rest = cache(partial(tokenizer.encode, after, True))
        # A token that must be a whole word (`single_word`) is not found after a letter.
        if at < _BEFORE and not _joins(tokenizer, before, after, rest, continued=False):
            continue
        begun = dict.fromkeys(before[i:] for i in _BEGINNINGS)  # the same text if it is short
        if all(_joins(tokenizer, text, after, rest, continued=True) for text in begun):
            return at
    mark = data.rfind(END_OF_TEXT.encode())
    return mark if mark > 0 and tokenizer.end_of_text is not None else 0


def cut_inside(tokenizer: Tokenizer, data: bytes | bytearray, continued: bool) -> int:
    """A border between two tokens of text without spaces; 0 if there is none.

    It is one among the tokens of all of `data`, because those of a run such as "aaaa" depend on
    where it begins.
    """
    text = data.decode("utf-8", errors="ignore")
    whole = tokenizer.encode(text, continued)
    last = len(text) * 7 // 8
    for at in range(last, max(0, last - _N_INSIDE), -1):
        if tokenizer.takes_spaces and text[at - 1].isspace():
            continue  # a token that takes this one may follow
        near = text[max(0, at - _INSIDE_NEAR) : at], text[at : at + _INSIDE_NEAR]
        after = partial(tokenizer.encode, near[1], True)
        if not _joins(tokenizer, *near, after, continued=True):
            continue
        rest = tokenizer.encode(text[at:], continued=True)
        if 0 < len(rest) < len(whole) and np.array_equal(whole[-len(rest) :], rest):
            return len(text[:at].encode())
    return 0


def _joins(
    tokenizer: Tokenizer, before: str, after: str, rest: Callable[[], Tokens], continued: bool
) -> bool:
    """Whether the tokens of two texts, one after the other, are those of both as one.

    `rest` gives the tokens of the second.
    """
    first = tokenizer.encode(before, continued)
    both = tokenizer.encode(before + after, continued)
    if not np.array_equal(both[: len(first)], first):
        return False
    return np.array_equal(both[len(first) :], rest())
