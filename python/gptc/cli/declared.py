"""Command-line options generated from dataclasses: see gptc.settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from gptc.cli.command import Command
from gptc.cli.complete import complete
from gptc.cli.params import SizeParam, TokenBias
from gptc.settings import Declared, declared, ordered_sections

_PATHS = ("PATH", "DIR", "FILE", "KIND")  # placeholders of paths, or of names that may be paths

_Command = TypeVar("_Command", bound=Callable[..., Any])


def options_of(
    cls: type,
    *,
    only: tuple[str, ...] | None = None,
    without: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
    unset: bool = False,
) -> Callable[[_Command], _Command]:
    """Adds the options of a dataclass to a command.

    `only` and `without` select fields; `defaults` overrides defaults. With `unset`, an option that
    is not given is None, so that a file can supply it; `defaults` are then texts for the help.
    """
    chosen = [
        declaration
        for name, declaration in declared(cls).items()
        if (only is None or name in only) and name not in without
    ]

    def add(command: _Command) -> _Command:
        for declaration in reversed(chosen):
            given = (defaults or {}).get(declaration.name, declaration.default)
            chosen_here = declaration.name in (defaults or {})
            command = _option(declaration, given, unset, chosen_here)(command)
        return command

    return add


def _option(
    declaration: Declared, default: Any, unset: bool, chosen_here: bool
) -> Callable[[_Command], _Command]:
    shown = declaration.default_text
    if default is not None and chosen_here:
        shown = str(default)
    default = None if unset else default
    help = declaration.help + (f"  [{shown}]" if shown else "")
    attributes: dict[str, Any] = {"help": help, "default": default}
    if declaration.kind is bool:
        flag = f"--{declaration.flag}/--no-{declaration.flag}"
        return click.option(flag, declaration.name, **attributes)
    if declaration.placeholder:
        attributes["metavar"] = declaration.placeholder
    if declaration.placeholder in _PATHS or declaration.name == "preset":
        attributes["shell_complete"] = complete
    if declaration.several:
        attributes |= {"multiple": True, "default": (), "callback": _one_or_several}
    if declaration.kind is tuple:
        attributes |= {"multiple": True, "default": ()}
        attributes["type"] = TokenBias() if declaration.name == "bias" else str
    else:
        attributes["type"] = _type(declaration)
    return click.option(f"--{declaration.flag}", declaration.name, **attributes)


def _one_or_several(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> Any:
    """None, a value, or all of them."""
    return value if len(value) > 1 else next(iter(value), None)


def _type(declaration: Declared) -> Any:
    if declaration.choices:
        return click.Choice(declaration.choices)
    if declaration.kind is int:
        return SizeParam(int(declaration.range.least or 0), declaration.words)
    return declaration.kind


class SectionedCommand(Command):
    """A command whose help groups the options of dataclasses by section."""

    declares: tuple[type, ...]
    rest = "Other options"  # the heading of the options that no dataclass declares
    rest_first = False
    homes: Mapping[str, str] = {}  # the sections of other options that go first in one
    titles: Mapping[str, str] = {}  # headings, where they are not the sections' names

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes each section, and one of the command's other options."""
        records = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, section in self.homes.items():
            if record := records.pop(name, None):
                sections.setdefault(section, []).append(record)
        for cls in self.declares:
            options = declared(cls)
            for section in ordered_sections(cls, getattr(cls, "SECTIONS", ())):
                for name, option in options.items():
                    if option.section == section and (record := records.pop(name, None)):
                        sections.setdefault(section, []).append(record)
        rest = {self.rest: [record for record in records.values() if record]}
        ordered = rest | sections if self.rest_first else sections | rest
        for section, found in ordered.items():
            with formatter.section(self.titles.get(section, section)):
                formatter.write_dl(found)
