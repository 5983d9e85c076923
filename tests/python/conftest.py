"""Fixtures of every test: small models, a small dataset, and the command line in-process."""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gptc import Model
from gptc.engine.config import GPTConfig
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config, varied

pytest_plugins = ["cpu_times", "family_table"]

# What collection makes lasts. Python would look through it again and again, for a quarter of the
# time that collection takes, and later whenever it looks for what tests leave.
gc.disable()

WORDS = ["the", "a", "king", "fox", "bear", "ran", "sat", "saw", "under", "tree", "and", ",", ".\n"]


class Ran(NamedTuple):
    """The outcome of a command."""

    code: int
    out: str
    err: str


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def config() -> Callable[..., GPTConfig]:
    """config(family, **changes) is a small shape."""
    return make_config


@pytest.fixture
def model() -> Model:
    """A small model to train."""
    return Model.create(make_config(), threads=1, max_batch=4, max_seq=16, seed=3)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Lets SIGINT interrupt a test even if a background shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or fills the user's caches, or asks the hub.

    A test that needs GPT-2's vocabulary names its folder (vocabularies.py), or is skipped.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "tiktoken"))
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 20 kB that a small model can learn."""
    rng = random.Random(5)
    path = tmp_path_factory.mktemp("text") / "fable.txt"
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(6000))[:20_000])
    return path


@pytest.fixture(scope="session")
def dataset_folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text as a prepared dataset."""
    from gptc.data.preparation import prepare

    folder = tmp_path_factory.mktemp("data") / "fable"
    prepare([str(text_file)], folder, tokenizer="bytes")
    return folder


@pytest.fixture
def options(dataset_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Training options for a run of a second: a model of 20,000 parameters, 8 steps."""
    return {
        "data": str(dataset_folder),
        "out": str(tmp_path / "run"),
        "preset": "tiny",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "n_ff": 48,
        "batch_size": 2,
        "seq_len": 16,
        "steps": 8,
        "eval_every": 4,
        "eval_batches": 2,
        "threads": 2,
    }


@pytest.fixture
def writer(config: Callable[..., GPTConfig]) -> Iterator[Model]:
    """A small model that writes varied text."""
    with varied(config()) as model:
        yield model


@pytest.fixture
def tokenizer() -> Tokenizer:
    """The tokenizer of bytes."""
    return make_tokenizer("bytes")


@pytest.fixture
def saved(writer: Model, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """The writer as a checkpoint."""
    writer.save(tmp_path / "saved", tokenizer)
    return tmp_path / "saved"


@pytest.fixture
def gptc(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """gptc("train", "--steps", 8) runs a command in this process."""
    from gptc.cli import run

    def call(*args: object) -> Ran:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def arguments(options: dict[str, Any]) -> list[str]:
    """`options` as command-line arguments."""
    return [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture
def one_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of a run has one panel of nine: matplotlib takes a fifth of a second for each."""
    from gptc.training import plot

    monkeypatch.setattr(plot, "_PANELS", plot._PANELS[:1])
