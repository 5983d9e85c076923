"""Adapters with DoRA: switched, merged, exported, trained and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Lora, Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import find_checkpoint, open_checkpoint, open_folder
from gptc.checkpoint.merged import AdapterSet, merged
from gptc.convert.export_adapter import export_adapter
from gptc.convert.export_model import export_model
from gptc.engine import library
from gptc.engine.lora import targets_named
from gptc.engine.options import Options
from gptc.errors import GptcError, UsageError
from gptc.training.reference import without_adapters
from gptc.training.run import train
from runs import metrics, reproducible
from small_models import batch, make_checkpoint, make_config


def make_adapter(folder: Path, base: Path, targets: str, rank: int, dora: bool = True) -> Path:
    """An adapter with random numbers."""
    lora = Lora(rank, 2.5 * rank, targets_named(open_checkpoint(base).config, targets), dora=dora)
    rng = np.random.default_rng(rank)
    with Model.load(base, lora=lora, threads=1, dtype="fp32") as model:
        model.init_adapters(1)
        for name, shape, _ in model.trained:
            values = rng.normal(0, 0.4 / np.sqrt(shape[-1]), shape).astype(np.float32)
            model.set(name, values if len(shape) == 2 else model.get(name) * (1 + values))
        model.save_adapter(folder, base)
    return folder


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base of each family."""
    return make_checkpoint(make_config(request.param), folder=tmp_path / "base").path


def logits(path: Path) -> Any:
    with Model.load(path, dtype="fp32", threads=1) as model:
        return model.logits(batch(B=1)[0])


def test_adapters_run_on_a_gpu_if_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.gpu()._replace(problem=None)
    monkeypatch.setattr(library, "gpu", lambda: found)
    lora = Lora(2, 4.0, ("qkv",), dora=True)
    assert Options(lora=lora).resolved().device == "cpu"
    for dtype in ("bf16", "int8", "packed"):
        assert Options("cuda", dtype, lora=lora).resolved().device == "cuda"


def test_a_model_switches_between_adapters_and_none(base: Path, tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", base, "all", 2)
    two = make_adapter(tmp_path / "two", base, "qkv,mlp_proj", 5)
    wanted = {None: logits(base), "one": logits(one), "two": logits(two)}
    assert not np.allclose(wanted["one"], wanted["two"], atol=1e-2)
    file = open_checkpoint(base)
    adapters = AdapterSet(file, [one, two])
    with load_model(file, lora=adapters.lora, dtype="fp32", threads=1) as model:
        for name in ("one", "two", None, "one"):
            adapters.use(model, name)
            np.testing.assert_allclose(model.logits(batch(B=1)[0]), wanted[name], atol=3e-5)
        with without_adapters(model):
            np.testing.assert_allclose(model.logits(batch(B=1)[0]), wanted[None], atol=3e-5)
        np.testing.assert_allclose(model.logits(batch(B=1)[0]), wanted["one"], atol=3e-5)
    plain = make_adapter(tmp_path / "plain", base, "all", 2, dora=False)
    with pytest.raises(UsageError, match="between adapters with DoRA, or between others"):
        _ = AdapterSet(file, [one, plain]).lora


def test_a_merged_model_computes_the_same_and_a_gguf_adapter_is_refused(
    base: Path, tmp_path: Path
) -> None:
    one = make_adapter(tmp_path / "one", base, "all", 2)
    file = open_checkpoint(one)
    export_model(merged(file), "hf", tmp_path / "whole")
    np.testing.assert_allclose(logits(tmp_path / "whole"), logits(one), atol=3e-5)
    model = open_checkpoint(base)
    export_adapter(model, open_folder(one, model), "hf", tmp_path / "back")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (one / weights).read_bytes()
    with pytest.raises(GptcError, match="no place for the magnitudes of DoRA"):
        export_adapter(model, open_folder(one, model), "gguf", tmp_path / "one.gguf")


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_contradicts_its_config_is_refused(tmp_path: Path, dora: bool) -> None:
    base = make_checkpoint(make_config("llama"), folder=tmp_path / "base").path
    folder = make_adapter(tmp_path / "one", base, "q", 2, dora=dora)
    (folder / "checksums.json").unlink()
    file = folder / "adapter_config.json"
    described = json.loads(file.read_text())
    assert described["use_dora"] == dora
    file.write_text(json.dumps({**described, "use_dora": not dora}))
    with pytest.raises(GptcError, match="lora_magnitude_vector"):
        open_folder(folder)


def test_a_run_lowers_the_loss_and_is_resumed_with_the_same_bits(
    base: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog sat on the cat. " * 60)
    given: dict[str, Any] = {
        "data": str(text),
        "init_from": str(base),
        "out": str(tmp_path / "run"),
        "steps": 16,
        "batch_size": 2,
        "seq_len": 24,
        "eval_every": 8,
        "eval_batches": 1,
        "lr": 2e-2,
        "threads": 1,
        "lora_rank": 3,
        "dora": True,
    }
    with pytest.raises(UsageError, match="--dora is of adapters"):
        train({**given, "lora_rank": 0})
    summary = train(given)
    assert summary.train_loss is not None
    assert summary.train_loss < 0.95 * metrics(given["out"])[0]["train_loss"]

    def interrupt(step: int, model: Model) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    parts = tmp_path / "parts"
    assert train({**given, "out": str(parts)}, on_step=interrupt).step == 3
    train({"recompute": "block"}, resume=parts)
    ends = [find_checkpoint(folder) for folder in (given["out"], parts)]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert reproducible(metrics(given["out"])) == reproducible(metrics(str(parts)))
    shutil.rmtree(parts)
