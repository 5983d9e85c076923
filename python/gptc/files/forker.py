"""A program that prepares another program of gptc once, and forks for each request: see `warm`.

    python -I -S forker.py PROGRAM SYS_PATH RESULT_FD < REQUESTS > STATES

The program is a file with two functions: prepare(data) gives a state, and answer(state, data) the
bytes of an answer. Both run within limits, and each answer in a copy of the process. A request is a
head (HEAD) and its data; the first one is for prepare. The answer is in the file RESULT_FD, which
`warm` reads; the state (STATE) says how the process ended. It imports nothing of gptc.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import struct
import sys
from pathlib import Path
from typing import Any

HEAD = struct.Struct("=QQQ")  # seconds, bytes, length of the data
STATE = struct.Struct("=i")  # an exit code; negative: a signal


def main() -> None:
    """Serves requests until the input ends."""
    program, path, result = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    sys.path[:] = path
    names: dict[str, Any] = {"__name__": "gptc_program"}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    exec(compile(Path(program).read_text("utf-8"), program, "exec"), names)
    seconds, n_bytes, length = HEAD.unpack(_read(HEAD.size))
    own = [resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS)]
    _limit(seconds, n_bytes, [hard for _, hard in own])
    state = names["prepare"](_read(length))
    resource.setrlimit(resource.RLIMIT_CPU, own[0])
    resource.setrlimit(resource.RLIMIT_AS, own[1])
    gc.collect()
    gc.freeze()  # so that a fork copies no page for its counts
    _tell(0)
    while head := os.read(0, HEAD.size):
        seconds, n_bytes, length = HEAD.unpack(head + _read(HEAD.size - len(head)))
        child = os.fork()
        if child == 0:
            os._exit(_answer(names["answer"], state, result, seconds, n_bytes, length))
        _tell(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _answer(answer: Any, state: Any, result: int, seconds: int, n_bytes: int, length: int) -> int:
    """Writes an answer; in the child. 0 if all went well."""
    try:
        _limit(seconds, n_bytes)
        data = _read(length)
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):  # neither the pipes of the parent, nor anything else
            os.dup2(quiet, number)
        os.dup2(result, 3)
        os.closerange(4, 256)
        # No program needs a further file, even if it left its sandbox.
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))
        found = memoryview(answer(state, data))
        while found:
            found = found[os.write(3, found) :]
    except BaseException:
        return 1
    return 0


def _limit(seconds: int, n_bytes: int, hard: list[int] | None = None) -> None:
    """Limits this process; with `hard`, so that the limit can be raised again up to that."""
    time_hard, space_hard = hard or (seconds + 1, n_bytes)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, time_hard))
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, space_hard))
    if not hard:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def _read(n: int) -> bytes:
    """Exactly n bytes of the input."""
    data = bytearray()
    while len(data) < n:
        piece = os.read(0, min(n - len(data), 1 << 20))
        if not piece:
            os._exit(1)
        data += piece
    return bytes(data)


def _tell(code: int) -> None:
    os.write(1, STATE.pack(code))


if __name__ == "__main__":
    main()
