"""Programs of others: a test names those that it needs, and the summary says which ones ran."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_RAN, _MISSING = "ran", "missing"
_seen: dict[str, dict[str, None]] = {_RAN: {}, _MISSING: {}}


class Started(NamedTuple):
    """A process of `gptc serve`."""

    url: str
    run: Path  # its model
    pid: int


class Others:
    """The programs that a test needs. One that is missing skips the test."""

    def __init__(self, note: Callable[[str, object], None]) -> None:
        self._note = note

    def package(self, name: str, module: str | None = None) -> Any:
        """The module of a package of PyPI."""
        try:
            found = importlib.import_module(module or name.replace("-", "_"))
        except ImportError:
            self._miss(f"pip install {name}")
        self._note(_RAN, f"{name} {version(name)}")
        return found

    def program(self, *names: str, install: str) -> str:
        """The path of the first of these programs."""
        for name in names:
            if path := shutil.which(name):
                self._note(_RAN, name)
                return path
        return self._miss(install)

    def file(self, path: Path, name: str, install: str) -> str:
        """The text of a file that another package manager has installed."""
        if not path.is_file():
            self._miss(install)
        self._note(_RAN, name)
        return str(path.read_text("utf-8"))

    def _miss(self, install: str) -> Any:
        self._note(_MISSING, install)
        pytest.skip(install)


def note(report: pytest.TestReport) -> None:
    """Keeps the programs of a test that has ended."""
    for name, value in report.user_properties:
        if name in _seen:
            _seen[name][str(value)] = None


def summary() -> list[str]:
    """A line of programs that ran, and one of those that are missing."""
    ran, missing = sorted(_seen[_RAN]), sorted(_seen[_MISSING])
    lines = [f"clients that ran: {', '.join(ran) or 'none'}"]
    if missing:
        lines.append(f"clients that did not: {', '.join(missing)}")
    return lines
