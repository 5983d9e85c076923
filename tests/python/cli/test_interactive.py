"""A conversation in a terminal survives errors and interrupts."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from gptc.cli.interactive import converse
from gptc.errors import GptcError


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


def test_a_conversation(saved: Path, tmp_path: Path) -> None:
    terminal = Terminal(saved, tmp_path, "--max-tokens", "8")
    terminal.until("Ctrl-D quits.")
    for typed in ("On\n", "\n", "\n"):  # an empty line continues the text
        terminal.until(">>> ")
        terminal.type(typed)
        assert "8 tokens" in terminal.until("tokens/s")
    terminal.until(">>> ")
    terminal.type("two\\\n")
    terminal.until("... ")
    terminal.type("lines\n")
    assert "8 tokens" in terminal.until("tokens/s")
    terminal.until(">>> ")
    terminal.type("y" * 60 + "\n")
    terminal.until("error: the prompt has 60 tokens")
    terminal.until(">>> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "On" in (tmp_path / "gptc" / "history").read_text()


def test_a_conversation_survives_errors_and_interrupts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    typed = iter(["", "one\\", "two", "", "wrong", "slow", "last"])
    asked: list[str] = []

    def line(prompt: str) -> str:
        for text in typed:
            return text
        raise EOFError

    def answer(prompt: str) -> None:
        asked.append(prompt)
        if prompt == "wrong":
            raise GptcError("too long")
        if prompt == "slow":
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", line)
    converse(answer)
    assert asked == ["", "one\ntwo", "", "wrong", "slow", "last"]
    assert "error: too long" in capsys.readouterr().err


def test_an_interrupt_stops_the_text_and_not_the_program(saved: Path, tmp_path: Path) -> None:
    terminal = Terminal(saved, tmp_path, "--max-tokens", "1000000", "--context-shift")
    terminal.until(">>> ")
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.3)  # a person's pause: Python misses input that arrives before it waits
    terminal.type("\x03")
    terminal.until(">>> ")
    terminal.type("On\n")
    time.sleep(0.5)
    os.kill(terminal.pid, signal.SIGINT)
    terminal.until(">>> ")
    terminal.type("\x04")
    assert terminal.end() == 0
