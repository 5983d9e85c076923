"""UTF-8 that arrives in blocks."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from gptc.errors import GptcError


class Utf8Decoder:
    """Decodes UTF-8 that arrives in blocks cut anywhere; an error names the offset in the whole."""

    def __init__(self, where: Callable[[int], str] = "byte {} of the data".format) -> None:
        """`where` puts a byte offset into words."""
        self._where = where
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
        self.n_done = 0  # bytes of the characters given out
        self._n_held = 0  # bytes of a character that is not complete yet

    def push(self, block: bytes, final: bool = False) -> str:
        """The characters that `block` completes. GptcError when it is not UTF-8."""
        try:
            text = self._decoder.decode(block, final)
        except UnicodeDecodeError as e:
            raise GptcError(
                f"{self._where(self.n_done + e.start)} (0x{e.object[e.start]:02x}) is not UTF-8 "
                "text: convert it to UTF-8, or use --tokenizer bytes, which takes any data"
            ) from None
        n_held = len(self._decoder.getstate()[0])
        self.n_done += self._n_held + len(block) - n_held
        self._n_held = n_held
        return text

    def finish(self) -> None:
        """GptcError when the last character is incomplete."""
        self.push(b"", final=True)


def decode_utf8(data: bytes) -> str:
    """The text of UTF-8 `data`. GptcError names the offset of the first byte that is none."""
    return Utf8Decoder().push(data, final=True)


def character_cut(data: bytes | bytearray) -> int:
    """The length of `data` without an incomplete UTF-8 character at its end."""
    for back in range(1, min(4, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 != 0x80:  # the byte that begins the last character
            n_bytes = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(data) if n_bytes <= back else len(data) - back
    return len(data)
