"""Text to a dataset of token shards, and batches from it for training.

    dataset = prepare(["book.txt"], Path("data/book"), tokenizer="gpt2")
    loader = Loader(dataset, "train", batch_size=12, seq_len=64, seed=1)
    inputs, targets = loader.next()  # int32 (B, T) each

The parts: `sources` (files to one text), `preparation` and `job` (text to shards; it is read twice,
with `scan` and `encode`), `shards` (the files), `dataset` (a folder of them), `loader` (batches).
This module gathers their public names.
"""

from gptc.data.dataset import DATASET_FILE, SPLITS, Dataset
from gptc.data.known import KNOWN_DATASETS
from gptc.data.loader import Batch, Loader, Order, eval_batches
from gptc.data.preparation import SHARD_TOKENS, STORIES_BYTES, prepare, resolve_dataset
from gptc.data.shards import Shard, is_shard, read_shard, write_shard

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
    "Shard",
    "eval_batches",
    "is_shard",
    "prepare",
    "read_shard",
    "resolve_dataset",
    "write_shard",
]
