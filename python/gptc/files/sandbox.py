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
from contextlib import suppress
from typing import Literal

from gptc.errors import GptcError
from gptc.files.bounded import launcher

SECONDS = 3  # of one core
N_BYTES = 1 << 29  # of address space
_WAIT = 5  # times as long on a busy machine

Verdict = Literal["passed", "failed", "timed out"]


def run_code(program: str, seconds: int = SECONDS, n_bytes: int = N_BYTES) -> Verdict:
    """Whether a program ends without an exception. GptcError if no sandbox can be made here.

    A program that ends its process has failed.
    """
    token = secrets.token_hex(16).encode()
    with (
        tempfile.TemporaryDirectory(prefix="gptc-code-") as folder,
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
    if not found.startswith(b"ready\n"):
        reason = found.decode("utf-8", "replace") or "it ends before it begins"
        raise GptcError(f"code cannot be run in a sandbox here ({reason}): leave out --run-code")
    if found == b"ready\n" + token and child.returncode == 0:
        return "passed"
    return "timed out" if late else "failed"
