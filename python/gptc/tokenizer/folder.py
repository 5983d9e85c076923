"""Tokenizers in the files of a Hugging Face folder, and the special tokens that these name.

A file is recognised by its content: a tokenizer.json, or a SentencePiece model. A folder may also
hold the pair of GPT-2 or Qwen, vocab.json and merges.txt.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from gptc.errors import GptcError, UnknownTokenizer
from gptc.files.limits import read_file
from gptc.files.values import parse_json
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer
from gptc.tokenizer.definition import (
    Added,
    pair_definition,
    scored_definition,
    scored_vocabulary,
)
from gptc.tokenizer.marks import DEFAULT, Marks, marks_from
from gptc.tokenizer.native import is_gpt2s
from gptc.tokenizer.outline import dump_definition, read_outline
from gptc.tokenizer.patterns import CUTS, GPT2
from gptc.tokenizer.scored import CONTROL, UNUSED, USER_DEFINED, Scored, is_proto
from gptc.tokenizer.tekken import is_tekken, read_tekken
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer

JSON, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_ADDED, _SPECIAL, _TEMPLATE = "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"
TEKKEN = "tekken.json"
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
_MODEL_CONFIGS = ("generation_config.json", "config.json")
# Files of tokenizers that gptc does not read; no other tokenizer is taken in their place.
_OTHERS = ("vocab.txt", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", _ADDED)
NAMES = (
    JSON,
    MODEL,
    TEKKEN,
    CONFIG,
    *PAIRS[0],
    *PAIRS[1],
    _ADDED,
    _SPECIAL,
    _TEMPLATE,
    _MODEL_CONFIGS[0],
)
"""The files that `read_files` may read in a folder."""

_MOST_UNUSED = 1 << 16  # ids without a token

_QWENS = ("qwen2", "qwen3")
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
# The classes that have a pair, and how they cut a text.
_PAIR_CLASSES = dict.fromkeys(
    ("GPT2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend", "None"), GPT2
) | {"Qwen2Tokenizer": CUTS["qwen2"]}


def read_files(path: Path) -> Tokenizer | None:
    """The tokenizer of others in a file or folder; None when there is none.

    Other files in its folder may tell how texts begin and end. GptcError when one is damaged, or
    when it is of a sort that gptc does not read.
    """
    files = _Files(path if path.is_dir() else path.parent)
    found = _read_folder(files) if path.is_dir() else _read_one(path, files)
    if found is None:
        return None
    found.take(files.marks(found))
    return found


_Theirs: TypeAlias = HuggingFaceTokenizer | SentencePieceTokenizer


def _id(tokenizer: _Theirs, text: str | None) -> int | None:
    return None if text is None else tokenizer.id_of(text)


class _Files:
    """The files of a folder that tell about its tokenizer; a missing one holds nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self.read(CONFIG)

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object in a file. GptcError if it is damaged."""
        path = self.folder / name
        value = _json(path)
        if value is not None and not isinstance(value, dict):
            raise GptcError(f"{path} is damaged: not a JSON object; copy it again")
        return value or {}

    def named(self, key: str) -> str | None:
        """The text of a special token, such as "eos_token"."""
        for values in (self.config, self.read(_SPECIAL)):
            value = values.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                return value
        return None

    def kind(self) -> str:
        """The class of the tokenizer; that of Qwen's models where no file names one."""
        found = self.config.get("tokenizer_class")
        if found is None and self._of_model(_MODEL_CONFIGS[1]).get("model_type") in _QWENS:
            found = "Qwen2Tokenizer"
        return str(found).removesuffix("Fast")

    def added(self) -> dict[int, Added]:
        """The tokens that are added to a vocabulary, by id."""
        found = {}
        for content, id in self.read(_ADDED).items():
            if type(id) is int:
                found[id] = Added(id, content, special=content in self._specials())
        decoder = self.config.get("added_tokens_decoder")
        for number, entry in decoder.items() if isinstance(decoder, dict) else ():
            if not re.fullmatch("[0-9]{1,9}", number):
                continue
            if isinstance(entry, dict) and "content" in entry:
                found[int(number)] = Added.from_json(int(number), entry)
        return found

    def _specials(self) -> set[str | None]:
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
        more = [v.get("additional_special_tokens") for v in (self.config, self.read(_SPECIAL))]
        texts = [text for some in more if isinstance(some, list) for text in some]
        texts = [text.get("content") if isinstance(text, dict) else text for text in texts]
        known = (text for text in texts if isinstance(text, str))
        return {*(self.named(name) for name in names), *known}

    def specials_in(self, vocab: dict[str, int]) -> Iterable[tuple[str, int]]:
        """The special tokens that a vocabulary holds already."""
        return [(text, vocab[text]) for text in self._specials() if text and text in vocab]

    def marks(self, tokenizer: _Theirs) -> Marks:
        """The special tokens that the files name."""
        configs = [self._of_model(name) for name in _MODEL_CONFIGS]

        def first(key: str, name: str) -> int | None:
            ids = [_id(tokenizer, self.named(name)), *(config.get(key) for config in configs)]
            return next((id for id in ids if tokenizer.has_token(id)), None)

        return marks_from(
            tokenizer.vocab_size,
            first("bos_token_id", "bos_token"),
            [
                _id(tokenizer, self.named("eos_token")),
                *(config.get("eos_token_id") for config in configs),
            ],
            first("pad_token_id", "pad_token"),
            self._chat_templates(),
        )

    def _of_model(self, name: str) -> dict[str, Any]:
        """A config of the model; whoever reads the model says if it is damaged."""
        with suppress(GptcError):
            return self.read(name)
        return {}

    def _chat_templates(self) -> object:
        """Those in files, of which one may have no name; else those of tokenizer_config.json."""
        files = {DEFAULT: self.folder / _TEMPLATE}
        files |= {path.stem: path for path in sorted(self.folder.glob(MORE_TEMPLATES))}
        found = {name: read_template(path) for name, path in files.items() if path.is_file()}
        return found or self.config.get("chat_template")


