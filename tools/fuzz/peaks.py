"""The most memory that was resident since a moment, which costs nothing while a file is read.

Memory that was freed and is still the process's would hide what is allocated in its place, so it is
given back to the system first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from contextlib import suppress
from functools import cache
from pathlib import Path


def resident() -> int:
    """Bytes of memory now, from which peaks are counted. Forgets the peak."""
    forget_peak()  # that of the process that forked this one
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def peak() -> int:
    """The most bytes of memory since the peak was forgotten."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Begins a new peak, where the system can."""
    with suppress(OSError):
        os.pwrite(_clear_refs(os.getpid()), b"5", 0)


def give_back() -> None:
    """Returns freed memory to the system."""
    _c_library().malloc_trim(0)


@cache
def can_measure() -> bool:
    """Whether the system has all that this needs: Linux with glibc."""
    try:
        return os.pwrite(_clear_refs(os.getpid()), b"5", 0) == 1 and bool(_c_library().malloc_trim)
    except (OSError, AttributeError):
        return False


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@cache
def _clear_refs(process: int) -> int:
    """The file by which this process, and none that forked it, forgets its peak."""
    return os.open(f"/proc/{process}/clear_refs", os.O_WRONLY)
