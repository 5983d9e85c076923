"""One call of the library at a time on a model and its sessions.

The library has no lock (gpt.h). One in C could not do what is needed here: be held for the calls of
a training step together, let `close` wait for the call of another thread, outlive what it frees.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from gptc.engine import library
from gptc.errors import GptcError

_LONGEST_WAIT_S = 10.0  # at the interpreter's end, for a call that cannot be interrupted


class Turns:
    """The lock of a model. A thread that holds it may take it again."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._calling = False  # the holder is in a call
        self._torn = False  # this process was forked from one where another thread held it
        self._freed: deque[Callable[[], None]] = deque()
        _all.add(self)

    def call(self, function: str, handle: Callable[[], Any], *arguments: Any) -> Any:
        """The result of a function of the library, whose first argument `handle` gives."""
        try:
            with self.lock:
                first = handle()  # nobody closes it before the call has ended
                self._check()
                library.end_thread_at_exit()
                self._calling = True
                try:
                    return library.value(function, first, *arguments)
                finally:
                    self._calling = False
        finally:
            self._free()

    def close(self, release: Callable[[], None]) -> None:
        """Waits for the call under way, and frees a handle."""
        with self.lock:
            if not self._torn:
                self._check()
            release()
        self._free()

    def free(self, function: Callable[[], None]) -> None:
        """Frees memory now, or after the call under way. It does not wait: destructors call it."""
        self._freed.append(function)
        self._free()

    def _check(self) -> None:
        if self._calling:
            raise GptcError(
                "this model is in the middle of a call: a signal handler cannot use it; set a flag "
                "there, and use the model later"
            )
        if self._torn:
            raise GptcError(
                "this process was forked while another thread used this model; create or load the "
                "model in the child"
            )

    def _free(self) -> None:
        # Whoever finds the lock taken leaves the work to its holder, who does this afterwards.
        while self._freed and self.lock.acquire(blocking=False):
            try:
                if self._calling:
                    return
                while self._freed:
                    self._freed.popleft()()
            finally:
                self.lock.release()

    def _after_fork(self) -> None:
        if self.lock.acquire(blocking=False):
            self.lock.release()
        else:  # the holder does not exist here
            self.lock, self._calling, self._torn = threading.RLock(), False, True


_all: weakref.WeakSet[Turns] = weakref.WeakSet()


def _begin_child() -> None:
    for turns in list(_all):
        turns._after_fork()


@atexit.register
def _end() -> None:
    """Takes each turn for good.

    Daemon threads run until the process ends, and would compute while libraries are taken down.
    """
    library.end_other_threads()
    for turns in list(_all):
        turns.lock.acquire(timeout=_LONGEST_WAIT_S)


os.register_at_fork(after_in_child=_begin_child)
