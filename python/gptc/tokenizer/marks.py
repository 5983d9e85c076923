"""The special tokens that a model's files name: begin, ends, padding, and the chat template.

They tell how a model was taught, not how text is cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Marks:
    """Names of tokens in a model's files. The ids are of tokens that its tokenizer has."""

    begin: int | None = None
    """The token named as BOS, whether or not texts begin with it."""
    ends: tuple[int, ...] = ()
    """The tokens that end a text (EOS), the main one first."""
    pad: int | None = None
    chat_template: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Those that are named."""
        values = {**vars(self), "ends": list(self.ends)}
        return {name: value for name, value in values.items() if value not in (None, [])}


NONE = Marks()


def marks_from(
    vocab_size: int,
    begin: object = None,
    ends: Iterable[object] = (),
    pad: object = None,
    chat_template: object = None,
) -> Marks:
    """Marks of values that a file holds: those of another type, or without a token, are left out.

    An end may be a list of ends.
    """

    def token(value: object) -> int | None:
        return value if type(value) is int and 0 <= value < vocab_size else None

    flat = [one for end in ends for one in (end if isinstance(end, list) else [end])]
    known = dict.fromkeys(id for end in flat if (id := token(end)) is not None)
    template = chat_template if isinstance(chat_template, str) and chat_template else None
    return Marks(token(begin), tuple(known), token(pad), template)
