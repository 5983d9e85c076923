"""Text to a dataset of token shards, and batches from it for training.

    dataset = prepare(["book.txt"], Path("data/book"), tokenizer="gpt2")
    loader = Loader(dataset, "train", batch_size=12, seq_len=64, seed=1)
    inputs, targets = loader.next()  # int32 (B, T) each

The parts: `sources` (files to one text), `preparation` and `job` (text to shards; it is read twice,
with `scan` and `encode`), `shards` (the files), `dataset` (a folder of them), `loader` (batches).
This module gathers their public names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptc.data.dataset import Dataset
    from gptc.data.description import DATASET_FILE, SPLITS
    from gptc.data.known import KNOWN_DATASETS
    from gptc.data.loader import Batch, Loader, Order, eval_batches
    from gptc.data.options import SHARD_TOKENS, STORIES_BYTES, PrepareOptions
    from gptc.data.preparation import prepare, resolve_dataset
    from gptc.data.shards import Shard, is_shard, read_shard, write_shard

# Imported when first used, so that `gptc prepare --help` does not wait for NumPy.
_LAZY = {
    "DATASET_FILE": "description",
    "KNOWN_DATASETS": "known",
    "SHARD_TOKENS": "options",
    "SPLITS": "description",
    "STORIES_BYTES": "options",
    "Batch": "loader",
    "Dataset": "dataset",
    "Loader": "loader",
    "Order": "loader",
    "PrepareOptions": "options",
    "Shard": "shards",
    "eval_batches": "loader",
    "is_shard": "shards",
    "prepare": "preparation",
    "read_shard": "shards",
    "resolve_dataset": "preparation",
    "write_shard": "shards",
}

__all__ = [
    "DATASET_FILE",
    "KNOWN_DATASETS",
    "SHARD_TOKENS",
    "SPLITS",
    "STORIES_BYTES",
    "Batch",
    "Dataset",
    "Loader",
    "Order",
    "PrepareOptions",
    "Shard",
    "eval_batches",
    "is_shard",
    "prepare",
    "read_shard",
    "resolve_dataset",
    "write_shard",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gptc.data' has no attribute {name!r}")
    value = getattr(import_module(f"gptc.data.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
