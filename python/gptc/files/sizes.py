"""Sizes as a person writes them: 300, 64K, 1.5M or 2G (powers of 1000), 64Ki (powers of 1024)."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_FACTORS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """The whole number in `text`, with or without a suffix. ValueError for any other text."""
    found = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))?([KMGT]I?)?", text.strip().upper())
    if not found:
        raise ValueError(f"{text!r} is not a whole number such as 300, 64K, 1.5M or 2G")
    whole, digits, suffix = found[1], found[2] or "", found[3] or ""
    factor = (_FACTORS | _BINARY_FACTORS)[suffix]
    # Whole numbers throughout: a float would round large sizes.
    scale: int = 10 ** len(digits)
    number, rest = divmod(int(whole + digits) * factor, scale)
    if rest:
        raise ValueError(f"{text!r} is not a whole number")
    return number
