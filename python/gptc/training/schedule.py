"""The learning-rate schedule."""

from __future__ import annotations

import math

from gptc.training.options import TrainOptions


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule.

    The first step after the warm-up has the peak rate, the last step `min_lr`. "constant" keeps the
    peak rate; "wsd" keeps it and falls linearly over the last fifth.
    """
    lr, warmup = options.lr, options.warmup_steps or 0
    low = lr / 10 if options.min_lr is None else options.min_lr
    if step < warmup:
        return lr * (step + 1) / warmup
    if options.schedule == "constant":
        return lr
    last = steps - 1
    begin = max(warmup, last - max(1, steps // 5)) if options.schedule == "wsd" else warmup
    done = min(1.0, max(0.0, (step - begin) / max(1, last - begin)))
    if options.schedule == "cosine":
        return low + 0.5 * (1 + math.cos(math.pi * done)) * (lr - low)
    return lr + (low - lr) * done
