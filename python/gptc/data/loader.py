"""Batches of training and evaluation, drawn from the shards of a dataset.

Letters in shapes: B is batch_size, T is seq_len, N the number of tokens of a split.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.data.dataset import Dataset
from gptc.errors import UsageError
from gptc.tokenizer.base import Tokens

Batch: TypeAlias = tuple[Tokens, Tokens]
Order: TypeAlias = Literal["random", "sequential"]


class Rows(NamedTuple):
    """A batch: inputs and targets, int32 (B, T) each; `positions` if rows hold several documents.

    They are the positions (B, T) of tokens in theirs, 0 where one begins.
    """

    inputs: Tokens
    targets: Tokens
    positions: Tokens | None = None


_U64: TypeAlias = npt.NDArray[np.uint64]
_CHUNK = 1024  # sequences whose places are computed at once
_BURST = 8  # batches that are asked for at once: a request stops the caller for a while


class Loader:
    """Draws batches from a split; what it draws is a function of the seed and `position` only.

    In "random" order an epoch starts at a random offset below 2 T, cuts the split into windows of T
    tokens from there on, and visits each once, shuffled. In "sequential" order windows follow each
    other from the start of the split. A new epoch begins when the windows are used up.

    While the caller works with a batch, a thread draws at least the `n_ahead` that follow it.
    `close` ends the thread; so does the end of the loader.
    """

    position: int
    """Number of sequences given out. Set it to resume from there."""
    batch_size: int
    """Sequences of the next batch. It may change between batches."""
    n_windows: int
    """Sequences in an epoch."""
    epoch_tokens: int
    """Positions of an epoch."""

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
        """GptcError when the split has fewer than seq_len + 1 tokens."""
        self._set(dataset, split, batch_size, seq_len, seed, order, n_ahead)
        n_tokens = dataset.n_tokens(split)
        if n_tokens < seq_len + 1:
            raise dataset.too_small(split, seq_len + 1)
        # A window reads one token more than it is long: the last target.
        if order == "random":
            # At least T offsets, so that windows begin everywhere; fewer where the split is short.
            self.n_windows = max(1, n_tokens // seq_len - 1)
        else:
            self.n_windows = (n_tokens - 1) // seq_len
        self._n_offsets = n_tokens - self.n_windows * seq_len
        self.epoch_tokens = n_tokens

    def _set(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        seq_len: int,
        seed: int,
        order: Order,
        n_ahead: int,
    ) -> None:
        """Sets everything that does not depend on the windows."""
        if batch_size < 1 or seq_len < 1:
            raise UsageError("--batch-size and --seq-len must be at least 1")
        if order not in ("random", "sequential"):
            raise UsageError(f"unknown order {order!r}: choose random or sequential")
        self.dataset = dataset
        self.split = split
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.order = order
        self.position = 0
        self._n_ahead = n_ahead
        self._ahead: deque[tuple[int, int, Future[Rows]]] = deque()  # position, size
        self._thread: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._chunk = -1
        self._starts: list[int] = []

    def next(self) -> Batch:
        """The next inputs and targets, int32 (B, T) each; targets are one token further on."""
        return self.next_rows()[:2]

    def next_rows(self) -> Rows:
        """The next batch, with the positions of tokens in their documents if there are several."""
        if self._process != os.getpid():  # a fork has the loader, but not its thread
            self._process = os.getpid()
            self._thread = None
            self._ahead.clear()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "gptc-loader")
        if self._ahead and self._ahead[0][:2] != (self.position, self.batch_size):
            self._forget()
        n_more = (_BURST if self._n_ahead else 1) if len(self._ahead) <= self._n_ahead else 0
        while len(self._ahead) < self._n_ahead + n_more:
            position = self.position + len(self._ahead) * self.batch_size
            drawn = self._thread.submit(self._draw, position, self.batch_size)
            self._ahead.append((position, self.batch_size, drawn))
        batch = self._ahead.popleft()[2].result()
        self.position += self.batch_size
        return batch

    def close(self) -> None:
        """Ends the thread, which `next` would begin again."""
        self._forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _forget(self) -> None:
        for _, _, batch in self._ahead:
            batch.cancel()
        self._ahead.clear()

    def _draw(self, position: int, n_rows: int) -> Rows:
        starts = [self._start(position + b) for b in range(n_rows)]
        inputs, targets = _batch(self.dataset, self.split, starts, self.seq_len)
        return Rows(inputs, targets, self.dataset.positions(inputs))

    def _start(self, position: int) -> int:
        """Where in the split the sequence at `position` of the stream begins."""
        chunk, i = divmod(position, _CHUNK)
        if chunk != self._chunk:
            self._starts = self._chunk_starts(chunk)
            self._chunk = chunk
        return self._starts[i]

    def _chunk_starts(self, chunk: int) -> list[int]:
        return self.starts(np.arange(_CHUNK, dtype=np.uint64) + np.uint64(chunk * _CHUNK))

    def starts(self, positions: _U64) -> list[int]:
        """Where in the split the sequences at these positions of the stream begin."""
        epoch, window = np.divmod(positions, np.uint64(self.n_windows))
        offset = np.zeros_like(window)
        if self.order == "random":
            seed = np.full(len(positions), self.seed % 2**64, dtype=np.uint64)
            key = mix(seed, epoch)
            offset = mix(key, 0) % np.uint64(self._n_offsets)
            window = permute(window, self.n_windows, key)
        starts: list[int] = (offset + window * np.uint64(self.seq_len)).tolist()
        return starts


def eval_batches(
    dataset: Dataset, split: str, batch_size: int, seq_len: int, n_batches: int | None = None
) -> Iterator[Batch]:
    """Inputs and targets, int32 (B, T) each, the same at every call.

    The windows do not overlap. None = the whole split: each token but the first is a target once.
    The last batch may have fewer rows, and the last window, a batch by itself, fewer tokens: weight
    losses by x.size. Fewer `n_batches` than that are of whole windows, spread evenly over the
    split. GptcError when it has no seq_len + 1 tokens.
    """
    if batch_size < 1 or seq_len < 1 or (n_batches is not None and n_batches < 1):
        raise UsageError("--batch-size, --seq-len and --eval-batches must be at least 1")
    n_windows = (dataset.n_tokens(split) - 1) // seq_len
    if n_windows < 1:
        raise dataset.too_small(split, seq_len + 1)
    n_rest = (dataset.n_tokens(split) - 1) % seq_len
    n_all = -(-n_windows // batch_size) + (n_rest > 0)  # batches of the whole split
    whole = n_batches is None or n_batches >= n_all
    n = n_windows if n_batches is None else min(n_windows, n_batches * batch_size)
    for first in range(0, n, batch_size):
        rows = range(first, min(first + batch_size, n))
        starts = [i * n_windows // n * seq_len for i in rows]
        yield _batch(dataset, split, starts, seq_len)
    if whole and n_rest:
        yield _batch(dataset, split, [n_windows * seq_len], n_rest)


def sliding_batches(
    dataset: Dataset,
    split: str,
    batch_size: int,
    seq_len: int,
    stride: int,
    n_batches: int | None = None,
) -> Iterator[Batch]:
    """Inputs and targets, int32 (B, T) each, of windows that begin `stride` tokens apart.

    Each token but the first of the split is a target once, of the first window that has it; others
    are -1. `n_batches` are the first ones, None = all. UsageError for a stride beyond the window,
    GptcError for a split of fewer than seq_len + 1 tokens.
    """
    if dataset.is_chats:
        raise UsageError("--stride is for texts, and the data are conversations: leave it out")
    if not 1 <= stride <= seq_len:
        raise UsageError(f"--stride is {stride}; it must be 1 to {seq_len}, the window")
    n_targets = dataset.n_tokens(split) - 1
    if n_targets < seq_len:
        raise dataset.too_small(split, seq_len + 1)
    starts = list(range(0, n_targets - seq_len, stride))
    starts.append(n_targets - seq_len)  # the last window ends with the split
    done = 0
    for first in range(0, len(starts), batch_size)[:n_batches]:
        x, y = _batch(dataset, split, starts[first : first + batch_size], seq_len)
        for row, start in enumerate(starts[first : first + batch_size]):
            y[row, : done - start] = -1
            done = start + seq_len
        yield x, y


def _batch(dataset: Dataset, split: str, starts: Sequence[int], seq_len: int) -> Batch:
    x = np.empty((len(starts), seq_len), dtype=np.int32)
    y = np.empty_like(x)
    row = np.empty(seq_len + 1, dtype=np.int32)
    for b, start in enumerate(starts):
        dataset.read(split, start, row)
        x[b] = row[:-1]
        y[b] = row[1:]
    return x, y


def rows_of(dataset: Dataset, split: str, start: int, seq_len: int) -> Batch:
    """The inputs and targets, int32 (T,) each, of the window that begins at a token."""
    row = np.empty(seq_len + 1, dtype=np.int32)
    dataset.read(split, start, row)
    return row[:-1], row[1:]


def mix(key: _U64, value: _U64 | int) -> _U64:
    """A hash of both: the finalizer of SplitMix64 (Steele et al. 2014)."""
    step = np.atleast_1d(value).astype(np.uint64) + np.uint64(1)  # an array, which may overflow
    z = key ^ step * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _U64 = z ^ (z >> np.uint64(31))
    return mixed


def permute(x: _U64, n: int, key: _U64) -> _U64:
    """The place of each x in a shuffle of [0, n) chosen by its key, without storing the shuffle.

    A Feistel network over pairs (left, right) of rows x columns numbers, a few more than n; what
    falls outside [0, n) goes through again (Black and Rogaway 2002).
    """
    n_rows = math.isqrt(n - 1) + 1
    rows, columns = np.uint64(n_rows), np.uint64(-(-n // n_rows))
    left, right = np.divmod(x, columns)
    for i in range(4):
        left = (left + mix(mix(key, 2 * i + 1), right) % rows) % rows
        right = (right + mix(mix(key, 2 * i + 2), left) % columns) % columns
    out: _U64 = left * columns + right
    outside = out >= np.uint64(n)
    if outside.any():
        out[outside] = permute(out[outside], n, key[outside])
    return out
