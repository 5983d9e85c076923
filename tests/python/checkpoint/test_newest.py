"""A model of a run that is still training can be loaded while the run removes old checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptc.checkpoint import facade
from gptc.checkpoint.facade import Model, on_newest
from gptc.cli import run
from gptc.convert import export_model
from gptc.errors import GptcError
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.native import ByteTokenizer
from small_models import make_config, make_model


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """A run with one checkpoint."""
    save(tmp_path / "run", 1)
    return tmp_path / "run"


def save(folder: Path, step: int) -> None:
    with make_model(make_config()) as model:
        facade.save(folder / f"ckpt-{step:06d}", model, tokenizer=ByteTokenizer())


def pruned(folder: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> list[Path]:
    """The checkpoints that are loaded; each of the first is replaced while it is read."""
    loaded: list[Path] = []
    load = facade.load_model

    def slow(file: ModelFile, **options: object) -> Model:
        if file.path.parent != folder:
            return load(file, **options)
        loaded.append(file.path)
        if len(loaded) <= times:
            save(folder, len(loaded) + 1)
            shutil.rmtree(file.path)
        return load(file, **options)

    monkeypatch.setattr(facade, "load_model", slow)
    return loaded


def test_the_newest_is_loaded_in_its_place(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = pruned(live, monkeypatch, times=2)
    with Model.load(live) as model:
        assert model.config == make_config()
    assert [path.name for path in loaded] == ["ckpt-000001", "ckpt-000002", "ckpt-000003"]


def test_infer_reads_a_live_run(
    live: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = pruned(live, monkeypatch, times=1)
    assert run(["infer", "-m", str(live), "-p", "a", "--max-tokens", "2"]) == 0
    assert "error" not in capfd.readouterr().err
    assert len(loaded) == 2


def test_a_draft_is_read_from_a_live_run(
    live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "other", 1)
    loaded = pruned(live, monkeypatch, times=1)
    command = ["infer", "-m", str(tmp_path / "other"), "-p", "a", "--max-tokens", "2"]
    assert run([*command, "--draft", str(live)]) == 0
    assert "error" not in capfd.readouterr().err
    assert len(loaded) == 2


def test_eval_reads_a_live_run(
    live: Path,
    dataset_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each of its rows is that of one checkpoint."""
    loaded = pruned(live, monkeypatch, times=1)
    command = ["eval", "-m", str(live), "--data", str(dataset_folder), "--batches", "1"]
    assert run([*command, "--quantize", "int8", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert [path.name[-1] for path in loaded] == ["1", "2", "2"]
    assert printed["model"] == str(live / "ckpt-000002")
    assert [row["dtype"] for row in printed["results"]] == ["fp32", "int8"]


def test_export_reads_a_live_run(
    live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find, read = export_model._tokenizer, list[str]()

    def slow(file: ModelFile) -> Any:
        read.append(file.path.name)
        if len(read) == 1:
            save(live, 2)
            shutil.rmtree(file.path)
        return find(file)

    monkeypatch.setattr(export_model, "_tokenizer", slow)
    command = ["export", "-m", str(live), "--to", "hf", "--out", str(tmp_path / "out")]
    assert run(command) == 0, capfd.readouterr().err
    assert read == ["ckpt-000001", "ckpt-000002"]


def test_a_fault_that_stays_is_raised_once(live: Path) -> None:
    tries = []

    def use(file: ModelFile) -> None:
        tries.append(file.path)
        raise GptcError("damaged")

    with pytest.raises(GptcError, match="damaged"):
        on_newest(live, use)
    assert len(tries) == 1


def test_a_checkpoint_that_is_named_is_not_replaced(live: Path) -> None:
    tries = []

    def use(file: ModelFile) -> None:
        tries.append(file.path)
        save(live, 2)
        shutil.rmtree(file.path)
        raise GptcError("it is gone")

    with pytest.raises(GptcError, match="it is gone"):
        on_newest(live / "ckpt-000001", use)
    assert len(tries) == 1
