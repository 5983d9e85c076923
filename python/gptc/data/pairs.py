"""Pairs of a chosen and a rejected answer to one prompt, and batches of them.

Letters in shapes: B is the number of pairs of a batch, T that of the positions of its longest row,
P the number of pairs of a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gptc.data.chat_loader import ChatLoader
from gptc.data.dataset import Dataset
from gptc.data.kinds import REJECTED, is_target
from gptc.data.loader import Order, Rows
from gptc.data.sequences import Sequences, fill
from gptc.errors import GptcError, UsageError
from gptc.tokenizer.base import Tokens


class Pairs:
    """The pairs of a split whose two rows have targets within T + 1 tokens, and differ there.

    Targets are the tokens of the last answer. Of longer rows the end is cut off, or the pair is
    left out.
    """

    what = "pair"

    def __init__(self, dataset: Dataset, split: str, seq_len: int) -> None:
        """UsageError for a dataset that is not of preferences."""
        if not dataset.is_chats or dataset.meta["chats"]["layout"] != "preference":
            raise UsageError(
                f"--dpo needs rows with chosen and rejected answers; {dataset.named} has others"
            )
        self.seq_len = seq_len
        self._sequences = sequences = Sequences(dataset, split)
        self._target = is_target(sequences.kinds, "completion")
        self.n_long = self.n_empty = 0
        self._firsts: list[int] = []  # the chosen sequence; the rejected one follows it
        for second in np.flatnonzero(sequences.kinds[sequences.begins] & REJECTED).tolist():
            first = second - 1
            is_long = bool((sequences.sizes[first : second + 1] > seq_len + 1).any())
            self.n_long += is_long
            if is_long and dataset.long_rows == "drop":
                continue
            if is_long and not self._differ(first):
                self.n_empty += 1
                continue
            self._firsts.append(first)

    def __len__(self) -> int:
        return len(self._firsts)

    def batch(self, pairs: Sequence[int]) -> Rows:
        """Rows (2 B, T) of these pairs: the chosen ones, then the rejected ones in their order."""
        firsts = [self._firsts[pair] for pair in pairs]
        rows = [[self._row(i)] for i in (*firsts, *(first + 1 for first in firsts))]
        return fill(rows, self.seq_len)._replace(positions=None)

    def batches(self, batch_size: int, n: int | None = None) -> Iterator[tuple[list[int], Rows]]:
        """All pairs in order, or n of them spread evenly: their numbers, and their rows."""
        n_all = len(self)
        n = n_all if n is None else min(n, n_all)
        for first in range(0, n, batch_size):
            pairs = [i * n_all // n for i in range(first, min(first + batch_size, n))]
            yield pairs, self.batch(pairs)

    def _row(self, i: int) -> tuple[Tokens, Tokens]:
        """The inputs and targets of a sequence (n,)."""
        tokens = self._sequences.tokens(i, self.seq_len + 1)
        begin = int(self._sequences.begins[i])
        learned = self._target[begin + 1 : begin + len(tokens)]
        return tokens[:-1], np.where(learned, tokens[1:], -1).astype(np.int32)

    def _differ(self, first: int) -> bool:
        """Whether both rows have targets, and not the same, before they are cut."""
        chosen, rejected = (self._row(i)[1] for i in (first, first + 1))
        has_targets = bool((chosen >= 0).any() and (rejected >= 0).any())
        return has_targets and not np.array_equal(chosen, rejected)


class PairLoader(ChatLoader):
    """Draws batches of pairs: each once in an epoch, in random order."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        order: Order = "random",
        n_ahead: int = 1,
    ) -> None:
        """`batch_size` is the number of pairs. GptcError when no pair fits."""
        self._set(dataset, split, batch_size, seq_len, seed, order, n_ahead)
        self.windows = Pairs(dataset, split, seq_len)
        self.n_windows = len(self.windows)
        if not self.n_windows:
            raise GptcError(
                f"no pair of the {split} split of {dataset.named} has both answers within "
                f"{seq_len + 1} tokens: use a larger --seq-len"
            )
        self.epoch_tokens = 2 * self.n_windows * seq_len

    def pairs(self, position: int) -> list[int]:
        """The numbers of the pairs of the batch at a position (B,)."""
        return self._windows_at(position, self.batch_size)
