"""libgpt.so exports exactly the functions that gpt.h declares, and Python can call them."""

from __future__ import annotations

import os
import re
import shlex
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


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """A folder with an installed libgpt.so, gpt.h, gptc.pc and OpenBLAS, and nothing else."""
    path, header = library.find_library()
    folder = tmp_path / "a plain folder"
    folder.mkdir()
    installed = path.parent
    if (path.parent / "CMakeCache.txt").is_file():  # a build folder, whose paths CMake replaces
        if not shutil.which("cmake"):
            pytest.skip("needs cmake, or an installed library")
        command = ["cmake", "--install", path.parent, "--prefix", tmp_path / "installed"]
        subprocess.run(command, check=True, capture_output=True)
        installed = tmp_path / "installed" / "gptc"
    for file in (installed / "libgpt.so", header, installed / "gptc.pc"):
        shutil.copy(file, folder)
    blas = pytest.importorskip("scipy_openblas32")
    for file in Path(blas.get_lib_dir()).glob("*.so*"):
        shutil.copy(file, folder)
    shutil.rmtree(tmp_path / "installed", ignore_errors=True)
    return folder


def options_of(pc: Path) -> list[str]:
    """Compiler options by pkg-config, or read from gptc.pc where it is missing."""
    if shutil.which("pkg-config"):
        command = ["pkg-config", "--cflags", "--libs", "gptc"]
        there = {**os.environ, "PKG_CONFIG_PATH": str(pc.parent)}
        asked = subprocess.run(command, check=True, capture_output=True, text=True, env=there)
        return shlex.split(asked.stdout)
    lines = pc.read_text().splitlines()
    assert lines[0] == "prefix=${pcfiledir}"
    words = " ".join(line.partition(": ")[2] for line in lines if line[:4] in ("Cfla", "Libs"))
    return [word.replace("${prefix}", str(pc.parent)) for word in words.split()]


def test_a_plain_folder_is_enough_for_a_c_program(
    plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gptc.pc has the options, and libgpt.so finds OpenBLAS next to itself, wherever that is."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    options = options_of(plain_folder / "gptc.pc")
    rpath = f"-Wl,-rpath,{plain_folder}"
    assert set(options) == {f"-I{plain_folder}", f"-L{plain_folder}", "-lgpt", rpath}
    check_example(example(tmp_path)[0], options)
    # Not by a path that was there when it was built.
    for blas in plain_folder.glob("*openblas*"):
        blas.unlink()
    ran = subprocess.run([tmp_path / "example"], capture_output=True, text=True)
    assert ran.returncode == 127
    assert "openblas" in ran.stderr
