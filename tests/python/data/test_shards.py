"""Shards have the published layout, are read back unchanged, and damage is named.

The class: a mapped page behind the end of a file that became shorter, which ends the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from corpus import write_source
from gptc.data.dataset import Dataset
from gptc.data.loader import Loader
from gptc.data.preparation import prepare
from gptc.data.shards import open_shard, read_shard, write_shard
from gptc.errors import GptcError


def test_a_shard_has_the_published_layout(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 50256, 2], 50257)
    raw = (tmp_path / "a.bin").read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 3] + [0] * 253
    assert raw[1024:] == b"\x01\x00\x50\xc4\x02\x00"

    write_shard(tmp_path / "b.bin", [1, 128000], 128256)
    raw = (tmp_path / "b.bin").read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240801, 7, 2] + [0] * 253
    assert raw[1024:] == b"\x01\x00\x00\x00\x00\xf4\x01\x00"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.bin"]


@pytest.mark.parametrize("vocab_size", [65536, 65537])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_a_shard_comes_back(tmp_path: Path, n: int, vocab_size: int) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab_size, n)
    write_shard(tmp_path / "a.bin", tokens, vocab_size)
    shard = read_shard(tmp_path / "a.bin")
    assert shard.tolist() == tokens.tolist()
    assert shard.dtype == (np.uint16 if vocab_size == 65536 else np.uint32)
    assert type(shard) is np.ndarray


def test_a_shard_is_read_only(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 2], 256)
    shard = read_shard(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 7


@pytest.mark.parametrize("token", [-1, 256])
def test_a_token_outside_the_vocabulary_is_not_written(tmp_path: Path, token: int) -> None:
    with pytest.raises(GptcError, match="vocabulary of 256"):
        write_shard(tmp_path / "a.bin", [1, token], 256)
    assert list(tmp_path.iterdir()) == []


def header(*numbers: int) -> bytes:
    return np.array([*numbers, *[0] * (256 - len(numbers))], dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "0 bytes, fewer than a header"),
        (header(20240520, 1, 0)[:-1], "1023 bytes, fewer than a header"),
        (header(1, 1, 1) + b"ab", "begins with 1"),
        (header(20240520, 2, 1) + b"ab", "version 2; only 1"),
        (header(20240801, 1, 1) + b"abcd", "version 1; only 7"),
        (header(20240520, 1, 2) + b"ab", "promises 2 tokens, 1028 bytes, and it has 1026"),
        (header(20240520, 1, 1) + b"abc", "promises 1 tokens, 1026 bytes, and it has 1027"),
        (header(20240520, 1, -1), "promises -1 tokens"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    path = write_source(tmp_path, content, "a.bin")
    with pytest.raises(GptcError, match=why) as caught:
        read_shard(Path(path))
    assert path in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(GptcError, match=r"none\.bin: No such file"):
        read_shard(tmp_path / "none.bin")


def test_a_shard_that_becomes_shorter_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """In whatever way it is read; the dataset was opened before."""
    made = [write_source(tmp_path, "a text of some length. " * 2000), tmp_path / "d"]
    uses: list[Callable[[Dataset], object]] = [
        lambda dataset: dataset.shard("train", 0),
        lambda dataset: dataset.read("train", 10_000, np.empty(10, np.int32)),
        lambda dataset: Loader(dataset, "train", 64, 500, seed=1).next(),
        lambda dataset: dataset.n_unknown(),
        lambda dataset: dataset.n_bytes("train"),
        lambda dataset: dataset.describe(),
    ]
    for first in (False, True):  # before the tokens were compared with the vocabulary, or after
        for use in uses:
            dataset = prepare([made[0]], made[1], tokenizer="bpe:260", force=True)
            dataset.tokenizer.unknown_id = 0
            dataset.meta["version"] = 1  # whose bytes are counted again
            if first:
                dataset.shard("train", 0)
            os.truncate(dataset.shards("train")[0], 2048)
            with pytest.raises(GptcError, match=r"became shorter|is damaged: its header promises"):
                use(dataset)
    shard = open_shard(dataset.shards("val")[0])
    os.truncate(shard.path, 1024 + 2 * shard.n_tokens - 1)
    for read in (shard.largest, lambda: shard.read(0, shard.n_tokens)):
        with pytest.raises(GptcError, match="became shorter"):
            read()


def test_a_parquet_file_that_becomes_shorter_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    written = pytest.importorskip("pyarrow.parquet")
    from gptc.data import parquet

    path = tmp_path / "a.parquet"
    texts = [str(i) * 50 for i in range(20_000)]
    written.write_table(pyarrow.table({"text": texts}), path, compression="none")
    size = path.stat().st_size
    assert parquet.largest_page(path, "a.parquet", "text") > 100_000

    def cut(*given: object) -> object:
        found = list(pages(*given))
        os.truncate(path, 4096)
        return found

    pages: Callable[..., Iterable[object]] = parquet._pages
    monkeypatch.setattr(parquet, "_pages", cut)
    with pytest.raises(GptcError, match="damaged header at byte"):
        parquet.largest_page(path, "a.parquet", "text")
    os.truncate(path, size)
