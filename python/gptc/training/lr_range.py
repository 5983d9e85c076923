"""The range of learning rates of a run: the loss while the rate rises (Smith 2015, section 3.3)."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

from gptc.engine.library import GPT_ERR_NUMERIC
from gptc.errors import EngineError, UsageError
from gptc.files.whole import write_file
from gptc.training.options import TrainOptions
from gptc.training.plot import IMAGES, check_out
from gptc.training.schedule import optimizers
from gptc.training.setup import Setup

LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 120
_PAST = 0.9  # weight of the past in the smoothed loss
_DIVERGED = 1.5  # times the least loss, at which rates end
_FIRST = 10  # rates before the loss is compared


@dataclass(frozen=True)
class LrRange:
    """Rates in the order of steps, the loss of each, smoothed, and what follows from them."""

    rates: list[float]
    losses: list[float]  # nats; finite
    smoothed: list[float]
    steepest: float  # the rate at which the loss fell fastest by the logarithm of the rate
    least: float  # the rate with the least loss, after which it rises

    def __str__(self) -> str:
        """A line of a plan."""
        return (
            f"  rates   the loss falls fastest at {self.steepest:.1e}, and rises from "
            f"{self.least:.1e} on: an --lr between them"
        )


def find_range(setup: Setup) -> LrRange:
    """Trains with rising rates until the loss is not finite or has risen; spoils the model.

    The options are those that `check_range` accepts. UsageError if the loss is not finite at once.
    """
    options, model = setup.options, setup.model
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    mean = 0.0
    for i in range(STEPS):
        lr = LOWEST * (HIGHEST / LOWEST) ** (i / (STEPS - 1))
        batches = [setup.loader.next_rows() for _ in range(options.grad_accum)]
        places = [rows.positions for rows in batches if rows.positions is not None]
        adamw, muon = optimizers(lr, options.momentum, options)
        try:
            result = model.train_step(
                [rows.inputs for rows in batches],
                [rows.targets for rows in batches],
                positions=places or None,
                muon=muon,
                **vars(adamw),
            )
        except EngineError as error:
            if error.status != GPT_ERR_NUMERIC:
                raise
            break
        if not math.isfinite(result.loss):
            break
        mean = _PAST * mean + (1 - _PAST) * result.loss
        rates.append(lr)
        losses.append(result.loss)
        smoothed.append(mean / (1 - _PAST ** (i + 1)))
        if i >= _FIRST and smoothed[-1] > _DIVERGED * min(smoothed):
            break
    if len(rates) <= _FIRST:
        raise UsageError(f"the loss is not finite at a learning rate of {LOWEST:g}: no range")
    return LrRange(rates, losses, smoothed, *_marks(rates, smoothed))


def _marks(rates: list[float], smoothed: list[float]) -> tuple[float, float]:
    """The rate of the steepest fall before the least loss, and that of the least loss."""
    least = max(_FIRST, smoothed.index(min(smoothed)))
    # Over five steps; the smoothed loss follows the rates by a few steps.
    falls = [smoothed[i - 2] - smoothed[i + 2] for i in range(2, max(3, least - 2))]
    return rates[2 + falls.index(max(falls))], rates[least]


def check_range(options: TrainOptions, out: Path) -> None:
    """GptcError for pairs, whose loss is not of tokens, and if no picture can be written here."""
    if options.dpo:
        raise UsageError("--find-lr is not for --dpo: leave one out")
    check_out(out, IMAGES, "--find-lr")


def draw_range(found: LrRange, out: Path) -> None:
    """Writes a picture of the losses by rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    place = figure.subplots()
    place.plot(found.rates, found.losses, color="C0", alpha=0.3, linewidth=0.7)
    place.plot(found.rates, found.smoothed, color="C0", label="loss, smoothed")
    place.axvline(found.steepest, color="C2", linestyle="--", label="falls fastest")
    place.axvline(found.least, color="C3", linestyle="--", label="least")
    place.set_xscale("log")
    place.set_ylim(0.95 * min(found.losses), 1.1 * max(found.smoothed))
    place.set_xlabel("learning rate")
    place.set_ylabel("loss (nats per token)")
    place.grid(alpha=0.3)
    place.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format=out.suffix.lower()[1:])
    write_file(out, image.getvalue())
