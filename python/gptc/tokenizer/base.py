"""Text to token ids and back: bytes, characters, GPT-2's byte-pair encoding or one's own.

    tokenizer = make_tokenizer("bytes")
    tokens = tokenizer.encode("Once upon a time")  # int32 (T,)
    text = tokenizer.decode(tokens)

A tokenizer is saved as `gptc_tokenizer.json` in the folder of a dataset or a checkpoint.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.errors import GptcError, UsageError
from gptc.files.whole import write_file
from gptc.tokenizer.marks import NONE, Marks

if TYPE_CHECKING:
    pass

Tokens: TypeAlias = npt.NDArray[np.int32]
TokensLike: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "gptc_tokenizer.json"


def any_of(texts: Iterable[str], flags: int = 0) -> re.Pattern[str]:
    """Matches the longest of these texts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)", flags)


def check_text(text: object) -> None:
    """UsageError for what is not a text."""
    if not isinstance(text, str):
        raise UsageError(
            f"the text is {text!r:.60}; it must be a str, and encode_bytes takes bytes"
        )


def _ids(tokens: object) -> list[int]:
    """The ids (T,) as a list. UsageError for what is not a row of whole numbers."""
    try:
        found = np.asarray(tokens)
    except ValueError:  # rows of several lengths
        found = np.asarray("")
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise UsageError(f"the tokens are {tokens!r:.60}; they must be a list of token ids")
    ids: list[int] = found.tolist()
    return ids


