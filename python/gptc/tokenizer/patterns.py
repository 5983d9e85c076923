"""How byte-level vocabularies cut a text before they merge: llama.cpp's pre-tokenizers, by name.

The regexes are those of the models' own tokenizer.json, as llama.cpp cites them
(its src/llama-vocab.cpp).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from gptc.tokenizer.native import GPT2_PATTERN


class Cut(NamedTuple):
    """The rules that cut a text."""

    patterns: tuple[str, ...]
    """Regexes. Each cuts the pieces that the one before it made, at its matches."""
    composes: bool = False
    """Whether a text is composed first: e and an accent become é (NFC)."""
    whole: bool = False
    """Whether a piece that is a token becomes that token, even if no merges make it."""


_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA_3 = rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN_2 = rf"{_ENGLISH}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_QWEN_3_5 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT_4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_BEFORE}{_UPPER}+{_LOWER}*{_ENGLISH}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
# GPT-2's pattern with every digit alone: no other piece reaches to a digit, and space before a
# digit ends as space before the end of the text does.
_DIGITS_ALONE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_CASED = (  # letters with case
    r"A-Za-z\u00B5\u00C0-\u00D6\u00D8-\u00F6\u00F8-\u01BA\u01BC-\u01BF\u01C4-\u0293\u0295-\u02AF"
    r"\u0370-\u0373\u0376\u0377\u037B-\u037D\u037F\u0386\u0388-\u038A\u038C\u038E-\u03A1"
    r"\u03A3-\u03F5\u03F7-\u0481\u048A-\u052F\u0531-\u0556\u10A0-\u10C5\u13A0-\u13F5\u13F8-\u13FD"
    r"\u1C90-\u1CBA\u1CBD-\u1CBF\u1D00-\u1D2B\u1D6B-\u1D77\u1D79-\u1D9A\u1E00-\u1F15\u1F18-\u1F1D"
    r"\u1F20-\u1F45\u1F48-\u1F4D\u1F50-\u1F57\u1F59\u1F5B\u1F5D\u1F5F-\u1F7D\u1F80-\u1FB4"
    r"\u1FB6-\u1FBC\u1FBE\u1FC2-\u1FC4\u1FC6-\u1FCC\u1FD0-\u1FD3\u1FD6-\u1FDB\u1FE0-\u1FEC"
    r"\u1FF2-\u1FF4\u1FF6-\u1FFC\u2102\u2107\u210A-\u2113\u2115\u2119-\u211D\u2124\u2126\u2128"
    r"\u212A-\u212D\u212F-\u2134\u2139\u213C-\u213F\u2145-\u2149\u214E\u2183\u2184\u2C00-\u2C7B"
    r"\u2C7E-\u2CE4\u2CEB-\u2CEE\u2CF2\u2CF3\uA640-\uA66D\uA680-\uA69B\uA722-\uA76F\uA771-\uA787"
    r"\uA78B-\uA78E\uAB70-\uABBF\uFB00-\uFB06\uFB13-\uFB17\uFF21-\uFF3A\uFF41-\uFF5A"
    r"\U00010400-\U0001044F\U000104B0-\U000104D3\U000104D8-\U000104FB\U00010C80-\U00010CB2"
    r"\U00010CC0-\U00010CF2\U000118A0-\U000118DF\U0001E900-\U0001E943"
)
_ASIAN = r"\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+",
    r"\s+$",
    rf"[{_ASIAN}]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"[{_ASIAN}]+", r"\p{N}")
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")


def _characters(pattern: str) -> str:
    r"""The pattern with characters in place of \uXXXX, which the library does not know."""
    codes = r"\\u([0-9A-F]{4})|\\U([0-9A-F]{8})"
    return re.sub(codes, lambda code: chr(int(code[1] or code[2], 16)), pattern)


def _cut(*patterns: str, **flags: bool) -> Cut:
    return Cut(tuple(map(_characters, patterns)), **flags)


GPT2 = Cut((GPT2_PATTERN,))
_NAMED = {
    GPT2: "gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling "
    "exaone4",
    _cut(_LLAMA_3, whole=True): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    _cut(_LLAMA_3): "dbrx smaug-bpe glm4 chatglm-bpe",
    _cut(_DIGITS_ALONE): "smollm starcoder refact command-r codeshell exaone minerva-7b",
    _cut(_QWEN_2, composes=True): "qwen2 deepseek-r1-qwen megrez",
    _cut(_QWEN_2): "stablelm2 hunyuan kormo grok-2 f2llmv2 solar-open",
    _cut(_QWEN_3_5, composes=True): "qwen35",
    _cut(_TEKKEN, whole=True): "tekken",
    _cut(_GPT_4O): "gpt-4o llama4 kanana2",
    _cut(*_DEEPSEEK_LLM): "deepseek-llm",
    _cut(*_DEEPSEEK_CODER): "deepseek-coder",
    _cut(*_DEEPSEEK_3): "deepseek-v3 hunyuan-dense joyai-llm",
    _cut(*_FALCON): "falcon",
    _cut(*_DEFAULT): "default",
}
CUTS = {name: cut for cut, names in _NAMED.items() for name in names.split()}
"""How each of llama.cpp's pre-tokenizers (tokenizer.ggml.pre) cuts a text."""
SAFE = frozenset(pattern for cut in CUTS.values() for pattern in cut.patterns)
"""The patterns that no text makes slow."""

