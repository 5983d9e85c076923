"""Tokenizers between programs: byte-level vocabularies and SentencePiece's, in their files' terms.

Most tokenizers are one of two sorts. A byte-level one (GPT-2, Llama 3) has pieces of bytes, made by
merges within what a pattern cuts; GPT-2's files write bytes as characters. A scored one (Llama 2)
has pieces of text with a score each, which says what is merged first. Both sorts are taken apart
and put together here; `llmc`, `llama2c`, `gguf` and `hf` only write them down.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from gptc.errors import GptcError
from gptc.tokenizer.base import END_OF_TEXT, Tokenizer
from gptc.tokenizer.native import (
    GPT2_PATTERN,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    byte_characters,
    is_gpt2_vocabulary,
)
from gptc.tokenizer.pretrained import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
)
from gptc.tokenizer.registry import make_tokenizer

GPT2_SIZE = Gpt2Tokenizer.vocab_size
_GPT2_PIECES = "80fc72dae333882a37b202858853685b0232e9dd624396c1024fb93536a62a83"  # SHA-256
_MAX_MERGING = 1 << 25  # steps, some times what the largest vocabularies take
_SPACE = "\u2581"  # how SentencePiece writes a space
# What stands for tokens that a model has and its tokenizer has not: llama2.c's programs refuse a
# piece of no bytes, and print nothing for this one.
LLAMA2C_PADDING = b"\0"

# Sorts of pieces, by the numbers that SentencePiece and GGUF share.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Patterns by llama.cpp's names for them.
_PATTERNS = {
    "gpt-2": GPT2_PATTERN,
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # GPT-2's, within what is left when every digit stands alone: nothing reaches to a digit, and
    # space before one ends like space before the end.
    "smollm": (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"),
}


def gpt2() -> Tokenizer:
    """GPT-2's tokenizer."""
    return make_tokenizer("gpt2")


# ---- byte-level ----


class ByteLevel(NamedTuple):
    """A byte-level vocabulary: the bytes of each token, and how text becomes them."""

    pieces: list[bytes]
    special: dict[str, int]  # tokens that stand for themselves
    pattern: str
    merges: list[tuple[bytes, bytes]] | None = None  # None: pieces are merged in order


