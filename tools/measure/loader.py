"""Measures how fast one thread draws batches from a prepared dataset.

    python tools/measure/loader.py data/books [batch_size seq_len ...]

Nothing else runs meanwhile: this is the speed of drawing alone.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing

from gptc.data.dataset import Dataset
from gptc.data.loader import Loader

SECONDS = 2.0


def main() -> None:
    dataset = Dataset.open(sys.argv[1])
    numbers = [int(number) for number in sys.argv[2:]] or [12, 64, 8, 1024, 512, 64]
    for batch_size, seq_len in zip(numbers[::2], numbers[1::2], strict=True):
        with closing(Loader(dataset, "train", batch_size, seq_len, seed=1)) as loader:
            loader.next()  # the first read of a shard also checks it
            n_batches, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < SECONDS:
                loader.next()
                n_batches += 1
            seconds = time.perf_counter() - begin
        rate = n_batches * batch_size * seq_len / seconds
        print(f"{batch_size:4} x {seq_len:<5} {rate / 1e6:7.1f}M tokens/s")


if __name__ == "__main__":
    main()
