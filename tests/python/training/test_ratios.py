"""Update-to-weight ratios are those of the weights, and samples are kept with their steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.metrics import SAMPLES, read_records, sample_of
from gptc.training.ratios import UpdateRatios, kind_of
from gptc.training.run import train
from runs import metrics, reproducible

Options = dict[str, Any]


def test_kinds_are_names_without_layers() -> None:
    assert kind_of("h.11.attn.qkv.weight") == "attn.qkv"
    assert kind_of("h.11.mlp.experts.12.fc.weight") == "mlp.experts.fc"
    assert kind_of("wte.weight") == "wte"


def test_ratios_are_those_of_the_weights(model: Model) -> None:
    matrices = [p for p in model.trained if p.decay]
    before = {p.name: model.get(p.name) for p in matrices}
    ratios = UpdateRatios(model)
    tokens = np.arange(64, dtype=np.int32).reshape(4, 16)
    model.train_step(tokens, tokens, lr=1e-2)
    found = ratios.measure()
    assert set(found) == {"update_ratio/" + kind_of(p.name) for p in matrices}
    for key, ratio in found.items():
        kind = key.removeprefix("update_ratio/")
        names = [p.name for p in matrices if kind_of(p.name) == kind]
        change = sum(float(((model.get(name) - before[name]) ** 2).sum()) for name in names)
        size = sum(float((before[name] ** 2).sum()) for name in names)
        # All numbers of a small matrix are compared, a sample of a large one.
        exact = all(before[name].size <= 4096 for name in names)
        assert ratio == pytest.approx((change / size) ** 0.5, rel=1e-5 if exact else 0.1), kind
    model.set("h.0.attn.qkv.weight", np.zeros_like(before["h.0.attn.qkv.weight"]))
    model.set("h.1.attn.qkv.weight", np.zeros_like(before["h.1.attn.qkv.weight"]))
    assert "update_ratio/attn.qkv" not in UpdateRatios(model).measure()


def test_a_run_has_them_at_its_evaluations(options: Options) -> None:
    train({**options, "steps": 9})
    lines = metrics(options["out"])
    with_ratios = [line["step"] for line in lines if "update_ratio/mlp.fc" in line]
    assert with_ratios == [4, 8, 9]
    assert 1e-4 < lines[3]["update_ratio/mlp.fc"] < 1


def test_samples_are_kept_and_cut_where_a_run_resumes(options: Options) -> None:
    train({**options, "sample_every": 3})
    file = Path(options["out"]) / SAMPLES
    whole = read_records(file, sample_of)
    assert [sample["step"] for sample in whole] == [3, 6, 8]
    assert all(sample["text"] for sample in whole)
    with file.open("a") as more:  # of a process that was killed after its last checkpoint
        more.write(json.dumps({"step": 9, "text": "later"}) + "\n" + '{"step": 1')
    train({"steps": 12}, resume=options["out"])
    assert [s["step"] for s in read_records(file, sample_of)] == [3, 6, 8, 9, 12]
    assert read_records(file, sample_of)[3]["text"] != "later"
    first = reproducible(metrics(options["out"]))[:8]
    assert "update_ratio/wte" in first[7]
