"""A run succeeds, or says why in one line, whatever names, encodings and folders it meets.

The class: a file's name, the encoding of standard output or a missing home folder ends a command
with "unexpected", some of them after hours of training.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vocabularies import gpt2_folder

TEXT = "hello wörld\n" * 100
TRAIN = ("train", "--steps", "2", "--batch-size", "2", "--seq-len", "16", "--threads", "1")


# Commands of one process, which takes half a second to start.
COMMANDS = """
import sys
from gptc.cli import run
while sys.argv[1:]:
    end = (sys.argv + [":::"]).index(":::")
    code = run(sys.argv[1:end])
    print(f"ended {code}", flush=True)
    del sys.argv[1 : end + 1]
sys.exit(code)
"""


def gptc(
    folder: Path, *arguments: str, **changes: str | None
) -> subprocess.CompletedProcess[bytes]:
    """Runs `gptc` in a folder, with changes of the environment. ":::" separates commands."""
    surroundings = {**os.environ, "GPTC_CACHE": str(folder / "cache"), **changes}
    start = ["-c", COMMANDS] if ":::" in arguments else ["-m", "gptc"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=folder,
        env={name: value for name, value in surroundings.items() if value is not None},
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("name", ["b\udcffad.txt", "del\x7f.txt", "n" * 246 + ".txt"])
def test_odd_names_are_trained_on_and_their_config_is_read_back(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TEXT)
    ran = gptc(tmp_path, *TRAIN, "--data", name)
    assert ran.returncode == 0, ran.stderr
    (run,) = (tmp_path / "runs").iterdir()
    again = ("train", "--config", str(run / "config.toml"), "--out", "again")
    resume = (*TRAIN[:2], "3", "--resume", str(run))
    ran = gptc(tmp_path, *again, ":::", *resume, ":::", "prepare", name, "--out", "data")
    assert ran.stdout.count(b"ended 0\n") == 3, ran.stderr
    assert ran.stderr.count(b"saved") == 2, ran.stderr
    assert b"read   " + os.fsencode(name) in ran.stdout


@pytest.mark.parametrize("name", ["b\udcff1's", "del\x7f", "a b"])
def test_printed_commands_name_odd_folders(tmp_path: Path, name: str) -> None:
    """As a shell reads them: the commands after prepare, after training and for resuming."""
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("needs bash")

    def printed(text: bytes, mark: bytes, *more: str) -> str:
        (line,) = [line for line in text.splitlines() if mark in line]
        command = line.partition(mark + b" gptc ")[2].decode("ascii")
        return f"{command} {shlex.join(more)}"

    (tmp_path / "a.txt").write_text(TEXT)
    prepare = ("prepare", "a.txt", "--out", name, "--tokenizer", "bytes")
    ran = gptc(tmp_path, *prepare, ":::", *TRAIN, "--data", name, "--out", f"run {name}")
    assert ran.stdout.count(b"ended 0\n") == 2, ran.stderr
    python = shlex.join([sys.executable, "-c", COMMANDS])
    python += f" {printed(ran.stdout, b'Next:', *TRAIN[1:])} :::"
    python += f" {printed(ran.stderr, b'next:', '--max-tokens', '3')}"
    followed = subprocess.run([bash, "-c", python], cwd=tmp_path, capture_output=True, check=False)
    assert followed.stdout.count(b"ended 0\n") == 2, followed.stderr


def test_output_in_ascii_ends_a_run_well(tmp_path: Path) -> None:
    (tmp_path / "ö.txt").write_text("öäü€東" * 200)
    ran = gptc(tmp_path, *TRAIN, "--data", "ö.txt", "--tokenizer", "char", PYTHONIOENCODING="ascii")
    assert ran.returncode == 0, ran.stderr
    assert b"saved " in ran.stderr
    assert set(ran.stdout.decode().strip()) <= set("öäü€東\n")
    assert ran.stdout.strip()


def test_commands_in_ascii_name_their_folders(tmp_path: Path) -> None:
    """Standard error too has the bytes of a name, not `\\xf6`, which no shell reads."""
    (tmp_path / "a.txt").write_text(TEXT)
    ran = gptc(tmp_path, *TRAIN, "--data", "a.txt", "--out", "rün", PYTHONIOENCODING="ascii")
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith(b"next: gptc ")]
    command = shlex.split(line.decode().removeprefix("next: gptc "))
    assert command[:3] == ["infer", "-m", "rün"]
    again = gptc(tmp_path, *command, "--max-tokens", "3", PYTHONIOENCODING="ascii")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"HOME": "/dev/null", "GPTC_CACHE": None, "XDG_CACHE_HOME": None},  # not writable
        {"GPTC_CACHE": "~no-such-user/cache"},  # as without a home folder
    ],
)
def test_a_cache_that_cannot_be_written_names_the_variable(
    tmp_path: Path, changes: dict[str, str | None]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    ran = gptc(tmp_path, *TRAIN, "--data", "a.txt", **changes)
    assert ran.returncode == 1
    last = ran.stderr.decode().splitlines()[-1]
    assert "set GPTC_CACHE to a folder that can be written" in last
    assert "unexpected" not in last
    # GPT-2's vocabulary is read without our cache, if another has it.
    if folder := gpt2_folder():
        changes = {**changes, "TIKTOKEN_CACHE_DIR": str(folder)}
        ran = gptc(tmp_path, "prepare", "a.txt", "--tokenizer", "gpt2", "--out", "data", **changes)
        assert b"unexpected" not in ran.stderr


def test_links_are_followed_once(tmp_path: Path) -> None:
    for name in ("real/one.txt", "real/deep/two.txt", "in/plain.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name};")
    for name, target in [
        ("in/linked", "../real"),
        ("in/again", "../real/deep"),
        ("in/self", "self"),
        ("in/up", ".."),
        ("in/gone.txt", "nowhere"),
        ("real/back", "../in"),
    ]:
        (tmp_path / name).symlink_to(target)
    ran = gptc(tmp_path, "prepare", "in", "--out", "in/out", "--val-fraction", "0")
    assert ran.returncode == 0, ran.stderr
    assert b"read   in: 44 bytes, 3 files, 3 documents" in ran.stdout
