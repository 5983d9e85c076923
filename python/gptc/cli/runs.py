"""The runs in a folder, for `gptc info FOLDER`: how far each is, its loss, and its size."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from gptc.checkpoint.find import open_folder
from gptc.checkpoint.metrics import METRICS, read_records
from gptc.checkpoint.names import folders_in, list_checkpoints
from gptc.errors import GptcError, UsageError
from gptc.files.words import count, duration

_COLUMNS = ("run", "step", "tokens", "time", "train loss", "val loss", "parameters", "written")


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `gptc train` or `gptc finetune` wrote."""
    return bool(list_checkpoints(folder)) or (folder / METRICS).is_file()


def describe_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs in `folder`, the last written first. What is not known of a run is None."""
    runs = [_describe(run) for run in folders_in(folder) if is_run(run)]
    return sorted(runs, key=lambda run: str(run["written"]), reverse=True)


def _describe(run: Path) -> dict[str, Any]:
    lines, checkpoints = read_records(run / METRICS), list_checkpoints(run)
    last = lines[-1] if lines else {}
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    newest = checkpoints[-1] if checkpoints else run / METRICS
    return {
        "run": run.name,
        **{name: last.get(name) for name in ("step", "tokens", "elapsed_s", "train_loss")},
        "val_loss": losses[-1] if losses else None,
        "best_val_loss": min(losses, default=None),
        "parameters": _parameters(checkpoints[-1]) if checkpoints else None,
        "written": datetime.fromtimestamp(newest.stat().st_mtime).isoformat(timespec="seconds"),
    }


def _parameters(checkpoint: Path) -> int | None:
    """None where it is damaged, or the base of its adapters is gone."""
    try:
        config = open_folder(checkpoint).config
    except UsageError:
        raise
    except GptcError:
        return None
    return sum(math.prod(shape) for _, shape, _ in config.parameters())


def runs_table(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each run under a line of names."""
    rows = [_COLUMNS, *map(_row, runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    def told(name: str, form: Any) -> str:
        return "-" if run[name] is None else str(form(run[name]))

    return (
        run["run"],
        told("step", "{:,}".format),
        told("tokens", count),
        told("elapsed_s", duration),
        told("train_loss", "{:.4f}".format),
        told("val_loss", "{:.4f}".format),
        told("parameters", count),
        run["written"].replace("T", " ")[:16],
    )
