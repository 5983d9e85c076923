"""libgpt.so exports exactly the functions that gpt.h declares, and Python can call them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gptc.engine import library


def exported(kind: str) -> set[str]:
    """Names of the library's dynamic symbols of these nm types."""
    if not shutil.which("nm"):
        pytest.skip("needs nm, from binutils")
    out = subprocess.run(
        ["nm", "-D", "--defined-only", str(library.find_library()[0])],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = [line.split() for line in out.splitlines()]
    return {name for _, found, name in rows if found in kind}


def test_exports_are_the_header_and_nothing_else() -> None:
    text = re.sub(r"/\*.*?\*/", "", library.find_library()[1].read_text(), flags=re.DOTALL)
    declared = set(re.findall(r"^[\w ]+?[ *](gpt_\w+)\(", text, re.MULTILINE))
    assert len(declared) > 20
    assert exported("T") == declared


def test_no_data_is_exported() -> None:
    assert not exported("BDRV")


def test_every_declared_function_can_be_called_from_python() -> None:
    lib = library.load().lib
    for name in exported("T"):
        assert callable(getattr(lib, name))


def test_versions_agree() -> None:
    path, header = library.find_library()
    assert library.load().path == path
    assert library.load().lib.gpt_abi_version() == library.abi_version(header.read_text())


def test_the_example_at_the_top_of_the_header_works(tmp_path: Path) -> None:
    path, header = library.find_library()
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    comment = header.read_text().split("*/")[0]
    lines = re.findall(r"^ \*     (.*)$", comment, re.MULTILINE)
    command = lines.pop().replace("cc ", "").replace("example", str(tmp_path / "example"))
    (tmp_path / "example.c").write_text("\n".join(lines) + "\n")
    command = command.replace("-IDIR", f"-I{header.parent}").replace("DIR", str(path.parent))
    words = command.split()
    built = subprocess.run([compiler, "-Wall", "-Wextra", *words], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert not built.stderr
    told = subprocess.run([tmp_path / "example"], check=True, capture_output=True, text=True).stdout
    losses = [float(line.split()[-1]) for line in told.splitlines()]
    assert len(losses) == 50
    assert losses[-1] < losses[0] / 4
