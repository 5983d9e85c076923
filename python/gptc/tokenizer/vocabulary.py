"""Tokenizers taken apart and put together, between gptc's classes and the files of others.

Most tokenizers are one of two sorts: byte-level (`ByteLevel`) or scored (`Scored`). The modules of
`formats/` only write these down.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from gptc.errors import GptcError
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer
from gptc.tokenizer.byte_level import ByteLevel, vocab_bpe
from gptc.tokenizer.definition import (
    byte_level_definition,
    byte_level_of,
    scored_definition,
    scored_of,
    scored_vocabulary,
)
from gptc.tokenizer.native import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    gpt2_vocabulary_in,
    is_gpt2s,
    keep_gpt2_vocabulary,
)
from gptc.tokenizer.outline import dump_definition, outline_of
from gptc.tokenizer.patterns import GPT2, Cut
from gptc.tokenizer.registry import make_tokenizer
from gptc.tokenizer.scored import CONTROL, NORMAL, SPACE, USER_DEFINED, Scored, model_proto
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tiktoken import TiktokenTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer

GPT2_SIZE = Gpt2Tokenizer.vocab_size
_GPT2_PIECES = "80fc72dae333882a37b202858853685b0232e9dd624396c1024fb93536a62a83"  # SHA-256


def gpt2(folder: Path) -> Tokenizer:
    """GPT-2's tokenizer. Its vocabulary may be in a model's folder."""
    if (found := gpt2_vocabulary_in(folder)) is not None:
        return Gpt2Tokenizer(vocabulary=found)
    return make_tokenizer("gpt2")


# ---- byte-level ----


def byte_level(tokenizer: Tokenizer) -> ByteLevel | None:
    """The vocabulary of a byte-level tokenizer; None for another sort."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return ByteLevel(
            list(tokenizer.pieces), tokenizer.special, Cut((tokenizer.pattern,), whole=True)
        )
    if isinstance(tokenizer, BpeTokenizer):
        end = {END_OF_TEXT: tokenizer.vocab_size - 1}
        return ByteLevel(list(tokenizer.pieces), end, GPT2)
    if isinstance(tokenizer, ByteTokenizer):
        return ByteLevel(list(tokenizer.pieces), {}, GPT2)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return byte_level_of(tokenizer)
    return None


def from_byte_level(vocabulary: ByteLevel, where: str) -> Tokenizer:
    """The tokenizer of these pieces, one of ours if it is the same. `where` is named in errors."""
    pieces, special, cut, _, text = vocabulary
    ranked = _ranked(vocabulary)
    if len(set(ranked)) < len(ranked):
        raise GptcError(f"{where} has a token twice")
    in_order = merged_in_order(vocabulary)
    plain = cut[:2] == GPT2[:2] and in_order
    single = [bytes([i]) for i in range(256)]
    if plain and not special and ranked == single:
        return ByteTokenizer()
    if plain and special == {END_OF_TEXT: len(pieces) - 1} and not text:
        if hashlib.sha256(b"\0".join(pieces)).hexdigest() == _GPT2_PIECES:
            found = vocab_bpe(vocabulary)
            if is_gpt2s(found):
                keep_gpt2_vocabulary(found)
                return Gpt2Tokenizer(vocabulary=found)
        if ranked[:256] == single and all(len(piece) > 1 for piece in ranked[256:]):
            return BpeTokenizer(ranked[256:])
    # tiktoken's class finds only the end of a text in a text, and needs a token for each byte.
    complete = set(single) <= set(ranked) and not special.keys() - {END_OF_TEXT}
    one = len(cut.patterns) == 1 and not cut.composes
    if complete and one and in_order and pieces[: len(ranked)] == ranked:
        return TiktokenTokenizer("byte-level", cut.patterns[0], ranked, special)
    definition = byte_level_definition(vocabulary)
    outline, content = outline_of(definition), dump_definition(definition)
    del definition  # a few times as large as its text
    try:
        return HuggingFaceTokenizer(content, where=where, outline=outline)
    except GptcError:
        raise GptcError(
            f"{where} has tokens that no merges of its bytes make: give another with --tokenizer"
        ) from None


def merged_in_order(vocabulary: ByteLevel) -> bool:
    """Whether the merges make all pieces but single bytes, in the order of their ids."""
    merges, ranked = vocabulary.merges, _ranked(vocabulary)
    if merges is None:
        return True
    n = len(ranked) - len(merges)
    bytes_alone = all(len(piece) == 1 for piece in ranked[:n])
    return bytes_alone and [a + b for a, b in merges] == ranked[n:]


def _ranked(vocabulary: ByteLevel) -> list[bytes]:
    """The pieces without special tokens."""
    others = set(vocabulary.special.values())
    return [p for i, p in enumerate(vocabulary.pieces) if i not in others]


def simplest(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """One of our own tokenizers if it is the same, so that datasets made with it fit."""
    try:
        vocabulary = byte_level(tokenizer)
        same = from_byte_level(vocabulary, where) if vocabulary else tokenizer
    except (GptcError, KeyError, ValueError):
        return tokenizer
    if not isinstance(same, ByteTokenizer | BpeTokenizer):
        return tokenizer
    same.bos, same.marks = tokenizer.bos, tokenizer.marks
    return same


def from_pieces(pieces: list[bytes], end_of_text: int | None, where: str) -> Tokenizer:
    """The tokenizer of a file that holds the bytes of each token and no more."""
    if len(pieces) == 256 and len(set(pieces)) == 256 and max(map(len, pieces)) == 1:
        return from_byte_level(ByteLevel(pieces, {}, GPT2), where)
    texts = [piece.decode("utf-8", "replace") for piece in pieces]
    if all(len(text) == 1 for text in texts) and texts == sorted(set(texts)):
        return CharTokenizer(texts)
    if end_of_text is None:
        raise GptcError(f"{where} holds no tokenizer that gptc knows: give one with --tokenizer")
    special = {texts[end_of_text] or END_OF_TEXT: end_of_text}
    return from_byte_level(ByteLevel(pieces, special, GPT2), where)


# ---- scored ----


def scored(tokenizer: Tokenizer) -> Scored | None:
    """The vocabulary of a scored tokenizer; None for another sort.

    GptcError for a SentencePiece model whose cuts depend on more than scores.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return scored_vocabulary(tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        pieces = [SPACE if char == " " else char for char in tokenizer.characters]
        n = len(pieces)
        return Scored(pieces, [0.0] * n, [NORMAL] * n, False)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return scored_of(tokenizer)
    return None


def from_scored(vocabulary: Scored, where: str) -> Tokenizer:
    """The tokenizer of these pieces. `where` is named in errors."""
    pieces, _, types, _ = vocabulary
    if set(types) == {NORMAL} and all(len(piece) == 1 for piece in pieces):
        return from_pieces([p.replace(SPACE, " ").encode() for p in pieces], None, where)
    controls = {p for p, kind in zip(pieces, types, strict=True) if kind == CONTROL}
    if USER_DEFINED in types or controls - {"<s>", "</s>", "<pad>"}:
        # SentencePiece's library does not find control tokens in a text.
        definition = dump_definition(scored_definition(vocabulary))
        return HuggingFaceTokenizer(definition, where=where)
    return SentencePieceTokenizer(model_proto(vocabulary), where=where)
