"""Tokenizers by name, by file, and by folder."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptc.errors import UPGRADE, GptcError, UsageError
from gptc.files.limits import read_file
from gptc.files.values import parse_json
from gptc.tokenizer.base import FILE_NAME, Tokenizer
from gptc.tokenizer.marks import marks_from
from gptc.tokenizer.native import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    gpt2_vocabulary_in,
    is_gpt2s,
)
from gptc.tokenizer.utf8 import Utf8Decoder, character_cut, decode_utf8

ENCODINGS = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")  # of tiktoken
KINDS = ("bytes", "char", "gpt2", "bpe", *ENCODINGS)
# 1: no "bos"; 2: no "marks", no vocabulary of GPT-2's; 3: one chat template
_FILE_VERSION = 4
_BPE_VOCAB_SIZE = 2048  # of "bpe" without a size
_BPE_SIZES = range(258, (1 << 20) + 1)  # from every byte, one merged piece and the end of text on
_BPE_TRAIN_BYTES = 64 << 20  # more text than this does not change which pairs are frequent


def is_spec(name: str) -> bool:
    """Whether `name` is a kind of tokenizer, and not a path."""
    return name in KINDS or bpe_size(name) is not None


def bpe_size(name: str) -> int | None:
    """The vocabulary size that "bpe" or "bpe:SIZE" asks for; None for any other name."""
    if name == "bpe":
        return _BPE_VOCAB_SIZE
    if not name.startswith("bpe:"):
        return None
    found = re.fullmatch("([0-9]{1,9})([KM]?)", name.removeprefix("bpe:").upper())
    size = int(found[1]) * {"": 1, "K": 10**3, "M": 10**6}[found[2]] if found else 0
    check_bpe_size(size, f"--tokenizer {name}")
    return size


def check_bpe_size(size: int, where: str) -> None:
    """UsageError when no byte-pair encoding of that size is learned; `where` is what was typed."""
    if size not in _BPE_SIZES:
        raise UsageError(
            f"{where}: the vocabulary size must be a number from {_BPE_SIZES[0]} to "
            f"{_BPE_SIZES[-1]:,}"
        )


_CHOICES = (
    f"choose {', '.join(KINDS)}, bpe:SIZE, a tokenizer.json or .model, or a model's file, or the "
    "folder of a dataset, checkpoint or run"
)


def make_tokenizer(name: str, text_iter: Iterable[bytes] | None = None) -> Tokenizer:
    """A tokenizer of a kind in KINDS ("bpe:SIZE" too), or that in the file or folder `name`.

    A file is one of ours, a tokenizer.json of Hugging Face, or a SentencePiece .model.
    "char" takes its characters from `text_iter`, UTF-8 in blocks cut anywhere, and "bpe" its pieces
    (from its beginning, when there is very much). UsageError for an unknown name, GptcError when
    the text is not UTF-8 or the GPT-2 vocabulary cannot be downloaded.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "char":
        characters: set[str] = set()
        decoder = Utf8Decoder()
        for block in text_iter or ():
            characters.update(decoder.push(block))
        decoder.finish()
        return CharTokenizer(characters)
    if name == "gpt2":
        gpt2 = Gpt2Tokenizer()
        _ = gpt2.encoding  # so that a missing vocabulary is found now
        return gpt2
    size = bpe_size(name)
    if size is not None:
        data = bytearray()
        for block in text_iter or ():
            data += block[: _BPE_TRAIN_BYTES - len(data)]
        return BpeTokenizer.train(decode_utf8(bytes(data[: character_cut(data)])), size)
    if name in ENCODINGS:
        from gptc.tokenizer.with_tiktoken import TiktokenTokenizer

        return TiktokenTokenizer.named(name)
    if (path := Path(name)).exists():
        from gptc.tokenizer.folder import read_files

        if not path.is_dir() or not (path / FILE_NAME).exists():
            theirs = read_files(path)
            if theirs is not None:
                return theirs
        if path.is_file() and path.suffix != ".json" and read_file(path).lstrip()[:1] != b"{":
            raise UsageError(f"{path} is not a tokenizer's file: {_CHOICES}")
        return read_tokenizer(path)
    if "/" in name or path.suffix in (".json", ".model"):
        raise UsageError(f"the tokenizer {name} does not exist: check the path")
    raise UsageError(f"unknown tokenizer {name!r}: {_CHOICES}")


def read_tokenizer(folder_or_file: Path) -> Tokenizer:
    """The tokenizer saved there. GptcError when the file is missing, incomplete or altered."""
    path = Path(folder_or_file)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        saved = parse_json(read_file(path), str(path), name="entries")
    except FileNotFoundError:
        raise GptcError(
            f"no tokenizer at {path}: give the folder of a dataset, checkpoint or run of gptc"
        ) from None
    except OSError as e:
        raise GptcError(f"cannot read {path}: {e.strerror}") from None
    if not isinstance(saved, dict):
        saved = {}
    if isinstance(saved.get("version"), int) and saved["version"] > _FILE_VERSION:
        raise GptcError(f"{path} was written by a newer gptc: {UPGRADE}")
    try:
        tokenizer = _from_json(saved)
    except GptcError as error:
        raise GptcError(f"{path}: {error}") from None
    if tokenizer is not None and tokenizer.has_token(saved.get("bos")):
        tokenizer.bos = saved["bos"]
    if tokenizer is not None and isinstance(marks := saved.get("marks"), dict):
        names = {name: marks.get(name) for name in ("begin", "pad", "chat_template")}
        tokenizer.marks = marks_from(tokenizer.vocab_size, ends=[marks.get("ends")], **names)
    if tokenizer is None or tokenizer.to_json() != saved:
        raise GptcError(f"{path} was altered, or is not a tokenizer file of gptc: copy it again")
    if isinstance(tokenizer, Gpt2Tokenizer) and tokenizer.vocabulary is None:
        tokenizer.vocabulary = gpt2_vocabulary_in(path.parent)
    return tokenizer


def _from_json(saved: dict[str, Any]) -> Tokenizer | None:
    kind, start, characters = (saved.get(key) for key in ("kind", "start", "characters"))
    if not isinstance(start, str) or not start:
        return None
    if kind == "bytes":
        return ByteTokenizer(start)
    if kind == "char" and isinstance(characters, str) and characters:
        return CharTokenizer(characters, start)
    if kind == "gpt2":
        vocabulary = saved.get("vocab_bpe")
        given = vocabulary.encode(errors="surrogatepass") if isinstance(vocabulary, str) else None
        return Gpt2Tokenizer(start, given) if given is None or is_gpt2s(given) else None
    if kind == "bpe":
        return _bpe_from_json(saved.get("merged"), start)
    tokenizer = _pretrained_from_json(saved, start)
    end = saved.get("end_of_text")
    if tokenizer is not None and (end is None or tokenizer.has_token(end)):
        tokenizer.end_of_text = end
    return tokenizer


def _pretrained_from_json(saved: dict[str, Any], start: str) -> Tokenizer | None:
    from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
    from gptc.tokenizer.with_tiktoken import TiktokenTokenizer
    from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer

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


def _bpe_from_json(merged: Any, start: str) -> Tokenizer | None:
    if not isinstance(merged, list) or not all(isinstance(piece, str) for piece in merged):
        return None
    try:
        pieces = [piece.encode("latin-1") for piece in merged]
    except UnicodeEncodeError:
        return None
    if len(set(pieces)) < len(pieces) or any(len(piece) < 2 for piece in pieces):
        return None
    return BpeTokenizer(pieces, start)
