"""Calls into the libraries of tokenizers: all failures are one line.

`called` turns what they raise into a GptcError, panics of Rust included. What no process survives,
an abort or memory without end, happens first in a process that `try_out` starts (trial.py). The
result is kept in the cache, by the SHA-256 of the definition and the library's version. No file is
trusted for what it says of itself: whoever could fake the record can write to the user's cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

from gptc.errors import GptcError, half_a_pair
from gptc.files.bounded import Fault, run_bounded
from gptc.files.paths import cache_folder
from gptc.files.whole import write_file

MOST_IDS = 1 << 24
SPARE_IDS = 1 << 16  # without a token: vocabularies are padded

_VERSION = 1  # of the texts that are tried
_SECONDS = 4  # and one for each MB, of one core
_BYTES = 1 << 30  # of address space; a library reserves more than it uses
_BYTES_EACH = 48  # for each byte of a definition

# Read when a library first needs them.
os.environ.setdefault("RUST_BACKTRACE", "0")
os.environ.setdefault("TOKENIZERS_LOG", "off")


@contextmanager
def called(where: str, advice: str = "use another tokenizer") -> Iterator[None]:
    """Turns what a library raises into a GptcError about `where`, a file or a text."""
    try:
        yield
    except (GptcError, MemoryError):
        raise
    except BaseException as error:
        # pyo3's PanicException is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GptcError(f"{where} fails in its library ({why:.300}): {advice}") from None


@contextmanager
def called_for(text: str) -> Iterator[None]:
    """As `called`, for the library that encodes a text."""
    try:
        with called(f"a text of {len(text):,} characters"):
            yield
    except GptcError:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # of which libraries say little
            raise GptcError(
                f"character {error.start} of the text is {half_a_pair(error)}"
            ) from None
        raise


def check_ids(ids: list[int], where: str) -> int:
    """The size of a vocabulary of these ids. GptcError when they are few and far between."""
    if not ids:
        raise GptcError(f"{where} has no tokens: use another tokenizer")
    if not all(type(id) is int for id in ids) or min(ids) < 0:
        raise GptcError(f"{where} has ids of tokens that are not whole numbers from 0 on")
    size = max(ids) + 1
    if size > min(MOST_IDS, len(set(ids)) + SPARE_IDS):
        raise GptcError(
            f"{where} has {len(ids):,} tokens, and ids up to {size - 1:,}: they have to be dense, "
            f"and below {MOST_IDS:,}"
        )
    return size


def try_out(library: str, definition: bytes, where: str) -> None:
    """Tries a definition in another process, once. GptcError when it is not safe to use."""
    record = _record(library, definition)
    if record is not None and record.is_file():
        return
    fault = _tried(library, definition)
    if fault is not None:
        raise GptcError(
            f"{where} is not a tokenizer that {library} {_version(library)} can use ({fault:.300}):"
            " use another tokenizer, or copy the file again"
        )
    remember(library, definition)


def remember(library: str, definition: bytes) -> None:
    """Records that a definition is safe, where the cache can be written."""
    record = _record(library, definition)
    if record is not None:
        with suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_file(record, b"")


def _record(library: str, definition: bytes) -> Path | None:
    """The file in the cache that says that a definition is safe."""
    digest = hashlib.sha256(f"{_VERSION} {library} {_version(library)}\n".encode())
    digest.update(definition)
    with suppress(GptcError):  # without a home folder
        return cache_folder() / "tokenizers" / digest.hexdigest()
    return None


def _version(library: str) -> str:
    return str(getattr(import_module(library), "__version__", "unknown"))


def _tried(library: str, definition: bytes) -> str | None:
    """The fault of a definition; None when there is none."""
    seconds = _SECONDS + len(definition) // 1_000_000
    n_bytes = _BYTES + _BYTES_EACH * len(definition)
    program = Path(__file__).with_name("trial.py")
    try:
        said = run_bounded(program, [library], definition, seconds, n_bytes)
    except Fault as fault:
        return str(fault)
    text = said.decode("utf-8", "replace").strip()
    return None if text == "fine" else text or "it ends the process"
