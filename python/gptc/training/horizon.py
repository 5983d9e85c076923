"""The number of steps of a run, from its limits: the first one reached ends it."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

from gptc.checkpoint.facade import Model
from gptc.data.loader import Loader
from gptc.engine.options import Plan
from gptc.errors import UsageError
from gptc.training.growth import Growth
from gptc.training.options import LIMITS, TrainOptions
from gptc.training.schedule import constant_rate
from gptc.training.state import State


@dataclass
class _Times:
    """The seconds of some steps."""

    n: int = 0
    total_s: float = 0.0

    def add(self, step_s: float) -> None:
        self.n += 1
        self.total_s += step_s

    def mean_s(self, otherwise: float) -> float:
        return self.total_s / self.n if self.n else otherwise


class Horizon:
    """The number of steps of the whole run.

    With `minutes`, it follows the clock, so that the schedule ends when the time is up. A
    checkpoint records the number at that time, and a resumed run keeps it. Steps that grow and
    whole ones are timed apart: the time of a step is not in proportion to its tokens.
    """

    def __init__(
        self, options: TrainOptions, state: State, n_train_tokens: int, step_s: float | None
    ) -> None:
        """`step_s` is the measured time of a step, needed with `minutes` only."""
        self.budget_s = None if options.minutes is None else options.minutes * 60
        self._spent_s = 0.0
        self._grown = max(options.batch_size_warmup, options.seq_len_warmup)
        self._growing, self._whole = _Times(), _Times()
        self.most = _most_steps(options, state, n_train_tokens)
        self.steps = self.most
        if self.budget_s is not None:
            assert step_s is not None
            self._measured_s = step_s
            # A tenth of the time is left for updates, evaluations and saving.
            tokens = 0.9 * self.budget_s / step_s * options.step_tokens
            n_steps = Growth(options).steps_for(state.step, tokens)
            self.steps = min(self.most, state.step + n_steps)
        _check_that_steps_remain(self.steps, options, state)

    def follow_clock(self, step: int, spent_s: float, step_s: float) -> None:
        """Updates the number of steps from the time left and the times of steps so far.

        `step_s` is that of the last step, `spent_s` that of this process since its first one, with
        evaluations and saving. Until a whole step has been done, its time is the one measured
        before. The last step may end a little after the time.
        """
        self._spent_s = spent_s
        if self.budget_s is None:
            return
        (self._growing if step <= self._grown else self._whole).add(step_s)
        trained_s = self._growing.total_s + self._whole.total_s
        left_s = (self.budget_s - spent_s) * trained_s / spent_s  # for steps
        whole_s = self._whole.mean_s(self._measured_s)
        growing_s = (self._growing.mean_s(whole_s) + whole_s) / 2
        n_growing = min(max(0, self._grown - step), left_s / growing_s)
        n_left = n_growing + (left_s - n_growing * growing_s) / whole_s
        self.steps = min(self.most, step + max(0, math.ceil(n_left - 0.5)))

    def left_s(self, step: int, step_s: float) -> float:
        """Seconds left: the rest of the time budget if that ends the run, else those of steps."""
        if self.budget_s is not None and self.steps < self.most:
            return max(0.0, self.budget_s - self._spent_s)
        return (self.steps - step) * step_s

    def ended_by_clock(self, step: int) -> bool:
        """Whether the run has ended because its time is up."""
        return self.budget_s is not None and self.steps <= step < self.most


def _most_steps(options: TrainOptions, state: State, n_train_tokens: int) -> int:
    """The least number of steps of all limits but time."""
    limits = [] if options.steps is None else [options.steps]
    remaining: list[float] = []
    if options.tokens is not None:
        remaining.append(options.tokens)
    if options.epochs is not None:
        remaining.append(options.epochs * n_train_tokens)
    growth = Growth(options)
    limits += [state.step + growth.steps_for(state.step, n - state.tokens) for n in remaining]
    return max(1, min(limits)) if limits else sys.maxsize


def _check_that_steps_remain(steps: int, options: TrainOptions, state: State) -> None:
    """Raises UsageError if the run is already past its limits."""
    given = [name for name in LIMITS if getattr(options, name) is not None]
    # A finished run resumed without new limits is not an error.
    if steps < state.step or (steps == state.step > 0 and given != ["steps"]):
        raise UsageError(
            f"the run is at step {state.step:,} ({state.tokens:,} tokens), past "
            f"{', '.join(f'--{name} {getattr(options, name)}' for name in given)}; continue with "
            f"--steps {2 * state.step} {constant_rate(state.lr or options.lr, options)}"
        )


def count_saves(options: TrainOptions, first: int, last: int, has_val: bool) -> int:
    """Checkpoints after step `first` up to `last`, if each evaluation is better than before."""
    save_every = options.save_every or options.eval_every
    return count_multiples(first, last, save_every, options.eval_every if has_val else save_every)


def count_multiples(first: int, last: int, every: int, other: int | None = None) -> int:
    """How many steps after `first` up to `last` are multiples of either, or the last one."""
    other = other or every
    if last <= first:
        return 0
    both, ends = math.lcm(every, other), last % every == 0 or last % other == 0
    each, others, shared = (last // n - first // n for n in (every, other, both))
    return each + others - shared + (not ends)


def few_rows(loader: Loader, plan: Plan, peak_flops: float, most_s: float = 1.0) -> int:
    """Rows of a pass that takes `most_s` seconds if each has the processor's peak (FLOP/s).

    At least one and at most a batch. Conversations have whole batches, since their rows differ.
    """
    flops = plan.train_flops_per_token * loader.seq_len
    few = min(loader.batch_size, max(1, int(most_s * peak_flops / flops)))
    return loader.batch_size if loader.dataset.is_chats else few


def time_step(model: Model, loader: Loader, grad_accum: int, n_rows: int) -> float:
    """Seconds per step, measured on a few passes of `n_rows`, whose gradients are discarded.

    Batches of conversations differ in length, so each pass has another one.
    """
    position, whole = loader.position, loader.batch_size
    loader.batch_size = n_rows
    batches = [loader.next_rows() for _ in range(3)]
    loader.position, loader.batch_size = position, whole
    last = batches.pop()
    model.backward(last.inputs, last.targets, positions=last.positions)
    begin = time.perf_counter()
    for rows in batches:
        model.backward(rows.inputs, rows.targets, positions=rows.positions)
    seconds = (time.perf_counter() - begin) / len(batches)
    model.zero_gradients()
    return max(seconds * whole / n_rows * grad_accum, 1e-6)
