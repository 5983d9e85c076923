"""Writes docs/options.md from the dataclasses that declare the options.

python tools/options_table.py            # rewrites docs/options.md
python tools/options_table.py --check    # fails if it is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from gptc.cli import LazyGroup
from gptc.data.options import PrepareOptions
from gptc.engine.options import CacheOptions, DeviceOptions
from gptc.generation.options import ChatOptions, Sampling, TextOptions
from gptc.serve.options import ServeOptions
from gptc.settings import declared, markdown
from gptc.training.options import TrainOptions

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"


def command_line(name: str, *declaring: type) -> Iterator[str]:
    """The options of a command that none of these dataclasses declares."""
    elsewhere = {field for cls in declaring for field in declared(cls)}
    command = LazyGroup().get_command(click.Context(LazyGroup()), name)
    assert command is not None
    yield from ("### On the command line alone", "")
    yield from ("| option | meaning | default |", "| --- | --- | --- |")
    for option in command.params:
        if not isinstance(option, click.Option) or option.hidden or option.name in elsewhere:
            continue
        flags = " / ".join([*option.opts, *option.secondary_opts])
        meaning, _, default = (option.help or "").partition("  [")
        cells = (f"`{flags}`", meaning, default.removesuffix("]"))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def lines() -> Iterator[str]:
    """The lines of the page. Each table is one dataclass."""
    yield from (
        "# Options",
        "",
        "`python tools/options_table.py` writes this page from the declarations in the code.",
        "",
        "## `gptc train`",
        "",
        "TOML files for `--config` and `gptc.training.run.train` use the same names.",
        "",
    )
    yield from markdown(TrainOptions, TrainOptions.SECTIONS)
    yield from command_line("train", TrainOptions)
    yield from ("## `gptc infer`", "")
    yield from ("The lines of `--prompts`, `generate` and `stream` use the same names.", "")
    yield from markdown(TextOptions)
    yield from markdown(Sampling)
    yield from markdown(ChatOptions)
    yield from command_line(
        "infer", TextOptions, Sampling, ChatOptions, DeviceOptions, CacheOptions
    )
    yield from ("## `gptc serve`", "", "The keys of a file for `--config` are the same.", "")
    yield from markdown(ServeOptions, ServeOptions.SECTIONS)
    yield from command_line("serve", ServeOptions, DeviceOptions, CacheOptions)
    yield from ("## `gptc prepare`", "", "The same names are options of `gptc.data.prepare`.", "")
    yield from markdown(PrepareOptions)
    yield from command_line("prepare", PrepareOptions)
    yield from ("## Shared options", "")
    yield from ("`gptc train`, `infer`, `serve`, `eval` and `bench` share these.", "")
    yield from markdown(DeviceOptions, ("",))
    yield from ("`gptc infer`, `serve`, `eval` and `bench infer` share this one.", "")
    yield from markdown(CacheOptions)


def page() -> str:
    """The text of docs/options.md."""
    return "\n".join(lines()).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), "utf-8")
    elif PAGE.read_text("utf-8") != page():
        sys.exit("docs/options.md is out of date: run python tools/options_table.py")
