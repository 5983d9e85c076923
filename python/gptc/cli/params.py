"""Types of option values that several commands share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
    _BiasParam = click.ParamType[tuple[int, float]]
else:
    _IntParam = _BiasParam = click.ParamType  # which older versions of click cannot subscript

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_FACTORS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class SizeParam(_IntParam):
    """A whole number such as 300, 64K, 1.5M or 2G (powers of 1000), or 64Ki (powers of 1024)."""

    name = "size"

    def __init__(self, min: int = 0) -> None:
        self.min = min

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            number = value
        else:
            if re.fullmatch(r"-[0-9]+", str(value).strip()):
                self.fail(f"{value} is less than {self.min}", param, ctx)
            found = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))?([KMGT]I?)?", str(value).strip().upper())
            if not found:
                self.fail(f"{value!r} is no size such as 300, 64K, 1.5M or 2G", param, ctx)
            whole, digits, suffix = found[1], found[2] or "", found[3] or ""
            factor = (_FACTORS | _BINARY_FACTORS)[suffix]
            # Whole numbers throughout: a float would round large sizes.
            number, rest = divmod(int(whole + digits) * factor, 10 ** len(digits))
            if rest:
                self.fail(f"{value!r} is no whole number", param, ctx)
        if number < self.min:
            self.fail(f"{value} is less than {self.min}", param, ctx)
        return number


SIZE = SizeParam()
COUNT = SizeParam(min=1)


class TokenBias(_BiasParam):
    """A token's id and a number, such as 50256=-inf."""

    name = "bias"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, number = str(value).partition("=")
        try:
            bias = (int(token), float(number))
        except ValueError:
            self.fail(f"{value!r} is no token with a number, such as 50256=-inf", param, ctx)
        if not bias[1] < float("inf"):
            self.fail(f"{number} is no finite number, and not -inf", param, ctx)
        return bias
