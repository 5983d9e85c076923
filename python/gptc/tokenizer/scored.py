"""Scored vocabularies, as of SentencePiece and Llama 2: pieces of text with a score each.

The pair whose piece has the highest score is merged first.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

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
