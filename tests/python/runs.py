"""Reads the metrics of a training run and the tensors of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def reproducible(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics without the fields that depend on the clock."""
    clock = {"elapsed_s", "time", "tokens_per_s", "mfu"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def content(ckpt: Path) -> dict[str, bytes]:
    """The bytes of the safetensors files of a checkpoint."""
    return {f.name: f.read_bytes() for f in ckpt.iterdir() if f.suffix == ".safetensors"}
