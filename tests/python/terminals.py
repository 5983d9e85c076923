"""`gptc infer` in a terminal of the tests."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


class Terminal:
    """`gptc infer` in a separate terminal."""

    def __init__(self, saved: Path, home: Path, *arguments: str) -> None:
        pty = pytest.importorskip("pty")
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # it may be ignored here
            os.environ["XDG_STATE_HOME"] = str(home)
            os.environ["TERM"] = "dumb"
            command = [sys.executable, "-m", "gptc", "infer", "-m", str(saved), "--seed", "4",
                       "--dtype", "fp32", "--temperature", "0", *arguments]  # fmt: skip
            os.execv(sys.executable, command)
        self.seen = ""

    def until(self, text: str, seconds: float = 30) -> str:
        """Waits for `text`, and returns all output up to its end."""
        self._wait(lambda: text in self.seen, text, seconds)
        at = self.seen.index(text) + len(text)
        shown, self.seen = self.seen[:at], self.seen[at:]
        return shown.replace("\r\n", "\n")

    def flows(self, n: int) -> None:
        """Waits until there are n characters that nobody has waited for: an answer is under way."""
        self._wait(lambda: len(self.seen) >= n, f"{n} characters", 30)

    def _wait(self, there: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, f"no {what!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:
                    assert there(), f"it ended: {self.seen!r}"

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