def byte_level(tokenizer: Tokenizer) -> ByteLevel | None:
    """What a tokenizer of this sort consists of; None for another sort."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return ByteLevel(list(tokenizer.pieces), tokenizer.special, tokenizer.pattern)
    if isinstance(tokenizer, BpeTokenizer):
        end = {END_OF_TEXT: tokenizer.vocab_size - 1}
        return ByteLevel(list(tokenizer.pieces), end, GPT2_PATTERN)
    if isinstance(tokenizer, ByteTokenizer):
        return ByteLevel(list(tokenizer.pieces), {}, GPT2_PATTERN)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _of_definition(tokenizer)
    return None


def from_byte_level(vocabulary: ByteLevel, where: str) -> Tokenizer:
    """The tokenizer of these pieces: one of ours where it is the same. GptcError names `where`."""
    pieces, special, pattern, merges = vocabulary
    others = set(special.values())
    ranked = [p for i, p in enumerate(pieces) if i not in others]
    if len(set(ranked)) < len(ranked):
        raise GptcError(f"{where} has a token twice")
    in_order = merges is None or [a + b for a, b in merges] == ranked[len(ranked) - len(merges) :]
    plain = pattern == GPT2_PATTERN and in_order
    single = [bytes([i]) for i in range(256)]
    if plain and not special and ranked == single:
        return ByteTokenizer()
    if plain and special == {END_OF_TEXT: len(pieces) - 1}:
        if hashlib.sha256(b"\0".join(pieces)).hexdigest() == _GPT2_PIECES and is_gpt2_vocabulary(
            _vocab_bpe(vocabulary)
        ):
            return gpt2()
        if ranked[:256] == single and all(len(piece) > 1 for piece in ranked[256:]):
            return BpeTokenizer(ranked[256:])
    missing = sorted(set(single) - set(ranked))
    if missing:
        raise GptcError(
            f"{where} has no token for the byte {missing[0][0]}: give one with --tokenizer"
        )
    if in_order and pieces[: len(ranked)] == ranked:
        return TiktokenTokenizer("byte-level", pattern, ranked, special)
    definition = json.dumps(_definition(vocabulary), ensure_ascii=False)
    return HuggingFaceTokenizer(definition, where=where)


def simplest(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """One of our own tokenizers where it is the same, so that datasets made with it fit."""
    try:
        vocabulary = byte_level(tokenizer)
        same = from_byte_level(vocabulary, where) if vocabulary else tokenizer
    except (GptcError, KeyError, ValueError):
        return tokenizer
    if not isinstance(same, ByteTokenizer | BpeTokenizer):
        return tokenizer
    same.bos = tokenizer.bos
    return same


def from_pieces(pieces: list[bytes], end_of_text: int | None, where: str) -> Tokenizer:
    """The tokenizer of a file that holds the bytes of each token and no more."""
    if len(pieces) == 256 and len(set(pieces)) == 256 and max(map(len, pieces)) == 1:
        return from_byte_level(ByteLevel(pieces, {}, GPT2_PATTERN), where)
    texts = [piece.decode("utf-8", "replace") for piece in pieces]
    if all(len(text) == 1 for text in texts) and texts == sorted(set(texts)):
        return CharTokenizer(texts)
    if end_of_text is None:
        raise GptcError(f"{where} holds no tokenizer that gptc knows: give one with --tokenizer")
    special = {texts[end_of_text] or END_OF_TEXT: end_of_text}
    return from_byte_level(ByteLevel(pieces, special, GPT2_PATTERN), where)


def merges_of(vocabulary: ByteLevel) -> list[tuple[bytes, bytes]]:
    """The pair of pieces that each longer piece is merged from, in order.

    GptcError where the pieces are so long that finding these would take minutes.
    """
    if vocabulary.merges is not None:
        return vocabulary.merges
    others = set(vocabulary.special.values())
    ranks = {piece: i for i, piece in enumerate(vocabulary.pieces) if i not in others and piece}
    if sum(len(piece) ** 2 for piece in ranks) > _MAX_MERGING:
        raise GptcError("the vocabulary has tokens that are too long to find their merges")
    return [_last_merge(piece, ranks) for piece in ranks if len(piece) > 1]


def _last_merge(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces that byte-pair encoding joins last on its way to `piece`."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _vocab_bpe(vocabulary: ByteLevel) -> bytes:
    """The file vocab.bpe of a vocabulary."""
    lines = [f"{to_characters(a)} {to_characters(b)}\n" for a, b in merges_of(vocabulary)]
    return ("#version: 0.2\n" + "".join(lines)).encode()


def to_characters(piece: bytes) -> str:
    """A piece as GPT-2's files write it."""
    return piece.decode("latin-1").translate(_CHARACTER_OF)


def to_bytes(text: str) -> bytes:
    """The piece that GPT-2's files write so. ValueError where they cannot."""
    byte_of = byte_characters()
    try:
        return bytes([byte_of[char] for char in text])
    except KeyError:
        raise ValueError(text) from None


_CHARACTER_OF = {byte: char for char, byte in byte_characters().items()}


def _definition(vocabulary: ByteLevel) -> dict[str, Any]:
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
        **_shell(special),
        "pre_tokenizer": cut,
        "decoder": {**level, "use_regex": True},
        "model": {**_bpe(vocab | special, pairs), "ignore_merges": vocabulary.merges is None},
    }


def _begun(definition: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json that begins texts with the tokenizer's `bos`, or with nothing."""
    token = tokenizer.bos
    if token is None:
        return {**definition, "post_processor": None}
    name = _name(tokenizer, token)
    begin: list[dict[str, Any]] = [{"SpecialToken": {"id": name, "type_id": 0}}]
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [*begin, first],
        "pair": [*begin, first, second],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }
    return {**definition, "post_processor": template}


def _shell(special: dict[str, int]) -> dict[str, Any]:
    """What every tokenizer.json holds."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": text, **flags, "special": True} for text, i in special.items()]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **empty, "added_tokens": added}


def _bpe(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
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


def _pattern_of(pre_tokenizer: dict[str, Any]) -> str | None:
    """How the pre_tokenizer of a byte-level tokenizer.json cuts text, where we know the pattern."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    cut = json.dumps(steps)
    if '"ByteLevel"' not in cut or '"add_prefix_space": true' in cut:
        return None
    if '"Digits"' in cut:
        alone = {"type": "Digits", "individual_digits": True}
        whole = len(steps) == 2 and steps[0] == alone and steps[1].get("use_regex", True)
        return _PATTERNS["smollm"] if whole else None
    if '"Split"' in cut:
        return next((p for p in _PATTERNS.values() if json.dumps(p) in cut), None)
    return GPT2_PATTERN if len(steps) == 1 and steps[0].get("use_regex", True) else None


