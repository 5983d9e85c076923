"""N-gram models by counting: what a model has to beat.

Interpolated, modified Kneser-Ney smoothing (Chen and Goodman 1999, section 3). With h' the context
h without its oldest token,

    p(w | h) = max(c(h w) - D(c), 0) / c(h) + g(h) p(w | h')

The highest order has the counts of the text. A lower order counts how many different tokens come
before an n-gram. Each order has a discount D for counts of 1, of 2, and of 3 or more; g(h) is the
share that they leave. Below the unigrams, all tokens of the vocabulary are as likely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.data.dataset import Dataset
from gptc.data.kinds import REJECTED, is_target
from gptc.data.sequences import Sequences
from gptc.errors import GptcError
from gptc.eval.loss import Evaluation, bits_per_byte
from gptc.files.memory import available_bytes
from gptc.files.words import amount

Ids: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

Counts: TypeAlias = npt.NDArray[np.uint32]

MOST_ORDER = 1000
MOST_TOKENS = 10_000_000  # that are counted, or fewer of a large order: see `most_tokens`
_MOST_BYTES = 4 << 30
_NGRAM_BYTES = 16  # of an n-gram: its key and two counts
_TOKEN_BYTES = 150  # of a token, while an order is counted or smoothed


@dataclass(frozen=True)
class _Smoothed:
    """One order: of each of its n-grams, and of each context."""

    share: Floats  # (n-grams) max(c - D, 0) / c(h)
    left: Floats  # (contexts) g(h); 1 for a context that ends the text


@dataclass(frozen=True)
class Order:
    """The k-grams of a text: a k-gram is its context, a (k - 1)-gram, and a token."""

    keys: Ids  # (n-grams) context * vocab_size + token, ascending; a k-gram is its index here
    counts: Counts  # (n-grams) in the text
    before: Counts  # (n-grams) different tokens before it; 1 in the largest order


class NgramModel:
    """All orders from 1 to `order`."""

    def __init__(self, orders: list[Order], vocab_size: int) -> None:
        """Takes counts, as `count` makes them."""
        self.orders, self.vocab_size = orders, vocab_size
        self._smoothed: dict[tuple[int, bool], _Smoothed] = {}  # for `probabilities`

    @classmethod
    def count(cls, tokens: npt.ArrayLike, vocab_size: int, order: int) -> NgramModel:
        """Counts tokens (N,), each from 0 to vocab_size - 1. GptcError for a wrong order."""
        if not 1 <= order <= MOST_ORDER:
            raise GptcError(f"the order is {order}; it must be 1 to {MOST_ORDER}")
        text = np.asarray(tokens, np.int64)
        if len(text) < order:
            raise GptcError(f"the text has {len(text)} tokens, fewer than one {order}-gram")
        orders: list[Order] = []
        counted = _count(text, np.zeros(len(text), np.int64), vocab_size)
        for k in range(1, order + 1):
            keys, counts, ids = counted
            before = np.ones(len(keys), np.uint32)
            if k < order:
                # The contexts of the tokens from k on.
                counted = _count(text[k:], ids[:-1], vocab_size)
                suffix = np.zeros(len(counted[0]), np.int64)
                suffix[counted[2]] = ids[1:]
                before = np.maximum(np.bincount(suffix, minlength=len(keys)), 1).astype(np.uint32)
            orders.append(Order(keys, counts.astype(np.uint32), before))
        return cls(orders, vocab_size)

    @property
    def order(self) -> int:
        """The largest order."""
        return len(self.orders)

    def _smooth(self, k: int, is_top: bool) -> _Smoothed:
        """The k-grams with the counts of the text, or with those of a lower order."""
        order = self.orders[k - 1]
        n_contexts = 1 if k == 1 else len(self.orders[k - 2].keys)
        counts = order.counts if is_top else order.before
        return _smooth(order.keys // self.vocab_size, counts, n_contexts)

    def each_order(self, tokens: npt.ArrayLike) -> Iterator[Floats]:
        """Nats for each token of a text by each order, from uniform on: order + 1 times (N,).

        The first tokens of the text have shorter contexts.
        """
        text = np.asarray(tokens, np.int64)
        p = np.full(len(text), 1 / self.vocab_size)
        yield -np.log(p)
        context = np.zeros(len(text), np.int64)  # -1 = not in the counted text
        for k, order in enumerate(self.orders, 1):
            known = context >= 0
            of_known = context[known]
            keys = of_known * self.vocab_size + text[known]
            at = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            seen = order.keys[at] == keys
            for is_top in (True, False):
                kind, chance = self._smooth(k, is_top), p.copy()
                chance[known] *= kind.left[of_known]
                chance[known] += np.where(seen, kind.share[at], 0)
                del kind
                if is_top:
                    yield -np.log(chance)
            p = chance
            ngram = np.full(len(text), -1)
            ngram[known] = np.where(seen, at, -1)
            context = np.concatenate([[-1], ngram[:-1]])

    def losses(self, tokens: npt.ArrayLike) -> Floats:
        """Those of `each_order`: (order + 1, N)."""
        return np.stack(list(self.each_order(tokens)))

    def probabilities(self, history: npt.ArrayLike) -> Floats:
        """Of each token of the vocabulary after a text (N,): (vocab_size,).

        After a text that is shorter than the contexts of the largest order, the largest order
        with one counts as the largest.
        """
        text = [int(token) for token in np.asarray(history, np.int64)[-(self.order - 1) or None :]]
        if self.order == 1:
            text = []
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        largest = min(self.order, len(text) + 1)
        for k, order in enumerate(self.orders[:largest], 1):
            context = self._find(text[len(text) - (k - 1) :])
            if context < 0:
                break  # nor is a longer one in the counted text
            key = (k, k == largest)
            if key not in self._smoothed:
                self._smoothed[key] = self._smooth(*key)
            kind = self._smoothed[key]
            bounds = np.array([context, context + 1]) * self.vocab_size
            begin, end = np.searchsorted(order.keys, bounds)
            p *= kind.left[context]
            p[order.keys[begin:end] - bounds[0]] += kind.share[begin:end]
        return p

    def _find(self, ngram: list[int]) -> int:
        """The index of an n-gram among those of its order; -1 = not in the counted text."""
        found = 0
        for order, token in zip(self.orders, ngram, strict=False):
            key = found * self.vocab_size + token
            found = int(np.searchsorted(order.keys, key))
            if found == len(order.keys) or order.keys[found] != key:
                return -1
        return found


def _count(text: Ids, contexts: Ids, vocab_size: int) -> tuple[Ids, Ids, Ids]:
    """The n-grams of tokens (N,) after contexts (N,): keys, counts, and each token's index."""
    keys, ids, counts = np.unique(
        contexts * vocab_size + text, return_inverse=True, return_counts=True
    )
    return keys, counts, ids


