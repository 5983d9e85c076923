"""Signals that end a run early."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class StepDropped(Exception):
    """A signal came in the middle of a step, which may take minutes."""


class Received:
    def __init__(self) -> None:
        self.received: int | None = None

    def check(self) -> None:
        """Between micro-batches."""
        if self.received is not None:
            raise StepDropped


@contextmanager
def heard_signals() -> Iterator[Received]:
    """Notes the first SIGINT, SIGTERM or SIGHUP instead of dying; the second one works as usual.

    A signal that this process was started to ignore, as a background job is, stays ignored; so does
    SIGHUP under nohup.
    """
    state = Received()
    if threading.current_thread() is not threading.main_thread():
        yield state  # Python delivers signals to the main thread only
        return

    def handle(number: int, frame: FrameType | None) -> None:
        state.received = number
        for other, before in previous.items():
            signal.signal(other, before)
        # Not through the progress display, which this may be in the middle of.
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping and saving; once more to abort at once\n")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
    previous = {n: signal.signal(n, handle) for n in heard}
    try:
        yield state
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
