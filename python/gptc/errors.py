"""Errors shown to the user: one line with the cause and what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LONGEST = 2000  # characters of a message
UPGRADE = "upgrade with git pull && pip install . where you cloned gptc"


def printable(text: str) -> str:
    """The text as one printable line; control characters are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_ADDRESS = re.compile(r"://([^\s'\"<>`]+)")  # after any scheme


def without_secrets(text: str) -> str:
    """The text without the user, password and query of each address in it.

    A query may hold a token or a signature, so `?…` takes its place.
    """
    return _ADDRESS.sub(lambda m: f"://{_public(m[1])}", text)


def _public(rest: str) -> str:
    """An address after its `//`, as `without_secrets` shows it."""
    tail = rest[len(rest.rstrip(").,:;")) :]
    host = re.split(r"[/?#]", rest)[0]
    if "@" in host:
        rest = rest[host.rindex("@") + 1 :]
    elif not re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?", host.rstrip(").,:;")):
        rest = rest.rpartition("@")[2]  # a password with a slash, which is not a host and port
    path, mark, _ = rest.partition("?")
    if mark:
        return f"{path}?…{tail}"
    path, mark, _ = rest.partition("#")
    return f"{path}#…{tail}" if mark else rest


class GptcError(Exception):
    """A failure whose cause is outside the program. The command line exits with 1.

    The message is one printable line, even if it quotes a name from a damaged file. Addresses in it
    have no passwords.
    """

    silent = False
    """Another process of the job prints it."""
    about: str | None = None
    """The option at fault, such as "prompt", where it is known."""

    def __init__(self, message: str) -> None:
        message = without_secrets(message)
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))


def half_a_pair(error: UnicodeEncodeError) -> str:
    """The character of a text that UTF-8 cannot express, and what to do about it."""
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:  # as Python keeps a byte of a command line or a file
        return f"the byte 0x{code - 0xDC00:02X}, which is not UTF-8 (U+{code:04X}): give UTF-8"
    return f"U+{code:04X}, half of a surrogate pair: give the whole character"


class Uncopied:
    """An object that owns memory of a library or an open file: a copy would free it twice."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = type(self).__name__
        raise GptcError(
            f"a {name} cannot be copied or pickled: create or load another one, in the process "
            "that uses it"
        )


class UsageError(GptcError):
    """Invalid options or arguments. The command line exits with 2."""


class EngineError(GptcError):
    """A failed call of libgpt.so, with its message. `status` is an enum gpt_status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NoTokenizer(GptcError):
    """A model is stored without a tokenizer, rather than with one that cannot be read."""


class UnknownTokenizer(GptcError):
    """A model is stored with a tokenizer of a sort that gptc does not read; it is not damaged."""


class PromptTooLong(GptcError):
    """A prompt that does not fit into the context. `n_tokens` is its length."""

    def __init__(self, message: str, n_tokens: int) -> None:
        super().__init__(message)
        self.n_tokens = n_tokens


class DeadEnd(GptcError):
    """A constrained text cannot continue: no token is allowed, or the grammar is too ambiguous."""


# An option of the command line, but not one in a command to type, such as `gptc train --resume`.
# The value of one in Python is the text, where the command line has a file with it.
_OPTION = re.compile(r"gptc [a-z]+ [^,;:]*|(?<![\w-])--([a-z][a-z0-9-]*)(?: FILE\b)?")


@contextmanager
def about(option: str) -> Iterator[None]:
    """Errors of the block are about this option."""
    try:
        yield
    except GptcError as error:
        error.about = error.about or option
        raise


@contextmanager
def python_names() -> Iterator[None]:
    """Errors name parameters of Python: top_p, not --top-p."""
    try:
        yield
    except GptcError as error:
        text = str(error)
        error.args = (_OPTION.sub(lambda m: m[1].replace("-", "_") if m[1] else m[0], text),)
        raise