def _of_definition(tokenizer: HuggingFaceTokenizer) -> ByteLevel | None:
    """The vocabulary of a tokenizer.json of this sort, where its pattern is one that we know."""
    saved = json.loads(tokenizer.mapping()["definition"])
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


# ---- scored ----


class Scored(NamedTuple):
    """A vocabulary of SentencePiece's sort; spaces are written as U+2581."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    add_space: bool = True  # before a text


def scored(tokenizer: Tokenizer) -> Scored | None:
    """What a tokenizer of this sort consists of; None for another sort."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return Scored(*tokenizer.scored_pieces(), tokenizer.adds_space)
    if isinstance(tokenizer, CharTokenizer):
        pieces = [_SPACE if char == " " else char for char in tokenizer.characters]
        n = len(pieces)
        return Scored(pieces, [0.0] * n, [NORMAL] * n, False)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        saved = json.loads(tokenizer.mapping()["definition"])
        if saved["model"].get("type") != "BPE" or not saved["model"].get("byte_fallback"):
            return None
        texts = dict(saved["model"]["vocab"])
        added = {entry["content"]: entry["id"] for entry in saved.get("added_tokens") or ()}
        pieces = [""] * tokenizer.vocab_size
        for text, i in (texts | added).items():
            pieces[i] = text
        types = [_type_of(piece, piece in added) for piece in pieces]
        # What its merges make first has the highest score.
        rank: dict[str, int] = {}
        for i, merge in enumerate(saved["model"]["merges"]):
            made = "".join(merge.split(" ")) if isinstance(merge, str) else "".join(merge)
            rank.setdefault(made, i)
        scores = [-float(rank.get(piece, len(rank))) for piece in pieces]
        return Scored(pieces, scores, types, tokenizer.adds_space)
    return None


def from_scored(vocabulary: Scored, where: str) -> Tokenizer:
    """The tokenizer of these pieces. GptcError names `where` they come from."""
    pieces, _, types, _ = vocabulary
    if set(types) == {NORMAL} and all(len(piece) == 1 for piece in pieces):
        return from_pieces([p.replace(_SPACE, " ").encode() for p in pieces], None, where)
    return SentencePieceTokenizer(_model_proto(vocabulary), where=where)


def _type_of(piece: str, added: bool) -> int:
    if piece == "<unk>":
        return UNKNOWN
    if added:
        return CONTROL
    if not piece:
        return UNUSED
    return BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else NORMAL


