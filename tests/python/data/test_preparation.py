"""Preparing replaces nothing unasked, and leaves no half-written dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corpus import text_of, write_source
from gptc.data import job
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.errors import GptcError, UsageError
from gptc.tokenizer.native import CharTokenizer
from gptc.tokenizer.registry import read_tokenizer


def test_the_tokenizer_of_another_dataset_is_used(tmp_path: Path) -> None:
    CharTokenizer("abcé\n", "b").save(tmp_path)
    source = write_source(tmp_path, "abé" * 10)
    dataset = prepare([source], tmp_path / "out", tokenizer=str(tmp_path))
    assert dataset.vocab_size == 5
    assert dataset.tokenizer.to_json() == read_tokenizer(tmp_path).to_json()
    source = write_source(tmp_path, "abéX", "other.txt")
    with pytest.raises(GptcError, match=r"other\.txt: byte 4: 'X' \(U\+0058\)"):
        prepare([source], tmp_path / "other", tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"val_fraction": 1.0},
        {"val_fraction": -0.1},
        {"val_fraction": float("nan")},
        {"val_tokens": -1},
        {"shard_tokens": 0},
        {"shard_tokens": 2**31},
        {"jobs": 0},
        {"tokenizer": "words"},
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        prepare([write_source(tmp_path, "text")], tmp_path / "out", **options)


def test_the_same_again_is_left_alone(tmp_path: Path) -> None:
    source = write_source(tmp_path, "text " * 100)
    out = tmp_path / "out"
    assert not prepare([source], out).already_there
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare([source], out).already_there
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_dataset_is_replaced_only_by_force(tmp_path: Path) -> None:
    source = write_source(tmp_path, "text " * 100)
    out = tmp_path / "out"
    prepare([source], out, shard_tokens=100)
    write_source(tmp_path, "other " * 10)
    for shard_tokens in (100, 200):
        with pytest.raises(GptcError, match=r"already holds .*--force"):
            prepare([source], out, shard_tokens=shard_tokens)
    assert Dataset.open(out).n_tokens("train") == 450
    prepare([source], out, force=True)
    assert text_of(Dataset.open(out), "train") == b"other " * 9
    assert len(list(out.glob("*.bin"))) == 2


def test_foreign_files_are_not_mixed_in(tmp_path: Path) -> None:
    source = write_source(tmp_path, "text " * 100)
    note = write_source(tmp_path, "mine", "out/train_notes.bin")
    with pytest.raises(GptcError, match="holds other files"):
        prepare([source], tmp_path / "out")
    prepare([source], tmp_path / "out", force=True)
    assert Path(note).read_text() == "mine"
    with pytest.raises(GptcError, match="is a file"):
        prepare([source], Path(source))
    with pytest.raises(GptcError, match="also a source"):
        prepare([str(tmp_path / "out")], tmp_path / "out", force=True)


def test_a_crash_leaves_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path, "text " * 100)
    out = tmp_path / "out"
    prepare([source], out)

    def fail(path: Path, data: bytes) -> None:
        if path.name == "dataset.json":
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(data)

    with monkeypatch.context() as context:
        context.setattr(job, "write_file", fail)
        with pytest.raises(GptcError, match=r"dataset\.json: No space left"):
            prepare([source], out, force=True, shard_tokens=100)
    with pytest.raises(GptcError, match=r"holds no dataset\.json"):
        Dataset.open(out)
    assert prepare([source], out, force=True, shard_tokens=100).n_tokens("val") == 50
