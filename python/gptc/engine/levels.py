"""Where AMX is faster than AVX-512, as measured: once for a CPU, a version and a shape of an op.

The library takes AMX only where it was measured to be faster (`gpt_cpu_measure` in gpt.h). The
first model of a machine measures ops of a common shape, and `gptc bench` those of its model. The
times are kept in the cache, where every process reads them as it begins.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gptc.engine import library
from gptc.errors import GptcError
from gptc.files.paths import cache_folder
from gptc.files.whole import write_file

LEVELS = ("avx512bf16", "amx")
_CALLS = 2 * 4  # of one shape, until the library has timed it on both levels
# What a missing or damaged file can raise.
_DAMAGED = (GptcError, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
_is_restored = False  # of this process: the times in the cache


class LevelTimes(NamedTuple):
    """Seconds of an op at one shape on each of LEVELS, as gpt_level_times in gpt.h."""

    op: str
    dtype: int
    a: int
    b: int
    rows: int
    seconds: tuple[float, float]

    @property
    def level(self) -> str:
        """The faster one, which is used."""
        return LEVELS[self.seconds[1] < self.seconds[0]]


def has_choice() -> bool:
    """Whether this CPU has both levels, and GPTC_CPU_LEVEL names none."""
    return "GPTC_CPU_LEVEL" not in os.environ and library.cpu_level() == LEVELS[1]


def measure(run: Callable[[], object]) -> None:
    """Calls `run` until its ops are timed on both levels, and keeps the times. Else does nothing.

    Ops whose times are known are not timed again.
    """
    if not has_choice():
        return
    library.call("gpt_cpu_measure", 1)
    try:
        for _ in range(_CALLS):
            run()
    finally:
        library.call("gpt_cpu_measure", 0)
    _write(times())


def times() -> list[LevelTimes]:
    """All that has been measured."""
    ffi, lib, _ = library.load()
    one = ffi.new("gpt_level_times *")
    found: list[LevelTimes] = []
    while lib.gpt_cpu_times(len(found), one) == library.GPT_OK:
        seconds = one.seconds[0], one.seconds[1]
        name = ffi.string(one.op).decode()
        found.append(LevelTimes(name, one.dtype, one.a, one.b, one.rows, seconds))
    return found


# ---- the file ----


def _file() -> Path:
    return cache_folder() / "plans" / "cpu.json"


def _circumstances(ffi: Any, lib: Any) -> dict[str, str]:
    return {"cpu": library.cpu_name(), "version": ffi.string(lib.gpt_version()).decode()}


def _write(measured: list[LevelTimes]) -> None:
    """Without a cache that can be written, the times are this process's."""
    ffi, lib, _ = library.load()
    content = _circumstances(ffi, lib) | {"times": [one._asdict() for one in measured]}
    with suppress(GptcError, OSError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(content).encode())


def restore(measure_some: Callable[[], object]) -> None:
    """Gives the library the times of this CPU and this version, once.

    A file that is damaged, or of others, has none. `measure_some` makes the first ones.
    """
    global _is_restored
    if _is_restored or not has_choice():
        return
    _is_restored = True  # what is measured is a model too
    _read()
    if not times():
        measure_some()


def _read() -> None:
    ffi, lib, _ = library.load()
    with suppress(*_DAMAGED):
        content = json.loads(_file().read_bytes())
        where = _circumstances(ffi, lib)
        if {name: content[name] for name in where} != where:
            return
        for one in content["times"]:
            known = LevelTimes(**one)
            if all(math.isfinite(s) and s > 0 for s in known.seconds):
                struct = [known.op.encode(), *known[1:-1], list(known.seconds)]
                lib.gpt_cpu_set_times(ffi.new("gpt_level_times *", struct))
