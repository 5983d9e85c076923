"""The errors a user may see: one line that names the cause and the next thing to type."""

from __future__ import annotations


class GptcError(Exception):
    """Something went wrong for a reason outside the program. The command line exits with 1."""


class UsageError(GptcError):
    """The options or arguments make no sense together. The command line exits with 2."""


class EngineError(GptcError):
    """libgpt.so refused or failed; the message is its own. `status` is its enum gpt_status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
