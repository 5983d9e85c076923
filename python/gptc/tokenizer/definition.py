"""The content of a tokenizer.json (Hugging Face's `tokenizers`) for both sorts of vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from gptc.errors import GptcError
from gptc.tokenizer.byte_level import ByteLevel, merges_of, takes_whole, to_bytes, to_characters
from gptc.tokenizer.patterns import GPT2, Cut, cut_of, definition_of
from gptc.tokenizer.scored import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Scored,
    type_of,
)
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer


class Added(NamedTuple):
    """A token that is added to a vocabulary: it is found in a text before the text is cut."""

    id: int
    content: str
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @classmethod
    def from_json(cls, id: int, entry: dict[str, Any]) -> Added:
        """A token of added_tokens or added_tokens_decoder."""
        flags = {name: entry.get(name) is True for name in cls._fields[2:]}
        return cls(id, str(entry["content"]), **flags)


# ---- writing ----


def byte_level_definition(vocabulary: ByteLevel) -> dict[str, Any]:
    """The content of a tokenizer.json of a byte-level vocabulary."""
    pieces, special, cut, _, text = vocabulary
    ids = set(special.values())
    written = {p: to_characters(p) for i, p in enumerate(pieces) if i not in ids and p}
    vocab = {written[p]: i for i, p in enumerate(pieces) if i not in ids and p}
    pairs = [
        [written.get(a) or to_characters(a), written.get(b) or to_characters(b)]
        for a, b in merges_of(vocabulary)
    ]
    if vocabulary.merges is None:  # some may be found whole only
        pairs = [[a, b] for a, b in pairs if a in vocab and b in vocab]
    return {
        **shell(Added(id, name, id not in text) for name, id in special.items()),
        **definition_of(cut),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {**bpe_model(vocab | special, pairs), "ignore_merges": takes_whole(vocabulary)},
    }


def pair_definition(
    vocab: dict[str, int],
    merges: list[list[str]],
    added: Mapping[int, Added],
    add_space: bool,
    cut: Cut = GPT2,
) -> dict[str, Any]:
    """The content of a tokenizer.json of GPT-2's pair of files, and of tokens added to them."""
    level = {"type": "ByteLevel", "add_prefix_space": add_space, "trim_offsets": True}
    rules = definition_of(cut)
    steps = rules["pre_tokenizer"].get("pretokenizers", [rules["pre_tokenizer"]])
    steps[-1]["add_prefix_space"] = add_space
    return {
        **shell(added[id] for id in sorted(added)),
        **rules,
        "decoder": {**level, "use_regex": True},
        "model": bpe_model(vocab, merges),
    }


def scored_definition(
    vocabulary: Scored, first_only: bool = False, added: Mapping[int, Added] | None = None
) -> dict[str, Any]:
    """The content of a tokenizer.json of a scored vocabulary.

    A space comes before each part of a text between added tokens, or before the `first_only`.
    """
    pieces, scores, types, add_space = vocabulary
    ids = {piece: i for i, piece in enumerate(pieces) if piece}
    found = {
        i: Added(i, p, types[i] != USER_DEFINED)
        for p, i in ids.items()
        if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    } | dict(added or {})
    # Any two pieces that make up a third may be merged; the highest score first.
    pairs = []
    joined = _joined(pieces, types)
    for i in sorted(range(len(pieces)), key=lambda i: -scores[i]):
        known = joined(pieces[i]) if types[i] == NORMAL else ()
        pairs += [[a, b] for a, b in sorted(known, key=lambda cut: (ids[cut[0]], ids[cut[1]]))]
    scheme = "first" if first_only and add_space else "never"
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if add_space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space else []
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    unknown = next((p for p, i in ids.items() if types[i] == UNKNOWN), None)
    model = {**bpe_model(ids, pairs), "byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    return {
        **shell(found[id] for id in sorted(found)),
        "normalizer": (
            None if first_only else {"type": "Sequence", "normalizers": [*prepend, replace]}
        ),
        "pre_tokenizer": space if first_only else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _joined(pieces: list[str], types: list[int]) -> Callable[[str], list[tuple[str, str]]]:
    """A function that gives all pairs of pieces which make up a piece."""
    parts = {p for p, type in zip(pieces, types, strict=True) if type in (NORMAL, UNKNOWN)}

    def pairs(piece: str) -> list[tuple[str, str]]:
        cuts = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        return [(a, b) for a, b in cuts if a in parts and b in parts]

    return pairs


def shell(tokens: Iterable[Added]) -> dict[str, Any]:
    """The fields that every tokenizer.json has."""
    added = [token._asdict() for token in tokens]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **empty, "added_tokens": added}


