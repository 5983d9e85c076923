"""The public `train`: a run from Python, with options as arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptc.errors import python_names
from gptc.training import run
from gptc.training.progress import Progress
from gptc.training.report import Summary

if TYPE_CHECKING:
    from gptc.checkpoint.facade import Model


def train(
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    on_step: Callable[[int, Model], None] | None = None,
    **options: Any,
) -> Summary:
    """Trains as `gptc train` does: `train(data="book.txt", preset="tiny", steps=500)`.

    `options` are the fields of `TrainOptions` (training/options.py); missing ones take the
    preset's defaults. With `resume`, a run folder or its newest checkpoint, that run continues,
    and only options to change are given. `on_step(step, model)` is called after every step. The
    result names the newest checkpoint and the last losses. Ctrl-C saves and ends the run early.
    """
    with python_names():
        return run.train(options, resume=resume, progress=progress, on_step=on_step)
