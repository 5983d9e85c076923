"""The tokenizer.json of Hugging Face, read by the library `tokenizers`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptc.errors import GptcError, UnknownTokenizer
from gptc.tokenizer.base import END_OF_TEXT, Tokens, any_of
from gptc.tokenizer.byte_level import to_bytes
from gptc.tokenizer.libraries import MOST_IDS, SPARE_IDS, called, called_for, check_ids, try_out
from gptc.tokenizer.outline import dump_definition, read_outline, with_joined_merges
from gptc.tokenizer.pretrained import SPACE, PretrainedTokenizer, read_sentencepiece

if TYPE_CHECKING:
    import tokenizers

# Names of the token that ends a text, for a file that does not tell it.
_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
_MOST_GROWTH = 64  # times as long as its text, by a normalizer


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
            read = to_bytes
        elif "Metaspace" in decoder or SPACE in decoder or "\\u2581" in decoder:
            read = read_sentencepiece
        else:
            raise UnknownTokenizer(
                f"{where} writes its tokens in another way than ByteLevel or Metaspace, so that "
                "text would not come back from it: use another tokenizer"
            )
        pieces = [b""] * self.vocab_size
        for piece, token in names:
            try:
                pieces[token] = piece.encode() if token in added else read(piece)
            except ValueError:
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
        with called_for(text):
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
