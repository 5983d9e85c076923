"""The learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from gptc.engine.optim import AdamW, Muon
from gptc.files.words import plural, quoted
from gptc.settings import spelled
from gptc.training.defaults import defaults_for
from gptc.training.options import TrainOptions


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule.

    The first step after the warm-up has the peak rate, the last step `min_lr`. "constant" keeps the
    peak rate; "wsd" keeps it and falls linearly over the last `decay_share` of the steps.
    """
    lr, warmup = options.lr, options.warmup_steps or 0
    low = lowest_rate(options)
    if step < warmup:
        return lr * (step + 1) / warmup
    if options.schedule == "constant":
        return lr
    last = steps - 1
    falling = max(1, int(steps * options.decay_share))
    begin = max(warmup, last - falling) if options.schedule == "wsd" else warmup
    done = min(1.0, max(0.0, (step - begin) / max(1, last - begin)))
    if options.schedule == "cosine":
        return low + 0.5 * (1 + math.cos(math.pi * done)) * (lr - low)
    return lr + (low - lr) * done


FIRST_MOMENTUM = 0.85  # Jordan et al. 2024: while gradients still change fast, old ones mislead


def momentum(step: int, options: TrainOptions) -> float:
    """Muon's momentum at step `step` (from 0): it rises linearly to the one in the options."""
    first, last = min(FIRST_MOMENTUM, options.momentum), options.momentum
    if step >= options.momentum_warmup:
        return last
    return first + (last - first) * step / options.momentum_warmup


def optimizers(lr: float, momentum: float, options: TrainOptions) -> tuple[AdamW, Muon]:
    """The settings of an update with a learning rate and a momentum of Muon."""
    decay, clip = options.weight_decay, options.grad_clip
    adamw = AdamW(lr, options.beta1, options.beta2, options.eps, decay, clip)
    return adamw, Muon(lr, momentum, decay, clip, options.muon_beta2, options.muon_cautious)


def idle(options: TrainOptions, steps: int | None) -> Iterator[str]:
    """Notes about options that a run of so many steps does not use; None: steps are not known."""
    warmup = options.warmup_steps or 0
    if steps is not None and warmup > steps:
        yield (
            f"note: --warmup-steps {warmup} is more than the run's {plural(steps, 'step')}, so "
            f"that the learning rate never reaches --lr {options.lr:g}"
        )
    if options.schedule != "wsd" and options.decay_share != TrainOptions.decay_share:
        yield (
            f"note: --decay-share {options.decay_share:g} has no effect with --schedule "
            f"{options.schedule}: it is of wsd"
        )
    usual = defaults_for("init-from" if options.init_from else options.preset)
    for name in ("momentum", "momentum_warmup", "muon_beta2"):
        value, default = getattr(options, name), getattr(TrainOptions, name)
        if options.optimizer != "muon" and value not in (default, usual.get(name, default)):
            yield (
                f"note: --{spelled(name)} {value:g} has no effect with --optimizer "
                f"{options.optimizer}: it is of muon"
            )
    if options.recompute == "none" and options.recompute_layers:
        yield (
            f"note: --recompute-layers {options.recompute_layers} has no effect without "
            "--recompute: add --recompute mlp or block"
        )


def lowest_rate(options: TrainOptions) -> float:
    """The learning rate of the last step, unless the schedule is constant."""
    return options.lr / 10 if options.min_lr is None else options.min_lr


def constant_rate(rate: float, options: TrainOptions) -> str:
    """The options that resume a run at a learning rate, whatever its schedule was."""
    kept = rate if rate > 0 else options.lr / 10  # a schedule may end at 0, which --lr may not be
    parts = ["--schedule constant", f"--lr {kept:.6g}"]
    if options.warmup_steps:
        parts.append("--warmup-steps 0")
    if options.min_lr:
        parts.append("--min-lr 0")
    return " ".join(parts)


def longer(run: Path, step: int, rate: float, options: TrainOptions) -> str:
    """The command that doubles a run and keeps its last learning rate.

    With --steps alone, the schedule would be stretched, and its rate would jump up.
    """
    command = f"gptc train --resume {quoted(run)} --steps {2 * step}"
    return f"{command} {constant_rate(rate, options)}"
