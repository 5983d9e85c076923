"""A model's loss on a dataset: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from gptc.data.chat_loader import all_batches
from gptc.data.dataset import Dataset
from gptc.data.loader import sliding_batches
from gptc.engine.arrays import TokenArray, count_targets
from gptc.engine.model import Model
from gptc.engine.world import World
from gptc.errors import GptcError, UsageError
from gptc.eval.cached import cached_loss
from gptc.files.words import plural


@dataclass(frozen=True)
class Evaluation:
    """The mean loss over `tokens` predicted tokens of one split."""

    loss: float  # nats per token
    bpb: float  # bits per byte of the split's text
    tokens: int

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)


def evaluate(
    model: Model,
    dataset: Dataset,
    split: str = "val",
    *,
    batch_size: int = 8,
    seq_len: int | None = None,
    n_batches: int | None = None,
    kv_dtype: str | None = None,
    stride: int | None = None,
    world: World | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """The loss over a split, in windows of `seq_len` tokens that do not overlap.

    `n_batches` None = the whole split, in which each token but the first is predicted once; else
    that many batches, spread evenly. `seq_len` None = the model's block size, or less for a shorter
    split. With a `kv_dtype`, windows go through a session with such a cache. With a `stride`,
    windows begin so many tokens apart, and each predicts its last ones alone, so that they have at
    least seq_len - stride tokens before them. Contexts stay within documents if the dataset keeps
    these apart, which excludes a `kv_dtype`. Calls progress(tokens done, tokens in all). The ranks
    of a `world` share the batches; the result is that of one process.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    n_targets = dataset.n_tokens(split) - 1
    if seq_len is None:
        seq_len = max(1, min(model.config.block_size, n_targets))
    total = min(n_targets, (n_batches or n_targets) * batch_size * (stride or seq_len))
    losses, n = array("d"), 0
    with ExitStack() as stack:
        measure: Callable[[TokenArray, TokenArray], float] = lambda x, y: model.loss(  # noqa: E731
            x, y, dataset.positions(x)
        )
        if kv_dtype is not None:
            check_cache(dataset, kv_dtype)
            session = stack.enter_context(model.session(1, seq_len, kv_dtype))
            measure = partial(cached_loss, session)
        batches = all_batches(dataset, split, batch_size, seq_len, n_batches)
        if stride is not None:
            batches = sliding_batches(dataset, split, batch_size, seq_len, stride, n_batches)
        for i, (x, y) in enumerate(batches):
            n_some = count_targets(y)
            losses.append(measure(x, y) * n_some if i % size == rank else 0.0)
            n += n_some
            progress(n, max(n, total))
    progress(n, n)
    every = [array("d", part) for part in world.gather(losses.tobytes())] if world else [losses]
    loss = 0.0
    for i in range(len(losses)):  # in the order of batches
        loss += every[i % size][i]
    return Evaluation(loss / n, bits_per_byte(loss / n, dataset, split), n)


def check_cache(dataset: Dataset, kv_dtype: str) -> None:
    """UsageError for a KV cache and a dataset that keeps documents apart."""
    if dataset.document_end is not None:
        raise UsageError(
            f"--kv-dtype {kv_dtype} decodes a window as one text: use --packing stream"
        )


def check_windows(dataset: Dataset, split: str, seq_len: int, name: str) -> None:
    """GptcError for a split of fewer than two windows, whose loss says little about a model.

    `name` is that of the data in the error.
    """
    n_tokens = dataset.n_tokens(split)
    if n_tokens > 2 * seq_len or dataset.is_chats:
        return
    fixes = [f"--seq-len {(n_tokens - 1) // 2} or less"] if n_tokens > 2 else []
    if split != "all" and dataset.n_tokens("all") > 2 * seq_len:
        fixes.append("--split all")
    raise GptcError(
        f"{name} ({split}) has {plural(n_tokens, 'token')}, fewer than two windows of "
        f"{seq_len} and one token more: use {' or '.join([*fixes, 'more text'])}"
    )


def bits_per_byte(loss: float, dataset: Dataset, split: str) -> float:
    """Converts a loss in nats per token to bits per byte of the split's text."""
    return loss / math.log(2) / dataset.bytes_per_token(split)
