"""Steps through the automaton of a grammar: the state after a text, and whether it matches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptc.generation.grammar.automaton import Machine

JSON_GRAMMAR = (Path(__file__).resolve().parents[2] / "docs" / "json.gbnf").read_text()


def after(machine: Machine, text: bytes) -> Any:
    """The state after `text`."""
    stacks = machine.start
    for byte in text:
        stacks = machine.step(stacks, byte)
    return stacks


def matches(machine: Machine, text: str | bytes) -> bool:
    """Whether `text` is complete."""
    return None in after(machine, text.encode() if isinstance(text, str) else text)


def shortest_end(machine: Machine, stacks: Any, alphabet: bytes, most: int = 8) -> bytes | None:
    """The fewest bytes that complete a text."""
    level = {b"": stacks}
    for _ in range(most + 1):
        for text, here in level.items():
            if None in here:
                return text
        level = {
            text + bytes([byte]): there
            for text, here in level.items()
            for byte in alphabet
            if (there := machine.step(here, byte))
        }
        level = dict({here: (text, here) for text, here in level.items()}.values())
    return None
