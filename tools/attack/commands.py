"""Every command over each file of a folder of hostile files: a result or one line, within bounds.

    python tools/attack/commands.py FOLDER

A file is a model, a tokenizer's folder or a grammar (.gbnf, with the model base-model next to it).
A failure is another exception than a GptcError, more than one line of an error, 10 CPU seconds,
more memory than twice the file and 200 MB, or a part of what a failed command would have written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import gptc.tokenizer.with_tokenizers  # noqa: F401  # before the forks
from gptc.cli import run

SECONDS = 10
SPARE_BYTES = 200 << 20
_WAIT_S = 300  # of a process on a busy machine

_SMALL = ("--steps", "1", "--batch-size", "1", "--seq-len", "8", "--lr", "1e-4")


class Outcome(NamedTuple):
    """The end of a process."""

    code: int
    said: str  # standard error
    cpu_s: float
    n_bytes: int  # of memory, above that of the process that forked it


def ended(args: list[str], folder: Path) -> Outcome:
    """Runs a command in a fork of this process, in a folder."""
    errors = folder / "errors.txt"
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    child = os.fork()
    if not child:
        _child(args, folder, errors)
    end = time.monotonic() + _WAIT_S
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() > end:
            os.killpg(child, 9)
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(status)
    peak = 1024 * used.ru_maxrss - resident
    said = errors.read_text(errors="replace")
    return Outcome(code, said, used.ru_utime + used.ru_stime, peak)


def _child(args: list[str], folder: Path, errors: Path) -> None:
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the other process
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, file in ((0, nothing), (1, nothing)):
            os.dup2(file, number)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.chdir(folder)
        code = run(args)
        sys.stderr.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


def fault(end: Outcome, n_bytes: int) -> str | None:
    """The fault of an outcome, for a file of so many bytes; None for a good one."""
    if end.code < 0 or end.code == 99 or "Traceback" in end.said or "please report it" in end.said:
        return f"ends with {end.code}"
    if end.cpu_s > SECONDS:
        return f"takes {end.cpu_s:.1f} s"
    if end.n_bytes > 2 * n_bytes + SPARE_BYTES:
        return f"takes {end.n_bytes >> 20:,} MiB"
    lines = [line for line in end.said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("gptc: error: ")]
    if end.code and (len(errors) != 1 or lines[-1] != errors[0]):
        return f"prints {len(errors)} errors"
    return None


def commands(file: Path, folder: Path) -> list[list[str]]:
    """The commands over a file; what they write is in a folder, with chats.jsonl and text.txt."""
    name, out = str(file), str(folder / "out")
    if file.suffix == ".gbnf":
        model = str(file.with_name("base-model"))
        return [["infer", "-m", model, "-p", "a", "--grammar", name, "--max-tokens", "8"]]
    text = str(folder / "text.txt")
    return [
        ["verify", name],
        ["info", name],
        ["infer", "-m", name, "-p", "ab", "--max-tokens", "2"],
        ["import", name, "--out", out],
        ["export", "-m", name, "--to", "gguf", "--out", out],
        ["export", "-m", name, "--to", "hf", "--out", out],
        ["serve", "-m", name, "--check", "--port", "0"],
        ["prepare", text, "--tokenizer", name, "--out", out],
        ["finetune", "-m", name, "--data", str(folder / "chats.jsonl"), "--out", out, *_SMALL],
        ["eval", "-m", name, "--data", text, "--batches", "1"],
        ["train", "--init-from", name, "--data", text, "--out", out, *_SMALL],
    ]


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder's."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def attack(files: list[Path]) -> tuple[int, list[str]]:
    """The number of commands, and a line for each failure."""
    n, failures = 0, []
    for file in files:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
            (folder / "chats.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 20)
            (folder / "text.txt").write_text("The cat sat on the mat. " * 200)
            for i, args in enumerate(commands(file, folder)):
                inside = folder / str(i)
                inside.mkdir()
                for data in ("chats.jsonl", "text.txt"):
                    (inside / data).symlink_to(folder / data)
                args = [word.replace(f"{folder}/", f"{inside}/") for word in args]
                n += 1
                end = ended(args, inside)
                why = fault(end, size_of(file))
                whole = not end.code or args[0] not in ("import", "export", "prepare")
                if why is None and not whole and (inside / "out").is_file():
                    why = "leaves a part"
                if why is not None:
                    failures.append(f"gptc {' '.join(args)} {why}: {end.said.strip()[-300:]}")
                    print(failures[-1], file=sys.stderr, flush=True)
    return n, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, help="number of files, drawn by seed 1")
    options = parser.parse_args()
    folder = options.folder
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in found if file.suffix not in (".c", ".md")]
    if not files:
        parser.error(f"{folder} is not a folder with files")
    if options.files is not None:
        files = random.Random(1).sample(files, min(options.files, len(files)))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        n, failures = attack(files)
    print(f"{len(files):,} files, {n:,} commands: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