def bpe_model(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": merges,
    }


# ---- reading ----


def byte_level_of(tokenizer: HuggingFaceTokenizer) -> ByteLevel | None:
    """The byte-level vocabulary of a tokenizer.json; None for another sort or pattern."""
    saved = tokenizer.saved
    cut = cut_of(saved)
    if saved["model"].get("type") != "BPE" or cut is None:
        return None
    added = saved.get("added_tokens") or ()
    special = {entry["content"]: entry["id"] for entry in added}
    if any(entry.get(flag) for entry in added for flag in ("single_word", "lstrip", "rstrip")):
        return None
    text = frozenset(entry["id"] for entry in added if not entry.get("special"))
    merges = []
    try:
        for merge in saved["model"]["merges"]:
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            merges.append((to_bytes(first), to_bytes(second)))
    except ValueError:
        return None
    return ByteLevel(list(tokenizer.pieces), special, cut, merges, text)


def scored_vocabulary(tokenizer: SentencePieceTokenizer) -> Scored:
    """The vocabulary of a SentencePiece model. GptcError when more than scores decide its cuts."""
    pieces, scores, types = tokenizer.scored_pieces()  # GptcError for a damaged model
    facts = tokenizer.facts
    if not facts.is_bpe:
        raise GptcError("this SentencePiece model is not of the sort BPE (unigram)")
    if facts.normalizes:
        raise GptcError("this SentencePiece model normalizes its text")
    if USER_DEFINED in types:  # others find them in a text before they merge
        raise GptcError("this SentencePiece model has pieces that its user defined")
    return Scored(pieces, scores, types, tokenizer.adds_space)


def scored_of(tokenizer: HuggingFaceTokenizer) -> Scored | None:
    """The scored vocabulary of a tokenizer.json; None for another sort.

    Programs with scores join any two neighbours that make a piece, the piece with the highest score
    first. So the merges must be all such pairs, those of one piece together.
    """
    saved = tokenizer.saved
    model = saved["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or space_of(tokenizer) is None:
        return None
    texts = dict(model["vocab"])
    entries = saved.get("added_tokens") or ()
    added = {entry["content"]: entry["id"] for entry in entries}
    words = {entry["content"] for entry in entries if not entry.get("special")}
    pieces = [""] * tokenizer.vocab_size
    for text, i in (texts | added).items():
        pieces[i] = text
    types = [USER_DEFINED if p in words else type_of(p, p in added) for p in pieces]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    made = [piece for piece, _ in groupby("".join(pair) for pair in pairs)]
    rank = {piece: i for i, piece in enumerate(made)}
    joined = _joined(pieces, types)
    normal = (piece for piece, type in zip(pieces, types, strict=True) if type == NORMAL)
    if len(rank) < len(made) or not {pair for p in normal for pair in joined(p)} <= set(pairs):
        return None
    scores = [-float(rank.get(piece, len(rank))) for piece in pieces]
    return Scored(pieces, scores, types, tokenizer.adds_space)


ALWAYS, UNLESS_THERE, NEVER = "always", "unless there", "never"  # a space before a text


def space_of(tokenizer: HuggingFaceTokenizer) -> str | None:
    """When a space comes before a text; None for other rules than those of SentencePiece."""
    saved = tokenizer.saved
    normalizer, cut = saved.get("normalizer"), saved.get("pre_tokenizer")
    if cut is not None:
        if cut["type"] != "Metaspace" or normalizer is not None:
            return None
        if cut.get("split", True) and any(SPACE in piece[1:] for piece in saved["model"]["vocab"]):
            return None
        return UNLESS_THERE if tokenizer.adds_space else NEVER
    steps = (normalizer or {}).get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps == [replace]:
        return NEVER
    return ALWAYS if steps == [{"type": "Prepend", "prepend": SPACE}, replace] else None
