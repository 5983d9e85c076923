"""Scored vocabularies, as of SentencePiece and Llama 2: pieces of text with a score each.

The pair whose piece has the highest score is merged first.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

SPACE = "\u2581"  # how SentencePiece writes a space

# Types of pieces, by the numbers that SentencePiece and GGUF share.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Scored(NamedTuple):
    """A vocabulary of SentencePiece's sort; spaces are written as U+2581."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    add_space: bool = True  # before a text


def type_of(piece: str, added: bool) -> int:
    if piece == "<unk>":
        return UNKNOWN
    if added:
        return CONTROL
    if not piece:
        return UNUSED
    return BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else NORMAL


def model_proto(vocabulary: Scored) -> bytes:
    """A SentencePiece model of the kind of Llama's (its sentencepiece_model.proto)."""
    types = vocabulary.types
    out = bytearray()
    for text, score, kind in zip(vocabulary.pieces, vocabulary.scores, types, strict=True):
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        out += _field(1, piece + _number(3, kind))
    ids = {name: i for i, name in enumerate(vocabulary.pieces[:1000])}
    unknown = types.index(UNKNOWN) if UNKNOWN in types else 0
    trainer = _number(3, 2) + _number(4, len(types)) + _number(35, int(BYTE in types))
    trainer += _number(40, unknown) + _number(41, ids.get("<s>", -1))
    trainer += _number(42, ids.get("</s>", -1)) + _number(43, -1)
    normalizer = _field(1, b"identity") + _number(3, int(vocabulary.add_space))
    normalizer += _number(4, 0) + _number(5, 1)
    return bytes(out) + _field(2, trainer) + _field(3, normalizer)


class Proto(NamedTuple):
    """The facts of a SentencePiece model that decide how it cuts text."""

    types: list[int]  # of pieces
    is_bpe: bool
    is_words: bool  # a token is a word between spaces
    normalizes: bool  # replaces characters, or removes spaces


def is_proto(data: bytes) -> bool:
    """Whether this is a SentencePiece model."""
    try:
        return bool(read_proto(data).types)
    except ValueError:
        return False


def read_proto(data: bytes) -> Proto:
    """The facts of a SentencePiece model. ValueError when it is none."""
    types, trainer, normalizer = [], dict[int, Any](), dict[int, Any]()
    for number, value in _fields(data):
        if number == 1:
            types.append(dict(_fields(value)).get(3, NORMAL))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))
    normalizes = bool(normalizer.get(2)) or bool(normalizer.get(4, 1)) or bool(trainer.get(24))
    normalizes = normalizes or not normalizer.get(5, 1)
    sort = trainer.get(3, 1)
    return Proto(types, sort == 2, sort == 3, normalizes)


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: numbers as they are, others as bytes."""
    if not isinstance(data, bytes):
        raise ValueError
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _read_varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError
        yield key >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    """A field that is a number."""
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
