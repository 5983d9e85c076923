"""`gptc infer` at a terminal: asks for one prompt after another."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    click.echo(_HELP, err=True)
    with history():
        while (prompt := typed()) is not None:
            try:
                answer(prompt)
            except KeyboardInterrupt:
                continue
            except GptcError as error:
                click.echo(f"error: {error}", err=True)


@contextmanager
def history() -> Iterator[None]:
    """Lines of earlier sessions can be edited in the block, and its lines are kept for later."""
    path = _open_history() if is_terminal() else None
    try:
        yield
    finally:
        _save_history(path)


def typed(interrupt_ends: bool = False) -> str | None:
    """The next prompt, or None at the end of input. A backslash ends a line that continues.

    Ctrl-C drops what was typed. With `interrupt_ends`, the second in a row where nothing was typed
    ends the input: the first may be meant for an answer that has just ended.
    """
    lines: list[str] = []
    warned = False
    while True:
        try:
            line = input(("... " if lines else ">>> ") if is_terminal() else "")
        except KeyboardInterrupt:
            click.echo()
            if interrupt_ends and not lines and not _half_a_line():
                if warned:
                    return None
                click.echo("Ctrl-C again, or Ctrl-D, quits.", err=True)
                warned = True
            lines = []
            continue
        except EOFError:
            if is_terminal():
                click.echo()
            return None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def is_terminal() -> bool:
    """Whether standard input and output are a terminal."""
    return bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())


def _half_a_line() -> str:
    """What was typed of the line that was interrupted."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline else ""


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
