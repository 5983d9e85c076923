"""Encodings of tiktoken, such as cl100k_base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gptc.errors import GptcError
from gptc.tokenizer.base import END_OF_TEXT, Tokens, check_text
from gptc.tokenizer.libraries import called, called_for, check_ids, remember, try_out
from gptc.tokenizer.patterns import SAFE
from gptc.tokenizer.pretrained import PretrainedTokenizer

if TYPE_CHECKING:
    import tiktoken


class TiktokenTokenizer(PretrainedTokenizer):
    """An encoding of tiktoken: its pieces by rank, its pattern and its special tokens."""

    def __init__(
        self,
        name: str,
        pattern: str,
        ranked: Sequence[bytes],
        special: dict[str, int],
        start: str | None = None,
    ) -> None:
        """GptcError when tiktoken could not encode every text with it."""
        self.kind = name
        self.pattern = pattern
        self.ranked = list(ranked)
        self.special = special
        self._check()
        self.vocab_size = check_ids([*range(len(self.ranked)), *special.values()], self._where)
        self.end_of_text = special.get(END_OF_TEXT)
        self.start = start or self.start_text()

    @property
    def _where(self) -> str:
        return f"the tokenizer {self.kind}"

    def _check(self) -> None:
        ranked, special = self.ranked, self.special
        distinct = len({*ranked, *(text.encode() for text in special)})
        if distinct < len(ranked) + len(special) or b"" in ranked or "" in special:
            raise GptcError(f"{self._where} has a token twice, or one without text")
        if not {bytes([i]) for i in range(256)} <= set(ranked):
            raise GptcError(f"{self._where} has no token for some byte")
        if len(set(special.values()) - set(range(len(ranked)))) < len(special):
            raise GptcError(f"{self._where} has an id twice")
        if self.pattern not in SAFE:  # ours are safe
            try_out("tiktoken", self.pattern.encode("utf-8", "replace"), self._where)

    @classmethod
    def named(cls, name: str) -> TiktokenTokenizer:
        """The encoding of that name. GptcError when tiktoken can neither find nor download it."""
        import requests
        import tiktoken

        try:
            encoding = tiktoken.get_encoding(name)
        except (requests.RequestException, OSError, ValueError) as e:
            raise GptcError(
                f"tiktoken cannot load the encoding {name} ({type(e).__name__}): check the "
                "network, or set TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from None
        remember("tiktoken", encoding._pat_str.encode())
        special = dict(encoding._special_tokens)
        ranked = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
        if [rank for _, rank in ranked] != list(range(len(ranked))):
            raise GptcError(f"the encoding {name} has gaps in its ranks: choose another tokenizer")
        return cls(name, encoding._pat_str, [piece for piece, _ in ranked], special)

    def encode(self, text: str, continued: bool = False) -> Tokens:
        check_text(text)
        with called_for(text):
            tokens = self.encoding.encode_to_numpy(
                text, allowed_special={END_OF_TEXT} & self.special.keys(), disallowed_special=()
            )
        return np.asarray(tokens, dtype=np.int32)

    def _encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self.encoding.encode_ordinary(text)
        return ids

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """tiktoken's encoder."""
        import tiktoken

        with called(self._where):
            return tiktoken.Encoding(
                self.kind,
                pat_str=self.pattern,
                mergeable_ranks={piece: rank for rank, piece in enumerate(self.ranked)},
                special_tokens=self.special,
            )

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        pieces = self.ranked + [b""] * (self.vocab_size - len(self.ranked))
        for text, token in self.special.items():
            pieces[token] = text.encode()
        return pieces

    @property
    def specials(self) -> frozenset[int]:
        return super().specials | frozenset(self.special.values())

    def mapping(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "pattern": self.pattern,
            "ranked": [piece.decode("latin-1") for piece in self.ranked],
            "special": self.special,
        }
