"""Every failure of a command is one clear line and the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.tokenizer.registry import make_tokenizer
from processes import spawn

Gptc = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["trian"], 2, "unknown command 'trian'; did you mean train?"),
        (["chat", "-m", "x"], 2, "unknown command 'chat'; use gptc infer -m MODEL --chat"),
        (["frobnicate"], 2, "unknown command 'frobnicate'; known: prepare, train"),
        (["train", "--stpes", "3"], 2, "--steps"),
        (["train", "--steps", "few"], 2, "'few' is not a whole number"),
        (["train", "--preset", "tinny"], 2, "did you mean tiny?"),
        (["train", "--threads", "-1"], 2, "-1 is less than 0"),
        (["train", "--threads", "10000"], 2, "--threads is 10000; it must be between 0 and"),
        (["train", "--batch-size", "100M"], 2, "--batch-size 100000000 x --seq-len"),
        (["train", "--seed", "-1"], 2, "-1 is less than 0"),
        (
            ["train", "--seed", str(2**63)],
            2,
            "--seed is 9223372036854775808; it must be below 2**63",
        ),
        (["train", "--steps", str(2**63)], 2, "it must be below 2**63"),
        (["train", "--data", "nowhere"], 1, "no dataset 'nowhere'"),
        (["train", "--n-head", "5"], 2, "n_head 5 does not divide n_embd 96"),
        (["train", "--resume", "--init-from", "x"], 2, "exclude each other"),
        (["train", "--resume"], 1, "there is no checkpoint under runs/"),
        (["train", "--config", "nowhere.toml"], 2, "cannot read nowhere.toml"),
        (["train", "--schedule", "cos"], 2, "'cos' is not one of"),
        (["infer"], 1, "there is no checkpoint under runs/; make one with: gptc train"),
        (["infer", "run"], 2, "unexpected argument run; did you mean -m run or -p run?"),
        (["infer", "-m", "run", "hi"], 2, "unexpected argument hi; did you mean -p hi?"),
        (
            ["infer", "-m", "a", "-p", "b", "c"],
            2,
            "usage: gptc infer [OPTIONS]; a value of several",
        ),
        (["eval", "my run"], 2, "did you mean -m 'my run' or --data 'my run'?"),
        (["train", "b.txt"], 2, "did you mean --preset b.txt?"),
        (["export", "run", "--to", "hf", "--out", "x"], 2, "did you mean -m run?"),
        (["bench", "train", "tiny"], 2, "did you mean --preset tiny?"),
        (["info", "-m", "run"], 2, "no option -m; usage: gptc info [OPTIONS] PATH"),
        (["infer", "-ngl", "99"], 2, "no option -ngl; --device cuda uses a GPU"),
        (["infer", "-p", "a", "-n", "9"], 2, "no option -n; use --max-tokens"),
        (["infer", "-cnv"], 2, "no option -cnv; use --chat"),
        (["infer", "-f", "a"], 2, "no option -f; use --prompt-file"),
        (["infer", "-c", "512"], 2, "no option -c; the context is the model's"),
        (["infer", "--temp", "1"], 2, "no option --temp; did you mean --temperature?"),
        (["serve", "-c", "512"], 2, "no option -c; use --context"),
        (["train", "--max_iters", "9"], 2, "no option --max_iters; use --steps"),
        (["train", "--batch_size", "9"], 2, "did you mean --batch-size"),
        (["finetune", "--resume", "a"], 2, "continued with gptc train --resume RUN"),
        (["verify", "a", "b"], 2, "unexpected argument b; usage: gptc verify [OPTIONS] PATH"),
        (["prepare", "--data", "x"], 2, "usage: gptc prepare [OPTIONS] [SOURCE]..."),
        (["doctor", "x"], 2, "unexpected argument x; usage: gptc doctor [OPTIONS]"),
        (["info", "nowhere"], 1, "nowhere does not exist"),
        (["info", "."], 1, ". is not a run, checkpoint or dataset"),
    ],
)
def test_errors_are_one_clear_line(
    gptc: Gptc,
    dataset_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "train" and "--data" not in arguments:
        arguments = [*arguments, "--data", str(dataset_folder)]
    ran = gptc(*arguments)
    assert ran.code == code
    assert message in ran.err
    lines = ran.err.splitlines()
    assert lines[0].startswith("gptc: error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("see: gptc"))
    assert ran.out == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    for arguments in (["--debug", "info", "nowhere"], ["info", "nowhere", "--debug"]):
        process = spawn(*arguments, cwd=tmp_path)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "Traceback" in err
        assert "GptcError: nowhere does not exist" in err


def test_an_unexpected_error_is_no_traceback(gptc: Gptc, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("gptc.cli.info.describe", broken)
    ran = gptc("info", "x")
    assert ran.code == 1
    assert ran.err.startswith("gptc: error: unexpected KeyError: 'surprise'; ")
    assert "--debug" in ran.err


def test_an_interrupt_is_130(gptc: Gptc, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptc.cli.info.describe", interrupted)
    assert gptc("info", "x").code == 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output() -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "gptc", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    words = "gptc: error: standard output, or a file: No space left on device\n"
    assert (ran.returncode, ran.stderr) == (1, words)


def test_an_interrupt_while_the_program_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = spawn("info", "x", cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert (process.communicate(timeout=30), process.returncode) == (("", ""), 130)


@pytest.mark.parametrize("command", ["train", "infer", "eval", "bench train", "bench ops"])
def test_a_missing_gpu_is_one_sentence(
    gptc: Gptc, dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    problem = library.gpu().problem
    if problem is None:
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    arguments = command.split()
    if command == "train":
        arguments += ["--data", str(dataset_folder), "--out", "run"]
    if command in ("infer", "eval"):
        Model.create(GPTConfig.preset("tiny", vocab_size=256)).save("m", make_tokenizer("bytes"))
        arguments += ["-m", "m"]
    if command == "eval":
        arguments += ["--data", str(dataset_folder)]
    ran = gptc(*arguments, "--device", "cuda")
    assert (ran.code, ran.out, ran.err) == (1, "", f"gptc: error: {problem}\n")
    assert problem.endswith(("--device cpu", "pip install nvidia-cublas"))
    assert not Path("run").exists()


def test_a_reader_that_leaves_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    process = spawn("train", *arguments, cwd=tmp_path)
    process.communicate(timeout=60)
    command = (
        f"{sys.executable} -m gptc info {tmp_path / 'run'} | head -n 1; exit ${{PIPESTATUS[1]}}"
    )
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("run ")
    assert ran.stderr == ""
    # A pipe whose reader is closed before anything is written.
    read, write = os.pipe()
    os.close(read)
    closed = subprocess.Popen(
        [sys.executable, "-m", "gptc", "infer", "-m", str(tmp_path / "run"), "-p", "a"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    _, err = closed.communicate(timeout=30)
    assert err == ""
