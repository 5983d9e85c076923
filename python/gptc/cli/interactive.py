"""`gptc infer` at a terminal: asks for one prompt after another."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click

from gptc.errors import GptcError

_HELP = (
    "Type a prompt. Enter continues the last text, \\ at a line's end adds a line, "
    "Ctrl-C stops a text, Ctrl-D quits."
)
_HISTORY = 1000  # lines kept


def converse(answer: Callable[[str], None]) -> None:
    """Asks for prompts until the input ends; answer(prompt) prints a text.

    An empty prompt continues the last text. Ctrl-C only ends the text that is being generated, or
    the line that is being typed.
    """
    history = _open_history()
    click.echo(_HELP, err=True)
    try:
        while (prompt := _ask()) is not None:
            try:
                answer(prompt)
            except KeyboardInterrupt:
                continue
            except GptcError as error:
                click.echo(f"error: {error}", err=True)
    finally:
        _save_history(history)


def _ask() -> str | None:
    """The next prompt, or None at the end of input. A backslash ends a line that continues."""
    lines: list[str] = []
    while True:
        try:
            line = input("... " if lines else ">>> ")
        except KeyboardInterrupt:
            click.echo()
            lines = []
            continue
        except EOFError:
            click.echo()
            return None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _open_history() -> Path | None:
    """Loads the lines of earlier sessions, for editing with readline; None without readline."""
    try:
        import readline
    except ImportError:
        return None
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "gptc" / "history"
    readline.set_history_length(_HISTORY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            readline.read_history_file(path)
    except OSError:
        return None
    return path


def _save_history(path: Path | None) -> None:
    if path is None:
        return
    import readline

    with suppress(OSError):
        readline.write_history_file(path)
