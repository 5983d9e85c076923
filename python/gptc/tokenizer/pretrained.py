"""Tokenizers that others have trained: tiktoken's encodings, tokenizer.json, SentencePiece models.

Each is read by its own library, imported when it is needed, and is stored whole in
`gptc_tokenizer.json`, so that a dataset or checkpoint needs no other file and no network.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptc.errors import GptcError
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer, Tokens
from gptc.tokenizer.cutting import checked_cut
from gptc.tokenizer.native import byte_characters
from gptc.tokenizer.utf8 import decode_utf8

if TYPE_CHECKING:
    import sentencepiece
    import tiktoken
    import tokenizers

# Names of the token that ends a text in the vocabularies of others.
_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
FILES = ("tokenizer.json", "tokenizer.model")  # in a Hugging Face folder
CONFIG = "tokenizer_config.json"  # in the same folder
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
_BEFORE = "a0.\n"
_SPACE = "\u2581"  # how SentencePiece writes a space


class PretrainedTokenizer(Tokenizer):
    """The common part of others' vocabularies: <|endoftext|> becomes their token for it."""

    def encode(self, text: str, continued: bool = False) -> Tokens:
        marked = self.end_of_text is not None
        ids: list[int] = []
        for i, part in enumerate(text.split(END_OF_TEXT) if marked else [text]):
            if i and self.end_of_text is not None:
                ids.append(self.end_of_text)
            if part:
                ids += self._encode_rest(part) if continued and not i else self._encode(part)
        return np.asarray(ids, dtype=np.int32)

    def encode_bytes(self, data: bytes, continued: bool = False) -> Tokens:
        return self.encode(decode_utf8(data), continued)

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


class TiktokenTokenizer(PretrainedTokenizer):
    """An encoding of tiktoken: its pieces by rank, its pattern and its special tokens."""

    def __init__(
        self,
        name: str,
        pattern: str,
        ranked: Sequence[bytes],
        special: dict[str, int],
        start: str = END_OF_TEXT,
    ) -> None:
        self.kind = name
        self.pattern = pattern
        self.ranked = list(ranked)
        self.special = special
        self.vocab_size = max([len(self.ranked) - 1, *special.values()]) + 1
        self.end_of_text = special.get(END_OF_TEXT)
        self.start = start

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
        special = dict(encoding._special_tokens)
        ranked = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
        if [rank for _, rank in ranked] != list(range(len(ranked))):
            raise GptcError(f"the encoding {name} has gaps in its ranks: choose another tokenizer")
        return cls(name, encoding._pat_str, [piece for piece, _ in ranked], special)

    def encode(self, text: str, continued: bool = False) -> Tokens:
        tokens = self.encoding.encode_to_numpy(
            text, allowed_special={END_OF_TEXT} & self.special.keys(), disallowed_special=()
        )
        return np.asarray(tokens, dtype=np.int32)

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """tiktoken's encoder."""
        import tiktoken

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


