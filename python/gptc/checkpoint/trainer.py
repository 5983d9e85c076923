"""The content of trainer.json, checked: whoever reads it finds the types that `save` wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from gptc.errors import GptcError

_MOST = 1 << 62


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _evaluation(value: Any) -> bool:
    """Results by name. A loss may be NaN, of a run that diverged."""
    if not isinstance(value, dict) or not all(map(_number, value.values())):
        return False
    kinds = ({"val_loss", "val_bpb"}, {"val_loss", "val_accuracy", "val_margin"})
    return not value or any(kind <= value.keys() for kind in kinds)


def _options(value: Any) -> bool:
    """The options; the run that is resumed checks each by its declaration."""
    data = value.get("data") if isinstance(value, dict) else None
    named = _text(data) or (isinstance(data, list) and bool(data) and all(map(_text, data)))
    return named and _count(value.get("steps"))


_OF_A_MODEL: dict[str, Callable[[Any], bool]] = {"step": _count}
_OF_A_RUN: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: _count(value) and value > 0,
    "gptc_version": _text,
    "tokens": _count,
    "elapsed_s": lambda value: _number(value) and 0 <= value < math.inf,
    "best_val_loss": _or_none(_number),
    "best_step": _or_none(_count),
    "since_best": _or_none(_count),
    "evaluation": _evaluation,
    "loader_position": _count,
    "tokenizer_fingerprint": _text,
    "threads": lambda value: _count(value) and value > 0,
    "ranks": lambda value: _count(value) and value > 0,
    "device": _text,
    "dtype": _text,
    "cpu_level": _text,
    "data_sha256": _text,
    "options": _options,
}
_LATER = ("best_step", "since_best", "ranks")  # which older checkpoints lack


def check_trainer(data: Mapping[str, Any], where: str, way_out: str) -> None:
    """GptcError for a value that `save` would not have written. A model alone has only its step."""
    for name, check in (_OF_A_RUN if "options" in data else _OF_A_MODEL).items():
        if name in _LATER and name not in data:
            continue
        if name not in data:
            raise GptcError(f"{where} is damaged: it has no {name}{way_out}")
        if not check(data[name]):
            raise GptcError(f"{where} is damaged: {name} is {data[name]!r:.80}{way_out}")
