"""Bytes of a text that a vocabulary has no token for, counted, and a note about them."""

from __future__ import annotations

from gptc.files.words import plural
from gptc.tokenizer.base import Tokenizer

_SHOWN = 8  # bytes that a note names


class Absent:
    """Counts the bytes of a text that its tokenizer leaves out."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._bytes = b"" if tokenizer is None else tokenizer.absent_bytes
        self._seen: set[int] = set()
        self.n = 0

    def see(self, data: bytes) -> None:
        """Counts those of `data`."""
        n = len(data) - len(data.translate(None, self._bytes)) if self._bytes else 0
        if n:
            self.n += n
            self._seen |= set(data) & set(self._bytes)

    def note(self) -> str | None:
        """The note about the text; None where it lost nothing."""
        if not self.n:
            return None
        names = [f"0x{byte:02x}" for byte in sorted(self._seen)]
        shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        return (
            f"note: the tokenizer has no token for {len(self._bytes)} of the 256 bytes, and leaves "
            f"out {plural(self.n, 'byte')} of the text ({shown})"
        )
