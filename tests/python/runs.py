"""Metrics of a training run; tensors and checksums of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptc.files.checksum import file_checksum


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


def sign(file: Path) -> None:
    """Gives a changed file of a checkpoint its right checksum, as a stranger would."""
    recorded = file.with_name("checksums.json")
    sums = json.loads(recorded.read_bytes())
    sums["files"][file.name] = {"size": file.stat().st_size, "checksum": file_checksum(file)}
    recorded.write_text(json.dumps(sums))
