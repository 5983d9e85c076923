"""The package depends on what it imports and no more, and its lock and bill name all of it.

The class: a part that a build, a wheel or a user needs, and that no list names.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from tool_files import load_tool

ROOT = Path(__file__).resolve().parents[3]
if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Modules whose package has another name.
PACKAGE_OF = {"tomllib": "tomli", "urllib3": "requests", "prometheus_client": "prometheus-client"}
# Imported where one is installed, to compare with it: no extra brings them.
ONLY_COMPARED = {"ctranslate2", "llama-cpp", "onnxruntime-genai", "openvino", "openvino-genai"}
DIST_INFO = f"gptc-{PROJECT['version']}.dist-info"

sbom = load_tool("sbom")


def names(requirements: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in requirements)
    return {sbom.canonical(name[0]) for name in found if name} - {"gptc"}


@cache
def imported() -> set[str]:
    """The packages that gptc imports, but for Python's own."""
    found = set()
    for path in (ROOT / "python" / "gptc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module)
    tops = {module.partition(".")[0] for module in found} - {"gptc"}
    tops = {
        PACKAGE_OF.get(top, top)
        for top in tops
        if top not in sys.stdlib_module_names or top in PACKAGE_OF
    }
    return {sbom.canonical(top) for top in tops}


def test_each_dependency_is_imported() -> None:
    extras = PROJECT["optional-dependencies"]
    assert names(PROJECT["dependencies"]) - imported() == set()
    assert names([*extras["data"], *extras["hub"], *extras["serve"]]) - imported() == set()


def test_each_import_is_a_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    groups = ("data", "grammar", "hub", "serve", "parity", "plot", "harness")
    optional = names([line for group in groups for line in extras[group]])
    assert imported() - names(PROJECT["dependencies"]) - optional <= ONLY_COMPARED


def with_extras(extra: str) -> list[str]:
    """The requirements of an extra, and of those of ours that it names."""
    found = []
    for line in PROJECT["optional-dependencies"][extra]:
        if ours := re.fullmatch(r"gptc\[(.+)\]", line):
            found += [part for inner in ours[1].split(",") for part in with_extras(inner)]
        else:
            found.append(line)
    return found


def test_the_lock_has_a_hash_for_each_dependency() -> None:
    pinned = sbom.locked((ROOT / "requirements.lock").read_text())
    wanted = names([*PROJECT["dependencies"], *with_extras("dev")])
    assert {"ruff", "pytest", "huggingface-hub", "llguidance", "matplotlib"} <= wanted
    assert wanted - set(pinned) == set(), "see CONTRIBUTING.md for the command that writes the lock"
    for name, versions in pinned.items():
        assert all(hashes for _, hashes in versions), name


EMPTY = "gptc/a.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0"
METADATA = (
    "Metadata-Version: 2.4\nName: gptc\nVersion: 0.1.0\nLicense-Expression: MIT\n"
    "Requires-Dist: numpy>=1.24\nRequires-Dist: gptc[data]; extra == 'test'\n"
    "Requires-Dist: Pyarrow>=14; extra == 'data'\nRequires-Dist: novel\n"
)


def make_wheel(folder: Path, *rows: str, content: str = "", more: str = "") -> Path:
    """A wheel with gptc/a.py, its METADATA, perhaps one `more` file, and a RECORD of these rows."""
    info = "gptc-0.1.0.dist-info"
    digest = base64.urlsafe_b64encode(hashlib.sha256(METADATA.encode()).digest()).decode()
    own = [f"{info}/METADATA,sha256={digest.rstrip('=')},{len(METADATA)}", f"{info}/RECORD,,"]
    wheel = folder / "gptc-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gptc/a.py", content)
        archive.writestr(f"{info}/METADATA", METADATA)
        if more:
            archive.writestr(more, "")
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, *own]) + "\n")
    return wheel


