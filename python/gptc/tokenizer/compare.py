"""Whether two tokenizers give the same ids, however they were stored.

A fingerprint tells one file from another. Copies of one tokenizer in the files of Hugging Face,
GGUF or llama2.c have other fingerprints, and the same vocabulary, merges and normalizer.
"""

from __future__ import annotations

from typing import Any

from gptc.errors import GptcError
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.byte_level import takes_whole
from gptc.tokenizer.definition import ALWAYS, NEVER, scored_of, space_of
from gptc.tokenizer.scored import NORMAL, Scored
from gptc.tokenizer.vocabulary import byte_level, merged_in_order, scored
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both map text to the same ids, but for special tokens that a text spells out."""
    if one.fingerprint() == other.fingerprint():
        return True
    if (one.vocab_size, one.end_of_text) != (other.vocab_size, other.end_of_text):
        return False
    try:
        rules = _rules(one)
        return rules is not None and rules == _rules(other)
    except (GptcError, LookupError, TypeError, ValueError):
        return False


def _rules(tokenizer: Tokenizer) -> tuple[Any, ...] | None:
    """All that the ids of a text follow from; None for a tokenizer of a rare sort."""
    if isinstance(tokenizer, HuggingFaceTokenizer) and not _is_plain(tokenizer):
        return None
    if (level := byte_level(tokenizer)) is not None:
        if merged_in_order(level):
            return ("bytes", level.pieces, level.special, level.cut[:2])
        rules = (level.cut[:2], level.merges, takes_whole(level))
        return ("bytes", level.pieces, level.special, *rules)
    if isinstance(tokenizer, SentencePieceTokenizer):
        weighted = scored(tokenizer)
        space: str | None = ALWAYS if tokenizer.adds_space else NEVER
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        weighted, space = scored_of(tokenizer), space_of(tokenizer)
    else:
        return None
    if weighted is None or space is None:
        return None
    return ("scores", space, weighted.pieces, weighted.types, _order(weighted))


def _order(vocabulary: Scored) -> list[int]:
    """The pieces that are merged from two others, in the order of their scores.

    Merges have an order even where scores are equal, as those of Llama 2's runs of spaces: by id.
    """
    pieces, scores, types, _ = vocabulary
    known = set(pieces)

    def is_merged(piece: str) -> bool:
        return any(piece[:k] in known and piece[k:] in known for k in range(1, len(piece)))

    merged = [i for i, p in enumerate(pieces) if types[i] == NORMAL and is_merged(p)]
    return sorted(merged, key=lambda i: -scores[i])


def _is_plain(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether a tokenizer.json merges pieces by the rules that all formats share."""
    saved = tokenizer.saved
    flags = ("lstrip", "rstrip", "single_word")
    model = saved["model"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return not any(model.get(name) for name in odd) and not any(
        entry.get(flag) for entry in saved.get("added_tokens") or () for flag in flags
    )
