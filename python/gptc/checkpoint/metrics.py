"""The lines of a run's metrics.jsonl and samples.jsonl. A damaged line stops nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LONGEST_SAMPLE = 5000  # characters: a line is then shorter than the longest

Parse: TypeAlias = Callable[[bytes], "dict[str, Any] | None"]

_LONGEST = 1 << 16  # bytes of a line
_DIGITS = 18  # of a whole number: larger ones are damage, and may not be floats
_NUMBERS = ("tokens", "elapsed_s", "train_loss")


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record in a line, with its step and numbers; None for a damaged or incomplete line."""
    record = _of_step(line)
    if record is None:
        return None
    named = (record.get(name) for name in _NUMBERS)
    numbers = [*named, *(v for k, v in record.items() if k.startswith("val_"))]
    return record if all(type(number) in (int, float) for number in numbers) else None


def sample_of(line: bytes) -> dict[str, Any] | None:
    """The step and text of a sample in a line; None for a damaged or incomplete line."""
    record = _of_step(line)
    return record if record and isinstance(record.get("text"), str) else None


def _of_step(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_int=_whole) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > _DIGITS:
        raise ValueError(digits)
    return int(digits)


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; one without an end is cut."""
    return iter(partial(file.readline, _LONGEST), b"")


def read_records(path: Path, parse: Parse = record_of) -> list[dict[str, Any]]:
    """The records of a file; none for a missing one."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [record for line in lines_of(file) if (record := parse(line))]


def end_of(file: IO[bytes], step: int, parse: Parse = record_of) -> int:
    """Where the lines up to a step end. Damaged lines between them stay."""
    end = at = 0
    for line in lines_of(file):
        at += len(line)
        if record := parse(line):
            if record["step"] > step:
                break
            end = at
    return end
