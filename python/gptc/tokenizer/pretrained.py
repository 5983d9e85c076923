"""Tokenizers that others have trained: tiktoken's encodings, tokenizer.json, SentencePiece models.

Each is read by its own library, imported when it is needed, and is stored whole in
`gptc_tokenizer.json`, so that a dataset or checkpoint needs no other file and no network.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gptc.errors import GptcError, UnknownTokenizer
from gptc.files.words import pip_install
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer, Tokens, any_of
from gptc.tokenizer.cutting import checked_cut
from gptc.tokenizer.libraries import MOST_IDS, SPARE_IDS, called, check_ids, remember, try_out
from gptc.tokenizer.marks import Marks
from gptc.tokenizer.native import byte_characters
from gptc.tokenizer.outline import dump_definition, read_outline, with_joined_merges
from gptc.tokenizer.patterns import SAFE
from gptc.tokenizer.scored import Proto, read_proto
from gptc.tokenizer.utf8 import decode_utf8

if TYPE_CHECKING:
    import sentencepiece
    import tiktoken
    import tokenizers

# Names of the token that ends a text, for a file that does not tell it.
_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
_BEFORE = "a0.\n"
_SPACE = "\u2581"  # how SentencePiece writes a space
_SILENT = 4  # a level of its log
_MOST_GROWTH = 64  # times as long as its text, by a normalizer


class PretrainedTokenizer(Tokenizer):
    """The common part of others' vocabularies: <|endoftext|> becomes their token for it."""

    def encode(self, text: str, continued: bool = False) -> Tokens:
        marked = self.end_of_text is not None
        ids: list[int] = []
        for i, part in enumerate(text.split(END_OF_TEXT) if marked else [text]):
            if i and self.end_of_text is not None:
                ids.append(self.end_of_text)
            if part:
                with called(f"a text of {len(part):,} characters"):
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
        with called(f"a text of {len(text):,} characters"):
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
        with called(f"a text of {len(text):,} characters"):
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


