"""Options, and types of their values, that several commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.files.sizes import parse_size

if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
    _FloatParam = click.ParamType[float]
    _BiasParam = click.ParamType[tuple[int, float]]
else:
    # older versions of click cannot subscript it
    _IntParam = _FloatParam = _BiasParam = click.ParamType


class SizeParam(_IntParam):
    """A whole number such as 300, 64K, 1.5M or 2G (powers of 1000), or 64Ki (powers of 1024)."""

    name = "size"

    def __init__(
        self, min: int = 0, words: Mapping[str, int] | None = None, max: int | None = None
    ) -> None:
        self.min, self.max, self._words = min, max, words or {}

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            number = value
        elif value in self._words:
            return self._words[str(value)]
        else:
            if re.fullmatch(r"-[0-9]+", str(value).strip()):
                self.fail(f"{value} is less than {self.min}", param, ctx)
            try:
                number = parse_size(str(value))
            except ValueError as error:
                self.fail(str(error), param, ctx)
        if number < self.min:
            self.fail(f"{value} is less than {self.min}", param, ctx)
        if self.max is not None and number > self.max:
            self.fail(f"{value} is more than {self.max:,}", param, ctx)
        return number


SIZE = SizeParam()
COUNT = SizeParam(min=1)


class FiniteNumber(_FloatParam):
    """A finite number, `min` or more, or above it if that is `min_open`.

    click's own range has NaN in it, and help that explains it in signs.
    """

    name = "number"

    def __init__(self, min: float, min_open: bool = False) -> None:
        self._min, self._min_open = min, min_open

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(click.FLOAT.convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        if number < self._min or (self._min_open and number == self._min):
            bound = "above" if self._min_open else "at least"
            self.fail(f"{value} is not {bound} {self._min:g}", param, ctx)
        return number


class TokenBias(_BiasParam):
    """A token's id and its bias, such as 50256=-inf."""

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
            self.fail(f"{value!r} is not ID=NUMBER, such as 50256=-inf", param, ctx)
        if not bias[1] < float("inf"):
            self.fail(f"{number} is not a finite number or -inf", param, ctx)
        return bias


model_option = click.option(
    "-m",
    "--model",
    metavar="PATH",
    type=click.Path(),
    help="Model: a run, folder, file or hub name.  [the newest run]",
)
draft_option = click.option(
    "--draft",
    metavar="MODEL",
    type=click.Path(),
    help="Draft model for speculative decoding, or ngram.",
)
quantize_option = click.option(
    "--quantize", type=click.Choice(["int8", "int4"]), help="Quantized weights, for speed."
)
config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file of options; the command line overrides it.",
)
