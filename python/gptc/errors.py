"""Errors shown to the user: one line with the cause and what to do next."""

from __future__ import annotations

_LONGEST = 2000  # characters of a message
UPGRADE = "upgrade with git pull && pip install . where you cloned gptc"


def printable(text: str) -> str:
    """The text as one printable line; control characters are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class GptcError(Exception):
    """A failure whose cause is outside the program. The command line exits with 1.

    The message is one printable line, even if it quotes a name from a damaged file.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))


class UsageError(GptcError):
    """Invalid options or arguments. The command line exits with 2."""


class EngineError(GptcError):
    """A failed call of libgpt.so, with its message. `status` is an enum gpt_status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class DeadEnd(GptcError):
    """A constrained text cannot continue: no token is allowed, or the grammar is too ambiguous."""
