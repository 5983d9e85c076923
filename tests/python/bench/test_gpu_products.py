"""`gptc bench ops --device cuda` shows the plan and the rate of each GEMM of cuBLASLt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gptc.bench.ops import table
from gptc.cli import cli
from gptc.engine import library

TINY = ["--preset", "tiny", "--batch-size", "1", "--seq-len", "8", "--steps", "1"]
needs_gpu = pytest.mark.skipif(
    library.gpu().problem is not None, reason="needs a GPU, or the emulated library"
)


def row(**changes: Any) -> dict[str, Any]:
    """A GEMM as `bench_ops` returns it."""
    return {
        "name": "a b^T 65536 x 3072 x 768",
        "epilogue": "gelu, bias",
        "plan": "algorithm 66, tile 128x256, stages 36, cluster 3, split-K 1, 0.0 MB",
        "problem": "",
        "calls": 12,
        "ms": 6.0,
        "flops_per_s": 620e12,
        "bytes_per_s": 900e9,
        "of_peak_flops": 0.8,
        **changes,
    }


def lines(*products: dict[str, Any]) -> list[str]:
    """The table's lines about GEMMs."""
    bench = {
        "batch_size": 64,
        "seq_len": 1024,
        "device": "cuda",
        "dtype": "bf16",
        "threads": 1,
        "steps": 1,
        "step_ms": 100.0,
        "ops": [],
        "busy": [0.0],
        "peak_flops": 775e12,
        "peak_bytes": 4e12,
        "products": list(products),
        "levels": [],
    }
    return [line for line in table(bench).splitlines() if line.startswith(("GEMMs", "a b"))]


def test_a_gemm_has_its_rate_and_its_plan() -> None:
    head, line = lines(row())
    assert head.split()[-5:] == ["TFLOP/s", "of", "peak", "GB/s", "plan"]
    assert "620.0" in line
    assert "80%" in line
    assert line.endswith("tile 128x256, stages 36, cluster 3, split-K 1, 0.0 MB")


def test_a_fallback_is_seen() -> None:
    refused = row(plan="", problem="the epilogue is not fused", ms=0.0)
    earlier = row(problem="an algorithm of an earlier architecture")
    _, first, second = lines(refused, earlier)
    assert first.endswith("  ! the epilogue is not fused")
    assert "620" not in first
    assert second.endswith("0.0 MB; ! an algorithm of an earlier architecture")


def test_no_gemms_no_lines() -> None:
    assert lines() == []


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gemms_of_a_step(dtype: str) -> None:
    args = ["bench", "ops", *TINY, "--device", "cuda", "--dtype", dtype, "--json"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    products = json.loads(result.stdout)["products"]
    assert len(products) > 8
    for gemm in products:
        assert gemm["calls"] >= 1
        assert gemm["problem"] or gemm["plan"].startswith("algorithm ")
        assert gemm["problem"] == "the epilogue is not fused" or gemm["flops_per_s"] > 0


@needs_gpu
def test_plans_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path))
    monkeypatch.setenv("GPTC_TUNE", "1")
    monkeypatch.delenv("GPTC_PLANS", raising=False)
    library.keep_plans()
    result = CliRunner().invoke(cli, ["bench", "ops", *TINY, "--device", "cuda"])
    assert result.exit_code == 0, result.output
    kept = list((tmp_path / "plans").iterdir())
    assert len(kept) == 1
    assert kept[0].suffix == ".plans"
    assert kept[0].read_text().startswith("gptc plans 1, ")


def test_without_tuning_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path))
    monkeypatch.delenv("GPTC_TUNE", raising=False)
    monkeypatch.delenv("GPTC_PLANS", raising=False)
    library.keep_plans()
    assert not list(tmp_path.iterdir())
