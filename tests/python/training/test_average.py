"""An average of the weights: computed, evaluated, saved and resumed exactly."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.find import find_checkpoint
from gptc.data.dataset import Dataset
from gptc.eval.loss import evaluate
from gptc.formats.safetensors import TensorFile
from gptc.training.run import train
from runs import content, metrics, reproducible

Options = dict[str, Any]
DECAY = 0.5
NAME = "h.0.mlp.proj.weight"


def _own(run: object) -> TensorFile:
    return TensorFile(find_checkpoint(str(run)) / "optimizer.safetensors")


def test_the_checkpoint_has_the_average_and_the_run_its_weights(
    options: Options, tmp_path: Path
) -> None:
    seen: list[np.ndarray] = []
    given = {**options, "dtype": "fp32", "lr": 1e-2, "ema": DECAY, "eval_batches": 0}
    summary = train(given, on_step=lambda step, model: seen.append(model.get(NAME).astype(float)))
    with Model.load(options["out"], device="cpu", max_batch=2) as model:
        (name,) = [n for n in model.parameters() if n == NAME]
        saved = model.get(name)
        dataset = Dataset.open(options["data"])
        result = evaluate(model, dataset, batch_size=2, seq_len=16)
    assert summary.val_loss == pytest.approx(result.loss, abs=1e-6)
    plain = train({**given, "ema": 0.0, "out": str(tmp_path / "plain"), "steps": 8})
    assert plain.val_loss != summary.val_loss
    with Model.load(plain.out, device="cpu") as model:
        first = model.get(NAME)
    np.testing.assert_array_equal(_own(options["out"]).read(f"own.{NAME}"), first)
    np.testing.assert_array_equal(first, seen[-1])
    # From the weights before the first step, which have a share of all the decays.
    shares = [min(DECAY, (1 + t) / (10 + t)) for t in range(1, 9)]
    with Model.create(model.config, init=False, seed=1337) as begin:
        begin.init(1337)
        average = begin.get(NAME).astype(float)
    for share, weights in zip(shares, seen, strict=True):
        average = share * average + (1 - share) * weights
    np.testing.assert_allclose(saved, average, atol=1e-6)
    assert np.abs(saved - first).max() > 1e-3


def test_resuming_is_exact(options: Options, tmp_path: Path) -> None:
    given = {**options, "ema": 0.9, "lr": 1e-2}
    whole = train(given)
    parts = str(tmp_path / "parts")

    def stop(step: int, model: Model) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    train({**given, "out": parts}, on_step=stop)
    train({}, resume=parts)
    assert content(find_checkpoint(parts)) == content(find_checkpoint(whole.out))
    assert reproducible(metrics(parts)) == reproducible(metrics(whole.out))


def test_an_average_ends_or_begins_on_resume(options: Options, tmp_path: Path) -> None:
    plain = train({**options, "ema": 0.0, "steps": 8, "out": str(tmp_path / "plain")})
    train({**options, "ema": 0.9, "steps": 4, "schedule": "constant"})
    train({"ema": 0.0, "steps": 8}, resume=options["out"])
    both = train({**options, "steps": 8, "schedule": "constant", "out": str(tmp_path / "constant")})
    assert plain.step == both.step == 8
    got, want = (content(find_checkpoint(str(out))) for out in (options["out"], both.out))
    assert got == want  # as if there had been none
    assert not [name for name in _own(options["out"]).shapes if name.startswith("own.")]
    train({"ema": 0.9, "steps": 9}, resume=options["out"])
    assert f"own.{NAME}" in _own(options["out"]).shapes


def test_adapters_have_an_average(options: Options, saved: Path, tmp_path: Path) -> None:
    given = {name: options[name] for name in ("data", "batch_size", "seq_len", "eval_every")}
    given |= {"init_from": str(saved), "lora_rank": 2, "lr": 1e-2, "ema": 0.9, "threads": 1}
    whole = train({**given, "steps": 4, "schedule": "constant", "out": str(tmp_path / "whole")})
    parts = str(tmp_path / "parts")
    train({**given, "steps": 2, "schedule": "constant", "out": parts})
    train({"steps": 4}, resume=parts)
    assert content(find_checkpoint(parts)) == content(find_checkpoint(whole.out))
    stored = _own(whole.out).shapes
    assert {name for name in stored if name.startswith("own.")} == {
        f"own.{name[2:]}" for name in stored if name.startswith("m.")
    }
