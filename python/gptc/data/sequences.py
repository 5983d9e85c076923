"""Sequences of a dataset of conversations, and windows of them with targets.

Letters in shapes: S is the number of sequences of a split, N that of its tokens, B that of the rows
of a batch, T that of their positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptc.data.dataset import Dataset
from gptc.data.kinds import is_target
from gptc.tokenizer.base import Tokens
from gptc.tokenizer.conversations import FIRST

_ROUND = 16  # positions: few shapes of batches


class Sequences:
    """The sequences of a split: `begins` (S,) and `sizes` (S,) in tokens, and `kinds` (N,)."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.dataset = dataset
        self.split = split
        self.kinds = dataset.kinds(split)
        self.begins = np.flatnonzero(self.kinds & FIRST)
        self.sizes = np.diff(np.concatenate((self.begins, [len(self.kinds)])))

    def __len__(self) -> int:
        return len(self.begins)

    def tokens(self, i: int, most: int | None = None) -> Tokens:
        """The tokens of a sequence (n,), or its first ones."""
        n = int(self.sizes[i]) if most is None else min(most, int(self.sizes[i]))
        out = np.empty(n, np.int32)
        self.dataset.read(self.split, int(self.begins[i]), out)
        return out


class Windows:
    """Sequences as rows of at most T + 1 tokens, of which each has a target.

    Of longer ones the end is cut off, or they are left out.
    """

    def __init__(self, dataset: Dataset, split: str, seq_len: int) -> None:
        self.sequences = sequences = Sequences(dataset, split)
        self.seq_len = seq_len
        self._target = is_target(sequences.kinds, dataset.train_on)
        sizes, begins = sequences.sizes, sequences.begins
        is_long = sizes > seq_len + 1
        before = np.concatenate(([0], np.cumsum(self._target)))
        cut = np.minimum(sizes, seq_len + 1)
        n_targets = before[begins + cut] - before[begins]
        kept = n_targets > 0
        if dataset.long_rows == "drop":
            kept &= ~is_long
        self.rows = np.flatnonzero(kept)
        """The sequences that are used (W,)."""
        self.n_targets = int(n_targets[kept].sum())
        self.n_long = int(is_long.sum())
        """Sequences that are cut or left out since they are long."""
        self.n_empty = int((n_targets == 0).sum())
        """Sequences that are left out since they have no target, or none before the cut."""

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, windows: Sequence[int]) -> tuple[Tokens, Tokens]:
        """Inputs and targets of these windows, int32 (B, T) each; -1 is not a target.

        T is that of the longest, rounded up. Padding follows the tokens of a row, so that causal
        attention does not read it.
        """
        rows = [int(self.rows[window]) for window in windows]
        longest = max(int(self.sequences.sizes[row]) - 1 for row in rows)
        width = min(self.seq_len, -(-longest // _ROUND) * _ROUND)
        x = np.zeros((len(rows), width), np.int32)
        y = np.full((len(rows), width), -1, np.int32)
        for b, row in enumerate(rows):
            tokens, begin = self.sequences.tokens(row, width + 1), int(self.sequences.begins[row])
            n = len(tokens) - 1
            x[b, :n] = tokens[:-1]
            y[b, :n] = np.where(self._target[begin + 1 : begin + n + 1], tokens[1:], -1)
        return x, y
