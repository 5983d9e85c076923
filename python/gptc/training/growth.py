"""The size of steps while they grow: --batch-size-warmup and --seq-len-warmup.

Both are functions of the step's number alone. A window of the data always has --seq-len tokens; a
warm-up of the length cuts each batch of windows into batches of shorter rows, so that tokens,
epochs and the order of the data stay the same. Letters: S sequences of a whole step, T is seq_len.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gptc.data.dataset import Dataset
from gptc.data.loader import Rows
from gptc.errors import UsageError
from gptc.files.words import plural
from gptc.settings import spelled
from gptc.training.options import TrainOptions

STAGES = 8  # of a warm-up of batches: few shapes, for which a GPU records graphs
CUTS = (8, 4, 2)  # of windows, each for a third of a warm-up of the length


class Size(NamedTuple):
    """The size of a step: batches of `rows` windows, each window cut into `cuts` rows."""

    batches: int
    rows: int
    cuts: int

    @property
    def sequences(self) -> int:
        """Windows of the step."""
        return self.batches * self.rows


class Growth:
    """The sizes of the steps of a run."""

    def __init__(self, options: TrainOptions) -> None:
        self._options = options
        self._batch_steps = options.batch_size_warmup
        self._length_steps = options.seq_len_warmup

    def size(self, step: int) -> Size:
        """The size of step `step` (from 0)."""
        stage = STAGES
        if step < self._batch_steps:
            stage = step * STAGES // self._batch_steps + 1
        return Size(*self._batches(stage), self.cuts(step))

    def cuts(self, step: int) -> int:
        """Into how many rows windows are cut in step `step` (from 0)."""
        if step >= self._length_steps:
            return 1
        wanted = CUTS[step * len(CUTS) // self._length_steps]
        return next((n for n in CUTS if n <= wanted and self._options.seq_len % n == 0), 1)

    def tokens(self, first: int, last: int) -> int:
        """Tokens of the steps after `first` up to `last`."""
        n, total = self._batch_steps, 0
        for stage in range(1, STAGES if first < n else 1):
            begin, end = (-(-n * k // STAGES) for k in (stage - 1, stage))
            batches, rows = self._batches(stage)
            total += max(0, min(last, end) - max(first, begin)) * batches * rows
        whole = -(-n * (STAGES - 1) // STAGES)  # the first whole step
        options = self._options
        total += max(0, last - max(first, whole)) * options.batch_size * options.grad_accum
        return total * options.seq_len * (options.rows // options.batch_size)

    def steps_for(self, first: int, tokens: float) -> int:
        """The least number of steps after `first` that have so many tokens."""
        low, high = 0, max(0, -(-int(tokens) // self._options.seq_len) + 1)
        while low < high:
            middle = (low + high) // 2
            if self.tokens(first, first + middle) >= tokens:
                high = middle
            else:
                low = middle + 1
        return low

    def _batches(self, stage: int) -> tuple[int, int]:
        """Batches and rows of a step of a stage from 1 on: S stage / STAGES sequences, rounded up.

        All batches of a step have the same number of rows.
        """
        options = self._options
        if stage == STAGES:
            return options.grad_accum, options.batch_size
        sequences = -(-options.batch_size * options.grad_accum * stage // STAGES)
        batches = -(-sequences // options.batch_size)
        return batches, -(-sequences // batches)


def pieces(rows: Rows, cuts: int, dataset: Dataset) -> Iterator[Rows]:
    """A batch (B, T) as batches (B, T / cuts) of the same tokens, which `cuts` divides."""
    if cuts == 1:
        yield rows
        return
    parts = (np.split(tokens, cuts, axis=1) for tokens in rows[:2])
    for x, y in zip(*parts, strict=True):
        inputs = np.ascontiguousarray(x)
        yield Rows(inputs, np.ascontiguousarray(y), dataset.positions(inputs))


def check_growth(options: TrainOptions, dataset: Dataset, steps: int | None) -> None:
    """UsageError for warm-ups that this run cannot have; its `steps`, None = not known yet."""
    if steps is not None:
        for given in longer(options, steps):
            raise UsageError(f"{given} is longer than the run, which has {plural(steps, 'step')}")
    if options.batch_size_warmup and options.batch_size * options.grad_accum == 1:
        raise UsageError(
            f"--batch-size-warmup {options.batch_size_warmup} has nothing to grow to: a step has "
            "one sequence; use a larger --batch-size or --grad-accum"
        )
    if options.seq_len_warmup and dataset.is_chats:
        raise UsageError(
            f"--seq-len-warmup {options.seq_len_warmup} cuts texts, and {options.named_data} has "
            "conversations: leave it out"
        )


def longer(options: TrainOptions, steps: int) -> Iterator[str]:
    """The warm-ups that do not end within so many steps, as they are given."""
    for name in ("batch_size_warmup", "seq_len_warmup"):
        if (n := getattr(options, name)) > steps:
            yield f"--{spelled(name)} {n}"


def described(options: TrainOptions) -> Iterator[str]:
    """The lines about warm-ups at the start of a run."""
    growth = Growth(options)
    if n := options.batch_size_warmup:
        first, whole = growth.size(0).sequences, options.batch_size * options.grad_accum
        yield f"          {first} to {plural(whole, 'sequence')} in the first {plural(n, 'step')}"
    if n := options.seq_len_warmup:
        first, whole = options.seq_len // growth.cuts(0), options.seq_len
        yield f"          rows of {first} to {whole} tokens in the first {plural(n, 'step')}"
