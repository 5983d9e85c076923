"""JSON from strangers: bounded, and each fault is one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from gptc.errors import GptcError
from gptc.files.limits import limit, refuse

MOST_DEEP = 200  # lists and objects in each other; what walks them calls itself
_PIECE = 1 << 16  # bytes
# To its end, or that of the text: every quote is passed once.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


def parse_json(
    text: bytes | memoryview, where: str, unique: bool = False, name: str = "values"
) -> Any:
    """The value of a JSON text from a stranger: GptcError for all that json.loads can fail with.

    `unique` refuses an object that holds a name twice; `name` is the limit of values.
    """
    again = "copy it again"
    check_values(text, where, name, "no model needs so many")
    try:
        return json.loads(bytes(text), object_pairs_hook=_without_twins if unique else None)
    except _TwinError as error:
        raise GptcError(f"{where} names {str(error)!r} twice; {again}") from None
    except RecursionError:
        raise GptcError(f"{where} is damaged: its JSON is nested too deep; {again}") from None
    except ValueError as error:
        at = getattr(error, "pos", getattr(error, "start", 0))
        raise GptcError(f"{where} is damaged: not JSON from byte {at:,} on; {again}") from None


def check_size(n_bytes: int, where: str) -> None:
    """GptcError for JSON of a model or dataset that is too long to be read."""
    if n_bytes > limit("json"):
        raise refuse(where, "json", "no model needs so much")


def is_finite(x: float) -> bool:
    """Whether a number of any size is a finite float; a whole number of JSON may be too large."""
    try:
        return math.isfinite(x)
    except OverflowError:
        return False


def nests_deeply(value: Any) -> bool:
    """Whether lists and objects hold each other more than MOST_DEEP deep, or one holds itself."""
    level = [value]
    for _ in range(MOST_DEEP):
        items = (v.values() if isinstance(v, Mapping) else v for v in level if _holds_others(v))
        inner = (item for several in items for item in several if _holds_others(item))
        level = list({id(item): item for item in inner}.values())
        if not level:
            return False
    return True


def _holds_others(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def check_values(data: bytes | memoryview, where: str, name: str, advice: str) -> None:
    """GptcError for a JSON text with more values than the limit `name`."""
    most = limit(name)
    pieces = (bytes(data[i : i + _PIECE]) for i in range(0, len(data), _PIECE))
    if sum(map(_n_marks, pieces)) <= most:
        return
    n, end, outside = 0, 0, bytearray()  # what is outside of texts, and not yet counted
    for found in _STRING.finditer(data):
        outside += data[end : found.start()]
        end = found.end()
        if len(outside) > _PIECE:
            n += _n_marks(outside)
            outside.clear()
            if n > most:
                break
    if n + _n_marks(outside) + _n_marks(bytes(data[end:])) > most:
        raise refuse(where, name, advice)


def _n_marks(data: bytes | bytearray) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")


class _TwinError(Exception):
    """A JSON object holds a name twice."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwinError(name)
        found[name] = value
    return found
