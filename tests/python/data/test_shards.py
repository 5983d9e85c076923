"""Shards have the published layout, are read back unchanged, and damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corpus import write_source
from gptc.data.shards import read_shard, write_shard
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