def read_template(path: Path) -> str:
    """The chat template in a file. GptcError if it cannot be read."""
    try:
        return read_file(path, "template").decode("utf-8-sig")
    except OSError as error:
        raise GptcError(f"cannot read the chat template {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise GptcError(
            f"byte {error.start} of the chat template {path} is not UTF-8: copy it again"
        ) from None


def _read_folder(files: _Files) -> _Theirs | None:
    folder = files.folder
    for name in (JSON, MODEL):
        if (folder / name).is_file():
            found = _read_one(folder / name, files)
            if found is not None:
                return found
    for vocab, merges in PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return _read_pair(folder / vocab, folder / merges, files)
    models = [*sorted(folder.glob("*.model")), *sorted(folder.glob(TEKKEN))]
    if len(models) == 1:
        return _read_one(models[0], files)
    others = [name for name in _OTHERS if _holds(folder / name)]
    others += [path.name for path in [*models, *sorted(folder.glob("*.tiktoken"))]]
    if others:
        raise UnknownTokenizer(
            f"{folder} holds a tokenizer that gptc does not read ({', '.join(others)}): add its "
            f"{JSON}"
        )
    return None


def _holds(path: Path) -> bool:
    """Whether a file is of another tokenizer than GPT-2's, whose list of merges is enough."""
    return path.is_file() and not is_gpt2s(read_file(path))


def _read_one(path: Path, files: _Files) -> _Theirs | None:
    if not path.is_file():
        return None
    try:
        data = read_file(path)
    except OSError as e:
        raise GptcError(f"cannot read {path}: {e.strerror}") from None
    tokenizer: _Theirs
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        try:
            saved = read_outline(data, str(path))
        except GptcError:
            if path.name == JSON:
                raise
            return None
        if is_tekken(saved):
            return read_tekken(saved, str(path))
        if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
            _refuse_damaged(path)
            return None
        data = data.removeprefix(codecs.BOM_UTF8)
        tokenizer = HuggingFaceTokenizer(data, where=str(path), outline=saved)
        added = _more(tokenizer, saved, files)
        if added:
            del tokenizer  # its memory is for the one that follows
            where = f"{path}, with the tokens that other files add,"
            tokenizer = HuggingFaceTokenizer(_with_more(data, added), where=where)
        tokenizer.bos = _bos(tokenizer, files)
        return tokenizer
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n[A-Za-z0-9+/]+=* \d+\r?\n", data[:400]):
        raise GptcError(f"{path} is of tiktoken's sort, without its pattern: give a {JSON}")
    if path.suffix != ".model" and not is_proto(data):
        _refuse_damaged(path)
        return None
    tokenizer = SentencePieceTokenizer(data, where=str(path))
    bos = _bos(tokenizer, files)
    extended = _with_added(tokenizer, files, str(path))
    extended.bos = bos
    return extended


def _refuse_damaged(path: Path) -> None:
    """GptcError for a tokenizer.json that is none; a file of another name may be anything."""
    if path.name == JSON:
        raise GptcError(f"{path} is damaged, or not a {JSON} of Hugging Face: copy it again")


def _more(
    tokenizer: HuggingFaceTokenizer, saved: dict[str, Any], files: _Files
) -> list[dict[str, Any]]:
    """The tokens that other files add to a tokenizer.json, as in transformers."""
    there = {entry["content"] for entry in saved.get("added_tokens") or ()}
    added = sorted(token for token in files.added().values() if token.content not in there)
    own = {token.content: tokenizer.id_of(token.content) for token in added}
    ids = {text: id for text, id in own.items() if id is not None}
    return [token._replace(id=ids.get(token.content, token.id))._asdict() for token in added]


