"""`gptc infer --chat` and `--messages`: conversations."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import click

from gptc.cli.interactive import history, is_terminal, typed
from gptc.cli.writer import write_out
from gptc.errors import GptcError, UsageError
from gptc.files.limits import read_any
from gptc.files.values import parse_json
from gptc.files.whole import write_file
from gptc.files.words import plural
from gptc.generation.chat import Conversation
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.chat import check_messages, choose_template
from gptc.tokenizer.folder import read_template

_HELP = (
    "Type a message; \\ at a line's end adds a line. /help lists commands, Ctrl-C stops an answer, "
    "Ctrl-D quits."
)
_COMMANDS = """\
/reset      begin again, with the same system message
/save FILE  write the messages to a JSON file, for --messages
/quit       leave, as Ctrl-D does
A line that begins with / is a command; a space before it makes it a message."""
_EXAMPLE = 'such as [{"role": "user", "content": "Hello"}]'


def read_messages(name: str) -> dict[str, Any]:
    """The messages in a file, and the tools that an object holds next to them.

    UsageError for what is neither a list of messages nor an object with one.
    """
    where = "standard input" if name == "-" else name
    try:
        if name == "-":
            data = read_any(sys.stdin.buffer, where, "prompt")
        else:
            with Path(name).open("rb") as file:
                data = read_any(file, where, "prompt")
    except OSError as error:
        raise GptcError(f"cannot read the messages {where}: {error.strerror}") from None
    given = parse_json(data.removeprefix(b"\xef\xbb\xbf"), where)
    found = given if isinstance(given, dict) else {"messages": given}
    if not isinstance(found.get("messages"), list):
        raise UsageError(f"{where} holds no list of messages; give one, {_EXAMPLE}")
    try:
        messages = check_messages(found["messages"])
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return {"messages": messages, "tools": found.get("tools")}


def find_template(tokenizer: Tokenizer, given: str | None, tools: Any) -> str:
    """The text of the chat template: the model's, one of its names, or a file's."""
    if given is not None and given not in tokenizer.marks.templates:
        if not Path(given).is_file():
            names = ", ".join(tokenizer.marks.templates)
            known = f" or one of the model's: {names}" if names else ""
            raise UsageError(f"the chat template {given} does not exist: give a file{known}")
        return read_template(Path(given))
    return choose_template(tokenizer, given, bool(tools))


def print_answer(conversation: Conversation, seed: int | None) -> None:
    """Writes the answer to the messages to standard output, and nothing else.

    `seed` was drawn, so it is told, to repeat the answer.
    """
    with closing(conversation):
        _write(conversation, conversation.answer())
    if seed is not None:
        click.echo(f"seed {seed}", err=True)


def talk(conversation: Conversation) -> None:
    """A conversation at the terminal, or with the lines of standard input.

    A message that fails does not end it. GptcError at the end, unless a person has seen it fail.
    """
    saved: set[Path] = set()
    done: list[bool] = []
    if is_terminal():
        click.echo(_HELP, err=True)
    with closing(conversation), history():
        if conversation.messages and conversation.messages[-1]["role"] == "user":
            done.append(_done(lambda: _write(conversation, conversation.answer())))
        while (text := typed(interrupt_ends=True)) is not None and text.split() != ["/quit"]:
            if text.startswith("/"):
                done.append(_done(partial(_command, text, conversation, saved)))
            elif text.strip():
                done.append(_done(partial(_ask, conversation, text)))
    failed = done.count(False)
    if failed and not is_terminal():
        raise GptcError(f"{failed} of {plural(len(done), 'line')} failed: see the errors above")


def _command(text: str, conversation: Conversation, saved: set[Path]) -> None:
    """Carries out a command. GptcError for one that is unknown or fails."""
    name, _, rest = text.strip().partition(" ")
    if name == "/help":
        click.echo(_COMMANDS, err=True)
    elif name == "/reset" and not rest:
        conversation.reset()
        click.echo("a new conversation", err=True)
    elif name == "/save" and rest.strip():
        path = Path(rest.strip()).expanduser()
        if path.exists() and path not in saved:
            raise GptcError(f"{path} exists: give the name of a new file")
        listed = json.dumps(conversation.messages, ensure_ascii=False, indent=2) + "\n"
        try:
            write_file(path, listed.encode("utf-8", "replace"))
        except OSError as error:
            raise GptcError(f"cannot write {path}: {error.strerror}") from None
        saved.add(path)
        click.echo(f"{plural(len(conversation.messages), 'message')} in {path}", err=True)
    elif name == "/save":
        raise GptcError("/save needs the name of a file: /save chat.json")
    else:
        raise GptcError(f"unknown command {text.strip()}: /help lists them")


def _ask(conversation: Conversation, text: str) -> None:
    _write(conversation, conversation.ask(text))


def _done(act: Callable[[], None]) -> bool:
    """Whether an answer or a command did not fail. Ctrl-C and errors end only that."""
    try:
        act()
    except KeyboardInterrupt:
        click.echo()
    except GptcError as error:
        click.echo(f"error: {error}", err=True)
        return False
    return True


def _write(conversation: Conversation, pieces: Generator[str, None, None]) -> None:
    before, ended = conversation.n_forgotten, True
    with closing(pieces):
        for piece in pieces:
            if conversation.n_forgotten and not before:
                click.echo(
                    "note: the context is full: the oldest messages are left out from now on",
                    err=True,
                )
                before = conversation.n_forgotten
            write_out(piece)
            ended = piece.endswith("\n") if piece else ended
    if not ended:
        write_out("\n")
    last = conversation.last
    if last and last.finish in ("length", "context"):
        why = "the context is full" if last.finish == "context" else "--max-tokens is reached"
        click.echo(f"note: the answer is cut: {why}", err=True)