def _smooth(contexts: Ids, counts: Counts, n_contexts: int) -> _Smoothed:
    """Discounts counts of n-grams with these contexts."""
    discounts = _discounts(counts)
    level = np.minimum(counts, 3)
    total = np.bincount(contexts, counts, n_contexts)
    left = np.bincount(contexts, discounts[level], n_contexts)
    ends = total == 0
    left[ends] = total[ends] = 1
    return _Smoothed((counts - discounts[level]) / total[contexts], left / total)


def _discounts(counts: Counts) -> Floats:
    """(0, D1, D2, D3+): Chen and Goodman 1999, equation 26."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    if n[1] == 0 or n[2] == 0:
        return np.array([0, 0.5, 0.5, 0.5])  # so few n-grams that there is nothing to estimate from
    y = n[1] / (n[1] + 2 * n[2])
    found = [k - (k + 1) * y * n[k + 1] / n[k] if n[k] else k - 0.5 for k in (1, 2, 3)]
    return np.array([0, *(min(max(d, 0.05), k - 0.05) for k, d in enumerate(found, 1))])


def most_tokens(order: int) -> int:
    """Tokens that are counted at most, so that n-grams of an order take 4 GB at most."""
    return min(MOST_TOKENS, _MOST_BYTES // (_NGRAM_BYTES * order + _TOKEN_BYTES))


def count_ngrams(dataset: Dataset, order: int, n_tokens: int | None = None) -> NgramModel:
    """The n-grams of the first `n_tokens` of the training split, of `most_tokens` at most.

    GptcError without free memory for them.
    """
    n = min(n_tokens or MOST_TOKENS, most_tokens(max(1, order)), dataset.n_tokens("train"))
    needed, free = n * (_NGRAM_BYTES * order + _TOKEN_BYTES), available_bytes()
    if free is not None and needed > free:
        raise GptcError(
            f"n-grams up to order {order} of {n:,} tokens may need {amount(needed)}, and "
            f"{amount(free)} are free: use a smaller order, or fewer tokens (gptc ngram --tokens "
            f"{n // 2:,})"
        )
    return NgramModel.count(_tokens(dataset, "train", n), dataset.vocab_size, order)


def evaluate_ngrams(
    dataset: Dataset,
    order: int,
    split: str = "val",
    model: NgramModel | None = None,
    most: int = MOST_TOKENS,
) -> list[Evaluation]:
    """The loss on a split of n-grams of the training split: uniform, then orders 1 to `order`.

    `model` are n-grams counted before. Of longer splits, the first `most` tokens are read. Of
    conversations all tokens are counted, and the loss is that of the targets, as a model's is.
    """
    held_out = _tokens(dataset, split, most)
    chosen: slice | npt.NDArray[np.bool_] = slice(None)
    if dataset.is_chats:
        chosen = _targets(dataset, split)[: len(held_out)]
    found = []
    for each in (model or count_ngrams(dataset, order)).each_order(held_out):
        losses = each[chosen]
        loss = float(losses.mean())
        found.append(Evaluation(loss, bits_per_byte(loss, dataset, split), len(losses)))
    return found


def write_text(model: NgramModel, dataset: Dataset, n_tokens: int, seed: int = 0) -> list[int]:
    """Tokens drawn from the largest order, after the first ones of the training split.

    The draw of a token is a function of the seed and its position.
    """
    history: list[int] = _tokens(dataset, "train", max(1, model.order - 1)).tolist()
    n_first = len(history)
    for position in range(n_tokens):
        sums = np.cumsum(model.probabilities(history))
        draw = np.random.Generator(np.random.Philox(key=seed, counter=position)).random()
        # Rounding may leave the last sum below the draw.
        token = int(np.searchsorted(sums, draw * sums[-1], "right"))
        history.append(min(token, model.vocab_size - 1))
    return history[n_first:]


def _targets(dataset: Dataset, split: str) -> npt.NDArray[np.bool_]:
    """Whether each token of conversations (N,) is a target; those of rejected ones are not."""
    sequences = Sequences(dataset, split)
    rejected = np.repeat(sequences.kinds[sequences.begins] & REJECTED, sequences.sizes) > 0
    return is_target(sequences.kinds, dataset.train_on) & ~rejected


def _tokens(dataset: Dataset, split: str, most: int) -> Ids:
    """The first tokens of a split (N,), `most` at most."""
    if not dataset.n_tokens(split):
        raise dataset.too_small(split, 1)
    out = np.empty(min(dataset.n_tokens(split), most), np.int32)
    dataset.read(split, 0, out)
    return out.astype(np.int64)
