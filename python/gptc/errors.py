"""The errors a user may see: one line that names the cause and the next thing to type."""

from __future__ import annotations

_LONGEST = 2000  # characters of a message
UPGRADE = "upgrade with git pull && pip install . where you cloned gptc"


def printable(text: str) -> str:
    """One line that a terminal shows as it is: what it could take for a command is spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class GptcError(Exception):
    """Something went wrong for a reason outside the program. The command line exits with 1.

    The message is one line that a terminal shows as it is, whatever name from a file is in it.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))


class UsageError(GptcError):
    """The options or arguments make no sense together. The command line exits with 2."""


class EngineError(GptcError):
    """libgpt.so refused or failed; the message is its own. `status` is its enum gpt_status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class DeadEnd(GptcError):
    """A text cannot go on as a regex or a grammar wants: no token fits, or too many readings do."""
