"""The common part of tokenizers that others have trained, each read by its own library.

`with_tiktoken`, `with_tokenizers` and `with_sentencepiece` have one each. It is stored whole in
`gptc_tokenizer.json`, so that a dataset or checkpoint needs no other file and no network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from gptc.tokenizer.base import END_OF_TEXT, Tokenizer, Tokens, check_text
from gptc.tokenizer.cutting import checked_cut
from gptc.tokenizer.libraries import called_for
from gptc.tokenizer.marks import Marks
from gptc.tokenizer.utf8 import decode_utf8

SPACE = "\u2581"  # how SentencePiece writes a space
_BEFORE = "a0.\n"


class PretrainedTokenizer(Tokenizer):
    """The common part of others' vocabularies: <|endoftext|> becomes their token for it."""

    def encode(self, text: str, continued: bool = False) -> Tokens:
        check_text(text)
        marked = self.end_of_text is not None
        ids: list[int] = []
        for i, part in enumerate(text.split(END_OF_TEXT) if marked else [text]):
            if i and self.end_of_text is not None:
                ids.append(self.end_of_text)
            if part:
                with called_for(part):
                    ids += self._encode_rest(part) if continued and not i else self._encode(part)
        return np.asarray(ids, dtype=np.int32)

    def take(self, marks: Marks) -> None:
        """Takes over the special tokens that a model's files name.

        The first end separates documents, unless there is a token for that.
        """
        self.marks = marks
        end = self.end_of_text
        if marks.ends and (end is None or self.pieces[end] != END_OF_TEXT.encode()):
            self.end_of_text = marks.ends[0]
        self.start = self.start_text()

    def encode_bytes(self, data: bytes, continued: bool = False) -> Tokens:
        return self.encode(decode_utf8(data), continued)

    def _encode_text(self, text: str, continued: bool) -> Sequence[int]:
        with called_for(text):
            return self._encode(text) if text else []

    def _encode(self, text: str) -> Sequence[int]:
        """The tokens of a whole text without a mark, as the library gives them."""
        raise NotImplementedError

    def _encode_rest(self, text: str) -> Sequence[int]:
        """The tokens of text that follows other text.

        Some tokenizers add a space to a whole text, or take spaces from it. So a character comes
        first here, one that shares no token with the text.
        """
        for before, known in self._before:
            ids = self._encode(before + text)
            if list(ids[: len(known)]) == known:
                return ids[len(known) :]
        return self._encode(text)

    @cached_property
    def _before(self) -> list[tuple[str, list[int]]]:
        """Characters that are known, and may come before another text, with their tokens."""
        unknown = list(self._encode("\ue000"))[-1:]  # two of which may become one token
        known = [(before, list(self._encode(before))) for before in _BEFORE]
        return [(before, ids) for before, ids in known if ids and ids[-1:] != unknown]

    def cut(self, data: bytes | bytearray) -> int:
        return checked_cut(self, data)


def read_sentencepiece(piece: str) -> bytes:
    """The bytes of a piece of a SentencePiece vocabulary."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()
