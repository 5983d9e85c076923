"""The datasets of a mixture and their weights, as --data names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gptc.data.known import KNOWN_DATASETS
from gptc.errors import UsageError
from gptc.files.words import quoted

MOST_DATASETS = 32
_ROUNDING = 1e-6  # of the sum of weights


class Weighted(NamedTuple):
    """A dataset of a mixture, as named by --data."""

    name: str  # a dataset's, or a path
    weight: float


def weighted(data: Sequence[str]) -> list[Weighted]:
    """The datasets and weights of several --data NAME:WEIGHT. UsageError for a contradiction."""
    if not data:
        raise UsageError("--data names no dataset: name one, or leave it out")
    found = [_weighted(text) for text in data]
    if len(found) > MOST_DATASETS:
        raise UsageError(f"--data names {len(found)} datasets; at most {MOST_DATASETS} are mixed")
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--data names {name} twice: give it one weight")
    total = sum(one.weight for one in found)
    if abs(total - 1) > _ROUNDING:
        shares = ", ".join(f"{one.weight / total:.3g}" for one in found)
        raise UsageError(f"the weights of --data sum to {total:g}; they must sum to 1: {shares}")
    return found


def _weighted(text: str) -> Weighted:
    name, _, weight = text.rpartition(":")
    exists = text in KNOWN_DATASETS or Path(text).exists()
    if exists or not name or not _is_weight(weight):
        what = f"--data {quoted(text)} has no weight"
        if exists and name and _is_weight(weight):
            what = f"--data {quoted(text)} is a path that ends like a weight"
        raise UsageError(f"{what}: of several datasets, write each as {quoted(text)}:0.5")
    return Weighted(name, float(weight))


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def check_alone(name: str) -> None:
    """UsageError for a single --data with a weight."""
    known, _, weight = name.rpartition(":")
    exists = known in KNOWN_DATASETS or (known and Path(known).exists())
    if exists and _is_weight(weight) and not Path(name).exists():
        raise UsageError(
            f"--data {quoted(name)} has a weight, but is the only dataset: leave out "
            f":{weight}, or add another --data"
        )