def test_a_bill_of_materials(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, EMPTY)
    lock = (
        f"numpy==2.1 ; python_full_version < '3.11' \\\n    --hash=sha256:{'a' * 64}\n"
        f"numpy==2.3 \\\n    --hash=sha256:{'b' * 64}\n    # via gptc\n"
        f"pyarrow==26.0 \\\n    --hash=sha256:{'c' * 64}\n"
    )
    made = sbom.bill(wheel, lock)
    parts = {part.get("purl", part["name"]): part for part in made["components"]}
    assert sorted(parts) == [
        "gptc-0.1.0.dist-info/METADATA", "gptc/a.py", "pkg:pypi/novel", "pkg:pypi/numpy@2.1",
        "pkg:pypi/numpy@2.3", "pkg:pypi/pyarrow@26.0",
    ]  # fmt: skip
    assert parts["pkg:pypi/pyarrow@26.0"]["scope"] == "optional"
    assert parts["pkg:pypi/numpy@2.3"]["scope"] == "required"
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert parts["gptc/a.py"]["hashes"] == [{"alg": "SHA-256", "content": empty}]
    assert json.loads(json.dumps(made)) == made
    assert made == sbom.bill(wheel, lock)


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ((EMPTY,), {"content": "x = 1"}, "gptc/a.py differs from its hash in RECORD"),
        ((), {}, "gptc/a.py is in it or in its RECORD alone"),
        ((EMPTY, EMPTY.replace("a.py", "b.py")), {}, "gptc/b.py is in it or in its RECORD"),
        ((EMPTY,), {"more": "gptc/c.py"}, "gptc/c.py is in it or in its RECORD alone"),
        (("gptc/a.py,,",), {}, "gptc/a.py has no hash in RECORD"),
    ],
)
def test_a_wheel_that_is_not_its_record_has_no_bill(
    tmp_path: Path, rows: tuple[str, ...], changes: dict[str, str], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        sbom.bill(make_wheel(tmp_path, *rows, **changes), "")


def test_the_bill_of_the_wheel_that_is_installed(tmp_path: Path) -> None:
    """A wheel of the files that pip has installed, with the RECORD that they had in theirs."""
    try:
        installed = distribution("gptc")
    except PackageNotFoundError:
        pytest.skip("gptc is not installed")
    kept = [file for file in installed.files or () if file.parts[0] in ("gptc", DIST_INFO)]
    kept = [file for file in kept if "__pycache__" not in file.parts and file.locate().is_file()]
    if Path("gptc", "libgpt.so") not in map(Path, kept):
        pytest.skip("gptc is installed without its library, as from a folder of sources")
    wheel = tmp_path / f"{DIST_INFO.removesuffix('.dist-info')}-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in kept:
            if file.name != "RECORD":
                archive.write(file.locate(), str(file))
                continue
            # Without the scripts and caches that pip added.
            rows = csv.reader(io.StringIO(file.read_text()))
            own = [",".join(row) for row in rows if row[0] in set(map(str, kept))]
            archive.writestr(str(file), "\n".join(own) + "\n")
    command = [sys.executable, ROOT / "tools" / "sbom.py", wheel]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    parts = {part["name"]: part for part in made["components"]}
    requires = installed.requires or []
    needed = names([line for line in requires if "extra ==" not in line])
    assert {"cffi", "numpy", "scipy-openblas32"} < needed
    for scope, wanted in (("required", needed), ("optional", names(requires) - needed)):
        assert {name for name, part in parts.items() if part.get("scope") == scope} == wanted
    # The library, its header, the data: each file of the package, by its content.
    files = {name for name, part in parts.items() if part["type"] == "file"}
    assert {"gptc/libgpt.so", "gptc/gpt.h", "gptc/gptc.pc", "gptc/py.typed"} <= files
    assert {str(file) for file in kept if file.parts[0] == "gptc"} <= files
    for file in kept:
        if file.parts[0] == "gptc":
            content = hashlib.sha256(file.locate().read_bytes()).hexdigest()
            assert parts[str(file)]["hashes"] == [{"alg": "SHA-256", "content": content}]


# ---- the packages of Debian that the README names ----


def readme_packages() -> list[str]:
    """README's packages for a fresh Debian; git only brings the clone."""
    (line,) = re.findall(r"`apt-get install ([^`]+)`", (ROOT / "README.md").read_text("utf-8"))
    return [name for name in line.split() if name != "git"]


def test_cmake_needs_a_c_compiler_and_python_alone() -> None:
    assert readme_packages() == ["gcc", "libc6-dev", "python3-venv"]
    listed = (ROOT / "CMakeLists.txt").read_text("utf-8")
    assert re.findall(r"^project\(.* LANGUAGES (.*)\)", listed, re.MULTILINE) == ["C"]
    assert set(re.findall(r"find_package\((\w+)", listed)) == {"Python", "Threads"}
    assert re.search(r"option\(GPTC_SYSTEM_OPENBLAS .* OFF\)", listed)
    # Its CMake and Ninja come from PyPI where they are missing.
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]
    assert "scikit-build-core" in names(build["requires"])


def test_system_headers_are_those_of_the_readme_packages(tmp_path: Path) -> None:
    if not (shutil.which("dpkg-query") and shutil.which("gcc")):
        pytest.skip("needs gcc of a Debian")

    def query(*arguments: str) -> str:
        return subprocess.run(["dpkg-query", *arguments], capture_output=True, text=True).stdout

    allowed, found = set(), readme_packages()
    while found:
        name = found.pop()
        if name not in allowed:
            allowed.add(name)
            depends = query("-W", "-f", "${Depends},${Pre-Depends}\n", name)
            found += re.findall(r"(?:^|[,|])\s*([a-z0-9][a-z0-9+.-]+)", depends)
    if not {"gcc", "libc6-dev"} <= set(query("-W", "-f", "${Package}\n", *allowed).split()):
        pytest.skip("needs gcc of a Debian")

    sources = [*(ROOT / "csrc").rglob("*.c"), *(ROOT / "csrc").rglob("*.h")]
    text = "\n".join(path.read_text("utf-8") for path in sources if path.parent.name != "cuda")
    headers = set(re.findall(r"^# *include <([^>]+)>", text, re.MULTILINE))
    assert {"math.h", "pthread.h", "sys/mman.h"} < headers
    everything = tmp_path / "headers.c"
    everything.write_text("".join(f"#include <{header}>\n" for header in sorted(headers)))
    run = subprocess.run(
        ["gcc", "-M", "-D_GNU_SOURCE", everything], capture_output=True, text=True, check=True
    )
    files = {str(Path(word).resolve()) for word in run.stdout.split() if word[0] == "/"}
    owners = query("-S", *files - {str(everything)}).splitlines()
    assert len(owners) > 20
    assert {line.partition(":")[0] for line in owners} <= allowed
