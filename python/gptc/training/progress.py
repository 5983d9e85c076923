"""Progress of training on standard error: a live bar on a terminal, else plain lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, TextIO

from gptc.files.words import duration

if TYPE_CHECKING:
    import rich.progress

_SMOOTHING = 0.95  # weight of the past in the loss and pace shown
_PLAIN_INTERVAL_S = 5.0


@dataclass(frozen=True)
class StepReport:
    """The state of training after a step. Rates are smoothed; `mfu` is None if unknown."""

    step: int
    steps: int
    loss: float  # nats per token
    bpb: float | None  # bits per byte; None if the loss is not of tokens
    lr: float
    tokens_per_s: float
    mfu: float | None
    left_s: float
    measures: dict[str, float] = field(default_factory=dict)  # of pairs, with --dpo

    def describe(self) -> str:
        """The numbers as text, for a line or a bar."""
        mfu = "" if self.mfu is None else f"  mfu {self.mfu:.0%}"
        bpb = "" if self.bpb is None else f"  bpb {self.bpb:.3f}"
        pairs = "".join(f"  {part}" for part in in_words(self.measures))
        return (
            f"loss {self.loss:.4f}{bpb}{pairs}  {self.tokens_per_s:,.0f} tok/s{mfu}"
            f"  left {duration(self.left_s)}"
        )


def in_words(measures: Mapping[str, float]) -> Iterator[str]:
    """The accuracy and the margin of pairs, of a step or an evaluation."""
    for name in ("reward_accuracy", "val_accuracy"):
        if name in measures:
            yield f"accuracy {measures[name]:.0%}"
    for name in ("reward_margin", "val_margin"):
        if name in measures:
            yield f"margin {measures[name]:.3f}"


def described(evaluation: Mapping[str, float]) -> str:
    """The results of an evaluation."""
    parts = [f"val loss {evaluation['val_loss']:.4f}"]
    if "val_bpb" in evaluation:
        parts.append(f"val bpb {evaluation['val_bpb']:.3f}")
    parts += [
        f"{name.partition('/')[2]} {value:.4f}" for name, value in evaluation.items() if "/" in name
    ]
    return "  ".join([*parts, *in_words(evaluation)])


class Meter:
    """Smooths loss, measures and seconds per step: an exponential mean with bias correction."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._loss = 0.0
        self._step_s = 0.0
        self._sums: dict[str, float] = {}

    def add(self, loss: float, step_s: float, measures: Mapping[str, float] | None = None) -> None:
        """Adds a step."""
        past = _SMOOTHING
        self._weight = past * self._weight + (1 - past)
        self._loss = past * self._loss + (1 - past) * loss
        self._step_s = past * self._step_s + (1 - past) * step_s
        for name, value in (measures or {}).items():
            self._sums[name] = past * self._sums.get(name, 0.0) + (1 - past) * value

    @property
    def measures(self) -> dict[str, float]:
        """The smoothed measures."""
        return {name: total / self._weight for name, total in self._sums.items()}

    @property
    def loss(self) -> float:
        """The smoothed loss."""
        return self._loss / self._weight if self._weight else float("nan")

    @property
    def step_s(self) -> float:
        """The smoothed time of a step, in seconds."""
        return self._step_s / self._weight if self._weight else float("nan")


class Progress(Protocol):
    """A display of training progress, on standard error."""

    def start(self, step: int, steps: int) -> None:
        """Begins at `step` of `steps`."""

    def update(self, report: StepReport) -> None:
        """Shows a finished step."""

    def note(self, text: str) -> None:
        """Prints a permanent line, such as an evaluation."""

    def close(self) -> None:
        """Ends the display; twice is harmless."""


class PlainProgress:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, out: TextIO | None = None, interval_s: float = _PLAIN_INTERVAL_S) -> None:
        self._out = out or sys.stderr
        self._interval_s = interval_s
        self._last = time.monotonic()

    def start(self, step: int, steps: int) -> None:
        """Does nothing."""

    def update(self, report: StepReport) -> None:
        """Prints a line if the interval has passed or this is the last step."""
        now = time.monotonic()
        if now - self._last >= self._interval_s or report.step == report.steps:
            self._last = now
            self.note(f"{step_label(report.step, report.steps)}  {report.describe()}")

    def note(self, text: str) -> None:
        """Prints the line."""
        say(text, self._out)

    def close(self) -> None:
        """Does nothing."""


class SilentProgress:
    """No display, of a rank other than 0."""

    def start(self, step: int, steps: int) -> None:
        """Does nothing."""

    def update(self, report: StepReport) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class LiveProgress:
    """A bar redrawn in place, with notes above it."""

    def __init__(self) -> None:
        # Imported here, before training measures its memory, and not in `start`.
        import rich.console
        import rich.progress

        self._console = rich.console.Console(stderr=True, highlight=False)
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def start(self, step: int, steps: int) -> None:
        """Draws the bar."""
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        numbers = TextColumn("{task.fields[numbers]}", markup=False)
        numbers.get_table_column().no_wrap = True
        self._bar = Bar(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            # The numbers take about 70 columns; the bar gets the rest of the line.
            BarColumn(bar_width=max(4, min(30, self._console.width - 75))),
            numbers,
            console=self._console,
            transient=True,
            refresh_per_second=5,
        )
        self._task = self._bar.add_task("", total=steps, completed=step, numbers="")
        with heard_or_not(self._console.file):
            self._bar.start()

    def update(self, report: StepReport) -> None:
        """Moves the bar."""
        if self._bar is not None and self._task is not None:
            with heard_or_not(self._console.file):
                self._bar.update(
                    self._task,
                    completed=report.step,
                    total=report.steps,  # changes with --minutes
                    numbers=report.describe(),
                )

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is None:
            say(text, sys.stderr)
        else:
            with heard_or_not(self._console.file):
                self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bar and restores the cursor."""
        if self._bar is not None:
            with heard_or_not(self._console.file):
                self._bar.stop()
            self._bar = None


def make_progress() -> Progress:
    """The live bar if standard error is a terminal, else plain lines."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return LiveProgress()
    return PlainProgress()


@contextmanager
def heard_or_not(stream: IO[str]) -> Iterator[None]:
    """Continues after a failed write to a stream: reader or terminal gone, or disk full.

    Later writes go to /dev/null. A lost line must not end hours of training.
    """
    try:
        yield
    except OSError:
        with suppress(OSError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def say(text: str, stream: IO[str]) -> None:
    """Prints a line; a failed write is ignored."""
    with heard_or_not(stream):
        print(text, file=stream, flush=True)


def step_label(step: int, steps: int) -> str:
    """A label such as "step  250/1000", of constant width throughout a run."""
    return f"step {step:>{len(str(steps))}}/{steps}"
