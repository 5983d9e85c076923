"""Work on what strangers made, as in `bounded`, in processes that are ready for the next request.

    answer = warm_answer(program, template, request, seconds=4, n_bytes=1 << 29)

A process is prepared with the stranger's data once, within limits. It forks for each request, and
the copy has its limits, so no request sees another one. Whatever fails ends the process.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from gptc.files.bounded import WAIT, Fault, check_code, launcher, one_thread
from gptc.files.forker import HEAD, STATE

MOST_IDLE = 4  # processes that wait for the next request

_Key: TypeAlias = tuple[str, bytes]  # the program and the data that it was prepared with


class _Gone(Exception):
    """The process does not answer, or no longer takes requests."""


class _Process:
    """A program that was prepared. One request at a time."""

    def __init__(self, program: Path, data: bytes, seconds: int, n_bytes: int) -> None:
        self._results = tempfile.TemporaryFile()  # noqa: SIM115
        number = self._results.fileno()
        try:
            self._child = subprocess.Popen(
                [*launcher("forker.py"), str(program), json.dumps(sys.path), str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                pass_fds=(number,),
                start_new_session=True,
                env=one_thread(),
            )
        except OSError as error:
            self._results.close()
            raise Fault(f"it cannot run in another process: {error.strerror}") from None
        self._prepared = False
        self._orderly(lambda: self._ask(data, seconds, n_bytes))
        self._prepared = True

    def answer(self, data: bytes, seconds: int, n_bytes: int) -> bytes:
        """The answer to a request. After Fault or _Gone the process is not used again."""

        def ask() -> bytes:
            os.ftruncate(self._results.fileno(), 0)
            os.lseek(self._results.fileno(), 0, os.SEEK_SET)
            self._ask(data, seconds, n_bytes)
            self._results.seek(0)
            return self._results.read()

        return self._orderly(ask)

    def _orderly(self, work: Callable[[], bytes | None]) -> bytes:
        try:
            return work() or b""
        except BaseException:
            self.end()
            raise

    def _ask(self, data: bytes, seconds: int, n_bytes: int) -> None:
        assert self._child.stdin
        assert self._child.stdout
        end = time.monotonic() + seconds * WAIT
        with suppress(BrokenPipeError):  # it has ended, and says why
            left = memoryview(HEAD.pack(seconds, n_bytes, len(data)) + data)
            while left and _ready(self._child.stdin, select.POLLOUT, end):
                left = left[os.write(self._child.stdin.fileno(), left[: select.PIPE_BUF]) :]
        if not _ready(self._child.stdout, select.POLLIN, end):
            raise Fault(f"it takes longer than {seconds} s")
        state = self._child.stdout.read(STATE.size)
        if len(state) == STATE.size:
            check_code(STATE.unpack(state)[0], seconds, n_bytes)
        elif self._prepared:
            raise _Gone
        else:
            check_code(self._child.wait(), seconds, n_bytes)
            raise Fault("it ends the process")

    def end(self) -> None:
        """Ends the process and what it has started; twice is harmless."""
        with suppress(ProcessLookupError, PermissionError):
            if self._child.returncode is None:
                os.killpg(self._child.pid, signal.SIGKILL)
        self.forget()
        self._child.wait()

    def forget(self) -> None:
        """Closes this end alone."""
        for pipe in (self._child.stdin, self._child.stdout, self._results):
            assert pipe
            pipe.close()


def _ready(pipe: Any, event: int, end_s: float) -> bool:
    """Waits until a pipe can be used; False at the end of the time."""
    poll = select.poll()  # select fails for the numbers above 1,023 of a busy server
    poll.register(pipe, event)
    return bool(poll.poll(max(0.0, 1000 * (end_s - time.monotonic()))))


_lock = threading.Lock()
_idle: list[tuple[_Key, _Process]] = []  # the one used last is at the end


def warm_answer(program: Path, prepared: bytes, data: bytes, seconds: int, n_bytes: int) -> bytes:
    """The answer of a program of gptc (see forker.py) that was prepared with `prepared`.

    Fault if it fails. Preparing and answering have `seconds` of one core and `n_bytes` of address
    space each.
    """
    key = (str(program), prepared)
    process = _take(key)
    if process:
        try:
            found = process.answer(data, seconds, n_bytes)
        except _Gone:  # somebody has killed it
            pass
        else:
            _put(key, process)
            return found
    process = _Process(program, prepared, seconds, n_bytes)
    try:
        found = process.answer(data, seconds, n_bytes)
    except _Gone:
        raise Fault("it ends the process") from None
    _put(key, process)
    return found


def _take(key: _Key) -> _Process | None:
    with _lock:
        for i in reversed(range(len(_idle))):
            if _idle[i][0] == key:
                return _idle.pop(i)[1]
    return None


def _put(key: _Key, process: _Process) -> None:
    with _lock:
        _idle.append((key, process))
        surplus = [_idle.pop(0)[1] for _ in range(len(_idle) - MOST_IDLE)]
    for old in surplus:
        old.end()


@atexit.register
def end_all() -> None:
    """Ends the processes that wait."""
    with _lock:
        ended = [_idle.pop()[1] for _ in range(len(_idle))]
    for process in ended:
        process.end()


def _begin_child() -> None:
    """A forked copy of this process must not talk to the same processes."""
    global _lock
    _lock = threading.Lock()
    while _idle:
        _idle.pop()[1].forget()


os.register_at_fork(after_in_child=_begin_child)
