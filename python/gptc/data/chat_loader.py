"""Batches of conversations. A row of a batch has one, or several that attention keeps apart.

Letters in shapes: B is batch_size, T at most seq_len, W the number of windows of a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from gptc.data.dataset import Dataset
from gptc.data.loader import Batch, Loader, Order, Rows, eval_batches, mix, permute
from gptc.data.options import Packing
from gptc.data.sequences import Windows
from gptc.errors import GptcError, UsageError


class Drawn(Protocol):
    """The windows of a split, or pairs of them."""

    what: str
    n_long: int
    n_empty: int

    def __len__(self) -> int: ...

    def batch(self, windows: Sequence[int]) -> Rows:
        """The rows of a batch."""
        ...


class ChatLoader(Loader):
    """Draws batches of conversations; what it draws is a function of the seed and `position` only.

    With the packing "fit", a window has as many whole conversations as fit. In an epoch each window
    is drawn once, in random order. Targets are -1 where nothing is to be learned. T is that of the
    longest row of a batch, rounded up.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        order: Order = "random",
        n_ahead: int = 1,
        packing: Packing = "pad",
    ) -> None:
        """GptcError when no conversation has a target within seq_len + 1 tokens."""
        self._set(dataset, split, batch_size, seq_len, seed, order, n_ahead)
        self.windows: Drawn = Windows(dataset, split, seq_len, packing)
        self.n_windows = len(self.windows)
        if not self.n_windows:
            raise no_targets(dataset, split, seq_len)
        self.epoch_tokens = self.n_windows * seq_len

    def _draw(self, position: int, n_rows: int) -> Rows:
        return self.windows.batch(self._windows_at(position, n_rows))

    def _windows_at(self, position: int, n_rows: int) -> list[int]:
        at = np.arange(position, position + n_rows, dtype=np.uint64)
        epochs, windows = np.divmod(at, np.uint64(self.n_windows))
        if self.order == "random":
            key = mix(np.full(len(at), self.seed % 2**64, dtype=np.uint64), epochs)
            windows = permute(windows, self.n_windows, key)
        drawn: list[int] = windows.tolist()
        return drawn


def no_targets(dataset: Dataset, split: str, seq_len: int) -> GptcError:
    """The error for a split without a target."""
    return GptcError(
        f"no conversation of the {split} split of {dataset.named} has a target (--train-on "
        f"{dataset.train_on}) within {seq_len + 1} tokens: use a larger --seq-len, or --train-on "
        "all"
    )


def make_loader(
    dataset: Dataset,
    split: str,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    n_ahead: int = 1,
    packing: Packing = "pad",
) -> Loader:
    """The loader for a dataset of either sort, in random order."""
    if dataset.is_chats:
        return ChatLoader(
            dataset, split, batch_size, seq_len, seed, n_ahead=n_ahead, packing=packing
        )
    return Loader(dataset, split, batch_size, seq_len, seed, n_ahead=n_ahead)


def n_windows(dataset: Dataset, split: str, seq_len: int) -> int:
    """The number of windows in which a split is evaluated."""
    if dataset.is_chats:
        return len(Windows(dataset, split, seq_len))
    return max(0, (dataset.n_tokens(split) - 1) // seq_len)


def all_batches(
    dataset: Dataset, split: str, batch_size: int, seq_len: int, n_batches: int | None = None
) -> Iterator[Batch]:
    """As `eval_batches`, for a dataset of either sort. Weight losses by the number of targets."""
    if not dataset.is_chats:
        yield from eval_batches(dataset, split, batch_size, seq_len, n_batches)
        return
    if batch_size < 1 or seq_len < 1 or (n_batches is not None and n_batches < 1):
        raise UsageError("--batch-size, --seq-len and --eval-batches must be at least 1")
    windows = Windows(dataset, split, seq_len)
    if not len(windows):
        raise no_targets(dataset, split, seq_len)
    n_all = len(windows)
    n = n_all if n_batches is None else min(n_all, n_batches * batch_size)
    for first in range(0, n, batch_size):
        rows = range(first, min(first + batch_size, n))
        yield windows.batch([i * n_all // n for i in rows])[:2]
