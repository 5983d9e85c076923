"""The result that a recipe is expected to end with, by its size and tokens.

The rule is that of Hoffmann et al. 2022 (equation 2): E + A / N^a + B / D^b for N numbers in the
matrices of layers and D training tokens. Its constants are fitted to runs of each recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from gptc.engine.config import GPTConfig
from gptc.errors import UsageError
from gptc.files.words import count
from gptc.training.options import EXPERTS, SHAPE, TrainOptions
from gptc.training.plan import forecast
from gptc.training.progress import SilentProgress
from gptc.training.resolve import new_options
from gptc.training.setup import set_up
from gptc.training.trainer import Trainer


class Rule(NamedTuple):
    """The constants of a recipe, with its usual data, tokenizer and optimizer."""

    floor: float  # E
    of_size: float  # A
    size_power: float  # a
    of_tokens: float  # B
    tokens_power: float  # b
    margin: float  # share by which a run may be better: more than any run of the fit was

    def result(self, size: float, tokens: float) -> float:
        """The expected result of a run."""
        by_size = self.of_size / math.pow(size, self.size_power)
        return self.floor + by_size + self.of_tokens / math.pow(tokens, self.tokens_power)

    def tokens_for(self, size: float, target: float) -> float:
        """The tokens after which the target is expected; infinity: never at this size."""
        rest = target - self.result(size, math.inf)
        return math.pow(self.of_tokens / rest, 1 / self.tokens_power) if rest > 0 else math.inf


# Options that may differ from the recipe's: the rule knows the others only as they are there.
KNOWN = {
    *SHAPE, "depth", "steps", "tokens", "minutes", "seq_len", "batch_size", "grad_accum", "lr",
    "min_lr", "schedule", "decay_share", "warmup_steps", "warmup_share", "momentum_warmup",
    "device", "dtype", "threads", "pin", "save_every", "log_every", "sample_every", "keep_last",
} - {*EXPERTS}  # fmt: skip


def check_target(
    rule: Rule | None,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    target: float | None,
    folder: Path,
) -> None:
    """UsageError for a target that a run with these options is not expected to reach.

    `given` are the options in place of the recipe's. With --minutes, the data is prepared, and two
    seconds of training give the tokens; a checkpoint is written for a moment to `folder`.
    """
    if rule is None or target is None or not given.keys() <= KNOWN:
        return
    run = new_options(options)
    size = _size(run)
    if target < rule.result(size, math.inf) * (1 - rule.margin):
        _refuse(rule, run, size, target, math.inf)
    if (tokens := _tokens(run, folder)) is not None:
        _refuse(rule, run, size, target, tokens)


def _refuse(rule: Rule, run: TrainOptions, size: float, target: float, tokens: float) -> None:
    expected = rule.result(size, tokens)
    if target >= expected * (1 - rule.margin):
        return
    what = "any number of" if tokens == math.inf else count(tokens)
    needed = rule.tokens_for(size, target)
    steps = math.ceil(needed / run.step_tokens) if needed < math.inf else 0
    advice = f"--steps {steps}" if 0 < steps < 2**40 else "a larger model"
    raise UsageError(
        f"--target {target:g} cannot be reached: {what} tokens with {count(size)} numbers in "
        f"layers are expected to end at {expected:.3f}; use {advice}, or a higher --target"
    )


def _size(run: TrainOptions) -> float:
    """Numbers in the matrices of layers."""
    changed = {name: getattr(run, name) for name in SHAPE if getattr(run, name) is not None}
    config = GPTConfig.preset(run.preset, vocab_size=256, block_size=run.seq_len, **changed)
    shapes = [shape for name, shape, _ in config.parameters() if name.startswith("h.")]
    return float(sum(math.prod(shape) for shape in shapes if len(shape) == 2))


def _tokens(run: TrainOptions, folder: Path) -> float | None:
    """Training tokens; None = not known."""
    if run.minutes is not None:
        with closing(set_up(run, None, SilentProgress())) as setup:
            return float(forecast(setup, Trainer(setup, SilentProgress(), folder), folder).tokens)
    limits = [] if run.steps is None else [run.steps * run.step_tokens]
    limits += [] if run.tokens is None else [run.tokens]
    return float(min(limits)) if limits else None