class HuggingFaceTokenizer(PretrainedTokenizer):
    """A tokenizer.json, read by the library `tokenizers`."""

    kind = "huggingface"

    def __init__(
        self,
        definition: str | bytes,
        start: str | None = None,
        where: str = "it",
        outline: Any = None,
    ) -> None:
        """`definition` is the text of the file. GptcError when it is none.

        `outline` is what `read_outline` gives for it, where that is known.
        """
        import tokenizers

        content = (
            definition
            if isinstance(definition, bytes)
            else definition.encode("utf-8", "surrogatepass")
        )
        outline = read_outline(content, where) if outline is None else outline
        if not isinstance(outline, dict):
            raise GptcError(f"{where} is not a tokenizer.json: copy the file again")
        _check_normalizer(outline.get("normalizer"), where)
        model = outline.get("model")
        model = model if isinstance(model, dict) else {}
        read = with_joined_merges(content, model.get("n_pairs", 0))
        try_out("tokenizers", read, where)
        with called(where, "update that package, or copy the file again"):
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(read)
            del read
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            names = self._names(where)
            # Such as "▁the" for a "the" that begins a text.
            first = self._tokenizer.encode("a", add_special_tokens=False).ids
            decoded = self._tokenizer.decode(first)
            added = self._tokenizer.get_added_tokens_decoder()
        self._definition = content
        self._renamed: tuple[frozenset[int], tokenizers.Tokenizer, dict[int, str]] | None = None
        for entry in outline.get("added_tokens") or ():
            self.takes_spaces = self.takes_spaces or entry.get("lstrip") is True
            if self.id_of(entry["content"]) != entry["id"]:
                raise GptcError(
                    f"{where} gives its token {entry['content']!r} an id that does not follow "
                    f"those before it, {entry['id']:,}: correct it"
                )
        ends = {token.content: id for id, token in added.items()}
        self.end_of_text = next((ends[end] for end in _ENDS if end in ends), None)
        unknown = model.get("unk_token")
        self.unknown_id = self.id_of(unknown if isinstance(unknown, str) else "")
        processor = json.dumps(outline.get("post_processor"))
        self.has_template = '"TemplateProcessing"' in processor  # which says what is added
        decoder = json.dumps(outline.get("decoder") or {})
        self._pieces = self._read_pieces(names, decoder, where)
        if self.unknown_id is None and "ByteLevel" in decoder:
            known = {piece for piece in self._pieces if len(piece) == 1}
            self.absent_bytes = bytes(i for i in range(256) if bytes([i]) not in known)
        self.start = start or self.start_text()
        self.adds_space = b"".join(self._pieces[i] for i in first).startswith(b" ")
        self.strips_space = self.adds_space and decoded == "a"

    def _names(self, where: str) -> Iterator[tuple[str, int]]:
        """The tokens with their ids, after a check of the ids.

        The library's mapping of all is made only for ids that several tokens share, or that are
        few and far between.
        """
        tokenizer = self._tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        inner = tokenizer.model.token_to_id
        n_names = tokenizer.get_vocab_size(with_added_tokens=False)
        n_names += sum(inner(token.content) is None for token in added)
        bound = min(MOST_IDS, n_names + SPARE_IDS)
        ids: list[int] = []
        for part in (range(min(n_names, bound)), range(n_names, bound)):
            if len(ids) < n_names:  # most vocabularies have no holes, and end with the first part
                ids += [id for id in part if tokenizer.id_to_token(id) is not None]
        if len(ids) != n_names:
            vocabulary = tokenizer.get_vocab(with_added_tokens=True)
            self.vocab_size = check_ids(list(vocabulary.values()), where)
            return iter(vocabulary.items())
        self.vocab_size = check_ids(ids, where)
        return ((tokenizer.id_to_token(id) or "", id) for id in ids)

    def _read_pieces(
        self, names: Iterable[tuple[str, int]], decoder: str, where: str
    ) -> list[bytes]:
        added = self._tokenizer.get_added_tokens_decoder()
        read: Callable[[str], bytes]
        if "ByteLevel" in decoder:
            read = _read_byte_level
        elif "Metaspace" in decoder or _SPACE in decoder or "\\u2581" in decoder:
            read = _read_sentencepiece
        else:
            raise UnknownTokenizer(
                f"{where} writes its tokens in another way than ByteLevel or Metaspace, so that "
                "text would not come back from it: use another tokenizer"
            )
        pieces = [b""] * self.vocab_size
        for piece, token in names:
            try:
                pieces[token] = piece.encode() if token in added else read(piece)
            except KeyError:
                pieces[token] = piece.encode()
        return pieces

    def _encode(self, text: str) -> Sequence[int]:
        encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoded[0].ids
        return ids

    def encode_parts(self, parts: Sequence[str | int]) -> Tokens:
        names = {id: text for text, id in self.special_texts().items()}
        spelled = any_of(names.values())
        plain = not any(isinstance(part, str) and spelled.search(part) for part in parts)
        tokenizer, hidden = (self._tokenizer, names) if plain else self._hidden(names)
        text = "".join(hidden[part] if isinstance(part, int) else part for part in parts)
        with called(f"a text of {len(text):,} characters"):
            ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.asarray(ids, dtype=np.int32)

    def _hidden(self, names: dict[int, str]) -> tuple[tokenizers.Tokenizer, dict[int, str]]:
        """The same tokenizer with other names of special tokens, which no text can hold.

        So what surrounds these tokens is cut as ever, and no text is taken for one.
        """
        import tokenizers

        key = frozenset(names)
        if self._renamed is None or self._renamed[0] != key:
            secret = secrets.token_hex(16)
            hidden = {id: f"<{secret}-{id}>" for id in names}
            with called("the tokenizer with hidden names"):
                definition = dump_definition(_with_names(self.saved, names, hidden))
                found = tokenizers.Tokenizer.from_buffer(definition)
                found.no_padding()
                found.no_truncation()
            self._renamed = key, found, hidden
        return self._renamed[1:]

    @property
    def saved(self) -> dict[str, Any]:
        """The content of the file."""
        saved: dict[str, Any] = json.loads(self._definition)
        return saved

    def own_bos(self) -> int | None:
        """The token that the file itself puts before every text."""
        with called("the post-processor of a tokenizer.json"):
            with_special = self._tokenizer.encode("a")
        begins = with_special.special_tokens_mask[:1] == [1]
        token: int | None = with_special.ids[0] if begins else None
        return token if self.has_token(token) else None

    def id_of(self, piece: str) -> int | None:
        """The token of that name."""
        with called(repr(piece)):
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
        definition = self._definition.decode("utf-8", "surrogatepass")
        return {"kind": self.kind, "definition": definition}


