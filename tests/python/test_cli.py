"""The command line: exit codes, errors, help, and the first things a new user does."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import gptc as package
from gptc import _lib
from gptc.cli import COMMANDS, cli
from gptc.config import GPTConfig
from gptc.errors import GptcError
from gptc.model import Model
from gptc.tokenizer import make_tokenizer

Gptc = Callable[..., Any]


spawned: list[subprocess.Popen[Any]] = []


@pytest.fixture(autouse=True)
def signals_and_processes() -> Iterator[None]:
    """Processes hear SIGHUP, which nohup may have had ignored, and end with the test."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
    while spawned:
        spawned.pop().kill()


def spawn(*args: object, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """gptc as a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gptc", *map(str, args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    spawned.append(process)
    return process


# ---- help ----


def test_help_names_every_command_and_imports_none(tmp_path: Path) -> None:
    code = (
        "import sys; from gptc.cli import run; code = run(['--help']);"
        "print(code, sorted(m for m in sys.modules if m in ('numpy', 'cffi', 'rich', 'tiktoken')"
        " or m.startswith('gptc.')))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    *text, last = out.stdout.splitlines()
    assert last == "0 ['gptc.cli', 'gptc.errors']"
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", "\n".join(text), re.MULTILINE)


def test_the_table_of_commands_is_true() -> None:
    with click.Context(cli) as ctx:
        for name in COMMANDS:
            command = cli.get_command(ctx, name)
            assert command is not None
            assert command.name == name


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_a_group_alone_shows_its_help(gptc: Gptc, arguments: list[str]) -> None:
    ran = gptc(*arguments)
    assert (ran.code, ran.err) == (2, "")
    assert ran.out.startswith(f"Usage: {' '.join(['gptc', *arguments])} [OPTIONS]")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(gptc: Gptc, name: str) -> None:
    ran = gptc(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Usage: gptc {name}" in ran.out
    assert re.search(rf"Examples:\n(.*\n)*?.*gptc {name}", ran.out)


def test_train_help_names_every_option(gptc: Gptc) -> None:
    from dataclasses import fields

    from gptc.options import TrainOptions

    text = gptc("train", "--help").out
    for field in fields(TrainOptions):
        assert f"--{field.name.replace('_', '-')} " in text, field.name


def test_train_help_tells_no_untruth_about_presets(gptc: Gptc) -> None:
    from gptc.config import presets
    from gptc.options import DEFAULTS

    text = " ".join(gptc("train", "--help").out.split())
    assert f"training defaults: {', '.join(presets())}. [tiny]" in text
    options, batches = text.partition("Batches and the optimizer (defaults by preset):")[::2]
    assert options
    for name in {name for table in DEFAULTS.values() for name in table}:
        # Its help ends before the next option, and names no default of its own.
        shown = batches if f"--{name.replace('_', '-')} " in batches else text
        own = shown.partition(f"--{name.replace('_', '-')} ")[2].partition(" --")[0]
        assert not re.search(r"\[[\d.e-]+\]", own), name


def test_version(gptc: Gptc) -> None:
    ran = gptc("--version")
    assert ran.code == 0
    assert ran.out.startswith(f"gptc {package.__version__}\nlibgpt.so ")
    assert re.search(r"ABI \d+, CPU level (portable|avx2|avx512)", ran.out)
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{package.__version__}"\n' in project


def test_version_without_a_library_says_so(gptc: Gptc, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise GptcError("libgpt.so is not in the gptc package")

    monkeypatch.setattr("gptc._lib.load", missing)
    ran = gptc("--version")
    assert ran.code == 0
    assert "libgpt.so: libgpt.so is not in the gptc package" in ran.out


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["trian"], 2, "no command 'trian'; did you mean train?"),
        (["frobnicate"], 2, "no command 'frobnicate'; known: prepare, train"),
        (["train", "--stpes", "3"], 2, "--steps"),
        (["train", "--steps", "few"], 2, "'few' is no size"),
        (["train", "--preset", "tinny"], 2, "did you mean tiny?"),
        (["train", "--threads", "-1"], 2, "-1 is less than 0"),
        (["train", "--threads", "10000"], 2, "--threads is 10000; it must be between 0 and"),
        (["train", "--batch-size", "100M"], 2, "--batch-size 100000000 x --seq-len"),
        (["train", "--seed", "-1"], 2, "-1 is not in the range x>=0"),
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
        (["info", "nowhere"], 1, "nowhere does not exist"),
        (["info", "."], 1, ". is no run, checkpoint or dataset"),
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
    problem = _lib.gpu().problem
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


# ---- train, infer, info ----


def test_train_infer_and_info_without_naming_anything(arguments: list[str], tmp_path: Path) -> None:
    """What the README's first lines do, with a smaller model; standard output is for answers."""
    out = arguments.index("--out")
    del arguments[out : out + 2]
    process = spawn("train", *arguments, cwd=tmp_path)
    sample, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sample.strip()
    for part in ("training in runs/tiny-fable", "step 8/8", "saved runs/tiny-fable/ckpt-000008"):
        assert part in err
    assert 'next: gptc infer -m runs/tiny-fable -p "' in err

    process = spawn("infer", "-p", "the", "--max-tokens", 5, cwd=tmp_path, stdin=subprocess.DEVNULL)
    text, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
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
    # What the process took is what the plan said it would: see docs/architecture.md.
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
    os.close(terminal)  # the system sends SIGHUP, and nothing can be written any more
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


def test_a_reader_that_leaves_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    process = spawn("train", *arguments, cwd=tmp_path)
    process.communicate(timeout=60)
    command = (
        f"{sys.executable} -m gptc info {tmp_path / 'run'} | head -n 1; exit ${{PIPESTATUS[1]}}"
    )
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("run ")
    assert ran.stderr == ""
    # A pipe that is closed before anything is written.
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


# ---- info ----


def test_info_of_a_run_and_a_checkpoint(gptc: Gptc, arguments: list[str], tmp_path: Path) -> None:
    gptc("train", *arguments)
    found = json.loads(gptc("info", tmp_path / "run", "--json").out)
    assert found["kind"] == "run"
    assert found["checkpoints"] == ["ckpt-000004", "ckpt-000008"]
    assert found["last_metrics"]["step"] == found["last_evaluation"]["step"] == 8
    newest = found["newest"]
    assert newest["training"]["step"] == 8
    assert newest["tokenizer"] == "bytes, 256 tokens"
    assert newest["parameters"] == sum(newest["parameters_by_part"].values())
    assert newest["parameters_by_part"]["token embedding"] == 256 * 32

    checkpoint = json.loads(gptc("info", newest["path"], "--json").out)
    assert checkpoint == {"kind": "checkpoint", **newest}
    table = gptc("info", newest["path"]).out
    for part in ("LlamaForCausalLM", "2 layers, 2 heads, width 32", "step 8 of 8", "feed-forward"):
        assert part in table
    weights = gptc("info", Path(newest["path"]) / "model.safetensors").out
    assert "model.embed_tokens.weight" in weights
    assert "256 x 32" in weights


def test_info_shows_no_text_that_commands_the_terminal(gptc: Gptc, tmp_path: Path) -> None:
    text = "begin \x1b[2J \x9b2J \x7f \u202e \U000e0001 end é\n" * 20
    (tmp_path / "text").write_text(text)
    assert gptc("prepare", tmp_path / "text", "--out", tmp_path / "data").code == 0
    for arguments in ((), ("--json",)):
        ran = gptc("info", tmp_path / "data", *arguments)
        assert all(line.isprintable() for line in ran.out.splitlines())
        assert "end é" in ran.out
    assert json.loads(ran.out)["splits"]["train"]["sample"].startswith(text[:40])


def test_info_of_a_dataset_and_a_shard(gptc: Gptc, dataset_folder: Path) -> None:
    found = json.loads(gptc("info", dataset_folder, "--json").out)
    assert found["kind"] == "dataset"
    table = gptc("info", dataset_folder).out
    assert f"{found['splits']['train']['tokens']:,} tokens in 1 shard" in table
    shard = json.loads(gptc("info", dataset_folder / "val_000000.bin", "--json").out)
    assert shard["tokens"] == found["splits"]["val"]["tokens"]
    assert shard["largest_token"] < 128
    assert "2 bytes each" in gptc("info", dataset_folder / "val_000000.bin").out
    (dataset_folder / "notes.txt").write_text("not a shard")
    ran = gptc("info", dataset_folder / "notes.txt")
    assert ran.code == 1
    assert "is no token shard" in ran.err
