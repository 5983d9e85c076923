"""The objects of a JSON file that is one array, as Alpaca's and ShareGPT's sets are published.

The file is never held whole: an object is decoded as soon as its end is read.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from gptc.data.archives import COMPRESSED
from gptc.errors import GptcError
from gptc.files.limits import limit, refuse
from gptc.files.values import check_values

_PIECE = 1 << 16  # characters that are read at a time, at first
_SPACE = " \t\r\n\ufeff"
_CUT = "cut it into several rows"


def is_json(name: str) -> bool:
    """Whether a file of that name, perhaps compressed, is JSON, though not lines of it."""
    lower = name.lower()
    return any(lower.endswith(".json" + packed) for packed in ("", *COMPRESSED))


def array_objects(file: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, Any] | GptcError]]:
    """The place and the fields of each object of an array, or the fault of an element.

    GptcError for a file that is not an array, or that is damaged beyond an element.
    """
    text = _Text(file, name)
    if text.next() != "[":
        raise GptcError(f"{name} is not a JSON array of objects: give one object a line as .jsonl")
    text.skip(1)
    number = 0
    while (begin := text.next()) != "]":
        if number:
            if begin != ",":
                raise text.damaged(number + 1)
            text.skip(1)
            text.next()
        number += 1
        where = f"{name}: row {number}"
        value = text.value(number)
        if isinstance(value, dict):
            yield where, value
        else:
            advice = "repair it, or leave such rows out with --on-bad-row skip"
            yield where, GptcError(f"{where} is not an object: {advice}")
    text.skip(1)
    if text.next():
        raise GptcError(f"{name} has more than one JSON array: give one object a line as .jsonl")


class _Text:
    """The characters of a file from its current place on."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = codecs.getreader("utf-8")(file, "surrogateescape"), name
        self._held, self._at, self._ended = "", 0, False
        self._decoder = json.JSONDecoder()

    def damaged(self, number: int) -> GptcError:
        return GptcError(f"{self._name}: row {number} is not JSON: repair it, or copy it again")

    def skip(self, n: int) -> None:
        self._at += n

    def next(self) -> str:
        """The next character that is not a space; "" at the end."""
        while True:
            rest = self._held[self._at :].lstrip(_SPACE)
            self._held, self._at = rest, 0
            if rest or self._ended:
                return rest[:1]
            self._read(_PIECE)

    def value(self, number: int) -> Any:
        """The value that begins here. GptcError where it does not end within the limit of a row."""
        n = _PIECE
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._held)
                return value
            except RecursionError:
                raise self.damaged(number) from None
            except ValueError:
                if self._ended:
                    raise self.damaged(number) from None
            if len(self._held) > limit("row"):
                raise refuse(f"{self._name}: row {number}", "row", _CUT)
            self._read(n)
            n *= 2
            held = self._held.encode("utf-8", "surrogateescape")
            check_values(held, f"{self._name}: row {number}", "fields", _CUT)

    def _read(self, n: int) -> None:
        more = self._file.read(n)
        self._held += more
        self._ended = not more
