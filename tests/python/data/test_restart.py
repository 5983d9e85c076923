"""A killed preparation that runs again writes the same bytes, and so does any --jobs."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.data import encode, job, scan, shards
from gptc.data.dataset import Dataset
from gptc.data.loader import Loader
from gptc.data.preparation import prepare
from gptc.errors import GptcError
from vocabularies import llama_like

WORDS = ["the", "king", "Zoë", "東京", "ran.\n", "\n\n", "a" * 50, "<|endoftext|>", "12345", "  "]


def text(n_words: int, seed: int = 1) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n_words))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Killed(BaseException):
    """Acts as kill -9: nothing in gptc catches it."""


def prepare_killed(n_writes: int, *args: Any, **kwargs: Any) -> Dataset | None:
    """Prepares, and dies at the `n_writes`-th block of a shard; None when it died."""
    really, count = shards.ShardFile.append, 0

    def append(self: shards.ShardFile, tokens: Any) -> None:
        nonlocal count
        count += 1
        if count > n_writes:
            raise Killed
        really(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardFile, "append", append)
        try:
            return prepare(*args, **kwargs)
        except Killed:
            return None


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gptc.data.archives", "gptc.data.sources", "gptc.data.encode"):
        monkeypatch.setattr(f"{module}.BLOCK_BYTES", 512)
    monkeypatch.setattr(encode, "_LONGEST_RUN_BYTES", 1024)


OPTIONS: list[dict[str, Any]] = [
    {"tokenizer": "bytes"},
    {"tokenizer": "char", "val_fraction": 0.3},
    {"tokenizer": "bpe:300"},
    {"tokenizer": "bpe:300", "val_tokens": 2500},
    {"tokenizer": "bytes", "val_tokens": 1},
    {"tokenizer": "LLAMA"},  # which adds a space to a text, once
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "rows.jsonl"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_interrupted_preparation_goes_on(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    data = text(3000).encode()
    if name == "rows.jsonl":
        data = "".join(json.dumps({"text": text(9, i)}) + "\n" for i in range(300)).encode()
    source = tmp_path / name
    source.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    options = {**options, "shard_tokens": 300}
    if options["tokenizer"] == "LLAMA":
        llama_like().save(tmp_path)
        options["tokenizer"] = str(tmp_path / "gptc_tokenizer.json")
    whole = files(prepare([str(source)], tmp_path / "whole", jobs=1, **options).folder)
    assert len(whole) > 6
    out = tmp_path / "out"
    rng = random.Random(name)
    journal = out / ".partial" / "journal.jsonl"
    n_finished = []
    while prepare_killed(rng.randint(5, 30), [str(source)], out, jobs=3, **options) is None:
        n_finished.append(len(journal.read_text().splitlines()) if journal.exists() else 0)
        assert len(n_finished) < 100
    assert n_finished[-1] > 2
    if "val_tokens" not in options:  # whose tail is taken from shards that were finished
        assert n_finished == sorted(n_finished)
    assert files(out) == whole


@pytest.mark.usefixtures("small_blocks")
def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text(text(3000))
    whole = files(prepare([str(source)], tmp_path / "whole", shard_tokens=1000).folder)
    out = tmp_path / "out"
    assert prepare_killed(20, [str(source)], out, shard_tokens=1000) is None
    shard = out / ".partial" / "dataset" / "train_000001.bin"
    raw = bytearray(shard.read_bytes())
    raw[1500] ^= 1
    shard.write_bytes(raw)
    with (out / ".partial" / "journal.jsonl").open("a") as journal:
        journal.write('{"split": "tr')  # a line that was being written
    prepare([str(source)], out, shard_tokens=1000)
    assert files(out) == whole


def _other(line: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(line), **changes}).encode() + b"\n"


JOURNALS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a line is lost": lambda lines: lines[:1] + lines[2:],
    "the first line is lost": lambda lines: lines[1:],
    "lines are swapped": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "a line is there twice": lambda lines: lines[:2] + lines[1:],
    "another place": lambda lines: [_other(line, at=7) for line in lines],
    "tokens are skipped": lambda lines: [lines[0], _other(lines[1], skip=9)],
    "another number of bytes": lambda lines: [_other(line, bytes=1) for line in lines],
    "a text for a number": lambda lines: [_other(lines[0], tokens="x"), *lines[1:]],
    "another split": lambda lines: [_other(line, split="val") for line in lines],
    "a file elsewhere": lambda lines: [_other(line, file="/dev/null") for line in lines],
    "no objects": lambda lines: [b"7\n", b"[]\n", b"null\n", *lines],
    "empty objects": lambda lines: [b"{}\n", *lines],
    "deep lists": lambda lines: [lines[0], b"[" * 100_000 + b"\n", *lines[1:]],
    "no text": lambda lines: [b"\xff\n", *lines],
    "an older version": lambda lines: [
        json.dumps({k: v for k, v in json.loads(line).items() if k != "line"}).encode() + b"\n"
        for line in lines
    ],
}


def test_a_damaged_journal_costs_time_and_no_data(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text(text(600))
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 500}
    whole = files(prepare([str(source)], tmp_path / "whole", **options).folder)
    stopped = tmp_path / "stopped"
    assert prepare_killed(6, [str(source)], stopped, **options) is None
    for name, damage in JOURNALS.items():
        out = tmp_path / name
        shutil.copytree(stopped, out)
        path = out / ".partial" / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) > 3
        path.write_bytes(b"".join(damage(lines)))
        prepare([str(source)], out, **options)
        assert files(out) == whole, name


def test_a_damaged_plan_is_not_followed(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text(text(600))
    whole = files(prepare([str(source)], tmp_path / "whole", shard_tokens=500).folder)
    out = tmp_path / "out"
    assert prepare_killed(6, [str(source)], out, shard_tokens=500) is None
    (out / ".partial" / "plan.json").write_text("[" * 100_000)
    prepare([str(source)], out, shard_tokens=500)
    assert files(out) == whole


@pytest.mark.usefixtures("small_blocks")
def test_unfinished_work_of_another_kind_is_not_thrown_away(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text(text(3000))
    out = tmp_path / "out"
    assert prepare_killed(20, [str(source)], out, shard_tokens=1000) is None
    with pytest.raises(GptcError, match=r"unfinished dataset .*--force"):
        prepare([str(source)], out, shard_tokens=999)
    with pytest.raises(GptcError, match=r"no dataset\.json"):
        Dataset.open(out)
    dataset = prepare([str(source)], out, shard_tokens=999, force=True)
    assert not (out / ".partial").exists()
    dataset.verify()


@pytest.mark.usefixtures("small_blocks")
def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "text"
    source.write_text(text(3000))
    whole = files(prepare([str(source)], tmp_path / "whole", shard_tokens=1000).folder)
    really, count = shards.ShardFile.append, 0

    def full(self: shards.ShardFile, tokens: Any) -> None:
        nonlocal count
        count += 1
        if count > 20:
            raise OSError(28, "No space left on device")
        really(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardFile, "append", full)
        with pytest.raises(GptcError, match=r"No space left .*the same command continues"):
            prepare([str(source)], tmp_path / "out", shard_tokens=1000)
    prepare([str(source)], tmp_path / "out", shard_tokens=1000)
    assert files(tmp_path / "out") == whole


def test_a_source_that_changes_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "text"
    source.write_text(text(300))
    really = job.move_tail

    def meddle(*args: Any) -> dict[str, Any]:
        source.write_text(text(300, seed=2))
        return really(*args)

    monkeypatch.setattr(job, "move_tail", meddle)
    with pytest.raises(GptcError, match="changed while it was read"):
        prepare([str(source)], tmp_path / "out", val_tokens=10)
    with pytest.raises(GptcError):
        Dataset.open(tmp_path / "out")


def spawn(source: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gptc", "prepare", str(source), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--shard-tokens", "6K", "--jobs", "2", "--tokenizer", "bpe:300"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_killed_by_the_system(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text(text(60_000))
    process = spawn(source, tmp_path / "whole")
    assert process.wait(60) == 0, process.communicate()
    out = tmp_path / "out"
    journal = out / ".partial" / "journal.jsonl"
    n_killed = 0
    for n_shards in (1, 4, 8):
        process = spawn(source, out)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= n_shards:
                os.kill(process.pid, signal.SIGKILL)
                n_killed += process.wait(60) == -signal.SIGKILL
            time.sleep(0.001)
        process.communicate()
    process = spawn(source, out)
    assert process.wait(60) == 0, process.communicate()
    process.communicate()
    assert n_killed > 0
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_blocks")
def test_jobs_change_nothing(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text(text(5000))
    options = {"tokenizer": "bpe:400", "shard_tokens": 999}
    made = [
        files(prepare([str(source)], tmp_path / str(jobs), jobs=jobs, **options).folder)
        for jobs in (1, 2, 7, None)
    ]
    assert all(other == made[0] for other in made[1:])


# ---- extremes ----


def test_a_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text(text(3000))
    for tokenizer in ("bytes", "char"):  # the number of tokens is known beforehand, or is not
        dataset = prepare(
            [str(source)], tmp_path / tokenizer, tokenizer=tokenizer, shard_tokens=999
        )
        assert dataset.meta["splits"]["train"]["shards"][-1]["tokens"] < 999
        dataset.verify()


def test_a_dataset_of_one_token(tmp_path: Path) -> None:
    source = tmp_path / "one"
    source.write_bytes(b"x")
    dataset = prepare([str(source)], tmp_path / "out", val_fraction=0)
    assert dataset.n_tokens("train") == 1
    assert dataset.shard("train", 0).tolist() == [ord("x")]
    assert dataset.describe()["splits"]["train"]["sample"] == "x"


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    import resource

    n = 3000
    source = tmp_path / "text"
    source.write_bytes(bytes(i % 251 for i in range(n)))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limit[1]))
    try:
        dataset = prepare([str(source)], tmp_path / "out", val_fraction=0, shard_tokens=1)
        assert len(dataset.shards("train")) == n
        everything = np.empty(n, dtype=np.int32)
        dataset.read("train", 0, everything)
        assert everything.tolist() == [i % 251 for i in range(n)]
        x, y = Loader(dataset, "train", 4, 100, seed=1).next()
        assert ((x + 1) % 251 == y).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_documents_without_number_take_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_MAX_BORDERS", 16)
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "row"}\n' * 1000)
    dataset = prepare([str(source)], tmp_path / "out", val_fraction=0.25)
    assert dataset.n_tokens("val") / (1000 * 18) == pytest.approx(0.25, abs=1 / 16)
    assert dataset.tokenizer.decode_bytes(dataset.shard("val", 0)[:14]) == b"<|endoftext|>\n"


@pytest.mark.parametrize("name", ["plan.json", "journal.jsonl"])
def test_a_pipe_in_the_place_of_what_was_done_is_not_waited_for(tmp_path: Path, name: str) -> None:
    source, out = tmp_path / "text.txt", tmp_path / "out"
    source.write_text(text(2000))
    assert prepare_killed(2, [str(source)], out, shard_tokens=300) is None
    (out / ".partial" / name).unlink()
    os.mkfifo(out / ".partial" / name)
    prepare([str(source)], out, shard_tokens=300).verify()
