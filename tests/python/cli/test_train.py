"""`gptc train` does what a new user types first, and an interrupted run is saved."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from processes import spawn, spawned

Gptc = Callable[..., Any]


def test_train_infer_and_info_without_naming_anything(arguments: list[str], tmp_path: Path) -> None:
    """The first commands of the README, with a smaller model; standard output has only results."""
    out = arguments.index("--out")
    del arguments[out : out + 2]
    process = spawn("train", *arguments, cwd=tmp_path)
    sample, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sample.strip()
    for part in ("training in runs/tiny-fable", "step 8/8", "saved runs/tiny-fable/ckpt-000008"):
        assert part in err
    assert "next: gptc infer -m runs/tiny-fable -p " in err

    process = spawn("infer", "-p", "the", "--max-tokens", 5, cwd=tmp_path, stdin=subprocess.DEVNULL)
    text, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.fullmatch(r"seed \d+\n", err)
    assert text.startswith("the")

    process = spawn("info", "runs/tiny-fable", cwd=tmp_path)
    table, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "newest ckpt-000008" in table


def test_the_summary_as_json_and_the_memory_it_took(arguments: list[str], tmp_path: Path) -> None:
    for option, value in (("--n-embd", "128"), ("--n-ff", "512"), ("--n-layer", "6")):
        arguments[arguments.index(option) + 1] = value
    arguments += ["--batch-size", "8", "--seq-len", "128", "--json"]
    process = spawn("train", *arguments, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["finished"] is True
    assert summary["step"] == 8
    assert summary["options"]["n_layer"] == 6
    assert summary["sample"]
    assert summary["engine_bytes"] > 50e6
    # The process's peak memory is the planned one: see docs/architecture.md.
    assert summary["peak_resident_bytes"] == pytest.approx(summary["planned_peak_bytes"], rel=0.1)


def test_a_config_file_and_options_that_win(
    gptc: Gptc, options: dict[str, Any], tmp_path: Path
) -> None:
    lines = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in options.items()]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    ran = gptc("train", "--config", tmp_path / "run.toml", "--steps", "3", "--no-bias", "--json")
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out)
    assert summary["step"] == 3
    assert summary["options"]["n_embd"] == 32
    assert summary["options"]["bias"] is False


def test_sizes_take_suffixes(gptc: Gptc, arguments: list[str]) -> None:
    at = arguments.index("--steps")
    arguments[at : at + 2] = ["--tokens", "0.1K"]
    ran = gptc("train", *arguments, "--json")
    assert json.loads(ran.out)["steps"] == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupting_saves_and_says_how_to_resume(
    arguments: list[str], tmp_path: Path, number: int
) -> None:
    arguments[arguments.index("--steps") + 1] = "100000"
    arguments += ["--log-every", "1"]
    process = spawn("train", *arguments, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 30
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "stopping and saving" in err
    assert f"resume with: gptc train --resume {tmp_path / 'run'}" in err
    assert "Traceback" not in err
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "run" / f"ckpt-{step:06d}" / "checksums.json").exists()

    process = spawn("train", "--resume", tmp_path / "run", "--steps", step + 2, cwd=tmp_path)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert f"from {step:,} to {step + 2:,}" in err


def test_only_what_was_saved_is_called_saved(
    gptc: Gptc, arguments: list[str], tmp_path: Path
) -> None:
    assert "\nsaved " in gptc("train", *arguments).err
    again = gptc("train", "--resume", tmp_path / "run")
    assert again.code == 0
    assert "--steps 16" in again.err
    assert "\nsaved " not in again.err


def test_a_closed_terminal_ends_the_run_saved(arguments: list[str], tmp_path: Path) -> None:
    arguments[arguments.index("--steps") + 1] = "100000"
    arguments += ["--log-every", "1"]
    terminal, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gptc", "train", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    spawned.append(process)
    os.close(theirs)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 30
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        os.set_blocking(terminal, False)
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        time.sleep(0.02)
    os.close(terminal)  # the system sends SIGHUP, and later writes fail
    assert process.wait(timeout=30) == 128 + signal.SIGHUP
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "run" / f"ckpt-{step:06d}" / "checksums.json").exists()


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&1 | head -1", "2>&1 >/dev/full"])
def test_training_does_not_need_to_be_heard(
    arguments: list[str], tmp_path: Path, redirection: str
) -> None:
    train = shlex.join([sys.executable, "-m", "gptc", "train", *arguments])
    command = ["bash", "-c", f"{train} {redirection}; exit ${{PIPESTATUS[0]}}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, "Error" in ran.stderr) == (0, False)
    assert (tmp_path / "run" / "ckpt-000008" / "checksums.json").exists()


def test_resume_without_a_value_takes_the_newest_run(
    gptc: Gptc, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    del options["out"]
    args = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    assert gptc("train", *args).code == 0
    assert gptc("train", *args).code == 0
    ran = gptc("train", "--resume", "--steps", "9", "--json")
    assert (ran.code, json.loads(ran.out)["out"]) == (0, "runs/tiny-fable-2")


def test_resume_with_out_continues_the_run_there(
    gptc: Gptc, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume alone would search runs/, which is empty here."""
    monkeypatch.chdir(tmp_path)
    out = options["out"]
    args = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    assert gptc("train", *args).code == 0
    ran = gptc("train", "--out", out, "--resume", "--steps", "9", "--json")
    summary = json.loads(ran.out)
    assert (ran.code, summary["out"], summary["first_step"]) == (0, out, 8)
    nowhere = gptc("train", "--out", str(tmp_path / "none"), "--resume")
    assert nowhere.code == 1
    assert f"{tmp_path / 'none'} does not exist" in nowhere.err
