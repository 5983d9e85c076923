"""Every command has help with an example, and the version names the library."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import gptc as package
from gptc.cli import COMMANDS, cli
from gptc.errors import GptcError

Gptc = Callable[..., Any]


def test_help_names_every_command_and_imports_none(tmp_path: Path) -> None:
    code = (
        "import sys; from gptc.cli import run; code = run(['--help']);"
        "print(code, sorted(m for m in sys.modules if m in ('numpy', 'cffi', 'rich', 'tiktoken')"
        " or m.startswith('gptc.')))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    *text, last = out.stdout.splitlines()
    assert last == "0 ['gptc._version', 'gptc.cli', 'gptc.errors']"
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", "\n".join(text), re.MULTILINE)


def test_help_and_completion_do_without_numpy() -> None:
    """It takes as long to import as all else that they need; three commands list the formats."""
    names = [name for name in COMMANDS if name not in ("import", "export", "verify")]
    code = (
        f"import sys; from gptc.cli import run; codes = [run([n, '--help']) for n in {names}];"
        "print(set(codes), 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "{0} False"


def test_the_table_of_commands_is_true() -> None:
    with click.Context(cli) as ctx:
        for name in COMMANDS:
            command = cli.get_command(ctx, name)
            assert command is not None
            assert command.name == name


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_a_group_alone_shows_its_help(gptc: Gptc, arguments: list[str]) -> None:
    ran = gptc(*arguments)
    assert (ran.code, ran.err) == (2, "")
    assert ran.out.startswith(f"Usage: {' '.join(['gptc', *arguments])} [OPTIONS]")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(gptc: Gptc, name: str) -> None:
    ran = gptc(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Usage: gptc {name}" in ran.out
    assert re.search(rf"Examples:\n(.*\n)*?.*gptc {name}", ran.out)


def test_train_help_names_every_option(gptc: Gptc) -> None:
    from dataclasses import fields

    from gptc.training.options import TrainOptions

    text = gptc("train", "--help").out
    for field in fields(TrainOptions):
        assert f"--{field.name.replace('_', '-')} " in text, field.name


def test_train_help_tells_no_untruth_about_presets(gptc: Gptc) -> None:
    from gptc.engine.config import presets
    from gptc.training.defaults import DEFAULTS

    text = " ".join(gptc("train", "--help").out.split())
    assert f"training defaults: {', '.join(presets())}. [tiny]" in text
    options, batches = text.partition("Batches and the optimizer (defaults by preset):")[::2]
    assert options
    for name in {name for table in DEFAULTS.values() for name in table}:
        # Its help ends before the next option, and names no default.
        shown = batches if f"--{name.replace('_', '-')} " in batches else text
        own = shown.partition(f"--{name.replace('_', '-')} ")[2].partition(" --")[0]
        assert not re.search(r"\[[\d.e-]+\]", own), name


def test_finetune_help_has_its_own_defaults(gptc: Gptc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = gptc("finetune", "--help").out
    text = " ".join(shown.split())
    assert re.findall(r"^\w.*:$", shown, re.MULTILINE)[:2] == ["Data, model and output:", "Device:"]
    for absent in ("preset", "--init-from", "bpe:2048", "model and data:"):
        assert absent not in text.lower(), absent
    for own in (
        "[runs/MODEL-DATA] --train-on",
        "with --dpo pairs of them. [4]",
        "[2e-4, with --dpo 1e-5; without adapters 2e-5 and 1e-6]",
        "Number of passes over the training split. [3, unless another limit is given]",
        "Steps between evaluations. [50]",
        "0 = train all weights. [16; 0 on a GPU that --device auto chooses]",
        "AdamW for other parameters. [adamw]",
    ):
        assert own in text, own


def test_version(gptc: Gptc) -> None:
    ran = gptc("--version")
    assert ran.code == 0
    assert ran.out.startswith(f"gptc {package.__version__}\nlibgpt.so ")
    assert re.search(r"ABI \d+, CPU level (portable|avx2|avx512)", ran.out)
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'\nversion = "{package.__version__}"\n' in project


def test_version_without_a_library_says_so(gptc: Gptc, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise GptcError("libgpt.so is not in the gptc package")

    monkeypatch.setattr("gptc.engine.library.load", missing)
    ran = gptc("--version")
    assert ran.code == 0
    assert "libgpt.so: libgpt.so is not in the gptc package" in ran.out


def commands(group: click.Group, ctx: click.Context) -> Any:
    """The commands of a group and of the groups in it."""
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        yield from commands(command, ctx) if isinstance(command, click.Group) else (command,)


def test_values_have_a_letter_and_ranges_no_signs() -> None:
    """Those that click gives to its own types are FLOAT RANGE and [1<=x<=1000]."""
    with click.Context(cli) as ctx:
        for command in commands(cli, ctx):
            help = command.get_help(click.Context(command, info_name=command.name))
            assert not re.search(r"RANGE|INTEGER|FLOAT|<=", help), help