class SentencePieceTokenizer(PretrainedTokenizer):
    """A SentencePiece model, such as Llama 2's tokenizer.model."""

    kind = "sentencepiece"
    has_template = False

    def __init__(self, model: bytes, start: str | None = None, where: str = "it") -> None:
        """`model` is the content of the file. GptcError when it is none."""
        try:
            import sentencepiece
        except ImportError:
            raise GptcError(f"{where} needs a package: {pip_install('sentencepiece')}") from None
        try_out("sentencepiece", model, where)
        sentencepiece.SetMinLogLevel(_SILENT)
        with called(where, "copy it again"):
            self._model: sentencepiece.SentencePieceProcessor = (
                sentencepiece.SentencePieceProcessor(model_proto=model)
            )
            self.vocab_size: int = check_ids(list(range(self._model.vocab_size())), where)
            self._texts: list[str] = self._model.id_to_piece(list(range(self.vocab_size)))
            first = self._model.encode("a", out_type=str)
        self.proto = model
        end = self._model.eos_id()
        self.end_of_text = end if end >= 0 else None
        self.unknown_id = self._model.unk_id()
        self.start = start or self.start_text()
        self.adds_space = self.strips_space = bool(first) and first[0].startswith(_SPACE)

    def _encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    @property
    def named_begin(self) -> int | None:
        known = super().named_begin
        return self.own_bos() if known is None else known

    def own_bos(self) -> int | None:
        """The token that begins a text; those who read such files, as Llama's, put it there."""
        begin = self._model.bos_id()
        return begin if begin >= 0 else None

    def id_of(self, piece: str) -> int | None:
        """The token of that name."""
        return self._texts.index(piece) if piece in self._texts else None

    def scored_pieces(self) -> tuple[list[str], list[float], list[int]]:
        """Texts, scores and sorts of all pieces: the sorts are numbered as in its proto."""
        scores = list(self._model.get_score(list(range(self.vocab_size))))
        return list(self._texts), scores, list(self.facts.types)

    def cut(self, data: bytes | bytearray) -> int:
        if self.facts.is_words:  # the last one may become longer, and another token
            data = data[: max(data.rfind(b" "), data.rfind(b"\n"), 0)]
        return super().cut(data)

    @cached_property
    def facts(self) -> Proto:
        """What its proto says. GptcError when it is damaged."""
        try:
            return read_proto(self.proto)
        except ValueError:
            raise GptcError("this SentencePiece model is damaged: copy it again") from None

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


def _with_names(
    saved: dict[str, Any], names: dict[int, str], hidden: dict[int, str]
) -> dict[str, Any]:
    """A tokenizer.json whose special tokens have other names."""
    new = {names[id]: hidden[id] for id in names}
    model = saved["model"]
    vocab, merges = model["vocab"], model.get("merges")
    if isinstance(vocab, dict):
        vocab = {new.get(text, text): id for text, id in vocab.items()}
    else:  # of the sort Unigram: pairs
        vocab = [[new.get(text, text), *rest] for text, *rest in vocab]
    model = {**model, "vocab": vocab}
    if merges:  # none may end at a special token
        joined = (
            merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges
        )
        model["merges"] = [m for m, text in zip(merges, joined, strict=True) if text not in new]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    entries = saved.get("added_tokens") or []
    added = {entry["id"]: entry for entry in entries}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    added |= {
        id: {
            **plain,
            **added.get(id, {}),
            "id": id,
            "content": text,
            "special": True,
            "normalized": False,
        }
        for id, text in hidden.items()
    }
    tokens = [added[id] for id in sorted(added)]
    return {**saved, "added_tokens": tokens, "model": model, "post_processor": None}


def _check_normalizer(normalizer: Any, where: str) -> None:
    """GptcError for a normalizer of a tokenizer.json whose replacements multiply a text."""
    steps, growth = [normalizer], 1.0
    for step in steps:  # which grows
        if isinstance(step, dict):
            inner = step.get("normalizers")
            steps += inner if isinstance(inner, list) else []
            pattern, content = step.get("pattern"), step.get("content", step.get("prepend"))
            text = pattern.get("String") if isinstance(pattern, dict) else None
            if isinstance(content, str) and isinstance(text, str | None):
                growth *= max(1.0, len(content) / len(text) if text else 1 + len(content))
    if growth > _MOST_GROWTH:
        raise GptcError(
            f"{where} has a normalizer that makes a text up to {growth:,.0f} times as long; gptc "
            f"takes {_MOST_GROWTH}: use another tokenizer"
        )


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


def from_json(saved: dict[str, Any], start: str) -> Tokenizer | None:
    """The tokenizer that `to_json` described; None when it is none of these, or was altered."""
    tokenizer = _made(saved, start)
    end = saved.get("end_of_text")
    if tokenizer is not None and (end is None or tokenizer.has_token(end)):
        tokenizer.end_of_text = end
    return tokenizer


def _made(saved: dict[str, Any], start: str) -> Tokenizer | None:
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
