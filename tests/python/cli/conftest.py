"""Fixtures of the command line: signals, processes, and `gptc infer` with a saved model."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import spawned


@pytest.fixture
def infer(gptc: Callable[..., Any], saved: Path) -> Callable[..., Any]:
    """infer("-p", "x") runs `gptc infer` with the saved model, in fp32 and with seed 4."""
    return lambda *arguments: gptc("infer", "-m", saved, "--dtype", "fp32", "--seed", 4, *arguments)


@pytest.fixture(autouse=True)
def signals_and_processes() -> Iterator[None]:
    """Processes receive SIGHUP, which nohup ignores, and end with the test."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
    while spawned:
        spawned.pop().kill()
