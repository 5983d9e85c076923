"""The C tests pass: CMake builds them, and ctest runs each as one pytest item."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "tests" / "c").glob("test_*.c"))


def tool(name: str) -> str:
    """The program in the folder of this Python (from PyPI), or the system's."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if not found:
        pytest.fail(f"{name} is missing; install the tests' tools with: pip install '.[test]'")
    return found


def run(*command: str) -> str:
    # CMake starts ninja by name, so the folder of this Python comes first in PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ctest")
    cmake = tool("cmake")
    python = f"-DPython_EXECUTABLE={sys.executable}"
    run(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DGPTC_TESTS=ON", python)
    run(cmake, "--build", str(folder))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_c(build: Path, name: str) -> None:
    out = run(tool("ctest"), "--test-dir", str(build), "--output-on-failure", "-R", f"^{name}$")
    assert re.search(r"100% tests passed.* out of 1$", out, re.MULTILINE)