# The same cuts, written in another way.
_SAME = {
    ("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",): (
        GPT2_PATTERN,
    ),
    (r"\p{N}", GPT2_PATTERN): (_DIGITS_ALONE,),
}


def name_of(cut: Cut) -> str | None:
    """llama.cpp's name for this cut; None where it has none."""
    names = [name for name, known in CUTS.items() if known[:2] == cut[:2]]
    return min(names, key=lambda name: CUTS[name].whole != cut.whole, default=None)


def definition_of(cut: Cut) -> dict[str, Any]:
    """The normalizer and pre_tokenizer of a tokenizer.json."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in cut.patterns
    ]
    own = cut.patterns == GPT2.patterns
    sequence = {"type": "Sequence", "pretokenizers": [*steps, {**level, "use_regex": False}]}
    return {
        "normalizer": {"type": "NFC"} if cut.composes else None,
        "pre_tokenizer": {**level, "use_regex": True} if own else sequence,
    }


def cut_of(definition: dict[str, Any]) -> Cut | None:
    """The cut of a tokenizer.json; None for one of another sort."""
    normalizer, splitter = definition.get("normalizer"), definition.get("pre_tokenizer") or {}
    normalizers = _steps(normalizer, "normalizers")
    if any(step.get("type") != "NFC" for step in normalizers):
        return None
    *steps, level = _steps(splitter, "pretokenizers") or [{}]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space") is not False:
        return None
    patterns = [_pattern(step) for step in steps]
    patterns += [GPT2_PATTERN] if level.get("use_regex", True) else []
    if not patterns or not all(patterns):
        return None
    found = tuple(pattern for pattern in patterns if pattern)
    found = tuple(_SAME.get((pattern,), (pattern,))[0] for pattern in found)
    whole = definition["model"].get("ignore_merges") is True
    return Cut(_SAME.get(found, found), bool(normalizers), whole)


def _steps(value: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre_tokenizer, which may be a sequence."""
    if value is None:
        return []
    found = value.get(key) if isinstance(value, dict) and value.get("type") == "Sequence" else None
    steps = found if isinstance(found, list) else [value]
    return [step if isinstance(step, dict) else {} for step in steps]


def _pattern(step: dict[str, Any]) -> str | None:
    r"""The regex of a step; None for one that no regex describes."""
    kind = step.get("type")
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else None
    how = (step.get("behavior"), step.get("invert", False))
    if kind != "Split" or how not in (("Isolated", False), ("Removed", True)):
        return None
    pattern = step.get("pattern")
    found = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(found, str):
        return None
    return found.replace("\r", r"\r").replace("\n", r"\n")
