"""Signals that end a run early."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class StepDropped(Exception):
    """A signal arrived during a step, which may take minutes and is abandoned."""


class Received:
    """The first signal that has arrived here, and the one that ends the run.

    With several ranks they differ until all have heard of it (`parallel.settle`): a rank that ended
    by itself would leave the others waiting.
    """

    def __init__(self, n_ranks: int = 1) -> None:
        self.received: int | None = None
        self.agreed: int | None = None
        self._n_ranks = n_ranks

    @property
    def ending(self) -> int | None:
        """The signal that ends the run."""
        return self.received if self._n_ranks == 1 else self.agreed

    def check(self) -> None:
        """Raises StepDropped after a signal. Called during a step."""
        if self.received is not None:
            raise StepDropped


@contextmanager
def heard_signals(n_ranks: int = 1, quiet: bool = False) -> Iterator[Received]:
    """Records the first SIGINT, SIGTERM or SIGHUP; the second one has its usual effect.

    Signals that this process ignores from its start, as SIGHUP under nohup, stay ignored. Prints a
    line then, unless `quiet`.
    """
    state = Received(n_ranks)
    if threading.current_thread() is not threading.main_thread():
        yield state  # Python delivers signals to the main thread only
        return

    def handle(number: int, frame: FrameType | None) -> None:
        state.received = number
        for other, before in previous.items():
            signal.signal(other, before)
        # Not through the progress display: this may interrupt it.
        if not quiet:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping and saving; a second signal ends it without saving\n")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
    previous = {n: signal.signal(n, handle) for n in heard}
    try:
        yield state
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
