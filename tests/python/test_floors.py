"""Imports and includes point strictly downward, and csrc/ keeps the rules of a library.

Two lists define the floors. A package imports only packages below it, modules of one package form
no circle, and there are no exceptions. The last tests add a forbidden import to a copy and check
that it is found.
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

# Python's floors, top to bottom. The package's own __init__ and __main__ are above all of them.
PYTHON_FLOORS = [
    "cli",
    "bench",
    "serve",
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
    """A file's module name, such as gptc.data.loader; a package's __init__ is the package."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def import_nodes(text: str) -> list[ast.Import | ast.ImportFrom]:
    """All imports in a text, parsed once although the copies repeat most of it."""
    return [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]


def imports_of(path: Path, modules: set[str]) -> Iterator[str]:
    """A file's imports of gptc modules, also inside functions and under TYPE_CHECKING."""
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
    """The number of a module's floor, from the bottom; the package itself is the top floor."""
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
            "circle: gptc.data.shards, gptc.data.loader, gptc.data.dataset, gptc.data.shards",
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

# C's floors, top to bottom, and the lower headers that each includes besides its own. `model` and
# the backends interact through ops.h alone.
C_FLOORS = {
    "api": {
        "backend.h",
        "block_types.h",
        "profile.h",
        "model/model.h",
        "sample.h",
        "files/config_json.h",
        "files/naming.h",
        "files/tensors.h",
        "comm/background.h",
        "comm/nccl.h",
        "error.h",
        "fork.h",
    },
    "backend": {"choice.h", "cuda_device.h", "ops.h", "error.h"},
    "choice": {"ops.h", "error.h"},
    "profile": {"finite.h", "ops.h", "error.h"},
    "finite": {"ops.h"},
    "model": {"moments.h", "ops.h", "error.h", "interrupt.h"},
    "files": {"error.h", "gpt.h"},
    "comm": {"error.h", "interrupt.h", "gpt.h"},
    "cpu": {"block_types.h", "moments.h", "sample.h", "ops.h", "error.h", "fork.h", "gpt.h"},
    "cuda": {"block_types.h", "sample.h", "cuda_device.h", "ops.h", "error.h"},
    "block_types": {"ops.h"},
    "moments": {"ops.h"},
    "sample": {"ops.h", "error.h"},
    "cuda_device": {"gpt.h"},
    "ops": {"gpt.h"},
    "error": {"gpt.h"},
    "interrupt": {"gpt.h"},
    "fork": set(),
    "gpt": set(),
}


def c_floor(path: Path, csrc: Path) -> str:
    """The folder of a file of csrc, or its own name."""
    return path.relative_to(csrc).parts[0].partition(".")[0]


def wrong_includes(csrc: Path) -> list[str]:
    """Each include that C_FLOORS does not allow, and a circle of headers if there is one."""
    wrong, arrows = [], {}
    files = (p for p in csrc.rglob("*") if p.suffix in {".c", ".h", ".cu", ".cuh"})
    for path in sorted(files):
        floor, name = c_floor(path, csrc), path.relative_to(csrc).as_posix()
        arrows[name] = set()
        text = re.sub(r"/\*.*?\*/", "", path.read_text("utf-8"), flags=re.DOTALL)
        for quote, included in re.findall(r'^\s*#\s*include\s+(["<])([^">]+)', text, re.MULTILINE):
            if quote == "<":
                fine = floor == "cuda" or not re.match("cuda|cublas|nv|mma|mpi", included)
            else:
                near = path.parent / included
                found = near if near.is_file() else csrc / included
                own = found.is_file() and c_floor(found, csrc) == floor and "/" not in included
                fine = own or included in C_FLOORS.get(floor, set())
                if fine:
                    arrows[name].add(found.relative_to(csrc).as_posix())
            if not fine:
                wrong.append(f"{name} includes {included}")
    if found_circle := circle(arrows):
        wrong.append("circle: " + ", ".join(found_circle))
    return wrong


def test_includes_point_downward() -> None:
    assert not wrong_includes(ROOT / "csrc")


def test_the_floors_of_c_are_in_order() -> None:
    order = list(C_FLOORS)
    for floor, headers in C_FLOORS.items():
        for header in headers:
            assert order.index(re.split("[/.]", header)[0]) > order.index(floor), (floor, header)


@pytest.mark.parametrize(
    ("file", "included"),
    [
        ("cuda/norm.cu", '"model/model.h"'),
        ("cuda/norm.cu", '"../model/model.h"'),
        ("cuda/norm.cu", '"../cpu/simd.h"'),
        ("cuda/norm.cu", '"backend.h"'),
        ("cpu/norm.c", '"../cuda/product.h"'),
        ("cpu/norm.c", '"cuda_device.h"'),
        ("cpu/norm.c", "<cuda_runtime.h>"),
        ("model/forward.c", '"cuda/cuda.h"'),
        ("model/forward.c", '"backend.h"'),
        ("model/forward.c", "<cublasLt.h>"),
        ("files/tensors.c", '"model/model.h"'),
        ("model/forward.c", '"files/json.h"'),
        ("model/forward.c", '"comm/comm.h"'),
        ("comm/mpi.c", "<mpi.h>"),
        ("api/model.c", '"cuda_device.h"'),
        ("api/model.c", "<cuda_bf16.h>"),
        ("ops.h", '"backend.h"'),
    ],
)
def test_a_forbidden_include_is_found(tmp_path: Path, file: str, included: str) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    with (tmp_path / "csrc" / file).open("a", encoding="utf-8") as source:
        source.write(f"\n#include {included}\n")
    assert f"{file} includes {included[1:-1]}" in wrong_includes(tmp_path / "csrc")


def test_a_circle_of_headers_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    with (tmp_path / "csrc" / "cpu" / "simd.h").open("a", encoding="utf-8") as header:
        header.write('\n#include "softmax.h"\n')
    assert wrong_includes(tmp_path / "csrc") == ["circle: cpu/simd.h, cpu/softmax.h, cpu/simd.h"]


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_a_library_does_not_print_or_exit(path: Path) -> None:
    text = re.sub(r"/\*.*?\*/|\"(\\.|[^\"\\])*\"", "", path.read_text(), flags=re.DOTALL)
    found = re.findall(r"\b(exit|_exit|abort|assert|printf|fprintf|puts|perror)\s*\(", text)
    assert not found, f"{relative(path)} calls {found}"
