"""Several datasets drawn from by weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.data.dataset import Dataset
from gptc.data.mixture import _BLOCK, _UNIT, MixedLoader, Mixture, _floor_sum
from gptc.data.preparation import prepare
from gptc.data.weights import Weighted, check_alone, weighted
from gptc.errors import UsageError

_WEIGHTS = (0.701, 0.2, 0.099)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three datasets, each of one letter, so that a row tells its dataset."""
    made = []
    for letter, size in zip("abc", (9000, 4000, 700), strict=True):
        folder = tmp_path_factory.mktemp("parts")
        (folder / "text.txt").write_text(letter * size)
        prepare([str(folder / "text.txt")], folder / letter, tokenizer="bytes")
        made.append(folder / letter)
    return made


@pytest.fixture
def mixture(folders: list[Path]) -> Mixture:
    found = [Weighted(str(f), w) for f, w in zip(folders, _WEIGHTS, strict=True)]
    return Mixture(found, [Dataset.open(folder) for folder in folders])


def _drawn(loader: MixedLoader, n: int) -> list[int]:
    """The dataset of each of the next rows."""
    rows = [loader.next_rows() for _ in range(n // loader.batch_size)]
    return [int(row[0]) - ord("a") for batch in rows for row in batch.inputs]


def test_each_has_its_share_of_every_block(mixture: Mixture) -> None:
    loader = MixedLoader(mixture, "train", 16, 8, seed=3)
    drawn = np.array(_drawn(loader, 4 * _BLOCK)).reshape(4, _BLOCK)
    for n in range(1, 5):
        counts = np.bincount(drawn[:n].ravel(), minlength=3)
        assert counts.tolist() == loader.counts(n)
        own = np.bincount(drawn[n - 1], minlength=3)
        assert (abs(own - _BLOCK * np.array(_WEIGHTS)) < 1).all()
    assert (drawn[0] != drawn[1]).any()  # the order is another one in each block
    assert len(set(drawn[0][:64].tolist())) == 3
    loader.close()


def test_an_order_of_the_position_alone(mixture: Mixture) -> None:
    one, two = (MixedLoader(mixture, "train", b, 8, seed=3) for b in (4, 8))
    rows = np.concatenate([one.next_rows().inputs for _ in range(600)])
    two.position = 1000  # in the middle of a block, and on into the next
    np.testing.assert_array_equal(two.next_rows().inputs, rows[1000:1008])
    two.position = 1020
    np.testing.assert_array_equal(two.next_rows().inputs, rows[1020:1028])
    other = MixedLoader(mixture, "train", 8, 8, seed=4)
    other.position = 1000
    assert (other.next_rows().inputs != rows[1000:1008]).any()
    for loader in (one, two, other):
        loader.close()


@pytest.mark.parametrize(
    "weights",
    [
        [1 / 31 - 2**-40] * 30 + [1 / 31 + 30 * 2**-40],
        [1 / 32 + 1 / 2500] * 31 + [1 / 32 - 31 / 2500],  # each is rounded up, but the last
        [0.5 - 1e-4, 0.25, 0.25, 1e-4],
        [0.7000004, 0.3000004],  # a sum that is 1 after rounding
    ],
)
def test_each_block_has_every_share_within_one(folders: list[Path], weights: list[float]) -> None:
    dataset, n = Dataset.open(folders[0]), 2000
    found = [Weighted(str(i), w) for i, w in enumerate(weights)]
    loader = MixedLoader(Mixture(found, [dataset] * len(weights)), "train", 1, 8)
    counts = np.array([loader.counts(i) for i in range(n + 1)])
    shares = _BLOCK * np.array(weights) / sum(weights)
    assert (counts.sum(axis=1) == _BLOCK * np.arange(n + 1)).all()
    assert (abs(np.diff(counts, axis=0) - shares) < 1).all()
    assert (abs(counts - np.arange(n + 1)[:, None] * shares) < 4).all()


def test_a_sum_of_floors() -> None:
    for n, a, b in ((0, 3, 5), (900, 2654435769, 3 << 40), (77, 0, _UNIT), (50, _UNIT - 1, 1)):
        assert _floor_sum(n, a, b) == sum((a * i + b) // _UNIT for i in range(n))


def test_counts_are_sums_and_bytes_are_weighted(mixture: Mixture) -> None:
    parts = [part.dataset for part in mixture.parts]
    assert mixture.n_tokens("train") == sum(d.n_tokens("train") for d in parts)
    assert mixture.n_bytes("val") == sum(d.n_bytes("val") for d in parts)
    expected = sum(w * d.bytes_per_token("val") for w, d in zip(_WEIGHTS, parts, strict=True))
    assert mixture.bytes_per_token("val") == pytest.approx(expected)
    assert [part.label for part in mixture.parts] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("A:0.7", "B:0.2"), r"sum to 0.9; they must sum to 1: 0.778, 0.222"),
        (("A:0.7", "B"), r"--data B has no weight: of several datasets, write each as B:0.5"),
        (("A:0.7", "B:1.3"), r"--data B:1.3 has no weight"),
        (("A:0.7", "B:0"), r"--data B:0 has no weight"),
        (("A:nan", "B:1"), r"--data A:nan has no weight"),
        (("A:0.5", "A:0.5"), r"names A twice: give it one weight"),
        (("A:0.5", "x:0.5"), r"--data .*x:0.5 is a path that ends like a weight: .*x:0.5:0.5"),
        (tuple(f"d{i}:0.025" for i in range(40)), r"names 40 datasets; at most 32"),
    ],
)
def test_weights_that_contradict(
    data: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x:0.5").mkdir()
    with pytest.raises(UsageError, match=message):
        weighted(data)


def test_a_path_with_a_colon(tmp_path: Path) -> None:
    path = str(tmp_path / "x:0.5")
    Path(path).mkdir()
    assert weighted([f"{path}:0.25", "stories:0.75"])[0] == Weighted(path, 0.25)
    check_alone(path)
    with pytest.raises(
        UsageError, match=r"has a weight, but is the only dataset: leave out :0.5, or add"
    ):
        check_alone(f"{tmp_path}:0.5")


def test_tokenizers_that_differ(
    folders: list[Path], tmp_path: Path, gptc: Callable[..., Any]
) -> None:
    prepare([str(folders[0].parent / "text.txt")], tmp_path / "d", tokenizer="char")
    given = ["--data", f"{folders[0]}:0.5", "--data", f"{tmp_path / 'd'}:0.5"]
    ran = gptc("train", *given, "--out", tmp_path / "run")
    assert ran.code == 2
    advice = "prepare one again: gptc prepare SOURCE --tokenizer"
    assert f"have different tokenizers: {advice}" in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