def _model_proto(vocabulary: Scored) -> bytes:
    """A SentencePiece model of the kind of Llama's (its sentencepiece_model.proto)."""
    types = vocabulary.types
    out = bytearray()
    for text, score, kind in zip(vocabulary.pieces, vocabulary.scores, types, strict=True):
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        out += _field(1, piece + _number(3, kind))
    ids = {name: i for i, name in enumerate(vocabulary.pieces[:1000])}
    unknown = types.index(UNKNOWN) if UNKNOWN in types else 0
    trainer = _number(3, 2) + _number(4, len(types)) + _number(35, int(BYTE in types))
    trainer += _number(40, unknown) + _number(41, ids.get("<s>", -1))
    trainer += _number(42, ids.get("</s>", -1)) + _number(43, -1)
    normalizer = _field(1, b"identity") + _number(3, int(vocabulary.add_space))
    normalizer += _number(4, 0) + _number(5, 1)
    return bytes(out) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    """A field that is a number."""
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _scored_definition(vocabulary: Scored) -> dict[str, Any]:
    """The content of a tokenizer.json of a scored vocabulary."""
    pieces, scores, types, add_space = vocabulary
    ids = {piece: i for i, piece in enumerate(pieces)}
    special = {p: i for p, i in ids.items() if types[i] in (UNKNOWN, CONTROL)}
    # A piece may come of any two that make it up; what has the highest score is merged first.
    pairs = []
    for i in sorted(range(len(pieces)), key=lambda i: -scores[i]):
        piece = pieces[i] if types[i] == NORMAL else ""
        cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(a, b) for a, b in cuts if a in ids and b in ids]
        pairs += [[a, b] for a, b in sorted(known, key=lambda cut: (ids[cut[0]], ids[cut[1]]))]
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if add_space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space else []
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    unknown = next((p for p, i in ids.items() if types[i] == UNKNOWN), None)
    model = {**_bpe(ids, pairs), "byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    return {
        **_shell(special),
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


# ---- Hugging Face's files ----


@lru_cache(maxsize=4)
def hf_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """The files from which AutoTokenizer makes the same tokenizer; none where there are none.

    GptcError as `merges_of`.
    """
    last = tokenizer.end_of_text
    end = None if last is None else _name(tokenizer, last)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        weighted = scored(tokenizer)
        assert weighted is not None
        files["tokenizer.model"] = tokenizer.proto
        files["tokenizer.json"] = _dump(_begun(_scored_definition(weighted), tokenizer))
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        text = tokenizer.mapping()["definition"]
        same = tokenizer.own_bos() == tokenizer.bos
        files["tokenizer.json"] = (
            text.encode() if same else _dump(_begun(json.loads(text), tokenizer))
        )
    elif isinstance(tokenizer, CharTokenizer):
        vocab = {char: i for i, char in enumerate(tokenizer.characters)}
        fused = {"pre_tokenizer": None, "decoder": {"type": "Fuse"}, "model": _bpe(vocab, [])}
        files["tokenizer.json"] = _dump(_begun({**_shell({}), **fused}, tokenizer))
    else:
        vocabulary = byte_level(tokenizer)
        if vocabulary is None:
            return {}
        files["tokenizer.json"] = _dump(_begun(_definition(vocabulary), tokenizer))
    begin = end if tokenizer.bos is None else _name(tokenizer, tokenizer.bos)
    named = {"bos_token": begin, "eos_token": end}
    config |= {key: name for key, name in named.items() if name is not None}
    config |= {"add_bos_token": tokenizer.bos is not None}
    config |= {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    files["tokenizer_config.json"] = _dump(config)
    return files


def _name(tokenizer: Tokenizer, token: int) -> str:
    """What files call a special token."""
    return tokenizer.pieces[token].decode("utf-8", "replace")


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


# ---- GGUF's metadata ----


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The keys below "tokenizer.ggml." of this tokenizer. GptcError where llama.cpp has none such.

    llama.cpp takes the size of the vocabulary from here, so that unused tokens fill it up.
    """
    level, weighted = byte_level(tokenizer), scored(tokenizer)
    if level is not None:
        values = _byte_level_to_gguf(level, tokenizer)
    elif weighted is not None:
        values = _scored_to_gguf(weighted)
    else:
        raise GptcError(f"llama.cpp has no tokenizer like {tokenizer.kind}")
    pad = range(len(values["tokens"]), vocab_size)
    values["tokens"] += [f"[PAD{i}]" for i in pad]
    values["token_type"] += [UNUSED] * len(pad)
    if "scores" in values:
        values["scores"] += [0.0] * len(pad)
    if tokenizer.end_of_text is not None:
        values["eos_token_id"] = tokenizer.end_of_text
    values["add_bos_token"] = tokenizer.bos is not None
    if tokenizer.bos is not None:
        values["bos_token_id"] = tokenizer.bos
    return values


def _byte_level_to_gguf(level: ByteLevel, tokenizer: Tokenizer) -> dict[str, Any]:
    pre = next((name for name, p in _PATTERNS.items() if p == level.pattern), None)
    if pre is None:
        raise GptcError(f"llama.cpp has no name for the pattern of the {tokenizer.kind} tokenizer")
    special = set(level.special.values())
    pieces = list(enumerate(level.pieces))
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [p.decode() if i in special else to_characters(p) for i, p in pieces],
        "token_type": [CONTROL if i in special else NORMAL for i, _ in pieces],
        "merges": [f"{to_characters(a)} {to_characters(b)}" for a, b in merges_of(level)],
    }
    if tokenizer.end_of_text is not None:
        values["bos_token_id"] = tokenizer.end_of_text
    return values


def _scored_to_gguf(weighted: Scored) -> dict[str, Any]:
    pieces, scores, types, add_space = weighted
    names = {name: i for i, name in enumerate(pieces[:1000])}
    values: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": list(pieces),
        "scores": list(scores),
        "token_type": list(types),
        "add_space_prefix": add_space,
    }
    if "<s>" in names:
        values["bos_token_id"] = names["<s>"]
    if UNKNOWN in types:
        values["unknown_token_id"] = types.index(UNKNOWN)
    return values


def from_gguf(values: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that such keys describe. GptcError when it is of an unknown sort."""
    tokenizer = _cut_as_in_gguf(values, where)
    # What llama.cpp does where nothing is said.
    like_llama2, like_llama3 = values.get("model") == "llama", values.get("pre") == "llama-bpe"
    begin = values.get("bos_token_id", 1 if like_llama2 else None)
    if values.get("add_bos_token", like_llama2 or like_llama3) and tokenizer.has_token(begin):
        tokenizer.bos = begin
    return tokenizer


def _cut_as_in_gguf(values: dict[str, Any], where: str) -> Tokenizer:
    """The same, whatever it begins texts with."""
    model, pre = values.get("model"), values.get("pre", "default")
    tokens, types = values.get("tokens"), values.get("token_type")
    if not isinstance(tokens, list) or not tokens:
        raise GptcError(f"{where} holds no tokenizer: give one with --tokenizer KIND")
    types = (
        types if isinstance(types, list) and len(types) == len(tokens) else [NORMAL] * len(tokens)
    )
    n = len(tokens)
    while n and types[n - 1] == UNUSED:  # padding
        n -= 1
    tokens, types = tokens[:n], types[:n]
    if model == "llama":
        scores = values.get("scores")
        scores = scores[:n] if isinstance(scores, list) and len(scores) >= n else [0.0] * n
        add_space = values.get("add_space_prefix", True) is not False
        return from_scored(Scored(tokens, scores, types, add_space), where)
    if model != "gpt2" or pre not in _PATTERNS:
        raise GptcError(
            f"{where} holds a tokenizer of an unknown sort ({model!r}, {pre!r}): "
            "give one with --tokenizer KIND"
        )
    special = {t: i for i, t in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)}
    try:
        pieces = [
            t.encode() if types[i] in (CONTROL, USER_DEFINED) else to_bytes(t)
            for i, t in enumerate(tokens)
        ]
        merges = [_merge(line) for line in values.get("merges") or ()]
    except ValueError as error:
        raise GptcError(f"{where} holds a token that is not byte-level: {str(error)!r}") from None
    return from_byte_level(ByteLevel(pieces, special, _PATTERNS[pre], merges), where)


def _merge(line: str) -> tuple[bytes, bytes]:
    """The two pieces of a merge. ValueError where these are not two."""
    first, _, second = line.partition(" ")
    if not first or not second:
        raise ValueError(line)
    return to_bytes(first), to_bytes(second)


def to_llama2c(tokenizer: Tokenizer) -> tuple[list[bytes], list[float]]:
    """Pieces and scores as llama2.c's tokenizer.bin holds them."""
    weighted = scored(tokenizer)
    if weighted is None or isinstance(tokenizer, CharTokenizer):
        # llama2.c merges by the highest score: what was learned first.
        return list(tokenizer.pieces), [-float(i) for i in range(tokenizer.vocab_size)]
    marks = {"<s>": "\n<s>\n", "</s>": "\n</s>\n"}
    pieces = [marks.get(p, p).replace(_SPACE, " ").encode() for p in weighted.pieces]
    return pieces, weighted.scores


def from_llama2c(pieces: list[bytes], scores: Sequence[float], where: str) -> Tokenizer:
    """The tokenizer that a tokenizer.bin was made from."""
    n = len(pieces)
    while n and (not pieces[n - 1] or (pieces[n - 1] == LLAMA2C_PADDING and not scores[n - 1])):
        n -= 1
    pieces, scores = pieces[:n], scores[:n]
    if pieces[:3] != [b"<unk>", b"\n<s>\n", b"\n</s>\n"]:
        end = END_OF_TEXT.encode()
        return from_pieces(pieces, pieces.index(end) if end in pieces else None, where)
    try:
        texts = ["<unk>", "<s>", "</s>"]
        texts += [piece.decode().replace(" ", _SPACE) for piece in pieces[3:]]
    except UnicodeDecodeError:
        raise GptcError(f"{where} holds a token that is no UTF-8 text") from None
    types = [_type_of(text, i in (1, 2)) for i, text in enumerate(texts)]
    tokenizer = from_scored(Scored(texts, list(scores), types), where)
    tokenizer.bos = texts.index("<s>")  # its programs begin every text with it
    return tokenizer
