"""Ranks that encode a text together write the bytes of one process."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from corpus import nasty_text, set_block, write_source
from gptc.cli.prepare import _prepare
from gptc.data.crew import Crew, serve
from gptc.data.dataset import Dataset
from gptc.data.job import Job
from gptc.data.preparation import prepare
from gptc.data.shards import ShardFile
from gptc.engine.world import World
from gptc.errors import GptcError, UsageError
from mpi_jobs import ThreadWorld, thread_worlds
from vocabularies import llama_like

WAYS: list[dict[str, Any]] = [
    {"tokenizer": "bpe:300", "shard_tokens": 700},
    {"tokenizer": "bpe:280", "errors": "bytes", "val_tokens": 400, "shard_tokens": 500},
    {"tokenizer": "char", "val_fraction": 0.3, "val_by": "order"},
    {"tokenizer": "bytes"},
    {"tokenizer": "LLAMA", "shard_tokens": 900},  # a text's first block has another first token
]


@contextmanager
def crew_of(size: int, jobs: int = 2) -> Iterator[Crew]:
    """The crew of rank 0. The others are threads, which end with it."""
    worlds = thread_worlds(size)
    threads = [
        threading.Thread(target=serve, args=(world, jobs), daemon=True) for world in worlds[1:]
    ]
    for thread in threads:
        thread.start()
    try:
        with Crew(worlds[0], jobs) as crew:
            yield crew
    finally:
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    set_block(monkeypatch, 300)
    return write_source(tmp_path, nasty_text(random.Random(5), 6000))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way["tokenizer"]))
def test_any_number_of_ranks_writes_the_same_files(
    tmp_path: Path, source: str, way: dict[str, Any]
) -> None:
    if way["tokenizer"] == "LLAMA":
        llama_like().save(tmp_path)
        way = {**way, "tokenizer": str(tmp_path / "gptc_tokenizer.json")}
    prepare([source], tmp_path / "alone", **way)
    for size in (2, 3):
        out = tmp_path / f"ranks{size}"
        with crew_of(size) as crew:
            prepare([source], out, crew=crew, **way)
        assert files(out) == files(tmp_path / "alone")


def test_the_others_encode_their_share(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    really = ThreadWorld.collect

    def collect(self: ThreadWorld, data: bytes) -> list[bytes]:
        sent.append(len(data)) if self.rank else None
        return really(self, data)

    monkeypatch.setattr(ThreadWorld, "collect", collect)
    with crew_of(3) as crew:
        dataset = prepare([source], tmp_path / "out", crew=crew, tokenizer="bpe:300")
    n_all = 2 * dataset.n_tokens("all")  # bytes
    assert 0.4 * n_all < sum(sent) < n_all  # two thirds, the last rounds apart, and the counts


class Stopped(Exception):
    """Ends rank 0 in the middle."""


def test_ranks_continue_after_the_shards_of_another_number(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = WAYS[0]
    prepare([source], tmp_path / "alone", **way)
    appended, really = [], ShardFile.append

    def append(self: ShardFile, tokens: Any) -> None:
        appended.append(len(tokens))
        if len(appended) == 15:
            raise Stopped
        really(self, tokens)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "append", append)
        with pytest.raises(Stopped), crew_of(3) as crew:
            prepare([source], out, crew=crew, **way)
    assert not (out / "dataset.json").exists()
    n_done = len((out / ".partial" / "journal.jsonl").read_text().splitlines())
    assert n_done > 1
    begins: list[int] = []
    ours = Job._pieces

    def pieces(self: Job, *given: Any) -> Any:
        begins.append(given[2])
        return ours(self, *given)

    monkeypatch.setattr(Job, "_pieces", pieces)
    with crew_of(2) as crew:
        dataset = prepare([source], out, crew=crew, **way)
    assert begins[0] > 0  # after the finished shards
    assert isinstance(dataset, Dataset)
    assert files(out) == files(tmp_path / "alone")


def test_an_error_of_rank_0_lets_the_others_end(tmp_path: Path) -> None:
    with pytest.raises(GptcError, match="none"), crew_of(2) as crew:
        prepare([str(tmp_path / "none")], tmp_path / "out", crew=crew, tokenizer="bpe:300")


def test_several_ranks_refuse_the_standard_input(tmp_path: Path) -> None:
    """Which mpirun of Open MPI 5 repeats, or does not end."""
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="name a file or a named pipe"), crew_of(2) as crew:
        _prepare(("-",), out, False, crew, {"tokenizer": "bpe:300"})
    assert not out.exists()


def test_the_parts_of_one_rank_stay() -> None:
    world = World()
    assert world.scatter([b"abc"]) == b"abc"
    assert world.collect(b"de") == [b"de"]
    assert world.broadcast_bytes(b"f") == b"f"
