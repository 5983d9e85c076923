"""nanoGPT's checkpoints are read, and never executed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.registry import open_model
from small_models import make_checkpoint

Config = Callable[..., GPTConfig]


def test_nanogpt_without_torch_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "ckpt.pt"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(GptcError, match=r"only PyTorch reads safely: .*pip install torch"):
        open_model(path)


@pytest.mark.parity
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_nanogpt(config: Config, tmp_path: Path) -> None:
    import torch

    source = make_checkpoint(config("gpt2", bias=False), folder=tmp_path / "source")
    weights = {}
    for name, _, _ in source.config.parameters():
        theirs = name.replace("attn.qkv", "attn.c_attn").replace("attn.proj", "attn.c_proj")
        theirs = theirs.replace("mlp.fc", "mlp.c_fc").replace("mlp.proj", "mlp.c_proj")
        theirs = theirs.replace("norm_", "ln_")
        weights[f"_orig_mod.transformer.{theirs}"] = torch.from_numpy(source.read(name).copy())
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "vocab_size": 256}
    saved = {"model": weights, "model_args": {**sizes, "bias": False, "dropout": 0.0},
             "iter_num": 3, "config": {"x": 1}}  # fmt: skip
    path = tmp_path / "ckpt.pt"
    torch.save(saved, path)
    ours = open_model(path)
    assert ours.config == source.config
    for name, _, _ in source.config.parameters():
        assert np.array_equal(ours.read(name), source.read(name)), name

    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({**saved, "config": Harm()}, path)
    with pytest.raises(GptcError, match="PyTorch does not load it"):
        open_model(path)
    assert not (tmp_path / "harm").exists()
    whole = path.read_bytes()
    for n in (5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(GptcError):
            open_model(path)
