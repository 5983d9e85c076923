"""Several datasets drawn from by weights, as one.

The sequence at a position of the stream is a function of the weights, the seed and the position.
Of each block of 1,024 positions, a dataset has its share, rounded down or up, in random order: a
part of a block has its share on average. The blocks in which it is rounded up are spread evenly (a
Kronecker sequence of the golden ratio), so that over many the shares are the weights. Letters: B is
batch_size, T is seq_len.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptc.data.dataset import Dataset
from gptc.data.description import SPLITS
from gptc.data.loader import Loader, Rows, mix, permute, rows_of
from gptc.data.weights import Weighted
from gptc.errors import UsageError
from gptc.files.words import quoted
from gptc.tokenizer.base import Tokenizer, Tokens

_BLOCK = 1024  # positions in which each dataset has its share
_UNIT = 1 << 32  # of weights: sums of whole numbers are exact
_GOLDEN = 2654435769  # _UNIT over the golden ratio: its multiples are spread evenly


class Part(NamedTuple):
    """A dataset of a mixture."""

    label: str  # in metrics: the last part of its path
    weight: float
    dataset: Dataset


class Mixture(Dataset):
    """Datasets of one tokenizer. Counts are sums over them; `read` reads the first."""

    def __init__(self, found: Sequence[Weighted], datasets: Sequence[Dataset]) -> None:
        """UsageError for conversations, or tokenizers that differ."""
        first = datasets[0]
        for one, dataset in zip(found, datasets, strict=True):
            if dataset.is_chats:
                raise not_mixed(one.name)
            if dataset.tokenizer.fingerprint() != first.tokenizer.fingerprint():
                raise UsageError(
                    f"--data {one.name} and {found[0].name} have different tokenizers: prepare "
                    f"one again: gptc prepare SOURCE --tokenizer {quoted(first.folder)} --out DIR"
                )
        meta = {
            **first.meta,
            "splits": {
                split: {
                    "shards": [
                        shard for d in datasets for shard in d.meta["splits"][split]["shards"]
                    ]
                }
                for split in SPLITS
            },
        }
        super().__init__(first.folder, meta, first.tokenizer)
        labels = [Path(one.name).name for one in found]
        self.parts = tuple(
            Part(label if labels.count(label) == 1 else f"{label}-{i + 1}", one.weight, dataset)
            for i, (label, one, dataset) in enumerate(zip(labels, found, datasets, strict=True))
        )

    def adopt(self, own: Tokenizer) -> None:
        for part in self.parts:
            part.dataset.adopt(own)

    def keep_apart(self) -> None:
        for part in self.parts:
            part.dataset.keep_apart()
        super().keep_apart()

    def n_bytes(self, split: str) -> int:
        return sum(part.dataset.n_bytes(split) for part in self.parts)

    def bytes_per_token(self, split: str) -> float:
        """Average number of text bytes in a token that the mixture draws."""
        return sum(part.weight * part.dataset.bytes_per_token(split) for part in self.parts)

    def read(self, split: str, begin: int, out: Tokens) -> None:
        self.parts[0].dataset.read(split, begin, out)


def not_mixed(name: str) -> UsageError:
    """The error for conversations in a mixture."""
    return UsageError(
        f"--data {name} has conversations, which are not mixed: train on it alone, or on one "
        f"dataset of several files: gptc prepare {quoted(name)} FILE --tokenizer MODEL --out DIR"
    )


class MixedLoader(Loader):
    """Draws sequences of the parts of a mixture by their weights."""

    def __init__(
        self,
        dataset: Mixture,
        split: str,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        n_ahead: int = 1,
    ) -> None:
        """GptcError when a part has fewer than seq_len + 1 tokens."""
        self._set(dataset, split, batch_size, seq_len, seed, "random", n_ahead)
        self._parts = [
            Loader(part.dataset, split, 1, seq_len, _seed(seed, i))
            for i, part in enumerate(dataset.parts)
        ]
        self._weights = _whole([part.weight for part in dataset.parts])
        self.n_windows = sum(part.n_windows for part in self._parts)
        self.epoch_tokens = dataset.n_tokens(split)
        self._block, self._places = -1, [(0, 0)]

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` blocks' sequences each part has.

        In block m the parts that end at x, in positions, end at floor(x + u), where u is the
        fractional part of m / golden ratio.
        """
        ends = _BLOCK * np.cumsum(self._weights, dtype=object)
        before = _floor_sum(n, _GOLDEN, 0)
        found = [_floor_sum(n, _GOLDEN, end) - before for end in ends]
        return [end - begin for begin, end in zip([0, *found], found, strict=False)]

    def _draw(self, position: int, n_rows: int) -> Rows:
        places = [self._place(position + b) for b in range(n_rows)]
        rows = [
            rows_of(self._parts[part].dataset, self.split, start, self.seq_len)
            for part, start in places
        ]
        inputs, targets = (np.stack(column) for column in zip(*rows, strict=True))
        return Rows(inputs, targets, self.dataset.positions(inputs))

    def _place(self, position: int) -> tuple[int, int]:
        """The part of the sequence at a position, and where in its split it begins."""
        block, i = divmod(position, _BLOCK)
        if block != self._block:
            self._places, self._block = self._block_places(block), block
        return self._places[i]

    def _block_places(self, block: int) -> list[tuple[int, int]]:
        before, after = self.counts(block), self.counts(block + 1)
        places: list[tuple[int, int]] = []
        for i, part in enumerate(self._parts):
            own = np.arange(before[i], after[i], dtype=np.uint64)
            places += [(i, start) for start in part.starts(own)]
        key = mix(np.full(_BLOCK, self.seed % 2**64, np.uint64), block)
        order = permute(np.arange(_BLOCK, dtype=np.uint64), _BLOCK, key)
        return [places[int(i)] for i in order]


def _seed(seed: int, part: int) -> int:
    return int(mix(np.full(1, seed % 2**64, np.uint64), 2**32 + part)[0])


def _whole(weights: Sequence[float]) -> list[int]:
    """The weights in _UNIT, whose sum is then 1; the largest has the rounding of all."""
    found = [round(weight * _UNIT) for weight in weights]
    found[found.index(max(found))] += _UNIT - sum(found)
    return found


def _floor_sum(n: int, a: int, b: int) -> int:
    """The sum of floor((a i + b) / _UNIT) over i < n, by the steps of Euclid's algorithm."""
    total, m = 0, _UNIT
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        n, b = divmod(a * n + b, m)
        a, m = m, a
    return total


def parts_of(dataset: Dataset) -> Iterator[Part]:
    """The parts of a mixture; of another dataset itself, with all the weight."""
    if isinstance(dataset, Mixture):
        yield from dataset.parts
    else:
        yield Part("", 1.0, dataset)
