"""Reads bytes by a regex, a grammar or a JSON schema, one at a time: the texts that match it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gptc.generation.constraint import Constraint, GrammarState, make_constraint
from gptc.tokenizer.registry import make_tokenizer

JSON_GRAMMAR = (Path(__file__).resolve().parents[2] / "docs" / "json.gbnf").read_text()
_BYTES = make_tokenizer("bytes")


def of_bytes(**pattern: str) -> Constraint:
    """The constraint of a pattern on bytes."""
    return make_constraint(_BYTES, 256, **pattern)


def reads(state: GrammarState, text: bytes) -> bool:
    """Appends the text, as far as each byte is allowed; whether all of it is."""
    for byte in text:
        if byte not in state.allowed:
            return False
        state.take(byte)
    return True


def matches(constraint: Constraint, text: str | bytes) -> bool:
    """Whether the text is complete."""
    state = constraint.begin()
    return reads(state, text.encode() if isinstance(text, str) else text) and state.complete


def texts(state: GrammarState, alphabet: bytes, most: int) -> Iterator[tuple[bytes, bool]]:
    """Every text that may follow, of at most `most` letters, and whether it is complete."""
    yield b"", state.complete
    length = state.length
    for letter in alphabet if most else b"":
        if letter in state.allowed:
            state.take(letter)
            for rest, complete in texts(state, alphabet, most - 1):
                yield bytes([letter]) + rest, complete
            state.rewind(length)
