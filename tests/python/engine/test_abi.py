"""libgpt.so exports exactly the functions that gpt.h declares, and Python can call them."""

from __future__ import annotations

import os
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


def example(tmp_path: Path) -> tuple[Path, list[str]]:
    """The program at the top of gpt.h, and the options of the command below it."""
    path, header = library.find_library()
    comment = header.read_text().split("*/")[0]
    lines = re.findall(r"^ \*     (.*)$", comment, re.MULTILINE)
    command = lines.pop().replace("cc example.c ", "").replace(" -o example", "")
    (tmp_path / "example.c").write_text("\n".join(lines) + "\n")
    command = command.replace("-IDIR", f"-I{header.parent}").replace("DIR", str(path.parent))
    return tmp_path / "example.c", command.split()


def check_example(source: Path, options: list[str]) -> None:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    program = source.with_suffix("")
    command = [compiler, "-Wall", "-Wextra", source, *options, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert not built.stderr
    told = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    losses = [float(line.split()[-1]) for line in told.splitlines()]
    assert len(losses) == 50
    assert losses[-1] < losses[0] / 4


def test_the_example_at_the_top_of_the_header_works(tmp_path: Path) -> None:
    check_example(*example(tmp_path))


def test_pkg_config_gives_the_options(tmp_path: Path) -> None:
    """From a plain folder that holds the library, OpenBLAS, gpt.h and gptc.pc."""
    path, header = library.find_library()
    blas = pytest.importorskip("scipy_openblas32")
    pc = path.with_name("gptc.pc")
    if not shutil.which("pkg-config"):
        pytest.skip("needs pkg-config")
    if path.parent.name != "gptc" or not pc.is_file():
        pytest.skip("the library is not the installed one")
    for file in (path, header, pc, *Path(blas.get_lib_dir()).glob("*.so*")):
        shutil.copy(file, tmp_path)
    asked = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "gptc"], check=True, capture_output=True, text=True,
        env={**os.environ, "PKG_CONFIG_PATH": str(tmp_path)},
    )  # fmt: skip
    options = asked.stdout.split()
    assert set(options) == {f"-I{tmp_path}", f"-L{tmp_path}", "-lgpt", f"-Wl,-rpath,{tmp_path}"}
    check_example(example(tmp_path)[0], options)
