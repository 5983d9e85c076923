"""The curves of a run: the numbers of its metrics.jsonl as arrays."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.checkpoint.find import open_folder
from gptc.checkpoint.metrics import METRICS, SAMPLES, read_records, sample_of
from gptc.checkpoint.names import list_checkpoints
from gptc.errors import GptcError
from gptc.files.words import quoted

Numbers: TypeAlias = npt.NDArray[np.float64]

AXES = {"step": "step", "tokens": "tokens", "time": "elapsed_s"}  # choices of --x: key of a record
_POINTS = 100  # of a smoothed curve: what each averages, at least


@dataclass(frozen=True)
class Curves:
    """A run's folder, records, samples, and its newest checkpoint's trainer.json, if any."""

    folder: Path
    name: str
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]  # each has a step and a text
    trainer: dict[str, Any] | None

    def curve(self, key: str, x: str = "step") -> tuple[Numbers, Numbers]:
        """The records that have a key: their places on an axis (N,), and the values (N,)."""
        rows = [(record[AXES[x]], record[key]) for record in self.records if key in record]
        numbers = [row for row in rows if all(type(value) in (int, float) for value in row)]
        pairs = np.array(numbers, np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def best(self) -> dict[str, Any] | None:
        """The record with the lowest validation loss; None without evaluations."""
        evaluated = [r for r in self.records if r.get("val_loss") == r.get("val_loss", "")]
        return min(evaluated, key=lambda r: r["val_loss"], default=None)

    def final(self) -> dict[str, Any] | None:
        """The last record with an evaluation; None without one."""
        return next((r for r in reversed(self.records) if "val_loss" in r), None)


def read_curves(run: Path | str) -> Curves:
    """Reads a run's folder. GptcError for one without metrics."""
    folder = Path(run)
    records = read_records(folder / METRICS)
    if not records:
        raise GptcError(
            f"{folder} holds no {METRICS} with a step in it: give the folder of a run, such as "
            f"runs/tiny-stories; gptc info {quoted(folder)} says what it is"
        )
    checkpoints = list_checkpoints(folder)
    trainer = None
    with suppress(GptcError):  # a base that has gone: the curves are there all the same
        trainer = open_folder(checkpoints[-1]).trainer() if checkpoints else None
    samples = read_records(folder / SAMPLES, sample_of)
    return Curves(folder, folder.resolve().name, records, samples, trainer)


def smooth(values: Numbers) -> Numbers:
    """The mean of each value (N,) and those around it, in all a hundredth of the curve."""
    half = len(values) // _POINTS // 2
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    means: Numbers = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return means
