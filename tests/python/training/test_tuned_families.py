"""A model of each family is trained on, and its checkpoints are of that family again.

The class: a feature of a family that a run of training loses.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.find import find_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.formats.registry import open_model
from gptc.training.run import train
from small_models import make_checkpoint, make_config

Options = dict[str, Any]

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"window": 6},
    "qwen2": {"qkv_bias": True, "tied": True},
    "qwen3": {"qk_norm": True, "head_dim": 12},
}
HAVE_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def tuned(family: str, options: Options, tmp_path: Path) -> Path:
    """The checkpoint of a run that began with a small model of the family."""
    make_checkpoint(make_config("llama", **FAMILIES[family]), folder=tmp_path / "base")
    base = {k: v for k, v in options.items() if k not in ("preset", "out") and k[:2] != "n_"}
    given = {**base, "init_from": str(tmp_path / "base"), "out": str(tmp_path / "tuned")}
    return find_checkpoint(train({**given, "steps": 4, "lr": 1e-3}).out)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_model_keeps_its_family(
    family: str, options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Checkpoint(tuned(family, options, tmp_path))
    assert f"({family})" in capsys.readouterr().err
    base = Checkpoint(tmp_path / "base")
    assert found.config == base.config
    assert json.loads((found.path / "config.json").read_text())["model_type"] == family
    for name, _, _ in base.config.parameters():
        assert not np.array_equal(found.read(name), base.read(name)), name
    assert train({"steps": 6}, resume=str(tmp_path / "tuned")).step == 6
    export_model(found, "gguf", tmp_path / "m.gguf")
    assert open_model(tmp_path / "m.gguf").config == found.config


@pytest.mark.parity
@pytest.mark.skipif(not HAVE_TORCH, reason="needs torch and transformers")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_a_run_loads_in_transformers(
    family: str, options: Options, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tuned(family, options, tmp_path)
    tokens = np.array([[72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33]], np.int32)
    with Model.load(folder, threads=1) as model:
        ours = model.logits(tokens)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.config.model_type == family
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.linalg.norm(ours - logits) < 1e-4 * np.linalg.norm(logits)
    assert AutoTokenizer.from_pretrained(folder)("Hello").input_ids == tokens[0, :5].tolist()
