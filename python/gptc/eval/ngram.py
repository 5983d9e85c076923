"""N-gram models by counting: what a model has to beat.

Interpolated, modified Kneser-Ney smoothing (Chen and Goodman 1999, section 3). With h' the context
h without its oldest token,

    p(w | h) = max(c(h w) - D(c), 0) / c(h) + g(h) p(w | h')

The highest order has the counts of the text. A lower order counts how many different tokens come
before an n-gram. Each order has a discount D for counts of 1, of 2, and of 3 or more; g(h) is the
share that they leave. Below the unigrams, all tokens of the vocabulary are as likely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gptc.data.dataset import Dataset
from gptc.data.kinds import REJECTED, is_target
from gptc.data.sequences import Sequences
from gptc.errors import GptcError
from gptc.eval.loss import Evaluation, bits_per_byte

Ids: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

MOST_ORDER = 10
MOST_TOKENS = 10_000_000  # that are counted: an order takes up to some 60 bytes for each


@dataclass(frozen=True)
class _Smoothed:
    """One order: of each of its n-grams, and of each context."""

    share: Floats  # (n-grams) max(c - D, 0) / c(h)
    left: Floats  # (contexts) g(h); 1 for a context that ends the text


@dataclass(frozen=True)
class _Order:
    """The k-grams of a text: a k-gram is its context, a (k - 1)-gram, and a token."""

    keys: Ids  # (n-grams) context * vocab_size + token, ascending; a k-gram is its index here
    top: _Smoothed  # with the counts of the text
    lower: _Smoothed  # with the numbers of different tokens before


class NgramModel:
    """All orders from 1 to `order`, counted in a text."""

    def __init__(self, tokens: npt.ArrayLike, vocab_size: int, order: int) -> None:
        """Counts tokens (N,), each from 0 to vocab_size - 1."""
        if not 1 <= order <= MOST_ORDER:
            raise GptcError(f"the order is {order}; it must be 1 to {MOST_ORDER}")
        text = np.asarray(tokens, np.int64)
        if len(text) < order:
            raise GptcError(f"the text has {len(text)} tokens, fewer than one {order}-gram")
        self.vocab_size = vocab_size
        self.order = order
        self._orders: list[_Order] = []
        contexts, n_contexts = np.zeros(len(text), np.int64), 1
        counted = _count(text, contexts, vocab_size)
        for k in range(1, order + 1):
            keys, counts, ids = counted
            top = _smooth(keys // vocab_size, counts, n_contexts)
            contexts, n_contexts = ids[:-1], len(keys)  # of the tokens from k on
            before = np.ones(len(keys), np.int64)
            if k < order:
                counted = _count(text[k:], contexts, vocab_size)
                longer, _, longer_ids = counted
                suffix = np.zeros(len(longer), np.int64)
                suffix[longer_ids] = ids[1:]
                before = np.maximum(np.bincount(suffix, minlength=len(keys)), 1)
            lower = _smooth(keys // vocab_size, before, self._n_contexts(k))
            self._orders.append(_Order(keys, top, lower))

    def _n_contexts(self, k: int) -> int:
        return 1 if k == 1 else len(self._orders[k - 2].keys)

    def losses(self, tokens: npt.ArrayLike) -> Floats:
        """Nats for each token of a text by each order, from uniform on: (order + 1, N).

        The first tokens of the text have shorter contexts.
        """
        text = np.asarray(tokens, np.int64)
        out = np.empty((self.order + 1, len(text)))
        p = np.full(len(text), 1 / self.vocab_size)
        out[0] = -np.log(p)
        context = np.zeros(len(text), np.int64)  # -1 = not in the counted text
        for k, order in enumerate(self._orders, 1):
            known = context >= 0
            keys = context[known] * self.vocab_size + text[known]
            at = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            seen = order.keys[at] == keys
            chances = [p.copy(), p.copy()]
            for chance, kind in zip(chances, (order.top, order.lower), strict=True):
                chance[known] *= kind.left[context[known]]
                chance[known] += np.where(seen, kind.share[at], 0)
            out[k], p = -np.log(chances[0]), chances[1]
            ngram = np.full(len(text), -1)
            ngram[known] = np.where(seen, at, -1)
            context = np.concatenate([[-1], ngram[:-1]])
        return out

    def probabilities(self, history: npt.ArrayLike) -> Floats:
        """Of each token of the vocabulary after a text (N,): (vocab_size,)."""
        text = [int(token) for token in np.asarray(history, np.int64)[-(self.order - 1) or None :]]
        if self.order == 1:
            text = []
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        for k in range(1, self.order + 1):
            if k - 1 > len(text):
                break
            context = self._find(text[len(text) - (k - 1) :])
            if context < 0:
                break  # nor is a longer one in the counted text
            order = self._orders[k - 1]
            kind = order.top if k == self.order else order.lower
            bounds = np.array([context, context + 1]) * self.vocab_size
            begin, end = np.searchsorted(order.keys, bounds)
            p *= kind.left[context]
            p[order.keys[begin:end] - bounds[0]] += kind.share[begin:end]
        return p

    def _find(self, ngram: list[int]) -> int:
        """The index of an n-gram among those of its order; -1 = not in the counted text."""
        found = 0
        for order, token in zip(self._orders, ngram, strict=False):
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


def _smooth(contexts: Ids, counts: Ids, n_contexts: int) -> _Smoothed:
    """Discounts counts of n-grams with these contexts."""
    discounts = _discounts(counts)
    level = np.minimum(counts, 3)
    total = np.bincount(contexts, counts, n_contexts)
    left = np.bincount(contexts, discounts[level], n_contexts)
    ends = total == 0
    left[ends] = total[ends] = 1
    return _Smoothed((counts - discounts[level]) / total[contexts], left / total)


def _discounts(counts: Ids) -> Floats:
    """(0, D1, D2, D3+): Chen and Goodman 1999, equation 26."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    if n[1] == 0 or n[2] == 0:
        return np.array([0, 0.5, 0.5, 0.5])  # so few n-grams that there is nothing to estimate from
    y = n[1] / (n[1] + 2 * n[2])
    found = [k - (k + 1) * y * n[k + 1] / n[k] if n[k] else k - 0.5 for k in (1, 2, 3)]
    return np.array([0, *(min(max(d, 0.05), k - 0.05) for k, d in enumerate(found, 1))])


