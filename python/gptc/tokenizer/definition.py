"""The content of a tokenizer.json (Hugging Face's `tokenizers`) for both sorts of vocabularies."""

from __future__ import annotations

import json
from typing import Any

from gptc.tokenizer.byte_level import PATTERNS, ByteLevel, merges_of, to_bytes, to_characters
from gptc.tokenizer.native import GPT2_PATTERN
from gptc.tokenizer.pretrained import HuggingFaceTokenizer
from gptc.tokenizer.scored import CONTROL, NORMAL, SPACE, UNKNOWN, Scored, type_of

# ---- writing ----


def byte_level_definition(vocabulary: ByteLevel) -> dict[str, Any]:
    """The content of a tokenizer.json of a byte-level vocabulary."""
    pieces, special, pattern, _ = vocabulary
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut: dict[str, Any] = {**level, "use_regex": True}
    if pattern != GPT2_PATTERN:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        whole = {**level, "use_regex": False}
        cut = {"type": "Sequence", "pretokenizers": [{**split, "invert": False}, whole]}
    ids = set(special.values())
    vocab = {to_characters(p): i for i, p in enumerate(pieces) if i not in ids and p}
    pairs = [[to_characters(a), to_characters(b)] for a, b in merges_of(vocabulary)]
    return {
        **shell(special),
        "pre_tokenizer": cut,
        "decoder": {**level, "use_regex": True},
        "model": {**bpe_model(vocab | special, pairs), "ignore_merges": vocabulary.merges is None},
    }


def scored_definition(vocabulary: Scored) -> dict[str, Any]:
    """The content of a tokenizer.json of a scored vocabulary."""
    pieces, scores, types, add_space = vocabulary
    ids = {piece: i for i, piece in enumerate(pieces)}
    special = {p: i for p, i in ids.items() if types[i] in (UNKNOWN, CONTROL)}
    # Any two pieces that make up a third may be merged; the highest score first.
    pairs = []
    for i in sorted(range(len(pieces)), key=lambda i: -scores[i]):
        piece = pieces[i] if types[i] == NORMAL else ""
        cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(a, b) for a, b in cuts if a in ids and b in ids]
        pairs += [[a, b] for a, b in sorted(known, key=lambda cut: (ids[cut[0]], ids[cut[1]]))]
    prepend = [{"type": "Prepend", "prepend": SPACE}] if add_space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space else []
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    unknown = next((p for p, i in ids.items() if types[i] == UNKNOWN), None)
    model = {**bpe_model(ids, pairs), "byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    return {
        **shell(special),
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def shell(special: dict[str, int]) -> dict[str, Any]:
    """The fields that every tokenizer.json has."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": text, **flags, "special": True} for text, i in special.items()]
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
    pattern = _pattern_of(saved.get("pre_tokenizer") or {})
    if saved["model"].get("type") != "BPE" or saved.get("normalizer") is not None or not pattern:
        return None
    special = {entry["content"]: entry["id"] for entry in saved.get("added_tokens") or ()}
    merges = []
    try:
        for merge in saved["model"]["merges"]:
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            merges.append((to_bytes(first), to_bytes(second)))
    except ValueError:
        return None
    return ByteLevel(list(tokenizer.pieces), special, pattern, merges)


def _pattern_of(pre_tokenizer: dict[str, Any]) -> str | None:
    """The pattern of a pre_tokenizer, if it is one of PATTERNS."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    cut = json.dumps(steps)
    if '"ByteLevel"' not in cut or '"add_prefix_space": true' in cut:
        return None
    if '"Digits"' in cut:
        alone = {"type": "Digits", "individual_digits": True}
        whole = len(steps) == 2 and steps[0] == alone and steps[1].get("use_regex", True)
        return PATTERNS["smollm"] if whole else None
    if '"Split"' in cut:
        return next((p for p in PATTERNS.values() if json.dumps(p) in cut), None)
    return GPT2_PATTERN if len(steps) == 1 and steps[0].get("use_regex", True) else None


def scored_of(tokenizer: HuggingFaceTokenizer) -> Scored | None:
    """The scored vocabulary of a tokenizer.json; None for another sort."""
    saved = tokenizer.saved
    if saved["model"].get("type") != "BPE" or not saved["model"].get("byte_fallback"):
        return None
    texts = dict(saved["model"]["vocab"])
    added = {entry["content"]: entry["id"] for entry in saved.get("added_tokens") or ()}
    pieces = [""] * tokenizer.vocab_size
    for text, i in (texts | added).items():
        pieces[i] = text
    types = [type_of(piece, piece in added) for piece in pieces]
    # Pieces that are merged first get the highest scores.
    rank: dict[str, int] = {}
    for i, merge in enumerate(saved["model"]["merges"]):
        made = "".join(merge.split(" ")) if isinstance(merge, str) else "".join(merge)
        rank.setdefault(made, i)
    scores = [-float(rank.get(piece, len(rank))) for piece in pieces]
    return Scored(pieces, scores, types, tokenizer.adds_space)
