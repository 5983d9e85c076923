"""An option is declared once; its help, TOML key, check and documentation come from that line."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from gptc.data.options import PrepareOptions
from gptc.errors import UsageError
from gptc.generation.options import Sampling, TextOptions
from gptc.settings import Range, check, check_types, declared, option, read_toml, to_toml
from gptc.training.options import TrainOptions

ROOT = Path(__file__).resolve().parents[2]

# The only lines that a contributor adds.
NEW_OPTION = '    slack: int = option(3, "Evaluations without progress.", section=SAVE, least=1)\n'


def run(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs `gptc` from a copy of the package."""
    code = "import sys; from gptc.cli import run; sys.exit(run(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one more option, declared in one line."""
    package = tmp_path_factory.mktemp("copy") / "gptc"
    shutil.copytree(ROOT / "python" / "gptc", package)
    file = package / "training" / "run_options.py"
    before, mark, after = file.read_text().partition("    n_layer: int")
    assert mark
    file.write_text(before + NEW_OPTION + mark + after)
    return package


def test_a_new_line_is_an_option_with_help(copy: Path) -> None:
    done = run(copy, "train", "--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    saving = text.partition("Reports and checkpoints:")[2].partition("Changes to the preset")[0]
    assert "--slack N Evaluations without progress. [3]" in saving


def test_a_new_line_is_a_key_of_toml_with_its_type(copy: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('slack = "often"\n')
    done = run(copy, "train", "--config", str(file))
    assert done.returncode == 2
    assert "slack: 'often' is" in done.stderr


def test_a_new_line_is_checked(copy: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("slack = 0\n")
    done = run(copy, "train", "--config", str(file))
    assert done.returncode == 2
    assert "--slack is 0; it must be 1 or more" in done.stderr


def test_a_new_line_is_in_the_documentation(copy: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "options_table.py", "--check"],
        env=os.environ | {"PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "out of date" in done.stderr


def test_the_documentation_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "options_table.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("bounds", "words", "inside", "outside"),
    [
        (Range(least=0), "0 or more", [0, 1e30], [-1e-9, math.inf, math.nan]),
        (Range(above=0), "above 0", [1e-30], [0, -1]),
        (Range(least=0, below=1), "at least 0 and below 1", [0, 0.999], [1, -0.1]),
        (Range(above=0, most=1), "above 0 and at most 1", [1e-9, 1], [0, 1.1]),
        (Range(least=0, most=1), "between 0 and 1", [0, 1], [1.01, -0.01]),
        (Range(least=0, below=2**31), "at least 0 and below 2**31", [2**31 - 1], [2**31]),
        (Range(), "a finite number", [-5, 5], [-math.inf]),
    ],
)
def test_ranges(bounds: Range, words: str, inside: list[float], outside: list[float]) -> None:
    assert str(bounds) == words
    assert all(bounds.holds(x) for x in inside)
    assert not any(bounds.holds(x) for x in outside)


@pytest.mark.parametrize("cls", [TrainOptions, PrepareOptions, Sampling, TextOptions])
def test_every_field_is_an_option_with_a_sound_default(cls: type) -> None:
    options = declared(cls)
    assert list(options) == [field.name for field in fields(cls)]
    for declaration in options.values():
        assert declaration.help.endswith("."), declaration.name
        declaration.check_type(declaration.default, declaration.name)
    cls().check()


@dataclass(frozen=True)
class Few:
    """Three options, one for each kind of check."""

    size: int | None = option(None, "A size.", least=2)
    share: float = option(0.5, "A share.", above=0, most=1)
    kind: str = option("a", "A kind.", choices=("a", "b"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 1}, "--size is 1; it must be 2 or more"),
        ({"size": 2**63}, "--size is 9223372036854775808; it must be below 2**63"),
        ({"share": 0.0}, "--share is 0.0; it must be above 0 and at most 1"),
        ({"share": math.nan}, "--share is nan; it must be above 0 and at most 1"),
        ({"share": 10**400}, f"--share is {10**400}; it must be above 0 and at most 1"),
        ({"kind": "c"}, "--kind is 'c'; it must be one of a, b"),
    ],
)
def test_values_outside_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(Few(**given))  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 1.5}, "size is 1.5; it must be a whole number"),
        ({"size": True}, "size is True; it must be a whole number"),
        ({"kind": 3}, "kind is 3; it must be text"),
        ({"shares": 1}, "unknown option 'shares'; did you mean share?"),
    ],
)
def test_types_and_names_are_checked(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_types(Few, given)
    assert str(caught.value) == message


def test_none_is_left_out_of_toml() -> None:
    assert to_toml(Few()) == 'share = 0.5\nkind = "a"\n'
    assert to_toml(Few(size=3), leave_out=("kind",)) == "size = 3\nshare = 0.5\n"


@pytest.mark.parametrize("text", ["[few]\nsize = 3\n", "[[few]]\nsize = 3\n", "few.size = 3\n"])
def test_a_table_of_toml_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"run.toml: \[few\] is a table, and tables are not read"):
        read_toml(Few, file)
    file.write_text("[size]\na = 3\n")
    with pytest.raises(UsageError, match=r"size is .*it must be a whole number"):
        read_toml(Few, file)


def test_each_text_comes_back_from_toml(tmp_path: Path) -> None:
    """The class: text that TOML cannot hold as JSON writes it."""
    file = tmp_path / "run.toml"
    for text in ("del\x7f", "bell\x07\x1f", "b\udcffad%41.txt", "\u2028\x85\ufeff", 'q"\\\n\t'):
        file.write_text("\ufeff" + to_toml(Few(kind=text)), "utf-8")
        assert read_toml(Few, file)["kind"] == text
    file.write_text('kind = "a"', "utf-16")
    with pytest.raises(UsageError, match=r"run\.toml is not UTF-8 text"):
        read_toml(Few, file)
