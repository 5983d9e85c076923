"""Imports and includes point strictly downward, and csrc/ keeps the rules of a library.

Two lists say what the floors are. Everything else follows: a package imports only packages below
it, modules of one package form no circle, and there is no list of exceptions. The last tests plant
a forbidden import in a copy and see it found.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Python's floors, top to bottom. The package's own __init__ and __main__ stand above all of them.
PYTHON_FLOORS = [
    "cli",
    "bench",
    "training",
    "convert",
    "checkpoint",
    "formats",
    "eval",
    "generation",
    "data",
    "tokenizer",
    "engine",
    "settings",
    "files",
    "errors",
    "_version",
]

C_FILES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".c", ".h", ".cu", ".cuh"})


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- Python ----


def module_name(package: Path, path: Path) -> str:
    """Such as gptc.data.loader; a package's __init__ is the package."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def import_nodes(text: str) -> list[ast.Import | ast.ImportFrom]:
    """All imports in a text, parsed once although the copies repeat most of it."""
    return [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]


def imports_of(path: Path, modules: set[str]) -> Iterator[str]:
    """What a file imports of ours, also inside functions and for type checkers only."""
    for node in import_nodes(path.read_text("utf-8")):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "gptc")
        else:
            base = "." * node.level + (node.module or "")
            if base.startswith("."):
                yield base  # a relative import has no floor
            elif base.split(".")[0] == "gptc":
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    yield full if full in modules else base


def floor(module: str) -> int:
    """The number of a module's floor, counted from the ground; the package itself is the roof."""
    parts = module.split(".")
    if parts in (["gptc"], ["gptc", "__main__"]):
        return len(PYTHON_FLOORS)
    return len(PYTHON_FLOORS) - 1 - PYTHON_FLOORS.index(parts[1])


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; [] where there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(arrows.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := visit(module, []))), [])


def wrong_imports(package: Path) -> list[str]:
    """Each import of the package that does not point downward, and a circle if there is one."""
    files = {module_name(package, path): path for path in sorted(package.rglob("*.py"))}
    arrows = {name: set(imports_of(path, set(files))) for name, path in files.items()}
    wrong = []
    for name, targets in arrows.items():
        for target in sorted(targets):
            unknown = target not in files or target.split(".")[1:2] not in [
                [floor] for floor in PYTHON_FLOORS
            ]
            inside = name.split(".")[:2] == target.split(".")[:2]
            if unknown or (floor(target) >= floor(name) and not inside):
                wrong.append(f"{name} imports {target}")
            elif inside and name.startswith(f"{target}."):
                wrong.append(f"{name} imports the package that holds it")
    if found := circle(arrows):
        wrong.append("circle: " + ", ".join(found))
    return wrong


