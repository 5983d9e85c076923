"""`gptc bench` measures every part, and the parts add up; speed itself is not tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from gptc.cli import cli

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
