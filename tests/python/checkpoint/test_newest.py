"""A model of a run that is still training can be loaded while the run removes old checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gptc.checkpoint import facade
from gptc.checkpoint.facade import Model, on_newest
from gptc.cli import run
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