def test_imports_point_downward() -> None:
    assert not wrong_imports(ROOT / "python" / "gptc")


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        (
            "formats/layout.py",
            "from gptc.checkpoint.reader import Checkpoint",
            "gptc.formats.layout imports gptc.checkpoint.reader",
        ),
        (
            "formats/layout.py",
            "from gptc.checkpoint import Checkpoint",
            "gptc.formats.layout imports gptc.checkpoint",
        ),
        ("engine/model.py", "import gptc", "gptc.engine.model imports gptc"),
        (
            "engine/model.py",
            "def f():\n    from gptc.data.loader import Loader",
            "gptc.engine.model imports gptc.data.loader",
        ),
        (
            "data/loader.py",
            "if TYPE_CHECKING:\n    from gptc.training.options import TrainOptions",
            "gptc.data.loader imports gptc.training.options",
        ),
        ("engine/model.py", "from . import config", "gptc.engine.model imports ."),
        ("data/loader.py", "from gptc.novel import x", "gptc.data.loader imports gptc.novel"),
        (
            "data/shards.py",
            "from gptc.data.loader import Loader",
            "circle: gptc.data.dataset, gptc.data.shards, gptc.data.loader, gptc.data.dataset",
        ),
        (
            "data/shards.py",
            "from gptc.data import Loader",
            "gptc.data.shards imports the package that holds it",
        ),
        ("files/words.py", "from gptc.errors import GptcError", ""),
    ],
)
def test_a_forbidden_import_is_found(
    tmp_path: Path, module: str, line: str, complaint: str
) -> None:
    copy = tmp_path / "gptc"
    shutil.copytree(ROOT / "python" / "gptc", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    found = wrong_imports(copy)
    assert (complaint in found) if complaint else not found, found


# ---- C ----

# What the files of a folder (or one file) may include of ours, besides their own folder.
C_FLOORS = {
    "csrc/gpt.h": set(),
    "csrc/error.h": {"gpt.h"},
    "csrc/error.c": {"error.h"},
    "csrc/ops.h": {"gpt.h"},
    "csrc/backend.h": {"ops.h"},
    "csrc/cuda_device.h": {"gpt.h"},
    "csrc/backend.c": {"backend.h", "cuda_device.h", "error.h"},
    "csrc/profile.h": {"ops.h"},
    "csrc/profile.c": {"profile.h", "error.h"},
    "csrc/api.c": {"backend.h", "error.h", "model/model.h", "profile.h"},
    "csrc/model": {"gpt.h", "ops.h", "error.h"},
    "csrc/cpu": {"gpt.h", "ops.h", "error.h"},
    # emulate.h stands for CUDA's own headers where tests compile the kernels for the host.
    "csrc/cuda": {"gpt.h", "ops.h", "error.h", "cuda_device.h", "emulate.h"},
}


def wrong_includes(path: Path, text: str) -> list[str]:
    """What a file of csrc/ with this text includes and may not."""
    name, folder = relative(path), relative(path.parent)
    allowed = C_FLOORS.get(name, C_FLOORS.get(folder))
    assert allowed is not None, f"{name} has no floor: add it to C_FLOORS"
    wrong = []
    for quote, included in re.findall(r'^\s*#\s*include\s+(["<])([^">]+)', text, re.MULTILINE):
        if quote == "<":
            fine = folder == "csrc/cuda" or not re.match("cuda|cublas|nv|mma", included)
        else:
            beside = folder != "csrc" and "/" not in included
            fine = included in allowed or (beside and (path.parent / included).is_file())
        if not fine:
            wrong.append(included)
    return wrong


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_includes_point_downward(path: Path) -> None:
    assert not wrong_includes(path, path.read_text())


@pytest.mark.parametrize(
    ("name", "included"),
    [
        ("csrc/cuda/norm.cu", '"model/model.h"'),
        ("csrc/cuda/norm.cu", '"../model/model.h"'),
        ("csrc/cuda/norm.cu", '"../cpu/simd.h"'),
        ("csrc/cuda/norm.cu", '"backend.h"'),
        ("csrc/cpu/norm.c", '"../cuda/product.h"'),
        ("csrc/cpu/norm.c", '"cuda_device.h"'),
        ("csrc/cpu/norm.c", "<cuda_runtime.h>"),
        ("csrc/model/forward.c", '"cuda/cuda.h"'),
        ("csrc/model/forward.c", "<cublasLt.h>"),
        ("csrc/api.c", '"cuda_device.h"'),
        ("csrc/api.c", "<cuda_bf16.h>"),
    ],
)
def test_an_include_that_points_up_or_across_is_seen(name: str, included: str) -> None:
    assert wrong_includes(ROOT / name, f"#include {included}\n") == [included[1:-1]]


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_a_library_does_not_print_or_exit(path: Path) -> None:
    text = re.sub(r"/\*.*?\*/|\"(\\.|[^\"\\])*\"", "", path.read_text(), flags=re.DOTALL)
    found = re.findall(r"\b(exit|_exit|abort|assert|printf|fprintf|puts|perror)\s*\(", text)
    assert not found, f"{relative(path)} calls {found}"