class Tokenizer(ABC):
    """A reversible mapping between text and token ids in [0, vocab_size)."""

    kind: str
    vocab_size: int
    start: str
    """The text that begins a document; used without a prompt."""
    end_of_text: int | None
    """The id of the special token that separates documents, if there is one."""
    unknown_id: int | None = None
    takes_spaces: bool = False
    """Whether a token takes all spaces before it (`lstrip`)."""
    absent_bytes: bytes = b""
    """Bytes that have no token, and are left out of a text."""
    """The id of the token for text that has no other (<unk>); None where all text has."""
    strips_space: bool = False
    """Whether `decode` takes a space from the beginning of a text."""
    bos: int | None = None
    """The id of the token that begins every text of the model (BOS); None for a model without.

    It tells how a model was taught, not how text is cut: `mapping` does not contain it, `encode`
    does not add it, and a dataset's tokenizer has none.
    """

    marks: Marks = NONE
    """The special tokens that the model's files name; like `bos`, not part of the mapping."""

    @property
    def all_ends(self) -> list[int]:
        """The ids that end a text when a model writes them: the main one first, BOS last."""
        found = dict.fromkeys((*self.marks.ends, self.end_of_text, self.bos))
        return [id for id in found if id is not None]

    @property
    def ends(self) -> frozenset[int]:
        """The same as a set."""
        return frozenset(self.all_ends)

    def start_text(self) -> str:
        """The text of the token that ends a text and so begins the next one; else a line end."""
        end = self.end_of_text
        return "\n" if end is None else self.pieces[end].decode("utf-8", "replace")

    @property
    def named_ends(self) -> tuple[int, ...]:
        """The ids that end a text by the model's files, the main one first."""
        end = () if self.end_of_text is None else (self.end_of_text,)
        return self.marks.ends or end

    @property
    def named_begin(self) -> int | None:
        """The id that the model's files name as BOS, whether or not texts begin with it."""
        return self.marks.begin if self.bos is None else self.bos

    def adopt(self, other: Tokenizer) -> None:
        """Takes over what a model's files say about special tokens, from its tokenizer.

        For a model that is trained further: the end of documents ends a text too.
        """
        ends = dict.fromkeys([*other.marks.ends, self.end_of_text] if other.marks.ends else ())
        known = tuple(id for id in ends if id is not None)
        self.bos, self.marks = other.bos, replace(other.marks, ends=known)

    @abstractmethod
    def encode(self, text: str, continued: bool = False) -> Tokens:
        """The tokens of `text`, int32 (T,). GptcError when it cannot be expressed.

        `continued`: other text came before, so that nothing is added which begins a text.
        """

    def encode_parts(self, parts: Sequence[str | int]) -> Tokens:
        """The tokens of a text (T,) whose special tokens are given by their ids.

        In the texts between them, the characters of a special token are text.
        """
        found: list[int] = []
        for part in parts:
            found += [part] if isinstance(part, int) else self._encode_text(part, bool(found))
        return np.asarray(found, dtype=np.int32)

    def _encode_text(self, text: str, continued: bool) -> Sequence[int]:
        """The tokens of a text in which no special token is found."""
        ids: list[int] = self.encode(text, continued).tolist() if text else []
        return ids

    @abstractmethod
    def encode_bytes(self, data: bytes, continued: bool = False) -> Tokens:
        """The tokens of raw bytes, int32 (T,). GptcError names the first that is not text."""

    def encode_raw(self, data: bytes, continued: bool = False) -> Tokens:
        """As `encode_bytes`, but bytes that are not UTF-8 become tokens of single bytes."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("utf-8", "surrogateescape")
        else:
            return self.encode(text, continued)
        if self.byte_ids is None:
            raise GptcError(f"the {self.kind} tokenizer has no tokens for single bytes")
        parts = []
        for i, part in enumerate(re.split("([\udc80-\udcff]+)", text)):
            strays = np.frombuffer(part.encode("utf-8", "surrogateescape"), dtype=np.uint8)
            parts.append(self.byte_ids[strays] if i % 2 else self.encode(part, continued or i > 0))
        return np.concatenate(parts)

    @cached_property
    def byte_ids(self) -> Tokens | None:
        """The token of each byte (256,), -1 for an ASCII byte without one; None: there are none."""
        ids = np.full(256, -1, dtype=np.int32)
        for token, piece in reversed(list(enumerate(self.pieces))):
            if len(piece) == 1:
                ids[piece[0]] = token
        return None if (ids[128:] < 0).any() else ids

    def twin(self) -> Tokenizer:
        """The same for another thread: an encoder of tiktoken is slower where threads share one."""
        twin = copy.copy(self)
        twin.__dict__.pop("encoding", None)
        return twin

    @abstractmethod
    def cut(self, data: bytes | bytearray) -> int:
        """Length of the longest prefix whose tokens cannot change as data arrives.

        The tokens of data[:cut] and of the rest, `continued`, are those of the whole. 0: none is
        known.
        """

    @property
    @abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """The bytes of each token, by id."""

    @property
    def specials(self) -> frozenset[int]:
        """The ids of tokens that are not text, such as those that begin and end one."""
        return self.ends

    def special_texts(self) -> dict[str, int]:
        """The special tokens by their text, but for single characters: these are text as well."""
        texts = {self.pieces[id].decode("utf-8", "replace"): id for id in sorted(self.specials)}
        return {text: id for text, id in texts.items() if len(text) > 1}

    @abstractmethod
    def mapping(self) -> dict[str, Any]:
        """The values that determine the mapping between text and ids."""

    @cached_property
    def _piece_bytes(self) -> npt.NDArray[np.int64]:
        n_bytes = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        n_bytes[list(self.specials)] = 0
        return n_bytes

    @cached_property
    def longest(self) -> int:
        """The number of bytes of the longest token."""
        return int(self._piece_bytes.max())

    def count_bytes(self, tokens: TokensLike) -> int:
        """The number of bytes of text in `tokens`. Special tokens have none."""
        counts = np.bincount(np.asarray(tokens, dtype=np.int64), minlength=self.vocab_size)
        return int(counts @ self._piece_bytes)

    def decode_bytes(self, tokens: TokensLike) -> bytes:
        """The bytes of `tokens`. GptcError for an id outside the vocabulary."""
        ids = _ids(tokens)
        pieces = self.pieces
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise GptcError(
                    f"token {token} is outside the {self.kind} tokenizer's vocabulary of "
                    f"{self.vocab_size}: use the tokenizer that these tokens were made with"
                )
        return b"".join([pieces[token] for token in ids])

    def decode(self, tokens: TokensLike, continued: bool = False) -> str:
        """The text of `tokens`; bytes that are not UTF-8 become U+FFFD.

        A space that `encode` adds to a whole text is taken away, as the tokenizer's library does.
        `continued`: other text came before, so that nothing is.
        """
        data = self.decode_bytes(tokens)
        if self.strips_space and not continued:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def has_token(self, token: object) -> bool:
        """Whether this, which a file says, is the id of a token."""
        return type(token) is int and 0 <= token < self.vocab_size

    def fingerprint(self) -> str:
        """A SHA-256 in hex, equal for tokenizers that map text to the same ids."""
        return _digest(self.mapping())

    def to_json(self) -> dict[str, Any]:
        """Everything that `load_tokenizer` needs, as plain JSON values."""
        begins = {"version": 1} if self.bos is None else {"version": 2, "bos": self.bos}
        version = 4 if self.marks.named_templates else 3
        marks = {"version": version, "marks": self.marks.to_json()} if self.marks != NONE else {}
        mapping = self.mapping()
        return {
            **begins,
            **marks,
            "vocab_size": self.vocab_size,
            "start": self.start,
            "end_of_text": self.end_of_text,
            **mapping,
            "fingerprint": _digest(mapping),
        }

    def save(self, folder: Path) -> None:
        """Writes `folder/gptc_tokenizer.json`, whole or not at all."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        write_file(folder / FILE_NAME, text.encode())


def _digest(mapping: dict[str, Any]) -> str:
    """The SHA-256 of a mapping. Its text, which may be large, is encoded piece by piece."""
    canonical = json.dumps(mapping, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256()
    for first in range(0, len(canonical), 1 << 20):
        digest.update(canonical[first : first + (1 << 20)].encode())
    return digest.hexdigest()


class StreamDecoder:
    """Turns tokens into text one at a time, and never gives out part of a UTF-8 character.

    The concatenation of all `push` and a final `flush` is what `decode` gives for the whole.
    `continued` is as there.
    """

    def __init__(self, tokenizer: Tokenizer, *, continued: bool = True) -> None:
        self._tokenizer = tokenizer
        self._strips_space = tokenizer.strips_space and not continued
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be empty."""
        data = self._tokenizer.decode_bytes([token])
        if self._strips_space and data:
            data, self._strips_space = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The rest of the text, an unfinished character as U+FFFD; the decoder can then restart."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
