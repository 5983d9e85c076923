"""Jobs of MPI for tests, where it is installed, and a world without one."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gptc.engine.launch import OPEN_MPI, STARTERS, mpi_library
from gptc.engine.world import World

TESTS = Path(__file__).resolve().parent
MPIRUN = shutil.which("mpirun")


def _has_library() -> bool:
    """Whether Open MPI's library is there: that of a package, or the linker's."""
    try:
        ctypes.CDLL(mpi_library(STARTERS[0]) or OPEN_MPI)
    except OSError:
        return False
    return True


needs_mpi = pytest.mark.skipif(
    MPIRUN is None or not _has_library(),
    reason="needs Open MPI's mpirun and library: pip install gptc[mpi]",
)


def mpirun(*parts: list[object]) -> list[str]:
    """A command of mpirun: the parts are numbers of ranks with their arguments of Python."""
    command = [str(MPIRUN), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]
    for i, (n, *arguments) in enumerate(parts):
        command += [":"] * bool(i) + ["-n", str(n), sys.executable, *map(str, arguments)]
    return command


def environment() -> dict[str, str]:
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def job(folder: Path, options: dict[str, Any], what: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of ranks.py."""
    command = mpirun([2, TESTS / "ranks.py", folder, json.dumps(options), what])
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def connected_job(folder: Path, options: dict[str, Any], what: str) -> tuple[list[int], list[str]]:
    """Two ranks of ranks.py that torchrun's variables name; their exit codes and errors."""
    env = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    command = [sys.executable, str(TESTS / "ranks.py"), str(folder), json.dumps(options), what]
    started = [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


def ours(stderr: str) -> list[str]:
    """The errors of gptc; mpirun adds its own lines about the exit code."""
    return [line for line in stderr.splitlines() if "gptc: error: " in line]


def world_of(size: int) -> World:
    world = World()
    world.size = size
    return world


class ThreadWorld(World):
    """A rank that is a thread. `others` has the ranks of the job, in their order."""

    def __init__(self, others: list[ThreadWorld], size: int, barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size = len(others), size
        self._others, self._barrier = others, barrier
        self._shown: Any = None
        others.append(self)

    def host(self, rank: int) -> str:
        return "here"

    def _see(self, mine: Any) -> list[Any]:
        """What all ranks show."""
        self._shown = mine
        self._barrier.wait(60)
        seen = [other._shown for other in self._others]
        self._barrier.wait(60)
        return seen

    def gather(self, data: bytes) -> list[bytes]:
        return list(self._see(data))

    def _with_root(self, call: str, own: bytearray, sizes: list[int]) -> None:
        every = self._see(own)
        ends = [sum(sizes[: rank + 1]) for rank in range(self.size)]
        at = [slice(end - n, end) for end, n in zip(ends, sizes, strict=True)]
        if call == "gpt_comm_scatter" and self.rank:
            own[:] = every[0][at[self.rank]]
        elif call == "gpt_comm_gather" and not self.rank:
            for rank in range(1, self.size):
                own[at[rank]] = every[rank]
        self._barrier.wait(60)  # the arrays are free again


def thread_worlds(size: int) -> list[ThreadWorld]:
    worlds: list[ThreadWorld] = []
    barrier = threading.Barrier(size)
    for _ in range(size):
        ThreadWorld(worlds, size, barrier)
    return worlds