def count_ngrams(dataset: Dataset, order: int) -> NgramModel:
    """The n-grams of the first MOST_TOKENS of the training split."""
    return NgramModel(_tokens(dataset, "train"), dataset.vocab_size, order)


def evaluate_ngrams(
    dataset: Dataset, order: int, split: str = "val", model: NgramModel | None = None
) -> list[Evaluation]:
    """The loss on a split of n-grams of the training split: uniform, then orders 1 to `order`.

    `model` are n-grams counted before. Of longer splits, the first MOST_TOKENS are read. Of
    conversations all tokens are counted, and the loss is that of the targets, as a model's is.
    """
    held_out = _tokens(dataset, split)
    losses = (model or count_ngrams(dataset, order)).losses(held_out)
    if dataset.is_chats:
        losses = losses[:, _targets(dataset, split)[: len(held_out)]]
    return [
        Evaluation(loss, bits_per_byte(loss, dataset, split), losses.shape[1])
        for loss in losses.mean(axis=1).tolist()
    ]


def write_text(model: NgramModel, dataset: Dataset, n_tokens: int, seed: int = 0) -> list[int]:
    """Tokens drawn from the largest order, after the first ones of the training split.

    The draw of a token is a function of the seed and its position.
    """
    history: list[int] = _tokens(dataset, "train")[: max(1, model.order - 1)].tolist()
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


def _tokens(dataset: Dataset, split: str) -> Ids:
    if not dataset.n_tokens(split):
        raise dataset.too_small(split, 1)
    out = np.empty(min(dataset.n_tokens(split), MOST_TOKENS), np.int32)
    dataset.read(split, 0, out)
    return out.astype(np.int64)
