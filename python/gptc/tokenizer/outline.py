"""A tokenizer.json in little memory: its text, and all of it but the vocabulary and merges.

Parsed, a vocabulary of 250,000 tokens takes ten times its text. So its values are let go as soon as
they are checked, and the text is what is kept, and what is written in parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from gptc.files.values import parse_json

_BATCH = 1024  # values that are written at once
_STRING = rb'"([^"\\]*(?:\\.[^"\\]*)*)"'
_PAIR = re.compile(rb"\[\s*" + _STRING + rb"\s*,\s*" + _STRING + rb"\s*\]\s*([,\]])\s*")
_MERGES = re.compile(rb'"merges"\s*:\s*\[\s*')
_COMMENT = "#version"  # the beginning of a line of merges that the library passes over


def read_outline(content: bytes, where: str) -> Any:
    """The value of a JSON text; of a tokenizer.json, without vocabulary and merges.

    "n_pairs" in place of the merges is their number, if each is a pair that one text can hold.
    """
    return outline_of(parse_json(content, where, name="entries"))


def outline_of(parsed: Any) -> Any:
    """The same, of the parsed text."""
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if not isinstance(model, dict):
        return parsed
    kept = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    return {**parsed, "model": {**kept, "n_pairs": _n_pairs(model.get("merges"))}}


def _n_pairs(merges: Any) -> int:
    if not isinstance(merges, list):
        return 0
    for merge in merges:
        if type(merge) is not list or len(merge) != 2:
            return 0
        first, second = merge
        if type(first) is not str or type(second) is not str:
            return 0
        if " " in first or " " in second or first.startswith(_COMMENT):
            return 0
    return len(merges)


def with_joined_merges(content: bytes, n_pairs: int) -> bytes:
    """The same tokenizer.json with texts of two tokens as merges, in place of `n_pairs` pairs.

    The library takes either, and needs half as much memory for texts.
    """
    begins = list(islice(_MERGES.finditer(content), 2))
    if not n_pairs or len(begins) != 1:
        return content
    at = begins[0].end()
    joined = bytearray(content[:at])
    for i in range(1, n_pairs + 1):
        pair = _PAIR.match(content, at)
        if pair is None or (pair[3] == b"]") != (i == n_pairs):
            return content
        joined += b'"%b %b"%b' % pair.groups()
        at = pair.end()
    joined += memoryview(content)[at:]
    return bytes(joined)


def dump_definition(value: Any) -> bytes:
    """The JSON text of a tokenizer.json, which no other copy of it is made for."""
    text = bytearray()
    for part in _parts(value):
        text += part.encode("utf-8", "surrogatepass")
    return bytes(text)


def _parts(value: Any) -> Iterator[str]:
    """The text of `json.dumps`, in parts."""
    if isinstance(value, dict) and value and len(value) <= _BATCH:
        for i, (name, inner) in enumerate(value.items()):
            yield (", " if i else "{") + _dump(name) + ": "
            yield from _parts(inner)
        yield "}"
    elif isinstance(value, dict | list) and len(value) > _BATCH:
        items = iter(value.items() if isinstance(value, dict) else value)
        kind = type(value)
        whole = _dump(kind())
        yield whole[0]
        for i in range(0, len(value), _BATCH):
            yield (", " if i else "") + _dump(kind(islice(items, _BATCH)))[1:-1]
        yield whole[1]
    else:
        yield _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
