"""Work that a thread does while its caller continues; one piece at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

_POLL_S = 0.5


class Abandoned(Exception):
    """Raised in a piece for which its caller does not wait any more."""


class Behind:
    """Runs a piece of work in a thread. Its error is raised later, by `check` or `finish`.

    An exception that interrupts a wait, such as KeyboardInterrupt, abandons the piece: nobody waits
    for it again, and its next `check_wanted` ends it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        # Not `Thread.join` alone: CPython 3.11 takes a thread for ended after an interrupted one.
        self._ended = threading.Event()
        self._abandoned = False
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece, after the one before has ended."""
        self.finish()
        self._ended = ended = threading.Event()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error
            finally:
                ended.set()

        # A daemon: a process that ends by an error does not wait for a disk that hangs.
        thread = threading.Thread(target=run, name=self._name, daemon=True)
        try:
            thread.start()
            self._thread = thread
        except BaseException:
            self._abandoned = True
            raise

    def check(self) -> None:
        """Raises the error of a piece that has failed; does not wait."""
        if self._thread is not None and self._ended.is_set():
            self.finish()

    def check_wanted(self) -> None:
        """For the piece itself, before it changes what others see: raises Abandoned if it is."""
        if self._abandoned:
            raise Abandoned

    def finish(self) -> None:
        """Waits for the piece under way, and raises its error."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits for the piece under way, unless it is abandoned, and raises nothing."""
        if self._thread is None or self._abandoned:
            return
        try:
            # A signal that comes just before a wait begins does not interrupt it: hence short ones.
            while not self._ended.wait(_POLL_S):
                pass
            self._thread.join()
        except BaseException:
            self._abandoned = True
            raise
        self._thread = None
