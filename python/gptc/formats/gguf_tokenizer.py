"""Tokenizers in GGUF's metadata: the keys below "tokenizer.ggml."."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptc.errors import GptcError, NoTokenizer, UnknownTokenizer
from gptc.formats.model_file import import_with_another
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.byte_level import (
    ByteLevel,
    merges_of,
    takes_whole,
    to_bytes,
    to_characters,
    unmerged,
)
from gptc.tokenizer.marks import DEFAULT, marks_from
from gptc.tokenizer.patterns import CUTS, name_of
from gptc.tokenizer.pretrained import PretrainedTokenizer
from gptc.tokenizer.scored import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Scored
from gptc.tokenizer.vocabulary import byte_level, from_byte_level, from_scored, scored

# The keys of tokens that end a text, of which llama.cpp has three.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")

# Tokens that end a text by their names, as in llama.cpp (its src/llama-vocab.cpp, special_eog_ids):
# ends of turns, of texts, and of files of code.
_END_NAMES = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[", "<|fim_pad|>", "<fim-pad>", "<fim_pad>",
        "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
        "<|file_sep|>",
    )
)  # fmt: skip
# Where all of the first exist, the second only ends a part of an answer.
_PARTS = (
    (("<|return|>", "<|call|>"), "<|end|>"),
    (("<|calls|>", "<|flush|>"), "<|end|>"),
    (("<|tool_response>",), "</s>"),
)

# The pre-tokenizers after whose names llama.cpp puts BOS before a text, if no key says otherwise.
_WITH_BOS = frozenset(name for name in CUTS if CUTS[name] in (CUTS["llama-bpe"], CUTS["tekken"]))

LISTS: dict[str, tuple[type, ...]] = {
    "tokens": (str,),
    "merges": (str,),
    "token_type": (int,),
    "scores": (int, float),
}
"""The keys whose values are lists, and the types of their items."""

_TEMPLATE = "tokenizer.chat_template"  # of other templates, a point and their name follow

# ---- writing ----


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The keys below "tokenizer.ggml.". GptcError when llama.cpp has no such tokenizer.

    llama.cpp takes the size of the vocabulary from here, so unused tokens pad it.
    """
    if tokenizer.vocab_size > vocab_size:
        raise GptcError(f"it has {tokenizer.vocab_size:,} tokens, and the model {vocab_size:,}")
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
    values |= dict(zip(_ENDS, tokenizer.named_ends, strict=False))
    values["add_bos_token"] = tokenizer.bos is not None
    begin = tokenizer.marks.begin if tokenizer.bos is None else tokenizer.bos
    if begin is not None:
        values["bos_token_id"] = begin
    if tokenizer.marks.pad is not None:
        values["padding_token_id"] = tokenizer.marks.pad
    return values


