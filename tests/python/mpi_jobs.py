"""Jobs of MPI for tests, where it is installed, and a world without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptc.engine.launch import STARTERS, mpi_library
from gptc.engine.world import World

TESTS = Path(__file__).resolve().parent
MPIRUN = shutil.which("mpirun")
needs_mpi = pytest.mark.skipif(
    MPIRUN is None or mpi_library(STARTERS[0]) is None,
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


def ours(stderr: str) -> list[str]:
    """The errors of gptc; mpirun adds its own lines about the exit code."""
    return [line for line in stderr.splitlines() if "gptc: error: " in line]


def world_of(size: int) -> World:
    world = World()
    world.size = size
    return world
