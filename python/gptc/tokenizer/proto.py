"""A SentencePiece model file (sentencepiece_model.proto): how it encodes text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_DATA, _VARINT, _FLOAT, _DOUBLE = 2, 0, 5, 1  # wire types
BPE = 2  # of trainer_spec.model_type


class Proto(NamedTuple):
    """The parts of a model that its library's Python interface does not give."""

    types: list[int]
    """The type of each piece."""
    model_type: int
    charsmap: bytes
    """The replacements of a normalizer such as NFKC; empty for none."""
    normalizer: str
    drops_spaces: bool
    """Whether spaces are removed at both ends, and runs of them become one."""
    escapes: bool
    """Whether spaces become U+2581."""
    suffixes: bool
    """Whether words end with their space."""

    @property
    def keeps_text(self) -> bool:
        """Whether text is encoded as it is, with spaces as U+2581."""
        return not self.charsmap and not self.drops_spaces and self.escapes and not self.suffixes


def read_proto(model: bytes) -> Proto:
    """The parts of a model that its library has read. ValueError when it is damaged."""
    types: list[int] = []
    trainer: dict[int, bytes | int] = {}
    normalizer: dict[int, bytes | int] = {}
    for number, value in _fields(model):
        if isinstance(value, int):
            continue
        if number == 1:
            kind = dict(_fields(value)).get(3, 1)
            types.append(kind if isinstance(kind, int) else 1)
        elif number == 2:
            trainer |= dict(_fields(value))
        elif number == 3:
            normalizer |= dict(_fields(value))
    charsmap, name = normalizer.get(2, b""), normalizer.get(1, b"")
    return Proto(
        types,
        int(trainer.get(3, 1)),
        charsmap if isinstance(charsmap, bytes) else b"",
        name.decode("utf-8", "replace") if isinstance(name, bytes) else "",
        bool(normalizer.get(4, 1)),
        bool(normalizer.get(5, 1)),
        bool(trainer.get(24, 0)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a message: numbers, and the bytes of everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _DATA:
            size, at = _varint(data, at)
        elif kind in (_FLOAT, _DOUBLE):
            size = 4 if kind == _FLOAT else 8
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the place after it."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number has no end")
