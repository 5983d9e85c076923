"""The lines of a run's metrics.jsonl. A damaged line is passed over: it stops nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

METRICS = "metrics.jsonl"

_LONGEST = 1 << 16  # bytes of a line
_NUMBERS = ("tokens", "elapsed_s", "train_loss")


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record in a line, with its step and numbers; None for a damaged or incomplete line."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    named = (record.get(name) for name in _NUMBERS)
    numbers = [*named, *(v for k, v in record.items() if k.startswith("val_"))]
    return record if all(type(number) in (int, float) for number in numbers) else None


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; one without an end is cut."""
    return iter(partial(file.readline, _LONGEST), b"")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none for a missing one."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [record for line in lines_of(file) if (record := record_of(line))]


def end_of(file: IO[bytes], step: int) -> int:
    """Where the lines up to a step end. Damaged lines between them stay."""
    end = at = 0
    for line in lines_of(file):
        at += len(line)
        if record := record_of(line):
            if record["step"] > step:
                break
            end = at
    return end
