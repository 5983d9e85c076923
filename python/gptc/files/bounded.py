"""Work on what strangers made, in another process with limits of time and memory.

A library that aborts, hangs, or takes all memory does so there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from gptc.errors import GptcError

WAIT = 12  # times as long on a busy machine


class Fault(GptcError):
    """A program that did not end well: it took too long, or too much memory, or crashed."""


def run_bounded(
    program: Path, arguments: list[str], data: bytes, seconds: int, n_bytes: int
) -> bytes:
    """The output of a program of gptc, of at most `n_bytes`, which reads `data`. Fault if it fails.

    It has `seconds` of one core, and `n_bytes` of address space.
    """
    import subprocess  # here, since it is seldom needed
    import tempfile

    settings = [str(program), json.dumps(sys.path), str(seconds), str(n_bytes)]
    command = [*launcher("child.py"), *settings, *arguments]
    with tempfile.TemporaryFile() as out:  # a pipe would have no end
        try:
            child = subprocess.run(
                command,
                input=data,
                stdout=out,
                stderr=subprocess.DEVNULL,
                timeout=seconds * WAIT,
                env=one_thread(),
            )
        except subprocess.TimeoutExpired:
            raise Fault(f"it takes longer than {seconds} s") from None
        except OSError as error:
            raise Fault(f"it cannot run in another process: {error.strerror}") from None
        check_code(child.returncode, seconds, n_bytes)
        out.seek(0)
        return out.read()


def launcher(name: str) -> list[str]:
    """The command of a program in this folder, which imports nothing by itself."""
    return [sys.executable or "python3", "-I", "-S", str(Path(__file__).with_name(name))]


def one_thread() -> dict[str, str]:
    """The environment of a child: one thread, since each reserves address space."""
    return {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def check_code(code: int, seconds: int, n_bytes: int) -> None:
    """Raises Fault for the exit code (negative: signal) of a child with these limits."""
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise Fault(f"it takes longer than {seconds} s")
    if code:
        raise Fault(f"it crashes, or needs more than {n_bytes >> 20:,} MiB")
