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
_HALF = 5  # steps to each side in the mean that smooths losses
_DIVERGED = 1.5  # times the least loss, at which rates end
_FIRST = 10  # rates before the loss is compared
_REST = 0.05  # share of the whole fall that the loss may be above its lowest at the upper mark
_NOISE = 2  # times the noise of single losses that a fall is more than


@dataclass(frozen=True)
class LrRange:
    """Rates in the order of steps, the loss of each, smoothed, and what follows from them."""

    rates: list[float]
    losses: list[float]  # nats; finite
    smoothed: list[float]  # the mean over steps to both sides
    steepest: float | None  # rate at which the loss falls fastest by its logarithm; None: nowhere
    stops: float | None  # rate at which it has fallen nearly as far as it does; None: not reached

    def __str__(self) -> str:
        """A line of a plan."""
        if self.steepest is None:
            return f"  rates   the loss does not fall at a learning rate up to {self.rates[-1]:.1e}"
        falls = f"  rates   the loss falls fastest at {self.steepest:.1e}, and "
        if self.stops is None:
            return f"{falls}still falls at {self.rates[-1]:.1e}"
        return f"{falls}stops falling at {self.stops:.1e}: try an --lr between them"


def find_range(setup: Setup) -> LrRange:
    """Trains with rising rates until the loss is not finite or has risen; spoils the model.

    The options are those that `check_range` accepts. UsageError if the loss is not finite at once.
    """
    options, model = setup.options, setup.model
    rates: list[float] = []
    losses: list[float] = []
    least = math.inf  # of the mean of the last losses
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
        rates.append(lr)
        losses.append(result.loss)
        last = losses[-_FIRST:]
        least = min(least, sum(last) / len(last))
        if i >= _FIRST and sum(last) / len(last) > _DIVERGED * least:
            break
    if len(rates) <= _FIRST:
        raise UsageError(f"the loss is not finite at a learning rate of {LOWEST:g}: no range")
    smoothed = _smooth(losses)
    return LrRange(rates, losses, smoothed, *_marks(rates, losses, smoothed))


def _smooth(losses: list[float]) -> list[float]:
    """The mean around each step; at the ends, of the steps that there are."""
    windows = (losses[max(0, i - _HALF) : i + _HALF + 1] for i in range(len(losses)))
    return [math.fsum(window) / len(window) for window in windows]


def _marks(
    rates: list[float], losses: list[float], smoothed: list[float]
) -> tuple[float | None, float | None]:
    """The rate of the steepest fall, and that at which the loss stops falling; None: no such rate.

    A flat floor follows the fall, along which the loss is noise, and its least says nothing.
    """
    lowest = smoothed.index(min(smoothed))
    fall = smoothed[0] - smoothed[lowest]
    around = [(loss - mean) ** 2 for loss, mean in zip(losses, smoothed, strict=True)]
    noise = math.sqrt(math.fsum(around[: lowest + 1]) / (lowest + 1))
    if fall <= _NOISE * noise:
        return None, None
    enough = smoothed[lowest] + _REST * fall
    stop = next(i for i, loss in enumerate(smoothed) if loss <= enough)
    falls = [
        smoothed[max(0, i - 2)] - smoothed[min(i + 2, len(smoothed) - 1)] for i in range(stop + 1)
    ]
    still_falls = len(rates) == STEPS and stop >= STEPS - 1 - 2 * _HALF
    return rates[falls.index(max(falls))], None if still_falls else rates[stop]


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
    marks = ("C2", found.steepest, "falls fastest"), ("C3", found.stops, "stops falling")
    for color, rate, label in marks:
        if rate is not None:
            place.axvline(rate, color=color, linestyle="--", label=label)
    place.set_xscale("log")
    place.set_ylim(0.95 * min(found.losses), 1.1 * max(found.smoothed))
    place.set_xlabel("learning rate")
    place.set_ylabel("loss (nats per token)")
    place.grid(alpha=0.3)
    place.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format=out.suffix.lower()[1:])
    write_file(out, image.getvalue())
