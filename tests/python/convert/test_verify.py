"""Verification reads datasets, shards and every checkpoint of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc.convert.verify import verify
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from small_models import make_checkpoint

Config = Callable[..., GPTConfig]

Gptc = Callable[..., Any]


def test_verify_looks_at_datasets_and_runs(dataset_folder: Path, gptc: Gptc) -> None:
    assert "every token in the vocabulary" in gptc("verify", dataset_folder).out
    shard = next(dataset_folder.glob("*.bin"))
    assert verify(shard)["format"] == "shard"
    ran = gptc("verify", dataset_folder.parent / "nowhere")
    assert (ran.code, ran.out) == (1, "")


def test_verify_looks_at_every_checkpoint_of_a_run(config: Config, tmp_path: Path) -> None:
    for step in (3, 6):
        make_checkpoint(config(), folder=tmp_path / "run" / f"ckpt-{step:06}")
    found = verify(tmp_path / "run")
    assert found["format"] == "run"
    assert "ckpt-000003: model.safetensors: its checksum is right" in found["checks"]
    weights = tmp_path / "run" / "ckpt-000003" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    message = r"ckpt-000003/model\.safetensors was altered or damaged: .*; whole are: ckpt-000006$"
    with pytest.raises(GptcError, match=message):
        verify(tmp_path / "run")
    (tmp_path / "run" / "ckpt-000006" / "config.json").write_text("{}")
    with pytest.raises(GptcError, match=r"ckpt-000003/.*ckpt-000006/.*; whole are: none$"):
        verify(tmp_path / "run")
