"""A folder that holds its tokenizer needs nothing else: no network, no cache, no variable.

The class: a tokenizer that is named in a folder and is looked for elsewhere.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from corpus import write_source
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.formats.registry import open_model
from gptc.tokenizer import native
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_checkpoint, make_config
from vocabularies import gpt2_folder, needs_gpt2

pytestmark = needs_gpt2
HELLO = [15496, 995]


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))


def go_offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Refuses the network, and leaves no cache that could be read or written."""

    def fail(*args: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(native, "download", fail)
    empty = folder / "empty"
    empty.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(empty))
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(empty))
    (folder / "file").write_text("")
    monkeypatch.setenv("GPTC_CACHE", str(folder / "file"))


def as_before(folder: Path) -> None:
    """Makes gptc_tokenizer.json one of those that hold no vocabulary."""
    path = folder / "gptc_tokenizer.json"
    saved = json.loads(path.read_text())
    del saved["vocab_bpe"]
    path.write_text(json.dumps({**saved, "version": 1}))
    (folder / "checksums.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with GPT-2's vocabulary, made once."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
        folder = tmp_path_factory.mktemp("saved") / "source"
        return make_checkpoint(make_config("gpt2", vocab_size=50257), "gpt2", folder).path


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "source"))


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint(
    old: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        as_before(source)
    go_offline(monkeypatch, tmp_path)
    assert open_checkpoint(source).tokenizer().encode("Hello world").tolist() == HELLO
    assert make_tokenizer(str(source)).encode("Hello world").tolist() == HELLO
    for kind in ("gguf", "llm.c", "hf")[: 1 if old else 3]:  # whose tokenizer is the same
        out = tmp_path / kind.replace(".", "")
        assert export_model(open_checkpoint(source), kind, out).notes == []
        exported = open_checkpoint(out) if kind == "hf" else open_model(out)
        assert exported.tokenizer().encode("Hello world").tolist() == HELLO


@pytest.mark.parametrize("file", ["tokenizer.json", "merges.txt"])
def test_a_folder_of_hugging_face(
    file: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = native.gpt2_vocabulary_in(source)
    assert vocabulary is not None
    for name in ("gptc_tokenizer.json", "checksums.json", "tokenizer_config.json"):
        (source / name).unlink()
    if file == "merges.txt":
        (source / "tokenizer.json").unlink()
        (source / file).write_bytes(vocabulary)
    go_offline(monkeypatch, tmp_path)
    assert open_checkpoint(source).tokenizer().encode("Hello world").tolist() == HELLO


def test_a_model_of_another_family_and_a_dataset(
    cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("byte", vocab_size=50257)
    source = make_checkpoint(config, "gpt2", tmp_path / "source")
    data = write_source(tmp_path, "Hello world, " * 50)
    prepare([data], tmp_path / "data", tokenizer="gpt2")
    go_offline(monkeypatch, tmp_path)
    assert open_checkpoint(source.path).tokenizer().encode("Hello world").tolist() == HELLO
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.tokenizer.encode("Hello world").tolist() == HELLO
    again = prepare([data], tmp_path / "again", tokenizer=str(source.path))
    assert again.tokenizer.fingerprint() == dataset.tokenizer.fingerprint()
