"""The curves of a run: the numbers of its metrics.jsonl as arrays."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.checkpoint.find import open_folder
from gptc.checkpoint.metrics import METRICS, read_records
from gptc.checkpoint.names import list_checkpoints
from gptc.errors import GptcError
from gptc.files.words import quoted

Numbers: TypeAlias = npt.NDArray[np.float64]

AXES = {"step": "step", "tokens": "tokens", "time": "elapsed_s"}  # choices of --x: key of a record
_POINTS = 100  # of a smoothed curve: what each averages, at least


@dataclass(frozen=True)
class Curves:
    """A run's name, its records, and its newest checkpoint's trainer.json, if there is one."""

    name: str
    records: list[dict[str, Any]]
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
    return Curves(folder.resolve().name, records, trainer)


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
