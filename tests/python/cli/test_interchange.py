"""`gptc export`, `verify` and `import` move a model between formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.engine.config import GPTConfig
from small_models import make_checkpoint

Config = Callable[..., GPTConfig]

Gptc = Callable[..., Any]


def test_the_three_commands(config: Config, tmp_path: Path, gptc: Gptc) -> None:
    make_checkpoint(config("llama"), folder=tmp_path / "source")
    file = tmp_path / "model.gguf"
    ran = gptc("export", "-m", tmp_path / "source", "--to", "gguf", "--out", file)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"wrote {file}\nread back: logits of 16 tokens are the same\n"
    ran = gptc("export", "-m", tmp_path / "source", "--to", "gguf", "--out", file)
    assert ran.code == 2
    assert "--force" in ran.err
    args = ("--to", "gguf", "--dtype", "BF16", "--out", file, "--force", "--json")
    report = json.loads(gptc("export", "-m", tmp_path / "source", *args).out)
    assert report["files"] == [str(file)]
    assert 0 < report["relative_difference"] < 1e-2

    ran = gptc("verify", file)
    assert ran.code == 0
    assert ran.out.startswith(f"{file}: gguf, nothing wrong\n  21 tensors, every number finite\n")
    assert json.loads(gptc("verify", file, "--json").out)["format"] == "gguf"

    ran = gptc("import", file, "--out", tmp_path / "again")
    assert (ran.code, ran.out) == (0, f"{file} (gguf) is now the checkpoint {tmp_path / 'again'}\n")
    assert "checksum" in gptc("verify", tmp_path / "again").out
    assert "a file of gguf" in gptc("info", file).out
    assert json.loads(gptc("info", file, "--json").out)["parameters"] == 30_368
    assert gptc("infer", "-m", file, "-p", "x", "--max-tokens", 3).out.startswith("x")

    data = bytearray(file.read_bytes())
    data[-400:-396] = b"\xff\xff\xff\x7f"
    file.write_bytes(data)
    ran = gptc("verify", file)
    assert ran.code == 1
    assert "holds nan at index" in ran.err


def test_a_run_can_begin_from_a_file(
    config: Config, tmp_path: Path, gptc: Gptc, dataset_folder: Path
) -> None:
    source = make_checkpoint(config("byte", n_head=8), folder=tmp_path / "source")
    export_model(source, "heimerl", tmp_path / "_gpt.bin")
    out = tmp_path / "run"
    sizes = ("--steps", 2, "--batch-size", 2, "--seq-len", 16, "--eval-batches", 1)
    where = ("--data", dataset_folder, "--out", out)
    ran = gptc("train", "--init-from", tmp_path / "_gpt.bin", *where, *sizes)
    assert ran.code == 0, ran.err
    assert Checkpoint(out / "ckpt-000002").config.n_embd == 32
