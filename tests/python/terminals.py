"""`gptc infer` in a terminal of the tests."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
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
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:
                    assert text in self.seen, f"it ended: {self.seen!r}"
        at = self.seen.index(text) + len(text)
        shown, self.seen = self.seen[:at], self.seen[at:]
        return shown.replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
