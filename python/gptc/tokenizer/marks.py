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
    """The template (Jinja) that makes a prompt of messages, if no other is asked for."""
    named_templates: tuple[tuple[str, str], ...] = ()
    """The other chat templates: names and texts, such as that of "tool_use"."""

    @property
    def templates(self) -> dict[str, str]:
        """All chat templates by name; the one without a name is "default"."""
        first = {} if self.chat_template is None else {DEFAULT: self.chat_template}
        return first | dict(self.named_templates)

    def to_json(self) -> dict[str, Any]:
        """Those that are named. Several chat templates are an object."""
        template = self.templates if self.named_templates else self.chat_template
        values: dict[str, Any] = {"begin": self.begin, "ends": list(self.ends), "pad": self.pad}
        values |= {"chat_template": template}
        return {name: value for name, value in values.items() if value not in (None, [])}


DEFAULT = "default"
NONE = Marks()


def marks_from(
    vocab_size: int,
    begin: object = None,
    ends: Iterable[object] = (),
    pad: object = None,
    chat_template: object = None,
) -> Marks:
    """Marks of values that a file holds: those of another type, or without a token, are left out.

    An end may be a list of ends. Chat templates are a text, texts by name, or a list of such pairs
    as in tokenizer_config.json.
    """

    def token(value: object) -> int | None:
        return value if type(value) is int and 0 <= value < vocab_size else None

    flat = [one for end in ends for one in (end if isinstance(end, list) else [end])]
    known = dict.fromkeys(id for end in flat if (id := token(end)) is not None)
    templates = _by_name(chat_template)
    default = templates.pop(DEFAULT, None)
    named = tuple(sorted(templates.items()))
    return Marks(token(begin), tuple(known), token(pad), default, named)


def _by_name(found: object) -> dict[str, str]:
    """Chat templates by name."""
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = {str(entry.get("name")): entry.get("template") for entry in entries}
    named = found if isinstance(found, dict) else {DEFAULT: found}
    return {name: text for name, text in named.items() if isinstance(text, str) and text}
