"""More shards or sources than dataset.json has room for, and journals of any size."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from gptc.data import chat_job, encode
from gptc.data.dataset import Dataset
from gptc.data.description import DATASET_FILE
from gptc.data.journal import line_of, read_lines, shard_name
from gptc.data.preparation import prepare
from gptc.errors import GptcError

LIMIT = 20_000  # bytes of JSON
ROWS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTC_LIMITS", f"json={LIMIT}")


def source_of(folder: Path, content: str) -> str:
    path = folder / "text.jsonl" if content[0] == "{" else folder / "text"
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    ("tokenizer", "content"), [("bytes", "0123456789" * 500), ("char", "0123456789" * 500)]
)
def test_shards_that_have_no_room_are_refused_before_they_are_all_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, content: str
) -> None:
    n_written = 0

    class Counted(encode.ShardFile):
        def close(self) -> str:
            nonlocal n_written
            n_written += 1
            return super().close()

    monkeypatch.setattr(encode, "ShardFile", Counted)
    source, out = source_of(tmp_path, content), tmp_path / "out"
    refused = rf"dataset.json with all .* limit of {LIMIT:,} bytes .* a larger --shard-tokens"
    with pytest.raises(GptcError, match=refused):
        prepare([source], out, tokenizer=tokenizer, shard_tokens=10)
    most = LIMIT // 120
    assert n_written == 0 if tokenizer == "bytes" else n_written < most
    assert not out.exists()
    prepare([source], out, tokenizer=tokenizer, shard_tokens=50)  # what has room can be read
    assert sum(len(s["shards"]) for s in Dataset.open(out).meta["splits"].values()) == 100


def test_shards_of_conversations_that_have_no_room_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = source_of(tmp_path, ROWS * 100), tmp_path / "out"
    prepare([source], tmp_path / "few", shard_tokens=1000)
    monkeypatch.setattr(chat_job.ChatJob, "_write", lambda *args: pytest.fail("writes"))
    with pytest.raises(GptcError, match=r"dataset\.json with all its shards .* --shard-tokens"):
        prepare([source], out, shard_tokens=1)
    assert not out.exists()


def test_sources_that_have_no_room_are_refused_before_the_text_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i}").write_text("text\n")
    monkeypatch.setattr("gptc.data.job.encode_text", lambda *args: pytest.fail("encodes"))
    with pytest.raises(GptcError, match=r"dataset\.json exceeds .* name folders or a glob"):
        prepare([str(path) for path in folder.iterdir()], tmp_path / "out")
    monkeypatch.undo()
    prepare([str(folder)], tmp_path / "out").verify()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", ["text " * 100, ROWS * 2])
def test_force_replaces_a_dataset_json_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    source, out = source_of(tmp_path, content), tmp_path / "out"
    out.mkdir()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.touch()):
        make(out / DATASET_FILE)
        with pytest.raises(GptcError, match=r"dataset\.json is "):
            prepare([source], out)
        prepare([source], out, force=True).verify()
        (out / DATASET_FILE).unlink()


def lines(n: int) -> list[dict[str, Any]]:
    of = {"split": "train", "tokens": 3, "bytes": 3, "checksum": "x", "skip": 0}
    return [of | {"file": shard_name("train", i), "at": 3 * i} for i in range(n)]


def test_a_journal_is_read_line_by_line(tmp_path: Path) -> None:
    path, notes = tmp_path / "journal.jsonl", []
    path.write_text("".join(map(line_of, lines(150))))
    assert path.stat().st_size > LIMIT
    assert read_lines(path, notes.append, most=150) == lines(150)
    path.write_text(path.read_text()[:-5])  # cut off by a kill
    assert read_lines(path, notes.append, most=150) == lines(149)
    assert notes == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("".join(map(line_of, lines(200))), r"has more than 1\d\d lines"),
        (line_of(lines(1)[0]) + "x\n", "is damaged after 1 line"),
        (line_of(lines(1)[0]) + "x" * 5000, "is damaged after 1 line"),
        (None, "is not a regular file: copy its content to one"),
    ],
)
def test_a_journal_that_is_not_believed_is_told(
    tmp_path: Path, content: str | None, why: str
) -> None:
    path, notes = tmp_path / "journal.jsonl", []
    os.mkfifo(path) if content is None else path.write_text(content)
    read_lines(path, notes.append)
    (note,) = notes
    pattern = rf"note: .*journal\.jsonl {why}; the shards of the rest are made again"
    assert re.fullmatch(pattern, note)


def test_a_plan_that_is_not_believed_is_told(tmp_path: Path) -> None:
    work, notes = tmp_path / "out" / ".partial", []
    work.mkdir(parents=True)
    for content in ("[" * 100_000, "{", json.dumps("x" * LIMIT)):
        (work / "plan.json").write_text(content)
        prepare(
            [source_of(tmp_path, "text " * 9)], tmp_path / "out", notify=notes.append, force=True
        )
        work.mkdir()
    assert len(notes) == 3
    assert all("plan.json" in note and "begins again" in note for note in notes)