def chat_template_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of the chat templates."""
    marks = tokenizer.marks
    keys: dict[str, Any] = {f"{_TEMPLATE}.{name}": text for name, text in marks.named_templates}
    if keys:
        keys["tokenizer.chat_templates"] = [name for name, _ in marks.named_templates]
    return keys | ({} if marks.chat_template is None else {_TEMPLATE: marks.chat_template})


def _byte_level_to_gguf(level: ByteLevel, tokenizer: Tokenizer) -> dict[str, Any]:
    pre = name_of(level.cut)
    if pre is None:
        raise GptcError(f"llama.cpp has no name for the pattern of the {tokenizer.kind} tokenizer")
    lost = unmerged(level) if takes_whole(level) != CUTS[pre].whole else ()
    for piece in lost:
        raise GptcError(
            f"llama.cpp would cut {piece.decode('utf-8', 'replace')!r} in another way: no merges "
            "make it"
        )
    special = set(level.special.values())
    pieces = list(enumerate(level.pieces))
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [p.decode() if i in special else to_characters(p) for i, p in pieces],
        "token_type": [
            USER_DEFINED if i in level.text else CONTROL if i in special else NORMAL
            for i, _ in pieces
        ],
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


# ---- reading ----


def from_gguf(values: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer of these keys. GptcError when it is of an unknown sort."""
    tokenizer = _cut_as_in_gguf(values, where)
    # llama.cpp's defaults.
    like_llama2, like_llama3 = values.get("model") == "llama", values.get("pre") in _WITH_BOS
    begin = values.get("bos_token_id", 1 if like_llama2 else None)
    if values.get("add_bos_token", like_llama2 or like_llama3) and tokenizer.has_token(begin):
        tokenizer.bos = begin
    marks = marks_from(
        tokenizer.vocab_size,
        values.get("bos_token_id"),
        [*(values.get(key) for key in _ENDS), _ends_by_name(values)],
        values.get("padding_token_id"),
        values.get("chat_template"),
    )
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.take(marks)
    elif marks.ends != tokenizer.named_ends or marks.templates or marks.pad is not None:
        tokenizer.marks = marks
    return tokenizer


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The chat templates by name."""
    found = {key: value for key, value in metadata.items() if key.startswith(_TEMPLATE)}
    default = {DEFAULT: found.pop(_TEMPLATE)} if _TEMPLATE in found else {}
    prefix = f"{_TEMPLATE}."
    named = {k.removeprefix(prefix): text for k, text in found.items() if k.startswith(prefix)}
    return named | default


def _ends_by_name(values: dict[str, Any]) -> list[int]:
    """The added tokens whose names say that a text ends."""
    types = values.get("token_type") or ()
    added = zip(values.get("tokens") or (), types, strict=False)
    ids = {t: i for i, (t, kind) in enumerate(added) if kind in (CONTROL, USER_DEFINED)}
    found = {name: ids[name] for name in ids.keys() & _END_NAMES}
    for others, name in _PARTS:
        if found.keys() >= set(others):
            found.pop(name, None)
    return sorted(found.values())


def _cut_as_in_gguf(values: dict[str, Any], where: str) -> Tokenizer:
    """The same, without its BOS."""
    model, pre = values.get("model"), values.get("pre", "default")
    tokens, types = values.get("tokens"), values.get("token_type")
    _check_types(values, where)
    if not isinstance(tokens, list) or not tokens:
        raise NoTokenizer(f"{where} holds no tokenizer: give one with --tokenizer KIND")
    n = len(tokens)
    types = [NORMAL] * n if types is None else types
    while n and types[n - 1] == UNUSED:  # padding
        n -= 1
    tokens, types = tokens[:n], types[:n]
    if model == "llama":
        scores = (values.get("scores") or [0.0] * n)[:n]
        add_space = values.get("add_space_prefix", True) is not False
        return from_scored(Scored(tokens, scores, types, add_space), where)
    if model != "gpt2" or pre not in CUTS:
        raise UnknownTokenizer(
            f"{where} holds a tokenizer of an unknown sort ({model!r}, {pre!r}); "
            f"{import_with_another(where)}"
        )
    special = {t: i for i, t in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)}
    try:
        known = {t: to_bytes(t) for t in tokens if t not in special}
        pieces = [t.encode() if t in special else known[t] for t in tokens]
        merges = [_merge(line, known) for line in values.get("merges") or ()]
    except ValueError as error:
        raise GptcError(f"{where} holds a token that is not byte-level: {str(error)!r}") from None
    text = frozenset(i for i, kind in enumerate(types) if kind == USER_DEFINED)
    return from_byte_level(ByteLevel(pieces, special, CUTS[pre], merges, text), where)


def _check_types(values: dict[str, Any], where: str) -> None:
    """GptcError for a key of another type than llama.cpp's."""
    kinds = {"model": (str,), "pre": (str,)}
    for key, kind in kinds.items():
        if values.get(key) is not None and not isinstance(values[key], kind):
            raise GptcError(f"{where}: tokenizer.ggml.{key} is {_shown(values[key])}, not a text")
    for name, text in (values.get("chat_template") or {}).items():
        if not isinstance(text, str):
            raise GptcError(f"{where}: its chat template {name} is {_shown(text)}, not a text")
    for key, item in LISTS.items():
        found = values.get(key)
        if found is None:
            continue
        if not isinstance(found, list) or not all(type(one) in item for one in found):
            raise GptcError(
                f"{where}: tokenizer.ggml.{key} is not a list of "
                f"{'texts' if item == (str,) else 'numbers'}: copy the file again"
            )
    n_tokens = len(values.get("tokens") or ())
    for key in ("token_type", "scores"):
        if values.get(key) is not None and len(values[key]) != n_tokens:
            raise GptcError(
                f"{where}: tokenizer.ggml.{key} has {len(values[key]):,} numbers for "
                f"{n_tokens:,} tokens: copy the file again"
            )


def _shown(value: Any) -> str:
    """A value of another type, for an error; one that was not read is an array."""
    return "an array or too long" if isinstance(value, tuple | list) else f"{value!r:.40}"


def _merge(line: str, known: Mapping[str, bytes]) -> tuple[bytes, bytes]:
    """The two pieces of a merge, of which most are `known`. ValueError where these are not two."""
    first, _, second = line.partition(" ")
    if not first or not second:
        raise ValueError(line)
    return known.get(first) or to_bytes(first), known.get(second) or to_bytes(second)