def _with_more(definition: bytes, added: list[dict[str, Any]]) -> bytes:
    """A tokenizer.json with more tokens."""
    saved = json.loads(definition)
    return dump_definition({**saved, "added_tokens": [*(saved.get("added_tokens") or ()), *added]})


def _with_added(tokenizer: SentencePieceTokenizer, files: _Files, where: str) -> _Theirs:
    """A SentencePiece model with the tokens that other files add to it."""
    names = dict(enumerate(tokenizer.scored_pieces()[0]))
    added = {i: token for i, token in files.added().items() if names.get(i) != token.content}
    if not added:
        return tokenizer
    try:
        pieces, scores, types, add_space = scored_vocabulary(tokenizer)
    except GptcError as error:
        raise GptcError(f"{where} has tokens that other files add, and {error}") from None
    size = max(added) + 1
    if size > len(pieces) + len(added) or any(i < len(pieces) for i in added):
        raise GptcError(f"{where}: the ids of the tokens added to it are not those that follow its")
    more = [added.get(i) for i in range(len(pieces), size)]
    pieces += [token.content if token else "" for token in more]
    types += [(CONTROL if t.special else USER_DEFINED) if t else UNUSED for t in more]
    scores += [0.0] * len(more)
    legacy = files.config.get("legacy") is not False
    vocabulary = Scored(pieces, scores, types, add_space)
    definition = scored_definition(vocabulary, first_only=not legacy, added=added)
    return HuggingFaceTokenizer(dump_definition(definition), where=where)


def _read_pair(vocab_file: Path, merges_file: Path, files: _Files) -> HuggingFaceTokenizer:
    """GPT-2's pair of files, or Qwen's."""
    kind = files.kind()
    if kind not in _PAIR_CLASSES:
        raise UnknownTokenizer(
            f"{vocab_file.parent} has a {kind} in {vocab_file.name} and {merges_file.name}, and "
            f"gptc reads only a GPT2Tokenizer or Qwen2Tokenizer from these: add its {JSON}"
        )
    vocab = files.read(vocab_file.name)
    if not vocab or not all(type(id) is int and id >= 0 for id in vocab.values()):
        raise GptcError(f"{vocab_file} is damaged: not a mapping from tokens to ids; copy it again")
    try:
        lines = read_file(merges_file).decode().split("\n")
    except (OSError, ValueError) as error:
        raise GptcError(f"cannot read {merges_file}: {error}") from None
    lines = [line.rstrip("\r") for line in lines if line and not line.startswith("#version")]
    merges = [line.split(" ") for line in lines]
    if not all(len(merge) == 2 for merge in merges):
        raise GptcError(f"{merges_file} is damaged: a line is not two tokens; copy it again")
    added = files.added()
    if max([*vocab.values(), *added]) >= 2 * (len(vocab) + len(added)) + _MOST_UNUSED:
        raise GptcError(f"{vocab_file}: its ids go far beyond its {len(vocab):,} tokens")
    if kind == "Qwen2Tokenizer" and not added and END_OF_TEXT not in vocab:
        added[len(vocab)] = Added(len(vocab), END_OF_TEXT)  # which the class adds by itself
    for text, id in [*files.specials_in(vocab), *_end_in(vocab)]:
        added.setdefault(id, Added(id, text, special=True))
    space = files.config.get("add_prefix_space") is True
    definition = dump_definition(pair_definition(vocab, merges, added, space, _PAIR_CLASSES[kind]))
    del vocab, merges
    tokenizer = HuggingFaceTokenizer(definition, where=str(vocab_file))
    if files.config.get("add_bos_token") is True:
        tokenizer.bos = tokenizer.id_of(files.named("bos_token") or END_OF_TEXT)
    return tokenizer


def _end_in(vocab: dict[str, int]) -> Iterable[tuple[str, int]]:
    """The end of a text, which the class for GPT-2 names where no file does."""
    return [(END_OF_TEXT, vocab[END_OF_TEXT])] if END_OF_TEXT in vocab else []


def _bos(tokenizer: _Theirs, files: _Files) -> int | None:
    """The token that begins the texts of a Hugging Face model.

    tokenizer.json has a template for that. The classes for Llama, whose sort a .model alone is, add
    a token without one too, and none where `add_bos_token` is false.
    """
    own = tokenizer.own_bos()
    sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
    like_llama = sentencepiece or files.kind() in _LLAMA_CLASSES
    added = files.config.get("add_bos_token") if like_llama else None
    if added is None:
        added = own is not None or (like_llama and not tokenizer.has_template)
    if own is not None or not added:
        return own if added else None
    if files.config.get("bos_token", "") is None:
        return None
    return tokenizer.id_of(files.named("bos_token") or "<s>")


def _json(path: Path) -> Any:
    """The value in a JSON file; None where there is none. GptcError if it is damaged."""
    try:
        return parse_json(read_file(path), str(path), name="entries")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise GptcError(f"cannot read {path}: {e.strerror}") from None
