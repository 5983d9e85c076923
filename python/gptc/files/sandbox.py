"""Runs a stranger's Python program in a process with no rights: see jail.py.

It has an empty folder, its limits, and Python's standard library; no network, no other process, no
other file to write and none of the user's to read, no environment.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Literal

from gptc.errors import GptcError
from gptc.files.bounded import launcher

SECONDS = 3  # of one core
N_BYTES = 1 << 29  # of address space
_WAIT = 5  # times as long on a busy machine

Verdict = Literal["passed", "failed", "timed out"]


@contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder. It is removed however deep a program has made it, where it is on disk."""
    with tempfile.TemporaryDirectory(prefix="gptc-code-") as folder:
        try:
            yield folder
        finally:
            _flatten(folder)


def _flatten(folder: str) -> None:
    """Moves all below the folders in a folder up to it: Python removes folders by recursion."""
    name, numbers = secrets.token_hex(16), count()
    waiting = [path for path in Path(folder).iterdir() if _is_folder(path)]
    while waiting:
        path = waiting.pop()
        path.chmod(0o700)
        for child in list(path.iterdir()):
            is_folder, moved = _is_folder(child), Path(folder, f"{name}-{next(numbers)}")
            if is_folder:
                child.chmod(0o700)  # else it cannot be moved
                waiting.append(moved)
            child.rename(moved)
        path.rmdir()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def run_code(program: str, seconds: int = SECONDS, n_bytes: int = N_BYTES) -> Verdict:
    """Whether a program ends without an exception. GptcError if no sandbox can be made here.

    A program that ends its process has failed. One that the machine is too busy to begin has
    timed out.
    """
    token = secrets.token_hex(16).encode()
    with (
        _folder() as folder,
        tempfile.TemporaryFile() as state,
    ):
        number = state.fileno()
        command = [*launcher("jail.py"), folder, str(seconds), str(n_bytes), str(number)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(number,),
            start_new_session=True,
            cwd=folder,
            env={},
        )
        try:
            child.communicate(token + b"\n" + program.encode("utf-8", "replace"), seconds * _WAIT)
            late = child.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        state.seek(0)
        found = state.read(4096)
    if late and not found:
        return "timed out"
    if not found.startswith(b"ready\n"):
        reason = found.decode("utf-8", "replace") or "it ends before it begins"
        raise GptcError(
            f"code cannot be run in a sandbox here ({reason}): use Linux 5.13 or later with "
            "Landlock and seccomp, or leave out this --task"
        )
    if found == b"ready\n" + token and child.returncode == 0:
        return "passed"
    return "timed out" if late else "failed"
