"""Batches depend on seed and position only, and visit every window of a split."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus import counting
from gptc.data import loader
from gptc.data.loader import Loader, eval_batches
from gptc.errors import GptcError, UsageError


def positions(x: np.ndarray[Any, Any]) -> list[int]:
    """First positions of sequences of a `counting` dataset of at most 251 tokens."""
    return [int(row[0]) for row in x]


def test_targets_are_one_token_further_on(tmp_path: Path) -> None:
    loader = Loader(counting(tmp_path, 1000, shard_tokens=70), "train", 5, 64, seed=3)
    for _ in range(50):
        x, y = loader.next()
        assert x.shape == y.shape == (5, 64)
        assert x.dtype == y.dtype == np.int32
        assert x.flags.c_contiguous
        assert y.flags.c_contiguous
        steps = np.diff(np.concatenate([x, y[:, -1:]], axis=1), axis=1) % 251
        assert (steps == 1).all()  # whole windows, across shards too
        assert (x[:, 1:] == y[:, :-1]).all()


def test_an_epoch_visits_every_window_once(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 251)
    loader = Loader(dataset, "train", 1, 10, seed=1)
    assert loader.n_windows == 24
    offsets, orders = set(), set()
    for _ in range(100):
        starts = [positions(loader.next()[0])[0] for _ in range(loader.n_windows)]
        offset = min(starts)
        assert sorted(starts) == [offset + 10 * i for i in range(24)]
        offsets.add(offset)
        orders.add(tuple(start - offset for start in starts))
    assert offsets == set(range(251 - 240))
    assert len(orders) == 100


def test_a_batch_depends_on_seed_and_position_only(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 5000, shard_tokens=1234)

    def loader(seed: int) -> Loader:
        return Loader(dataset, "train", 7, 3, seed=seed)

    one = loader(5)
    batches = [one.next() for _ in range(400)]  # several epochs
    assert one.position == 2800
    for k in (0, 1, 145, 146, 147, 399):  # 1,024 sequences are computed at once
        other = loader(5)
        other.position = 7 * k
        np.testing.assert_array_equal(other.next(), batches[k])
    assert not np.array_equal(loader(6).next(), batches[0])
    assert not np.array_equal(loader(-6).next(), batches[0])
    wide = Loader(dataset, "train", 14, 3, seed=5).next()[0]
    np.testing.assert_array_equal(wide, np.concatenate([batches[0][0], batches[1][0]]))


def test_the_next_batches_are_drawn_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = counting(tmp_path, 1000)
    really, drawn = dataset.read, threading.Semaphore(0)

    def read(*arguments: Any) -> None:
        really(*arguments)
        drawn.release()

    monkeypatch.setattr(dataset, "read", read)
    with closing(Loader(dataset, "train", 1, 10, n_ahead=3)) as loader:
        loader.next()
        for _ in range(3 + 8):  # eight at once, and nobody asks for the three that follow
            assert drawn.acquire(timeout=60)
        assert loader.position == 1
        for _ in range(7):
            loader.next()
        assert not drawn.acquire(timeout=0.05)
        loader.next()  # before it, three are left
        for _ in range(8):
            assert drawn.acquire(timeout=60)
        assert not drawn.acquire(timeout=0.05)


def test_batches_drawn_ahead_are_forgotten_when_the_position_is_set(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 5000)
    with closing(Loader(dataset, "train", 2, 3, seed=5, n_ahead=0)) as plain:
        batches = [plain.next() for _ in range(600)]
    with closing(Loader(dataset, "train", 2, 3, seed=5, n_ahead=4)) as loader:
        for k in (0, 1, 2, 599, 3, 4, 0, 511, 512, 513):  # 1,024 sequences are computed at once
            loader.position = 2 * k
            np.testing.assert_array_equal(loader.next(), batches[k])
            assert loader.position == 2 * k + 2


def test_an_error_comes_with_the_batch_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = counting(tmp_path, 1000)
    with closing(Loader(dataset, "train", 1, 10, order="sequential", n_ahead=2)) as loader:
        with monkeypatch.context() as context:
            really = dataset.read

            def read(split: str, begin: int, out: Any) -> None:
                if begin == 20:
                    raise GptcError("torn")
                really(split, begin, out)

            context.setattr(dataset, "read", read)
            assert [positions(loader.next()[0]) for _ in range(2)] == [[0], [10]]
            for _ in range(2):
                with pytest.raises(GptcError, match="torn"):
                    loader.next()
        assert loader.position == 2
        assert [positions(loader.next()[0]) for _ in range(2)] == [[20], [30]]


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 1000)
    before = set(threading.enumerate())

    def begun() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in before]

    loader = Loader(dataset, "train", 2, 10)
    assert not begun()
    first = loader.next()
    assert len(begun()) == 1
    loader.close()
    loader.close()
    assert not begun()
    loader.position = 0
    np.testing.assert_array_equal(loader.next(), first)  # a closed loader can be used again
    (thread,) = begun()
    del loader
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_fork_draws_for_itself(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 1000)
    with closing(Loader(dataset, "train", 2, 10)) as loader:
        loader.next()
        after = loader.next()
        loader.position = 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python, about the thread
            child = os.fork()
        if child == 0:
            same = False
            try:
                signal.alarm(60)
                same = bool(np.array_equal(loader.next(), after))
            finally:
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        np.testing.assert_array_equal(loader.next(), after)


def test_shards_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = Loader(counting(tmp_path / "a", 1000), "train", 8, 33, seed=2)
    many = Loader(counting(tmp_path / "b", 1000, shard_tokens=7), "train", 8, 33, seed=2)
    for _ in range(20):
        np.testing.assert_array_equal(one.next(), many.next())


@pytest.mark.parametrize("n_tokens", [11, 12, 19, 20, 21, 30, 31])
def test_short_splits_are_used_up(tmp_path: Path, n_tokens: int) -> None:
    loader = Loader(counting(tmp_path, n_tokens), "train", 1, 10)
    seen: set[int] = set()
    for _ in range(300):
        x, y = loader.next()
        seen |= {*x[0].tolist(), *y[0].tolist()}
    assert seen == set(range(n_tokens))


@pytest.mark.parametrize("n_tokens", [1, 2, 10])
def test_too_few_tokens_say_what_to_type(tmp_path: Path, n_tokens: int) -> None:
    dataset = counting(tmp_path, n_tokens)
    fix = f"--seq-len {n_tokens - 1}" if n_tokens > 1 else "prepare more text"
    for split, why in (
        ("train", f"has {n_tokens} token{'' if n_tokens == 1 else 's'} of 11 .*{fix}"),
        ("val", "has 0.*--val-fraction"),
    ):
        with pytest.raises(GptcError, match=why):
            Loader(dataset, split, 1, 10)
        with pytest.raises(GptcError, match=why):
            next(eval_batches(dataset, split, 1, 10))
    with pytest.raises(GptcError, match="has 0"):
        dataset.bytes_per_token("val")


def test_sequential_order_goes_round(tmp_path: Path) -> None:
    loader = Loader(counting(tmp_path, 41), "train", 3, 10, order="sequential")
    assert [positions(loader.next()[0]) for _ in range(3)] == [
        *([0, 10, 20], [30, 0, 10], [20, 30, 0])
    ]


@pytest.mark.parametrize("n", [*range(1, 60), 1023, 4097])
def test_the_shuffle_is_a_permutation(n: int) -> None:
    x = np.arange(n, dtype=np.uint64)
    for key in range(5):
        out = loader.permute(x, n, np.full(n, key, dtype=np.uint64))
        assert sorted(out.tolist()) == list(range(n))


def test_the_shuffle_is_even() -> None:
    n, n_keys = 20, 20_000
    keys = loader.mix(np.arange(n_keys, dtype=np.uint64), 1)
    places = np.stack([loader.permute(np.full(n_keys, i, np.uint64), n, keys) for i in range(n)])
    counts = np.array([np.bincount(row.astype(int), minlength=n) for row in places])
    expected = n_keys / n
    # Chi-square with (n - 1)^2 degrees of freedom: mean 361, deviation 27.
    assert ((counts - expected) ** 2 / expected).sum() < 361 + 6 * 27
    followed = np.count_nonzero(places[1] == places[0] + 1) / n_keys
    assert followed == pytest.approx(1 / n, abs=0.01)


def test_a_huge_corpus_needs_no_table() -> None:
    n = 10**12
    out = loader.permute(np.arange(1000, dtype=np.uint64), n, np.full(1000, 9, np.uint64))
    assert len(set(out.tolist())) == 1000
    assert out.max() < n
    assert out.std() == pytest.approx(n / 12**0.5, rel=0.1)


def test_evaluation_is_spread_evenly(tmp_path: Path) -> None:
    dataset = counting(tmp_path, 251, shard_tokens=60)

    def starts(n_batches: int | None, batch_size: int) -> list[list[int]]:
        batches = list(eval_batches(dataset, "train", batch_size, 10, n_batches))
        assert all((y == (x + 1) % 251).all() for x, y in batches)
        return [positions(x) for x, _ in batches]

    assert starts(None, 10) == [
        list(range(0, 100, 10)),
        list(range(100, 200, 10)),
        list(range(200, 250, 10)),
    ]
    assert starts(3, 10) == starts(None, 10)
    assert starts(99, 10) == starts(None, 10)
    assert starts(2, 2) == [[0, 60], [120, 180]]
    assert starts(1, 3) == [[0, 80, 160]]
    assert starts(1, 3) == starts(1, 3)


@pytest.mark.parametrize("n_tokens", [11, 12, 20, 21, 22, 37, 250, 251])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_of_the_whole_split_predicts_each_token_once(
    tmp_path: Path, n_tokens: int, batch_size: int
) -> None:
    dataset = counting(tmp_path, n_tokens, shard_tokens=7)
    for n_batches in (None, 10**6):
        batches = list(eval_batches(dataset, "train", batch_size, 10, n_batches))
        assert [t for x, _ in batches for t in x.ravel()] == list(range(n_tokens - 1))
        assert [t for _, y in batches for t in y.ravel()] == list(range(1, n_tokens))
    some = list(eval_batches(dataset, "train", 1, 10, 1))
    assert [x.shape for x, _ in some] == [(1, 10)]


@pytest.mark.parametrize(("batch_size", "seq_len"), [(0, 4), (4, 0)])
def test_impossible_shapes_are_refused(tmp_path: Path, batch_size: int, seq_len: int) -> None:
    dataset = counting(tmp_path, 100)
    with pytest.raises(UsageError):
        Loader(dataset, "train", batch_size, seq_len)
    with pytest.raises(UsageError):
        next(eval_batches(dataset, "train", batch_size, seq_len))