class HuggingFaceTokenizer(PretrainedTokenizer):
    """A tokenizer.json, read by the library `tokenizers`."""

    kind = "huggingface"

    def __init__(self, definition: str, start: str | None = None, where: str = "it") -> None:
        """`definition` is the text of the file. GptcError when it is none."""
        import tokenizers

        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as e:  # what the library raises is an Exception and no more
            raise GptcError(
                f"{where} is not a tokenizer.json that tokenizers {tokenizers.__version__} can "
                f"read ({str(e).splitlines()[0]}): copy it again"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._definition = definition
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = next((vocabulary[end] for end in _ENDS if end in vocabulary), None)
        self.start = start or (END_OF_TEXT if self.end_of_text is not None else "\n")
        processor = json.dumps(json.loads(definition).get("post_processor"))
        self.has_template = '"TemplateProcessing"' in processor  # which says what is added
        self._pieces = self._read_pieces(where)
        # Such as "▁the" for a "the" that begins a text.
        ids = self._tokenizer.encode("a", add_special_tokens=False).ids
        self.adds_space = b"".join(self._pieces[i] for i in ids).startswith(b" ")

    def _read_pieces(self, where: str) -> list[bytes]:
        model = json.dumps(json.loads(self._definition).get("decoder") or {})
        added = self._tokenizer.get_added_tokens_decoder()
        read: Callable[[str], bytes]
        if "ByteLevel" in model:
            read = _read_byte_level
        elif "Metaspace" in model or _SPACE in model or "\\u2581" in model:
            read = _read_sentencepiece
        else:
            raise GptcError(
                f"{where} writes its tokens in another way than ByteLevel or Metaspace, so that "
                "text would not come back from it: use another tokenizer"
            )
        pieces = [b""] * self.vocab_size
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            try:
                pieces[token] = piece.encode() if token in added else read(piece)
            except KeyError:
                pieces[token] = piece.encode()
        return pieces

    def _encode(self, text: str) -> Sequence[int]:
        encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoded[0].ids
        return ids

    @property
    def saved(self) -> dict[str, Any]:
        """The content of the file."""
        saved: dict[str, Any] = json.loads(self._definition)
        return saved

    def own_bos(self) -> int | None:
        """The token that the file itself puts before every text."""
        with_special = self._tokenizer.encode("a")
        begins = with_special.special_tokens_mask[:1] == [1]
        token: int | None = with_special.ids[0] if begins else None
        return token if self.has_token(token) else None

    def id_of(self, piece: str) -> int | None:
        """The token of that name."""
        token: int | None = self._tokenizer.token_to_id(piece)
        return token

    @property
    def pieces(self) -> Sequence[bytes]:
        return self._pieces

    @property
    def specials(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return super().specials | {id for id, token in added.items() if token.special}

    def mapping(self) -> dict[str, Any]:
        return {"kind": self.kind, "definition": self._definition}


class SentencePieceTokenizer(PretrainedTokenizer):
    """A SentencePiece model, such as Llama 2's tokenizer.model."""

    kind = "sentencepiece"
    has_template = False

    def __init__(self, model: bytes, start: str | None = None, where: str = "it") -> None:
        """`model` is the content of the file. GptcError when it is none."""
        try:
            import sentencepiece
        except ImportError:
            raise GptcError(f"{where} needs a package: pip install sentencepiece") from None
        try:
            self._model: sentencepiece.SentencePieceProcessor = (
                sentencepiece.SentencePieceProcessor(model_proto=model)
            )
            self.vocab_size: int = self._model.vocab_size()
            self._texts: list[str] = self._model.id_to_piece(list(range(self.vocab_size)))
            first = self._model.encode("a", out_type=str)
        except (RuntimeError, UnicodeError):
            raise GptcError(f"{where} is not a SentencePiece model: copy it again") from None
        self.proto = model
        end = self._model.eos_id()
        self.end_of_text = end if end >= 0 else None
        self.start = start or (END_OF_TEXT if self.end_of_text is not None else "\n")
        self.adds_space = bool(first) and first[0].startswith(_SPACE)

    def _encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def own_bos(self) -> int | None:
        """The token that begins a text; those who read such files, as Llama's, put it there."""
        begin = self._model.bos_id()
        return begin if begin >= 0 else None

    def id_of(self, piece: str) -> int | None:
        """The token of that name."""
        return self._texts.index(piece) if piece in self._texts else None

    def scored_pieces(self) -> tuple[list[str], list[float], list[int]]:
        """Texts, scores and sorts of all pieces: the sorts are numbered as in its proto."""
        ids = list(range(self.vocab_size))
        model = self._model
        sorts = [
            (2, model.is_unknown),
            (3, model.is_control),
            (5, model.is_unused),
            (6, model.is_byte),
        ]
        types = [next((n for n, holds in sorts if holds(i)), 1) for i in ids]
        return list(self._texts), list(model.get_score(ids)), types

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        return [
            piece.encode() if self._model.is_control(i) else _read_sentencepiece(piece)
            for i, piece in enumerate(self._texts)
        ]

    @property
    def specials(self) -> frozenset[int]:
        _, _, sorts = self.scored_pieces()
        return super().specials | {id for id, sort in enumerate(sorts) if sort in (2, 3, 5)}

    def mapping(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": base64.b64encode(self.proto).decode()}


def _read_byte_level(piece: str) -> bytes:
    """The bytes of a piece of a vocabulary like GPT-2's."""
    byte_of = byte_characters()
    return bytes([byte_of[char] for char in piece])


def _read_sentencepiece(piece: str) -> bytes:
    """The bytes of a piece of a SentencePiece vocabulary."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()


def encoding_names() -> Sequence[str]:
    """The names of tiktoken's encodings."""
    import tiktoken

    names: list[str] = tiktoken.list_encoding_names()
    return names


def read_file(path: Path) -> Tokenizer | None:
    """The tokenizer in a tokenizer.json or .model of others; None when it is neither.

    A tokenizer_config.json in its folder may tell how texts begin. GptcError when one is
    damaged.
    """
    if path.is_dir():
        found = [path / name for name in FILES]
        path = next((file for file in found if file.is_file()), path)
    if not path.is_file():
        return None
    try:
        data = path.read_bytes()
    except OSError as e:
        raise GptcError(f"cannot read {path}: {e.strerror}") from None
    tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer
    if path.suffix == ".model":
        tokenizer = SentencePieceTokenizer(data, where=str(path))
    else:
        try:
            saved = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
            return None
        tokenizer = HuggingFaceTokenizer(data.decode(), where=str(path))
    tokenizer.bos = _bos(tokenizer, _read_config(path.with_name(CONFIG)))
    return tokenizer


def _read_config(path: Path) -> dict[str, Any]:
    """The content of a tokenizer_config.json; nothing where there is none. GptcError if damaged."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise GptcError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise GptcError(f"{path} is damaged: not a JSON object; copy it again")
    return config


def _bos(
    tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer, config: dict[str, Any]
) -> int | None:
    """The token that begins the texts of a Hugging Face model.

    tokenizer.json has a template for that. The classes for Llama, whose sort a .model alone is, add
    a token without one too, and none where `add_bos_token` is false.
    """
    own = tokenizer.own_bos()
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    like_llama = isinstance(tokenizer, SentencePieceTokenizer) or kind in _LLAMA_CLASSES
    added = config.get("add_bos_token") if like_llama else None
    if added is None:
        added = own is not None or (like_llama and not tokenizer.has_template)
    if own is not None or not added:
        return own if added else None
    name = config.get("bos_token", "<s>")
    name = name.get("content") if isinstance(name, dict) else name
    return tokenizer.id_of(name) if isinstance(name, str) else None


def from_json(saved: dict[str, Any], start: str) -> Tokenizer | None:
    """The tokenizer that `to_json` described; None when it is none of these, or was altered."""
    kind = saved.get("kind")
    try:
        if kind == "huggingface":
            return HuggingFaceTokenizer(saved["definition"], start)
        if kind == "sentencepiece":
            return SentencePieceTokenizer(base64.b64decode(saved["model"], validate=True), start)
        if "ranked" in saved:
            ranked = [piece.encode("latin-1") for piece in saved["ranked"]]
            return TiktokenTokenizer(str(kind), saved["pattern"], ranked, saved["special"], start)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return None
