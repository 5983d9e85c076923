"""tools/structure.py counts circles and lengths, in a flat package and in nested ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[3] / "tools" / "structure.py"


def report(root: Path, files: dict[str, str]) -> list[str]:
    """The tool's output for a checkout of these files, by line."""
    for folder in ("python/gptc", "csrc"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    command = [sys.executable, TOOL, root]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def after(lines: list[str], title: str) -> list[str]:
    """The indented lines under a title."""
    at = next(i for i, line in enumerate(lines) if line.startswith(title))
    rest = lines[at + 1 :]
    return [line.strip() for line in rest[: rest.index("")] if line] if "" in rest else rest


def test_a_circle_through_a_function_is_seen(tmp_path: Path) -> None:
    lines = report(
        tmp_path,
        {
            "python/gptc/__init__.py": "from gptc.a import A\n",
            "python/gptc/a.py": "class A:\n    def f(self):\n        from gptc.b import B\n",
            "python/gptc/b.py": "from gptc import A\nimport gptc.c\nB = 1\n",
            "python/gptc/c.py": "from gptc import __version__\n",
        },
    )
    assert lines[0] == "python/gptc: 4 modules in 3 rooms, 3 arrows between rooms"
    assert after(lines, "import circles of modules: 1") == ["gptc.a, gptc.b"]
    assert after(lines, "import circles of rooms: 1") == ["gptc.a, gptc.b"]


def test_a_circle_inside_a_package_is_one_of_modules_alone(tmp_path: Path) -> None:
    lines = report(
        tmp_path,
        {
            "python/gptc/__init__.py": "",
            "python/gptc/data/__init__.py": "",
            "python/gptc/data/a.py": "from .b import x\nfrom gptc.errors import E\n",
            "python/gptc/data/b.py": "from gptc.data import a\n",
            "python/gptc/errors.py": "",
        },
    )
    assert lines[0] == "python/gptc: 5 modules in 2 rooms, 1 arrows between rooms"
    assert after(lines, "import circles of modules: 1") == ["gptc.data.a, gptc.data.b"]
    assert after(lines, "import circles of rooms: 0") == []


def test_lengths_of_classes_and_functions(tmp_path: Path) -> None:
    text = "class A:\n    @property\n    def f(self):\n        return 1\n\n\ndef g():\n    pass\n"
    lines = report(tmp_path, {"python/gptc/__init__.py": "", "python/gptc/a.py": text})
    assert after(lines, "classes") == ["4  gptc.a.A"]
    assert after(lines, "functions") == ["3  gptc.a.A.f", "2  gptc.a.g"]
    assert after(lines, "modules") == ["8  a.py", "0  __init__.py"]


C = """/* int no(void) {
} */
#define BRACE {
typedef struct pair {
    int a;
} pair;

static const int table[] = {1,
                            2};

static int one(int a,
               int b) {
    if (a)
        return '{';
    return b;
}

int two(void) { return 2; }

extern "C" {
template <int N>
__global__ void __launch_bounds__(256) three(args a) {
    for (;;) { puts("}"); }
}
}
"""


def test_functions_of_c_are_found_and_measured(tmp_path: Path) -> None:
    lines = report(tmp_path, {"python/gptc/__init__.py": "", "csrc/a/b.cu": C})
    assert after([*lines, ""], "csrc functions") == [
        "6  a/b.cu: one",
        "4  a/b.cu: three",
        "1  a/b.cu: two",
    ]
    assert after(lines, "csrc files") == [f"{len(C.splitlines())}  a/b.cu"]
