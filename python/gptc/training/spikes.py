"""Jumps of the training loss that its noise does not explain."""

from __future__ import annotations

import math

_PAST = 0.98  # weight of the past in the mean and the variance
_FIRST = 50  # steps of this process before the first jump is looked for


class Spikes:
    """Notes steps whose loss is `sigmas` standard deviations above the mean of those before.

    Both are exponential means over about 50 steps. The loss itself counts in those of later steps,
    so that a level that stays is noted once or twice. 0: notes nothing.
    """

    def __init__(self, sigmas: float) -> None:
        self._sigmas = sigmas
        self._n = 0
        self._mean = self._variance = 0.0

    def add(self, step: int, loss: float) -> str | None:
        """Adds the loss of a step, in nats; the note about it, if any."""
        note, deviation = None, math.sqrt(self._variance)
        off = loss - self._mean
        if self._sigmas and self._n >= _FIRST and off > self._sigmas * deviation > 0:
            note = (
                f"note: the loss of step {step:,} is {loss:.4f}, {off / deviation:.0f} standard "
                f"deviations above its mean of {self._mean:.4f}: if it stays, use a smaller --lr "
                "or --grad-clip, or look at the data"
            )
        self._n += 1
        past = min(_PAST, 1 - 1 / self._n)
        self._mean += (1 - past) * off
        self._variance = past * (self._variance + (1 - past) * off * off)
        return note
