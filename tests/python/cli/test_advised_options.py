"""The commands in messages have only options and arguments that the command takes.

The class: advice that is refused as it is printed, such as `gptc export MODEL`, which needs -m.
The messages are read from the sources: most errors are too rare to be provoked one by one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import gptc
from gptc.cli import COMMANDS, cli

_SOURCES = Path(gptc.__file__).parent
_VALUE = "\N{WHITE SQUARE}"  # in place of what a message formats
_WORD = re.compile(rf"--?[a-z][a-z-]*|[A-Z]+|[0-9]+|\w*{_VALUE}\S*?")


def messages() -> Iterator[tuple[str, str]]:
    """The place of each text in the sources except docstrings, and the text."""
    for path in sorted(_SOURCES.rglob("*.py")):
        source = path.read_text()
        if "gptc " not in source:
            continue
        nodes = list(ast.walk(ast.parse(source)))
        inside: set[int] = set()  # docstrings, and parts of texts with values
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                inside.update(map(id, node.values))
            elif isinstance(node, ast.Expr):
                inside.add(id(node.value))
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                texts = [v.value if isinstance(v, ast.Constant) else _VALUE for v in node.values]
                yield f"{path.name}:{node.lineno}", "".join(map(str, texts))
            elif isinstance(node, ast.Constant) and id(node) not in inside:
                yield f"{path.name}:{node.lineno}", str(node.value)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each gptc command in a message that has options or values."""
    for found in re.finditer(r"\bgptc (\w+)(?=((?: [^\s()]+)*))", text):
        words, after_option = [found[1]], False
        for word in found[2].split():
            bare = word.rstrip(".,;:")
            if not _WORD.fullmatch(bare) and not after_option:
                break
            words.append(bare)
            after_option = bare.startswith("-")
            if bare != word:
                break
        if found[1] in COMMANDS and len(words) > 1:
            yield words


def fault(words: list[str]) -> str:
    """What a command would refuse of these words; "" if nothing."""
    context = click.Context(cli)
    command: click.Command = cli
    rest = list(words)
    while isinstance(command, click.Group) and rest:
        found = command.get_command(context, rest.pop(0))
        if found is None:
            return "no such command"
        command = found
    try:
        parser = command.make_parser(click.Context(command, parent=context))
        values, rest, _ = parser.parse_args(rest)
    except click.UsageError as error:
        return error.format_message()
    if rest:
        return f"unexpected {rest[0]}"
    lacks = [p.name for p in command.params if p.required and not values.get(str(p.name))]
    return f"lacks {lacks[0]}" if lacks and _VALUE in "".join(words) else ""


def test_advised_commands_are_taken() -> None:
    found = [(where, words) for where, text in messages() for words in commands(text)]
    assert len(found) > 25
    assert [(where, words, fault(words)) for where, words in found if fault(words)] == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"merge them: gptc export {_VALUE} --merge --to hf --out CKPT", f"unexpected {_VALUE}"),
        (f"gptc export -m {_VALUE} --merge --to hf, or not", "lacks out"),
        (f"see gptc verify --model {_VALUE}", "No such option"),
    ],
)
def test_wrong_advice_is_found(text: str, why: str) -> None:
    (words,) = commands(text)
    assert why in fault(words)
