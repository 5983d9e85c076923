"""`gptc bench` measures every part, and the parts add up; speed itself is not tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gptc.bench import rivals
from gptc.cli import cli
from gptc.files.words import pip_install
from small_models import make_checkpoint, make_config

Gptc = Callable[..., Any]


def test_bench_infer_times_every_dtype(gptc: Gptc) -> None:
    ran = gptc("bench", "infer", "--preset", "tiny", "--turns", 1, "--prompt-tokens", 32, "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert [row["name"] for row in result["results"]] == [
        f"gptc {dtype}" for dtype in ("fp32", "bf16", "int8", "int4")
    ]
    for row in result["results"]:
        assert min(*row["decode"].values(), row["prefill"]) > 0
        assert list(row["decode"]) == ["1", "16"]


def test_bench_infer_times_a_model_that_is_there(gptc: Gptc, tmp_path: Path) -> None:
    model, short = tmp_path / "model", tmp_path / "short"
    make_checkpoint(make_config("llama", block_size=100), folder=model)
    make_checkpoint(make_config("llama"), folder=short)
    few = ("--turns", 1, "--prompt-tokens", 4, "--batch", 1, "--dtype", "fp32", "--json")
    ran = gptc("bench", "infer", "-m", model, *few)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["config"] == json.loads(gptc("info", model, "--json").out)["config"]
    refused = gptc("bench", "infer", "-m", short, *few)
    assert "the model's context is 48 tokens, and this takes 88" in refused.err


def test_a_rival_that_is_not_installed_is_named(
    gptc: Gptc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda module: None)
    for name, rival in rivals.RIVALS.items():
        ran = gptc("bench", "infer", "--preset", "tiny", "--against", name)
        assert ran.code == 1
        assert f"{name} is not installed; try: {pip_install(*rival.packages)}" in ran.err


class Clock(rivals.Writer):
    """A program whose prompts take a second a token, and whose tokens take two."""

    name = "clock"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.prompts = 0.0, list[tuple[int, ...]]()
        monkeypatch.setattr(rivals.time, "perf_counter", lambda: self.now)

    def write(self, prompts: Any, n: int) -> float:
        self.prompts.append(tuple(prompts[0]))
        self.now += prompts.shape[1] + 2 * (n - 1)
        return 2.0 * (n - 1)


def test_a_program_that_writes_in_one_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert clock.decode(16, 6) == 12
    assert [clock.prefill(n) for n in (512, 512)] == [512, 512]
    assert len(set(clock.prompts)) == 3


def test_converters_get_a_name_of_each_token(saved: Path, tmp_path: Path) -> None:
    rivals.name_tokens(saved, tmp_path / "named")
    found = {file.name: file for file in (tmp_path / "named").iterdir()}
    words = json.loads(found["tokenizer.json"].read_text())["model"]["vocab"]
    config = json.loads(found["config.json"].read_text())
    assert list(words.values()) == list(range(config["vocab_size"]))
    assert found["model.safetensors"].read_bytes() == (saved / "model.safetensors").read_bytes()


TINY = ["--preset", "tiny", "--batch-size", "2", "--seq-len", "16", "--steps", "1"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ops_add_up_to_the_step(dtype: str) -> None:
    result = CliRunner().invoke(cli, ["bench", "ops", *TINY, "--dtype", dtype, "--json"])
    assert result.exit_code == 0, result.output
    bench = json.loads(result.stdout)
    assert bench["dtype"] == dtype
    names = {op["name"].split()[0] for op in bench["ops"]}
    assert {"linear_forward", "linear_backward", "attention_backward", "adamw_update"} <= names
    assert 0 < sum(op["ms"] for op in bench["ops"]) <= bench["step_ms"]
    assert bench["busy"][0] > 0
    assert all(0 <= busy <= 1.01 for busy in bench["busy"])
    assert bench["peak_flops"] > 0
    assert bench["peak_bytes"] > 0


def test_ops_as_a_table() -> None:
    result = CliRunner().invoke(cli, ["bench", "ops", *TINY])
    assert result.exit_code == 0, result.output
    assert "linear_backward 256 x 96" in result.stdout
    assert "each thread was at work for: " in result.stdout


def test_train_reports_a_rate() -> None:
    result = CliRunner().invoke(cli, ["bench", "train", *TINY, "--turns", "1", "--json"])
    assert result.exit_code == 0, result.output
    bench = json.loads(result.stdout)
    assert [row["name"] for row in bench["results"]] == ["gptc"]
    assert bench["results"][0]["tokens_per_s"] > 0
