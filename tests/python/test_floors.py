"""Includes and imports point only downward, and csrc/ keeps the rules of a library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

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
    "csrc/sample.c": {"ops.h", "error.h"},
    "csrc/api": {"backend.h", "error.h", "model/model.h", "profile.h"},
    "csrc/model": {"gpt.h", "ops.h", "error.h"},
    "csrc/cpu": {"gpt.h", "ops.h", "error.h"},
    # emulate.h stands for CUDA's own headers where tests compile the kernels for the host.
    "csrc/cuda": {"gpt.h", "ops.h", "error.h", "cuda_device.h", "emulate.h"},
}

# Each module's floor; it may import from the same floor or one below.
PYTHON_FLOORS = {
    "errors": 0,
    "checksum": 0,
    "sizes": 0,
    "automaton": 1,
    "grammar": 1,
    "_lib": 1,
    "config": 2,
    "model": 3,
    "stories": 3,
    "download": 2,
    "tokenizer": 3,
    "pretrained": 3,
    "known": 4,
    "readers": 4,
    "shards": 4,
    "dataset": 4,
    "loader": 5,
    "sources": 4,
    "scan": 4,
    "encode": 4,
    "prepare": 5,
    "data": 5,
    "formats": 5,
    "checkpoint": 5,
    "constraint": 4,
    "sampling": 5,
    "generation": 5,
    "speculative": 5,
    "beam": 5,
    "evaluate": 5,
    "progress": 5,
    "options": 5,
    "interchange": 6,
    "train": 6,
    "bench": 6,
    "bench_torch": 6,
    "doctor": 6,
    "bench_infer": 7,
    "cli": 8,
}

# Model.load and Model.save are what a person guesses first; they hand over to the floor above.
PYTHON_EXCEPTIONS = {("model", "checkpoint")}

C_FILES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".c", ".h", ".cu", ".cuh"})
PYTHON_FILES = sorted((ROOT / "python" / "gptc").rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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
        ("csrc/api/model.c", '"cuda_device.h"'),
        ("csrc/api/model.c", "<cuda_bf16.h>"),
    ],
)
def test_an_include_that_points_up_or_across_is_seen(name: str, included: str) -> None:
    assert wrong_includes(ROOT / name, f"#include {included}\n") == [included[1:-1]]


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_a_library_does_not_print_or_exit(path: Path) -> None:
    text = re.sub(r"/\*.*?\*/|\"(\\.|[^\"\\])*\"", "", path.read_text(), flags=re.DOTALL)
    found = re.findall(r"\b(exit|_exit|abort|assert|printf|fprintf|puts|perror)\s*\(", text)
    assert not found, f"{relative(path)} calls {found}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_imports_point_downward(path: Path) -> None:
    module = path.relative_to(ROOT / "python" / "gptc").parts[0].removesuffix(".py")
    if module in {"__init__", "__main__"}:
        return
    assert module in PYTHON_FLOORS, f"{module} has no floor: add it to PYTHON_FLOORS"
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "gptc" else [base]
        for name in names:
            parts = name.split(".")
            if parts[0] != "gptc" or len(parts) == 1 or parts[1] == "__version__":
                continue
            if (module, parts[1]) in PYTHON_EXCEPTIONS:
                continue
            assert PYTHON_FLOORS[parts[1]] <= PYTHON_FLOORS[module], (
                f"{relative(path)} imports {name}"
            )
