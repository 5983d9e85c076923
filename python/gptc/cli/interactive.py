"""`gptc infer` at a terminal: prompts by hand, one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click

from gptc.errors import GptcError

_HELP = (
    "Type the beginning of a text. Enter alone goes on, \\ at a line's end adds a line, "
    "Ctrl-C stops a text, Ctrl-D ends."
)
_HISTORY = 1000  # lines kept


def converse(answer: Callable[[str], None]) -> None:
    """Asks for prompts until the input ends; answer(prompt) prints a text.

    An empty prompt goes on with the last text. Ctrl-C ends the text that is being written, or the
    line that is being typed, and nothing else.
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
    """A prompt, of several lines where they end with a backslash; None when there is no more."""
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
    """Lines can be edited, and those of earlier sessions called back, where there is readline."""
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
