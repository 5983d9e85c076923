"""Sizes on the command line take suffixes, and wrong ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import pytest

from gptc.cli import cli
from gptc.cli.params import COUNT, FiniteNumber, SizeParam


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("300", 300),
        ("64K", 64_000),
        ("64k", 64_000),
        ("64Ki", 65_536),
        ("2M", 2_000_000),
        ("1.5M", 1_500_000),
        ("1G", 1_000_000_000),
        ("0.1T", 100_000_000_000),
        ("9007199254740993", 9_007_199_254_740_993),  # no float in between
    ],
)
def test_sizes_have_suffixes(text: str, size: int) -> None:
    assert SizeParam().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5", "0.0001K", "1KB", "1e3", "٣", "1 000"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SizeParam().convert(text, None, None)


def test_a_size_has_a_least_value() -> None:
    with pytest.raises(click.BadParameter, match="less than 1"):
        COUNT.convert("0", None, None)
    with pytest.raises(click.BadParameter, match=r"^1K is more than 999$"):
        SizeParam(max=999).convert("1K", None, None)
    with pytest.raises(click.BadParameter, match=r"^0 is not above 0$"):
        FiniteNumber(min=0, min_open=True).convert("0", None, None)


@pytest.mark.parametrize("text", ["nan", "-nan", "inf", "-inf", "-1", "x"])
def test_a_number_that_is_not_finite_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        FiniteNumber(min=0).convert(text, None, None)
    assert FiniteNumber(min=0).convert("0.5", None, None) == 0.5


def test_no_option_has_nan_in_its_range() -> None:
    found: list[str] = []

    def visit(command: click.Command) -> None:
        for param in command.params:
            if isinstance(param.type, click.FloatRange | FiniteNumber):
                found.append(f"{command.name} {param.name}")
                with pytest.raises(click.BadParameter, match="nan is not a finite number"):
                    param.type.convert("nan", param, None)
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                visited = command.get_command(context, name)
                assert visited is not None
                visit(visited)

    visit(cli)
    assert {"serve seconds", "speedrun target"} <= set(found)


def test_a_file_that_is_given_twice_is_refused(gptc: Callable[..., Any]) -> None:
    found: list[str] = []
    context = click.Context(cli)
    for command in cli.list_commands(context):
        for param in cli.get_command(context, command).params:  # type: ignore[union-attr]
            read = param.metavar in ("PATH", "FILE", "DIR", "MODEL") and param.name != "out"
            if isinstance(param, click.Option) and read and not param.multiple:
                name = min(param.opts, key=len)
                ran = gptc(command, name, "a", name, "b c")
                if param.name not in ("runs", "table"):
                    assert f"{name} is given twice, last as 'b c': give it once" in ran.err
                    found.append(f"{command} {name}")
    assert {"infer --prompts", "finetune -m", "eval --data", "train --config"} <= set(found)
