"""Programs of gptc in a fork of this process, which has imported what they need.

gptc runs a chat template's program in a new process (files/bounded.py). That takes 0.1 s, most of
it for imports. A fork has the same limits of time, files and memory, and takes milliseconds.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from importlib import import_module
from pathlib import Path

import gptc
from gptc.files.bounded import Fault

_PACKAGE = Path(gptc.__file__).parent


def run_forked(
    program: Path, arguments: list[str], data: bytes, seconds: int, n_bytes: int
) -> bytes:
    """The output of a program, as `bounded.run_bounded` gives it."""
    name = ".".join(program.relative_to(_PACKAGE.parent).with_suffix("").parts)
    module = import_module(name)
    come, go = os.memfd_create("come"), os.memfd_create("go")
    try:
        os.write(come, data)
        os.lseek(come, 0, os.SEEK_SET)
        child = os.fork()
        if not child:
            _run(module, [str(program), *arguments], (come, go), seconds, n_bytes)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            raise Fault(f"it takes longer than {seconds} s")
        if code:
            raise Fault(f"it crashes, or needs more than {n_bytes >> 20:,} MiB")
        return os.pread(go, os.fstat(go).st_size, 0)
    finally:
        os.close(come)
        os.close(go)


def _run(
    module: object, arguments: list[str], files: tuple[int, int], seconds: int, n_bytes: int
) -> None:
    """Runs the program, in the child, which ends."""
    code = 1
    try:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for kind, most in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, n_bytes + _address_space()),
            (resource.RLIMIT_FSIZE, n_bytes),
        ):
            resource.setrlimit(kind, (most, most))
        sys.stdin, sys.stdout = os.fdopen(files[0]), os.fdopen(files[1], "w")
        sys.argv[:] = arguments
        module.main()  # type: ignore[attr-defined]
        sys.stdout.flush()
        code = 0
    finally:
        os._exit(code)


def _address_space() -> int:
    """Bytes of address space that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
