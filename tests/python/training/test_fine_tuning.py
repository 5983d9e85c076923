"""Fine-tuning begins with the weights of another model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gptc.checkpoint.find import find_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.training.run import train
from runs import metrics

Options = dict[str, Any]


def test_fine_tuning_begins_with_the_weights(options: Options, tmp_path: Path) -> None:
    train({**options, "steps": 30, "lr": 1e-2})
    learned = metrics(options["out"])[-1]["val_loss"]
    base = {k: v for k, v in options.items() if k not in ("preset", "out") and k[:2] != "n_"}
    summary = train({**base, "init_from": options["out"], "out": str(tmp_path / "tuned")})
    first = metrics(summary.out)[0]
    assert first["train_loss"] < learned + 1
    stored = Checkpoint(find_checkpoint(summary.out)).trainer()
    assert stored is not None
    assert stored["step"] == 8  # a fresh optimizer and count
    assert train({"steps": 9}, resume=summary.out).step == 9
    shutil.rmtree(options["out"])  # a resumed run needs its own checkpoints only
    assert train({"steps": 10}, resume=summary.out).step == 10


def test_the_name_of_a_fine_tuned_run(
    options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    train({**options, "out": "runs/first"})
    summary = train({"init_from": "runs/first", "data": options["data"], "steps": 1})
    assert summary.out == "runs/first-fable"
    assert summary.options["seq_len"] == 16  # the model's context, though the default is longer
    assert "--seq-len" not in capsys.readouterr().err  # it was not given
    train({"steps": 2}, resume=summary.out)
    assert f"from {tmp_path / 'runs/first'}" in capsys.readouterr().err
    train({"init_from": "runs/first", "data": options["data"], "steps": 1, "seq_len": 99})
    assert "--seq-len is lowered to the model's context of 16" in capsys.readouterr().err
