"""The pre_tokenizer of models' tokenizer.json files, and nasty texts to cut."""

from __future__ import annotations

import random
from typing import Any

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # in full


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {**step, **changes}


def steps(*splits: dict[str, Any], **level: Any) -> dict[str, Any]:
    last = {**LEVEL, "use_regex": False, **level}
    return {"type": "Sequence", "pretokenizers": [*splits, last]}


# The pre_tokenizer and normalizer of each model's tokenizer.json.
PUBLISHED: dict[str, tuple[dict[str, Any], Any]] = {
    "gpt-2": ({**LEVEL, "use_regex": True}, None),
    "llama-bpe": (
        steps(split(rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{REST}")), None
    ),
    "smollm": (steps({"type": "Digits", "individual_digits": True}, use_regex=True), None),
    "qwen2": (
        steps(split(rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{REST}")), {"type": "NFC"}
    ),
    "tekken": (
        steps(split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )), None,
    ),
    "deepseek-coder": (
        steps(
            split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"),
            split("[一-龥ࠀ-一가-퟿]+"), {"type": "Digits", "individual_digits": True},
        ), {"type": "Sequence", "normalizers": []},
    ),
    "deepseek-v3": (
        steps(
            split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            split(
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"""
                r"[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
        ), {"type": "Sequence", "normalizers": []},
    ),
}  # fmt: skip

# ---- nasty texts ----

FIXED = [
    "", " ", "a", "Hello world's 12345 DON'T I'll we'Ve", "  two   three    \t\n",
    "\r\n\r\n x\r\ny", "e\u0301 é n\u0303 \uac00\u1100\u1161 ﬁ Å\u212b",
    "日本語。こんにちは、ｶﾅ 中文字符 한국어 조선", "مرحبا بالعالم ١٢٣ שלום \u202eabc\u202c",
    "😀👩\u200d👧 🏳️\u200d🌈 ✌🏽", "a\u00a0b\u3000c\u2028d\u0085e", "١٢٣٤ ⅔ Ⅷ ² ₁₂ ๑๒๓ १२३४५",
    "foo_bar(x)->{1,2};//c\n/* */", "\x00\x01\x1f\x7f\ufeff\ufffd", "ǅ ʰ ª µ ß İ \u0131",
    "\u2126 \u212a \u212b \u1f71 \u1fd3", "'s 's'T 'LL'", "!@#$%^&*()_+|~`-=\\{}[]:\";<>?,./",
]  # fmt: skip


def nasty() -> list[str]:
    """The texts above, one of each block of Unicode, and mixtures of both."""
    rng = random.Random(7)
    blocks = [chr(c) for c in range(0x80, 0x110000, 0x53) if not 0xD800 <= c < 0xE000]
    spaces = ["", " ", "  ", "\n", "\t", "\r\n", "1", "12", "1234", "a", "B", "'s", ".", "\u0301"]
    mixed = []
    for _ in range(150):
        parts = rng.choices(blocks, k=6) + rng.choices(spaces, k=10) + rng.choices(FIXED, k=1)
        rng.shuffle(parts)
        mixed.append("".join(parts))
    return [*FIXED, "".join(blocks), " ".join(blocks[::5]), *mixed]


TEXTS = nasty()
