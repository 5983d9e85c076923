"""A speedrun times whole processes, and a table keeps what they did."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptc.training.options import TrainOptions
from gptc.training.resolve import new_options
from gptc.training.speedrun import RECIPES, Attempt, Race, command

Gptc = Callable[..., Any]


def _race(values: list[float], seconds: list[float], target: float | None) -> Race:
    attempts = [
        Attempt(i, v, 1, 1, s, s, 0.0) for i, (v, s) in enumerate(zip(values, seconds, strict=True))
    ]
    return Race("shakespeare-char", "val_loss", target, {}, attempts, {})


def test_the_median_decides() -> None:
    race = _race([1.9, 1.7, 1.8], [3.0, 9.0, 4.0], 1.8)
    assert (race.median_value, race.median.seconds, race.is_reached) == (1.8, 4.0, True)
    assert not replace(race, target=1.79).is_reached
    assert replace(race, target=None).is_reached
    assert _race([1.9, 1.7], [1.0, 2.0], 1.8).is_reached is False  # of two, the worse one counts


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_options_of_train(name: str) -> None:
    options = new_options(RECIPES[name].options)
    assert options.optimizer == "muon"
    words = command({**RECIPES[name].options, "bias": True, "pin": False, "tokens": None})
    assert words[1:4] == ["-m", "gptc", "train"]
    assert "--bias" in words
    assert "--no-pin" in words
    assert "--tokens" not in words
    assert all(hasattr(TrainOptions, n) or n == "steps" for n in RECIPES[name].options)


def test_a_speedrun_of_two_seeds(gptc: Gptc, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 60)
    table, runs = tmp_path / "t" / "table.jsonl", tmp_path / "runs"
    shape = ("--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--n-ff", 16, "--seq-len", 16)
    given = ("--data", text, *shape, "--steps", 3, "--threads", 1, "--dtype", "fp32", "--seeds", 2)
    ran = gptc("speedrun", "shakespeare-char", *given, "--runs", runs, "--table", table)
    assert ran.code == 1
    assert "target 1.88 missed" in ran.out
    (row,) = map(json.loads, table.read_text().splitlines())
    assert [a["seed"] for a in row["attempts"]] == [1, 2]
    assert all(a["steps"] == 3 and a["cpu_seconds"] > 0 for a in row["attempts"])
    assert row["machine"]["cores"] >= 1
    assert row["options"]["n_embd"] == 16
    again = gptc("speedrun", "shakespeare-char", *given, "--runs", runs, "--table", table)
    assert again.code == 2
    assert "exists already; choose another --runs or remove it" in again.err
    reached = (*given, "--runs", tmp_path / "more", "--table", table, "--target", 99)
    assert gptc("speedrun", "shakespeare-char", *reached).code == 0
    assert len(table.read_text().splitlines()) == 2


def test_wrong_recipes_and_failed_runs_are_one_line(gptc: Gptc, tmp_path: Path) -> None:
    ran = gptc("speedrun", "marathon")
    assert ran.code == 2
    assert "unknown recipe 'marathon'; known: shakespeare-char, stories" in ran.err
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 60)
    ran = gptc("speedrun", "shakespeare-char", "--data", text, "--runs", text / "runs")
    assert ran.code == 1
    assert ran.err == (
        f"gptc: error: cannot write {text}/runs: Not a directory; choose another folder with "
        "--runs\n"
    )
    given = ("--data", text, "--n-head", 3, "--runs", tmp_path / "runs")
    ran = gptc("speedrun", "shakespeare-char", *given)
    assert ran.err.count("gptc: error: ") == 1
    assert ran.code == 1
    assert "the run of seed 1 has failed: " in ran.err
    assert "does not divide" in ran.err


def test_a_limit_replaces_the_recipe_s_limit(gptc: Gptc, tmp_path: Path) -> None:
    text, table = tmp_path / "text.txt", tmp_path / "table.jsonl"
    text.write_text("To be, or not to be, that is the question. " * 60)
    shape = ("--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--n-ff", 16, "--seq-len", 16)
    given = ("--data", text, *shape, "--steps", 2, "--threads", 1, "--seeds", 1)
    gptc("speedrun", "stories", *given, "--runs", tmp_path / "runs", "--table", table)
    (row,) = map(json.loads, table.read_text().splitlines())
    assert "minutes" not in row["options"]
    assert row["attempts"][0]["steps"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_run_ends_with_the_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 60)
    command = [sys.executable, "-m", "gptc", "speedrun", "stories", "--data", str(text)]
    command += ["--runs", str(tmp_path / "runs"), "--table", str(tmp_path / "t"), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        end = time.monotonic() + 60
        while not (tmp_path / "runs" / "seed-1" / "config.toml").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        (child,) = children.read_text().split()
        process.terminate()
        assert process.wait(120) == 128 + signal.SIGTERM
        assert not Path(f"/proc/{child}").exists()
    finally:
        process.kill()
