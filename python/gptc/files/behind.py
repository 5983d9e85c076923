"""Work that a thread does while its caller continues; one piece at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Behind:
    """Runs a piece of work in a thread. Its error is raised later, by `check` or `finish`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece, after the one before has ended."""
        self.finish()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A daemon: a process that ends by an error does not wait for a disk that hangs.
        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the error of a piece that has failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Waits for the piece under way, and raises its error."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits for the piece under way, and raises nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
