"""Prints the structure of the code: modules, import circles, and the longest pieces.

    python tools/structure.py            # this checkout
    python tools/structure.py FOLDER     # another checkout

A room is a module or package directly in python/gptc. An arrow is an import from one room to
another; imports inside functions and under TYPE_CHECKING count. A circle is a group of modules (or
rooms) that all reach each other. gptc/__init__.py is not counted: every import runs it, and a name
that it re-exports counts for its module. Lengths are in lines, with blank lines and comments; a
function's length includes its decorators and inner functions.
"""

from __future__ import annotations

import ast
import bisect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "gptc"
LONGEST = 10
C_SUFFIXES = {".c", ".h", ".cu", ".cuh"}

Arrows = dict[str, set[str]]


class Piece(NamedTuple):
    """A module, class, function or file, and its length in lines."""

    name: str
    lines: int


# ---- Python ----


def read_modules(folder: Path) -> dict[str, ast.Module]:
    """The modules of the package in `folder`, by dotted name."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        modules[".".join(parts)] = ast.parse(path.read_text("utf-8"), str(path))
    return modules


def imported(tree: ast.Module, package: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each import; `name` is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                yield base, alias.name


def module_arrows(modules: dict[str, ast.Module]) -> Arrows:
    """The gptc modules that each module imports; importing a package means its __init__."""
    packages = {name.rpartition(".")[0] for name in modules}
    root = modules.get(PACKAGE, ast.Module([], []))
    passed_on = {part: base for base, part in imported(root, PACKAGE) if base in modules}
    arrows: Arrows = {}
    for name, tree in modules.items():
        if name == PACKAGE:
            continue
        package = name if name in packages else name.rpartition(".")[0]
        arrows[name] = set()
        for base, part in imported(tree, package):
            if f"{base}.{part}" in modules:
                arrows[name].add(f"{base}.{part}")
            elif base == PACKAGE and part in passed_on:
                arrows[name].add(passed_on[part])
            elif base in modules:
                arrows[name].add(base)
        arrows[name] -= {name, PACKAGE}
    return arrows


def room(module: str) -> str:
    """The module or package directly in gptc that a module belongs to."""
    return ".".join(module.split(".")[:2])


def room_arrows(arrows: Arrows) -> Arrows:
    """Arrows between rooms."""
    rooms: Arrows = {room(name): set() for name in arrows}
    for name, targets in arrows.items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    return rooms


def circles(arrows: Arrows) -> list[list[str]]:
    """Groups of more than one node that all reach each other, largest first."""
    reach = {name: set(targets) for name, targets in arrows.items()}
    for middle in arrows:  # Warshall's transitive closure
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in reach if a in reach[a]}
    return sorted((sorted(group) for group in groups), key=lambda group: (-len(group), group))


def definitions(modules: dict[str, ast.Module]) -> tuple[list[Piece], list[Piece]]:
    """All classes and all functions, methods included."""
    classes, functions = [], []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, prefix)
                continue
            first = min([child.lineno, *(each.lineno for each in child.decorator_list)])
            piece = Piece(f"{prefix}.{child.name}", (child.end_lineno or first) - first + 1)
            (classes if isinstance(child, ast.ClassDef) else functions).append(piece)
            visit(child, piece.name)

    for name, tree in modules.items():
        visit(tree, name)
    return classes, functions


# ---- C ----

# Comments, strings and preprocessor lines, in which braces do not count.
_NOT_CODE = re.compile(
    r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'"
    r"|^[ \t]*#(?:\\\n|[^\n])*",
    re.DOTALL | re.MULTILINE,
)
_HOLDER = re.compile(r"\b(namespace|struct|union|class|extern)\b[^()=]*$")


def without_comments(text: str) -> str:
    """The text with everything but code blanked, so that offsets and lines stay."""
    return _NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def function_name(head: str) -> str:
    """The function's name in a declaration; empty if it declares something else."""
    if not head.rstrip().endswith(")") or "=" in re.sub(r"\(.*\)", "", head, flags=re.DOTALL):
        return ""
    depth = 0
    for at in range(len(head.rstrip()) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(head[at], 0)
        if depth == 0:
            name = re.search(r"(\w+)\s*$", head[:at])
            return name[1] if name else ""
    return ""


def c_functions(text: str) -> list[Piece]:
    """The functions that a file defines, in order."""
    code = without_comments(text)
    starts = [match.start() for match in re.finditer(r"^", code, re.MULTILINE)]
    found, depth, head_at, name = [], 0, 0, ""
    for match in re.finditer(r"[{};]", code):
        at, sign = match.start(), match[0]
        if depth == 0 and sign == "{":
            head = code[head_at:at]
            name = function_name(head)
            if not name and _HOLDER.search(head):
                head_at = match.end()  # its body is scanned like the top level
                continue
            begin = head_at + len(head) - len(head.lstrip())
            depth = 1
        elif sign == "{":
            depth += 1
        elif sign == "}" and depth:
            # An #if with two heads leaves one brace too many; a brace in column 1 ends a function.
            depth = 0 if code[at - 1] == "\n" else depth - 1
            if depth == 0 and name:
                lines = bisect.bisect(starts, at) - bisect.bisect(starts, begin) + 1
                found.append(Piece(name, lines))
        if depth == 0:
            head_at = match.end()
    return found


# ---- the report ----


def table(title: str, pieces: list[Piece]) -> str:
    """The longest pieces."""
    longest = sorted(pieces, key=lambda piece: (-piece.lines, piece.name))[:LONGEST]
    mean = sum(piece.lines for piece in pieces) / max(1, len(pieces))
    head = f"{title}: {len(pieces)}, {mean:.1f} lines on average; the longest:"
    return "\n".join([head, *(f"  {piece.lines:5}  {piece.name}" for piece in longest)])


def circle_table(title: str, found: list[list[str]]) -> str:
    """The circles, one per line."""
    lines = ["  " + ", ".join(group) for group in found]
    return "\n".join([f"{title}: {len(found)}", *lines])


def report(root: Path) -> str:
    """The whole report for the checkout in `root`."""
    folder = root / "python" / PACKAGE
    modules = read_modules(folder)
    arrows = module_arrows(modules)
    rooms = room_arrows(arrows)
    lengths = [
        Piece(str(path.relative_to(folder)), len(path.read_text("utf-8").splitlines()))
        for path in sorted(folder.rglob("*.py"))
    ]
    classes, functions = definitions(modules)
    csrc = root / "csrc"
    c_files, c_found = [], []
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in C_SUFFIXES):
        text, name = path.read_text("utf-8"), str(path.relative_to(csrc))
        c_files.append(Piece(name, len(text.splitlines())))
        c_found += [Piece(f"{name}: {each.name}", each.lines) for each in c_functions(text)]
    n_arrows = sum(len(targets) for targets in rooms.values())
    return "\n\n".join(
        [
            f"python/{PACKAGE}: {len(modules)} modules in {len(rooms)} rooms, "
            f"{n_arrows} arrows between rooms",
            circle_table("import circles of modules", circles(arrows)),
            circle_table("import circles of rooms", circles(rooms)),
            table("modules", lengths),
            table("classes", classes),
            table("functions", functions),
            table("csrc files", c_files),
            table("csrc functions", c_found),
        ]
    )


def main() -> None:
    """The command line."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    print(report(root))


if __name__ == "__main__":
    main()
