"""N-gram models: a wrong yardstick makes every model look good, or none."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.data.dataset import Dataset
from gptc.errors import GptcError
from gptc.eval.ngram import NgramModel, count_ngrams, evaluate_ngrams, most_tokens, write_text

Text = list[int]


def _discounts(counts: list[int]) -> tuple[float, float, float]:
    n = Counter(counts)
    y = n[1] / (n[1] + 2 * n[2])
    return 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]


def _by_hand(text: Text, history: Text, token: int, vocab_size: int, order: int) -> float:
    """Modified Kneser-Ney by its definition, with dictionaries."""

    def chance(history: Text, is_top: bool) -> float:
        k = len(history) + 1
        grams = [tuple(text[i : i + k]) for i in range(len(text) - k + 1)]
        counts = Counter(grams)
        if not is_top:
            before = defaultdict(set)
            for i in range(1, len(text) - k + 1):
                before[tuple(text[i : i + k])].add(text[i - 1])
            counts = Counter({gram: max(1, len(before[gram])) for gram in counts})
        d = (0.0, *_discounts(list(counts.values())))
        after = {gram[-1]: n for gram, n in counts.items() if list(gram[:-1]) == history}
        below = chance(history[1:], False) if history else 1 / vocab_size
        if not after:
            return below
        left = sum(d[min(n, 3)] for n in after.values()) / sum(after.values())
        n = after.get(token, 0)
        return (n - d[min(n, 3)]) / sum(after.values()) + left * below

    return chance(history[len(history) - (order - 1) :] if order > 1 else [], True)


@pytest.fixture(scope="module")
def text() -> Text:
    """Half of it follows from the two tokens before; rare tokens occur once, twice, three times."""
    rng = np.random.default_rng(7)
    out = [0, 1]
    for draw in rng.zipf(1.5, 3000):
        follows = (out[-1] * 3 + out[-2]) % 7
        out.append(int(follows if rng.random() < 0.5 else min(draw, 69)))
    return out


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_losses_are_those_of_the_definition(text: Text, order: int) -> None:
    model = NgramModel.count(text, 71, order)
    held_out = [*text[100:130], 70, 5, 70, 3, 4, 5, 70]  # 70 never occurs in the text
    losses = model.losses(held_out)
    assert losses.shape == (order + 1, len(held_out))
    assert np.allclose(losses[0], math.log(71))
    for k in range(1, order + 1):
        for i in range(k - 1, len(held_out)):
            want = _by_hand(text, held_out[:i], held_out[i], 71, k)
            assert losses[k, i] == pytest.approx(-math.log(want), rel=1e-9), (k, i)


def test_probabilities_add_up_to_one_and_agree_with_losses(text: Text) -> None:
    model = NgramModel.count(text, 71, 3)
    for history in ([], [4], text[:2], text[50:60], [70, 70], [3, 70]):
        p = model.probabilities(history)
        assert p.shape == (71,)
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)
        if len(history) < 2:
            continue
        losses = [model.losses([*history, token])[-1, -1] for token in range(71)]
        assert np.allclose(-np.log(p), losses)


def test_a_short_history_has_the_counts_of_the_text(text: Text) -> None:
    model = NgramModel.count(text, 71, 4)
    for history in ([], [4], [4, 5]):
        want = [_by_hand(text, history, token, 71, len(history) + 1) for token in range(71)]
        assert np.allclose(model.probabilities(history), want)


def test_memory_bounds_the_tokens_that_are_counted(
    dataset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert most_tokens(5) == most_tokens(10) == 10_000_000
    assert 1_000_000 < most_tokens(200) < 2_000_000
    dataset = Dataset.open(dataset_folder)
    assert count_ngrams(dataset, 2, 500).orders[0].counts.sum() == 500
    monkeypatch.setattr("gptc.eval.ngram.available_bytes", lambda: 100_000)
    with pytest.raises(GptcError, match=r"may need 3.3 MB, and 100 kB are free: use a smaller"):
        count_ngrams(dataset, 2)


def test_higher_orders_are_better_on_a_text_that_has_them(text: Text) -> None:
    losses = NgramModel.count(text[:2500], 71, 3).losses(text[2500:]).mean(axis=1)
    assert losses[0] > losses[1] > losses[3] + 0.3
    assert losses[2] > losses[3] + 0.3  # what follows depends on two tokens


def test_short_texts_and_wrong_orders() -> None:
    assert NgramModel.count([3], 5, 1).losses([3, 1]).shape == (2, 2)
    assert NgramModel.count([1, 1, 1, 1], 5, 3).probabilities([1, 1]).sum() == pytest.approx(1)
    with pytest.raises(GptcError, match="the text has 2 tokens, fewer than one 3-gram"):
        NgramModel.count([1, 2], 5, 3)
    for order in (0, 1001):
        with pytest.raises(GptcError, match=f"the order is {order}; it must be 1 to 1000"):
            NgramModel.count([1, 2], 5, order)


def test_text_has_the_probabilities_of_the_model(dataset_folder: Path) -> None:
    dataset = Dataset.open(dataset_folder)
    model = count_ngrams(dataset, 1)
    written = write_text(model, dataset, 4000, seed=2)
    shares = np.bincount(written, minlength=256) / len(written)
    np.testing.assert_allclose(shares, model.probabilities([]), atol=0.03)
    longer = count_ngrams(dataset, 4)
    text = write_text(longer, dataset, 60, seed=2)
    assert text[:30] == write_text(longer, dataset, 30, seed=2)  # of the seed and the position
    assert text != write_text(longer, dataset, 60, seed=3)
    first = np.empty(3, np.int32)
    dataset.read("train", 0, first)
    history = [*first.tolist(), *text]
    chances = [longer.probabilities(history[:i])[history[i]] for i in range(3, len(history))]
    assert np.mean(np.log(chances)) > np.log(0.1)  # the order's, and not the unigrams'


def test_the_command(gptc: Callable[..., Any], dataset_folder: Path) -> None:
    ran = gptc("ngram", "--data", dataset_folder, "--order", 3, "--sample", 20, "--json")
    answer = json.loads(ran.out)
    want = evaluate_ngrams(Dataset.open(dataset_folder), 3)
    assert [row["loss"] for row in answer["results"]] == [r.loss for r in want]
    assert [row["order"] for row in answer["results"]] == [0, 1, 2, 3]
    assert len(answer["sample"]) == 20
    shown = gptc("ngram", "--data", dataset_folder, "--order", 3, "--sample", 20).out
    assert f"3-gram  loss {want[3].loss:.4f}" in shown
    assert shown.endswith(f"\n\n{answer['sample']}\n")
    assert gptc("ngram", "--data", dataset_folder, "--order", 1001).code == 2
