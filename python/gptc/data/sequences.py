"""Sequences of a dataset of conversations, and windows of them with targets.

Letters in shapes: S is the number of sequences of a split, N that of its tokens, B that of the rows
of a batch, T that of their positions.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from gptc.data.dataset import Dataset
from gptc.data.kinds import REJECTED, is_target
from gptc.data.loader import Rows
from gptc.data.options import Packing
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
    """Rows of at most T + 1 tokens, of which each has a target: a sequence, or several.

    Of longer sequences the end is cut off, or they are left out. Rejected answers of preference
    data are left out. With the packing "fit", sequences that are together at most T positions share
    a window.
    """

    what = "conversation"

    def __init__(
        self, dataset: Dataset, split: str, seq_len: int, packing: Packing = "pad"
    ) -> None:
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
        kept &= (sequences.kinds[begins] & REJECTED) == 0
        used: list[int] = np.flatnonzero(kept).tolist()
        self.n_long = int(is_long.sum())
        """Sequences that are cut or left out since they are long."""
        self.n_empty = int((n_targets == 0).sum())
        """Sequences that are left out since they have no target, or none before the cut."""
        self.packing = packing
        positions = np.minimum(sizes - 1, seq_len).tolist()
        if packing == "pad":
            self._rows = [[i] for i in used]
        else:
            self._rows = best_fit(used, positions, seq_len)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, windows: Sequence[int]) -> Rows:
        """Inputs, targets and positions of these windows, int32 (B, T) each; -1 is not a target.

        T is that of the longest, rounded up. Padding follows the tokens of a row, so that causal
        attention does not read it; where positions are needed it is a document.
        """
        rows = [[self._pair(i) for i in self._rows[window]] for window in windows]
        filled = fill(rows, self.seq_len)
        return filled if self.packing == "fit" else filled._replace(positions=None)

    def _pair(self, i: int) -> tuple[Tokens, Tokens]:
        """The inputs and targets of a sequence (n,)."""
        tokens, begin = self.sequences.tokens(i, self.seq_len + 1), int(self.sequences.begins[i])
        learned = self._target[begin + 1 : begin + len(tokens)]
        return tokens[:-1], np.where(learned, tokens[1:], -1).astype(np.int32)


def fill(rows: Sequence[Sequence[tuple[Tokens, Tokens]]], seq_len: int) -> Rows:
    """Rows (B, T) of sequences one after the other, each as inputs (n,) and targets (n,).

    T is that of the longest row, rounded up, and at most `seq_len`.
    """
    longest = max(sum(len(x) for x, _ in row) for row in rows)
    width = min(seq_len, -(-longest // _ROUND) * _ROUND)
    shape = (len(rows), width)
    inputs, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    positions = np.zeros(shape, np.int32)
    for b, row in enumerate(rows):
        at = 0
        for x, y in row:
            end = at + len(x)
            inputs[b, at:end], targets[b, at:end] = x, y
            positions[b, at:end] = np.arange(len(x))
            at = end
        positions[b, at:] = np.arange(width - at)
    return Rows(inputs, targets, positions)


def best_fit(items: Sequence[int], sizes: Sequence[int], room: int) -> list[list[int]]:
    """Packs items into bins of `room`: the largest first, each where it leaves the least room.

    Best-fit decreasing (Johnson 1973): at most 11/9 of the fewest bins, and one. `sizes` is by
    item.
    """
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # by the room that they have
    rooms: list[int] = []  # of these, ascending
    for item in sorted(items, key=lambda i: (-sizes[i], i)):
        at = bisect_left(rooms, sizes[item])
        if at == len(rooms):
            chosen, left = len(bins), room
            bins.append([])
        else:
            left = rooms[at]
            chosen = open_bins[left].pop()
            if not open_bins[left]:
                del open_bins[left], rooms[at]
        bins[chosen].append(item)
        left -= sizes[item]
        if left and left not in open_bins:
            insort(rooms, left)
        if left:
            open_bins.setdefault(left, []).append(chosen)
    return bins
