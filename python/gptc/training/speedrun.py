"""Speedruns: each run is a process, and its time goes into a table.

The time is that of the whole process, from its start to its end: imports, the model, all steps, the
evaluation over the whole validation split and the last checkpoint. Data are prepared before.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gptc._version import __version__
from gptc.checkpoint.metrics import METRICS, read_records
from gptc.data.preparation import resolve_dataset
from gptc.engine import library
from gptc.errors import GptcError, UsageError
from gptc.settings import spelled
from gptc.training.defaults import default_tokenizer
from gptc.training.expected import Rule
from gptc.training.options import TrainOptions

WHOLE = {"eval_batches": 0, "eval_every": 1_000_000_000}  # evaluated once, after the last step


@dataclass(frozen=True)
class Recipe:
    """Options of `gptc train`, and the measure of the result that a target is for."""

    options: Mapping[str, Any]
    measure: str  # "val_loss", in nats per token, or "val_bpb", in bits per byte
    target: float | None = None
    rule: Rule | None = None  # of the results of shorter, longer, smaller and larger runs


RECIPES = {
    # The characters and the context of nanoGPT's recipe for CPUs; the smallest shape that was
    # found to reach its loss.
    "shakespeare-char": Recipe(
        {
            "data": "shakespeare",
            "tokenizer": "char",
            "preset": "modern",
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 64,
            "n_ff": 192,
            "seq_len": 64,
            "batch_size": 16,
            "steps": 250,
            "schedule": "linear",
            "lr": 1.6e-2,
            "min_lr": 0.0,
            "warmup_steps": 5,
            "momentum_warmup": 50,
        },
        "val_loss",
        1.88,
        # Fitted to 17 runs, of which each is within 1.8 %: docs/log/2026-11-27-depth.md.
        Rule(1.2, 48.9, 0.5, 22.5, 0.3, margin=0.05),
    ),
    "stories": Recipe({"data": "stories", "preset": "modern", "minutes": 1.0}, "val_bpb"),
}


@dataclass(frozen=True)
class Attempt:
    """One process: its result, and the time that it took."""

    seed: int
    value: float  # of the recipe's measure
    steps: int
    tokens: int
    seconds: float  # by the clock, of the whole process
    cpu_seconds: float  # of all its threads
    load: float  # processes that wanted the CPU, on average of the last minute


@dataclass(frozen=True)
class Race:
    """The attempts of a recipe, one for each seed, and the machine they ran on."""

    recipe: str
    measure: str
    target: float | None
    options: Mapping[str, Any]
    attempts: list[Attempt]
    machine: Mapping[str, Any]
    version: str = __version__
    time: str = field(
        default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    )

    @property
    def median(self) -> Attempt:
        """The attempt with the median time; of an even number the slower one."""
        return sorted(self.attempts, key=lambda a: a.seconds)[len(self.attempts) // 2]

    @property
    def median_value(self) -> float:
        """The median of the results; of an even number the worse one."""
        return sorted(a.value for a in self.attempts)[len(self.attempts) // 2]

    @property
    def is_reached(self) -> bool:
        """Whether the median of the results is at or below the target; True without one."""
        return self.target is None or self.median_value <= self.target


def run_attempts(
    options: Mapping[str, Any], measure: str, seeds: int, folder: Path
) -> Iterator[Attempt]:
    """Runs the options with seeds 1 to `seeds`, each in another process and folder."""
    if not isinstance(options["data"], str):
        raise UsageError("gptc speedrun takes one --data: leave the others out")
    preset = str(options.get("preset") or TrainOptions.preset)
    known = TrainOptions(data=str(options["data"]), preset=preset)
    resolve_dataset(known.named_data, options.get("tokenizer") or default_tokenizer(known))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise GptcError(
            f"cannot write {folder}: {error.strerror}; choose another folder with --runs"
        ) from None
    for seed in range(1, seeds + 1):
        out = folder / f"seed-{seed}"
        if out.exists():
            raise UsageError(f"{out} exists already; choose another --runs or remove it")
        yield _attempt({**options, **WHOLE, "seed": seed, "out": str(out)}, measure)


def _run(arguments: list[str]) -> tuple[int, str]:
    """The exit code and the messages of a process, which ends when this one is told to."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        errors = process.communicate()[1]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return process.returncode, errors


def _attempt(options: Mapping[str, Any], measure: str) -> Attempt:
    load, before, begin = os.getloadavg()[0], _child_seconds(), time.perf_counter()
    code, errors = _run(command(options))
    seconds = time.perf_counter() - begin
    cpu_seconds = _child_seconds() - before
    if code:
        last = (errors.strip().splitlines() or ["no message"])[-1].removeprefix("gptc: error: ")
        raise GptcError(f"the run of seed {options['seed']} has failed: {last}")
    records = [r for r in read_records(Path(options["out"]) / METRICS) if measure in r]
    if not records:
        raise GptcError(f"{options['out']} has no {measure}: its validation split is too short")
    last_record = records[-1]
    return Attempt(
        options["seed"],
        last_record[measure],
        last_record["step"],
        last_record["tokens"],
        round(seconds, 2),
        round(cpu_seconds, 2),
        round(load, 2),
    )


def command(options: Mapping[str, Any]) -> list[str]:
    """The command that trains with these options."""
    words = [sys.executable, "-m", "gptc", "train"]
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{spelled(name)}")
        elif value is not None:
            words += [f"--{spelled(name)}", str(value)]
    return words


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine() -> dict[str, Any]:
    """The features of this machine on which the time depends."""
    return {
        "cpu": library.cpu_name(),
        "cores": library.load().lib.gpt_cpu_count(),
        "cpu_level": library.cpu_level(),
        "python": platform.python_version(),
    }


def append(file: Path, race: Race) -> None:
    """Adds a race as a line of JSON to a table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(race)) + "\n")
