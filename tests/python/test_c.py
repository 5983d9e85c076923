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
    """The path of a program next to this Python (from PyPI), else on the system."""
    installed = Path(sys.executable).parent / name
    found = str(installed) if installed.is_file() else shutil.which(name)
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


def cached(folder: Path) -> dict[str, str]:
    """A build folder's CMake cache; empty if CMake has not run."""
    path = folder / "CMakeCache.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(re.findall(r"^(\w+):\w+=(.*)$", "\n".join(lines), re.MULTILINE))


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which pip compiled the library, to reuse its objects; else a new one."""
    folder = tmp_path_factory.mktemp("ctest")
    own = os.environ.get("SKBUILD_BUILD_DIR")  # as scikit-build-core reads it
    for wheel in [ROOT / own] if own else (ROOT / "build").glob("py3-none-*"):
        if cached(wheel).get("CMAKE_HOME_DIRECTORY") == str(ROOT):
            folder = wheel
    settled = cached(folder)
    # A different CMake would write different command lines, and ninja would recompile everything.
    # pip's isolated build environment is gone by now, with the libraries that CMake found in it.
    cmake, ninja = (
        path if Path(path := settled.get(key, "/none")).is_file() else tool(name)
        for key, name in (("CMAKE_COMMAND", "cmake"), ("CMAKE_MAKE_PROGRAM", "ninja"))
    )
    where = ["-S", str(ROOT), "-B", str(folder), f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    where += [] if settled else ["-G", "Ninja"]
    python = f"-DPython_EXECUTABLE={sys.executable}"
    run(cmake, *where, "-U", "OPENBLAS_LIBRARY", "-DGPTC_TESTS=ON", python)
    run(cmake, "--build", str(folder))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_c(build: Path, name: str) -> None:
    out = run(tool("ctest"), "--test-dir", str(build), "--output-on-failure", "-R", f"^{name}$")
    assert re.search(r"100% tests passed.* out of 1$", out, re.MULTILINE)
