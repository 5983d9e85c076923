"""A conversation in a terminal survives errors and interrupts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from gptc.cli.interactive import converse
from gptc.errors import GptcError
from terminals import Terminal


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
    terminal.flows(100)
    os.kill(terminal.pid, signal.SIGINT)
    terminal.until(">>> ")
    terminal.type("\x04")
    assert terminal.end() == 0
